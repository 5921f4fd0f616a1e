// SPDX-License-Identifier: Apache-2.0
// Elementwise work on a part of a weight, one pass over it, for NativeElementwise in native.py.
//
// "Lines" are the rows of the memory: rows of W where it is stored by rows, its columns where it is a transposed view.
// Sums are float32, over at most kGroup elements before they are added to another sum.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "elements.h"

namespace {

// Strips of a line and their intermediates stay in the first-level cache.
constexpr Size kStrip = 512;
// Longer stretches of memory at a time keep the hardware's prefetching going: the gradients over 2048x2048 in bfloat16
// take 0.8 ms by these and 1.6 ms by the others. With few row blocks the others give the threads more tasks.
constexpr Size kWideStrip = 2048;
constexpr Size kWideStripBlocks = 8;
constexpr Size kGroup = 128;

}  // namespace

extern "C" {

// The part W[row:row+rows, column:column+columns] of an m×n weight; the pointers next to it are to its first element.
struct Region {
  Size m, n, row, rows, column, columns;
  Size transposed;
  Size stride;        // of the lines of W
  Size other_stride;  // of the lines of W' or gyᵀx
};

}  // extern "C"

namespace {

// P(A)[row:row+count, column], one value a row.
inline void expand_column(const Adapter& adapter, const Region& region, Size row, Size count, Size column, float* out) {
  Size done = 0;
  for (Size block = block_of(row, region.m, adapter.r); done < count; block++) {
    Size stop = std::min(count, block_start(block + 1, region.m, adapter.r) - row);
    float value = adapter.A[block * region.n + column];
    for (; done < stop; done++) out[done] = value;
  }
}

template <bool kFirst>
inline void add_terms(const float* w, const float* a, const float* b, float* total, Size count) {
  for (Size i = 0; i < count; i++) total[i] = add_term<kFirst>(total[i], w[i] * a[i], b[i]);
}

// A strip of a row of W' with one adapter: nothing is put aside, which took 1.6 times as long.
template <class Weight, class Out>
inline void scale_row(const Weight* weight, const float* a, float b, Out* out, Size count) {
  for (Size j = 0; j < count; j++) {
    float w = load(weight + j);
    store(out + j, add_term<false>(w, w * a[j], b));
  }
}

// P(A)[row, column:], as long as the row.
inline const float* expanded_row(const Adapter& adapter, const Region& region, Size row, Size column) {
  return adapter.A + block_of(row, region.m, adapter.r) * region.n + column;
}

template <class Weight, class Out>
void scale(const Weight* weight, Out* out, const Region& region, const Adapter* adapters, Size count, bool identity) {
  Size lines = region.transposed ? region.columns : region.rows;
  Size length = region.transposed ? region.rows : region.columns;
#pragma omp parallel for schedule(static) if (lines * length > kParallelElements)
  for (Size line = 0; line < lines; line++) {
    for (Size start = 0; start < length; start += kStrip) {
      Size width = std::min(kStrip, length - start);
      const Weight* source = weight + line * region.stride + start;
      Out* target = out + line * region.other_stride + start;
      if (count == 1 && identity && !region.transposed) {
        Size row = region.row + line;
        scale_row(source, expanded_row(adapters[0], region, row, region.column + start), adapters[0].B[row], target, width);
        continue;
      }
      float w[kStrip], total[kStrip], expanded[kStrip];
      for (Size j = 0; j < width; j++) w[j] = load(source + j);
      if (identity) std::memcpy(total, w, width * sizeof(float));
      for (Size q = 0; q < count; q++) {
        const Adapter& adapter = adapters[q];
        bool first = q == 0 && !identity;
        if (region.transposed) {
          Size row = region.row + start;
          expand_column(adapter, region, row, width, region.column + line, expanded);
          const float* b = adapter.B + row;
          first ? add_terms<true>(w, expanded, b, total, width) : add_terms<false>(w, expanded, b, total, width);
        } else {
          Size row = region.row + line;
          const float* a = expanded_row(adapter, region, row, region.column + start);
          float b = adapter.B[row];
          first ? add_terms<true>(w, a, b, total, width) : add_terms<false>(w, a, b, total, width);
        }
      }
      for (Size j = 0; j < width; j++) store(target + j, total[j]);
    }
  }
}

inline Size gradient_strip(Size r) { return r < kWideStripBlocks ? kStrip : kWideStrip; }

// A part of grad_B for each strip of columns; a task is a row block in a strip, so that no two write the same sums.
template <class Weight, class Product>
void add_gradients_by_rows(const Weight* weight, const Product* product, const Region& region, const Adapter& adapter) {
  Size strip_columns = gradient_strip(adapter.r), strips = (region.columns + strip_columns - 1) / strip_columns;
  Size last_row = region.row + region.rows;
  Size first_block = block_of(region.row, region.m, adapter.r);
  Size blocks = block_of(last_row - 1, region.m, adapter.r) - first_block + 1;
#pragma omp parallel for schedule(static) if (region.rows * region.columns > kParallelElements)
  for (Size task = 0; task < blocks * strips; task++) {
    Size block = first_block + task / strips, strip = task % strips, start = strip * strip_columns;
    Size width = std::min(strip_columns, region.columns - start);
    const float* a = adapter.A + block * region.n + region.column + start;
    float* grad_a = adapter.grad_A + block * region.n + region.column + start;
    Size row = std::max(region.row, block_start(block, region.m, adapter.r));
    Size stop = std::min(last_row, block_start(block + 1, region.m, adapter.r));
    while (row < stop) {
      float group[kWideStrip];
      std::fill(group, group + width, 0.0f);
      for (Size group_stop = std::min(stop, row + kGroup); row < group_stop; row++) {
        Size line = row - region.row;
        const Weight* w = weight + line * region.stride + start;
        const Product* p = product + line * region.other_stride + start;
        float b = adapter.B[row], grad_b = 0;
#pragma omp simd reduction(+ : grad_b)
        for (Size j = 0; j < width; j++) {
          float s = load(p + j) * load(w + j);
          group[j] += b * s;
          grad_b += a[j] * s;
        }
        adapter.grad_B_parts[strip * region.rows + line] = grad_b;
      }
      for (Size j = 0; j < width; j++) grad_a[j] += group[j];
    }
  }
}

// The same for a transposed weight: a task, and a part of grad_B, is a group of kGroup columns.
template <class Weight, class Product>
void add_gradients_by_columns(
    const Weight* weight, const Product* product, const Region& region, const Adapter& adapter) {
  Size groups = (region.columns + kGroup - 1) / kGroup;
#pragma omp parallel for schedule(static) if (region.rows * region.columns > kParallelElements)
  for (Size group = 0; group < groups; group++) {
    float* grad_B = adapter.grad_B_parts + group * region.rows;
    std::fill(grad_B, grad_B + region.rows, 0.0f);
    for (Size line = group * kGroup; line < std::min(region.columns, (group + 1) * kGroup); line++) {
      Size done = 0;
      for (Size block = block_of(region.row, region.m, adapter.r); done < region.rows; block++) {
        Size stop = std::min(region.rows, block_start(block + 1, region.m, adapter.r) - region.row);
        Size element = block * region.n + region.column + line;
        const Weight* w = weight + line * region.stride;
        const Product* p = product + line * region.other_stride;
        const float* b = adapter.B + region.row;
        float a = adapter.A[element], grad_a = 0;
#pragma omp simd reduction(+ : grad_a)
        for (Size i = done; i < stop; i++) {
          float s = load(p + i) * load(w + i);
          grad_a += b[i] * s;
          grad_B[i] += a * s;
        }
        adapter.grad_A[element] += grad_a;
        done = stop;
      }
    }
  }
}

template <class Weight, class Product>
void add_gradients(
    const Weight* weight, const Product* product, const Region& region, const Adapter* adapters, Size count) {
  for (Size q = 0; q < count; q++) {
    if (region.transposed)
      add_gradients_by_columns(weight, product, region, adapters[q]);
    else
      add_gradients_by_rows(weight, product, region, adapters[q]);
  }
}

}  // namespace

// The number of parts of grad_B that a region has for an adapter of r row blocks.
extern "C" Size grad_B_parts(const Region* region, Size r) {
  Size width = region->transposed ? kGroup : gradient_strip(r);
  return (region->columns + width - 1) / width;
}

#define EXPORT(NAME, WEIGHT, OTHER)                                                                                  \
  extern "C" void scale_##NAME(                                                                                      \
      const WEIGHT* weight, OTHER* out, const Region* region, const Adapter* adapters, Size count, Size identity) {  \
    scale(weight, out, *region, adapters, count, identity != 0);                                                     \
  }                                                                                                                  \
  extern "C" void add_gradients_##NAME(                                                                              \
      const WEIGHT* weight, const OTHER* product, const Region* region, const Adapter* adapters, Size count) {       \
    add_gradients(weight, product, *region, adapters, count);                                                        \
  }

EXPORT(float32_float32, float, float)
EXPORT(float32_bfloat16, float, BFloat16)
EXPORT(bfloat16_float32, BFloat16, float)
EXPORT(bfloat16_bfloat16, BFloat16, BFloat16)
