// The work of a call: split over threads, put together again.
#pragma once
#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "types.h"

namespace kvloom {

// The instruction sets of this CPU, best first, by name: vnni, avx512, avx2, scalar.
std::vector<std::string> instruction_sets();

// cos and sin of positions, shared by all layers with the same frequencies.
struct Angles {
  std::vector<float> near, step, far;  // see Rotation
  int64_t reach = 0;
};

// Lay n pages on uniform grids, by the named instruction set.
void encode(const Encode& pages, int64_t n, const std::string& isa, int threads);

// One layer's pages and runs. Addresses are the caller's to keep alive.
class Handle {
 public:
  Handle(int rows, int heads, int group, int key_dim, int value_dim, const std::string& isa);

  Layer layer;
  std::vector<Slab> slabs;
  std::vector<Run> runs;

  // query [B][H][R][D], R = group * queries; out [B][H][R][E]; lse [B][H][R] or null
  void attend(const float* query, int queries, const float* sinks, float* out, float* lse, float* raw,
              int64_t raw_stride, int threads);
  // received [B][H][slots] from the logits that `attend` kept; lse [B][H][R], in log2 units
  void mass(const float* raw, int64_t raw_stride, int queries, const float* lse, int64_t slots,
            float* received, int threads) const;
  // `slots` keys [B][H][stride][D] and values [B][H][stride][E] of a slab, before rotation, in the pages' basis
  void decode(int slab, int64_t slots, int64_t stride, float* keys, float* values, int threads) const;
  // Keys of pages, or queries of runs, are rotated by these frequencies, one for each pair of channels.
  void rotate(std::vector<float> freq);
  // Make sure that positions up to `last` can be rotated to.
  void reach(int64_t last);

 private:
  void plan(int threads);
  void add_tasks(Task task, int64_t n, int64_t each);
  const Kernels* kernels_;
  std::vector<Task> tasks_;
  std::vector<size_t> first_;  // tasks of each (row, head)
  std::vector<float> freq_;
  std::shared_ptr<const Angles> angles_;
};
}  // namespace kvloom
