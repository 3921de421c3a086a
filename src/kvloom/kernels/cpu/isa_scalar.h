// Eight lanes in plain C++: the slow path that any CPU can take, and what the others must equal.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {
struct Isa {
  static constexpr int W = 8;
  static constexpr int ROWS = 1;  // of queries at once
  static constexpr bool ONE_TERM_PAYS = false;
  struct F { float x[W]; };
  struct I { uint32_t x[W]; };

  template <class Fn> static F map(Fn f) { F r; for (int i = 0; i < W; i++) r.x[i] = f(i); return r; }
  template <class Fn> static I mapi(Fn f) { I r; for (int i = 0; i < W; i++) r.x[i] = f(i); return r; }

  static F zero() { return map([](int) { return 0.f; }); }
  static F set(float v) { return map([=](int) { return v; }); }
  static F load(const float* p) { F r; memcpy(r.x, p, sizeof r.x); return r; }
  static void store(float* p, F a) { memcpy(p, a.x, sizeof a.x); }
  static F fma(F a, F b, F c) { return map([&](int i) { return a.x[i] * b.x[i] + c.x[i]; }); }
  static F add(F a, F b) { return map([&](int i) { return a.x[i] + b.x[i]; }); }
  static F sub(F a, F b) { return map([&](int i) { return a.x[i] - b.x[i]; }); }
  static F mul(F a, F b) { return map([&](int i) { return a.x[i] * b.x[i]; }); }
  static F div(F a, F b) { return map([&](int i) { return a.x[i] / b.x[i]; }); }
  static F max(F a, F b) { return map([&](int i) { return a.x[i] > b.x[i] ? a.x[i] : b.x[i]; }); }
  static F min(F a, F b) { return map([&](int i) { return a.x[i] < b.x[i] ? a.x[i] : b.x[i]; }); }
  static F abs(F a) { return map([&](int i) { return fabsf(a.x[i]); }); }
  static F at_least(F a, F b) { return map([&](int i) { return a.x[i] >= b.x[i] ? 1.f : 0.f; }); }
  static F round(F a) { return map([&](int i) { return nearbyintf(a.x[i]); }); }
  static float sum(F a) { float s = 0; for (float v : a.x) s += v; return s; }
  static float most(F a) { float s = a.x[0]; for (float v : a.x) s = v > s ? v : s; return s; }
  static float smallest(F a) { float s = a.x[0]; for (float v : a.x) s = v < s ? v : s; return s; }
  static uint16_t to_half(float f) {  // to nearest, ties to even; finite numbers within fp16's range
    uint32_t b;
    memcpy(&b, &f, 4);
    const uint32_t sign = b >> 16 & 0x8000, rest = b & 0x7fffffff;
    if (rest < 0x38800000) {  // subnormal: units of 2^-24
      return uint16_t(sign | uint32_t(nearbyintf(fabsf(f) * 16777216.f)));
    }
    return uint16_t(sign | (rest + 0xfff + (rest >> 13 & 1) - 0x38000000) >> 13);
  }
  static F half(const uint16_t* p) { return map([=](int i) { return of_half(p[i]); }); }
  static F brain(const uint16_t* p) {
    return map([=](int i) { uint32_t b = uint32_t(p[i]) << 16; float f; memcpy(&f, &b, 4); return f; });
  }
  static float half1(uint16_t h) { return of_half(h); }
  static float of_half(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
    float f = 0;
    if (rest < 0x400) {  // subnormal
      f = float(rest) * 5.9604644775390625e-8f;
    } else {
      const uint32_t b = rest >= 0x7c00 ? 0x7f800000 | (rest & 0x3ff) << 13 : (rest << 13) + 0x38000000;
      memcpy(&f, &b, 4);
    }
    uint32_t b;
    memcpy(&b, &f, 4);
    b |= sign;
    memcpy(&f, &b, 4);
    return f;
  }

  static I loadi(const void* p) { I r; memcpy(r.x, p, sizeof r.x); return r; }
  static I zeroi() { return mapi([](int) { return 0u; }); }
  static I seti(uint32_t v) { return mapi([=](int) { return v; }); }
  static I srl32(I a, int n) { return mapi([&](int i) { return a.x[i] >> n; }); }
  static I sll32(I a, int n) { return mapi([&](int i) { return a.x[i] << n; }); }
  static I srl16(I a, int n) {
    return mapi([&](int i) { return (a.x[i] & 0xffff) >> n | (a.x[i] >> 16 >> n) << 16; });
  }
  static I land(I a, I b) { return mapi([&](int i) { return a.x[i] & b.x[i]; }); }
  static I lor(I a, I b) { return mapi([&](int i) { return a.x[i] | b.x[i]; }); }
  static I addi(I a, I b) { return mapi([&](int i) { return a.x[i] + b.x[i]; }); }
  static I madd(I a, I b) {  // signed pairs of 16 bits
    return mapi([&](int i) {
      return uint32_t(int16_t(a.x[i]) * int16_t(b.x[i]) + int16_t(a.x[i] >> 16) * int16_t(b.x[i] >> 16));
    });
  }
  static F to_float(I a) { return map([&](int i) { return float(int32_t(a.x[i])); }); }
  static I to_int(F a) { return mapi([&](int i) { return uint32_t(int32_t(nearbyintf(a.x[i]))); }); }
  static F as_float(I a) { F r; memcpy(&r, &a, sizeof r); return r; }
  struct Table { float x[16]; };
  static Table table(const float* p) { Table t; memcpy(t.x, p, sizeof t.x); return t; }
  // Levels of codes in bytes (see bytes32), of all four e.
  static I by_e(I x) { return x; }
  static void lookup4(I codes, const Table& t, F* out) {
    for (int e = 0; e < 4; e++) out[e] = map([&](int i) { return t.x[codes.x[i] >> 8 * e & 0xf]; });
  }
  // e4m3 codes as fp32, 2^120 too small: exponent and mantissa where fp32 has them.
  static void fp8_4(I codes, F* out) {
    for (int e = 0; e < 4; e++)
      out[e] = as_float(mapi([&](int i) {
        const uint32_t code = codes.x[i] >> 8 * e;
        return (code & 0x80) << 24 | (code & 0x7f) << 20;
      }));
  }
  static void fetch(const void*) {}

  // Four numbers of 15 bits as two words of pairs: (0, 2) and (1, 3), as `madd` takes them.
  static float words(const float* w, int n, float inverse, int, int32_t* out) {
    float rest = 0;
    for (int i = 0; i < n; i += 4) {
      int32_t q[4];
      for (int e = 0; e < 4; e++) {
        const float x = w[i + e] * inverse;
        q[e] = int32_t(nearbyintf(x));
        rest += x - float(q[e]);
      }
      out[i / 2] = int32_t(uint32_t(q[0] & 0xffff) | uint32_t(q[2]) << 16);
      out[i / 2 + 1] = int32_t(uint32_t(q[1] & 0xffff) | uint32_t(q[3]) << 16);
    }
    return rest;
  }
};
}  // namespace
#include "dot_pairs.h"
