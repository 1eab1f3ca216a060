// The one inner loop of all products: a tile of rows times panels of 16 columns.
//
// Every element of the result is one chain of fused multiply-adds over k in rising order, whatever
// the tile's size, so a row has the same bits in any batch. To hide the latency of the chains a
// tile holds about a dozen of them at once: many rows by one panel, or one row by several panels.

#pragma once

#include <array>
#include <utility>

#include "vec.h"

namespace millrace {

constexpr int kPanel = 16;
constexpr int kAheadBytes = 2048;  // measured: a third faster from DRAM than without
constexpr int kVecs = kPanel / kLanes;  // vectors in a panel's row

#ifdef MILLRACE_AVX512
constexpr int kTileRows = 12, kChains = 24, kMostPanels = 8;
#else
constexpr int kTileRows = 6, kChains = 12, kMostPanels = 6;
#endif

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

// Vector v of the 16 weights at p, in column order.
template <class W>
inline F load_panel_vector(const W* p, int v) {
  return load(p + v * kLanes);
}
#if defined(MILLRACE_AVX2) && !defined(MILLRACE_AVX512)
template <>
inline F load_panel_vector<bf16>(const bf16* p, int v) {
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  // Two shifts, where one mask would do: it would occupy the one register that is left.
  const __m256i high = v == 0 ? both : _mm256_srli_epi32(both, 16);
  return (F)_mm256_castsi256_ps(_mm256_slli_epi32(high, 16));
}
#endif

// c[m][p*16 + j] (+)= sum over k of x[m][k] * w[p][k][j]; `resume` continues the sums in c.
template <class W, int kRows, int kPanels>
void tile(const float* x, int64_t ldx, const W* w, int64_t panel_stride, int64_t depth, float* c,
          int64_t ldc, bool resume) {
  F acc[kRows][kPanels][kVecs];
  for (int m = 0; m < kRows; ++m)
    for (int p = 0; p < kPanels; ++p)
      for (int v = 0; v < kVecs; ++v)
        acc[m][p][v] = resume ? load(c + m * ldc + p * kPanel + v * kLanes) : F{};
  for (int64_t k = 0; k < depth; ++k) {
    // 16 registers hold the accumulators, one vector of weights, and with several panels the few
    // activations too; many rows of one panel take theirs straight from memory.
    F a[kRows];
    if constexpr (kPanels > 1)
      for (int m = 0; m < kRows; ++m) a[m] = splat(x[m * ldx + k]);
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p) {
      const W* const at = w + p * panel_stride + k * kPanel;
      // The hardware follows many streams well enough, one or two alone it does not.
      if constexpr (kPanels <= 2)
        __builtin_prefetch(reinterpret_cast<const char*>(at) + kAheadBytes);
      if constexpr (kPanels == 1) {
        F row[kVecs];
        for (int v = 0; v < kVecs; ++v) row[v] = load_panel_vector(at, v);
#pragma GCC unroll 12
        for (int m = 0; m < kRows; ++m) {
          const F by = splat(x[m * ldx + k]);
          for (int v = 0; v < kVecs; ++v) acc[m][p][v] = fma(by, row[v], acc[m][p][v]);
        }
      } else {
        for (int v = 0; v < kVecs; ++v) {
          const F weights = load_panel_vector(at, v);
          for (int m = 0; m < kRows; ++m) acc[m][p][v] = fma(a[m], weights, acc[m][p][v]);
        }
      }
    }
  }
  for (int m = 0; m < kRows; ++m)
    for (int p = 0; p < kPanels; ++p)
      for (int v = 0; v < kVecs; ++v) store(c + m * ldc + p * kPanel + v * kLanes, acc[m][p][v]);
}

template <class W>
using TileFn = void (*)(const float*, int64_t, const W*, int64_t, int64_t, float*, int64_t, bool);

template <class W>
struct Tiles {
  TileFn<W> wide[kTileRows];  // by rows - 1, tile_panels(rows) panels
  TileFn<W> one[kTileRows];   // one panel
};

template <class W, size_t... m>
constexpr Tiles<W> make_tiles(std::index_sequence<m...>) {
  return {{tile<W, m + 1, tile_panels(m + 1)>...}, {tile<W, m + 1, 1>...}};
}

template <class W>
static constexpr Tiles<W> kTiles = make_tiles<W>(std::make_index_sequence<kTileRows>());

// `rows` (at most kTileRows) by `panels` panels.
template <class W>
inline void tile_strip(int rows, int64_t panels, const float* x, int64_t ldx, const W* w,
                       int64_t panel_stride, int64_t depth, float* c, int64_t ldc, bool resume) {
  const int step = tile_panels(rows);
  int64_t p = 0;
  for (; p + step <= panels; p += step)
    kTiles<W>.wide[rows - 1](x, ldx, w + p * panel_stride, panel_stride, depth, c + p * kPanel,
                             ldc, resume);
  for (; p < panels; ++p)
    kTiles<W>.one[rows - 1](x, ldx, w + p * panel_stride, panel_stride, depth, c + p * kPanel, ldc,
                            resume);
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
