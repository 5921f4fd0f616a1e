// SPDX-License-Identifier: Apache-2.0
// Compressing, expanding, scaling and merging, in terms of the steps that each bitmask_*.cpp defines before it
// includes this: the same loops for all processors.
#pragma once
#include "bitmask.h"

namespace {

constexpr Size kSteps = kWord / kStep;
// Where several adapters are added up, strips of a row and their intermediates stay in the first-level cache.
constexpr Size kStripWords = 8;
// Bytes ahead of the values being read, once for about as many values as a line of the caches has. (Were it not always
// inlined, GCC would take the function for one without an effect.)
constexpr Size kAhead = 1024;

template <class Value>
INLINE void prefetch_ahead(const Value* values) {
  prefetch(reinterpret_cast<const char*>(values) + kAhead);
}

// Calls `step(column, values, places)` for each step of so many words, and moves the place behind them.
template <class Value, class Step>
INLINE void walk(Place<Value>& place, Size words, Step step) {
  const Value* values = place.values;
  const std::uint8_t* bits = place.bits;
  for (Size index = 0; index < words * kSteps; index++) {
    Mask places = load_places(bits, index);
    if (sizeof(Value) == sizeof(float) || index % 2 == 0) prefetch_ahead(values);
    step(index * kStep, values, places);
    values += ones(places);
  }
  place = {values, bits + words * kWordBytes};
}

// Calls `work(place, careful)` for a row of a part, and notes where its values end.
template <class Value, class Work>
INLINE void at_row(const Weight& weight, const Part& part, Size line, Work work) {
  Place<Value> place = find<Value>(weight, part, line);
  if (is_near_the_end(weight, part.row + line))
    work(place, std::true_type{});
  else
    work(place, std::false_type{});
  if (part.ends != nullptr) part.ends[line] = place.values - static_cast<const Value*>(weight.values);
}

// Calls `work(line, place, careful)` for each row of a part on several threads.
template <class Value, class Work>
void for_each_row(const Weight& weight, const Part& part, Work work) {
#pragma omp parallel for schedule(static) num_threads(threads_for(part.rows * part.columns, part.threads))
  for (Size line = 0; line < part.rows; line++)
    at_row<Value>(weight, part, line, [&](Place<Value>& place, auto careful) { work(line, place, careful); });
}

// The bitmask and the number of values of each row, and from them the row offsets.
template <class Value>
void count_stored(const Value* dense, Size stride, Size m, Size n, std::uint8_t* bitmask, Size* offsets, Size threads) {
  Size words = words_of(n);
  offsets[0] = 0;
#pragma omp parallel for schedule(static) num_threads(threads_for(m * n, threads))
  for (Size row = 0; row < m; row++) {
    const Value* line = dense + row * stride;
    std::uint8_t* bits = bitmask + row * words * kWordBytes;
    for (Size index = 0; index < words; index++) {
      Value last[kWord] = {};
      const Value* values = line + index * kWord;
      Size left = n - index * kWord;
      if (left < kWord) {
        std::memcpy(last, values, left * sizeof(Value));
        values = last;
      }
      for (Size step = 0; step < kSteps; step++) {
        Mask places = stored_places(values + step * kStep);
        std::memcpy(bits + index * kWordBytes + step * sizeof places, &places, sizeof places);
      }
    }
    offsets[row + 1] = count_ones(bits, words);
  }
  for (Size row = 0; row < m; row++) offsets[row + 1] += offsets[row];
}

// The values, once the bitmask is there; `weight.values` is written.
template <class Value>
void take_stored(const Value* dense, Size stride, const Weight& weight, Size threads) {
  Value* values = static_cast<Value*>(const_cast<void*>(weight.values));
  Size whole = weight.n / kWord, left = weight.n % kWord;
#pragma omp parallel for schedule(static) num_threads(threads_for(weight.m * weight.n, threads))
  for (Size row = 0; row < weight.m; row++) {
    const Value* line = dense + row * stride;
    const std::uint8_t* bits = bits_of(weight, row);
    Value* target = values + weight.row_offsets[row];
    auto take = [&](const Value* from, Size first, Size words) {
      for (Size step = 0; step < words * kSteps; step++) {
        Mask places = load_places(bits, first * kSteps + step);
        compress_into(from + step * kStep, places, target);
        target += ones(places);
      }
    };
    take(line, 0, whole);
    if (left != 0) {
      Value last[kWord] = {};
      std::memcpy(last, line + whole * kWord, left * sizeof(Value));
      take(last, whole, 1);
    }
  }
}

template <bool kCareful, class Value>
INLINE void expand_row(const Part& part, Place<Value>& place, Value* target) {
  Size whole = part.columns / kWord, left = part.columns % kWord;
  auto write = [&](Size words, Value* to) {
    walk(place, words, [&](Size column, const Value* values, Mask places) {
      expand_into<kCareful>(values, places, to + column);
    });
  };
  write(whole, target);
  if (left != 0) {
    Value last[kWord];
    write(1, last);
    std::memcpy(target + whole * kWord, last, left * sizeof(Value));
  }
}

template <class Value>
void expand(const Weight& weight, const Part& part, Value* out) {
  for_each_row<Value>(weight, part, [&](Size line, Place<Value>& place, auto careful) {
    expand_row<decltype(careful)::value>(part, place, out + line * part.stride);
  });
}

// P(A)[row, column:], as long as the row.
inline const float* expanded_row(const Weight& weight, const Adapter& adapter, Size row, Size column) {
  return adapter.A + block_of(row, weight.m, adapter.r) * weight.n + column;
}

// The whole of W' in float32 from `column` on, for any number of adapters: the operations of `scale` in native.cpp.
struct Strip {
  float w[kStripWords * kWord], total[kStripWords * kWord];

