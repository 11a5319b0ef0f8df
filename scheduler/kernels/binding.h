// What the files that are seen from Python share: how a tensor is checked before it becomes a plain pointer.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <initializer_list>

#include "require.h"
#include "threads.h"

namespace py = pybind11;

namespace carousel {

inline constexpr int64_t kAny = -1;

inline void check_tensor(const at::Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
  require(tensor.defined() && tensor.device().is_cpu(), name, " must be a CPU tensor");
  require(tensor.is_contiguous(), name, " must be contiguous");
  require(tensor.dim() == int64_t(shape.size()), name, " must have ", shape.size(), " dimensions, not ", tensor.dim());
  int64_t axis = 0;
  for (const int64_t size : shape) {
    require(size == kAny || tensor.size(axis) == size, name, ": dimension ", axis, " must be ", size, ", not ",
            tensor.size(axis));
    ++axis;
  }
}

template <class T>
const T* data(const at::Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
  check_tensor(tensor, name, shape);
  require(tensor.scalar_type() == c10::CppTypeToScalarType<T>::value, name, " must be of dtype ",
          c10::CppTypeToScalarType<T>::value, ", not ", tensor.scalar_type());
  return tensor.const_data_ptr<T>();
}

inline void check_threads(int num_threads) {
  require(num_threads >= 1 && num_threads <= 1024, "num_threads must be in [1, 1024], not ", num_threads);
}

// Everything that is done with logits.
void bind_sampling(py::module_& module);

}  // namespace carousel
