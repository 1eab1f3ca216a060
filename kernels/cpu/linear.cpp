// Products of activations with packed weights.
//
// Packed layout: panels of 16 output features, [ceil(O/16)][H][16], zero beyond O; for pairs of
// bfloat16 (see tile.h) [ceil(O/16)][ceil(H/2)][16][2], and rows are rounded to bfloat16 first.
// Threads share out panels and blocks of rows, never the sum over H.

#include <algorithm>
#include <vector>

#include "api.h"
#include "pool.h"
#include "tile.h"

namespace millrace {
namespace {

// A block of activations stays in L2. Few rows leave room for more depth.
constexpr int64_t kRowBlock = 192, kLeastDepth = 256, kMostDepth = 1024;
constexpr int64_t kBlockFloats = kRowBlock * (kLeastDepth + kPanel);

inline int64_t panels_of(int64_t features) { return (features + kPanel - 1) / kPanel; }

template <class W>
void pack(const W* weight, int64_t features, int64_t width, W* out) {
  const int64_t panels = panels_of(features);
  parallel_for(panels, [&](int64_t p) {
    constexpr int step = kStep<typename RowsFor<W>::type>;
    W* const dst = out + p * panel_size<W>(width);
    if (p * kPanel + kPanel > features || width % step != 0)
      std::fill(dst, dst + panel_size<W>(width), W{});
    for (int64_t j = 0; j < std::min<int64_t>(kPanel, features - p * kPanel); ++j) {
      const W* const from = weight + (p * kPanel + j) * width;
      W* const to = dst + panel_index<W>(int(j)) * step;
      for (int64_t k = 0; k < width; ++k) to[k / step * step * kPanel + k % step] = from[k];
    }
  });
}

// Rows rounded to bfloat16, their ends filled up to whole pairs. The space between rows is not a
// power of two, so that a tile's rows spread over cache sets.
template <class X>
const X* round_rows(const float* x, int64_t rows, int64_t width, int64_t stride) {
  static thread_local std::vector<X> storage;
  if (int64_t(storage.size()) < rows * stride) storage.resize(rows * stride);
  X* const rounded = storage.data();
  const int64_t parts = pieces(double(rows) * width * 0.15, rows);
  parallel_for(parts, [&](int64_t part) {
    for (int64_t m = rows * part / parts; m < rows * (part + 1) / parts; ++m) {
      int64_t k = 0;
      for (; k + kLanes <= width; k += kLanes) store(rounded + m * stride + k, load(x + m * width + k));
      for (; k < width; ++k) store1(rounded + m * stride + k, x[m * width + k]);
    }
  });
  return rounded;
}

template <class W>
struct Product {
  using X = typename RowsFor<W>::type;
  static constexpr bool kRounds = std::is_same_v<X, bf16>;

  const X* x;
  int64_t ldx;
  const W* w;
  float* out;
  int64_t rows, width, features;

  const W* panel(int64_t p) const { return w + p * panel_size<W>(width); }
  Strides strides() const { return {panel_size<W>(width), kPanel}; }

  // At most kTileRows rows: weights go by once, straight from memory.
  void few_rows(int64_t first, int64_t last) const {
    const int64_t whole = std::min(last, features / kPanel);
    if (whole > first)
      tile_strip<kPacked>(int(rows), whole - first, x, ldx, panel(first), strides(), width,
                          out + first * kPanel, features, false);
    if (whole < last) {
      float narrow[kTileRows * kPanel];
      tile_strip<kPacked>(int(rows), 1, x, ldx, panel(whole), strides(), width, narrow, kPanel,
                          false);
      copy_columns(narrow, whole, 0, rows);
    }
  }

  // The real columns of a last panel that is not full.
  void copy_columns(const float* from, int64_t p, int64_t first_row, int64_t count) const {
    for (int64_t m = 0; m < count; ++m)
      std::memcpy(out + (first_row + m) * features + p * kPanel, from + m * kPanel,
                  sizeof(float) * (features - p * kPanel));
  }

