// The one inner loop of all products: a tile of rows times panels of 16 columns.
//
// Every element of the result is one chain of fused multiply-adds over k in rising order, whatever
// the tile's size, so a row has the same bits in any batch. To hide the latency of the chains a
// tile holds about a dozen of them at once: many rows by one panel, or one row by several panels.
//
// Where the processor multiplies pairs of bfloat16 (MILLRACE_BF16_DOT), rows of bfloat16 go by two k
// at a time: both matrices then hold the two numbers of a pair beside each other.

#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "vec.h"

namespace millrace {

constexpr int kPanel = 16;
constexpr int kAheadBytes = 2048;  // measured: a third faster from DRAM than without
constexpr int kVecs = kPanel / kLanes;  // vectors in a panel's row

// AVX-512 has 32 registers, its predecessors 16.
constexpr int kRegisters = kLanes == 16 ? 32 : 16;
constexpr int kTileRows = kLanes == 16 ? 12 : 6;
constexpr int kChains = 2 * kTileRows, kMostPanels = kLanes == 16 ? 8 : 6;

// Panels that a tile of this many rows takes at once.
constexpr int tile_panels(int rows) {
  const int panels = kChains / (rows * kVecs);
  return panels < 1 ? 1 : panels > kMostPanels ? kMostPanels : panels;
}

// Where column j of a panel is stored. On AVX2 bfloat16 panels alternate between the two vectors,
// so that a shift and a mask of one 32-byte load give both, without a shuffle.
template <class W>
constexpr int panel_index(int j) {
  return j;
}
#if defined(MILLRACE_AVX2) && !defined(MILLRACE_AVX512)
template <>
constexpr int panel_index<bf16>(int j) {
  return j < 8 ? 2 * j : 2 * (j - 8) + 1;
}
#endif

// How many k one step of the inner loop takes: X is the type of the rows.
template <class X>
constexpr int kStep = std::is_same_v<X, bf16> ? 2 : 1;

// What rows meet a matrix of W: bfloat16 rows only where pairs are multiplied.
template <class W>
struct RowsFor {
  using type = float;
};
#ifdef MILLRACE_BF16_DOT
template <>
struct RowsFor<bf16> {
  using type = bf16;
};
#endif

// Numbers of a panel with this depth: pairs are whole, the last one filled up with zero.
template <class W>
constexpr int64_t panel_size(int64_t depth) {
  constexpr int64_t step = kStep<typename RowsFor<W>::type>;
  return (depth + step - 1) / step * step * kPanel;
}

// How a matrix of panels lies in memory: from one panel to the next, from one k to the next.
// kPacked: rows of 16 that follow each other, in the order of panel_index, or rows of 16 pairs.
// kPlain: rows as they come, natural order, any distance; not for pairs.
enum Layout { kPacked, kPlain };
struct Strides {
  int64_t panel, k;
};

// Vector v of the 16 weights at p, in column order.
template <Layout kLayout, class W>
inline F load_panel_vector(const W* p, int v) {
#if defined(MILLRACE_AVX2) && !defined(MILLRACE_AVX512)
  if constexpr (kLayout == kPacked && std::is_same_v<W, bf16>) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    // Two shifts, where one mask would do: it would occupy the one register that is left.
    const __m256i high = v == 0 ? both : _mm256_srli_epi32(both, 16);
    return (F)_mm256_castsi256_ps(_mm256_slli_epi32(high, 16));
  }
#endif
  return load(p + v * kLanes);
}

// One step of the rows and of the panels in every lane, and what their product adds to a sum.
inline F row_step(const float* x) { return splat(*x); }
inline F step_product(float, F by, F weights, F sum) { return fma(by, weights, sum); }
#ifdef MILLRACE_BF16_DOT
inline F row_step(const bf16* x) {
  int32_t pair;
  std::memcpy(&pair, x, sizeof(pair));
  return bits_of<F>(splat_int(pair));
}
inline F step_product(bf16, F by, F weights, F sum) { return dot_pairs(by, weights, sum); }
#endif

template <class X, Layout kLayout, class W>
inline F weight_step(const W* p, int v) {
  if constexpr (kStep<X> == 2)
    return load(reinterpret_cast<const float*>(p));
  else
    return load_panel_vector<kLayout>(p, v);
}

