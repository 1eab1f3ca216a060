// What happens to logits: penalties, biases, sampling, log-probabilities. Threads share out rows.

#include <algorithm>
#include <functional>
#include <limits>
#include <vector>

#include "api.h"
#include "pool.h"

namespace millrace {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Best {
  float value;
  int64_t id;
};

// The largest value and the lowest index that has it; NaN is passed over. (-inf, 0) if none.
Best argmax(const float* x, int64_t count) {
  F top = splat(-kInfinity);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) top = vmax(load(x + i), top);
  float best = max_lane(top);
  for (; i < count; ++i) best = x[i] > best ? x[i] : best;
  if (best == -kInfinity) return {best, 0};
  i = 0;
  while (i + kLanes <= count && !any(load(x + i) == splat(best))) i += kLanes;
  while (x[i] != best) ++i;
  return {best, i};
}

// ---- noise: see kernels/noise.py ----

inline uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

inline U mix32(U x) {
  x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
  x = (x ^ (x >> 13)) * 0xC2B2AE35u;
  return x ^ (x >> 16);
}

inline uint64_t row_key(int64_t seed, int64_t position) {
  constexpr uint64_t golden = 0x9E3779B97F4A7C15u;
  return mix64(mix64(uint64_t(seed) + golden) + (uint64_t(position) + 1) * golden);
}

inline U token_hash(uint64_t key, I ids) {
  const U low = uint32_t(key) - U{}, high = uint32_t(key >> 32) - U{};
  return mix32(mix32(bits_of<U>(ids) * 0x9E3779B9u + low) ^ high);
}

constexpr float kMostNoise = 22.9f;  // above 33 ln 2, the value at u = 2^-33

// (hash + 0.5) / 2^32
inline F uniform(U hash) {
  const F high = __builtin_convertvector(bits_of<I>(hash >> 16), F);
  const F low = __builtin_convertvector(bits_of<I>(hash & 0xffffu), F);
  return fma(high, splat(65536.0f), low + splat(0.5f)) * splat(0x1p-32f);
}

// -log(-log1p(-u))
inline F gumbel(F u) {
  const F t = vmax(splat(1.0f) - u, splat(0x1p-25f));
  const F lost = (splat(1.0f) - t) - u;  // what rounding 1 - u to t left out
  return F{} - log(F{} - (log(t) + lost / t));
}

// ---- the filters, all three of which are thresholds on z ----

// z = (x - max)/temperature of one row, at most 0; what is not a number is far below everything.
struct Scores {
  const float* x;
  int64_t count;
  float top, temperature;

  F map(F v) const {
    F z = (v - splat(top)) / splat(temperature);
    z = v == splat(top) ? F{} : z;
    return z > splat(-1e30f) ? z : splat(-1e30f);
  }

  F at(int64_t i) const {
    if (i + kLanes <= count) return map(load(x + i));
    float tail[kLanes];
    for (int j = 0; j < kLanes; ++j) tail[j] = i + j < count ? x[i + j] : -kInfinity;
    return map(load(tail));
  }
};

// Tokens by z, in bins of 1/32, so that the k-th or the p-quantile is found by sorting one bin.
class Histogram {
 public:
  static constexpr int kBins = 1024;

  explicit Histogram(const Scores& scores) : scores_(scores) {
    for (int64_t i = 0; i < scores.count; i += kLanes) {
      const F z = scores.at(i);
      const I bin = bins(z);
      const F weight = exp(z);
      const int lanes = int(std::min<int64_t>(kLanes, scores.count - i));
      for (int j = 0; j < lanes; ++j) {
        ++counts_[bin[j]];
        mass_[bin[j]] += weight[j];
      }
    }
  }

  // The smallest z that top-k and top-p leave.
  float threshold(int64_t k, float p) {
    const float at_least = k < scores_.count ? kth(k) : -kInfinity;
    return p < 1.0f ? std::max(at_least, quantile(at_least, p)) : at_least;
  }

 private:
  static I bins(F z) {
    return __builtin_convertvector(vmin(z * splat(-32.0f), splat(kBins - 1.0f)), I);
  }

  // The values of one bin.
  std::vector<float> values_of(int wanted) const {
    std::vector<float> values;
    values.reserve(counts_[wanted]);
    for (int64_t i = 0; i < scores_.count; i += kLanes) {
      const F z = scores_.at(i);
      const I bin = bins(z);
      if (!any(bin == splat_int(wanted))) continue;
      const int lanes = int(std::min<int64_t>(kLanes, scores_.count - i));
      for (int j = 0; j < lanes; ++j)
        if (bin[j] == wanted) values.push_back(z[j]);
    }
    return values;
  }

  float kth(int64_t k) const {
    int bin = 0;
    for (; counts_[bin] < k; ++bin) k -= counts_[bin];
    std::vector<float> values = values_of(bin);
    std::nth_element(values.begin(), values.begin() + (k - 1), values.end(), std::greater<float>());
    return values[k - 1];
  }

