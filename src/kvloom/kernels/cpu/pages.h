// Attention over a range of pages, and of exact entries.
#pragma once
#include "keys.h"
#include "values.h"

namespace {
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
      dense_keys(w, at.slab->dense_keys, rows_of(at.slab->dense_keys, at.tile, at.next), TILE, out);
    } else {
      const Packed& keys = at.slab->keys;
      key_tile(w, keys, at.tile, folded, out, keys.codes + at.next * keys.tile_bytes);
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
    const int64_t tile = places[i].tile, next = places[i].next;
    if (slab.dense_values.data) {
      dense_values(w, slab.dense_values, rows_of(slab.dense_values, tile, next), TILE, weights);
    } else if (!integers(w.layer, slab.values) || replaces(slab.values, tile)) {
      level_values(w, slab.values, tile, weights);
    } else {
      value_tile(w, slab.values, tile, weights, slab.values.codes + next * slab.values.tile_bytes);
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
      const int64_t stored = slab.first[cell] * 2 + i;
      places[n++] = {&slab, stored, i + 1 < end ? stored + 1 : stored, i * TILE, raw + i * TILE};
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
  const auto at = [&](const Dense& d, int64_t t) {
    const int64_t first = task.row * d.row + task.head * d.head;
    return Rows{first + t * d.token, first + (t + TILE < task.to ? t + TILE : t) * d.token};
  };
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
      if (w.call.raw && run.raw >= 0)
        __builtin_memcpy(w.call.raw + (cell * w.R + r) * w.call.raw_stride + run.raw + from, x, size_t(n) * 4);
    }
    soften(w, n);
    for (int t = 0; t < n; t += TILE) {
      const int some = least(TILE, n - t);
      dense_values(w, run.values, at(run.values, from + t), some, w.weights + t);
    }
  }
}
}  // namespace
