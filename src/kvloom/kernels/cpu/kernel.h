// Attention of one (row, KV head) over a range of its entries. The same source serves every
// instruction set: an Isa gives vectors, and dot4 the products of packed codes.
//
// Logits are in log2 units. A block of eight tiles shares a running maximum, as in flash attention
// (arXiv:2205.14135); weights are quantized relative to their own tile's largest, since a global
// maximum (an attention sink) would round the rest to nothing.
#pragma once
#include "encode.h"

namespace {
constexpr float LOG2E = 1.44269504088896f;
constexpr float TOP = 16256;  // 127 * 128: the largest number of two terms
constexpr float TOP1 = 127;

static inline F exp2v(F x) {
  x = Isa::max(x, Isa::set(-126.f));
  const F whole = Isa::round(x), f = Isa::sub(x, whole);
  F p = Isa::set(1.525273380405984e-5f);  // ln(2)^k / k!: 5e-9 at most on [-1/2, 1/2]
  p = Isa::fma(p, f, Isa::set(1.540353039338161e-4f));
  p = Isa::fma(p, f, Isa::set(1.333355814642844e-3f));
  p = Isa::fma(p, f, Isa::set(9.618129107628477e-3f));
  p = Isa::fma(p, f, Isa::set(5.550410866482158e-2f));
  p = Isa::fma(p, f, Isa::set(2.402265069591007e-1f));
  p = Isa::fma(p, f, Isa::set(6.931471805599453e-1f));
  p = Isa::fma(p, f, Isa::set(1.f));
  const Isa::I power = Isa::sll32(Isa::addi(Isa::to_int(whole), Isa::seti(127)), 23);
  return Isa::mul(p, Isa::as_float(power));
}

static inline float exp2s(float x) {
  alignas(64) float out[W];
  Isa::store(out, exp2v(Isa::set(x)));
  return out[0];
}

static float largest(const float* x, int n) {
  F top = Isa::zero();
  for (int i = 0; i < n; i += W) top = Isa::max(top, Isa::abs(Isa::load(x + i)));
  return Isa::most(top);
}

static float total(const float* x, const float* y, int n) {
  F sum = Isa::zero();
  for (int i = 0; i < n; i += W) sum = Isa::fma(Isa::load(x + i), y ? Isa::load(y + i) : Isa::set(1.f), sum);
  return Isa::sum(sum);
}

constexpr int VALUE_WORDS = TILE / 2, VALUE_SUMS = 4;
constexpr int KEY_SUMS = 3 * (MAX_WIDTH / TILE);  // three for each group of channels

// Memory of a task. R rows each: `query [D]`, `folded [widest]`, words, sums, `logits` and
// `weights [BLOCK]`, `acc [E]`, and some numbers.
struct Work {
  const Layer& layer;
  const Call& call;
  int R, D, E, head;
  float *query, *folded, *logits, *weights, *acc, *tile, *most, *sum, *decay, *dots;
  float *key_sums, *value_sums;        // see fold_keys, fold_tokens, value_tile
  int32_t *key_words, *value_words;
  int64_t wide;

