// Integer products of packed codes with queries of 15 bits, by byte quads: number = 128 hi + lo.
#pragma once
#include "codes.h"

namespace {
// u8 codes of one quad.
template <int BITS>
static inline __attribute__((always_inline)) Isa::I codes8(const uint8_t* unit, int k, int half) {
  constexpr uint32_t MASK = ((1u << (BITS == 3 ? 2 : BITS)) - 1) * 0x01010101u;
  const Isa::I x = Isa::loadi(unit + offset_of<BITS>(k, half));
  if constexpr (BITS == 8) return x;
  const int shift = shift_of<BITS>(k, half);
  Isa::I code = Isa::land(shift ? Isa::srl16(x, shift) : x, Isa::seti(MASK));
  if constexpr (BITS == 3) {
    const Isa::I y = Isa::srl16(Isa::loadi(unit + 128), HIGH[k] + 2 * half);
    code = Isa::lor(code, Isa::sll32(Isa::land(y, Isa::seti(0x01010101u)), 2));
  }
  return code;
}

static inline __attribute__((always_inline)) void accumulate(Isa::I& sum, Isa::I codes, int32_t word) {
#ifdef __AVX512VNNI__
  // GCC 12 copies the accumulator twice around the intrinsic
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(_mm512_set1_epi32(word)));
#else  // tests on CPUs without it
  sum = _mm512_dpbusd_epi32(sum, codes, _mm512_set1_epi32(word));
#endif
}

// See dot_pairs.h.
template <int BITS, int H, bool NARROW, int TERMS>
void dot4_terms(const uint8_t* p, int quads, const int32_t* words, int64_t stride, int32_t* out,
                const uint8_t* next) {
  using I = Isa::I;
  constexpr int UNIT = quads_of_unit(BITS), BYTES = bytes_of_unit(BITS);
  I sum[H][2][TERMS];
  for (int h = 0; h < H; h++)
    for (int half = 0; half < 2; half++)
      for (int t = 0; t < TERMS; t++) sum[h][half][t] = Isa::zeroi();
  for (int j = 0; j < quads; j += UNIT) {
    const uint8_t* unit = p + (j / UNIT) * BYTES;
    for (int b = 0; b < BYTES; b += 64) Isa::fetch(next + (j / UNIT) * BYTES + b);
#pragma GCC unroll 4
    for (int k = 0; k < UNIT; k++)
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        const I code = codes8<BITS>(unit, k, half);
        const int quad = NARROW ? 2 * (j + k) + half : j + k;
#pragma GCC unroll 4
        for (int h = 0; h < H; h++)
#pragma GCC unroll 2
          for (int t = 0; t < TERMS; t++)
            accumulate(sum[h][half][t], code, words[h * stride + 2 * quad + t]);
      }
  }
  for (int h = 0; h < H; h++)
    for (int half = 0; half < 2; half++) {
      I total = sum[h][half][0];
      if constexpr (TERMS == 2) total = Isa::addi(Isa::sll32(total, 7), sum[h][half][1]);
      __builtin_memcpy(out + h * 32 + half * 16, &total, sizeof(I));
    }
}

template <int BITS, int H, bool NARROW>
void dot4(const uint8_t* p, int quads, const int32_t* words, int64_t stride, int terms, int32_t* out,
          const uint8_t* next) {
  if (terms == 1)
    dot4_terms<BITS, H, NARROW, 1>(p, quads, words, stride, out, next);
  else
    dot4_terms<BITS, H, NARROW, 2>(p, quads, words, stride, out, next);
}
}  // namespace
