// SPDX-License-Identifier: Apache-2.0
// Sums over the mask of a weight, one pass over it, for mask_sums in mask.py.
//
// A row of the mask is cut into words of 64 places, the first place in the lowest bit; beyond the last place there are
// zeros. "Lines" are the rows of the memory, as in native.cpp.
#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

using Size = std::int64_t;
using Word = std::uint64_t;

constexpr Size kPlaces = 64;
constexpr Size kSeeds = 2;
constexpr Size kBytes = 256;
// Rows, or places of a row, that are looked at together: their booleans stay in the first-level cache.
constexpr Size kStrip = 512;
constexpr Size kParallelElements = 1 << 15;
// Multiplying eight bytes of 0 or 1 by this brings them together, a bit each, in the top byte.
constexpr Word kGatherBits = 0x0102040810204080;

}  // namespace

extern "C" {

// The numbers are (kSeeds, words), the sums (kSeeds, rows) of each row's words mixed with their numbers, and the
// histogram tells how often each byte occurs in all words.
struct Mask {
  Size rows, columns, transposed;
  Size stride;  // of the lines
  const Word* numbers;
  Word* sums;
  Size* histogram;
};

}  // extern "C"

namespace {

// One table for each byte of a word: a counter that was just written would have to be waited for.
struct Histogram {
  Size tables[8][kBytes] = {};

  void count(Word word) {
    for (int byte = 0; byte < 8; byte++) tables[byte][(word >> (8 * byte)) & 0xff]++;
  }

  void add_to(Size* sums) const {
    for (const auto& table : tables)
      for (Size value = 0; value < kBytes; value++) {
#pragma omp atomic
        sums[value] += table[value];
      }
  }
};

// Whether a value is neither 0.0 nor -0.0: any bit but the sign.
template <class Bits>
inline std::uint8_t is_nonzero(Bits value) {
  return Bits(value << 1) != 0;
}

// A bijection in which every bit depends on all: two rounds of splitmix64, and one before them.
inline Word mix(Word word) {
  word = (word ^ (word >> 32)) * 0x9E3779B97F4A7C15;
  word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9;
  word = (word ^ (word >> 27)) * 0x94D049BB133111EB;
  return word ^ (word >> 31);
}

template <class Bits>
void sum_rows(const Bits* weight, const Mask& mask) {
  Size words = (mask.columns + kPlaces - 1) / kPlaces;
#pragma omp parallel if (mask.rows * mask.columns > kParallelElements)
  {
    Histogram histogram;
#pragma omp for schedule(static)
    for (Size row = 0; row < mask.rows; row++) {
      const Bits* line = weight + row * mask.stride;
      Word sums[kSeeds] = {};
      for (Size start = 0; start < mask.columns; start += kStrip) {
        Size width = std::min(kStrip, mask.columns - start);
        std::uint8_t nonzero[kStrip];
        for (Size j = 0; j < width; j++) nonzero[j] = is_nonzero(line[start + j]);
        Size first = start / kPlaces, count = (width + kPlaces - 1) / kPlaces;
        std::memset(nonzero + width, 0, count * kPlaces - width);
        for (Size index = 0; index < count; index++) {
          Word word = 0;
          for (int byte = 0; byte < 8; byte++) {
            Word places;
            std::memcpy(&places, nonzero + index * kPlaces + 8 * byte, sizeof places);
            word |= (places * kGatherBits >> 56) << (8 * byte);
          }
          histogram.count(word);
          for (Size seed = 0; seed < kSeeds; seed++) sums[seed] += mix(word ^ mask.numbers[seed * words + first + index]);
        }
      }
      for (Size seed = 0; seed < kSeeds; seed++) mask.sums[seed * mask.rows + row] = sums[seed];
    }
    histogram.add_to(mask.histogram);
  }
}

// The same for a transposed weight, whose lines hold one place of all rows.
template <class Bits>
void sum_columns(const Bits* weight, const Mask& mask) {
  Size words = (mask.columns + kPlaces - 1) / kPlaces;
#pragma omp parallel if (mask.rows * mask.columns > kParallelElements)
  {
    Histogram histogram;
#pragma omp for schedule(static)
    for (Size start = 0; start < mask.rows; start += kStrip) {
      Size height = std::min(kStrip, mask.rows - start);
      Word sums[kSeeds][kStrip] = {};
      for (Size index = 0; index < words; index++) {
        Word row_words[kStrip] = {};
        for (Size byte = 0; byte < 8; byte++) {
          std::uint8_t bits[kStrip] = {};
          Size first = index * kPlaces + 8 * byte, last = std::min(first + 8, mask.columns);
          for (Size column = first; column < last; column++) {
            const Bits* line = weight + column * mask.stride + start;
            std::uint8_t shift = column - first;
            for (Size i = 0; i < height; i++) bits[i] |= is_nonzero(line[i]) << shift;
          }
          for (Size i = 0; i < height; i++) row_words[i] |= Word(bits[i]) << (8 * byte);
        }
        for (Size i = 0; i < height; i++) histogram.count(row_words[i]);
        for (Size seed = 0; seed < kSeeds; seed++) {
          Word number = mask.numbers[seed * words + index];
          for (Size i = 0; i < height; i++) sums[seed][i] += mix(row_words[i] ^ number);
        }
      }
      for (Size seed = 0; seed < kSeeds; seed++)
        std::copy(sums[seed], sums[seed] + height, mask.sums + seed * mask.rows + start);
    }
    histogram.add_to(mask.histogram);
  }
}

template <class Bits>
void sum(const Bits* weight, const Mask& mask) {
  mask.transposed ? sum_columns(weight, mask) : sum_rows(weight, mask);
}

}  // namespace

extern "C" void mask_sums_2(const std::uint16_t* weight, const Mask* mask) { sum(weight, *mask); }
extern "C" void mask_sums_4(const std::uint32_t* weight, const Mask* mask) { sum(weight, *mask); }
extern "C" void mask_sums_8(const std::uint64_t* weight, const Mask* mask) { sum(weight, *mask); }
