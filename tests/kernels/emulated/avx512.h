// The AVX-512 and VNNI intrinsics that the kernels use, in plain C++, so that their logic can be tested
// on any CPU with AVX2. Compile with -DKVLOOM_EMULATED='"..path../avx512.h"'.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {
namespace emulated {
struct F { float x[16]; };
struct I { uint32_t x[16]; };
using Mask = uint16_t;

template <class Fn> F f(Fn fn) { F r; for (int i = 0; i < 16; i++) r.x[i] = fn(i); return r; }
template <class Fn> I n(Fn fn) { I r; for (int i = 0; i < 16; i++) r.x[i] = uint32_t(fn(i)); return r; }
template <class To, class From> To as(const From& a) { To r; static_assert(sizeof r == sizeof a); memcpy(&r, &a, sizeof r); return r; }

inline F set_ps(float v) { return f([=](int) { return v; }); }
inline I set_i(int32_t v) { return n([=](int) { return v; }); }
inline F load_ps(const void* p) { F r; memcpy(&r, p, 64); return r; }
inline I load_i(const void* p) { I r; memcpy(&r, p, 64); return r; }
inline void store_ps(void* p, F a) { memcpy(p, &a, 64); }
inline F fmadd(F a, F b, F c) { return f([&](int i) { return std::fma(a.x[i], b.x[i], c.x[i]); }); }
inline F add(F a, F b) { return f([&](int i) { return a.x[i] + b.x[i]; }); }
inline F sub(F a, F b) { return f([&](int i) { return a.x[i] - b.x[i]; }); }
inline F mul(F a, F b) { return f([&](int i) { return a.x[i] * b.x[i]; }); }
inline F div(F a, F b) { return f([&](int i) { return a.x[i] / b.x[i]; }); }
inline F max(F a, F b) { return f([&](int i) { return a.x[i] > b.x[i] ? a.x[i] : b.x[i]; }); }  // NaN: b
inline F min(F a, F b) { return f([&](int i) { return a.x[i] < b.x[i] ? a.x[i] : b.x[i]; }); }
inline float reduce_min(F a) { float s = a.x[0]; for (float v : a.x) s = v < s ? v : s; return s; }
inline F round(F a) { return f([&](int i) { return std::nearbyintf(a.x[i]); }); }
inline float reduce_add(F a) { float s = 0; for (float v : a.x) s += v; return s; }
inline float reduce_max(F a) { float s = a.x[0]; for (float v : a.x) s = v > s ? v : s; return s; }
inline Mask at_least(F a, F b) { Mask m = 0; for (int i = 0; i < 16; i++) m |= Mask(a.x[i] >= b.x[i]) << i; return m; }
inline F maskz(Mask m, F a) { return f([&](int i) { return m >> i & 1 ? a.x[i] : 0.f; }); }
inline F of_half(__m256i a) { F r; _mm256_storeu_ps(r.x, _mm256_cvtph_ps(_mm256_castsi256_si128(a))); _mm256_storeu_ps(r.x + 8, _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))); return r; }
inline I widen16(__m256i a) { uint16_t h[16]; memcpy(h, &a, 32); return n([&](int i) { return h[i]; }); }
inline I srl32(I a, unsigned k) { return n([&](int i) { return k > 31 ? 0 : a.x[i] >> k; }); }
inline I sll32(I a, unsigned k) { return n([&](int i) { return k > 31 ? 0 : a.x[i] << k; }); }
inline I sra32(I a, unsigned k) { return n([&](int i) { return int32_t(a.x[i]) >> k; }); }
inline I srl16(I a, unsigned k) { return n([&](int i) { return (a.x[i] & 0xffff) >> k | (a.x[i] >> 16 >> k) << 16; }); }
inline I land(I a, I b) { return n([&](int i) { return a.x[i] & b.x[i]; }); }
inline I lor(I a, I b) { return n([&](int i) { return a.x[i] | b.x[i]; }); }
inline I addi(I a, I b) { return n([&](int i) { return a.x[i] + b.x[i]; }); }
inline I subi(I a, I b) { return n([&](int i) { return a.x[i] - b.x[i]; }); }
inline I madd(I a, I b) { return n([&](int i) { return int16_t(a.x[i]) * int16_t(b.x[i]) + int16_t(a.x[i] >> 16) * int16_t(b.x[i] >> 16); }); }
inline F to_ps(I a) { return f([&](int i) { return float(int32_t(a.x[i])); }); }
inline I to_i(F a) { return n([&](int i) { return int32_t(std::nearbyintf(a.x[i])); }); }
inline F permute_ps(I at, F a) { return f([&](int i) { return a.x[at.x[i] & 15]; }); }
inline I permute64(I at, I a) {
  uint64_t from[8], to[8], index[8];
  memcpy(from, &a, 64), memcpy(index, &at, 64);
  for (int i = 0; i < 8; i++) to[i] = from[index[i] & 7];
  return load_i(to);
}
inline I set64(uint64_t h, uint64_t g, uint64_t f, uint64_t e, uint64_t d, uint64_t c, uint64_t b, uint64_t a) {
  const uint64_t x[8] = {a, b, c, d, e, f, g, h};
  return load_i(x);
}
inline I shuffle32(I a, int k) { return n([&](int i) { return a.x[i / 4 * 4 + (k >> 2 * (i % 4) & 3)]; }); }
inline __m128i narrow8(I a) { uint8_t b[16]; for (int i = 0; i < 16; i++) b[i] = uint8_t(a.x[i]); return _mm_loadu_si128((const __m128i*)b); }
inline __m256i low(I a) { __m256i r; memcpy(&r, &a, 32); return r; }
inline I dot(I sum, I u, I s) {  // unsigned bytes times signed bytes
  return n([&](int i) {
    int32_t d = 0;
    for (int e = 0; e < 4; e++) d += int32_t(u.x[i] >> 8 * e & 255) * int8_t(s.x[i] >> 8 * e);
    return sum.x[i] + uint32_t(d);
  });
}
}  // namespace emulated
}  // namespace

