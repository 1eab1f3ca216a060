// What this processor can do at most: multiply-adds from registers, reads from memory.

#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
typedef float F __attribute__((vector_size(kLanes * 4)));

namespace {

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

template <class Body>
double timed(int threads, Body body) {
  std::vector<std::thread> others;
  const double start = seconds();
  for (int t = 1; t < threads; ++t) others.emplace_back(body, t);
  body(0);
  for (auto& other : others) other.join();
  return seconds() - start;
}

}  // namespace

extern "C" {

// Float operations a second: independent chains of a*x + y, contracted to fused multiply-adds.
double roofline_flops(int threads) {
  constexpr int64_t rounds = 4'000'000;
  const double time = timed(threads, [](int t) {
    F a[12];
    for (int j = 0; j < 12; ++j) a[j] = F{} + float(j);  // alike, they would become one chain
    const F x = F{} + 0.999f, y = F{} + float(t);
    for (int64_t i = 0; i < rounds; ++i)
#pragma GCC unroll 12
      for (int j = 0; j < 12; ++j) a[j] = a[j] * x + y;
    for (int j = 0; j < 12; ++j) asm volatile("" ::"m"(a[j]));
  });
  return double(rounds) * 12 * kLanes * 2 * threads / time;
}

// Bytes a second, reading `count` floats once.
double roofline_bandwidth(const float* data, int64_t count, int threads) {
  const double time = timed(threads, [=](int t) {
    F s[4] = {};
    const int64_t first = count / threads * t / 64 * 64,
                  last = count / threads * (t + 1) / 64 * 64;
    for (int64_t i = first; i < last; i += 4 * kLanes)
      for (int j = 0; j < 4; ++j) s[j] += *reinterpret_cast<const F*>(data + i + j * kLanes);
    for (int j = 0; j < 4; ++j) asm volatile("" ::"m"(s[j]));
  });
  return double(count) * 4 / time;
}

}  // extern "C"
