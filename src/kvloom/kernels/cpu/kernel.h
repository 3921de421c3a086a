// What an instruction set offers: attention of one (row, KV head) over a range of its entries, and what is done
// before and after. The same source serves every instruction set: an Isa gives vectors, and dot4 the products
// of packed codes.
#pragma once
#include "encode.h"
#include "pages.h"

namespace {
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
