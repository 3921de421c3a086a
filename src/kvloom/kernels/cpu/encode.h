// Pages to packed codes in one pass: ranges where they are not given, codes, packing. Equal bit by bit to the
// torch of formats/_grid.py, fp8.py, _levels.py and _streaming_codes.py. Numbers are finite: a cache refuses others.
#pragma once
#include "tiles.h"

namespace {
constexpr float HALF_LIMIT = 65504, LEAST_SCALE = 1e-7f;

static inline float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

// The largest fp16 number that is not above x.
static inline uint16_t floor_half(float x) {
  x = clamp(x, -HALF_LIMIT, HALF_LIMIT);
  const uint16_t near = Isa::to_half(x);
  if (!(half1(near) > x)) return near;
  if ((near & 0x7fff) == 0) return 0x8001;  // the next below 0
  return near & 0x8000 ? near + 1 : near - 1;
}

// fp16 scale and zero of numbers between low and high (`peak`: of the largest magnitude, symmetric).
struct Range {
  uint16_t scale, zero;
  float step, offset;
};

static inline Range range_of(float low, float high, float peak, int bits, bool symmetric) {
  Range r{};
  if (symmetric) {
    r.scale = Isa::to_half(clamp(peak / float((1 << (bits - 1)) - 1), LEAST_SCALE, HALF_LIMIT));
  } else {
    r.zero = floor_half(low);
    r.offset = half1(r.zero);
    r.scale = Isa::to_half(clamp((high - r.offset) / float((1 << bits) - 1), LEAST_SCALE, HALF_LIMIT));
  }
  r.step = half1(r.scale);
  return r;
}

// W codes of numbers x by steps and offsets.
static inline void codes_of(F x, F step, F offset, int bits, bool symmetric, uint8_t* out) {
  const float top = float((1 << bits) - 1), middle = symmetric ? float(1 << (bits - 1)) : 0;
  F code = Isa::add(Isa::round(Isa::div(symmetric ? x : Isa::sub(x, offset), step)), Isa::set(middle));
  code = Isa::min(Isa::max(code, Isa::zero()), Isa::set(top));
  const Isa::I whole = Isa::to_int(code);
  alignas(64) int32_t wide[W];
  __builtin_memcpy(wide, &whole, sizeof wide);
  for (int i = 0; i < W; i++) out[i] = uint8_t(wide[i]);
}

// Each token by itself: x [64][wide] -> codes [64][wide], parameters [2][groups][32].
static void by_token(const Encode& e, const float* x, int wide, uint8_t* codes, uint16_t* scales, uint16_t* zeros) {
  const int each = e.group && e.group < e.width ? e.group : e.width, groups = (e.width + each - 1) / each;
  for (int t = 0; t < PAGE; t++)
    for (int g = 0; g < groups; g++) {
      const int from = g * each, to = least(from + each, e.width);
      const float* row = x + t * wide;
      F low = Isa::set(row[from]), high = low, peak = Isa::abs(low);
      int c = from;
      for (; c + W <= to; c += W) {
        const F v = Isa::load(row + c);
        low = Isa::min(low, v), high = Isa::max(high, v), peak = Isa::max(peak, Isa::abs(v));
      }
      for (; c < to; c++) {
        const F v = Isa::set(row[c]);
        low = Isa::min(low, v), high = Isa::max(high, v), peak = Isa::max(peak, Isa::abs(v));
      }
      const Range r = range_of(Isa::smallest(low), Isa::most(high), Isa::most(peak), e.bits, e.symmetric);
      const int64_t at = (int64_t(t / TILE) * groups + g) * TILE + t % TILE;
      scales[at] = r.scale;
      if (zeros) zeros[at] = r.zero;
      for (int i = from; i < to; i += W)  // what it writes past the group is written again, or padding
        codes_of(Isa::load(row + i), Isa::set(r.step), Isa::set(r.offset), e.bits, e.symmetric, codes + t * wide + i);
    }
}

// Each channel by itself, in groups of 32 or 64 tokens: parameters [64 / group][width].
static void by_channel(const Encode& e, const float* x, int wide, uint8_t* codes, uint16_t* scales, uint16_t* zeros) {
  alignas(64) float low[W], high[W], peak[W], step[W], offset[W];
  for (int from = 0; from < PAGE; from += e.group)
    for (int c = 0; c < wide; c += W) {
      F lo = Isa::load(x + from * wide + c), hi = lo, top = Isa::abs(lo);
      for (int t = from + 1; t < from + e.group; t++) {
        const F v = Isa::load(x + t * wide + c);
        lo = Isa::min(lo, v), hi = Isa::max(hi, v), top = Isa::max(top, Isa::abs(v));
      }
      Isa::store(low, lo), Isa::store(high, hi), Isa::store(peak, top);
      for (int i = 0; i < W; i++) {
        const Range r = range_of(low[i], high[i], peak[i], e.bits, e.symmetric);
        step[i] = r.step, offset[i] = r.offset;
        if (c + i >= e.width) continue;
        scales[from / e.group * e.width + c + i] = r.scale;
        if (zeros) zeros[from / e.group * e.width + c + i] = r.zero;
      }
      for (int t = from; t < from + e.group; t++)
        codes_of(Isa::load(x + t * wide + c), Isa::load(step), Isa::load(offset), e.bits, e.symmetric, codes + t * wide + c);
    }
}

static void by_ranges(const Encode& e, const float* x, int wide, int64_t page, uint8_t* codes) {
  const int64_t each = e.group && e.group < e.width ? e.group : e.width;
  const int64_t parameters = e.per_token ? 2 * TILE * ((e.width + each - 1) / each) : int64_t(PAGE / e.group) * e.width;
  uint16_t *scales = e.scale + page * parameters, *zeros = e.zero ? e.zero + page * parameters : nullptr;
  if (e.per_token)
    by_token(e, x, wide, codes, scales, zeros);
  else
    by_channel(e, x, wide, codes, scales, zeros);
}

// By scales of channels that are given.
static void by_scales(const Encode& e, const float* x, int wide, int64_t page, uint8_t* codes) {
  alignas(64) float step[MAX_WIDTH];
  const uint16_t* scale = e.given + e.of[page] * e.width;
  for (int c = 0; c < wide; c++) step[c] = c < e.width ? half1(scale[c]) : 1;
  for (int t = 0; t < PAGE; t++)
    for (int c = 0; c < wide; c += W)
      codes_of(Isa::load(x + t * wide + c), Isa::load(step + c), Isa::zero(), e.bits, true, codes + t * wide + c);
}

// Numbers as the place among sorted bounds: how many of them lie below.
static void by_bounds(const Encode& e, const float* x, int wide, int64_t page, uint8_t* codes) {
  const int n = (1 << e.bits) - 1;
  const float* bounds = e.bounds + e.of[page] * n;
  for (int i = 0; i < PAGE * wide; i += W) {
    const F v = Isa::load(x + i);
    F above = Isa::set(float(n));
    for (int k = 0; k < n; k++) above = Isa::sub(above, Isa::at_least(Isa::set(bounds[k]), v));
    const Isa::I whole = Isa::to_int(above);
    alignas(64) int32_t code[W];
    __builtin_memcpy(code, &whole, sizeof code);
    for (int j = 0; j < W; j++) codes[i + j] = uint8_t(code[j]);
  }
  if (!e.levels) return;
  double square[16];
  for (int k = 0; k <= n; k++) square[k] = double(e.levels[k]) * double(e.levels[k]);
  for (int t = 0; t < PAGE; t++) {
    double sum = 0;
    for (int c = 0; c < e.width; c++) sum += square[codes[t * wide + c]];
    e.norms[page * PAGE + t] = float(__builtin_sqrt(sum));
  }
}

// A number within e4m3's range, to nearest, ties to even: 4 bits of exponent (bias 7) and 3 of mantissa.
static inline uint8_t to_fp8(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 24 & 0x80, rest = bits & 0x7fffffff;
  const float size = __builtin_fabsf(x);
  const uint32_t small = uint32_t(int32_t(__builtin_nearbyintf(size * 512.f)));  // subnormal: units of 2^-9
  const uint32_t normal = ((rest + 0x7ffff + (rest >> 20 & 1)) >> 20) - (120 << 3);
  return uint8_t(sign | (size < 0.015625f ? small : normal));
}

// Each token by its largest number, which becomes fp8's largest.
static void by_peak(const Encode& e, const float* x, int wide, int64_t page, uint8_t* codes) {
  constexpr float LARGEST = 448;
  for (int t = 0; t < PAGE; t++) {
    const float* row = x + t * wide;
    float peak = 0;
    for (int c = 0; c < e.width; c++) peak = __builtin_fabsf(row[c]) > peak ? __builtin_fabsf(row[c]) : peak;
    const uint16_t scale = Isa::to_half(clamp(peak / LARGEST, LEAST_SCALE, HALF_LIMIT));
    const float step = half1(scale);
    e.scale[(2 * page + t / TILE) * TILE + t % TILE] = scale;
    for (int c = 0; c < e.width; c++) codes[t * wide + c] = to_fp8(clamp(row[c] / step, -LARGEST, LARGEST));
  }
}

// ---- packing: see layout.py ---------------------------------------------------------------------------------

// The 64 codes of a vector as bytes: lane l, e -> o = 4 l + e.
using Vector = uint8_t[64];

static inline void combine(const Vector* a, int bits, uint8_t* out) {  // a: [quad][half]
  if (bits == 8) {
    __builtin_memcpy(out, a, 128);
  } else if (bits == 4) {
    for (int o = 0; o < 64; o++) out[o] = uint8_t(a[0][o] | a[1][o] << 4);
  } else {
    const int pairs = bits == 2 ? 1 : 2;
    for (int p = 0; p < pairs; p++)
      for (int o = 0; o < 64; o++)
        out[p * 64 + o] = uint8_t((a[4 * p][o] & 3) | (a[4 * p + 1][o] & 3) << 2 | (a[4 * p + 2][o] & 3) << 4 |
                                  (a[4 * p + 3][o] & 3) << 6);
    if (bits == 2) return;
    for (int o = 0; o < 64; o++) {
      int high = 0;
      for (int k = 0; k < 4; k++)
        for (int half = 0; half < 2; half++) high |= (a[2 * k + half][o] >> 2) << (HIGH[k] + 2 * half);
      out[128 + o] = uint8_t(high);
    }
  }
}

// A tile of keys from codes [32][wide].
static void pack_keys(const uint8_t* codes, int wide, int bits, uint8_t* out) {
  const int unit = quads_of_unit(bits), bytes = bytes_of_unit(bits);
  Vector v[8];
  for (int j = 0; j < wide / 4; j += unit, out += bytes) {
    for (int k = 0; k < unit; k++)
      for (int t = 0; t < TILE; t++)
        __builtin_memcpy(v[2 * k + t / 16] + t % 16 * 4, codes + t * wide + 4 * (j + k), 4);
    combine(v, bits, out);
  }
}

// A tile of values from codes [32][wide].
static void pack_values(const uint8_t* codes, int wide, int bits, uint8_t* out) {
  const int unit = quads_of_unit(bits), bytes = bytes_of_unit(bits);
  Vector v[8];
  for (int from = 0; from < wide; from += 32) {
    const bool narrow = from + 32 > wide;
    for (int j = 0; j < (narrow ? 4 : 8); j += unit, out += bytes) {
      for (int k = 0; k < unit; k++)
        for (int half = 0; half < 2; half++) {
          const int t = 4 * (narrow ? 2 * (j + k) + half : j + k), c = from + (narrow ? 0 : 16 * half);
          for (int e = 0; e < 4; e++)
            for (int lane = 0; lane < 16; lane++) v[2 * k + half][4 * lane + e] = codes[(t + e) * wide + c + lane];
        }
      combine(v, bits, out);
    }
  }
}

static void encode(const Encode& e, int64_t page) {
  const int wide = padded(e.width);
  alignas(64) float x[PAGE * MAX_WIDTH];
  alignas(64) uint8_t codes[PAGE * MAX_WIDTH + 64];
  const int64_t size = e.dtype == F32 ? 4 : 2;
  widen(static_cast<const char*>(e.source) + page * PAGE * e.width * size, e.dtype, e.width, PAGE, e.width, x);
  switch (e.rule) {
    case Encode::RANGES: by_ranges(e, x, wide, page, codes); break;
    case Encode::SCALED: by_scales(e, x, wide, page, codes); break;
    case Encode::LEVELS: by_bounds(e, x, wide, page, codes); break;
    case Encode::FP8: by_peak(e, x, wide, page, codes); break;
  }
  for (int t = 0; t < PAGE; t++)
    for (int c = e.width; c < wide; c++) codes[t * wide + c] = 0;
  const int64_t tile = int64_t(TILE) * wide * e.bits / 8;
  for (int i = 0; i < 2; i++) {
    uint8_t* out = e.codes + (2 * page + i) * tile;
    if (e.keys)
      pack_keys(codes + i * TILE * wide, wide, e.bits, out);
    else
      pack_values(codes + i * TILE * wide, wide, e.bits, out);
  }
}
}  // namespace
