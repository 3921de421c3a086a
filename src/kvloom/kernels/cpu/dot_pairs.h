// Integer products of packed codes with queries of 15 bits, by 16-bit pairs.
#pragma once
#include "codes.h"

namespace {
// out[h][lane] = sum over quads and e of code(quad, lane, e) * query[h](quad, e), lane < 32.
//
// `NARROW`: the halves of the panel are even and odd quads of the same 16 lanes (see layout.py); the
// caller adds lane and lane + 16.
template <int BITS, int H, bool NARROW>
void dot4(const uint8_t* p, int quads, const int32_t* words, int64_t stride, int, int32_t* out,
          const uint8_t* next) {
  using I = Isa::I;
  constexpr int UNIT = quads_of_unit(BITS), BYTES = bytes_of_unit(BITS), W = Isa::W;
  for (int s = 0; s < 16 / W; s++) {
    I sum[H][2];
    for (int h = 0; h < H; h++) sum[h][0] = sum[h][1] = Isa::zeroi();
    for (int j = 0; j < quads; j += UNIT) {
      const uint8_t* unit = p + (j / UNIT) * BYTES + s * 4 * W;
      if (s == 0)
        for (int b = 0; b < BYTES; b += 64) Isa::fetch(next + (j / UNIT) * BYTES + b);
#pragma GCC unroll 4
      for (int k = 0; k < UNIT; k++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
          const I even = codes16<BITS>(unit, k, half, 0), odd = codes16<BITS>(unit, k, half, 1);
          const int quad = NARROW ? 2 * (j + k) + half : j + k;
#pragma GCC unroll 4
          for (int h = 0; h < H; h++) {
            const int32_t* q = words + h * stride + 2 * quad;
            sum[h][half] = Isa::addi(sum[h][half], Isa::madd(even, Isa::seti(uint32_t(q[0]))));
            sum[h][half] = Isa::addi(sum[h][half], Isa::madd(odd, Isa::seti(uint32_t(q[1]))));
          }
        }
    }
    for (int h = 0; h < H; h++)
      for (int half = 0; half < 2; half++)
        __builtin_memcpy(out + h * 32 + half * 16 + s * W, &sum[h][half], sizeof(I));
  }
}
}  // namespace