  template <bool kCareful, class Value>
  INLINE void fill(
      const Weight& weight, Place<Value>& place, Size row, Size column, Size width, const Adapter* adapters, Size count,
      bool identity) {
    walk(place, words_of(width), [&](Size offset, const Value* values, Mask places) {
      store_pair(w + offset, expand_pair<kCareful>(values, places));
    });
    Size padded = words_of(width) * kWord;
    if (identity)
      std::memcpy(total, w, padded * sizeof(float));
    else
      std::memset(total, 0, padded * sizeof(float));
    for (Size q = 0; q < count; q++) {
      const float* a = expanded_row(weight, adapters[q], row, column);
      float b = adapters[q].B[row];
      q == 0 && !identity ? add_terms<true>(w, a, b, total, width) : add_terms<false>(w, a, b, total, width);
    }
  }

  // Rounded; `to` has room for whole words.
  template <class Out>
  INLINE void round(Out* to, Size width) const {
    for (Size j = 0; j < words_of(width) * kWord; j += kStep) store_pair(to + j, load_pair(total + j));
  }
};

template <bool kCareful, class Value, class Out>
INLINE void scale_words(Place<Value>& place, Size words, const float* a, float b, Out* out) {
  Lane scale = broadcast(b);
  walk(place, words, [&](Size column, const Value* values, Mask places) {
    Pair w = expand_pair<kCareful>(values, places);
    Lane low = multiply_add(multiply(w.low, load_lane(a + column)), scale, w.low);
    Lane high = multiply_add(multiply(w.high, load_lane(a + column + kLanes)), scale, w.high);
    store_pair(out + column, Pair{low, high});
  });
}

// A row of W' with the bits that native.cpp makes of the dense weight, also where a factor is not finite: a zero is
// multiplied like any other value.
template <bool kCareful, class Value, class Out>
INLINE void scale_row(
    const Weight& weight, const Part& part, Size row, Place<Value>& place, Out* target, const Adapter* adapters,
    Size count, bool identity) {
  Size whole = part.columns / kWord, left = part.columns % kWord;
  Out last[kStripWords * kWord];
  if (count == 1 && identity) {
    const float* a = expanded_row(weight, adapters[0], row, part.column);
    float b = adapters[0].B[row];
    scale_words<kCareful>(place, whole, a, b, target);
    if (left != 0) {
      float last_a[kWord] = {};
      std::memcpy(last_a, a + whole * kWord, left * sizeof(float));
      scale_words<kCareful>(place, 1, last_a, b, last);
      std::memcpy(target + whole * kWord, last, left * sizeof(Out));
    }
    return;
  }
  for (Size start = 0; start < part.columns; start += kStripWords * kWord) {
    Size width = smaller(kStripWords * kWord, part.columns - start);
    Strip strip;
    strip.fill<kCareful>(weight, place, row, part.column + start, width, adapters, count, identity);
    strip.round(last, width);
    std::memcpy(target + start, last, width * sizeof(Out));
  }
}

template <class Value, class Out>
void scale(const Weight& weight, const Part& part, Out* out, const Adapter* adapters, Size count, bool identity) {
  for_each_row<Value>(weight, part, [&](Size line, Place<Value>& place, auto careful) {
    constexpr bool kCareful = decltype(careful)::value;
    scale_row<kCareful>(weight, part, part.row + line, place, out + line * part.stride, adapters, count, identity);
  });
}

inline void drop_sign_of_zero(float* value) { *value += 0.0f; }
template <class Value>
inline void drop_sign_of_zero(Value* value) {
  value->bits = value->bits == 0x8000 ? std::uint16_t(0) : value->bits;
}

// The values of a merged weight, which may be written over those of this one. Zeros among the values become +0.0,
// whatever the factors.
template <class Value>
void merge(const Weight& weight, const Part& part, Value* merged, const Adapter* adapters, Size count) {
  for_each_row<Value>(weight, part, [&](Size line, Place<Value>& place, auto careful) {
    Size row = part.row + line;
    for (Size start = 0; start < weight.n; start += kStripWords * kWord) {
      Size width = smaller(kStripWords * kWord, weight.n - start);
      Strip strip;
      Place<Value> target = place;
      strip.fill<decltype(careful)::value>(weight, place, row, start, width, adapters, count, true);
      for (Size j = 0; j < width; j++) strip.total[j] = strip.w[j] == 0.0f ? 0.0f : strip.total[j];
      Value rounded[kStripWords * kWord];
      strip.round(rounded, width);
      for (Size j = 0; j < width; j++) drop_sign_of_zero(rounded + j);
      Value* to = merged + (target.values - static_cast<const Value*>(weight.values));
      walk(target, words_of(width), [&](Size column, const Value* values, Mask places) {
        compress_into(rounded + column, places, to);
        to += ones(places);
      });
    }
  });
}

}  // namespace

#include "bitmask_tokens.h"
#include "bitmask_gradients.h"
#include "bitmask_exports.h"
