// SPDX-License-Identifier: Apache-2.0
// y = x W'ᵀ for a few tokens, straight from the compressed weight: for the rows of block k,
// y_i = W_i x + s B_i (W_i (A_k ⊙ x)), so that W is read and expanded once for both products.
#pragma once
#include <omp.h>

namespace {

constexpr int kMostTokens = 8;

// The columns that are multiplied: x of each token and, for an adapter, A_k ⊙ x for each block k, both as rows of whole
// words; zeros stand for the tokens and columns that are not there.
template <class Value>
struct Inputs {
  using Input = typename Products<Value>::Input;

  Input* rows;
  Size padded_tokens, width;

  const Input* of(Size group) const { return rows + group * padded_tokens * width; }

  void write(const Tokens& tokens, Size n, Size group, Size token) const {
    Input* out = rows + (group * padded_tokens + token) * width;
    const Value* x = static_cast<const Value*>(tokens.x) + token * tokens.x_stride;
    const float* a = group == 0 ? nullptr : tokens.A + (group - 1) * n;
    for (Size start = 0; start < width; start += kWord) {
      Size left = token < tokens.count ? smaller(kWord, n - start) : 0;
      Value values[kWord] = {};
      float factors[kWord] = {};
      if (left > 0) {
        std::memcpy(values, x + start, left * sizeof(Value));
        if (a != nullptr) std::memcpy(factors, a + start, left * sizeof(float));
      }
      for (Size j = 0; j < kWord; j += kStep) {
        Pair value = load_pair(values + j);
        if (a != nullptr) {
          Pair factor = load_pair(factors + j);
          Value rounded[kStep];
          store_pair(rounded, Pair{multiply(value.low, factor.low), multiply(value.high, factor.high)});
          value = load_pair(rounded);
        }
        store_pair(out + start + j, value);
      }
    }
  }
};

// The rows `first + r · apart + i` for all r < kRows and i < count. Each of these streams is read in order: neighboring
// rows would often lie a page apart, which stops the hardware's prefetching.
template <class Value, int kRows, int kTokens, bool kAdapter, bool kCareful>
void multiply_rows(
    const Weight& weight, const Tokens& tokens, const Inputs<Value>& inputs, Size first, Size apart, Size count) {
  using Product = Products<Value>;
  using Input = typename Product::Input;
  constexpr int kSums = kAdapter ? 2 * kTokens : kTokens;
  constexpr int kVectors = vectors_a_sum(kSums);
  if (count == 0) return;  // there may be no such row
  const Value* values[kRows];
  const std::uint8_t* bits[kRows];
  for (int r = 0; r < kRows; r++) {
    values[r] = static_cast<const Value*>(weight.values) + weight.row_offsets[first + r * apart];
    bits[r] = bits_of(weight, first + r * apart);
  }
  const Input* plain = inputs.of(0);
  Size words = words_of(weight.n), width = inputs.width;
  for (Size i = 0; i < count; i++) {
    Lane sums[kRows][kSums][kVectors];
    const Input* scaled[kRows];
#pragma GCC unroll 64
    for (int q = 0; q < kRows * kSums * kVectors; q++) (&sums[0][0][0])[q] = zero();
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++)
      scaled[r] = kAdapter ? inputs.of(1 + block_of(first + r * apart + i, weight.m, tokens.r)) : plain;
    auto step = [&](auto index, Size word) {
      constexpr int kIndex = decltype(index)::value;
      typename Product::Operand operand[kRows];
      Size column = word * kWord + kIndex * kStep;
#pragma GCC unroll 4
      for (int r = 0; r < kRows; r++) {
        Mask places = load_places(bits[r], word * kSteps + kIndex);
        operand[r] = Product::template expand<kCareful>(values[r], places);
        if (kIndex % (kSteps * sizeof(float) / (2 * sizeof(Value))) == 0) prefetch_ahead(values[r]);
        values[r] += ones(places);
      }
#pragma GCC unroll 16
      for (int t = 0; t < kSums; t++) {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; r++) {
          const Input* x = t < kTokens ? plain + t * width : scaled[r] + (t - kTokens) * width;
          Product::template add<kVectors, kIndex>(sums[r][t], operand[r], x + column);
        }
      }
    };
    for (Size word = 0; word < words; word++) {
      step(std::integral_constant<int, 0>{}, word);
      step(std::integral_constant<int, 1>{}, word);
      if constexpr (kSteps > 2) {
        step(std::integral_constant<int, 2>{}, word);
        step(std::integral_constant<int, 3>{}, word);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) {
      Size row = first + r * apart + i;
      bits[r] += words * kWordBytes;
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; t++) {
        auto total = [&](int index) {
          Lane all = sums[r][index][0];
          return sum(kVectors == 2 ? add(all, sums[r][index][kVectors - 1]) : all);
        };
        float y = tokens.identity ? total(t) : 0.0f;
        if (kAdapter) y += tokens.B[row] * total(t + (kAdapter ? kTokens : 0));
        if (t < tokens.count) {
          float& all = tokens.sums[t * weight.m + row];
          all = tokens.first ? y : all + y;
        }
      }
    }
  }
}

