// The memory of a task, exponentials, and queries as its keys must see them. Logits are in log2 units.
#pragma once
#include "tiles.h"

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

// cos and sin of a position, [2][pairs], times a gain.
static void angles_at(const Rotation& rope, int64_t position, float gain, float* out) {
  const int n = rope.pairs;
  const float sign = position < 0 ? -gain : gain;
  position = position < 0 ? -position : position;
  if (position / PAGE >= rope.reach) position = 0;  // of a page that nobody reads
  const float *cn = rope.step + position % PAGE * 2 * n, *cf = rope.far + position / PAGE * 2 * n;
  for (int i = 0; i < n; i++) {
    out[i] = (cn[i] * cf[i] - cn[n + i] * cf[n + i]) * gain;
    out[n + i] = (cn[n + i] * cf[i] + cn[i] * cf[n + i]) * sign;
  }
}

// `query` turned back by `base` positions as `folded`: a key's own rotation is then that of its offset.
static void turn_queries(Work& w, int64_t base, float gain) {
  const Rotation& rope = w.layer.rotation;
  alignas(64) float angles[2 * MAX_WIDTH];
  angles_at(rope, base, gain, angles);
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

// Queries of the task in log2 units, padded, in the basis of the pages if it is for them, and for a run as
// its keys must see them.
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
  if (task.run >= 0 && layer.runs[task.run].back) {
    turn_queries(w, layer.runs[task.run].back[int64_t(task.row) * layer.heads + task.head], 1);
    float* seen = w.query;
    w.query = w.folded, w.folded = seen;
  }
  if (!turned) return;
  for (int r = 0; r < w.R; r++)
    for (int c = 0; c < w.D; c++) w.query[r * w.wide + c] = 0;
  times_matrix(w.folded, w.R, w.wide, layer.turn.key, dim, w.query);
}

// ---- numbers as integers -------------------------------------------------------------------------------

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
}  // namespace
