// Ops that treat each row by itself: embedding, norms, rotary embedding with the cache write,
// SwiGLU and gather. One pass over memory each.

#include <algorithm>
#include <vector>

#include "api.h"
#include "pool.h"

namespace millrace {
namespace {

// Calls body(first, last) over ranges of rows, on several threads if the bytes are worth it.
template <class Body>
void for_rows(int64_t rows, int64_t bytes_per_row, Body&& body) {
  const int64_t parts = pieces(double(rows) * bytes_per_row / 8.0, rows);
  parallel_for(parts, [&](int64_t i) { body(rows * i / parts, rows * (i + 1) / parts); });
}

template <class T>
inline void to_floats(const T* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = load1(from + i);
}

template <class T>
inline void from_floats(const float* from, T* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  for (; i < count; ++i) store1(to + i, from[i]);
}

inline float sum_of_squares(const float* x, int64_t width) {
  F a{}, b{};
  int64_t i = 0;
  for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
    const F u = load(x + i), v = load(x + i + kLanes);
    a = fma(u, u, a);
    b = fma(v, v, b);
  }
  float total = sum(a + b);
  for (; i < width; ++i) total = std::fma(x[i], x[i], total);
  return total;
}

inline float inverse_rms(const float* x, int64_t width, float eps) {
  return 1.0f / std::sqrt(sum_of_squares(x, width) / float(width) + eps);
}

template <class W>
inline void scale_row(float* out, const float* x, const W* weight, float by, int64_t width) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes)
    store(out + i, load(x + i) * splat(by) * load(weight + i));
  for (; i < width; ++i) out[i] = x[i] * by * load1(weight + i);
}

// y = x * inv * weight, rotated: the halves of a head are the two coordinates.
inline void rotate_head(float* out, const float* x, const float* weight, const float* cos_sin,
                        float inv, int64_t half) {
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const F a = load(x + i) * splat(inv) * load(weight + i);
    const F b = load(x + half + i) * splat(inv) * load(weight + half + i);
    const F c = load(cos_sin + i), s = load(cos_sin + half + i);
    store(out + i, fma(a, c, F{} - b * s));
    store(out + half + i, fma(b, c, a * s));
  }
  for (; i < half; ++i) {
    const float a = x[i] * inv * weight[i], b = x[half + i] * inv * weight[half + i];
    const float c = cos_sin[i], s = cos_sin[half + i];
    out[i] = a * c - b * s;
    out[half + i] = b * c + a * s;
  }
}

inline int64_t find_outside(const int64_t* values, int64_t count, int64_t end) {
  for (int64_t i = 0; i < count; ++i)
    if (values[i] < 0 || values[i] >= end) return i;
  return -1;
}

struct QkvShape {
  int64_t tokens, q_heads, kv_heads, head_dim, block_size;
};

template <class C>
void qk_norm_rope_write(float* q_out, const float* qkv, const float* q_weight,
                        const float* k_weight, const float* cos_sin, const int64_t* positions,
                        const int64_t* slots, C* k_cache, C* v_cache, QkvShape s, float eps) {
  const int64_t width = (s.q_heads + 2 * s.kv_heads) * s.head_dim, half = s.head_dim / 2;
  for_rows(s.tokens, width * 16, [&](int64_t first, int64_t last) {
    static thread_local std::vector<float> head;
    head.resize(s.head_dim);
    for (int64_t t = first; t < last; ++t) {
      const float* x = qkv + t * width;
      const float* angles = cos_sin + positions[t] * s.head_dim;
      for (int64_t h = 0; h < s.q_heads; ++h, x += s.head_dim)
        rotate_head(q_out + (t * s.q_heads + h) * s.head_dim, x, q_weight, angles,
                    inverse_rms(x, s.head_dim, eps), half);
      const int64_t block = slots[t] / s.block_size, offset = slots[t] % s.block_size;
      for (int64_t h = 0; h < s.kv_heads; ++h, x += s.head_dim) {
        const int64_t at = ((block * s.kv_heads + h) * s.block_size + offset) * s.head_dim;
        rotate_head(head.data(), x, k_weight, angles, inverse_rms(x, s.head_dim, eps), half);
        from_floats(head.data(), k_cache + at, s.head_dim);
        from_floats(x + s.kv_heads * s.head_dim, v_cache + at, s.head_dim);
      }
    }
  });
}