// Rounds the sums of some rows to y, with the bias.
template <class Value>
void round_rows(const Weight& weight, const Tokens& tokens, Size from, Size to) {
  for (Size row = from; row < to; row += kStep) {
    Size left = smaller(kStep, to - row);
    float bias[kStep] = {};
    if (tokens.bias != nullptr) {
      Value values[kStep] = {};
      std::memcpy(values, static_cast<const Value*>(tokens.bias) + row, left * sizeof(Value));
      store_pair(bias, load_pair(values));
    }
    for (Size t = 0; t < tokens.count; t++) {
      float sums[kStep] = {};
      std::memcpy(sums, tokens.sums + t * weight.m + row, left * sizeof(float));
      for (Size j = 0; j < kStep; j++) sums[j] += bias[j];
      Value rounded[kStep];
      store_pair(rounded, load_pair(sums));
      std::memcpy(static_cast<Value*>(tokens.y) + t * weight.m + row, rounded, left * sizeof(Value));
    }
  }
}

template <class Value, int kTokens, bool kAdapter>
void multiply(const Weight& weight, const Tokens& tokens) {
  constexpr int kRows = rows_together(kAdapter ? 2 * kTokens : kTokens);
  using Input = typename Products<Value>::Input;
  Inputs<Value> inputs{reinterpret_cast<Input*>(tokens.inputs), kTokens, words_of(weight.n) * kWord};
  Size groups = kAdapter ? 1 + tokens.r : 1;
#pragma omp parallel num_threads(threads_for(weight.m * weight.n, tokens.threads))
  {
#pragma omp for schedule(static)
    for (Size line = 0; line < groups * kTokens; line++)
      inputs.write(tokens, weight.n, line / kTokens, line % kTokens);
    Size thread = omp_get_thread_num(), threads = omp_get_num_threads();
    Size from = weight.m * thread / threads, to = weight.m * (thread + 1) / threads;
    Size far = to;
    while (far > from && is_near_the_end(weight, far - 1)) far--;
    Size run = (far - from) / kRows, rest = from + kRows * run;
    multiply_rows<Value, kRows, kTokens, kAdapter, false>(weight, tokens, inputs, from, run, run);
    if (kRows > 1) multiply_rows<Value, 1, kTokens, kAdapter, false>(weight, tokens, inputs, rest, 0, far - rest);
    multiply_rows<Value, 1, kTokens, kAdapter, true>(weight, tokens, inputs, far, 0, to - far);
    if (tokens.last) round_rows<Value>(weight, tokens, from, to);
  }
}

template <class Value, bool kAdapter>
void multiply_few(const Weight& weight, const Tokens& tokens) {
  if (tokens.count == 1) return multiply<Value, 1, kAdapter>(weight, tokens);
  if constexpr (kEveryCount) {
    if (tokens.count == 2) return multiply<Value, 2, kAdapter>(weight, tokens);
    if (tokens.count <= 4) return multiply<Value, 4, kAdapter>(weight, tokens);
  }
  multiply<Value, kMostTokens, kAdapter>(weight, tokens);
}

}  // namespace
