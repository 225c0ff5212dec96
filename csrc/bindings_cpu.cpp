// pybind11 module isdaa_kernels._cpu. Tensors come as raw addresses: the module depends on no torch version.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/linear_kl_cpu.h"
#include "cpu/linear_logprob_cpu.h"
#include "cpu/pair_loss_cpu.h"
#include "cpu/product_cpu.h"
#include "cpu/routed_cpu.h"
#include "keywords.h"

namespace py = pybind11;

namespace isdaa {
namespace {

template <typename T>
T* address(uintptr_t value) {
  return reinterpret_cast<T*>(value);
}

template <typename T>
HeadTransform<T> head(uintptr_t bias, uintptr_t inverse_temperature, double constant_inverse_temperature, double logit_scale,
                      double softcap) {
  return {address<const T>(bias), address<const T>(inverse_temperature), (T)constant_inverse_temperature, (T)logit_scale,
          (T)softcap};
}

template <typename T>
void forward_tile(uintptr_t logits, uintptr_t row_index, int64_t logits_stride, uintptr_t scratch, int64_t scratch_stride,
                  int64_t rows, int64_t columns, uintptr_t bias, uintptr_t inverse_temperature,
                  double constant_inverse_temperature, double logit_scale, double softcap, uintptr_t target,
                  uintptr_t running_max, uintptr_t running_sum, uintptr_t target_logit, uintptr_t kept, int64_t kept_stride,
                  uintptr_t entropy_sum, uintptr_t square_sum, uintptr_t logit_sum, uintptr_t top, int64_t top_k,
                  uintptr_t block_lse, int64_t block_lse_stride, int64_t block, int threads) {
  linear_logprob_forward_tile<T>(
      {address<const T>(logits), address<const int64_t>(row_index), logits_stride, address<T>(scratch), scratch_stride, rows,
       columns, head<T>(bias, inverse_temperature, constant_inverse_temperature, logit_scale, softcap),
       address<const int64_t>(target), address<T>(running_max), address<double>(running_sum), address<T>(target_logit),
       address<T>(kept), kept_stride,
       {address<double>(entropy_sum), address<double>(square_sum), address<double>(logit_sum), address<T>(top), top_k},
       address<T>(block_lse), block_lse_stride, block, threads});
}

template <typename T>
void backward_tile(uintptr_t logits, uintptr_t row_index, int64_t logits_stride, uintptr_t gradient, uintptr_t gradient_index,
                   int64_t gradient_stride, int64_t rows, int64_t columns, uintptr_t bias, uintptr_t inverse_temperature,
                   double constant_inverse_temperature, double logit_scale, double softcap, uintptr_t target, uintptr_t lse,
                   uintptr_t coefficient, uintptr_t prob, uintptr_t log_prob, uintptr_t flat, uintptr_t scale, int threads) {
  linear_logprob_backward_tile<T>(
      {address<const T>(logits), address<const int64_t>(row_index), logits_stride, address<T>(gradient),
       address<const int64_t>(gradient_index), gradient_stride, rows, columns,
       head<T>(bias, inverse_temperature, constant_inverse_temperature, logit_scale, softcap), address<const int64_t>(target),
       address<const double>(lse), address<const T>(coefficient), address<const T>(prob), address<const T>(log_prob),
       address<const T>(flat), address<const T>(scale), threads});
}

template <typename T>
RoutedTokens<T> routed_tokens(uintptr_t block_lse, int64_t block_lse_stride, uintptr_t position, uintptr_t lse,
                              uintptr_t coefficient, uintptr_t slope, uintptr_t target, int64_t tokens, int64_t block) {
  return {address<const T>(block_lse), block_lse_stride, address<const int64_t>(position), address<const double>(lse),
          address<const T>(coefficient), address<const T>(slope), address<const int64_t>(target), tokens, block};
}

template <typename T>
void bind_route_blocks(const RoutedTokens<T>& token, double limit, double row_share, int64_t blocks, uintptr_t route, uintptr_t rest,
                       uintptr_t weight_count, uintptr_t hidden_count, int threads) {
  route_blocks<T>({token, (T)limit, row_share, blocks, address<uint8_t>(route), address<T>(rest), address<int64_t>(weight_count),
                   address<int64_t>(hidden_count), threads});
}

template <typename T>
void bind_finish_block(uintptr_t sums, int64_t columns, int64_t width, uintptr_t gradient, uintptr_t rest_hidden, uintptr_t row,
                       uintptr_t out, double limit, double first, double second, int threads) {
  finish_block<T>({address<T>(sums), columns, width, address<const T>(gradient), address<const T>(rest_hidden),
                   address<const int64_t>(row), address<T>(out), (T)limit, (T)first, (T)second, threads});
}

template <typename T>
void define_routed(py::module_& m, const std::string& suffix) {
  const auto free = py::call_guard<py::gil_scoped_release>();
  py::class_<RoutedTokens<T>>(m, ("RoutedTokens_" + suffix).c_str())
      .def(py::init(&routed_tokens<T>), py::arg("block_lse"), py::arg("block_lse_stride"), py::arg("position"), py::arg("lse"),
           py::arg("coefficient"), py::arg("slope"), py::arg("target"), py::arg("tokens"), py::arg("block"));
  m.def(("route_blocks_" + suffix).c_str(), &bind_route_blocks<T>, free, py::arg("token"), py::arg("limit"), py::arg("row_share"),
        py::arg("blocks"), py::arg("route"), py::arg("rest"), py::arg("weight_count"), py::arg("hidden_count"), py::arg("threads"));
  m.def(("finish_block_" + suffix).c_str(), &bind_finish_block<T>, free, py::arg("sums"), py::arg("columns"), py::arg("width"),
        py::arg("gradient"), py::arg("rest_hidden"), py::arg("row"), py::arg("out"), py::arg("limit"), py::arg("first"),
        py::arg("second"), py::arg("threads"));
}

template <typename T>
void define(py::module_& m, const std::string& suffix) {
  const auto free = py::call_guard<py::gil_scoped_release>();
  m.def(("forward_tile_" + suffix).c_str(), &forward_tile<T>, free, py::arg("logits"), py::arg("row_index"),
        py::arg("logits_stride"), py::arg("scratch"), py::arg("scratch_stride"), py::arg("rows"), py::arg("columns"),
        py::arg("bias"), py::arg("inverse_temperature"), py::arg("constant_inverse_temperature"), py::arg("logit_scale"),
        py::arg("softcap"), py::arg("target"), py::arg("running_max"), py::arg("running_sum"), py::arg("target_logit"),
        py::arg("kept"), py::arg("kept_stride"), py::arg("entropy_sum"), py::arg("square_sum"), py::arg("logit_sum"),
        py::arg("top"), py::arg("top_k"), py::arg("block_lse"), py::arg("block_lse_stride"), py::arg("block"),
        py::arg("threads"));
  m.def(("backward_tile_" + suffix).c_str(), &backward_tile<T>, free, py::arg("logits"), py::arg("row_index"),
        py::arg("logits_stride"), py::arg("gradient"), py::arg("gradient_index"), py::arg("gradient_stride"), py::arg("rows"),
        py::arg("columns"), py::arg("bias"), py::arg("inverse_temperature"), py::arg("constant_inverse_temperature"),
        py::arg("logit_scale"), py::arg("softcap"), py::arg("target"), py::arg("lse"), py::arg("coefficient"), py::arg("prob"),
        py::arg("log_prob"), py::arg("flat"), py::arg("scale"), py::arg("threads"));
}

template <class Params>
void define_by_keywords(py::module_& m, const char* name, void (*function)(const Params&, int)) {
  m.def(
      name,
      [function](int threads, const py::kwargs& arguments) {
        const Params params = from_keywords<Params>(arguments);
        py::gil_scoped_release release;
        function(params, threads);
      },
      py::arg("threads"));
}

}  // namespace
}  // namespace isdaa

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Matrix products and row kernels of the CPU backend, over memory that the caller owns.";
  isdaa::define<float>(m, "float32");
  isdaa::define<double>(m, "float64");
  isdaa::define_routed<float>(m, "float32");
  isdaa::define_routed<double>(m, "float64");
  isdaa::define_by_keywords(m, "routed_block_float32", &isdaa::routed_block<float>);
  isdaa::define_by_keywords(m, "routed_block_float64", &isdaa::routed_block<double>);
  isdaa::define_by_keywords(m, "kl_fold_tile_float32", &isdaa::kl_fold_tile<float>);
  isdaa::define_by_keywords(m, "kl_fold_tile_float64", &isdaa::kl_fold_tile<double>);
  isdaa::define_by_keywords(m, "kl_mixture_tile_float32", &isdaa::kl_mixture_tile<float>);
  isdaa::define_by_keywords(m, "kl_mixture_tile_float64", &isdaa::kl_mixture_tile<double>);
  isdaa::define_by_keywords(m, "kl_gradient_tile_float32", &isdaa::kl_gradient_tile<float>);
  isdaa::define_by_keywords(m, "kl_gradient_tile_float64", &isdaa::kl_gradient_tile<double>);
  isdaa::define_by_keywords(m, "pack_panels_float32", &isdaa::pack_panels<float>);
  isdaa::define_by_keywords(m, "pack_panels_float64", &isdaa::pack_panels<double>);
  isdaa::define_by_keywords(m, "multiply_panels_float32", &isdaa::multiply_panels<float>);
  isdaa::define_by_keywords(m, "multiply_panels_float64", &isdaa::multiply_panels<double>);
  m.def("panel_width_float32", &isdaa::panel_width<float>);
  m.def("panel_width_float64", &isdaa::panel_width<double>);
  isdaa::define_by_keywords(m, "pair_loss_forward", &isdaa::pair_loss_forward);
  isdaa::define_by_keywords(m, "pair_loss_backward", &isdaa::pair_loss_backward);
  m.def("instruction_set", &isdaa::instruction_set, "The instruction set in use: avx512, avx2 or baseline.");
  m.def(
      "use_instruction_set",
      [](const std::string& name) {
        if (!isdaa::use_instruction_set(name.c_str()))
          throw std::invalid_argument("name: expected an instruction set of this processor, got " + name);
      },
      py::arg("name"), "Use another instruction set (for tests).");
}
