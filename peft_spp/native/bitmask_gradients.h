// SPDX-License-Identifier: Apache-2.0
// The sums over (gyᵀ x) ⊙ W for the gradients of an adapter, in float32 and over at most kGroup elements before they are
// added to another sum: those of add_gradients_by_rows in native.cpp, with W expanded on the way. For 11008x4096 in
// bfloat16 that takes 0.92 (half of the values are zeros) and 0.80 (three quarters) of the time over the dense weight, and
// expanding a chunk first 1.33 and 1.20.
#pragma once

namespace {

constexpr Size kGroup = 128;
// The part of a row whose sums stay in the first-level cache.
constexpr Size kGradientStrip = 2048;

inline Size gradient_strips(const Part& part) { return (part.columns + kGradientStrip - 1) / kGradientStrip; }

struct GradientSums {
  Lane low, high;
};

template <bool kCareful, class Value, class Product>
INLINE void add_gradient_words(
    Place<Value>& place, Size words, const Product* product, Size stride, const float* a, Lane b, float* group,
    GradientSums& sums) {
  walk(place, words, [&](Size column, const Value* values, Mask places) {
    Pair w = expand_pair<kCareful>(values, places), p = load_pair(product + column);
    // the next row of a strip begins another page
    prefetch(product + column + stride);
    Lane low = multiply(p.low, w.low), high = multiply(p.high, w.high);
    float* to = group + column;
    store_lane(to, multiply_add(b, low, load_lane(to)));
    store_lane(to + kLanes, multiply_add(b, high, load_lane(to + kLanes)));
    sums.low = multiply_add(load_lane(a + column), low, sums.low);
    sums.high = multiply_add(load_lane(a + column + kLanes), high, sums.high);
  });
}

template <bool kCareful, class Value, class Product>
INLINE float add_gradient_row(
    Place<Value>& place, Size width, const Product* product, Size stride, const float* a, float b, float* group) {
  GradientSums sums{zero(), zero()};
  Size whole = width / kWord, left = width % kWord;
  Lane factor = broadcast(b);
  add_gradient_words<kCareful>(place, whole, product, stride, a, factor, group, sums);
  if (left != 0) {
    Product last[kWord] = {};
    float last_a[kWord] = {};
    std::memcpy(last, product + whole * kWord, left * sizeof(Product));
    std::memcpy(last_a, a + whole * kWord, left * sizeof(float));
    add_gradient_words<kCareful>(place, 1, last, 0, last_a, factor, group + whole * kWord, sums);
  }
  return sum(add(sums.low, sums.high));
}

// A task is a row block in a range of strips, so that no two write the same sums. A part of grad_B is of one strip.
template <class Value, class Product>
void add_gradients(const Weight& weight, const Part& part, const Product* product, const Adapter& adapter) {
  Size threads = threads_for(part.rows * part.columns, part.threads);
  Size last_row = part.row + part.rows, strips = gradient_strips(part);
  Size first_block = block_of(part.row, weight.m, adapter.r);
  Size blocks = block_of(last_row - 1, weight.m, adapter.r) - first_block + 1;
  // strips of the same task need no counting of where their values begin
  Size ranges = smaller(strips, (2 * threads + blocks - 1) / blocks);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (Size task = 0; task < blocks * ranges; task++) {
    Size block = first_block + task / ranges, range = task % ranges;
    Size first_strip = strips * range / ranges, last_strip = strips * (range + 1) / ranges;
    Size row = larger(part.row, block_start(block, weight.m, adapter.r));
    Size stop = smaller(last_row, block_start(block + 1, weight.m, adapter.r));
    for (Size group_stop; row < stop; row = group_stop) {
      group_stop = smaller(stop, row + kGroup);
      Place<Value> places[kGroup];
      for (Size i = row; i < group_stop; i++) {
        places[i - row] = find<Value>(weight, part, i - part.row);
        places[i - row].skip(first_strip * kGradientStrip / kWord);
      }
      for (Size strip = first_strip; strip < last_strip; strip++) {
        Size start = strip * kGradientStrip, width = smaller(kGradientStrip, part.columns - start);
        const float* a = adapter.A + block * weight.n + part.column + start;
        float* grad_a = adapter.grad_A + block * weight.n + part.column + start;
        float group[kGradientStrip];
        std::memset(group, 0, words_of(width) * kWord * sizeof(float));
        for (Size i = row; i < group_stop; i++) {
          Size line = i - part.row;
          const Product* p = product + line * part.stride + start;
          float b = adapter.B[i];
          Place<Value>& place = places[i - row];
          adapter.grad_B_parts[strip * part.rows + line] =
              is_near_the_end(weight, i) ? add_gradient_row<true>(place, width, p, part.stride, a, b, group)
                                         : add_gradient_row<false>(place, width, p, part.stride, a, b, group);
        }
        for (Size j = 0; j < width; j++) grad_a[j] += group[j];
      }
    }
  }
}

}  // namespace
