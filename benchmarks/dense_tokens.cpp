// SPDX-License-Identifier: Apache-2.0
// y = x Wᵀ of a few tokens for a dense weight, made as the kernels of compressed weights are: streams of rows far apart,
// prefetched, with float32 sums in registers. What compressed weights win over this is due to their zeros alone.
#include <immintrin.h>
#include <omp.h>

#include <cstdint>
#include <cstring>

namespace {

using Size = std::int64_t;

inline std::uint16_t round(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return std::uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline void store(float* p, float value) { *p = value; }
inline void store(std::uint16_t* p, float value) { *p = round(value); }

#if defined(__AVX512BF16__)
using Lane = __m512;
constexpr Size kLanes = 16;
inline Lane zero() { return _mm512_setzero_ps(); }
inline float sum(Lane value) { return _mm512_reduce_add_ps(value); }
inline Lane add(Lane a, Lane b) { return _mm512_add_ps(a, b); }
struct Floats {
  using Value = float;
  static constexpr Size kStep = 16;
  static Lane load(const float* p) { return _mm512_loadu_ps(p); }
  static Lane multiply_add(Lane w, Lane x, Lane total) { return _mm512_fmadd_ps(w, x, total); }
};
struct BFloats {
  using Value = std::uint16_t;
  static constexpr Size kStep = 32;
  static __m512bh load(const std::uint16_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Lane multiply_add(__m512bh w, __m512bh x, Lane total) { return _mm512_dpbf16_ps(total, w, x); }
};
#else
using Lane = __m256;
inline Lane zero() { return _mm256_setzero_ps(); }
inline Lane add(Lane a, Lane b) { return _mm256_add_ps(a, b); }
inline float sum(Lane value) {
  float at[8], total = 0;
  _mm256_storeu_ps(at, value);
  for (float one : at) total += one;
  return total;
}
struct Floats {
  using Value = float;
  static constexpr Size kStep = 8;
  static Lane load(const float* p) { return _mm256_loadu_ps(p); }
  static Lane multiply_add(Lane w, Lane x, Lane total) { return _mm256_fmadd_ps(w, x, total); }
};
struct BFloats {
  using Value = std::uint16_t;
  static constexpr Size kStep = 8;
  static Lane load(const std::uint16_t* p) {
    __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static Lane multiply_add(Lane w, Lane x, Lane total) { return _mm256_fmadd_ps(w, x, total); }
};
#endif

// n is a multiple of 4 · kStep, and m one of the threads times kRows.
template <class Type, int kRows, int kTokens, int kVectors>
void multiply(const void* weight, Size m, Size n, const void* tokens, void* out, int threads_wanted) {
  using Value = typename Type::Value;
  const Value* w = static_cast<const Value*>(weight);
  const Value* x = static_cast<const Value*>(tokens);
#pragma omp parallel num_threads(threads_wanted)
  {
    Size thread = omp_get_thread_num(), threads = omp_get_num_threads();
    Size from = m * thread / threads, run = (m * (thread + 1) / threads - from) / kRows;
    for (Size i = from; i < from + run; i++) {
      Lane sums[kRows][kTokens][kVectors];
#pragma GCC unroll 64
      for (int q = 0; q < kRows * kTokens * kVectors; q++) (&sums[0][0][0])[q] = zero();
      for (Size j = 0; j < n; j += kVectors * Type::kStep) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) {
          decltype(Type::load(w)) row[kRows];
#pragma GCC unroll 4
          for (int r = 0; r < kRows; r++) {
            const Value* p = w + (i + r * run) * n + j + v * Type::kStep;
            _mm_prefetch(reinterpret_cast<const char*>(p) + 1024, _MM_HINT_T0);
            row[r] = Type::load(p);
          }
#pragma GCC unroll 8
          for (int t = 0; t < kTokens; t++) {
            auto column = Type::load(x + t * n + j + v * Type::kStep);
#pragma GCC unroll 4
            for (int r = 0; r < kRows; r++) sums[r][t][v] = Type::multiply_add(row[r], column, sums[r][t][v]);
          }
        }
      }
      for (int r = 0; r < kRows; r++)
        for (int t = 0; t < kTokens; t++) {
          Lane total = sums[r][t][0];
          for (int v = 1; v < kVectors; v++) total = add(total, sums[r][t][v]);
          store(static_cast<Value*>(out) + t * m + i + r * run, sum(total));
        }
    }
  }
}

template <class Type>
void multiply_few(const void* w, Size m, Size n, const void* x, Size tokens, void* y, int threads) {
  if (tokens == 1) return multiply<Type, 4, 1, 2>(w, m, n, x, y, threads);
  if (tokens == 2) return multiply<Type, 2, 2, 2>(w, m, n, x, y, threads);
  if (tokens == 4) return multiply<Type, 2, 4, 1>(w, m, n, x, y, threads);
  multiply<Type, 2, 8, 1>(w, m, n, x, y, threads);
}

}  // namespace

extern "C" void dense_float32(const void* w, Size m, Size n, const void* x, Size tokens, void* y, int threads) {
  multiply_few<Floats>(w, m, n, x, tokens, y, threads);
}
extern "C" void dense_bfloat16(const void* w, Size m, Size n, const void* x, Size tokens, void* y, int threads) {
  multiply_few<BFloats>(w, m, n, x, tokens, y, threads);
}
