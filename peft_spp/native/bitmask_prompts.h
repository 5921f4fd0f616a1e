// SPDX-License-Identifier: Apache-2.0
// y = x W'ᵀ for the tokens of a prompt in bfloat16: a thread makes a few rows of W' in its second-level cache, and
// multiplies all tokens by them there. A matmul of a library would read them from further away, and stop and start
// between chunks of rows.
#pragma once
#include <omp.h>

namespace {

// Rows by tokens whose sums fill the registers: 24 of 32, with four rows and a token next to them.
constexpr Size kTileRows = 4;
constexpr Size kTileTokens = 6;
// Rows that a thread makes at a time: their sums fill a line of y, unless they are too long for the cache.
constexpr Size kBlockRows = 32;
constexpr Size kBlockBytes = 1 << 20;
// The tokens that all rows of a block are multiplied by before the next ones.
constexpr Size kTokenBytes = 1 << 18;

// One more vector than there are columns: rows a power of two apart would share their places in the cache.
inline Size block_stride(Size n) { return words_of(n) * kWord + kStep; }
inline Size block_rows(Size n) {
  Size rows = kBlockBytes / (block_stride(n) * Size(sizeof(BFloat16))) / kTileRows * kTileRows;
  return larger(kTileRows, smaller(kBlockRows, rows));
}

// The sums of a tile, token by token.
template <int kTokens>
void multiply_tile(
    const BFloat16* rows, Size stride, const BFloat16* x, Size x_stride, Size columns, float* sums) {
  Lane total[kTileRows][kTokens];
#pragma GCC unroll 24
  for (int q = 0; q < kTileRows * kTokens; q++) (&total[0][0])[q] = zero();
  for (Size column = 0; column < columns; column += kStep) {
    __m512bh w[kTileRows];
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; r++) w[r] = (__m512bh)_mm512_loadu_si512(rows + r * stride + column);
#pragma GCC unroll 6
    for (int t = 0; t < kTokens; t++) {
      __m512bh token = (__m512bh)_mm512_loadu_si512(x + t * x_stride + column);
#pragma GCC unroll 4
      for (int r = 0; r < kTileRows; r++) total[r][t] = _mm512_dpbf16_ps(total[r][t], w[r], token);
    }
  }
#pragma GCC unroll 6
  for (int t = 0; t < kTokens; t++) {
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; r++) sums[t * kTileRows + r] = sum(total[r][t]);
  }
}

using Tile = void (*)(const BFloat16*, Size, const BFloat16*, Size, Size, float*);
constexpr Tile kTiles[] = {
    multiply_tile<1>, multiply_tile<2>, multiply_tile<3>, multiply_tile<4>, multiply_tile<5>, multiply_tile<6>};

// The rows of y from `row` on; `count` of those in the block are there.
void multiply_tiles(const Weight& weight, const Tokens& tokens, const BFloat16* block, Size row, Size count) {
  Size stride = block_stride(weight.n), columns = words_of(weight.n) * kWord;
  const BFloat16* x = static_cast<const BFloat16*>(tokens.x);
  const BFloat16* bias = static_cast<const BFloat16*>(tokens.bias);
  BFloat16* y = static_cast<BFloat16*>(tokens.y);
  Size tokens_at_once = larger(1, kTokenBytes / (stride * Size(sizeof(BFloat16))) / kTileTokens) * kTileTokens;
  for (Size from = 0; from < tokens.count; from += tokens_at_once) {
    Size to = smaller(from + tokens_at_once, tokens.count);
    for (Size first = 0; first < count; first += kTileRows) {
      for (Size token = from; token < to; token += kTileTokens) {
        float sums[kTileTokens * kTileRows];
        Size some = smaller(kTileTokens, to - token);
        kTiles[some - 1](block + first * stride, stride, x + token * tokens.x_stride, tokens.x_stride, columns, sums);
        for (Size t = 0; t < some; t++) {
          for (Size r = 0; r < smaller(kTileRows, count - first); r++) {
            Size at = row + first + r;
            float own = sums[t * kTileRows + r];
            store(y + (token + t) * weight.m + at, bias == nullptr ? own : own + load(bias + at));
          }
        }
      }
    }
  }
}

// x has zeros up to whole words, and `inputs` room for a block of each thread.
void multiply_prompt(const Weight& weight, const Tokens& tokens, const Adapter* adapters, Size count) {
  Size stride = block_stride(weight.n), most = block_rows(weight.n);
#pragma omp parallel num_threads(threads_for(weight.m * weight.n, tokens.threads))
  {
    Size thread = omp_get_thread_num(), threads = omp_get_num_threads();
    BFloat16* block = reinterpret_cast<BFloat16*>(tokens.inputs) + thread * most * stride;
    for (Size line = 0; line < most; line++)
      std::memset(block + line * stride + weight.n, 0, (stride - weight.n) * sizeof(BFloat16));
    // whole lines of y for each thread
    Size lines = (weight.m + kBlockRows - 1) / kBlockRows;
    Size from = kBlockRows * (lines * thread / threads);
    Size to = smaller(weight.m, kBlockRows * (lines * (thread + 1) / threads));
    for (Size row = from; row < to; row += most) {
      Part part{row, smaller(most, to - row), 0, weight.n, stride, nullptr, nullptr, 1};
      for (Size line = 0; line < part.rows; line++) {
        at_row<BFloat16>(weight, part, line, [&](Place<BFloat16>& place, auto careful) {
          constexpr bool kCareful = decltype(careful)::value;
          BFloat16* target = block + line * stride;
          if (count == 0)
            expand_row<kCareful>(part, place, target);
          else
            scale_row<kCareful>(weight, part, row + line, place, target, adapters, count, tokens.identity != 0);
        });
      }
      multiply_tiles(weight, tokens, block, row, part.rows);
    }
  }
}

}  // namespace

extern "C" Size bitmask_prompt_bytes(Size n) { return block_rows(n) * block_stride(n) * Size(sizeof(BFloat16)); }
extern "C" void bitmask_prompt_avx512_bfloat16(
    const Weight* weight, const Tokens* tokens, const Adapter* adapters, Size count) {
  multiply_prompt(*weight, *tokens, adapters, count);
}
