// SPDX-License-Identifier: Apache-2.0
// Compressed weights in plain C++, for any processor: 16 places a step. And what the processor has.
#include "bitmask.h"

#define TIER portable
#define INLINE inline __attribute__((always_inline))

namespace {

using Mask = std::uint16_t;
constexpr Size kLanes = 8;
constexpr Size kStep = 2 * kLanes;

struct Lane {
  float at[kLanes];
};
struct Pair {
  Lane low, high;
};

template <class Function>
INLINE Lane each(Function function) {
  Lane result;
  for (Size j = 0; j < kLanes; j++) result.at[j] = function(j);
  return result;
}

INLINE Lane broadcast(float value) {
  return each([=](Size) { return value; });
}
INLINE Lane zero() { return broadcast(0.0f); }
INLINE Lane load_lane(const float* p) {
  return each([=](Size j) { return p[j]; });
}
INLINE void store_lane(float* p, const Lane& value) { std::memcpy(p, value.at, sizeof value.at); }
INLINE Lane add(const Lane& a, const Lane& b) {
  return each([&](Size j) { return a.at[j] + b.at[j]; });
}
INLINE Lane multiply(const Lane& a, const Lane& b) {
  return each([&](Size j) { return a.at[j] * b.at[j]; });
}
// One rounding where the bits of W' depend on it.
INLINE Lane multiply_add(const Lane& a, const Lane& b, const Lane& c) {
  return each([&](Size j) { return std::fmaf(a.at[j], b.at[j], c.at[j]); });
}
INLINE float sum(const Lane& value) {
  float total = 0;
  for (float one : value.at) total += one;
  return total;
}
INLINE void prefetch(const void*) {}
INLINE int ones(Mask places) { return __builtin_popcount(places); }

INLINE Mask load_places(const std::uint8_t* bits, Size step) {
  return Mask(bits[2 * step] | bits[2 * step + 1] << 8);
}

INLINE float load(const Half* p) {
  std::uint32_t sign = std::uint32_t(p->bits & 0x8000) << 16, rest = p->bits & 0x7fff, bits;
  if (rest >= 0x7c00) {
    bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
  } else if (rest >= 0x400) {
    bits = sign | ((rest << 13) + ((127 - 15) << 23));
  } else {
    float value = float(rest) * 0x1p-24f;
    std::memcpy(&bits, &value, sizeof bits);
    bits |= sign;
  }
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
INLINE void store(Half* p, float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  std::uint32_t sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff, half;
  if (rest > 0x7f800000) {
    half = 0x7e00;
  } else if (rest >= 0x477ff000) {
    half = 0x7c00;
  } else if (rest >= 0x38800000) {
    half = (rest - ((127 - 15) << 23) + 0xfff + ((rest >> 13) & 1)) >> 13;
  } else {
    // adding 0.5 leaves 24 bits of the sum, the last of which is the last of a denormal number: it is rounded there
    float magnitude;
    std::memcpy(&magnitude, &rest, sizeof magnitude);
    magnitude += 0.5f;
    std::memcpy(&half, &magnitude, sizeof half);
    half -= 0x3f000000;
  }
  p->bits = std::uint16_t(sign | half);
}

template <class Value>
INLINE bool is_stored(Value value) {
  return value.bits != 0;
}
INLINE bool is_stored(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits != 0;
}

// Without a branch a place that is not stored reads the next value, which the last rows do not have.
template <bool kCareful, class Value>
INLINE void expand_into(const Value* p, Mask places, Value* out) {
  for (Size j = 0; j < kStep; j++) {
    bool stored = places >> j & 1;
    Value value{};
    if (!kCareful || stored) value = *p;
    out[j] = stored ? value : Value{};
    p += stored;
  }
}

template <class Value>
INLINE Pair load_pair(const Value* p) {
  return {each([=](Size j) { return load(p + j); }), each([=](Size j) { return load(p + kLanes + j); })};
}
template <bool kCareful, class Value>
INLINE Pair expand_pair(const Value* p, Mask places) {
  Value values[kStep];
  expand_into<kCareful>(p, places, values);
  return load_pair(values);
}
template <class Out>
INLINE void store_pair(Out* p, const Pair& values) {
  for (Size j = 0; j < kLanes; j++) store(p + j, values.low.at[j]);
  for (Size j = 0; j < kLanes; j++) store(p + kLanes + j, values.high.at[j]);
}

template <class Value>
INLINE Mask stored_places(const Value* p) {
  unsigned places = 0;
  for (Size j = 0; j < kStep; j++) places |= unsigned(is_stored(p[j])) << j;
  return Mask(places);
}
template <class Value>
INLINE void compress_into(const Value* from, Mask places, Value* p) {
  for (Size j = 0; j < kStep; j++)
    if (places >> j & 1) *p++ = from[j];
}

template <class Value>
struct Products {
  using Input = float;
  using Operand = Pair;
  template <int kSums, int kIndex>
  static INLINE void add(Lane* sums, const Pair& w, const float* x) {
    for (Size j = 0; j < kLanes; j++) sums[0].at[j] += w.low.at[j] * x[j];
    for (Size j = 0; j < kLanes; j++) sums[1 % kSums].at[j] += w.high.at[j] * x[kLanes + j];
  }
  template <bool kCareful>
  static INLINE Pair expand(const Value* p, Mask places) {
    return expand_pair<kCareful>(p, places);
  }
};

constexpr int rows_together(int) { return 1; }
constexpr int vectors_a_sum(int) { return 1; }
// With more loops, compiling this takes half a minute.
constexpr bool kEveryCount = false;

}  // namespace

#include "bitmask_kernels.h"

// 2: AVX-512 with VBMI2 and BF16; 1: AVX2 with FMA; 0: neither.
extern "C" std::int64_t bitmask_tier() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
              __builtin_cpu_supports("popcnt");
  bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bf16");
  return avx2 ? 1 + avx512 : 0;
#else
  return 0;
#endif
}
