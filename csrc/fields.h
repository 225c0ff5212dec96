// Parameters of a kernel by name: the bindings fill them from keyword arguments, each of which must be given, and no other.
#pragma once
#include <cstdint>
#include <tuple>

#define ISDAA_FIELDS(...)                                  \
  static constexpr const char* field_names = #__VA_ARGS__; \
  auto fields() { return std::tie(__VA_ARGS__); }

namespace isdaa {

enum DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

}  // namespace isdaa