// c[m][p*16 + j] (+)= sum over k of x[m][k] * w[p][k][j]; `resume` continues the sums in c. Of a
// last pair only the first numbers count when `depth` is odd, whatever the second ones are; they
// must be there to be read.
template <class X, class W, Layout kLayout, int kRows, int kPanels>
void tile(const X* x, int64_t ldx, const W* w, Strides strides, int64_t depth, float* c,
          int64_t ldc, bool resume) {
  static_assert(kStep<X> == 1 || kLayout == kPacked, "pairs are packed");
  const int64_t step = kLayout == kPacked ? kPanel : strides.k;
  F acc[kRows][kPanels][kVecs];
  for (int m = 0; m < kRows; ++m)
    for (int p = 0; p < kPanels; ++p)
      for (int v = 0; v < kVecs; ++v)
        acc[m][p][v] = resume ? load(c + m * ldc + p * kPanel + v * kLanes) : F{};
  for (int64_t k = 0; k + kStep<X> <= depth; k += kStep<X>) {
    const W* const at = w + k * step;
    // The hardware follows many streams well enough, one or two alone it does not.
    if constexpr (kLayout == kPacked && kPanels <= 2)
      for (int p = 0; p < kPanels; ++p)
        __builtin_prefetch(reinterpret_cast<const char*>(at + p * strides.panel) + kAheadBytes);
    // Beside the accumulators, registers hold either all activations and one vector of weights, or
    // all weights and one activation.
    if constexpr (kRows * (kPanels * kVecs + 1) < kRegisters) {
      F a[kRows];
      for (int m = 0; m < kRows; ++m) a[m] = row_step(x + m * ldx + k);
      for (int p = 0; p < kPanels; ++p)
        for (int v = 0; v < kVecs; ++v) {
          const F weights = weight_step<X, kLayout>(at + p * strides.panel, v);
          for (int m = 0; m < kRows; ++m)
            acc[m][p][v] = step_product(X{}, a[m], weights, acc[m][p][v]);
        }
    } else {
      F row[kPanels][kVecs];
      for (int p = 0; p < kPanels; ++p)
        for (int v = 0; v < kVecs; ++v)
          row[p][v] = weight_step<X, kLayout>(at + p * strides.panel, v);
#pragma GCC unroll 12
      for (int m = 0; m < kRows; ++m) {
        const F by = row_step(x + m * ldx + k);
        for (int p = 0; p < kPanels; ++p)
          for (int v = 0; v < kVecs; ++v)
            acc[m][p][v] = step_product(X{}, by, row[p][v], acc[m][p][v]);
      }
    }
  }
  if constexpr (kStep<X> == 2)
    if (depth % 2 != 0)
      for (int p = 0; p < kPanels; ++p) {
        const W* const at = w + (depth - 1) * kPanel + p * strides.panel;
        const F firsts = bits_of<F>(bits_of<U>(weight_step<X, kLayout>(at, 0)) & 0xffffu);
        for (int m = 0; m < kRows; ++m) {
          const F first = bits_of<F>(bits_of<U>(row_step(x + m * ldx + depth - 1)) & 0xffffu);
          acc[m][p][0] = step_product(X{}, first, firsts, acc[m][p][0]);
        }
      }
  for (int m = 0; m < kRows; ++m)
    for (int p = 0; p < kPanels; ++p)
      for (int v = 0; v < kVecs; ++v) store(c + m * ldc + p * kPanel + v * kLanes, acc[m][p][v]);
}

template <class X, class W>
using TileFn = void (*)(const X*, int64_t, const W*, Strides, int64_t, float*, int64_t, bool);

// The tiles of each number of rows, by 1, 2, 4 and the most panels that the rows leave room for.
template <class X, class W>
struct Tiles {
  TileFn<X, W> one[kTileRows], two[kTileRows], four[kTileRows], wide[kTileRows];
};

template <class X, class W, Layout kLayout, size_t... m>
constexpr Tiles<X, W> make_tiles(std::index_sequence<m...>) {
  return {{tile<X, W, kLayout, m + 1, 1>...},
          {tile<X, W, kLayout, m + 1, std::min(2, tile_panels(m + 1))>...},
          {tile<X, W, kLayout, m + 1, std::min(4, tile_panels(m + 1))>...},
          {tile<X, W, kLayout, m + 1, tile_panels(m + 1)>...}};
}

template <class X, class W, Layout kLayout>
static constexpr Tiles<X, W> kTiles =
    make_tiles<X, W, kLayout>(std::make_index_sequence<kTileRows>());

// `rows` (at most kTileRows) by `panels` panels.
template <Layout kLayout, class X, class W>
inline void tile_strip(int rows, int64_t panels, const X* x, int64_t ldx, const W* w,
                       Strides strides, int64_t depth, float* c, int64_t ldc, bool resume) {
  const Tiles<X, W>& tiles = kTiles<X, W, kLayout>;
  const int64_t most = tile_panels(rows);
  while (panels > 0) {
    // Two even halves rather than a full tile and a narrow one, whose chains are too few.
    int64_t now = panels >= 2 * most ? most : panels <= most ? panels : (panels + 1) / 2;
    now = now == most ? most : now >= 4 ? 4 : now >= 2 ? 2 : 1;
    const auto& fn = now == most ? tiles.wide : now == 4 ? tiles.four : now == 2 ? tiles.two
                                                                                 : tiles.one;
    fn[rows - 1](x, ldx, w, strides, depth, c, ldc, resume);
    panels -= now;
    w += now * strides.panel;
    c += now * kPanel;
  }
}

// Calls body(first_row, rows) for `rows` rows cut into even tiles of at most kTileRows.
template <class Body>
inline void for_row_tiles(int64_t rows, Body&& body) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = rows * t / tiles;
    body(first, int(rows * (t + 1) / tiles - first));
  }
}

}  // namespace millrace
