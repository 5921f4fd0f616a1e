// SPDX-License-Identifier: Apache-2.0
// A weight without its zeros, as ../../bitmask.py describes it, and walking its rows. For bitmask.py.
//
// Nothing lies behind the last value and behind the last column of a dense row: a step reads whole vectors only in rows
// that have enough values behind them, and the last word of a row with fewer than 64 columns goes through a buffer.
#pragma once
#include <type_traits>

#include "elements.h"

extern "C" {

// The values of all rows, `stored` of them, and the bitmask and offsets of these m rows.
struct Weight {
  const void* values;
  const std::uint8_t* bitmask;
  const std::int64_t* row_offsets;
  std::int64_t stored, m, n;
};

// Rows and columns of it, next to another matrix whose lines are `stride` apart. The first column begins a word, and
// the last one ends a word or the row. `starts` says where the values of each of these rows begin at the first column
// (null: it is counted), and where they end is written to `ends` unless that is null.
struct Part {
  std::int64_t row, rows, column, columns, stride;
  const std::int64_t* starts;
  std::int64_t* ends;
  std::int64_t threads;
};

// y = x W'ᵀ for `count` tokens: x is (count, n) with lines x_stride apart, y (count, m). Without an adapter, A is null.
// `inputs` has room for 2 · threads · 8 · padded columns floats. The sums, (count, m), are those of several passes: the
// first one sets them, and the last one rounds them to y, with the bias unless that is null.
struct Tokens {
  const void* x;
  std::int64_t x_stride, count;
  const float* A;
  const float* B;
  std::int64_t r;
  float* inputs;
  const void* bias;
  void* y;
  float* sums;
  std::int64_t identity, first, last, threads;
};

}  // extern "C"

namespace {

using Word = std::uint64_t;

struct Half {
  std::uint16_t bits;
};

constexpr Size kWord = 64;
constexpr Size kWordBytes = kWord / 8;
// The most values that a step reads at once.
constexpr Size kReach = 32;

inline Size words_of(Size columns) { return (columns + kWord - 1) / kWord; }

inline Size count_ones(const std::uint8_t* bits, Size words) {
  Size ones = 0;
  for (Size index = 0; index < words; index++) {
    Word word;
    std::memcpy(&word, bits + index * kWordBytes, sizeof word);
    ones += __builtin_popcountll(word);
  }
  return ones;
}

inline const std::uint8_t* bits_of(const Weight& weight, Size row) {
  return weight.bitmask + row * words_of(weight.n) * kWordBytes;
}

// Whether the rows from this one on have too few values behind them for reading whole vectors.
inline bool is_near_the_end(const Weight& weight, Size row) {
  return weight.row_offsets[row + 1] + kReach > weight.stored;
}

// Where the walk over a row is.
template <class Value>
struct Place {
  const Value* values;
  const std::uint8_t* bits;

  void skip(Size words) {
    values += count_ones(bits, words);
    bits += words * kWordBytes;
  }
};

// The first column of a part, in its row `line`.
template <class Value>
inline Place<Value> find(const Weight& weight, const Part& part, Size line) {
  const Value* values = static_cast<const Value*>(weight.values);
  Size row = part.row + line, words = part.column / kWord;
  Place<Value> place{values + weight.row_offsets[row], bits_of(weight, row)};
  if (part.starts == nullptr) {
    place.skip(words);
  } else {
    place = {values + part.starts[line], place.bits + words * kWordBytes};
  }
  return place;
}

inline int threads_for(Size elements, Size threads) { return elements > kParallelElements ? int(threads) : 1; }

}  // namespace
