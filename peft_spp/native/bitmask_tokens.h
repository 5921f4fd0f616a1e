// SPDX-License-Identifier: Apache-2.0
// y = x W'ᵀ for a few tokens, straight from the compressed weight: for the rows of block k,
// y_i = W_i x + s B_i (W_i (A_k ⊙ x)), so that W is read and expanded once for both products.
#pragma once
#include <omp.h>

namespace {

// The columns that are multiplied: a group of x of each token and, for an adapter, one of A_k ⊙ x for each block k. The
// tokens of a group lie next to each other step by step, so that one address serves all; zeros stand for the tokens and
// columns that are not there.
template <class Value, int kTokens>
struct Inputs {
  using Input = typename Products<Value>::Input;

  Input* groups;
  Size width;

  const Input* of(Size group) const { return groups + group * kTokens * width; }

  void write(const Tokens& tokens, Size n, Size group, Size token, const float* a) const {
    Input* out = groups + group * kTokens * width + token * kStep;
    const Value* x = static_cast<const Value*>(tokens.x) + token * tokens.x_stride;
    for (Size start = 0; start < width; start += kStep, out += kTokens * kStep) {
      Size left = token < tokens.count ? n - start : 0;
      if (left >= kStep) {
        write_step(x + start, a == nullptr ? nullptr : a + start, out);
        continue;
      }
      Value values[kStep] = {};
      float factors[kStep] = {};
      if (left > 0) {
        std::memcpy(values, x + start, left * sizeof(Value));
        if (a != nullptr) std::memcpy(factors, a + start, left * sizeof(float));
      }
      write_step(values, a == nullptr ? nullptr : factors, out);
    }
  }

  static INLINE void write_step(const Value* x, const float* a, Input* out) {
    Pair value = load_pair(x);
    if (a != nullptr) {
      Pair factor = load_pair(a);
      Value rounded[kStep];
      store_pair(rounded, Pair{multiply(value.low, factor.low), multiply(value.high, factor.high)});
      value = load_pair(rounded);
    }
    store_pair(out, value);
  }
};

// The rows `first + r · apart + i` for all r < kRows and i < count. Each of these streams is read in order: neighboring
// rows would often lie a page apart, which stops the hardware's prefetching.
template <class Value, int kRows, int kTokens, bool kAdapter, bool kCareful>
void multiply_rows(
    const Weight& weight, const Tokens& tokens, const typename Products<Value>::Input* plain,
    const typename Products<Value>::Input* scaled, Size first, Size apart, Size count) {
  using Product = Products<Value>;
  constexpr int kSums = kAdapter ? 2 * kTokens : kTokens;
  constexpr int kVectors = vectors_a_sum(kSums);
  if (count == 0) return;  // there may be no such row
  const Value* values[kRows];
  const std::uint8_t* bits[kRows];
  for (int r = 0; r < kRows; r++) {
    values[r] = static_cast<const Value*>(weight.values) + weight.row_offsets[first + r * apart];
    bits[r] = bits_of(weight, first + r * apart);
  }
  Size words = words_of(weight.n);
  for (Size i = 0; i < count; i++) {
    Lane sums[kRows][kSums][kVectors];
#pragma GCC unroll 64
    for (int q = 0; q < kRows * kSums * kVectors; q++) (&sums[0][0][0])[q] = zero();
    auto step = [&](auto index, Size word) {
      constexpr int kIndex = decltype(index)::value;
      typename Product::Operand operand[kRows];
      Size column = (word * kWord + kIndex * kStep) * kTokens;
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
          const auto* x = (t < kTokens ? plain : scaled) + column + t % kTokens * kStep;
          Product::template add<kVectors, kIndex>(sums[r][t], operand[r], x);
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

// Rows that have the same A.
template <class Value, int kTokens, bool kAdapter>
void multiply_block(
    const Weight& weight, const Tokens& tokens, const typename Products<Value>::Input* plain,
    const typename Products<Value>::Input* scaled, Size from, Size to) {
  constexpr int kRows = rows_together(kAdapter ? 2 * kTokens : kTokens);
  Size far = to;
  while (far > from && is_near_the_end(weight, far - 1)) far--;
  Size run = (far - from) / kRows, rest = from + kRows * run;
  multiply_rows<Value, kRows, kTokens, kAdapter, false>(weight, tokens, plain, scaled, from, run, run);
  if (kRows > 1) multiply_rows<Value, 1, kTokens, kAdapter, false>(weight, tokens, plain, scaled, rest, 0, far - rest);
  multiply_rows<Value, 1, kTokens, kAdapter, true>(weight, tokens, plain, scaled, far, 0, to - far);
}

// A thread writes the inputs that its own rows need, so that it waits for no other one: its x, and A_k ⊙ x for one block
// of rows after another.
template <class Value, int kTokens, bool kAdapter>
void multiply(const Weight& weight, const Tokens& tokens) {
  using Input = typename Products<Value>::Input;
#pragma omp parallel num_threads(threads_for(weight.m * weight.n, tokens.threads))
  {
    Size thread = omp_get_thread_num(), threads = omp_get_num_threads();
    Size from = weight.m * thread / threads, to = weight.m * (thread + 1) / threads;
    Inputs<Value, kTokens> inputs{reinterpret_cast<Input*>(tokens.inputs), words_of(weight.n) * kWord};
    const Input* plain = inputs.of(2 * thread);
    const Input* scaled = inputs.of(2 * thread + 1);
    for (Size t = 0; t < kTokens; t++) inputs.write(tokens, weight.n, 2 * thread, t, nullptr);
    if (!kAdapter) multiply_block<Value, kTokens, kAdapter>(weight, tokens, plain, plain, from, to);
    for (Size row = from; kAdapter && row < to;) {
      Size block = block_of(row, weight.m, tokens.r);
      Size stop = smaller(to, block_start(block + 1, weight.m, tokens.r));
      const float* a = tokens.A + block * weight.n;
      for (Size t = 0; t < kTokens; t++) inputs.write(tokens, weight.n, 2 * thread + 1, t, a);
      multiply_block<Value, kTokens, kAdapter>(weight, tokens, plain, scaled, row, stop);
      row = stop;
    }
    if (tokens.last) round_rows<Value>(weight, tokens, from, to);
  }
}

template <class Value, bool kAdapter>
void multiply_few(const Weight& weight, const Tokens& tokens) {
  // 8 tokens with an adapter would be 16 columns, which do not fit the first-level cache: two walks took 0.75 of the time
  constexpr int kMost = kAdapter ? 4 : 8;
  for (Size first = 0; first < tokens.count; first += kMost) {
    Tokens part = tokens;
    part.count = smaller(kMost, tokens.count - first);
    part.x = static_cast<const Value*>(tokens.x) + first * tokens.x_stride;
    part.y = static_cast<Value*>(tokens.y) + first * weight.m;
    part.sums = tokens.sums + first * weight.m;
    if (part.count == 1) {
      multiply<Value, 1, kAdapter>(weight, part);
    } else if (kEveryCount && part.count == 2) {
      multiply<Value, kEveryCount ? 2 : kMost, kAdapter>(weight, part);
    } else if (kEveryCount && part.count <= 4) {
      multiply<Value, kEveryCount ? 4 : kMost, kAdapter>(weight, part);
    } else {
      multiply<Value, kMost, kAdapter>(weight, part);
    }
  }
}

}  // namespace
