#include "matrix.h"

#include <type_traits>

#include "require.h"

namespace carousel {
namespace {

// The block formats, as ggml lays them out: a file is read where it lies, so these are its bytes.
constexpr int64_t kBlock = 32;    // numbers in a block of the simple formats
constexpr int64_t kSuper = 256;   // and in a super-block of the K formats

#pragma pack(push, 1)
struct Q4_0 { uint16_t scale; uint8_t low[16]; };
struct Q4_1 { uint16_t scale, minimum; uint8_t low[16]; };
struct Q5_0 { uint16_t scale; uint32_t high; uint8_t low[16]; };
struct Q5_1 { uint16_t scale, minimum; uint32_t high; uint8_t low[16]; };
struct Q8_0 { uint16_t scale; int8_t values[32]; };
struct Q4_K { uint16_t scale, minimum; uint8_t sixes[12]; uint8_t low[128]; };
struct Q5_K { uint16_t scale, minimum; uint8_t sixes[12]; uint8_t high[32]; uint8_t low[128]; };
struct Q6_K { uint8_t low[128]; uint8_t high[64]; int8_t scales[16]; uint16_t scale; };
#pragma pack(pop)

// The nibbles of 16 bytes: the low ones first, then the high ones.
void read_nibbles(const uint8_t* from, uint8_t* codes) {
  for (int i = 0; i < 16; ++i) {
    codes[i] = from[i] & 15;
    codes[i + 16] = from[i] >> 4;
  }
}

void add_high_bits(uint32_t high, uint8_t* codes) {
  for (int i = 0; i < 32; ++i) codes[i] |= (high >> i & 1) << 4;
}

// The 6-bit scale and minimum of sub-block j out of eight: four pairs lie whole in the first eight bytes, the other
// four are put together from the last four bytes and the top bits of the first eight.
struct SubScale { int scale, minimum; };
SubScale sub_scale(const uint8_t* sixes, int j) {
  if (j < 4) return {sixes[j] & 63, sixes[j + 4] & 63};
  return {(sixes[j + 4] & 15) | sixes[j - 4] >> 6 << 4, sixes[j + 4] >> 4 | sixes[j] >> 6 << 4};
}

void read(const Q4_0& block, CodedRow& to, int64_t i) {
  read_nibbles(block.low, &to.codes[i * kBlock]);
  to.scales[i] = from_half(block.scale);
}
void read(const Q4_1& block, CodedRow& to, int64_t i) {
  read_nibbles(block.low, &to.codes[i * kBlock]);
  to.scales[i] = from_half(block.scale);
  to.minimums[i] = from_half(block.minimum);
}
void read(const Q5_0& block, CodedRow& to, int64_t i) {
  read_nibbles(block.low, &to.codes[i * kBlock]);
  add_high_bits(block.high, &to.codes[i * kBlock]);
  to.scales[i] = from_half(block.scale);
}
void read(const Q5_1& block, CodedRow& to, int64_t i) {
  read_nibbles(block.low, &to.codes[i * kBlock]);
  add_high_bits(block.high, &to.codes[i * kBlock]);
  to.scales[i] = from_half(block.scale);
  to.minimums[i] = from_half(block.minimum);
}
void read(const Q8_0& block, CodedRow& to, int64_t i) {
  for (int k = 0; k < kBlock; ++k) to.codes[i * kBlock + k] = uint8_t(block.values[k] + 128);
  to.scales[i] = from_half(block.scale);
}

// Q4_K and Q5_K: pairs of sub-blocks share 32 bytes, the first has the low nibbles.
template <class Block>
void read_sub_blocks(const Block& block, CodedRow& to, int64_t i) {
  const float scale = from_half(block.scale), minimum = from_half(block.minimum);
  for (int j = 0; j < 8; ++j) {
    const SubScale part = sub_scale(block.sixes, j);
    to.scales[i * 8 + j] = scale * float(part.scale);
    to.minimums[i * 8 + j] = -(minimum * float(part.minimum));
    uint8_t* codes = &to.codes[i * kSuper + j * 32];
    for (int k = 0; k < 32; ++k) {
      codes[k] = block.low[j / 2 * 32 + k] >> j % 2 * 4 & 15;
      if constexpr (std::is_same_v<Block, Q5_K>) codes[k] |= (block.high[k] >> j & 1) << 4;
    }
  }
}
void read(const Q4_K& block, CodedRow& to, int64_t i) { read_sub_blocks(block, to, i); }
void read(const Q5_K& block, CodedRow& to, int64_t i) { read_sub_blocks(block, to, i); }

void read(const Q6_K& block, CodedRow& to, int64_t i) {
  const float scale = from_half(block.scale);
  for (int j = 0; j < 16; ++j) to.scales[i * 16 + j] = scale * float(block.scales[j]);
  for (int k = 0; k < kSuper; ++k) {
    const int half = k / 128, quarter = k % 128 / 32, lane = k % 32;
    const int low = block.low[half * 64 + quarter % 2 * 32 + lane] >> quarter / 2 * 4 & 15;
    const int high = block.high[half * 32 + lane] >> quarter * 2 & 3;
    to.codes[i * kSuper + k] = uint8_t(low | high << 4);
  }
}

template <class Block>
void read_row(const Matrix& matrix, int64_t row, int64_t block_size, CodedRow& to) {
  const int64_t blocks = matrix.columns / block_size;
  const Block* block = reinterpret_cast<const Block*>(static_cast<const char*>(matrix.data) +
                                                      row * blocks * int64_t(sizeof(Block)));
  for (int64_t i = 0; i < blocks; ++i) read(block[i], to, i);
}

}  // namespace

int64_t row_bytes(Stored type, int64_t columns) {
  const auto blocks = [&](int64_t block, size_t bytes) {
    require(columns % block == 0, "rows of ", columns, " numbers do not make whole blocks of ", block);
    return columns / block * int64_t(bytes);
  };
  switch (type) {
    case Stored::f32: return columns * 4;
    case Stored::bf16: return columns * 2;
    case Stored::q4_0: return blocks(kBlock, sizeof(Q4_0));
    case Stored::q4_1: return blocks(kBlock, sizeof(Q4_1));
    case Stored::q5_0: return blocks(kBlock, sizeof(Q5_0));
    case Stored::q5_1: return blocks(kBlock, sizeof(Q5_1));
    case Stored::q8_0: return blocks(kBlock, sizeof(Q8_0));
    case Stored::q4_k: return blocks(kSuper, sizeof(Q4_K));
    case Stored::q5_k: return blocks(kSuper, sizeof(Q5_K));
    case Stored::q6_k: return blocks(kSuper, sizeof(Q6_K));
  }
  return 0;
}

Coding coding_of(Stored type) {
  switch (type) {
    case Stored::q4_0: return {4, 32, false, 8, false};
    case Stored::q4_1: return {4, 32, true, 0, false};
    case Stored::q5_0: return {5, 32, false, 16, false};
    case Stored::q5_1: return {5, 32, true, 0, false};
    case Stored::q8_0: return {8, 32, false, 128, false};
    case Stored::q4_k: return {4, 32, true, 0, true};
    case Stored::q5_k: return {5, 32, true, 0, true};
    case Stored::q6_k: return {6, 16, false, 32, true};
    default: require(false, "plain numbers have no codes"); return {};
  }
}

void CodedRow::reshape(const Coding& coding, int64_t columns) {
  const int64_t groups = (columns + coding.group - 1) / coding.group;
  codes.assign(groups * coding.group, 0);
  scales.assign(groups, 0.0f);
  minimums.assign(coding.minimums ? groups : 0, 0.0f);
}

void read_codes(const Matrix& matrix, int64_t row, CodedRow& to) {
  to.reshape(coding_of(matrix.type), matrix.columns);
  switch (matrix.type) {
    case Stored::q4_0: return read_row<Q4_0>(matrix, row, kBlock, to);
    case Stored::q4_1: return read_row<Q4_1>(matrix, row, kBlock, to);
    case Stored::q5_0: return read_row<Q5_0>(matrix, row, kBlock, to);
    case Stored::q5_1: return read_row<Q5_1>(matrix, row, kBlock, to);
    case Stored::q8_0: return read_row<Q8_0>(matrix, row, kBlock, to);
    case Stored::q4_k: return read_row<Q4_K>(matrix, row, kSuper, to);
    case Stored::q5_k: return read_row<Q5_K>(matrix, row, kSuper, to);
    case Stored::q6_k: return read_row<Q6_K>(matrix, row, kSuper, to);
    default: return;
  }
}

void read_values(const Matrix& matrix, int64_t row, float* to) {
  if (matrix.type == Stored::f32) {
    std::memcpy(to, static_cast<const float*>(matrix.data) + row * matrix.columns, matrix.columns * sizeof(float));
    return;
  }
  if (matrix.type == Stored::bf16) {
    const bf16* from = static_cast<const bf16*>(matrix.data) + row * matrix.columns;
    for (int64_t k = 0; k < matrix.columns; ++k) to[k] = to_float(from[k]);
    return;
  }
  const Coding coding = coding_of(matrix.type);
  static thread_local CodedRow coded;
  read_codes(matrix, row, coded);
  for (int64_t k = 0; k < matrix.columns; ++k) {
    const float value = coded.scales[k / coding.group] * float(int32_t(coded.codes[k]) - coding.offset);
    to[k] = coding.minimums ? value + coded.minimums[k / coding.group] : value;
  }
}

}  // namespace carousel
