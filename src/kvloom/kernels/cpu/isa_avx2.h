// AVX2, FMA and F16C: eight lanes.
#pragma once
#include <immintrin.h>

#include <cstdint>

#define FN static inline __attribute__((always_inline))

namespace {
struct Isa {
  static constexpr int W = 8;
  static constexpr int ROWS = 4;  // of queries at once
  static constexpr bool ONE_TERM_PAYS = false;
  using F = __m256;
  using I = __m256i;

  FN F zero() { return _mm256_setzero_ps(); }
  FN F set(float v) { return _mm256_set1_ps(v); }
  FN F load(const float* p) { return _mm256_loadu_ps(p); }
  FN void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  FN F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  FN F add(F a, F b) { return _mm256_add_ps(a, b); }
  FN F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  FN F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  FN F div(F a, F b) { return _mm256_div_ps(a, b); }
  FN F max(F a, F b) { return _mm256_max_ps(a, b); }
  FN F min(F a, F b) { return _mm256_min_ps(a, b); }
  FN F abs(F a) { return _mm256_andnot_ps(set(-0.f), a); }
  FN F at_least(F a, F b) { return _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ), set(1.f)); }
  FN F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  FN float sum(F a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  FN float most(F a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }
  FN float smallest(F a) {
    __m128 x = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_min_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_min_ss(x, _mm_movehdup_ps(x)));
  }
  FN uint16_t to_half(float f) { return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT); }
  FN F half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  FN float half1(uint16_t h) { return _cvtsh_ss(h); }
  FN F brain(const uint16_t* p) {
    return as_float(sll32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
  }

  FN I loadi(const void* p) { return _mm256_loadu_si256((const I*)p); }
  FN I zeroi() { return _mm256_setzero_si256(); }
  FN I seti(uint32_t v) { return _mm256_set1_epi32(int32_t(v)); }
  FN I srl32(I a, int n) { return _mm256_srli_epi32(a, n); }
  FN I sll32(I a, int n) { return _mm256_slli_epi32(a, n); }
  FN I srl16(I a, int n) { return _mm256_srli_epi16(a, n); }
  FN I land(I a, I b) { return _mm256_and_si256(a, b); }
  FN I lor(I a, I b) { return _mm256_or_si256(a, b); }
  FN I addi(I a, I b) { return _mm256_add_epi32(a, b); }
  FN I madd(I a, I b) { return _mm256_madd_epi16(a, b); }
  FN F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  FN I to_int(F a) { return _mm256_cvtps_epi32(a); }
  FN F as_float(I a) { return _mm256_castsi256_ps(a); }

  // Levels of 32 codes in bytes (see bytes32), four vectors at once: shuffles of bytes are twice as fast as those
  // of words. A table holds the four bytes of 16 fp32 numbers apart, in each half.
  struct Table { I byte[4]; };
  FN __m128i order() {  // bytes (lane, e) as (e, lane)
    return _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  }
  FN I by_e(I x) { return _mm256_shuffle_epi8(x, _mm256_broadcastsi128_si256(order())); }
  FN Table table(const float* p) {
    __m128 four[4];
    for (int i = 0; i < 4; i++)
      four[i] = _mm_castsi128_ps(_mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)(p + 4 * i)), order()));
    _MM_TRANSPOSE4_PS(four[0], four[1], four[2], four[3]);
    Table t;
    for (int i = 0; i < 4; i++) t.byte[i] = _mm256_broadcastsi128_si256(_mm_castps_si128(four[i]));
    return t;
  }
  FN void lookup4(I codes, const Table& t, F* out) {
    I b[4];
    for (int i = 0; i < 4; i++) b[i] = _mm256_shuffle_epi8(t.byte[i], codes);
    join4(_mm256_unpacklo_epi8(b[0], b[1]), _mm256_unpackhi_epi8(b[0], b[1]),
          _mm256_unpacklo_epi8(b[2], b[3]), _mm256_unpackhi_epi8(b[2], b[3]), out);
  }
  // e4m3 codes as fp32, 2^120 too small: their bits begin in the upper 16.
  FN void fp8_4(I codes, F* out) {
    const I top = lor(land(codes, seti(0x80808080u)), land(srl16(codes, 4), seti(0x07070707u)));
    const I next = land(sll32(codes, 4), seti(0xf0f0f0f0u));
    join4(zeroi(), zeroi(), _mm256_unpacklo_epi8(next, top), _mm256_unpackhi_epi8(next, top), out);
  }
  FN void join4(I low01, I low23, I high01, I high23, F* out) {
    out[0] = as_float(_mm256_unpacklo_epi16(low01, high01)), out[1] = as_float(_mm256_unpackhi_epi16(low01, high01));
    out[2] = as_float(_mm256_unpacklo_epi16(low23, high23)), out[3] = as_float(_mm256_unpackhi_epi16(low23, high23));
  }
  FN void fetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

  // Four numbers of 15 bits as two words of pairs: (0, 2) and (1, 3), as `madd` takes them.
  FN float words(const float* w, int n, float inverse, int, int32_t* out) {
    F rest = zero();
    for (int i = 0; i < n; i += W) {
      const F x = mul(load(w + i), set(inverse));
      const I q = to_int(x);
      rest = add(rest, sub(x, to_float(q)));
      const I later = sll32(_mm256_shuffle_epi32(q, _MM_SHUFFLE(3, 2, 3, 2)), 16);
      const I pairs = lor(land(q, seti(0xffff)), later);  // in the low half of each 128 bits
      const I dense = _mm256_permute4x64_epi64(pairs, _MM_SHUFFLE(3, 1, 2, 0));
      _mm_storeu_si128((__m128i*)(out + i / 2), _mm256_castsi256_si128(dense));
    }
    return sum(rest);
  }
};
}  // namespace
#undef FN
#include "dot_pairs.h"
