// Attention of a ragged batch over a paged cache.
//
// A context is cut into tiles of 64 positions, counted from its start. Keys of a tile are turned
// into panels [D][16 positions], and values, if enough queries share them, into panels
// [positions][16 dims], both float32, so that scores and weighted sums are the same row tiles as
// every other product. Where the processor multiplies pairs of bfloat16 (see tile.h) and the cache
// is of these, panels are of pairs, and queries and softmax weights are rounded. Softmax is online
// (Milakov & Gimelshein 2018), tile by tile in rising order. What a query gets thus depends on its
// own position alone, not on how its prompt was cut or who shares the batch. Threads share out
// (request, block of queries, key-value head).

#include <algorithm>
#include <limits>
#include <vector>

#include "api.h"
#include "pool.h"
#include "tile.h"

namespace millrace {
namespace {

constexpr int64_t kTile = 64;      // positions
constexpr int64_t kItemRows = 128; // query rows that share one unpacking of keys and values
constexpr int64_t kFewRows = 16;   // up to here values are used as they lie, without unpacking
constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

#ifdef MILLRACE_AVX2
inline void transpose8(__m256 (&r)[8]) {
  __m256 t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  __m256 u[8];
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}

inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
inline __m256 load8(const f16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline __m256 load8(const bf16* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

// to[d][0..8) = rows[0..8)[d] for d < 8.
template <class C>
inline void transpose_block(const C* const* rows, int64_t d, float* to) {
  __m256 r[8];
  for (int j = 0; j < 8; ++j) r[j] = load8(rows[j] + d);
  transpose8(r);
  for (int i = 0; i < 8; ++i) _mm256_storeu_ps(to + (d + i) * kPanel, r[i]);
}

// r[i][j] = the numbers 2i and 2i + 1 of rows[j] + d, for i, j < 8.
inline void load_pairs(const bf16* const* rows, int64_t d, __m256 (&r)[8]) {
  for (int j = 0; j < 8; ++j) r[j] = _mm256_loadu_ps(reinterpret_cast<const float*>(rows[j] + d));
  transpose8(r);
}

// The same for d < 16, two at a time: neighbours travel through the transposition as one word.
inline void transpose_pairs(const bf16* const* rows, int64_t d, float* to) {
  __m256 r[8];
  load_pairs(rows, d, r);
  const __m256i high = _mm256_set1_epi32(int(0xffff0000u));
  for (int i = 0; i < 8; ++i) {
    const __m256i both = _mm256_castps_si256(r[i]);
    float* const at = to + (d + 2 * i) * kPanel;
    _mm256_storeu_ps(at, _mm256_castsi256_ps(_mm256_slli_epi32(both, 16)));
    _mm256_storeu_ps(at + kPanel, _mm256_castsi256_ps(_mm256_and_si256(both, high)));
  }
}
#endif

// to[d][j] = rows[j][d], for 16 rows.
template <class C>
void transpose_panel(const C* const* rows, int64_t dims, float* to) {
  for (int half = 0; half < kPanel; half += 8) {
    int64_t d = 0;
#ifdef MILLRACE_AVX2
    if constexpr (std::is_same_v<C, bf16>)
      for (; d + 16 <= dims; d += 16) transpose_pairs(rows + half, d, to + half);
    for (; d + 8 <= dims; d += 8) transpose_block(rows + half, d, to + half);
#endif
    for (; d < dims; ++d)
      for (int j = 0; j < 8; ++j) to[d * kPanel + half + j] = load1(rows[half + j] + d);
  }
}

// A value's row as row `position` of panels [kTile positions][16 dims], zero beyond its end.
template <class C>
void unpack_value(const C* value, int64_t dims, float* to) {
  int64_t d = 0;
  for (; d + kLanes <= dims; d += kLanes)
    store(to + d / kPanel * kTile * kPanel + d % kPanel, load(value + d));
  for (; d < round_up(dims, kPanel); ++d)
    to[d / kPanel * kTile * kPanel + d % kPanel] = d < dims ? load1(value + d) : 0.0f;
}

#ifdef MILLRACE_BF16_DOT
// to[d/2][j][d%2] = rows[j][d], for 16 rows.
void transpose_panel(const bf16* const* rows, int64_t dims, bf16* to) {
  for (int half = 0; half < kPanel; half += 8) {
    int64_t d = 0;
    for (; d + 16 <= dims; d += 16) {
      __m256 r[8];
      load_pairs(rows + half, d, r);
      for (int i = 0; i < 8; ++i)
        _mm256_storeu_ps(reinterpret_cast<float*>(to + (d + 2 * i) * kPanel + 2 * half), r[i]);
    }
    for (; d < dims; ++d)
      for (int j = half; j < half + 8; ++j)
        to[d / 2 * 2 * kPanel + 2 * j + d % 2] = rows[j][d];
  }
}

// Two values' rows as one row of pairs of the panels [kTile/2][16 dims][2].
void unpack_values(const bf16* even, const bf16* odd, int64_t dims, bf16* to) {
  int64_t d = 0;
  for (; d + kLanes <= dims; d += kLanes) {
    const U low = bits_of<U>(load(even + d)) >> 16, high = bits_of<U>(load(odd + d));
    store(reinterpret_cast<float*>(to + d * kTile), bits_of<F>(low | high));
  }
  for (; d < round_up(dims, kPanel); ++d) {
    bf16* const pair = to + d / kPanel * kTile * kPanel + d % kPanel * 2;
    pair[0] = d < dims ? even[d] : bf16{};
    pair[1] = d < dims ? odd[d] : bf16{};
  }
}
#endif

struct Shape {
  int64_t q_heads, kv_heads, head_dim, block_size, max_blocks;
  float scale;

  int64_t group() const { return q_heads / kv_heads; }
  int64_t padded() const { return round_up(head_dim, kPanel); }
};

// Some consecutive new tokens of one request.
struct Item {
  int64_t first_token, tokens, position;  // of the first of them
  const int32_t* blocks;
};

// The state of one item and one key-value head: the query rows, their softmax so far, and the
// unpacked tile. Rows are [token][query head of the group].
template <class C>
class Worker {
  using X = typename RowsFor<C>::type;
  static constexpr bool kRounds = std::is_same_v<X, bf16>;

 public:
  Worker(const Shape& shape, const C* k_cache, const C* v_cache)
      : s_(shape), k_cache_(k_cache), v_cache_(v_cache) {}

  // `more`: the next call will be for the same item and the next head.
  void run(const Item& item, int64_t head, bool more, const float* q, float* out) {
    const int64_t rows = item.tokens * s_.group(), dim = s_.head_dim, padded = s_.padded();
    reserve(rows);
    for (int64_t row = 0; row < rows; ++row) {
      const float* const from = at(q, item, row / s_.group(), head) + row % s_.group() * dim;
      X* const to = q_ + row * padded;
      int64_t d = 0;
      for (; d + kLanes <= dim; d += kLanes) store(to + d, load(from + d));
      for (; d < dim; ++d) store1(to + d, from[d]);
    }
    std::fill(acc_, acc_ + rows * padded, 0.0f);
    std::fill(max_, max_ + rows, -kInfinity);
    std::fill(sums_, sums_ + rows, F{});
    direct_ = !kRounds && rows <= kFewRows && dim == padded;
    const int64_t end = item.position + item.tokens;
    locate(item, head, 0, now_);
    for (int64_t base = 0; base < end; base += kTile) {
      next_.count = asked_ = 0;
      if (base + kTile < end)
        locate(item, head, base + kTile, next_);
      else if (more)
        locate(item, head + 1, 0, next_);
      unpack();
      visit(item, base);
      ask(kTile);
      std::swap(now_, next_);
    }
    for (int64_t t = 0; t < item.tokens; ++t)
      for (int64_t g = 0; g < s_.group(); ++g)
        finish(t * s_.group() + g, at(out, item, t, head) + g * dim);
  }

 private:
  template <class T>
  T* at(T* tensor, const Item& item, int64_t t, int64_t head) const {
    return tensor + ((item.first_token + t) * s_.q_heads + head * s_.group()) * s_.head_dim;
  }

  void reserve(int64_t rows) {
    static thread_local std::vector<float> storage;
    static thread_local std::vector<F> sums;
    const int64_t padded = s_.padded();
    const int64_t sizes[] = {kTile * padded, kTile * padded, rows * padded,
                             rows * padded,  rows * kTile,   rows};
    int64_t total = 16;
    for (int64_t size : sizes) total += round_up(size, 16);
    if (int64_t(storage.size()) < total) storage.resize(total);
    float* next = reinterpret_cast<float*>(round_up(reinterpret_cast<intptr_t>(storage.data()), 64));
    float* parts[6];
    for (int i = 0; i < 6; ++i) {
      parts[i] = next;
      next += round_up(sizes[i], 16);
    }
    k_ = reinterpret_cast<X*>(parts[0]);
    v_ = reinterpret_cast<X*>(parts[1]);
    q_ = reinterpret_cast<X*>(parts[2]);
    acc_ = parts[3];
    scores_ = parts[4];
    max_ = parts[5];
    if (int64_t(sums.size()) < rows) sums.resize(rows);
    sums_ = sums.data();
  }

  // Where a tile's keys and values lie.
  struct Rows {
    const C *keys[kTile], *values[kTile];
    int64_t count = 0;
  };

  void locate(const Item& item, int64_t head, int64_t base, Rows& rows) const {
    const int64_t count = std::min(kTile, item.position + item.tokens - base);
    int64_t j = 0;
    while (j < count) {
      const int64_t block = (base + j) / s_.block_size, offset = base + j - block * s_.block_size;
      const int64_t run = std::min(count, j + s_.block_size - offset);
      int64_t row = ((item.blocks[block] * s_.kv_heads + head) * s_.block_size + offset) * s_.head_dim;
      for (; j < run; ++j, row += s_.head_dim) {
        rows.keys[j] = k_cache_ + row;
        rows.values[j] = v_cache_ + row;
      }
    }
    rows.count = count;
    // Scores past the end are computed, from any readable key, and thrown away.
    for (; j < round_up(count, kPanel); ++j) rows.keys[j] = rows.keys[count - 1];
  }

  // Ask the memory for some more of the next tile. A few at a time, between other work: a core
  // waits when too many lines are under way. Inlined by force: a function that does nothing else
  // looks free of effects to the compiler, which would drop its calls.
  __attribute__((always_inline)) void ask(int64_t positions) {
    const int64_t bytes = s_.head_dim * int64_t(sizeof(C));
    for (const int64_t end = std::min(next_.count, asked_ + positions); asked_ < end; ++asked_)
      for (int64_t b = 0; b < bytes; b += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(next_.keys[asked_]) + b);
        __builtin_prefetch(reinterpret_cast<const char*>(next_.values[asked_]) + b);
      }
  }

  // The tile's keys as panels; its values too if many rows share them.
  void unpack() {
    const int64_t dim = s_.head_dim;
    for (int64_t j = 0; j < now_.count; j += kPanel) {
      transpose_panel(now_.keys + j, dim, k_ + j * s_.padded());
      ask(4);
    }
    if (direct_) return;
    if constexpr (kRounds)
      for (int64_t j = 0; j < now_.count; j += 2)
        unpack_values(now_.values[j], now_.values[std::min(j + 1, now_.count - 1)], dim,
                      v_ + j * kPanel);
    else
      for (int64_t j = 0; j < now_.count; ++j) unpack_value(now_.values[j], dim, v_ + j * kPanel);
  }

  // All queries over the tile: first those whose last visible position lies in it, each token by
  // itself up to exactly there; then those that see all of it.
  void visit(const Item& item, int64_t base) {
    const int64_t first_in = std::max<int64_t>(base - item.position, 0);
    const int64_t first_full =
        std::clamp<int64_t>(base + kTile - 1 - item.position, first_in, item.tokens);
    const int64_t group = s_.group();
    for (int64_t t = first_in; t < first_full; ++t)
      rows(t * group, group, item.position + t + 1 - base);
    if (first_full < item.tokens)
      rows(first_full * group, (item.tokens - first_full) * group, kTile);
  }

  // `count` query rows from `first` on, over the tile's first `seen` positions.
  void rows(int64_t first, int64_t count, int64_t seen) {
    const int64_t dim = s_.head_dim, padded = s_.padded();
    for_row_tiles(count, [&](int64_t offset, int tile_rows) {
      const int64_t row = first + offset;
      float* const scores = scores_ + row * kTile;
      tile_strip<kPacked>(tile_rows, round_up(seen, kPanel) / kPanel, q_ + row * padded, padded,
                          const_cast<const X*>(k_), {padded * kPanel, kPanel}, dim, scores, kTile,
                          false);
      for (int m = 0; m < tile_rows; ++m) {
        ask(8);
        soften(row + m, seen);
      }
      float* const acc = acc_ + row * padded;
      if (!direct_)
        tile_strip<kPacked>(tile_rows, padded / kPanel, weights(row), kTile * sizeof(float) / sizeof(X),
                            const_cast<const X*>(v_), {kTile * kPanel, kPanel}, seen, acc, padded,
                            true);
      for (int64_t j = 0, next; direct_ && j < seen; j = next) {
        const C* const* const values = now_.values;
        for (next = j + 1; next < seen && values[next] == values[next - 1] + dim;) ++next;
        tile_strip<kPlain>(tile_rows, padded / kPanel, scores + j, kTile, values[j],
                           {kPanel, dim}, next - j, acc, padded, true);
        ask(8);
      }
    });
  }

  // A row's weights take the place of its scores.
  X* weights(int64_t row) const { return reinterpret_cast<X*>(scores_ + row * kTile); }

  // Scores of one row -> weights e^(score - max so far); what was summed before is rescaled.
  void soften(int64_t row, int64_t seen) {
    constexpr int count = kTile / kLanes;
    const float* const scores = scores_ + row * kTile;
    const F scale = splat(s_.scale);
    F x[count], top = splat(-kInfinity);
    for (int v = 0; v < count; ++v) {
      x[v] = load(scores + v * kLanes) * scale;
      if (seen < kTile)
        x[v] = iota() + splat_int(v * kLanes) < splat_int(int32_t(seen)) ? x[v] : splat(-kInfinity);
      top = vmax(top, x[v]);
    }
    const float old = max_[row], now = std::max(old, max_lane(top));
    F total{};
    for (int v = 0; v < count; ++v) {
      const F weight = exp(x[v] - splat(now));
      if constexpr (kRounds)
        store_normal(weights(row) + v * kLanes, weight);
      else
        store(weights(row) + v * kLanes, weight);
      total = total + weight;
    }
    if (now > old) {
      const F shrink = exp(splat(old - now));
      sums_[row] = sums_[row] * shrink;
      float* const acc = acc_ + row * s_.padded();
      for (int64_t d = 0; d < s_.padded(); d += kLanes) store(acc + d, load(acc + d) * shrink);
      max_[row] = now;
    }
    sums_[row] = sums_[row] + total;
  }

  void finish(int64_t row, float* to) const {
    const float inverse = 1.0f / sum(sums_[row]);
    const float* const acc = acc_ + row * s_.padded();
    for (int64_t d = 0; d < s_.head_dim; ++d) to[d] = acc[d] * inverse;
  }

  const Shape& s_;
  const C *const k_cache_, *const v_cache_;
  X *k_, *v_, *q_;
  float *acc_, *scores_, *max_;
  F* sums_;
  Rows now_, next_;      // this tile, and the one after it
  int64_t asked_ = 0;    // positions of the next tile that were asked for
  bool direct_ = false;  // values are not unpacked
};

// Arguments of bad values: 1 query_starts, 2 context_lens, 3 block_tables (flat index).
int64_t check(const Shape& s, const int32_t* tables, const int32_t* starts, const int32_t* lengths,
              int64_t requests, int64_t tokens, int64_t blocks) {
  if (starts[0] != 0) return bad_value(1, 0);
  for (int64_t r = 0; r < requests; ++r) {
    const int64_t count = int64_t(starts[r + 1]) - starts[r];
    if (count < 0 || starts[r + 1] > tokens) return bad_value(1, r + 1);
    if (count == 0) continue;
    if (lengths[r] < count || lengths[r] > s.max_blocks * s.block_size) return bad_value(2, r);
    const int64_t used = (lengths[r] + s.block_size - 1) / s.block_size;
    for (int64_t b = r * s.max_blocks; b < r * s.max_blocks + used; ++b)
      if (tables[b] < 0 || tables[b] >= blocks) return bad_value(3, b);
  }
  return 0;
}

// The batch cut into items, and about how long one key-value head of them all takes, in ns.
double cut(const Shape& s, const int32_t* tables, const int32_t* starts, const int32_t* lengths,
           int64_t requests, std::vector<Item>& items) {
  const int64_t most = std::max<int64_t>(kItemRows / s.group(), 1);
  double ns = 0;
  for (int64_t r = 0; r < requests; ++r) {
    const int64_t count = starts[r + 1] - starts[r];
    for (int64_t t = 0; t < count; t += most) {
      const int64_t tokens = std::min(most, count - t), position = lengths[r] - count + t;
      items.push_back({starts[r] + t, tokens, position, tables + r * s.max_blocks});
      ns += double(position + tokens) * s.head_dim * (0.12 + 0.05 * double(tokens * s.group()));
    }
  }
  return ns;
}

}  // namespace
}  // namespace millrace

using namespace millrace;

extern "C" __attribute__((visibility("default"))) int64_t millrace_paged_attention(
    int cache_dtype, float* out, const float* q, const void* k_cache, const void* v_cache,
    const int32_t* block_tables, const int32_t* query_starts, const int32_t* context_lens,
    int64_t requests, int64_t tokens, int64_t q_heads, int64_t kv_heads, int64_t head_dim,
    int64_t block_size, int64_t blocks, int64_t max_blocks, float scale) {
  const Shape shape{q_heads, kv_heads, head_dim, block_size, max_blocks, scale};
  const int64_t bad =
      check(shape, block_tables, query_starts, context_lens, requests, tokens, blocks);
  if (bad != 0) return bad;
  static thread_local std::vector<Item> storage;
  std::vector<Item>& items = storage;  // a thread_local name would be another one in each worker
  items.clear();
  const double ns = cut(shape, block_tables, query_starts, context_lens, requests, items) * kv_heads;
  // One item with all its heads to a part, unless that leaves threads without work.
  const int64_t count = int64_t(items.size());
  const bool split = count < 4 * num_threads() && pieces(ns, count * kv_heads) > 1;
  const bool serial = pieces(ns, count * kv_heads) <= 1;
  with_dtype(cache_dtype, [&](auto kind) {
    using C = decltype(kind);
    const auto part = [&](int64_t first, int64_t last) {
      Worker<C> worker(shape, static_cast<const C*>(k_cache), static_cast<const C*>(v_cache));
      for (int64_t u = first; u < last; ++u) {
        const int64_t head = u % kv_heads;
        worker.run(items[u / kv_heads], head, u + 1 < last && head + 1 < kv_heads, q, out);
      }
    };
    if (serial) return part(0, count * kv_heads);
    if (split) return parallel_for(count * kv_heads, [&](int64_t u) { part(u, u + 1); });
    parallel_for(count, [&](int64_t i) { part(i * kv_heads, (i + 1) * kv_heads); });
  });
  return 0;
}
