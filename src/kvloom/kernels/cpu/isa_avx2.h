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
  static constexpr bool LOOSE = true;  // `lookup` sees the low bits of a code only
  struct Table { F low, high; };  // of 16 numbers, those of fewer bits repeated
  FN Table table(const float* p) { return {load(p), load(p + 8)}; }
  template <int SIZE> FN F lookup(I code, const Table& t) {
    const F low = _mm256_permutevar8x32_ps(t.low, code);
    if (SIZE <= 8) return low;
    const F high = _mm256_permutevar8x32_ps(t.high, code);
    return _mm256_blendv_ps(low, high, as_float(sll32(code, 28)));  // by bit 3
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
