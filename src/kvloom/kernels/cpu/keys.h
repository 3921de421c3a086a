// Logits of packed tiles: by integer products, or of keys that are spelled out first.
#pragma once
#include "dense.h"

namespace {
// What the query words of a tile were made of: tiles that share scales share them.
struct Folded {
  const uint16_t *scale = nullptr, *zero = nullptr;
  int64_t base = 0;  // or the position to which they were turned
  bool made = false;
};

// Query rows for the keys of a tile with a scale per channel: q * scale, and what zeros add. A row's
// sums: what a step of its dots is worth, and what is added to all.
static void fold_keys(Work& w, const Packed& part, const uint16_t* scales, const uint16_t* zeros) {
  alignas(64) float scale[MAX_WIDTH], zero[MAX_WIDTH];
  channels(scales, part, scale);
  if (zeros) channels(zeros, part, zero);
  const int terms = terms_of(w.layer, true, part.bits);
  const float mid = middle_code(part);
  for (int r = 0; r < w.R; r++) {
    float *x = w.folded + r * w.wide, *q = w.query + r * w.wide, *s = w.key_sums + r * KEY_SUMS;
    for (int c = 0; c < w.D; c += W) Isa::store(x + c, Isa::mul(Isa::load(q + c), Isa::load(scale + c)));
    s[0] = 1;
    s[1] = zeros ? total(q, zero, w.D) : part.middle ? -part.middle * total(x, nullptr, w.D) : 0;
    if (!integers(w.layer, part)) continue;
    float rest;
    words_of(x, w.D, terms, w.key_words + r * w.wide, &s[0], &rest);
    s[1] += s[0] * mid * rest;
  }
}

// Query rows for keys with scales per token. A row's sums, for each group of channels: a step of its
// dots, what rounding left out, and the sum of the queries.
static void fold_tokens(Work& w, const Packed& part) {
  const int terms = terms_of(w.layer, true, part.bits), each = group_width(part);
  const float mid = middle_code(part);
  for (int r = 0; r < w.R; r++) {
    float *q = w.query + r * w.wide, *s = w.key_sums + r * KEY_SUMS;
    for (int from = 0; from < w.D; from += each, s += 3) {
      const int n = least(each, w.D - from);
      s[0] = 1, s[1] = 0, s[2] = total(q + from, nullptr, n);
      if (!integers(w.layer, part)) continue;
      float rest;
      words_of(q + from, n, terms, w.key_words + r * w.wide + from / 2, &s[0], &rest);
      s[1] = s[0] * mid * rest;
    }
  }
}

// dots[r][32] = codes or levels of channels [from, to) times the rows, in steps of the rows
static void key_products(Work& w, const Packed& part, const uint8_t* codes, int from, int to,
                         const uint8_t* next) {
  if (integers(w.layer, part)) {
    const int terms = terms_of(w.layer, true, part.bits);
    const int64_t at = int64_t(from) * TILE * part.bits / 8;
    by_bits(part.bits, [&]<int B>() {
      by_rows(w.R, [&]<int H>(int r) {
        alignas(64) int32_t dot[H * 32];
        dot4<B, H, false>(codes + at, (to - from) / 4, w.key_words + r * w.wide + from / 2, w.wide, terms, dot, next + at);
        for (int i = 0; i < H * 32; i += W) Isa::store(w.dots + r * TILE + i, Isa::to_float(Isa::loadi(dot + i)));
      });
    });
    return;
  }
  const float* rows = part.per_token ? w.query : w.folded;
  by_rows(w.R, [&]<int H>(int r) {
    fma_rows<H>(w.tile + from * TILE, TILE, to - from, TILE, rows + r * w.wide + from, w.wide, w.dots + r * TILE, TILE, false);
  });
}

static void keys_by_channel(Work& w, const Packed& part, int64_t tile, Folded& folded, float* out, const uint8_t* next) {
  const uint16_t *scales = row_of(part.scale, w.head, tile), *zeros = row_of(part.zero, w.head, tile);
  if (!folded.made || scales != folded.scale || zeros != folded.zero) {
    fold_keys(w, part, scales, zeros);
    folded = {scales, zeros, 0, true};
  }
  key_products(w, part, part.codes + tile * part.tile_bytes, 0, w.D, next);
  for (int r = 0; r < w.R; r++) {
    const F step = Isa::set(w.key_sums[r * KEY_SUMS]), zero = Isa::set(w.key_sums[r * KEY_SUMS + 1]);
    for (int t = 0; t < TILE; t += W)
      Isa::store(out + r * BLOCK + t, Isa::fma(Isa::load(w.dots + r * TILE + t), step, zero));
  }
}

static void keys_by_token(Work& w, const Packed& part, int64_t tile, Folded& folded, float* out, const uint8_t* next) {
  const uint16_t *scales = row_of(part.scale, w.head, tile), *zeros = row_of(part.zero, w.head, tile);
  if (!folded.made) fold_tokens(w, part), folded.made = true;
  const int each = group_width(part);
  alignas(64) float scale[TILE], zero[TILE];
  for (int from = 0, g = 0; from < w.D; from += each, g++) {
    key_products(w, part, part.codes + tile * part.tile_bytes, from, least(from + each, w.D), next);
    tokens(scales, g, scale);
    if (zeros) tokens(zeros, g, zero);
    for (int r = 0; r < w.R; r++) {
      const float* s = w.key_sums + r * KEY_SUMS + 3 * g;
      const F step = Isa::set(s[0]), rest = Isa::set(s[1]), all = Isa::set(s[2]);
      for (int t = 0; t < TILE; t += W) {
        const F sc = Isa::load(scale + t);
        const F z = zeros ? Isa::load(zero + t) : Isa::mul(sc, Isa::set(-part.middle));
        F x = Isa::mul(sc, Isa::fma(Isa::load(w.dots + r * TILE + t), step, rest));
        x = Isa::fma(z, all, x);
        if (from) x = Isa::add(x, Isa::load(out + r * BLOCK + t));
        Isa::store(out + r * BLOCK + t, x);
      }
    }
  }
}

// Logits of a tile whose numbers nothing replaces and nothing rotates.
static void key_tile(Work& w, const Packed& part, int64_t tile, Folded& folded, float* out, const uint8_t* next) {
  if (!integers(w.layer, part)) key_levels(part, w.head, part.codes + tile * part.tile_bytes, w.tile);
  if (part.per_token)
    keys_by_token(w, part, tile, folded, out, next);
  else
    keys_by_channel(w, part, tile, folded, out, next);
}

// ---- keys that must be spelled out: outliers, rotation ------------------------------------------------

// Where pair i of the rotated channels lies.
static inline void pair_of(const Rotation& rope, int i, int* a, int* b) {
  *a = rope.interleaved ? 2 * i : i;
  *b = rope.interleaved ? 2 * i + 1 : i + rope.pairs;
}

// cos of W tokens of a page from `offset` on (within 16 of them); sin is 16 further.
static inline const float* near_of(const Rotation& rope, int i, int offset) {
  return rope.near + (offset / 16 * rope.pairs + i) * 32 + offset % 16;
}

// Keys x[c][t], times scale[c] plus zero[c], rotated by `offset + t` positions.
static void rotate_near(const Rotation& rope, int offset, const float* scale, const float* zero, float* x) {
  for (int i = 0; i < rope.pairs; i++) {
    int ca, cb;
    pair_of(rope, i, &ca, &cb);
    const F sa = Isa::set(scale[ca]), sb = Isa::set(scale[cb]), za = Isa::set(zero[ca]), zb = Isa::set(zero[cb]);
    for (int t = 0; t < TILE; t += W) {
      float *pa = x + ca * TILE + t, *pb = x + cb * TILE + t;
      const F a = Isa::fma(Isa::load(pa), sa, za), b = Isa::fma(Isa::load(pb), sb, zb);
      const float* cos = near_of(rope, i, offset + t);
      const F c = Isa::load(cos), s = Isa::load(cos + 16);
      Isa::store(pa, Isa::sub(Isa::mul(a, c), Isa::mul(b, s)));
      Isa::store(pb, Isa::fma(b, c, Isa::mul(a, s)));
    }
  }
}

// The same, and their products with up to four rows of queries at once: out[h][t].
template <int H>
static void rotated_products(const Rotation& rope, int offset, const float* scale, const float* zero, const float* x,
                             const float* rows, int64_t stride, float* out) {
  for (int t = 0; t < TILE; t += 2 * W) {
    F sum[H][2];
    for (int h = 0; h < H; h++) sum[h][0] = sum[h][1] = Isa::zero();
    const float* near[2] = {near_of(rope, 0, offset + t), near_of(rope, 0, offset + t + W)};
    for (int i = 0; i < rope.pairs; i++) {
      int ca, cb;
      pair_of(rope, i, &ca, &cb);
      const F sa = Isa::set(scale[ca]), sb = Isa::set(scale[cb]), za = Isa::set(zero[ca]), zb = Isa::set(zero[cb]);
      F p[2], q[2];
      for (int v = 0; v < 2; v++) {
        const F a = Isa::fma(Isa::load(x + ca * TILE + t + v * W), sa, za);
        const F b = Isa::fma(Isa::load(x + cb * TILE + t + v * W), sb, zb);
        const F c = Isa::load(near[v] + 32 * i), s = Isa::load(near[v] + 32 * i + 16);
        p[v] = Isa::sub(Isa::mul(a, c), Isa::mul(b, s));
        q[v] = Isa::fma(b, c, Isa::mul(a, s));
      }
#pragma GCC unroll 4
      for (int h = 0; h < H; h++) {
        const F wa = Isa::set(rows[h * stride + ca]), wb = Isa::set(rows[h * stride + cb]);
        for (int v = 0; v < 2; v++) sum[h][v] = Isa::fma(wb, q[v], Isa::fma(wa, p[v], sum[h][v]));
      }
    }
    for (int h = 0; h < H; h++)
      for (int v = 0; v < 2; v++) Isa::store(out + h * BLOCK + t + v * W, sum[h][v]);
  }
}

// Products of rows of queries with the keys of a dense tile, each rotated as it lies: its pairs are (i, i + pairs),
// so that a table of a token's cos and sin serves a vector of pairs at once.
template <int H, class X>
static void rotated_dots(const Rotation& rope, int offset, const typename X::T* x, int64_t ld, int width,
                        const float* rows, int64_t stride, float* out, const typename X::T* next) {
  const int pairs = rope.pairs;
  for (int t = 0; t < TILE; t += 2) {
    F sum[H][2];
    for (int h = 0; h < H; h++) sum[h][0] = sum[h][1] = Isa::zero();
    const auto add = [&](int channel, const F* keys) {
#pragma GCC unroll 4
      for (int h = 0; h < H; h++) {
        const F query = Isa::load(rows + h * stride + channel);
        for (int v = 0; v < 2; v++) sum[h][v] = Isa::fma(query, keys[v], sum[h][v]);
      }
    };
    for (int c = 0; c < width; c += W) fetch_rows<2>(next + t * ld, ld, c);
    for (int i = 0; i < pairs; i += W) {
      F p[2], q[2];
      for (int v = 0; v < 2; v++) {
        const typename X::T* key = x + (t + v) * ld + i;
        const float* turn = rope.step + (offset + t + v) * 2 * pairs + i;
        const F a = X::load(key), b = X::load(key + pairs), c = Isa::load(turn), s = Isa::load(turn + pairs);
        p[v] = Isa::sub(Isa::mul(a, c), Isa::mul(b, s));
        q[v] = Isa::fma(b, c, Isa::mul(a, s));
      }
      add(i, p), add(i + pairs, q);
    }
    for (int c = 2 * pairs; c < width; c += W) {
      const F plain[2] = {X::load(x + t * ld + c), X::load(x + (t + 1) * ld + c)};
      add(c, plain);
    }
    for (int h = 0; h < H; h++)
      for (int v = 0; v < 2; v++) out[h * BLOCK + t + v] = Isa::sum(sum[h][v]);
  }
}

// Keys x[c][t] rotated by positions[t] (of which some may be unused).
static void rotate_far(const Rotation& rope, const int32_t* positions, float* x) {
  int32_t lo[TILE], hi[TILE];
  for (int t = 0; t < TILE; t++) {
    const int32_t p = positions[t] < 0 || positions[t] / PAGE >= rope.reach ? 0 : positions[t];
    lo[t] = p % PAGE * 2 * rope.pairs, hi[t] = p / PAGE * 2 * rope.pairs;
  }
  for (int i = 0; i < rope.pairs; i++) {
    const float *cn = rope.step + i, *sn = cn + rope.pairs;
    const float *cf = rope.far + i, *sf = cf + rope.pairs;
    int ca, cb;
    pair_of(rope, i, &ca, &cb);
    float *pa = x + ca * TILE, *pb = x + cb * TILE;
    for (int t = 0; t < TILE; t++) {
      const float c = cn[lo[t]] * cf[hi[t]] - sn[lo[t]] * sf[hi[t]];
      const float s = sn[lo[t]] * cf[hi[t]] + cn[lo[t]] * sf[hi[t]];
      const float a = pa[t], b = pb[t];
      pa[t] = a * c - b * s;
      pb[t] = b * c + a * s;
    }
  }
}

// A tile's place: its slab, its number in storage, and where it lies among its head's pages.
struct Place {
  const Slab* slab;
  int64_t tile, next;  // next: the tile after it, or itself
  int64_t slot;        // of its first entry in the slab
  int64_t raw;         // likewise among all slabs
};

// out (+)= rows of queries times keys x[c][t] of channels `from` and on; the first ones overwrite.
static void exact_products(Work& w, const float* rows, int from, float* out) {
  by_rows(w.R, [&]<int H>(int r) {
    fma_rows<H>(w.tile + from * TILE, TILE, w.D - from, TILE, rows + r * w.wide + from, w.wide, out + r * BLOCK, BLOCK, from > 0);
  });
}

struct Ones {
  float x[MAX_WIDTH];
  constexpr Ones() : x() { for (float& v : x) v = 1; }
};
constexpr Ones ONES;
constexpr float ZEROS[MAX_WIDTH] = {};

// The keys of a dense tile need not be transposed where vectors of pairs lie together and queries are few.
static inline bool rotates_in_place(const Work& w, const Slab& slab) {
  const Rotation& rope = w.layer.rotation;
  return slab.dense_keys.data && slab.base && !rope.interleaved && rope.pairs % W == 0 && w.R <= 8;
}

static void rotated_rows(Work& w, const Place& at, float* out) {
  const Dense& keys = at.slab->dense_keys;
  const auto turn = [&]<class X>(const typename X::T* x, int64_t ld, const typename X::T* next) {
    by_rows(w.R, [&]<int H>(int r) {
      rotated_dots<H, X>(w.layer.rotation, int(at.slot % PAGE), x, ld, w.D, w.folded + r * w.wide, w.wide, out + r * BLOCK, next);
    });
  };
  with_rows(w, keys, rows_of(keys, at.tile, at.next), TILE, turn);
}

// Logits of the keys of a tile, rotated relative to `base` if a page's first position tells the others.
static void rotated_tile(Work& w, const Place& at, int64_t cell, float* out) {
  const Slab& slab = *at.slab;
  const Rotation& rope = w.layer.rotation;
  const float *scale = ONES.x, *zero = ZEROS;
  const Packed& part = slab.keys;
  const bool later = !slab.dense_keys.data && !part.per_token && slab.base;  // scale while rotating
  Affine affine(part, w.head, at.tile);
  if (later) {
    key_levels(part, w.head, part.codes + at.tile * part.tile_bytes, w.tile);
    if (replaces(part, at.tile)) replace(part, affine, at.tile, true, w.tile, TILE, 1);
    scale_keys(affine, 2 * rope.pairs, w.D, w.tile);
    scale = affine.scale, zero = affine.zero;
  } else if (slab.dense_keys.data) {
    across(w, slab.dense_keys, at.tile);
  } else {
    key_numbers(part, w.head, at.tile, w.tile);
  }
  int from = 0;  // channels whose products are still to be made
  if (!slab.base) {
    rotate_far(rope, slab.positions + cell * slab.position_stride + at.slot, w.tile);
  } else if (w.R > 4) {
    rotate_near(rope, int(at.slot % PAGE), scale, zero, w.tile);
  } else {
    from = 2 * rope.pairs;
    by_rows(w.R, [&]<int H>(int r) {
      rotated_products<H>(rope, int(at.slot % PAGE), scale, zero, w.tile, w.folded + r * w.wide, w.wide, out + r * BLOCK);
    });
  }
  if (from < w.D) exact_products(w, w.folded, from, out);
}

static void exact_key_tile(Work& w, const Place& at, int64_t cell, Folded& folded, float* out) {
  const Slab& slab = *at.slab;
  if (w.layer.rotation.pages) {
    const int64_t base = slab.base ? slab.base[cell * slab.base_stride + at.slot / PAGE] : 0;
    if (!folded.made || folded.base != base) turn_queries(w, base, w.layer.rotation.gain);
    folded.made = true, folded.base = base;
    if (rotates_in_place(w, slab))
      rotated_rows(w, at, out);
    else
      rotated_tile(w, at, cell, out);
  } else {
    key_numbers(slab.keys, w.head, at.tile, w.tile);
    exact_products(w, w.query, 0, out);
  }
}

static inline bool spelled_out(const Layer& layer, const Slab& slab, int64_t tile) {
  return layer.rotation.pages || (!slab.dense_keys.data && replaces(slab.keys, tile));
}
}  // namespace
