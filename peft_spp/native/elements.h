// SPDX-License-Identifier: Apache-2.0
// What all sources share: the dtypes, an adapter, and the blocks of rows. All of it is local to the file that includes
// it, since files are compiled for different processors.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

extern "C" {

// One adapter: A is (r, n) by rows; B is (m,), times the scaling. The sums go to grad_A, like A, and to
// grad_B_parts, (parts, rows of the region), whose parts are still to be added up.
struct Adapter {
  const float* A;
  const float* B;
  float* grad_A;
  float* grad_B_parts;
  std::int64_t r;
};

}  // extern "C"

namespace {

using Size = std::int64_t;

// Below this many elements waking the other threads costs more than they save.
constexpr Size kParallelElements = 1 << 15;

struct BFloat16 {
  std::uint16_t bits;
};

inline float load(const float* p) { return *p; }
inline float load(const BFloat16* p) {
  std::uint32_t bits = std::uint32_t(p->bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void store(float* p, float value) { *p = value; }
// Round to nearest, ties to even; any NaN becomes the quiet one, as in PyTorch.
inline void store(BFloat16* p, float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  p->bits = value == value ? std::uint16_t(rounded) : std::uint16_t(0x7fc0);
}

inline Size smaller(Size a, Size b) { return b < a ? b : a; }
inline Size larger(Size a, Size b) { return a < b ? b : a; }

// Blocks as in torch.tensor_split: the first m % r have one row more than m / r.
inline Size block_start(Size block, Size m, Size r) { return block * (m / r) + smaller(block, m % r); }
inline Size block_of(Size row, Size m, Size r) {
  Size length = m / r, long_rows = (m % r) * (length + 1);
  return row < long_rows ? row / (length + 1) : m % r + (row - long_rows) / length;
}

// total + product · b in one rounding, which is what torch.addcmul does in the tiled path.
template <bool kFirst>
inline float add_term(float total, float product, float b) {
  return kFirst ? product * b : std::fmaf(product, b, total);
}

template <bool kFirst>
inline void add_terms(const float* w, const float* a, float b, float* total, Size count) {
  for (Size j = 0; j < count; j++) total[j] = add_term<kFirst>(total[j], w[j] * a[j], b);
}

}  // namespace
