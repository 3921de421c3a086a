// Tiles of packed pages: their parameters, their products with rows of queries, their numbers.
#pragma once
#include "types.h"

namespace {
using namespace kvloom;
using F = Isa::F;
constexpr int W = Isa::W;

static inline int padded(int width) { return (width + 15) / 16 * 16; }
static inline int least(int a, int b) { return a < b ? a : b; }

static inline const uint16_t* row_of(const Param& p, int head, int64_t tile) {
  if (!p.data) return nullptr;
  const int64_t row = p.of_head ? head : p.index ? p.index[tile] : tile;
  return p.data + p.stride * (row < 0 ? 0 : row);  // a tile that was never filled has no set
}

static inline float half1(uint16_t h) { return Isa::half1(h); }

// n fp16 numbers as fp32, the rest up to a multiple of 16 as `fill`.
static void halves(const uint16_t* p, int n, float* out, float fill = 0) {
  int i = 0;
  for (; i + W <= n; i += W) Isa::store(out + i, Isa::half(p + i));
  for (; i < n; i++) out[i] = half1(p[i]);
  for (; i < padded(n); i++) out[i] = fill;
}

// Channel parameters spread over `width` channels, `group` of them sharing one.
static void channels(const uint16_t* p, const Packed& part, float* out) {
  if (part.group <= 1) return halves(p, part.width, out);
  for (int c = 0; c < padded(part.width); c++)
    out[c] = c < part.width ? half1(p[c / part.group]) : 0;
}

// ---- products of fp32 numbers ---------------------------------------------------------------------

// How numbers lie in memory.
struct Single {
  using T = float;
  static inline __attribute__((always_inline)) F load(const T* p) { return Isa::load(p); }
};
struct Half {
  using T = uint16_t;
  static inline __attribute__((always_inline)) F load(const T* p) { return Isa::half(p); }
};
struct Brain {
  using T = uint16_t;
  static inline __attribute__((always_inline)) F load(const T* p) { return Isa::brain(p); }
};

// out[h][lane] (+)= sum_i w[h][i] * x[i][lane]; `next`, if FETCH: rows like x that are needed soon
template <class X, int H, int N, bool FETCH>
static inline void fma_lanes(const typename X::T* x, int64_t ld, int n, const float* w, int64_t ws,
                             float* out, int64_t os, bool add, const typename X::T* next) {
  F sum[H][N];
  for (int h = 0; h < H; h++)
    for (int v = 0; v < N; v++) sum[h][v] = add ? Isa::load(out + h * os + v * W) : Isa::zero();
  for (int i = 0; i < n; i++) {
    F row[N];
    for (int v = 0; v < N; v++) row[v] = X::load(x + i * ld + v * W);
    if constexpr (FETCH)
      for (int c = 0; c < N * W; c += 64 / int(sizeof(*x))) Isa::fetch(next + i * ld + c);
#pragma GCC unroll 4
    for (int h = 0; h < H; h++) {
      const F q = Isa::set(w[h * ws + i]);
      for (int v = 0; v < N; v++) sum[h][v] = Isa::fma(q, row[v], sum[h][v]);
    }
  }
  for (int h = 0; h < H; h++)
    for (int v = 0; v < N; v++) Isa::store(out + h * os + v * W, sum[h][v]);
}

template <int H, class X = Single, bool FETCH = false>
static void fma_rows(const typename X::T* x, int64_t ld, int n, int lanes, const float* w, int64_t ws,
                     float* out, int64_t os, bool add, const typename X::T* next = nullptr) {
  int c = 0;
  for (; c + 2 * W <= lanes; c += 2 * W) fma_lanes<X, H, 2, FETCH>(x + c, ld, n, w, ws, out + c, os, add, next + (FETCH ? c : 0));
  for (; c + W <= lanes; c += W) fma_lanes<X, H, 1, FETCH>(x + c, ld, n, w, ws, out + c, os, add, next + (FETCH ? c : 0));
}

// Asks for the lines of N rows that begin at channel c; what lies behind the entries may be asked for, too.
template <int N, class T>
static inline __attribute__((always_inline)) void fetch_rows(const T* x, int64_t ld, int c) {
  if (c * sizeof(T) % 64) return;
  for (int i = 0; i < N; i++) Isa::fetch(x + i * ld + c);
}

// out[h][i] = sum_c w[h][c] * x[i][c], c < width, a multiple of W
template <class X, int H, int N>
static inline void dot_lanes(const typename X::T* x, int64_t ld, int width, const float* w, int64_t ws,
                             float* out, int64_t os, const typename X::T* next) {
  F sum[H][N];
  for (int h = 0; h < H; h++)
    for (int i = 0; i < N; i++) sum[h][i] = Isa::zero();
  for (int c = 0; c < width; c += W) {
    F row[N];
    for (int i = 0; i < N; i++) row[i] = X::load(x + i * ld + c);
    fetch_rows<N>(next, ld, c);
#pragma GCC unroll 4
    for (int h = 0; h < H; h++) {
      const F q = Isa::load(w + h * ws + c);
      for (int i = 0; i < N; i++) sum[h][i] = Isa::fma(q, row[i], sum[h][i]);
    }
  }
  for (int h = 0; h < H; h++)
    for (int i = 0; i < N; i++) out[h * os + i] = Isa::sum(sum[h][i]);
}

template <int H, class X>
static void dot_rows(const typename X::T* x, int64_t ld, int n, int width, const float* w, int64_t ws,
                     float* out, int64_t os, const typename X::T* next) {
  int i = 0;
  for (; i + 2 <= n; i += 2) dot_lanes<X, H, 2>(x + i * ld, ld, width, w, ws, out + i, os, next + i * ld);
  if (i < n) dot_lanes<X, H, 1>(x + i * ld, ld, width, w, ws, out + i, os, next + i * ld);
}

// `f.template operator()<H>(first row)` for all rows, four at a time where possible.
template <class Fn>
static inline void by_rows(int rows, Fn f) {
  int r = 0;
  if constexpr (Isa::ROWS == 4) {
    for (; r + 4 <= rows; r += 4) f.template operator()<4>(r);
    if (rows - r >= 2) f.template operator()<2>(r), r += 2;
  }
  for (; r < rows; r++) f.template operator()<1>(r);
}

// out = x times a matrix [dim][dim], R rows, `stride` apart.
static void times_matrix(const float* x, int R, int64_t stride, const float* matrix, int dim, float* out) {
  const int lanes = dim / W * W;
  by_rows(R, [&]<int H>(int r) {
    fma_rows<H>(matrix, dim, dim, lanes, x + r * stride, stride, out + r * stride, stride, false);
  });
  for (int r = 0; r < R; r++)
    for (int c = lanes; c < dim; c++) {
      float sum = 0;
      for (int i = 0; i < dim; i++) sum += x[r * stride + i] * matrix[int64_t(i) * dim + c];
      out[r * stride + c] = sum;
    }
}

// ---- codes as numbers -------------------------------------------------------------------------------

// What codes mean: themselves, entries of a table, or e4m3 numbers.
template <Kind KIND, int BITS>
struct Levels {
  Isa::Table table{};
  explicit Levels(const float* of_head) {
    if constexpr (KIND == LEVELS) {
      alignas(64) float room[16];
      for (int i = 0; i < 16; i++) room[i] = of_head[i % (1 << BITS)];
      table = Isa::table(room);
    }
  }
  // A vector of codes for each e of a quad.
  inline __attribute__((always_inline)) void four(const uint8_t* unit, int k, int half, F* out) const {
    if constexpr (KIND == LEVELS) return Isa::lookup4(bytes32<BITS>(unit, k, half), table, out);
    if constexpr (KIND == FP8) Isa::fp8_4(bytes32<BITS>(unit, k, half), out);
#pragma GCC unroll 4
    for (int e = 0; e < 4; e++)
      out[e] = KIND == FP8 ? Isa::mul(out[e], Isa::set(1.329227995784916e36f))  // 2^120
                           : Isa::to_float(codes32<BITS>(unit, k, half, e));
  }
};

// A panel as numbers x[4 quad + e][lane], rows `ld` apart; NARROW: see dot_pairs.h.
template <Kind KIND, int BITS, bool NARROW>
static void spread(const Levels<KIND, BITS> level, const uint8_t* __restrict p, int quads, float* __restrict x,
                   int64_t ld) {
  constexpr int UNIT = quads_of_unit(BITS), BYTES = bytes_of_unit(BITS);
  const uint8_t* next = p + quads / UNIT * BYTES;  // what lies behind is read soon
  for (int j = 0; j < quads; j += UNIT) {
    for (int b = 0; b < BYTES; b += 64) Isa::fetch(next + (j / UNIT) * BYTES + b);
    for (int s = 0; s < 16 / W; s++) {
      const uint8_t* unit = p + (j / UNIT) * BYTES + s * 4 * W;
#pragma GCC unroll 4
      for (int k = 0; k < UNIT; k++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
          const int quad = NARROW ? 2 * (j + k) + half : j + k, lane = NARROW ? 0 : half * 16;
          F number[4];
          level.four(unit, k, half, number);
#pragma GCC unroll 4
          for (int e = 0; e < 4; e++) Isa::store(x + (4 * quad + e) * ld + lane + s * W, number[e]);
        }
    }
  }
}

template <class Fn>
static inline void by_bits(int bits, Fn f) {
  if (bits == 8) f.template operator()<8>();
  else if (bits == 4) f.template operator()<4>();
  else if (bits == 3) f.template operator()<3>();
  else f.template operator()<2>();
}

// `f` with the levels of a head.
template <class Fn>
static inline void by_levels(const Packed& part, int head, Fn f) {
  const float* table = part.levels + head * part.levels_stride;
  if (part.kind == FP8)
    f(Levels<FP8, 8>(nullptr));
  else if (part.kind == UNIFORM)
    by_bits(part.bits, [&]<int B>() { f(Levels<UNIFORM, B>(nullptr)); });
  else if (part.bits == 4)
    f(Levels<LEVELS, 4>(table));
  else if (part.bits == 3)
    f(Levels<LEVELS, 3>(table));
  else
    f(Levels<LEVELS, 2>(table));
}

// Levels of a tile of keys, [padded width][32]; of values, [32][padded width].
static void key_levels(const Packed& part, int head, const uint8_t* codes, float* x) {
  by_levels(part, head, [&]<Kind K, int B>(const Levels<K, B>& level) {
    spread<K, B, false>(level, codes, padded(part.width) / 4, x, TILE);
  });
}

static void value_levels(const Packed& part, int head, const uint8_t* codes, float* x) {
  const int width = padded(part.width), whole = width / 32 * 32, panel = 32 * TILE * part.bits / 8;
  by_levels(part, head, [&]<Kind K, int B>(const Levels<K, B>& level) {
    for (int c = 0; c < whole; c += 32)
      spread<K, B, false>(level, codes + c / 32 * panel, TILE / 4, x + c, width);
    if (whole < width) spread<K, B, true>(level, codes + whole / 32 * panel, TILE / 8, x + whole, width);
  });
}

// ---- parameters of a tile ---------------------------------------------------------------------------------

// Parameters of a tile's tokens, [groups][32], as fp32 numbers of one group.
static inline void tokens(const uint16_t* p, int group, float* out) { halves(p + group * TILE, TILE, out); }

static inline int group_width(const Packed& part) {
  return part.group && part.group < part.width ? part.group : padded(part.width);
}

// scale and zero as rows of fp32 numbers: of all channels, or of the tokens, group by group.
struct Affine {
  alignas(64) float scale[MAX_WIDTH], zero[MAX_WIDTH];
  const Packed& part;
  const uint16_t *scales, *zeros;