  Work(const Layer& layer, const Call& call, const Task& task, float* room)
      : layer(layer), call(call), R(call.rows), D(padded(layer.key_dim)), E(padded(layer.value_dim)),
        head(task.head), wide(D > E ? D : E) {
    const auto take = [&](int64_t n) { float* p = room; room += n; return p; };
    query = take(R * wide), folded = take(R * wide);
    key_words = reinterpret_cast<int32_t*>(take(R * wide));
    value_words = reinterpret_cast<int32_t*>(take(R * VALUE_WORDS));
    logits = take(R * BLOCK), weights = take(R * BLOCK), acc = take(int64_t(R) * E);
    most = take(R), sum = take(R), decay = take(R), dots = take(R * TILE);
    key_sums = take(R * KEY_SUMS), value_sums = take(R * VALUE_SUMS);
    tile = take(2 * TILE * wide);
    for (int r = 0; r < R; r++) most[r] = NOTHING, sum[r] = 0;
    for (int64_t i = 0; i < int64_t(R) * E; i++) acc[i] = 0;
  }
};

// Queries of the task in log2 units, padded, in the basis of the pages if it is for them.
static void load_queries(Work& w, const Task& task) {
  const Layer& layer = w.layer;
  const int dim = layer.key_dim;
  const float* from = w.call.query + (int64_t(task.row) * layer.heads + task.head) * w.R * dim;
  const bool turned = task.run < 0 && layer.turn.key;
  float* to = turned ? w.folded : w.query;
  for (int r = 0; r < w.R; r++) {
    float* q = to + r * w.wide;
    for (int c = 0; c < dim; c++) q[c] = from[int64_t(r) * dim + c] * layer.scale * LOG2E;
    for (int c = dim; c < w.D; c++) q[c] = 0;
    if (turned)
      for (int c = 0; c < dim; c++) q[c] *= layer.turn.key_signs[int64_t(task.head) * dim + c];
  }
  if (!turned) return;
  for (int r = 0; r < w.R; r++)
    for (int c = 0; c < w.D; c++) w.query[r * w.wide + c] = 0;
  times_matrix(w.folded, w.R, w.wide, layer.turn.key, dim, w.query);
}

// ---- keys of packed tiles ------------------------------------------------------------------------------

// What the query words of a tile were made of: tiles that share scales share them.
struct Folded {
  const uint16_t *scale = nullptr, *zero = nullptr;
  int64_t base = 0;  // or the position to which they were turned
  bool made = false;
};

static inline int terms_of(const Layer& layer, bool keys, int bits) {
  return layer.mode == 1 || (!keys && bits <= 3 && Isa::ONE_TERM_PAYS) ? 1 : 2;
}

// n numbers as integer words; `step`: what one is worth; `rest`: the sum of
// what rounding left out, in steps.
static inline void words_of(const float* x, int n, int terms, int32_t* words, float* step, float* rest) {
  const float top = largest(x, n), limit = terms == 2 ? TOP : TOP1;
  const bool some = top > 1e-30f;  // of less, the reciprocal would be infinite, and nobody misses it
  *step = some ? top / limit : 0;
  *rest = Isa::words(x, n, some ? limit / top : 0.f, terms, words);
}

// As if each code that rounding weighed wrongly were in the middle: most of the error is gone.
static inline float middle_code(const Packed& part) { return 0.5f * float((1 << part.bits) - 1); }

static inline bool integers(const Layer& layer, const Packed& part) {
  return part.kind == UNIFORM && layer.mode != 2;
}

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

// ---- dense keys and values ------------------------------------------------------------------------------------

static inline int64_t size_of(Dtype dtype) { return dtype == F32 ? 4 : 2; }

// `f(rows, ld)` with n entries (at most a tile) where they lie, or as fp32 rows if their width is odd.
template <class Fn>
static inline void with_rows(Work& w, const Dense& dense, int64_t element, int n, Fn f) {
  const char* p = static_cast<const char*>(dense.data) + element * size_of(dense.dtype);
  if (dense.width % 16) {
    widen(p, dense.dtype, dense.token, n, dense.width, w.tile);
    return f.template operator()<Single>(w.tile, int64_t(padded(dense.width)));
  }
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(p);
  if (dense.dtype == F32)
    f.template operator()<Single>(reinterpret_cast<const float*>(p), dense.token);
  else if (dense.dtype == F16)
    f.template operator()<Half>(halves, dense.token);
  else
    f.template operator()<Brain>(halves, dense.token);
}

static void dense_keys(Work& w, const Dense& keys, int64_t element, int n, float* out) {
  with_rows(w, keys, element, n, [&]<class X>(const typename X::T* x, int64_t ld) {
    by_rows(w.R, [&]<int H>(int r) {
      dot_rows<H, X>(x, ld, n, w.D, w.query + r * w.wide, w.wide, out + r * BLOCK, BLOCK);
    });
  });
}

static void dense_values(Work& w, const Dense& values, int64_t element, int n, const float* weights) {
  with_rows(w, values, element, n, [&]<class X>(const typename X::T* x, int64_t ld) {
    by_rows(w.R, [&]<int H>(int r) {
      fma_rows<H, X>(x, ld, n, w.E, weights + r * BLOCK, BLOCK, w.acc + int64_t(r) * w.E, w.E, true);
    });
  });
}

static inline int64_t element_of(const Dense& dense, int64_t tile) {
  return tile / 2 * dense.head + tile % 2 * TILE * dense.token;
}

// A dense tile of keys as x[c][t].
static void across(Work& w, const Dense& keys, int64_t tile) {
  const char* p = static_cast<const char*>(keys.data) + element_of(keys, tile) * size_of(keys.dtype);
  float* rows = w.tile + TILE * w.wide;
  widen(p, keys.dtype, keys.token, TILE, keys.width, rows);
  for (int t = 0; t < TILE; t++)
    for (int c = 0; c < w.D; c++) w.tile[c * TILE + t] = rows[t * w.D + c];
}

// ---- keys that must be spelled out: outliers, rotation ------------------------------------------------

// Where pair i of the rotated channels lies.
static inline void pair_of(const Rotation& rope, int i, int* a, int* b) {
  *a = rope.interleaved ? 2 * i : i;
  *b = rope.interleaved ? 2 * i + 1 : i + rope.pairs;
}

// cos and sin of a position, [2][pairs], times the gain.
static void angles_at(const Rotation& rope, int64_t position, float* out) {
  const int n = rope.pairs;
  if (position < 0 || position / PAGE >= rope.reach) position = 0;  // of a page that nobody reads
  const float *cn = rope.step + position % PAGE * 2 * n, *cf = rope.far + position / PAGE * 2 * n;
  for (int i = 0; i < n; i++) {
    out[i] = (cn[i] * cf[i] - cn[n + i] * cf[n + i]) * rope.gain;
    out[n + i] = (cn[n + i] * cf[i] + cn[i] * cf[n + i]) * rope.gain;
  }
}

// Query rows turned back by `base` positions: a key's own rotation is then that of its offset.
static void turn_queries(Work& w, int64_t base) {
  const Rotation& rope = w.layer.rotation;
  alignas(64) float angles[2 * MAX_WIDTH];
  angles_at(rope, base, angles);
  const float *cos = angles, *sin = angles + rope.pairs;
  for (int r = 0; r < w.R; r++) {
    const float* __restrict q = w.query + r * w.wide;
    float* __restrict x = w.folded + r * w.wide;
    if (rope.interleaved) {
      for (int i = 0; i < rope.pairs; i++) {
        x[2 * i] = q[2 * i] * cos[i] + q[2 * i + 1] * sin[i];
        x[2 * i + 1] = q[2 * i + 1] * cos[i] - q[2 * i] * sin[i];
      }
    } else {
      const float* __restrict p = q + rope.pairs;
      float* __restrict y = x + rope.pairs;
      for (int i = 0; i < rope.pairs; i++) {
        x[i] = q[i] * cos[i] + p[i] * sin[i];
        y[i] = p[i] * cos[i] - q[i] * sin[i];
      }
    }
    for (int c = 2 * rope.pairs; c < w.D; c++) x[c] = q[c];
  }
}

// Keys x[c][t], times scale[c] plus zero[c], rotated by `offset + t` positions.
static void rotate_near(const Rotation& rope, int offset, const float* scale, const float* zero, float* x) {
  for (int i = 0; i < rope.pairs; i++) {
    const float *cos = rope.near + i * PAGE + offset, *sin = cos + rope.pairs * PAGE;
    int ca, cb;
    pair_of(rope, i, &ca, &cb);
    const F sa = Isa::set(scale[ca]), sb = Isa::set(scale[cb]), za = Isa::set(zero[ca]), zb = Isa::set(zero[cb]);
    for (int t = 0; t < TILE; t += W) {
      float *pa = x + ca * TILE + t, *pb = x + cb * TILE + t;
      const F a = Isa::fma(Isa::load(pa), sa, za), b = Isa::fma(Isa::load(pb), sb, zb);
      const F c = Isa::load(cos + t), s = Isa::load(sin + t);
      Isa::store(pa, Isa::sub(Isa::mul(a, c), Isa::mul(b, s)));
      Isa::store(pb, Isa::fma(b, c, Isa::mul(a, s)));
    }
  }
}

// Keys x[c][t] rotated by positions[t] (of which some may be unused).
static void rotate_far(const Rotation& rope, const int32_t* positions, float* x) {
  int32_t lo[TILE], hi[TILE];
  for (int t = 0; t < TILE; t++) {
    const int32_t p = positions[t] < 0 || positions[t] / PAGE >= rope.reach ? 0 : positions[t];
    lo[t] = p % PAGE, hi[t] = p / PAGE * 2 * rope.pairs;
  }
  for (int i = 0; i < rope.pairs; i++) {
    const float *cn = rope.near + i * PAGE, *sn = cn + rope.pairs * PAGE;
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
  int64_t tile, slot;  // slot: of its first entry in the slab
  int64_t raw;         // likewise among all slabs
};

struct Ones {
  float x[MAX_WIDTH];
  constexpr Ones() : x() { for (float& v : x) v = 1; }
};
constexpr Ones ONES;
constexpr float ZEROS[MAX_WIDTH] = {};

// Keys of a tile x[c][t], rotated relative to `base` if a page's first position tells the others.
static void rotated_keys(Work& w, const Place& at, int64_t cell) {
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
  if (slab.base)
    rotate_near(rope, int(at.slot % PAGE), scale, zero, w.tile);
  else
    rotate_far(rope, slab.positions + cell * slab.position_stride + at.slot, w.tile);
}

static void exact_key_tile(Work& w, const Place& at, int64_t cell, Folded& folded, float* out) {
  const Slab& slab = *at.slab;
  const float* rows = w.query;
  if (w.layer.rotation.pairs) {
    rows = w.folded;
    const int64_t base = slab.base ? slab.base[cell * slab.base_stride + at.slot / PAGE] : 0;
    if (!folded.made || folded.base != base) turn_queries(w, base);
    folded.made = true, folded.base = base;
    rotated_keys(w, at, cell);
  } else {
    key_numbers(slab.keys, w.head, at.tile, w.tile);
  }
  by_rows(w.R, [&]<int H>(int r) {
    fma_rows<H>(w.tile, TILE, w.D, TILE, rows + r * w.wide, w.wide, out + r * BLOCK, BLOCK, false);
  });
}

static inline bool spelled_out(const Layer& layer, const Slab& slab, int64_t tile) {
  return layer.rotation.pairs || (!slab.dense_keys.data && replaces(slab.keys, tile));
}

// ---- weights ----------------------------------------------------------------------------------------------

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

// ---- pages -------------------------------------------------------------------------------------------------------

// What must not be seen, and what counts more than once.
static void bias_tile(Work& w, const Place& at, int64_t cell, float* out) {
  const Slab& slab = *at.slab;
  const int64_t skip = slab.skip[cell] - at.slot;
  const uint8_t* alive = slab.alive ? slab.alive + cell * slab.alive_stride + at.slot : nullptr;
  const float* mass = slab.mass ? slab.mass + cell * slab.mass_stride + at.slot : nullptr;
  if (skip <= 0 && !alive && !mass) return;
  for (int r = 0; r < w.R; r++)
    for (int t = 0; t < TILE; t++) {
      float& x = out[r * BLOCK + t];
      if (mass) x += mass[t] * LOG2E;
      if (t < skip || (alive && !alive[t]) || x < NOTHING) x = NOTHING;
    }
}

static void block_logits(Work& w, const Place* places, int n, int64_t cell, Folded& folded) {
  for (int i = 0; i < n; i++) {
    const Place& at = places[i];
    float* out = w.logits + i * TILE;
    if (spelled_out(w.layer, *at.slab, at.tile)) {
      exact_key_tile(w, at, cell, folded, out);
    } else if (at.slab->dense_keys.data) {
      dense_keys(w, at.slab->dense_keys, element_of(at.slab->dense_keys, at.tile), TILE, out);
    } else {
      const Packed& keys = at.slab->keys;
      const uint8_t* next = keys.codes + (i + 1 < n && places[i + 1].slab == at.slab ? places[i + 1].tile : at.tile) * keys.tile_bytes;
      key_tile(w, keys, at.tile, folded, out, next);
    }
    if (w.layer.softcap)
      for (int r = 0; r < w.R; r++) cap(w.layer, out + r * BLOCK, TILE);
    bias_tile(w, at, cell, out);
  }
}

static void block_values(Work& w, const Place* places, int n) {
  for (int i = 0; i < n; i++) {
    const Slab& slab = *places[i].slab;
    const float* weights = w.weights + i * TILE;
    const int64_t tile = places[i].tile;
    if (slab.dense_values.data) {
      dense_values(w, slab.dense_values, element_of(slab.dense_values, tile), TILE, weights);
    } else if (!integers(w.layer, slab.values) || replaces(slab.values, tile)) {
      level_values(w, slab.values, tile, weights);
    } else {
      const int64_t after = i + 1 < n && places[i + 1].slab == &slab ? places[i + 1].tile : tile;
      value_tile(w, slab.values, tile, weights, slab.values.codes + after * slab.values.tile_bytes);
    }
  }
}

static void keep_raw(Work& w, const Task& task, const Place* places, int n) {
  float* raw = w.call.raw + (int64_t(task.row) * w.layer.heads + task.head) * w.R * w.call.raw_stride;
  for (int r = 0; r < w.R; r++)
    for (int i = 0; i < n; i++)
      __builtin_memcpy(raw + r * w.call.raw_stride + places[i].raw, w.logits + r * BLOCK + i * TILE, TILE * 4);
}

static void over_pages(Work& w, const Task& task) {
  const Layer& layer = w.layer;
  const int64_t cell = int64_t(task.row) * layer.heads + task.head;
  Place places[BLOCK_TILES];
  Folded folded;
  const Slab* last = nullptr;
  int n = 0;
  int64_t tile = 0, raw = 0;  // counted over slabs
  const auto flush = [&] {
    if (!n) return;
    block_logits(w, places, n, cell, folded);
    if (w.call.raw) keep_raw(w, task, places, n);
    soften(w, n * TILE);
    block_values(w, places, n);
    n = 0;
  };
  for (int s = 0; s < layer.n_slabs; s++) {
    const Slab& slab = layer.slabs[s];
    const int64_t begin = slab.skip[cell] / TILE, end = slab.used[cell] * 2;
    int64_t i = begin + (task.from > tile ? task.from - tile : 0);
    for (; i < end && tile + (i - begin) < task.to; i++) {
      if (last != &slab) flush(), folded = {}, last = &slab;
      places[n++] = {&slab, slab.first[cell] * 2 + i, i * TILE, raw + i * TILE};
      if (n == BLOCK_TILES) flush();
    }
    if (end > begin) tile += end - begin;
    raw += slab.extent;
  }
  flush();
}

// ---- exact runs --------------------------------------------------------------------------------------------------

static void over_run(Work& w, const Task& task) {
  const Run& run = w.layer.runs[task.run];
  const int64_t cell = int64_t(task.row) * w.layer.heads + task.head;
  const auto at = [&](const Dense& d, int64_t t) { return task.row * d.row + task.head * d.head + t * d.token; };
  for (int64_t from = task.from; from < task.to; from += BLOCK) {
    const int n = int(task.to - from < BLOCK ? task.to - from : BLOCK);
    for (int t = 0; t < n; t += TILE) {
      const int some = least(TILE, n - t);
      dense_keys(w, run.keys, at(run.keys, from + t), some, w.logits + t);
    }
    for (int r = 0; r < w.R; r++) {
      float* x = w.logits + r * BLOCK;
      if (w.layer.softcap) cap(w.layer, x, (n + W - 1) / W * W);
      for (int t = 0; run.bias && t < n; t++) {
        x[t] += run.bias[cell * run.bias_stride + from + t] * LOG2E;
        if (x[t] < NOTHING) x[t] = NOTHING;
      }
    }
    soften(w, n);
    for (int t = 0; t < n; t += TILE) {
      const int some = least(TILE, n - t);
      dense_values(w, run.values, at(run.values, from + t), some, w.weights + t);
    }
  }
}

// ---- the table ------------------------------------------------------------------------------------------------------

static void attend(const Layer& layer, const Call& call, const Task& task, float* scratch, float* partial) {
  Work w(layer, call, task, scratch);
  load_queries(w, task);
  if (task.run < 0)
    over_pages(w, task);
  else
    over_run(w, task);
  const int64_t each = partial_floats(layer.value_dim);
  for (int r = 0; r < w.R; r++) {
    float* out = partial + r * each;
    out[0] = w.most[r], out[1] = w.sum[r];
    __builtin_memcpy(out + 16, w.acc + int64_t(r) * w.E, size_t(w.E) * 4);
  }
}

static void decode(const Layer& layer, const Slab& slab, int head, int64_t tile, float* keys, float* values) {
  alignas(64) float x[TILE * MAX_WIDTH];
  const int D = layer.key_dim, E = layer.value_dim;
  const auto rows = [&](const Dense& dense) {
    const char* p = static_cast<const char*>(dense.data) + element_of(dense, tile) * size_of(dense.dtype);
    widen(p, dense.dtype, dense.token, TILE, dense.width, x);
  };
  const bool by_token = slab.dense_keys.data;
  if (by_token)
    rows(slab.dense_keys);
  else
    key_numbers(slab.keys, head, tile, x);
  for (int t = 0; t < TILE; t++)
    for (int c = 0; c < D; c++) keys[t * D + c] = by_token ? x[t * padded(D) + c] : x[c * TILE + t];
  if (slab.dense_values.data)
    rows(slab.dense_values);
  else
    value_numbers(slab.values, head, tile, x);
  for (int t = 0; t < TILE; t++)
    for (int c = 0; c < E; c++) values[t * E + c] = x[t * padded(E) + c];
}

// Several partials as one: m and l of each row, and acc.
static void merge(const float* const* parts, int n, int R, int E, int64_t each, float* m, float* l, float* acc) {
  for (int r = 0; r < R; r++) {
    float top = NOTHING, sum = 0;
    for (int i = 0; i < n; i++) top = parts[i][r * each] > top ? parts[i][r * each] : top;
    float* out = acc + int64_t(r) * E;
    for (int c = 0; c < E; c++) out[c] = 0;
    for (int i = 0; i < n; i++) {
      const float* part = parts[i] + r * each;
      if (!part[1]) continue;
      const float share = exp2s(part[0] - top);
      sum += share * part[1];
      for (int c = 0; c < E; c += W)
        Isa::store(out + c, Isa::fma(Isa::load(part + 16 + c), Isa::set(share), Isa::load(out + c)));
    }
    m[r] = top, l[r] = sum;
  }
}

// acc of pages in the model's basis
static void turn_back(const Layer& layer, int head, int R, int E, float* acc, float* room) {
  const int dim = layer.value_dim;
  for (int64_t i = 0; i < int64_t(R) * E; i++) room[i] = acc[i];
  times_matrix(room, R, E, layer.turn.value_back, dim, acc);
  for (int r = 0; r < R; r++)
    for (int c = 0; c < dim; c++) acc[r * E + c] *= layer.turn.value_signs[int64_t(head) * dim + c];
}

static void finish(const Layer& layer, const Result& result, float* room) {
  const int R = result.rows, E = padded(layer.value_dim);
  const int64_t each = partial_floats(layer.value_dim);
  float *acc = room, *ml = acc + 2 * int64_t(R) * E, *spare = acc + int64_t(R) * E;
  const float* parts[1 + MAX_PARTS];
  int n = 0;
  float* pages = ml + 2 * R;  // the pages' own sum, as one more partial
  if (result.n_pages && layer.turn.value_back) {
    merge(result.pages, result.n_pages, R, E, each, ml, ml + R, acc);
    turn_back(layer, result.head, R, E, acc, spare);
    for (int r = 0; r < R; r++) {
      float* p = pages + r * each;
      p[0] = ml[r], p[1] = ml[R + r];
      __builtin_memcpy(p + 16, acc + int64_t(r) * E, size_t(E) * 4);
    }
    parts[n++] = pages;
  } else {
    for (int i = 0; i < result.n_pages; i++) parts[n++] = result.pages[i];
  }
  for (int i = 0; i < result.n_runs; i++) parts[n++] = result.runs[i];
  merge(parts, n, R, E, each, ml, ml + R, acc);
  for (int r = 0; r < R; r++) {
    float m = ml[r], l = ml[R + r], scale = 1;
    if (result.sinks) {  // takes part in the sum and carries no value
      const float sink = result.sinks[r / result.queries] * LOG2E, top = sink > m ? sink : m;
      scale = l ? exp2s(m - top) : 0;
      l = l * scale + exp2s(sink - top), m = top;
    }
    const F share = Isa::set(l ? scale / l : 0.f);
    float *out = result.out + int64_t(r) * layer.value_dim, *from = acc + int64_t(r) * E;
    for (int c = 0; c < E; c += W) Isa::store(from + c, Isa::mul(Isa::load(from + c), share));
    for (int c = 0; c < layer.value_dim; c++) out[c] = from[c];
    if (result.lse) result.lse[r] = l ? (m + __builtin_log2f(l)) / LOG2E : -__builtin_inff();
  }
}

static void mass(const float* raw, int64_t stride, int rows, const float* lse, int64_t n, float* out) {
  int64_t i = 0;
  const auto slots = [&](int64_t at, int some) {
    alignas(64) float x[W];
    F sum = Isa::zero();
    for (int r = 0; r < rows; r++) {
      for (int k = 0; k < W; k++) x[k] = k < some ? raw[r * stride + at + k] : NOTHING;
      const F y = Isa::sub(some == W ? Isa::load(raw + r * stride + at) : Isa::load(x), Isa::set(lse[r]));
      sum = Isa::add(sum, Isa::mul(exp2v(y), Isa::at_least(y, Isa::set(-125.f))));
    }
    Isa::store(x, sum);
    for (int k = 0; k < some; k++) out[at + k] = x[k];
  };
  for (; i + W <= n; i += W) slots(i, W);
  if (i < n) slots(i, int(n - i));
}
}  // namespace
