// SPDX-License-Identifier: Apache-2.0
// Compressed weights with AVX-512, VBMI2 and BF16: 32 places a step.
#include <immintrin.h>

#include "bitmask.h"

#define TIER avx512
#define INLINE inline __attribute__((always_inline))

namespace {

using Lane = __m512;
using Mask = std::uint32_t;
constexpr Size kLanes = 16;
constexpr Size kStep = 2 * kLanes;

struct Pair {
  Lane low, high;
};

INLINE Lane zero() { return _mm512_setzero_ps(); }
INLINE Lane broadcast(float value) { return _mm512_set1_ps(value); }
INLINE Lane load_lane(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store_lane(float* p, Lane value) { _mm512_storeu_ps(p, value); }
INLINE Lane add(Lane a, Lane b) { return _mm512_add_ps(a, b); }
INLINE Lane multiply(Lane a, Lane b) { return _mm512_mul_ps(a, b); }
INLINE Lane multiply_add(Lane a, Lane b, Lane c) { return _mm512_fmadd_ps(a, b, c); }
INLINE float sum(Lane value) { return _mm512_reduce_add_ps(value); }
INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
INLINE int ones(Mask places) { return _mm_popcnt_u32(places); }
INLINE Mask first_places(int count) { return Mask((Word(1) << count) - 1); }

INLINE Mask load_places(const std::uint8_t* bits, Size step) {
  Mask places;
  std::memcpy(&places, bits + step * sizeof places, sizeof places);
  return places;
}

// The zeroing form waits for the old value of its destination: on a Zen 4 it takes 5 cycles, and 1.3 where that is the
// source, which has just been loaded. The intrinsics leave the choice of the register to the compiler.
INLINE __m512i expand_words(Mask places, __m512i values) {
  asm("vpexpandw %0, %0%{%1%}%{z%}" : "+v"(values) : "Yk"(__mmask32(places)));
  return values;
}
INLINE Lane expand_floats(Mask places, Lane values) {
  asm("vexpandps %0, %0%{%1%}%{z%}" : "+v"(values) : "Yk"(__mmask16(places)));
  return values;
}

template <bool kCareful>
INLINE __m512i expanded_words(const void* p, Mask places) {
  return expand_words(
      places, kCareful ? _mm512_maskz_loadu_epi16(first_places(ones(places)), p) : _mm512_loadu_si512(p));
}
template <bool kCareful>
INLINE Lane expanded_floats(const float* p, Mask places) {
  return expand_floats(places, kCareful ? _mm512_maskz_loadu_ps(first_places(ones(places)), p) : _mm512_loadu_ps(p));
}

INLINE Pair widen(const BFloat16*, __m512i values) {
  auto half = [](__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); };
  return {half(_mm512_castsi512_si256(values)), half(_mm512_extracti64x4_epi64(values, 1))};
}
INLINE Pair widen(const Half*, __m512i values) {
  return {_mm512_cvtph_ps(_mm512_castsi512_si256(values)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(values, 1))};
}

template <bool kCareful, class Value>
INLINE Pair expand_pair(const Value* p, Mask places) {
  return widen(p, expanded_words<kCareful>(p, places));
}
template <bool kCareful>
INLINE Pair expand_pair(const float* p, Mask places) {
  Mask low = places & 0xffff;
  return {expanded_floats<kCareful>(p, low), expanded_floats<kCareful>(p + ones(low), places >> kLanes)};
}

// The bits as they are, without a conversion that would change a NaN's.
template <bool kCareful, class Value>
INLINE void expand_into(const Value* p, Mask places, Value* out) {
  _mm512_storeu_si512(out, expanded_words<kCareful>(p, places));
}
template <bool kCareful>
INLINE void expand_into(const float* p, Mask places, float* out) {
  Pair values = expand_pair<kCareful>(p, places);
  _mm512_storeu_ps(out, values.low);
  _mm512_storeu_ps(out + kLanes, values.high);
}

INLINE Pair load_pair(const float* p) { return {_mm512_loadu_ps(p), _mm512_loadu_ps(p + kLanes)}; }
template <class Value>
INLINE Pair load_pair(const Value* p) {
  return widen(p, _mm512_loadu_si512(p));
}

INLINE void store_pair(float* p, Pair values) {
  _mm512_storeu_ps(p, values.low);
  _mm512_storeu_ps(p + kLanes, values.high);
}
INLINE void store_pair(BFloat16* p, Pair values) {
  constexpr int kNaNOrDenormal = 0x80 | 0x20 | 0x01;
  // the instruction takes denormal numbers for zero and keeps a NaN's bits: neither is what `store` does
  __mmask16 low = _mm512_fpclass_ps_mask(values.low, kNaNOrDenormal);
  __mmask16 high = _mm512_fpclass_ps_mask(values.high, kNaNOrDenormal);
  if (__builtin_expect(!_kortestz_mask16_u8(low, high), 0)) {
    float rest[kStep];
    store_pair(rest, values);
    for (Size j = 0; j < kStep; j++) store(p + j, rest[j]);
    return;
  }
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(values.high, values.low));
}
INLINE void store_pair(Half* p, Pair values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(values.low, _MM_FROUND_TO_NEAREST_INT));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + kLanes), _mm512_cvtps_ph(values.high, _MM_FROUND_TO_NEAREST_INT));
}

