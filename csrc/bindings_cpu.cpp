// pybind11 module isdaa_kernels._cpu. Tensors come as raw addresses: the module depends on no torch version.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/linear_logprob_cpu.h"

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

}  // namespace
}  // namespace isdaa

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Row kernels of the CPU backend, over tiles of logits in memory that the caller owns.";
  isdaa::define<float>(m, "float32");
  isdaa::define<double>(m, "float64");
  m.def("instruction_set", &isdaa::instruction_set, "The instruction set in use: avx512, avx2 or baseline.");
  m.def(
      "use_instruction_set",
      [](const std::string& name) {
        if (!isdaa::use_instruction_set(name.c_str()))
          throw std::invalid_argument("name: expected an instruction set of this processor, got " + name);
      },
      py::arg("name"), "Use another instruction set (for tests).");
}