  // The smallest kept z when the mass of all z that are larger must be below p of that of all
  // z >= at_least.
  float quantile(float at_least, float p) {
    int last = kBins - 1;
    double all = 0;
    if (at_least > -kInfinity) {
      last = bins(splat(at_least))[0];
      mass_[last] = 0;
      for (float z : values_of(last))
        if (z >= at_least) mass_[last] += exp(splat(z))[0];
    }
    for (int bin = 0; bin <= last; ++bin) all += mass_[bin];
    const double wanted = p * all;
    double before = 0;
    int bin = -1;
    double before_bin = 0;
    for (int b = 0; b <= last && before < wanted; ++b) {
      if (counts_[b] == 0) continue;
      bin = b;
      before_bin = before;
      before += mass_[b];
    }
    if (bin < 0) return 0.0f;
    float kept = 0.0f;
    double running = before_bin, of_equals = 0;
    std::vector<float> values = values_of(bin);
    std::sort(values.begin(), values.end(), std::greater<float>());
    for (float z : values) {
      if (z != kept) {
        running += of_equals;
        of_equals = 0;
        if (!(running < wanted)) break;
        kept = z;
      }
      of_equals += exp(splat(z))[0];
    }
    return kept;
  }

  const Scores& scores_;
  int64_t counts_[kBins] = {};
  double mass_[kBins] = {};
};

struct Settings {
  float temperature, top_p, min_p;
  int32_t top_k;
  int64_t seed, position;
};

int64_t draw(const float* x, int64_t count, const Settings& s) {
  const Best top = argmax(x, count);
  if (s.temperature == 0.0f || top.value == -kInfinity) return top.id;
  const Scores scores{x, count, top.value, s.temperature};
  const int64_t k = s.top_k > 0 ? s.top_k : count;
  float threshold = s.min_p > 0.0f ? std::min(std::log(s.min_p), 0.0f) : -kInfinity;
  if (k < count || s.top_p < 1.0f)
    threshold = std::max(threshold, Histogram(scores).threshold(k, s.top_p));

  const uint64_t key = row_key(s.seed, s.position);
  // Starting from the likeliest token, few others can still win: the noise is bounded.
  Best best{gumbel(uniform(token_hash(key, splat_int(int32_t(top.id)))))[0], top.id};
  for (int64_t i = 0; i < count; i += kLanes) {
    const F z = scores.at(i);
    I open = (z >= splat(threshold)) & (z >= splat(best.value - kMostNoise));
    if (!any(open)) continue;
    const F u = uniform(token_hash(key, iota() + splat_int(int32_t(i))));
    // u < -log1p(-u), so a key of at least best.value needs u below this, give or take rounding.
    open &= u < exp(z - splat(best.value)) * splat(1.0001f);
    if (!any(open)) continue;
    const F keys = z + gumbel(u);
    const int lanes = int(std::min<int64_t>(kLanes, count - i));
    for (int j = 0; j < lanes; ++j)
      if (open[j] && (keys[j] > best.value || (keys[j] == best.value && i + j < best.id)))
        best = {keys[j], i + j};
  }
  return best.id;
}

// ---- log-probabilities ----

double log_sum_exp(const float* x, int64_t count, float top) {
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += 4096) {
    const int64_t end = std::min<int64_t>(begin + 4096, count);
    F part{};
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) part = part + exp(load(x + i) - splat(top));
    total += sum(part);
    for (; i < end; ++i) total += exp(splat(x[i] - top))[0];
  }
  return double(top) + std::log(total);
}

// The k largest, falling, lower ids first among equals.
void top_ids(const float* x, int64_t count, int64_t k, std::vector<int64_t>& ids) {
  const auto before = [x](int64_t a, int64_t b) { return x[a] != x[b] ? x[a] > x[b] : a < b; };
  ids.clear();
  if (k > 256) {
    for (int64_t i = 0; i < count; ++i) ids.push_back(i);
    std::partial_sort(ids.begin(), ids.begin() + k, ids.end(), before);
    ids.resize(k);
    return;
  }
  for (int64_t i = 0; i < count && k > 0; ++i) {
    if (int64_t(ids.size()) == k) {
      const F worst = splat(x[ids.back()]);
      while (i + kLanes <= count && !any(load(x + i) > worst)) i += kLanes;
      if (i >= count) break;
      if (!(x[i] > x[ids.back()])) continue;
      ids.pop_back();
    }
    ids.insert(std::upper_bound(ids.begin(), ids.end(), i, before), i);
  }
}

template <class Body>
void for_each_row(int64_t rows, double ns_per_row, Body&& body) {
  if (pieces(double(rows) * ns_per_row, rows) > 1) return parallel_for(rows, body);
  for (int64_t r = 0; r < rows; ++r) body(r);
}

inline int64_t find_outside(const int64_t* values, int64_t count, int64_t end) {
  for (int64_t i = 0; i < count; ++i)
    if (values[i] < 0 || values[i] >= end) return i;
  return -1;
}

