// Vectors of floats on whatever the compiler's target offers.
//
// F and I are GCC/Clang vector types, so +, *, <, ?: work on them everywhere; only what the
// language has no operator for (fused multiply-add, half precision) is written per target. Without
// a known target the compiler lowers the vectors to what it has.
//
// Bits must not depend on how a loop is unrolled, so the build turns contraction off and every
// fused multiply-add is a call of fma().

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// MILLRACE_PORTABLE=8 or 16 leaves all intrinsics out and fixes the number of lanes: a way to test
// the code of other machines on this one.
#ifndef MILLRACE_PORTABLE
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define MILLRACE_AVX512 1
#endif
#if defined(MILLRACE_AVX512) && defined(__AVX512BF16__)
#define MILLRACE_BF16_DOT 1  // two bfloat16 products and their sum at the price of one float32 one
#endif
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define MILLRACE_AVX2 1  // true beside AVX-512 too
#include <immintrin.h>
#endif
#endif

namespace millrace {

#if defined(MILLRACE_PORTABLE)
constexpr int kLanes = MILLRACE_PORTABLE;
#elif defined(MILLRACE_AVX512)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

typedef float F __attribute__((vector_size(kLanes * 4)));
typedef int32_t I __attribute__((vector_size(kLanes * 4)));
typedef uint32_t U __attribute__((vector_size(kLanes * 4)));
typedef uint16_t U16 __attribute__((vector_size(kLanes * 2)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class To, class From>
inline To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline F splat(float x) { return x - F{}; }
inline I splat_int(int32_t x) { return x - I{}; }

inline F fma(F a, F b, F c) {
#if defined(MILLRACE_AVX512)
  return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(MILLRACE_AVX2)
  return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

#ifdef MILLRACE_BF16_DOT
// c + a's high half times b's + a's low half times b's, in that order, in float32.
inline F dot_pairs(F a, F b, F c) {
  return (F)_mm512_dpbf16_ps((__m512)c, (__m512bh)(__m512)a, (__m512bh)(__m512)b);
}
#endif

inline F vmax(F a, F b) { return a > b ? a : b; }
inline F vmin(F a, F b) { return a < b ? a : b; }

// ---- loads: kLanes numbers, in order, as float ----

inline F load(const float* p) {
  F v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline F load(const bf16* p) {
  U16 h;
  std::memcpy(&h, p, sizeof(h));
  return bits_of<F>(__builtin_convertvector(h, U) << 16);
}

inline F load(const f16* p) {
#if defined(MILLRACE_AVX512)
  return (F)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(MILLRACE_AVX2)
  return (F)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  U16 h;
  std::memcpy(&h, p, sizeof(h));
  U u = __builtin_convertvector(h, U);
  U magnitude = u & 0x7fffu;
  // Subnormals come out right: the product renormalises them.
  F value = bits_of<F>(magnitude << 13) * splat(0x1p112f);
  value = magnitude >= 0x7c00u ? bits_of<F>((magnitude << 13) | 0x7f800000u) : value;
  return bits_of<F>(bits_of<U>(value) | ((u & 0x8000u) << 16));
#endif
}

inline float load1(const float* p) { return *p; }
inline float load1(const bf16* p) { return bits_of<float>(uint32_t(p->bits) << 16); }
inline float load1(const f16* p) {
  f16 lanes[kLanes] = {*p};
  return load(lanes)[0];
}

// ---- stores: rounded to nearest even ----

inline void store(float* p, F v) { std::memcpy(p, &v, sizeof(v)); }

inline void store(bf16* p, F v) {
  U u = bits_of<U>(v);
  U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  U quiet = (u >> 16) | 0x40u;
  U16 h = __builtin_convertvector((u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded, U16);
  std::memcpy(p, &h, sizeof(h));
}

inline void store(f16* p, F v) {
#if defined(MILLRACE_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, 0));
#elif defined(MILLRACE_AVX2)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, 0));
#else
  for (int i = 0; i < kLanes; ++i) {
    uint32_t u = bits_of<uint32_t>(float(v[i])), magnitude = u & 0x7fffffffu, h;
    if (magnitude > 0x7f800000u) {
      h = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
    } else if (magnitude >= 0x47800000u) {
      h = 0x7c00u;
    } else if (magnitude < 0x38800000u) {
      // A sum whose last bit weighs one half-precision subnormal step rounds as it should.
      float half = bits_of<float>(magnitude) + 0.5f;
      h = bits_of<uint32_t>(half) - 0x3f000000u;
    } else {
      h = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    }
    p[i].bits = uint16_t(h | ((u >> 16) & 0x8000u));
  }
#endif
}

#ifdef MILLRACE_BF16_DOT
// One instruction instead of eight, for where subnormals may become zero.
inline void store_normal(bf16* p, F v) {
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &rounded, sizeof(rounded));
}
#endif

inline void store1(float* p, float v) { *p = v; }
template <class T>
inline void store1(T* p, float v) {
  T lanes[kLanes];
  store(lanes, splat(v));
  *p = lanes[0];
}

// ---- reductions, in one fixed order ----

inline float sum(F v) {
  float x[kLanes];
  std::memcpy(x, &v, sizeof(v));
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}

inline float max_lane(F v) {
#ifdef MILLRACE_AVX512
  return _mm512_reduce_max_ps((__m512)v);
#endif
  float x[kLanes];
  std::memcpy(x, &v, sizeof(v));
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
  return x[0];
}

inline bool any(I mask) {
#if defined(MILLRACE_AVX512)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(MILLRACE_AVX2)
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  int32_t x = 0;
  for (int i = 0; i < kLanes; ++i) x |= mask[i];
  return x != 0;
#endif
}

// The lanes' numbers 0, 1, 2, ...
inline I iota() {
  I v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

// ---- elementary functions ----

// e^x with a relative error below 2e-7 for -87.3 <= x <= 88; 0 below that, e^88 above.
// exp(0) is exactly 1. Cody-Waite reduction by ln 2, then the Taylor polynomial on |r| <= ln(2)/2.
inline F exp(F x) {
  F bounded = vmin(x, splat(88.0f));
  bounded = vmax(bounded, splat(-87.3f));
  const F magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  F shifted = fma(bounded, splat(1.44269504f), magic);
  F n = shifted - magic;
  F r = fma(n, splat(-0.693359375f), bounded);
  r = fma(n, splat(2.12194440e-4f), r);
  F p = splat(1.9841270e-4f);
  p = fma(p, r, splat(1.3888889e-3f));
  p = fma(p, r, splat(8.3333333e-3f));
  p = fma(p, r, splat(4.1666667e-2f));
  p = fma(p, r, splat(1.6666667e-1f));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  I scaled = bits_of<I>(p) + (bits_of<I>(shifted) << 23);
  return x < splat(-87.3f) ? F{} : bits_of<F>(scaled);
}

// ln x with a relative error below 3e-7 (absolute near 1), for normal x > 0.
// x = m * 2^e with m in [sqrt(1/2), sqrt(2)); ln m = 2 artanh((m-1)/(m+1)).
inline F log(F x) {
  I u = bits_of<I>(x);
  I e = (u - 0x3f3504f3) >> 23;
  F f = bits_of<F>(u - (e << 23)) - splat(1.0f);
  F s = f / (f + splat(2.0f));
  F z = s * s;
  F p = splat(2.0f / 11);
  p = fma(p, z, splat(2.0f / 9));
  p = fma(p, z, splat(2.0f / 7));
  p = fma(p, z, splat(2.0f / 5));
  p = fma(p, z, splat(2.0f / 3));
  F ln_m = fma(p * z, s, s + s);
  F n = __builtin_convertvector(e, F);
  return fma(n, splat(-2.12194440e-4f), ln_m) + n * splat(0.693359375f);
}

}  // namespace millrace