// Which of the places are not +0.0.
template <class Value>
INLINE Mask stored_places(const Value* p) {
  __m512i values = _mm512_loadu_si512(p);
  return _mm512_test_epi16_mask(values, values);
}
INLINE Mask stored_places(const float* p) {
  __m512i low = _mm512_loadu_si512(p), high = _mm512_loadu_si512(p + kLanes);
  return Mask(_mm512_test_epi32_mask(low, low)) | Mask(_mm512_test_epi32_mask(high, high)) << kLanes;
}

template <class Value>
INLINE void compress_into(const Value* from, Mask places, Value* p) {
  __m512i values = _mm512_maskz_compress_epi16(places, _mm512_loadu_si512(from));
  _mm512_mask_storeu_epi16(p, first_places(ones(places)), values);
}
INLINE void compress_into(const float* from, Mask places, float* p) {
  Mask low = places & 0xffff, high = places >> kLanes;
  _mm512_mask_storeu_ps(p, first_places(ones(low)), _mm512_maskz_compress_ps(low, _mm512_loadu_ps(from)));
  _mm512_mask_storeu_ps(
      p + ones(low), first_places(ones(high)), _mm512_maskz_compress_ps(high, _mm512_loadu_ps(from + kLanes)));
}

// What is multiplied with tokens: pairs of bfloat16 as they are, everything else in float32.
template <class Value>
struct Products {
  using Input = float;
  using Operand = Pair;
  template <int kSums, int kIndex>
  static INLINE void add(Lane* sums, Pair w, const float* x) {
    sums[0] = multiply_add(w.low, _mm512_loadu_ps(x), sums[0]);
    sums[1 % kSums] = multiply_add(w.high, _mm512_loadu_ps(x + kLanes), sums[1 % kSums]);
  }
  template <bool kCareful>
  static INLINE Pair expand(const Value* p, Mask places) {
    return expand_pair<kCareful>(p, places);
  }
};
template <>
struct Products<BFloat16> {
  using Input = BFloat16;
  using Operand = __m512bh;
  template <int kSums, int kIndex>
  static INLINE void add(Lane* sums, __m512bh w, const BFloat16* x) {
    Lane& total = sums[kIndex % kSums];
    total = _mm512_dpbf16_ps(total, w, (__m512bh)_mm512_loadu_si512(x));
  }
  template <bool kCareful>
  static INLINE __m512bh expand(const BFloat16* p, Mask places) {
    return (__m512bh)expanded_words<kCareful>(p, places);
  }
};

// Rows that are walked together for so many sums a row, and vectors that a sum is in: 32 registers.
constexpr int rows_together(int sums) { return sums <= 4 ? 4 : sums <= 8 ? 2 : 1; }
constexpr int vectors_a_sum(int sums) { return sums == 1 ? 2 : 1; }
constexpr bool kEveryCount = true;

}  // namespace

#include "bitmask_kernels.h"
#include "bitmask_prompts.h"
