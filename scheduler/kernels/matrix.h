// A weight as a checkpoint holds it: plain numbers, or the block formats of GGUF files.
//
// A quantised weight is codes: small unsigned integers along k in groups, and w = scale * (code - offset) + minimum
// with a scale, and in some formats a minimum, for each group. That is all the kernels need to know of a format, so
// they multiply from a file's own bits.
#pragma once

#include <vector>

#include "simd.h"

namespace carousel {

enum class Stored { f32, bf16, q4_0, q4_1, q5_0, q5_1, q8_0, q4_k, q5_k, q6_k };

struct Coding {
  int bits;
  int64_t group;     // codes that share a scale
  bool minimums;     // whether groups have a minimum; else it is 0
  int32_t offset;    // what code stands for zero; 0 where there are minimums
  bool wide_scales;  // scales and minimums need a float; else half precision holds them exactly

  bool operator==(const Coding&) const = default;
};

// A row-major [rows, columns] matrix. Borrowed.
struct Matrix {
  Stored type;
  const void* data;
  int64_t rows, columns;

  bool is_coded() const { return type != Stored::f32 && type != Stored::bf16; }
};

// The bytes of one row. Throws std::invalid_argument if `columns` do not make whole blocks.
int64_t row_bytes(Stored type, int64_t columns);

// Of a coded type.
Coding coding_of(Stored type);

// One row of codes, as read from a matrix or as rounded from numbers.
struct CodedRow {
  std::vector<uint8_t> codes;    // [columns, up to a whole group]
  std::vector<float> scales;     // [groups]
  std::vector<float> minimums;   // [groups], or empty

  void reshape(const Coding& coding, int64_t columns);
};

void read_codes(const Matrix& matrix, int64_t row, CodedRow& to);
void read_values(const Matrix& matrix, int64_t row, float* to);

}  // namespace carousel