  // A block of rows by the panels [first, last), a block of the width at a time.
  void block(int64_t first_row, int64_t count, int64_t first, int64_t last) const {
    static thread_local std::vector<float> storage;
    storage.resize(kBlockFloats + kRowBlock * kPanel);
    float *const local = storage.data(), *const narrow = local + kBlockFloats;
    const int64_t most = std::clamp((kBlockFloats / count - kPanel) / kPanel * kPanel, kLeastDepth,
                                    kMostDepth);
    const int64_t local_stride = most + kPanel;  // not a power of two: rows spread over cache sets
    const int64_t whole = std::min(last, features / kPanel);
    for (int64_t k = 0; k < width; k += most) {
      const int64_t depth = std::min(most, width - k);
      const X* from = x + first_row * ldx + k;
      if constexpr (!kRounds)
        for (int64_t m = 0; m < count; ++m)
          std::memcpy(local + m * local_stride, from + m * ldx, sizeof(float) * depth);
      const auto multiply = [&](int64_t p, int64_t panels, float* c, int64_t ldc) {
        for_row_tiles(count, [&](int64_t m, int tile_rows) {
          const W* const weights = panel(p) + k * kPanel;
          if constexpr (kRounds)
            tile_strip<kPacked>(tile_rows, panels, from + m * ldx, ldx, weights, strides(), depth,
                                c + m * ldc, ldc, k > 0);
          else
            tile_strip<kPacked>(tile_rows, panels, local + m * local_stride, local_stride, weights,
                                strides(), depth, c + m * ldc, ldc, k > 0);
        });
      };
      const int64_t step = tile_panels(kTileRows);
      for (int64_t p = first; p < whole; p += step)
        multiply(p, std::min(step, whole - p), out + first_row * features + p * kPanel, features);
      if (whole < last) multiply(whole, 1, narrow, kPanel);
    }
    if (whole < last) copy_columns(narrow, whole, first_row, count);
  }

  void run() const {
    const int64_t panels = panels_of(features);
    const double per_row = kRounds ? 1 / 100.0 : 1 / 40.0;
    const double ns =
        double(width) * panels * kPanel * std::max(rows * per_row, sizeof(W) / 20.0);
    if (rows <= kTileRows) {
      const int64_t step = tile_panels(int(rows));
      const int64_t strips = (panels + step - 1) / step, parts = pieces(ns, strips);
      parallel_for(parts, [&](int64_t i) {
        few_rows(strips * i / parts * step, std::min(panels, strips * (i + 1) / parts * step));
      });
      return;
    }
    const int64_t blocks = (rows + kRowBlock - 1) / kRowBlock;
    const int64_t parts = pieces(ns / blocks, std::max<int64_t>(panels / 8, 1));
    parallel_for(blocks * parts, [&](int64_t i) {
      const int64_t b = i / parts, part = i % parts, first = rows * b / blocks;
      block(first, rows * (b + 1) / blocks - first, panels * part / parts,
            panels * (part + 1) / parts);
    });
  }
};

}  // namespace
}  // namespace millrace

using namespace millrace;

#pragma GCC visibility push(default)
extern "C" {

// Do products round what meets weights or a cache of this dtype to bfloat16?
int millrace_rounds(int dtype) {
  int rounds = 0;
  with_dtype(dtype, [&](auto kind) {
    rounds = !std::is_same_v<typename RowsFor<decltype(kind)>::type, float>;
  });
  return rounds;
}

// weight [features, width] -> out [ceil(features/16)*16*width], both of dtype; for pairs the width
// is rounded up to an even one.
void millrace_pack_linear(int dtype, const void* weight, int64_t features, int64_t width,
                          void* out) {
  with_dtype(dtype, [&](auto kind) {
    using W = decltype(kind);
    pack(static_cast<const W*>(weight), features, width, static_cast<W*>(out));
  });
}

// out [rows, features] = x [rows, width] times the packed weight.
void millrace_linear(int dtype, float* out, const float* x, const void* packed, int64_t rows,
                     int64_t width, int64_t features) {
  if (rows == 0) return;
  with_dtype(dtype, [&](auto kind) {
    using W = decltype(kind);
    using X = typename RowsFor<W>::type;
    const W* const weights = static_cast<const W*>(packed);
    if constexpr (std::is_same_v<X, float>) {
      Product<W>{x, width, weights, out, rows, width, features}.run();
    } else {
      const int64_t stride = (width + 31) / 32 * 32 + 32;
      const X* const rounded = round_rows<X>(x, rows, width, stride);
      Product<W>{rounded, stride, weights, out, rows, width, features}.run();
    }
  });
}

}  // extern "C"
#pragma GCC visibility pop