#define __m512 emulated::F
#define __m512i emulated::I
#define _mm512_setzero_ps() emulated::set_ps(0)
#define _mm512_setzero_si512() emulated::set_i(0)
#define _mm512_set1_ps emulated::set_ps
#define _mm512_set1_epi32 emulated::set_i
#define _mm512_set_epi64 emulated::set64
#define _mm512_loadu_ps emulated::load_ps
#define _mm512_loadu_si512 emulated::load_i
#define _mm512_storeu_ps emulated::store_ps
#define _mm512_fmadd_ps emulated::fmadd
#define _mm512_add_ps emulated::add
#define _mm512_sub_ps emulated::sub
#define _mm512_mul_ps emulated::mul
#define _mm512_div_ps emulated::div
#define _mm512_max_ps emulated::max
#define _mm512_min_ps emulated::min
#define _mm512_reduce_min_ps emulated::reduce_min
#define _mm512_roundscale_ps(a, how) emulated::round(a)
#define _mm512_reduce_add_ps emulated::reduce_add
#define _mm512_reduce_max_ps emulated::reduce_max
#define _mm512_cmp_ps_mask(a, b, how) emulated::at_least(a, b)
#define _mm512_maskz_mov_ps emulated::maskz
#define _mm512_cvtph_ps emulated::of_half
#define _mm512_cvtepu16_epi32 emulated::widen16
#define _mm512_srli_epi32 emulated::srl32
#define _mm512_slli_epi32 emulated::sll32
#define _mm512_srai_epi32 emulated::sra32
#define _mm512_srli_epi16 emulated::srl16
#define _mm512_and_si512 emulated::land
#define _mm512_or_si512 emulated::lor
#define _mm512_add_epi32 emulated::addi
#define _mm512_sub_epi32 emulated::subi
#define _mm512_madd_epi16 emulated::madd
#define _mm512_cvtepi32_ps emulated::to_ps
#define _mm512_cvtps_epi32 emulated::to_i
#define _mm512_castsi512_ps emulated::as<emulated::F>
#define _mm512_castps_si512 emulated::as<emulated::I>
#define _mm512_castsi512_si256 emulated::low
#define _mm512_permutexvar_ps emulated::permute_ps
#define _mm512_permutexvar_epi64 emulated::permute64
#define _mm512_shuffle_epi32(a, k) emulated::shuffle32(a, int(k))
#define _mm512_cvtepi32_epi8 emulated::narrow8
#define _mm512_dpbusd_epi32 emulated::dot
