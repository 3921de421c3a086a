// What the kernels are told: plain structs of checked addresses, no ownership, no STL.
#pragma once
#include <cstdint>

namespace kvloom {

constexpr int TILE = 32;         // slots that stand and fall together
constexpr int PAGE = 64;         // slots of a page: two tiles
constexpr int MAX_WIDTH = 512;   // of keys and values
constexpr int BLOCK_TILES = 8;   // tiles between two updates of the running maximum
constexpr int BLOCK = BLOCK_TILES * TILE;
constexpr float NOTHING = -1e30f;  // the logit of what must not be seen: finite, its weight is 0

enum Dtype : int32_t { F32 = 0, F16 = 1, BF16 = 2 };
enum Kind : int32_t { UNIFORM = 0, LEVELS = 1, FP8 = 2 };

// fp16 parameters of a tile. Row `head`, `index[tile]` or `tile` of `data`; null: there are none.
struct Param {
  const uint16_t* data = nullptr;
  const int32_t* index = nullptr;
  int64_t stride = 0;  // elements from row to row
  bool of_head = false;
};

// Exact numbers that replace decoded ones: `n` for each vector (a tile of keys, a token's values).
struct Sparse {
  const void* places = nullptr;   // uint8, or int16 if `wide`
  const uint16_t* numbers = nullptr;
  int32_t n = 0;
  bool wide = false;
  Dtype dtype = F16;
};

// Channels that a tile stores beside its codes: `n` for each set; a tile without has index -1.
struct Plane {
  const int32_t* index = nullptr;
  const void* ids = nullptr;      // uint8, or int16 if `wide`
  const void* numbers = nullptr;  // int8 `[32, n]`, or fp16 if there is no scale
  const uint16_t* scale = nullptr;
  int32_t n = 0;
  bool wide = false;
};

// Keys or values of packed pages: number = level(code) * scale + zero, then what replaces some.
struct Packed {
  const uint8_t* codes = nullptr;  // [tile][tile_bytes]
  int64_t tile_bytes = 0;
  Kind kind = UNIFORM;
  int32_t bits = 8, width = 0;
  bool per_token = true;
  int32_t group = 0;   // channels that share a parameter; per token: a multiple of 32, or all
  float middle = 0;    // UNIFORM without zero: the code that stands for 0
  Param scale, zero;
  const float* levels = nullptr;  // LEVELS: 2^bits numbers for each head
  int64_t levels_stride = 0;
  Sparse sparse;
  Plane plane;
};

// Keys or values as the model made them: element (b, h, t, c) at b*row + h*head + t*token + c.
struct Dense {
  const void* data = nullptr;
  Dtype dtype = F32;
  int32_t width = 0;
  int64_t row = 0, head = 0, token = 0;  // elements
};

// How keys and queries are rotated, where that is the kernels' work.
struct Rotation {
  // cos and sin of 0, 1, .. positions, as tiles read them: [PAGE / 16][pairs][2][16], so that what 16 tokens
  // need is consecutive (rows of a page's length would share a few sets of the first cache)
  const float* near = nullptr;
  const float* step = nullptr;   // [PAGE][2][pairs]: the same
  const float* far = nullptr;    // [reach][2][pairs]: of 0, PAGE, 2 PAGE, .. positions
  int64_t reach = 0;
  int32_t pairs = 0;
  bool interleaved = false;      // pairs (2i, 2i+1) instead of (i, i+pairs)
  bool pages = false;            // pages hold keys before rotation
  float gain = 1;                // on the rotated channels of these
};

// Pages of one slab.
struct Slab {
  Packed keys, values;
  Dense dense_keys, dense_values;   // if stored so: element (page, slot, c) at page*head + slot*token + c
  const int64_t *first = nullptr, *used = nullptr, *skip = nullptr;  // [B*H]
  const uint8_t* alive = nullptr;   // [B*H][stride], or null: all behind `skip`
  const float* mass = nullptr;      // [B*H][stride], or null
  const int32_t* base = nullptr;    // [B*H][stride]: position of a page's first slot
  const int32_t* positions = nullptr;  // [B*H][stride], if `base` does not tell
  int64_t alive_stride = 0, mass_stride = 0, position_stride = 0, base_stride = 0;
  int64_t extent = 0;               // slots of its largest (row, head)
};

// Exact entries of all rows and heads, left-aligned.
struct Run {
  Dense keys, values;
  const int64_t* count = nullptr;  // [B*H], or null: `n` everywhere
  int64_t n = 0;
  const float* bias = nullptr;     // [B*H][bias_stride], or null
  int64_t bias_stride = 0;
  const int64_t* back = nullptr;   // [B*H], or null: by how many positions its queries are turned back
  int64_t raw = -1;                // where its logits go in Call::raw, or -1: nowhere
};

// The basis in which pages hold keys and values.
struct Turn {
  const float* key = nullptr;          // orthonormal [D][D], rows are what unit vectors become
  const float* value_back = nullptr;   // the transpose of values' [E][E]
  const int8_t *key_signs = nullptr, *value_signs = nullptr;  // [H][D], [H][E]
};

struct Layer {
  int32_t rows = 0, heads = 0, group = 0;  // B, H, G
  int32_t key_dim = 0, value_dim = 0;
  float scale = 1, softcap = 0;
  int32_t mode = 0;  // of products with uniform codes: 0 15-bit integers, 1 7-bit, 2 fp32
  Turn turn;
  Rotation rotation;
  const Slab* slabs = nullptr;
  int32_t n_slabs = 0;
  const Run* runs = nullptr;
  int32_t n_runs = 0;
};

// Part of the work for one (row, head): tiles [from, to) of its pages, counted over all slabs, or
// entries [from, to) of a run.
struct Task {
  int32_t row = 0, head = 0;
  int32_t run = -1;  // -1: pages
  int64_t from = 0, to = 0;
};

struct Call {
  const float* query = nullptr;  // [B][H][R][D]
  int32_t rows = 0;              // R = group * queries
  float* raw = nullptr;          // logits in log2 units, [B][H][R][raw_stride], or null
  int64_t raw_stride = 0;
};

// What is left of a (row, head): partials of its tasks, and where the result goes.
struct Result {
  int32_t head = 0, rows = 0, queries = 0;
  const float* const* pages = nullptr;
  int32_t n_pages = 0;
  const float* const* runs = nullptr;
  int32_t n_runs = 0;
  const float* sinks = nullptr;  // [G], logits that a model learned
  float* out = nullptr;          // [R][E]
  float* lse = nullptr;          // [R], or null
};
constexpr int MAX_PARTS = 256;   // partials of one (row, head)

// Pages of keys or values [pages][64][width], to be coded and packed (see encode.h).
struct Encode {
  // ranges: scales of the numbers themselves; scaled: symmetric, by scales that are given for channels;
  // levels: numbers are normalised, and bounds say where one code ends and the next begins; fp8: e4m3
  enum Rule : int32_t { RANGES = 0, SCALED = 1, LEVELS = 2, FP8 = 3 };
  Rule rule = RANGES;
  const void* source = nullptr;
  Dtype dtype = F32;
  int32_t width = 0, bits = 8;
  bool keys = true, per_token = true, symmetric = false;
  int32_t group = 0;  // channels that share a token's parameters (0: all), or tokens that share a channel's
  uint8_t* codes = nullptr;  // [pages][2][tile bytes]
  // [pages][2][groups][32], or [pages][64 / group][width]; no zero: symmetric
  uint16_t *scale = nullptr, *zero = nullptr;
  const int64_t* of = nullptr;        // [pages], which row of `given` or `bounds` is a page's
  const uint16_t* given = nullptr;    // [..][width], fp16 scales of channels
  const float *bounds = nullptr;      // [..][2^bits - 1]
  const float *levels = nullptr;      // [2^bits]: then norms of the coded tokens are asked for,
  float* norms = nullptr;             // [pages][64]
};

// What the tables of the instruction sets offer.
struct Kernels {
  const char* name;
  // A task's result for each of R rows: m (in log2 units), l, and acc[padded E], unnormalised.
  void (*attend)(const Layer&, const Call&, const Task&, float* scratch, float* partial);
  // Numbers of a tile in the model's basis before rotation: keys [32][D], values [32][E].
  void (*decode)(const Layer&, const Slab&, int head, int64_t tile, float* keys, float* values);
  void (*encode)(const Encode&, int64_t page);
  // Partials of a (row, head) as out and lse.
  void (*finish)(const Layer&, const Result&, float* scratch);
  // out[slot] = sum over R rows of 2^(raw[row][slot] - lse[row])
  void (*mass)(const float* raw, int64_t stride, int rows, const float* lse, int64_t n, float* out);
};
extern const Kernels kernels_scalar, kernels_avx2, kernels_avx512, kernels_vnni;

constexpr int64_t round16(int64_t n) { return (n + 15) / 16 * 16; }
constexpr int64_t partial_floats(int64_t value_dim) { return 16 + round16(value_dim); }
constexpr int64_t scratch_floats(int64_t R, int64_t D, int64_t E) {
  const int64_t widest = round16(D > E ? D : E);
  // queries, folded and as words; logits and weights; results; sums; numbers of a tile
  return R * (4 * widest + 2 * BLOCK + round16(E) + 192) + 2 * TILE * widest;
}
}  // namespace kvloom
