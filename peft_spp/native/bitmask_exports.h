// SPDX-License-Identifier: Apache-2.0
// The functions that bitmask.py calls, named by the processor they are for and by dtypes.
#pragma once

#define JOIN_(A, B, C) bitmask_##A##_##B##_##C
#define JOIN(A, B, C) JOIN_(A, B, C)
#define NAME(FUNCTION, DTYPES) JOIN(FUNCTION, TIER, DTYPES)

#define EXPORT_VALUE(DTYPE, VALUE)                                                                                   \
  extern "C" void NAME(count, DTYPE)(                                                                                \
      const VALUE* dense, Size stride, Size m, Size n, std::uint8_t* bitmask, Size* offsets, Size threads) {         \
    count_stored(dense, stride, m, n, bitmask, offsets, threads);                                                    \
  }                                                                                                                  \
  extern "C" void NAME(take, DTYPE)(const VALUE* dense, Size stride, const Weight* weight, Size threads) {           \
    take_stored(dense, stride, *weight, threads);                                                                    \
  }                                                                                                                  \
  extern "C" void NAME(expand, DTYPE)(const Weight* weight, const Part* part, VALUE* out) {                          \
    expand(*weight, *part, out);                                                                                     \
  }                                                                                                                  \
  extern "C" void NAME(merge, DTYPE)(                                                                                \
      const Weight* weight, const Part* part, VALUE* merged, const Adapter* adapters, Size count) {                  \
    merge(*weight, *part, merged, adapters, count);                                                                  \
  }                                                                                                                  \
  extern "C" void NAME(multiply, DTYPE)(const Weight* weight, const Tokens* tokens) {                                \
    tokens->A == nullptr ? multiply_few<VALUE, false>(*weight, *tokens)                                              \
                         : multiply_few<VALUE, true>(*weight, *tokens);                                              \
  }

#define EXPORT_PAIR(DTYPES, VALUE, OTHER)                                                                            \
  extern "C" void NAME(scale, DTYPES)(                                                                               \
      const Weight* weight, const Part* part, OTHER* out, const Adapter* adapters, Size count, Size identity) {      \
    scale<VALUE>(*weight, *part, out, adapters, count, identity != 0);                                               \
  }                                                                                                                  \
  extern "C" void NAME(add_gradients, DTYPES)(                                                                       \
      const Weight* weight, const Part* part, const OTHER* product, const Adapter* adapters, Size count) {           \
    for (Size q = 0; q < count; q++) add_gradients<VALUE>(*weight, *part, product, adapters[q]);                     \
  }

EXPORT_VALUE(float32, float)
EXPORT_VALUE(bfloat16, BFloat16)
EXPORT_VALUE(float16, Half)
EXPORT_PAIR(float32_float32, float, float)
EXPORT_PAIR(float32_bfloat16, float, BFloat16)
EXPORT_PAIR(float32_float16, float, Half)
EXPORT_PAIR(bfloat16_float32, BFloat16, float)
EXPORT_PAIR(bfloat16_bfloat16, BFloat16, BFloat16)
EXPORT_PAIR(bfloat16_float16, BFloat16, Half)
EXPORT_PAIR(float16_float32, Half, float)
EXPORT_PAIR(float16_bfloat16, Half, BFloat16)
EXPORT_PAIR(float16_float16, Half, Half)

extern "C" Size NAME(gradient, parts)(const Part* part) { return gradient_strips(*part); }