// Arguments of bad values: 1 rows, 2 ids. Rows past the end are padding.
int64_t check_entries(const int64_t* rows, const int64_t* ids, int64_t count, int64_t num_rows,
                      int64_t vocab) {
  for (int64_t e = 0; e < count; ++e) {
    if (rows[e] < 0) return bad_value(1, e);
    if (rows[e] < num_rows && (ids[e] < 0 || ids[e] >= vocab)) return bad_value(2, e);
  }
  return 0;
}

}  // namespace
}  // namespace millrace

using namespace millrace;

#pragma GCC visibility push(default)
extern "C" {

int64_t millrace_apply_penalties(float* logits, const int64_t* entry_rows, const int64_t* entry_ids,
                                 const int32_t* counts, const float* repetition,
                                 const float* presence, const float* frequency, int64_t entries,
                                 int64_t rows, int64_t vocab) {
  const int64_t bad = check_entries(entry_rows, entry_ids, entries, rows, vocab);
  if (bad != 0) return bad;
  for (int64_t e = 0; e < entries; ++e) {
    const int64_t row = entry_rows[e];
    if (row >= rows) continue;
    float& logit = logits[row * vocab + entry_ids[e]];
    double value = logit;
    value = value > 0 ? value / repetition[row] : value * repetition[row];
    value -= double(frequency[row]) * counts[e];
    value -= double(presence[row]) * (counts[e] > 0 ? 1 : 0);
    logit = float(value);
  }
  return 0;
}

int64_t millrace_add_bias(float* logits, const int64_t* bias_rows, const int64_t* bias_ids,
                          const float* values, int64_t entries, int64_t rows, int64_t vocab) {
  const int64_t bad = check_entries(bias_rows, bias_ids, entries, rows, vocab);
  if (bad != 0) return bad;
  for (int64_t e = 0; e < entries; ++e)
    if (bias_rows[e] < rows) logits[bias_rows[e] * vocab + bias_ids[e]] += values[e];
  return 0;
}

void millrace_apply_token_mask(float* logits, const int32_t* mask, int64_t rows, int64_t vocab) {
  const int64_t words = (vocab + 31) / 32;
  for_each_row(rows, double(vocab) * 0.3, [&](int64_t r) {
    for (int64_t w = 0; w < words; ++w) {
      const uint32_t allowed = uint32_t(mask[r * words + w]);
      if (allowed == 0xffffffffu) continue;
      const int64_t first = w * 32, count = std::min<int64_t>(32, vocab - first);
      float* const x = logits + r * vocab + first;
      for (int64_t i = 0; i < count; ++i) x[i] = allowed >> i & 1 ? x[i] : -kInfinity;
    }
  });
}

void millrace_sample(int64_t* out_ids, const float* logits, const float* temperature,
                     const int32_t* top_k, const float* top_p, const float* min_p,
                     const int64_t* seeds, const int64_t* positions, int64_t rows, int64_t vocab) {
  for_each_row(rows, double(vocab) * 0.6, [&](int64_t r) {
    out_ids[r] = draw(logits + r * vocab, vocab,
                      {temperature[r], top_p[r], min_p[r], top_k[r], seeds[r], positions[r]});
  });
}

// Arguments of bad values: 1 chosen.
int64_t millrace_logprobs(float* out_logprobs, int64_t* out_ids, int64_t* out_ranks,
                          const float* logits, const int64_t* chosen, int64_t k, int64_t rows,
                          int64_t vocab) {
  const int64_t bad = find_outside(chosen, rows, vocab);
  if (bad >= 0) return bad_value(1, bad);
  for_each_row(rows, double(vocab) * 0.6, [&](int64_t r) {
    const float* const x = logits + r * vocab;
    const double log_sum = log_sum_exp(x, vocab, argmax(x, vocab).value);
    static thread_local std::vector<int64_t> ids;
    top_ids(x, vocab, k, ids);
    ids.insert(ids.begin(), chosen[r]);
    for (int64_t j = 0; j <= k; ++j) {
      out_ids[r * (k + 1) + j] = ids[j];
      out_logprobs[r * (k + 1) + j] = float(x[ids[j]] - log_sum);
    }
    int64_t rank = 1;
    for (int64_t i = 0; i < vocab; ++i) rank += x[i] > x[chosen[r]];
    out_ranks[r] = rank;
  });
  return 0;
}

// out[i] = 32 hash bits of (seed, position, first_id + i), for tests.
void millrace_token_hashes(uint32_t* out, int64_t seed, int64_t position, int64_t first_id,
                           int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const U hash = token_hash(row_key(seed, position), iota() + splat_int(int32_t(first_id + i)));
    for (int64_t j = 0; j < kLanes && i + j < count; ++j) out[i + j] = hash[j];
  }
}

}  // extern "C"
#pragma GCC visibility pop
