// Keys and values as the model made them: pages that are not packed, tail, sinks, centroids.
#pragma once
#ifdef __SSE__
#include <xmmintrin.h>
#endif

#include "work.h"

namespace {
static inline int64_t size_of(Dtype dtype) { return dtype == F32 ? 4 : 2; }

// Entries to be read: elements of the first one, and of the first one of those that follow.
struct Rows {
  int64_t at, next;
};

// `f(rows, ld, next rows)` with n entries (at most a tile) where they lie, or as fp32 rows if their width is odd.
template <class Fn>
static inline void with_rows(Work& w, const Dense& dense, Rows rows, int n, Fn f) {
  if (dense.width % 16) {
    const char* p = static_cast<const char*>(dense.data) + rows.at * size_of(dense.dtype);
    widen(p, dense.dtype, dense.token, n, dense.width, w.tile);
    return f.template operator()<Single>(w.tile, int64_t(padded(dense.width)), w.tile);
  }
  const auto as = [&]<class X>() {
    const typename X::T* p = static_cast<const typename X::T*>(dense.data);
    f.template operator()<X>(p + rows.at, dense.token, p + rows.next);
  };
  if (dense.dtype == F32)
    as.template operator()<Single>();
  else if (dense.dtype == F16)
    as.template operator()<Half>();
  else
    as.template operator()<Brain>();
}

static void dense_keys(Work& w, const Dense& keys, Rows rows, int n, float* out) {
  with_rows(w, keys, rows, n, [&]<class X>(const typename X::T* x, int64_t ld, const typename X::T* next) {
    by_rows(w.R, [&]<int H>(int r) {
      dot_rows<H, X>(x, ld, n, w.D, w.query + r * w.wide, w.wide, out + r * BLOCK, BLOCK, next);
    });
  });
}

static void dense_values(Work& w, const Dense& values, Rows rows, int n, const float* weights) {
  with_rows(w, values, rows, n, [&]<class X>(const typename X::T* x, int64_t ld, const typename X::T* next) {
    by_rows(w.R, [&]<int H>(int r) {
      fma_rows<H, X, true>(x, ld, n, w.E, weights + r * BLOCK, BLOCK, w.acc + int64_t(r) * w.E, w.E, true, next);
    });
  });
}

static inline int64_t element_of(const Dense& dense, int64_t tile) {
  return tile / 2 * dense.head + tile % 2 * TILE * dense.token;
}

static inline Rows rows_of(const Dense& dense, int64_t tile, int64_t next) {
  return {element_of(dense, tile), element_of(dense, next)};
}

// Four rows of four numbers, `from` apart, as four columns, `to` apart.
static inline void turn4(const float* x, int64_t from, float* out, int64_t to) {
#ifdef __SSE__
  __m128 a = _mm_loadu_ps(x), b = _mm_loadu_ps(x + from), c = _mm_loadu_ps(x + 2 * from), d = _mm_loadu_ps(x + 3 * from);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(out, a), _mm_storeu_ps(out + to, b), _mm_storeu_ps(out + 2 * to, c), _mm_storeu_ps(out + 3 * to, d);
#else
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 4; j++) out[j * to + i] = x[i * from + j];
#endif
}

// A dense tile of keys as x[c][t].
static void across(Work& w, const Dense& keys, int64_t tile) {
  const char* p = static_cast<const char*>(keys.data) + element_of(keys, tile) * size_of(keys.dtype);
  const float* rows = reinterpret_cast<const float*>(p);
  int64_t ld = keys.token;
  if (keys.dtype != F32 || keys.width != w.D) {
    float* wide = w.tile + TILE * w.wide;
    widen(p, keys.dtype, keys.token, TILE, keys.width, wide);
    rows = wide, ld = w.D;
  }
  for (int t = 0; t < TILE; t += 4)
    for (int c = 0; c < w.D; c += 4) turn4(rows + t * ld + c, ld, w.tile + c * TILE + t, TILE);
}
}  // namespace
