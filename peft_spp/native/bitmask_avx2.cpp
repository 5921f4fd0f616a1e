// SPDX-License-Identifier: Apache-2.0
// Compressed weights with AVX2, FMA and F16C: 16 places a step, moved by shuffles out of a table of all bytes.
#include <immintrin.h>

#include "bitmask.h"

#define TIER avx2
#define INLINE inline __attribute__((always_inline))

namespace {

using Lane = __m256;
using Mask = std::uint16_t;
constexpr Size kLanes = 8;
constexpr Size kStep = 2 * kLanes;

struct Pair {
  Lane low, high;
};

// For each byte of a bitmask, where its places' values are among the next ones; 0x80 makes a zero.
struct Shuffles {
  alignas(16) std::uint8_t words[256][16];
  alignas(8) std::uint8_t floats[256][8];

  constexpr Shuffles() : words(), floats() {
    for (int byte = 0; byte < 256; byte++) {
      int next = 0;
      for (int j = 0; j < 8; j++) {
        bool stored = byte >> j & 1;
        words[byte][2 * j] = stored ? 2 * next : 0x80;
        words[byte][2 * j + 1] = stored ? 2 * next + 1 : 0x80;
        floats[byte][j] = stored ? next : 0x80;
        next += stored;
      }
    }
  }
};
constexpr Shuffles kShuffles;

INLINE Lane zero() { return _mm256_setzero_ps(); }
INLINE Lane broadcast(float value) { return _mm256_set1_ps(value); }
INLINE Lane load_lane(const float* p) { return _mm256_loadu_ps(p); }
INLINE void store_lane(float* p, Lane value) { _mm256_storeu_ps(p, value); }
INLINE Lane add(Lane a, Lane b) { return _mm256_add_ps(a, b); }
INLINE Lane multiply(Lane a, Lane b) { return _mm256_mul_ps(a, b); }
INLINE Lane multiply_add(Lane a, Lane b, Lane c) { return _mm256_fmadd_ps(a, b, c); }
INLINE float sum(Lane value) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}
INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
INLINE int ones(unsigned places) { return _mm_popcnt_u32(places); }

INLINE Mask load_places(const std::uint8_t* bits, Size step) {
  Mask places;
  std::memcpy(&places, bits + step * sizeof places, sizeof places);
  return places;
}

template <bool kCareful, class Value>
INLINE __m128i expanded_words(const Value* p, unsigned byte) {
  Value values[kLanes] = {};
  const Value* from = p;
  if (kCareful) {
    // of no values at all there is no address
    if (byte != 0) std::memcpy(values, p, ones(byte) * sizeof(Value));
    from = values;
  }
  __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm_shuffle_epi8(packed, _mm_load_si128(reinterpret_cast<const __m128i*>(kShuffles.words[byte])));
}
template <bool kCareful>
INLINE Lane expanded_floats(const float* p, unsigned byte) {
  float values[kLanes] = {};
  const float* from = p;
  if (kCareful) {
    if (byte != 0) std::memcpy(values, p, ones(byte) * sizeof(float));
    from = values;
  }
  __m256i index = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kShuffles.floats[byte])));
  Lane moved = _mm256_permutevar8x32_ps(_mm256_loadu_ps(from), index);
  return _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_srai_epi32(index, 31), _mm256_castps_si256(moved)));
}

INLINE Lane widen(const BFloat16*, __m128i values) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(values), 16));
}
INLINE Lane widen(const Half*, __m128i values) { return _mm256_cvtph_ps(values); }

template <bool kCareful, class Value>
INLINE Pair expand_pair(const Value* p, Mask places) {
  unsigned low = places & 0xff, high = places >> 8;
  Lane first = widen(p, expanded_words<kCareful>(p, low));
  return {first, widen(p, expanded_words<kCareful>(p + ones(low), high))};
}
template <bool kCareful>
INLINE Pair expand_pair(const float* p, Mask places) {
  unsigned low = places & 0xff, high = places >> 8;
  return {expanded_floats<kCareful>(p, low), expanded_floats<kCareful>(p + ones(low), high)};
}

INLINE void store_pair(float* p, Pair values) {
  _mm256_storeu_ps(p, values.low);
  _mm256_storeu_ps(p + kLanes, values.high);
}

// The bits as they are, without a conversion that would change a NaN's.
template <bool kCareful, class Value>
INLINE void expand_into(const Value* p, Mask places, Value* out) {
  unsigned low = places & 0xff, high = places >> 8;
  __m128i* to = reinterpret_cast<__m128i*>(out);
  _mm_storeu_si128(to, expanded_words<kCareful>(p, low));
  _mm_storeu_si128(to + 1, expanded_words<kCareful>(p + ones(low), high));
}
template <bool kCareful>
INLINE void expand_into(const float* p, Mask places, float* out) {
  store_pair(out, expand_pair<kCareful>(p, places));
}

INLINE Pair load_pair(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + kLanes)}; }
template <class Value>
INLINE Pair load_pair(const Value* p) {
  const __m128i* from = reinterpret_cast<const __m128i*>(p);
  return {widen(p, _mm_loadu_si128(from)), widen(p, _mm_loadu_si128(from + 1))};
}

// As `store` rounds, with 16 bits of each 32.
INLINE __m256i round(Lane value) {
  __m256i bits = _mm256_castps_si256(value);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(
      _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan);
}
INLINE void store_pair(BFloat16* p, Pair values) {
  // packing takes turns between the halves of its operands
  __m256i packed = _mm256_packus_epi32(round(values.low), round(values.high));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
INLINE void store_pair(Half* p, Pair values) {
  __m128i* to = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(to, _mm256_cvtps_ph(values.low, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(to + 1, _mm256_cvtps_ph(values.high, _MM_FROUND_TO_NEAREST_INT));
}

// Which of the places are not +0.0.
template <class Value>
INLINE Mask stored_places(const Value* p) {
  __m256i zeros = _mm256_cmpeq_epi16(
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_setzero_si256());
  __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(zeros), _mm256_extracti128_si256(zeros, 1));
  return Mask(~_mm_movemask_epi8(bytes));
}
INLINE Mask stored_places(const float* p) {
  auto zeros = [](const float* from) {
    __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(values, _mm256_setzero_si256())));
  };
  return Mask(~(zeros(p) | zeros(p + kLanes) << kLanes));
}

template <class Value>
INLINE void compress_into(const Value* from, Mask places, Value* p) {
  for (unsigned left = places; left != 0; left &= left - 1) *p++ = from[__builtin_ctz(left)];
}

template <class Value>
struct Products {
  using Input = float;
  using Operand = Pair;
  template <int kSums, int kIndex>
  static INLINE void add(Lane* sums, Pair w, const float* x) {
    Lane& first = sums[(2 * kIndex) % kSums];
    first = multiply_add(w.low, _mm256_loadu_ps(x), first);
    Lane& second = sums[(2 * kIndex + 1) % kSums];
    second = multiply_add(w.high, _mm256_loadu_ps(x + kLanes), second);
  }
  template <bool kCareful>
  static INLINE Pair expand(const Value* p, Mask places) {
    return expand_pair<kCareful>(p, places);
  }
};

// Rows that are walked together for so many sums a row, and vectors that a sum is in: 16 registers.
constexpr int rows_together(int sums) { return sums <= 4 ? 2 : 1; }
constexpr int vectors_a_sum(int sums) { return sums <= 2 ? 2 : 1; }
constexpr bool kEveryCount = true;

}  // namespace

#include "bitmask_kernels.h"