  Affine(const Packed& part, int head, int64_t tile)
      : part(part), scales(row_of(part.scale, head, tile)), zeros(row_of(part.zero, head, tile)) {
    if (!part.per_token) load_channels();
  }
  void load_channels() {
    channels(scales, part, scale);
    if (zeros) channels(zeros, part, zero);
    for (int c = 0; !zeros && c < padded(part.width); c++) zero[c] = -part.middle * scale[c];
  }
  void load_tokens(int group) {
    tokens(scales, group, scale);
    if (zeros) tokens(zeros, group, zero);
    for (int t = 0; !zeros && t < TILE; t++) zero[t] = -part.middle * scale[t];
  }
};

// ---- what replaces numbers ----------------------------------------------------------------------------------

static inline int place(const void* places, bool wide, int64_t i) {
  return wide ? static_cast<const int16_t*>(places)[i] : static_cast<const uint8_t*>(places)[i];
}

static inline float number16(const uint16_t* p, Dtype dtype) {
  if (dtype == F16) return half1(*p);
  const uint32_t bits = uint32_t(*p) << 16;
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

// Whether some of a tile's numbers are stored beside its codes.
static inline bool replaces(const Packed& part, int64_t tile) {
  return part.sparse.n || (part.plane.numbers && part.plane.index[tile] >= 0);
}

// Put a tile's exact numbers among its levels, as levels: (number - zero) / scale.
//
// x[c * across + t * along]; `keys`: places count through [32][width], else through [width], by token.
static void replace(const Packed& part, Affine& affine, int64_t tile, bool keys, float* x, int64_t across,
                    int64_t along) {
  alignas(64) float inverse[MAX_WIDTH];
  const int shared = part.per_token ? TILE : padded(part.width);
  for (int i = 0; i < shared; i++)  // a scale is 0 where nothing was ever stored
    inverse[i] = affine.scale[i] ? 1 / affine.scale[i] : 0;
  const auto put = [&](int c, int t, float number) {
    const int i = part.per_token ? t : c;
    x[c * across + t * along] = (number - affine.zero[i]) * inverse[i];
  };
  const Sparse& sparse = part.sparse;
  const int n = keys ? sparse.n : sparse.n * TILE;
  const int64_t first = tile * n;
  const float per_row = 1 / float(keys ? part.width : sparse.n);
  for (int i = 0; i < n; i++) {
    const int at = place(sparse.places, sparse.wide, first + i);
    const float number = number16(sparse.numbers + first + i, sparse.dtype);
    const int t = int((float(keys ? at : i) + 0.5f) * per_row);  // a quotient, without a division
    put(keys ? at - t * part.width : at, t, number);
  }
  const Plane& plane = part.plane;
  if (!plane.numbers || plane.index[tile] < 0) return;
  const int64_t set = plane.index[tile];
  for (int i = 0; i < plane.n; i++) {
    const int c = place(plane.ids, plane.wide, set * plane.n + i);
    const float scale = plane.scale ? half1(plane.scale[set * plane.n + i]) : 0;
    for (int t = 0; t < TILE; t++) {
      const int64_t at = (set * TILE + t) * plane.n + i;
      put(c, t, plane.scale ? scale * static_cast<const int8_t*>(plane.numbers)[at]
                            : half1(static_cast<const uint16_t*>(plane.numbers)[at]));
    }
  }
}

// Rows of 16-bit or odd-width numbers as fp32 [n][padded width].
static void widen(const char* p, Dtype dtype, int64_t token, int n, int width, float* out) {
  const int wide = padded(width);
  for (int t = 0; t < n; t++, out += wide) {
    int c = 0;
    if (dtype == F32) {
      const float* x = reinterpret_cast<const float*>(p) + t * token;
      for (; c < width; c++) out[c] = x[c];
    } else {
      const uint16_t* x = reinterpret_cast<const uint16_t*>(p) + t * token;
      for (; c + W <= width; c += W) Isa::store(out + c, dtype == F16 ? Isa::half(x + c) : Isa::brain(x + c));
      for (; c < width; c++) out[c] = number16(x + c, dtype);
    }
    for (; c < wide; c++) out[c] = 0;
  }
}

// ---- numbers of a tile ----------------------------------------------------------------------------------------

// Levels x[c][t] as numbers, for channels [from, to).
static void scale_keys(Affine& affine, int from, int to, float* x) {
  const Packed& part = affine.part;
  const int each = group_width(part);
  for (int c = from; c < to; c++) {
    if (part.per_token && (c == from || c % each == 0)) affine.load_tokens(c / each);
    for (int t = 0; t < TILE; t += W) {
      const F s = part.per_token ? Isa::load(affine.scale + t) : Isa::set(affine.scale[c]);
      const F z = part.per_token ? Isa::load(affine.zero + t) : Isa::set(affine.zero[c]);
      Isa::store(x + c * TILE + t, Isa::fma(Isa::load(x + c * TILE + t), s, z));
    }
  }
}

// Keys of a tile in the basis of the pages, before rotation: x[c][t].
static void key_numbers(const Packed& part, int head, int64_t tile, float* x) {
  Affine affine(part, head, tile);
  key_levels(part, head, part.codes + tile * part.tile_bytes, x);
  if (replaces(part, tile) && part.per_token) affine.load_tokens(0);
  if (replaces(part, tile)) replace(part, affine, tile, true, x, TILE, 1);
  scale_keys(affine, 0, padded(part.width), x);
}

// Values of a tile in the basis of the pages: x[t][c].
static void value_numbers(const Packed& part, int head, int64_t tile, float* x) {
  const int width = padded(part.width), each = part.per_token ? group_width(part) : width;
  Affine affine(part, head, tile);
  value_levels(part, head, part.codes + tile * part.tile_bytes, x);
  if (replaces(part, tile) && part.per_token) affine.load_tokens(0);
  if (replaces(part, tile)) replace(part, affine, tile, false, x, 1, width);
  for (int g = 0; g * each < width; g++) {
    if (part.per_token) affine.load_tokens(g);
    for (int t = 0; t < TILE; t++)
      for (int c = g * each; c < least((g + 1) * each, width); c += W) {
        const F s = part.per_token ? Isa::set(affine.scale[t]) : Isa::load(affine.scale + c);
        const F z = part.per_token ? Isa::set(affine.zero[t]) : Isa::load(affine.zero + c);
        Isa::store(x + t * width + c, Isa::fma(Isa::load(x + t * width + c), s, z));
      }
  }
}
}  // namespace
