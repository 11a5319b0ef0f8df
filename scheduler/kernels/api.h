// What the files that are seen from outside share: arrays as they come in, and how they are checked before they become
// plain pointers.
//
// The interface is C: each function takes a pointer to one struct, made of 8-byte words and of arrays. So a library that
// was built once serves any Python and any torch, and a call is one pointer, however much it brings.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "require.h"
#include "threads.h"

#define CAROUSEL_API extern "C" __attribute__((visibility("default")))

namespace carousel {

enum Type : int32_t { kNone = -1, kFloat32, kBfloat16, kFloat64, kInt32, kInt64, kUint8 };
constexpr const char* kTypeNames[] = {"float32", "bfloat16", "float64", "int32", "int64", "uint8"};
template <class T> constexpr Type type_of();
template <> constexpr Type type_of<float>() { return kFloat32; }
template <> constexpr Type type_of<double>() { return kFloat64; }
template <> constexpr Type type_of<int32_t>() { return kInt32; }
template <> constexpr Type type_of<int64_t>() { return kInt64; }

// Numbers that lie one after the other in memory, the last dimension first. Without data: there is none.
struct Array {
  void* data;
  int32_t type;  // one of Type
  int32_t dims;
  int64_t sizes[4];

  explicit operator bool() const { return type != kNone; }
};

constexpr int64_t kAny = -1;

// A matrix of plain numbers, or of a file's blocks: then the array has their bytes.
struct MatrixArray {
  Array array;
  int64_t stored;  // one of Stored, or 0 for plain numbers, whose type the array tells
};

inline void check_array(const Array& array, const char* name, std::initializer_list<int64_t> shape) {
  require(bool(array), name, " is missing");
  require(array.dims == int64_t(shape.size()), name, " must have ", shape.size(), " dimensions, not ", array.dims);
  int64_t axis = 0;
  for (const int64_t size : shape) {
    require(size == kAny || array.sizes[axis] == size, name, ": dimension ", axis, " must be ", size, ", not ",
            array.sizes[axis]);
    ++axis;
  }
}

template <class T>
T* data(const Array& array, const char* name, std::initializer_list<int64_t> shape) {
  check_array(array, name, shape);
  require(array.type == type_of<T>(), name, " must be of dtype ", kTypeNames[type_of<T>()], ", not ",
          kTypeNames[array.type]);
  return static_cast<T*>(array.data);
}

inline void check_threads(int64_t num_threads) {
  require(num_threads >= 1 && num_threads <= 1024, "num_threads must be in [1, 1024], not ", num_threads);
}

// What the last call on this thread failed of.
inline std::string& last_error() {
  static thread_local std::string message;
  return message;
}

// Calls body(); returns whether it went well: 0, 1 for what the caller did wrong, or 2 for anything else.
template <class Body>
int guarded(Body&& body) {
  try {
    body();
    return 0;
  } catch (const std::invalid_argument& error) {
    last_error() = error.what();
    return 1;
  } catch (const std::exception& error) {
    last_error() = error.what();
    return 2;
  }
}

}  // namespace carousel
