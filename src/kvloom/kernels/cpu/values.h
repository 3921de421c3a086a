// Logits as weights, and packed values by them.
//
// A block of eight tiles shares a running maximum, as in flash attention (arXiv:2205.14135); weights are quantized
// relative to their own tile's largest, since a global maximum (an attention sink) would round the rest to nothing.
#pragma once
#include "work.h"

namespace {
// NaN stays NaN.
static void cap(const Layer& layer, float* x, int n) {
  const F in = Isa::set(2.f / layer.softcap), out = Isa::set(layer.softcap * LOG2E), one = Isa::set(1.f);
  for (int i = 0; i < n; i += W) {  // tanh(y) = 1 - 2 / (e^2y + 1), of which x holds y * softcap * log2(e)
    F y = Isa::mul(Isa::load(x + i), in);
    y = Isa::sub(Isa::zero(), Isa::max(Isa::sub(Isa::zero(), y), Isa::set(-126.f)));
    const F t = Isa::sub(one, Isa::div(Isa::set(2.f), Isa::add(exp2v(y), one)));
    Isa::store(x + i, Isa::fma(Isa::load(x + i), Isa::zero(), Isa::mul(out, t)));
  }
}

// Logits `[R][BLOCK]` of n entries (the rest up to W is free) as weights; the running maximum moves.
static void soften(Work& w, int n) {
  for (int r = 0; r < w.R; r++) {
    float *x = w.logits + r * BLOCK, *p = w.weights + r * BLOCK;
    for (int i = n; i % W; i++) x[i] = NOTHING;
    F top = Isa::set(w.most[r]);
    for (int i = 0; i < n; i += W) top = Isa::max(top, Isa::load(x + i));
    const float most = Isa::most(top);
    w.decay[r] = w.most[r] == most ? 1 : w.sum[r] ? exp2s(w.most[r] - most) : 0;
    w.most[r] = most;
    F sum = Isa::zero();
    const F m = Isa::set(most > NOTHING / 2 ? most : 0.f);  // nothing seen yet: all weights are 0
    for (int i = 0; i < n; i += W) {
      const F y = Isa::sub(Isa::load(x + i), m), e = exp2v(y);
      // below 2^-126 is nothing, and so is what must not be seen
      const F kept = Isa::mul(e, Isa::at_least(y, Isa::set(-125.f)));
      // a logit that is not finite stays visible: 0 times it is NaN
      sum = Isa::add(sum, Isa::fma(Isa::load(x + i), Isa::zero(), kept));
      Isa::store(p + i, kept);
    }
    w.sum[r] = w.sum[r] * w.decay[r] + Isa::sum(sum);
  }
  for (int r = 0; r < w.R; r++)
    if (w.decay[r] != 1)
      for (int c = 0; c < w.E; c += W) {
        float* a = w.acc + int64_t(r) * w.E + c;
        Isa::store(a, Isa::mul(Isa::load(a), Isa::set(w.decay[r])));
      }
}

// ---- values of packed tiles --------------------------------------------------------------------------------

// A panel's dots: 32 lanes, or 16 whose halves are to be added.
static inline F dots_at(const int32_t* dot, int i, bool narrow) {
  const Isa::I d = Isa::loadi(dot + i);
  return Isa::to_float(narrow ? Isa::addi(d, Isa::loadi(dot + 16 + i)) : d);
}

// acc += s[0] * dots + s[1]
static inline void add_lanes(float* acc, const int32_t* dot, bool narrow, const float* s) {
  for (int i = 0; i < (narrow ? 16 : 32); i += W) {
    const F x = Isa::fma(dots_at(dot, i, narrow), Isa::set(s[0]), Isa::set(s[1]));
    Isa::store(acc + i, Isa::add(Isa::load(acc + i), x));
  }
}

// acc += (s[0] * dots + s[2]) * scale + s[1] * zero
static inline void add_scaled(float* acc, const int32_t* dot, bool narrow, const float* s,
                              const float* scale, const float* zero) {
  for (int i = 0; i < (narrow ? 16 : 32); i += W) {
    const F x = Isa::fma(dots_at(dot, i, narrow), Isa::set(s[0]), Isa::set(s[2]));
    const F y = Isa::fma(Isa::load(zero + i), Isa::set(s[1]), Isa::load(acc + i));
    Isa::store(acc + i, Isa::fma(x, Isa::load(scale + i), y));
  }
}

// Weighted codes of channels [from, to) by integer words of the weights, panel by panel.
template <class Add>
static void value_products(Work& w, const Packed& part, const uint8_t* codes, int from, int to,
                           const uint8_t* next, Add add) {
  const int panel = 32 * TILE * part.bits / 8, terms = terms_of(w.layer, false, part.bits);
  by_bits(part.bits, [&]<int B>() {
    by_rows(w.R, [&]<int H>(int r) {
      alignas(64) int32_t dot[H * 32];
      for (int c = from; c < to; c += 32) {
        const int64_t at = int64_t(c / 32) * panel;
        const bool narrow = c + 32 > w.E;
        const int32_t* words = w.value_words + r * VALUE_WORDS;
        if (narrow)
          dot4<B, H, true>(codes + at, TILE / 8, words, VALUE_WORDS, terms, dot, next + at);
        else
          dot4<B, H, false>(codes + at, TILE / 4, words, VALUE_WORDS, terms, dot, next + at);
        for (int h = 0; h < H; h++) add(r + h, c, dot + h * 32, narrow);
      }
    });
  });
}

// Values whose products are not of integers: levels, by weights in which scales are folded.
static void level_values(Work& w, const Packed& part, int64_t tile, const float* weights) {
  Affine affine(part, w.head, tile);
  value_levels(part, w.head, part.codes + tile * part.tile_bytes, w.tile);
  if (replaces(part, tile) && part.per_token) affine.load_tokens(0);  // then there is one group
  if (replaces(part, tile)) replace(part, affine, tile, false, w.tile, 1, w.E);
  const int each = part.per_token ? group_width(part) : w.E;
  float* rows = w.tile + TILE * w.wide;  // [R][TILE] would be too many: four at a time
  for (int from = 0, g = 0; from < w.E; from += each, g++) {
    const int n = least(each, w.E - from);
    if (part.per_token) affine.load_tokens(g);
    by_rows(w.R, [&]<int H>(int r) {
      float* acc = w.acc + int64_t(r) * w.E + from;
      for (int h = 0; h < H; h++) {
        const float* p = weights + (r + h) * BLOCK;
        if (part.per_token) {
          for (int t = 0; t < TILE; t += W)
            Isa::store(rows + h * TILE + t, Isa::mul(Isa::load(p + t), Isa::load(affine.scale + t)));
          const F zero = Isa::set(total(p, affine.zero, TILE));
          for (int c = 0; c < n; c += W)
            Isa::store(acc + h * w.E + c, Isa::add(Isa::load(acc + h * w.E + c), zero));
        }
      }
      if (part.per_token) {
        fma_rows<H>(w.tile + from, w.E, TILE, n, rows, TILE, acc, w.E, true);
        return;
      }
      float* sums = rows;  // [H][E]
      fma_rows<H>(w.tile, w.E, TILE, n, weights + r * BLOCK, BLOCK, sums, w.E, false);
      for (int h = 0; h < H; h++) {
        const F all = Isa::set(total(weights + (r + h) * BLOCK, nullptr, TILE));
        for (int c = 0; c < n; c += W) {
          const F x = Isa::fma(Isa::load(affine.zero + c), all, Isa::load(acc + h * w.E + c));
          Isa::store(acc + h * w.E + c, Isa::fma(Isa::load(sums + h * w.E + c), Isa::load(affine.scale + c), x));
        }
      }
    });
  }
}

static void values_by_channel(Work& w, const Packed& part, int64_t tile, const float* weights, const uint8_t* next) {
  const uint16_t *scales = row_of(part.scale, w.head, tile), *zeros = row_of(part.zero, w.head, tile);
  const int terms = terms_of(w.layer, false, part.bits);
  alignas(64) float scale[MAX_WIDTH], zero[MAX_WIDTH];
  channels(scales, part, scale);
  if (zeros) channels(zeros, part, zero);
  for (int c = 0; !zeros && c < w.E; c++) zero[c] = -part.middle * scale[c];
  for (int r = 0; r < w.R; r++) {
    float *s = w.value_sums + r * VALUE_SUMS, rest;
    words_of(weights + r * BLOCK, TILE, terms, w.value_words + r * VALUE_WORDS, &s[0], &rest);
    s[1] = total(weights + r * BLOCK, nullptr, TILE);
    s[2] = s[0] * middle_code(part) * rest;
  }
  value_products(w, part, part.codes + tile * part.tile_bytes, 0, w.E, next,
                 [&](int r, int c, const int32_t* dot, bool narrow) {
                   add_scaled(w.acc + int64_t(r) * w.E + c, dot, narrow, w.value_sums + r * VALUE_SUMS, scale + c, zero + c);
                 });
}

static void values_by_token(Work& w, const Packed& part, int64_t tile, const float* weights, const uint8_t* next) {
  const uint16_t *scales = row_of(part.scale, w.head, tile), *zeros = row_of(part.zero, w.head, tile);
  const int terms = terms_of(w.layer, false, part.bits), each = group_width(part);
  alignas(64) float scale[TILE], zero[TILE], weighted[TILE];
  for (int from = 0, g = 0; from < w.E; from += each, g++) {
    tokens(scales, g, scale);
    if (zeros) tokens(zeros, g, zero);
    for (int r = 0; r < w.R; r++) {
      const float* p = weights + r * BLOCK;
      float *s = w.value_sums + r * VALUE_SUMS, rest;
      for (int t = 0; t < TILE; t += W) Isa::store(weighted + t, Isa::mul(Isa::load(p + t), Isa::load(scale + t)));
      words_of(weighted, TILE, terms, w.value_words + r * VALUE_WORDS, &s[0], &rest);
      s[1] = zeros ? total(p, zero, TILE) : -part.middle * total(weighted, nullptr, TILE);
      s[1] += s[0] * middle_code(part) * rest;
    }
    value_products(w, part, part.codes + tile * part.tile_bytes, from, least(from + each, w.E), next,
                   [&](int r, int c, const int32_t* dot, bool narrow) {
                     add_lanes(w.acc + int64_t(r) * w.E + c, dot, narrow, w.value_sums + r * VALUE_SUMS);
                   });
  }
}

static void value_tile(Work& w, const Packed& part, int64_t tile, const float* weights, const uint8_t* next) {
  if (part.per_token)
    values_by_token(w, part, tile, weights, next);
  else
    values_by_channel(w, part, tile, weights, next);
}
}  // namespace
