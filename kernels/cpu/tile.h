// The one inner loop of all products: a tile of rows times panels of 16 columns.
//
// Every element of the result is one chain of fused multiply-adds over k in rising order, whatever
// the tile's size, so a row has the same bits in any batch. To hide the latency of the chains a
// tile holds about a dozen of them at once: many rows by one panel, or one row by several panels.

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

// How a matrix of panels lies in memory: from one panel to the next, from one k to the next.
// kPacked: rows of 16 that follow each other, in the order of panel_index. kPlain: rows as they
// come, natural order, any distance.
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

// c[m][p*16 + j] (+)= sum over k of x[m][k] * w[p][k][j]; `resume` continues the sums in c.
template <class W, Layout kLayout, int kRows, int kPanels>
void tile(const float* x, int64_t ldx, const W* w, Strides strides, int64_t depth, float* c,
          int64_t ldc, bool resume) {
  const int64_t step = kLayout == kPacked ? kPanel : strides.k;
  F acc[kRows][kPanels][kVecs];
  for (int m = 0; m < kRows; ++m)
    for (int p = 0; p < kPanels; ++p)
      for (int v = 0; v < kVecs; ++v)
        acc[m][p][v] = resume ? load(c + m * ldc + p * kPanel + v * kLanes) : F{};
  for (int64_t k = 0; k < depth; ++k) {
    const W* const at = w + k * step;
    // The hardware follows many streams well enough, one or two alone it does not.
    if constexpr (kLayout == kPacked && kPanels <= 2)
      for (int p = 0; p < kPanels; ++p)
        __builtin_prefetch(reinterpret_cast<const char*>(at + p * strides.panel) + kAheadBytes);
    // Beside the accumulators, registers hold either all activations and one vector of weights, or
    // all weights and one activation.
    if constexpr (kRows * (kPanels * kVecs + 1) < kRegisters) {
      F a[kRows];
      for (int m = 0; m < kRows; ++m) a[m] = splat(x[m * ldx + k]);
      for (int p = 0; p < kPanels; ++p)
        for (int v = 0; v < kVecs; ++v) {
          const F weights = load_panel_vector<kLayout>(at + p * strides.panel, v);
          for (int m = 0; m < kRows; ++m) acc[m][p][v] = fma(a[m], weights, acc[m][p][v]);
        }
    } else {
      F row[kPanels][kVecs];
      for (int p = 0; p < kPanels; ++p)
        for (int v = 0; v < kVecs; ++v)
          row[p][v] = load_panel_vector<kLayout>(at + p * strides.panel, v);
#pragma GCC unroll 12
      for (int m = 0; m < kRows; ++m) {
        const F by = splat(x[m * ldx + k]);
        for (int p = 0; p < kPanels; ++p)
          for (int v = 0; v < kVecs; ++v) acc[m][p][v] = fma(by, row[p][v], acc[m][p][v]);
      }
    }
  }
  for (int m = 0; m < kRows; ++m)
    for (int p = 0; p < kPanels; ++p)
      for (int v = 0; v < kVecs; ++v) store(c + m * ldc + p * kPanel + v * kLanes, acc[m][p][v]);
}

template <class W>
using TileFn = void (*)(const float*, int64_t, const W*, Strides, int64_t, float*, int64_t, bool);

// The tiles of each number of rows, by 1, 2, 4 and the most panels that the rows leave room for.
template <class W>
struct Tiles {
  TileFn<W> one[kTileRows], two[kTileRows], four[kTileRows], wide[kTileRows];
};

template <class W, Layout kLayout, size_t... m>
constexpr Tiles<W> make_tiles(std::index_sequence<m...>) {
  return {{tile<W, kLayout, m + 1, 1>...},
          {tile<W, kLayout, m + 1, std::min(2, tile_panels(m + 1))>...},
          {tile<W, kLayout, m + 1, std::min(4, tile_panels(m + 1))>...},
          {tile<W, kLayout, m + 1, tile_panels(m + 1)>...}};
}

template <class W, Layout kLayout>
static constexpr Tiles<W> kTiles =
    make_tiles<W, kLayout>(std::make_index_sequence<kTileRows>());

// `rows` (at most kTileRows) by `panels` panels.
template <Layout kLayout, class W>
inline void tile_strip(int rows, int64_t panels, const float* x, int64_t ldx, const W* w,
                       Strides strides, int64_t depth, float* c, int64_t ldc, bool resume) {
  const Tiles<W>& tiles = kTiles<W, kLayout>;
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
