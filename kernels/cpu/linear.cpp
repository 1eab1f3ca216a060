// Products of activations with packed weights.
//
// Packed layout: panels of 16 output features, [ceil(O/16)][H][16], zero beyond O. Threads share
// out panels and blocks of rows, never the sum over H.

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
    W* dst = out + p * width * kPanel;
    for (int j = 0; j < kPanel; ++j) {
      const int64_t row = p * kPanel + j;
      const int at = panel_index<W>(j);
      if (row < features)
        for (int64_t k = 0; k < width; ++k) dst[k * kPanel + at] = weight[row * width + k];
      else
        for (int64_t k = 0; k < width; ++k) dst[k * kPanel + at] = W{};
    }
  });
}

template <class W>
struct Product {
  const float* x;
  const W* w;
  float* out;
  int64_t rows, width, features;

  const W* panel(int64_t p) const { return w + p * width * kPanel; }

  // At most kTileRows rows: weights go by once, straight from memory.
  void few_rows(int64_t first, int64_t last) const {
    const int64_t whole = std::min(last, features / kPanel);
    const Strides strides{width * kPanel, kPanel};
    if (whole > first)
      tile_strip<kPacked>(int(rows), whole - first, x, width, panel(first), strides, width,
                 out + first * kPanel, features, false);
    if (whole < last) {
      float narrow[kTileRows * kPanel];
      tile_strip<kPacked>(int(rows), 1, x, width, panel(whole), strides, width, narrow, kPanel, false);
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
    const Strides strides{width * kPanel, kPanel};
    for (int64_t k = 0; k < width; k += most) {
      const int64_t depth = std::min(most, width - k);
      for (int64_t m = 0; m < count; ++m)
        std::memcpy(local + m * local_stride, x + (first_row + m) * width + k,
                    sizeof(float) * depth);
      const auto multiply = [&](int64_t p, int64_t panels, float* c, int64_t ldc) {
        for_row_tiles(count, [&](int64_t m, int tile_rows) {
          tile_strip<kPacked>(tile_rows, panels, local + m * local_stride, local_stride,
                     panel(p) + k * kPanel, strides, depth, c + m * ldc, ldc, k > 0);
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
    const double ns = double(width) * panels * kPanel * std::max(rows / 40.0, sizeof(W) / 20.0);
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

// weight [features, width] -> out [ceil(features/16)*16*width], both of dtype.
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
    Product<W>{x, static_cast<const W*>(packed), out, rows, width, features}.run();
  });
}

}  // extern "C"
#pragma GCC visibility pop