inline float silu_times(float gate, float up) {
  return gate / (1.0f + exp(F{} - splat(gate))[0]) * up;
}

}  // namespace
}  // namespace millrace

using namespace millrace;

#pragma GCC visibility push(default)
extern "C" {

// Arguments of bad values: 1 ids.
int64_t millrace_embed(int dtype, float* out, const int64_t* ids, const void* table, int64_t tokens,
                       int64_t width, int64_t vocab) {
  const int64_t bad = find_outside(ids, tokens, vocab);
  if (bad >= 0) return bad_value(1, bad);
  with_dtype(dtype, [&](auto kind) {
    using W = decltype(kind);
    const W* from = static_cast<const W*>(table);
    for_rows(tokens, width * 6, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t)
        to_floats(from + ids[t] * width, out + t * width, width);
    });
  });
  return 0;
}

void millrace_rms_norm(int dtype, float* out, const float* x, const void* weight, int64_t tokens,
                       int64_t width, float eps) {
  with_dtype(dtype, [&](auto kind) {
    using W = decltype(kind);
    for_rows(tokens, width * 8, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        const float* row = x + t * width;
        scale_row(out + t * width, row, static_cast<const W*>(weight),
                  inverse_rms(row, width, eps), width);
      }
    });
  });
}

void millrace_add_rms_norm(int dtype, float* out, float* residual, const float* x,
                           const void* weight, int64_t tokens, int64_t width, float eps) {
  with_dtype(dtype, [&](auto kind) {
    using W = decltype(kind);
    for_rows(tokens, width * 16, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        float* row = residual + t * width;
        const float* add = x + t * width;
        for (int64_t i = 0; i < width; ++i) row[i] += add[i];
        scale_row(out + t * width, row, static_cast<const W*>(weight),
                  inverse_rms(row, width, eps), width);
      }
    });
  });
}

// Arguments of bad values: 1 positions, 2 slots.
int64_t millrace_qk_norm_rope_write(int weight_dtype, int cache_dtype, float* q_out,
                                    const float* qkv, const void* q_weight, const void* k_weight,
                                    const float* cos_sin, const int64_t* positions,
                                    const int64_t* slots, void* k_cache, void* v_cache,
                                    int64_t tokens, int64_t q_heads, int64_t kv_heads,
                                    int64_t head_dim, int64_t block_size, int64_t blocks,
                                    int64_t max_positions, float eps) {
  int64_t bad = find_outside(positions, tokens, max_positions);
  if (bad >= 0) return bad_value(1, bad);
  bad = find_outside(slots, tokens, blocks * block_size);
  if (bad >= 0) return bad_value(2, bad);
  static thread_local std::vector<float> weights;
  weights.resize(2 * head_dim);
  float *const qw = weights.data(), *const kw = qw + head_dim;
  with_dtype(weight_dtype, [&](auto kind) {
    using W = decltype(kind);
    to_floats(static_cast<const W*>(q_weight), qw, head_dim);
    to_floats(static_cast<const W*>(k_weight), kw, head_dim);
  });
  with_dtype(cache_dtype, [&](auto kind) {
    using C = decltype(kind);
    qk_norm_rope_write(q_out, qkv, qw, kw, cos_sin, positions, slots, static_cast<C*>(k_cache),
                       static_cast<C*>(v_cache),
                       QkvShape{tokens, q_heads, kv_heads, head_dim, block_size}, eps);
  });
  return 0;
}

void millrace_swiglu(float* out, const float* gate_up, int64_t tokens, int64_t width) {
  for_rows(tokens, width * 24, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const float *gate = gate_up + t * 2 * width, *up = gate + width;
      float* to = out + t * width;
      int64_t i = 0;
      for (; i + kLanes <= width; i += kLanes) {
        const F g = load(gate + i);
        store(to + i, g / (splat(1.0f) + exp(F{} - g)) * load(up + i));
      }
      for (; i < width; ++i) to[i] = silu_times(gate[i], up[i]);
    }
  });
}

// Arguments of bad values: 1 rows.
int64_t millrace_gather_rows(float* out, const float* x, const int64_t* rows, int64_t count,
                             int64_t width, int64_t tokens) {
  const int64_t bad = find_outside(rows, count, tokens);
  if (bad >= 0) return bad_value(1, bad);
  for (int64_t s = 0; s < count; ++s)
    std::memcpy(out + s * width, x + rows[s] * width, sizeof(float) * width);
  return 0;
}

}  // extern "C"
#pragma GCC visibility pop
