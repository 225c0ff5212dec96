// Structs of parameters filled from Python's keyword arguments, each of which must be given, and no other; pointers come as integers.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace isdaa {

// Kept for the life of the process, so that a call makes no string.
inline std::vector<pybind11::handle> split_names(const char* names) {
  std::vector<pybind11::handle> found;
  std::stringstream stream(names);
  for (std::string name; std::getline(stream, name, ',');) {
    const size_t begin = name.find_first_not_of(" \n"), end = name.find_last_not_of(" \n");
    found.push_back(PyUnicode_InternFromString(name.substr(begin, end - begin + 1).c_str()));
  }
  return found;
}

template <class Field>
void take_keyword(Field& field, pybind11::handle name, const pybind11::dict& arguments) {
  const pybind11::handle value = PyDict_GetItemWithError(arguments.ptr(), name.ptr());
  if (!value) throw std::invalid_argument(std::string(pybind11::str(name)) + ": expected a value, got none");
  try {
    if constexpr (std::is_pointer_v<Field>) field = reinterpret_cast<Field>(value.cast<uintptr_t>());
    else field = value.cast<Field>();
  } catch (const pybind11::cast_error&) {
    throw std::invalid_argument(std::string(pybind11::str(name)) + ": expected another type, got " + std::string(pybind11::repr(value)));
  }
}

template <class Params>
Params from_keywords(const pybind11::dict& arguments) {
  static const std::vector<pybind11::handle> names = split_names(Params::field_names);
  Params params{};
  size_t at = 0;
  std::apply([&](auto&... field) { (take_keyword(field, names[at++], arguments), ...); }, params.fields());
  if (arguments.size() == names.size()) return params;
  for (const auto& item : arguments)
    if (std::none_of(names.begin(), names.end(), [&](pybind11::handle name) { return name.equal(item.first); }))
      throw std::invalid_argument(std::string(pybind11::str(item.first)) + ": no such argument");
  return params;
}

}  // namespace isdaa
