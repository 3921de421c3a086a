// AVX-512 (F, BW, DQ, VL): sixteen lanes.
#pragma once
#include <immintrin.h>

#include <cstdint>
#ifdef KVLOOM_EMULATED  // in tests, on CPUs without AVX-512
#include KVLOOM_EMULATED
#endif

#define FN static inline __attribute__((always_inline))

namespace {
struct Isa {
  static constexpr int W = 16;
  static constexpr int ROWS = 4;  // of queries at once
#ifdef KVLOOM_VNNI
  static constexpr bool ONE_TERM_PAYS = true;
#else
  static constexpr bool ONE_TERM_PAYS = false;
#endif
  using F = __m512;
  using I = __m512i;

  FN F zero() { return _mm512_setzero_ps(); }
  FN F set(float v) { return _mm512_set1_ps(v); }
  FN F load(const float* p) { return _mm512_loadu_ps(p); }
  FN void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  FN F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  FN F add(F a, F b) { return _mm512_add_ps(a, b); }
  FN F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  FN F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  FN F div(F a, F b) { return _mm512_div_ps(a, b); }
  FN F max(F a, F b) { return _mm512_max_ps(a, b); }
  FN F min(F a, F b) { return _mm512_min_ps(a, b); }
  FN F abs(F a) { return as_float(land(_mm512_castps_si512(a), seti(0x7fffffff))); }
  FN F at_least(F a, F b) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), set(1.f)); }
  FN F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  FN float sum(F a) { return _mm512_reduce_add_ps(a); }
  FN float most(F a) { return _mm512_reduce_max_ps(a); }
  FN float smallest(F a) { return _mm512_reduce_min_ps(a); }
  FN uint16_t to_half(float f) { return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT); }
  FN F half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  FN float half1(uint16_t h) { return _cvtsh_ss(h); }
  FN F brain(const uint16_t* p) {
    return as_float(sll32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
  }

  FN I loadi(const void* p) { return _mm512_loadu_si512(p); }
  FN I zeroi() { return _mm512_setzero_si512(); }
  FN I seti(uint32_t v) { return _mm512_set1_epi32(int32_t(v)); }
  FN I srl32(I a, int n) { return _mm512_srli_epi32(a, unsigned(n)); }
  FN I sll32(I a, int n) { return _mm512_slli_epi32(a, unsigned(n)); }
  FN I srl16(I a, int n) { return _mm512_srli_epi16(a, unsigned(n)); }
  FN I land(I a, I b) { return _mm512_and_si512(a, b); }
  FN I lor(I a, I b) { return _mm512_or_si512(a, b); }
  FN I addi(I a, I b) { return _mm512_add_epi32(a, b); }
  FN I madd(I a, I b) { return _mm512_madd_epi16(a, b); }
  FN F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  FN I to_int(F a) { return _mm512_cvtps_epi32(a); }
  FN F as_float(I a) { return _mm512_castsi512_ps(a); }
  struct Table { F all; };  // of 16 numbers
  FN Table table(const float* p) { return {load(p)}; }
  // Levels of codes in bytes (see bytes32), of all four e: a lookup sees the low 4 bits.
  FN I by_e(I x) { return x; }
  FN void lookup4(I codes, const Table& t, F* out) {
    for (int e = 0; e < 4; e++) out[e] = _mm512_permutexvar_ps(srl32(codes, 8 * e), t.all);
  }
  // e4m3 codes as fp32, 2^120 too small: exponent and mantissa where fp32 has them.
  FN void fp8_4(I codes, F* out) {
    for (int e = 0; e < 4; e++) {
      const I code = srl32(codes, 8 * e);
      out[e] = as_float(lor(sll32(land(code, seti(0x80)), 24), sll32(land(code, seti(0x7f)), 20)));
    }
  }
  FN void fetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

#ifdef KVLOOM_VNNI
  // Four numbers as two words of bytes: hi and lo, the number being 128 hi + lo (or hi: one term).
  FN float words(const float* w, int n, float inverse, int terms, int32_t* out) {
    F rest = zero();
    for (int i = 0; i < n; i += W) {
      const F x = mul(load(w + i), set(inverse));
      const I q = to_int(x);
      rest = add(rest, sub(x, to_float(q)));
      I hi = q, lo = zeroi();
      if (terms == 2) {
        hi = _mm512_srai_epi32(addi(q, seti(64)), 7);
        lo = _mm512_sub_epi32(q, sll32(hi, 7));
      }
      const __m128i h = _mm512_cvtepi32_epi8(hi), l = _mm512_cvtepi32_epi8(lo);
      _mm_storeu_si128((__m128i*)(out + i / 2), _mm_unpacklo_epi32(h, l));
      _mm_storeu_si128((__m128i*)(out + i / 2 + 4), _mm_unpackhi_epi32(h, l));
    }
    return sum(rest);
  }
#else
  // Four numbers of 15 bits as two words of pairs: (0, 2) and (1, 3), as `madd` takes them.
  FN float words(const float* w, int n, float inverse, int, int32_t* out) {
    F rest = zero();
    for (int i = 0; i < n; i += W) {
      const F x = mul(load(w + i), set(inverse));
      const I q = to_int(x);
      rest = add(rest, sub(x, to_float(q)));
      const I later = sll32(_mm512_shuffle_epi32(q, _MM_PERM_DCDC), 16);
      const I pairs = lor(land(q, seti(0xffff)), later);  // in the low half of each 128 bits
      const I index = _mm512_set_epi64(0, 0, 0, 0, 6, 4, 2, 0);
      _mm256_storeu_si256((__m256i*)(out + i / 2),
                          _mm512_castsi512_si256(_mm512_permutexvar_epi64(index, pairs)));
    }
    return sum(rest);
  }
#endif
};
}  // namespace
#undef FN
#ifdef KVLOOM_VNNI
#include "dot_vnni.h"
#else
#include "dot_pairs.h"
#endif
