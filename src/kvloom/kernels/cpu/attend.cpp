#include "attend.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <stdexcept>

namespace kvloom {
namespace {
constexpr int64_t GRAIN = 512;       // entries of a task at least
constexpr int64_t ONE_THREAD = 2048;  // entries times rows below which a second thread costs more

struct Named {
  const Kernels* kernels;
  bool supported;
};

std::vector<Named> tables() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool wide = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#ifdef KVLOOM_EMULATED
  return {{&kernels_avx2, avx2}, {&kernels_vnni, avx2}, {&kernels_avx512, avx2}, {&kernels_scalar, true}};
#endif
  return {{&kernels_vnni, wide && __builtin_cpu_supports("avx512vnni")},
          {&kernels_avx512, wide},
          {&kernels_avx2, avx2},
          {&kernels_scalar, true}};
#else
  return {{&kernels_scalar, true}};
#endif
}

const Kernels* kernels_named(const std::string& name) {
  for (const Named& t : tables())
    if (t.supported && t.kernels->name == name) return t.kernels;
  throw std::invalid_argument("instruction set '" + name + "' is not one of this CPU's");
}

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// In double precision: the product of a position and a frequency is not exact in fp32 far out.
void fill(Angles& angles, const std::vector<float>& freq) {
  const size_t pairs = freq.size();
  const auto at = [&](std::vector<float>& table, size_t i, size_t stride, double angle) {
    table[i] = float(std::cos(angle)), table[i + stride] = float(std::sin(angle));
  };
  angles.near.resize(2 * pairs * PAGE), angles.step.resize(2 * pairs * PAGE);
  angles.far.resize(2 * pairs * size_t(angles.reach));
  for (size_t i = 0; i < pairs; i++) {
    for (size_t k = 0; k < PAGE; k++) {
      at(angles.near, (k / 16 * pairs + i) * 32 + k % 16, 16, double(freq[i]) * double(k));
      at(angles.step, k * 2 * pairs + i, pairs, double(freq[i]) * double(k));
    }
    for (size_t k = 0; k < size_t(angles.reach); k++)
      at(angles.far, k * 2 * pairs + i, pairs, double(freq[i]) * PAGE * double(k));
  }
}

std::shared_ptr<const Angles> angles_of(const std::vector<float>& freq, int64_t need) {
  static std::mutex lock;
  static std::map<std::vector<float>, std::weak_ptr<const Angles>> known;
  const std::lock_guard<std::mutex> guard(lock);
  std::shared_ptr<const Angles> found = known[freq].lock();
  if (found && found->reach >= need) return found;
  const int64_t reach = round_up(need + need / 2, 16);
  auto made = std::make_shared<Angles>();
  made->reach = reach;
  fill(*made, freq);
  known[freq] = made;
  return made;
}

// Memory of calls, kept by each thread that makes them.
struct Memory {
  std::vector<float> partials, scratch;
};

float* at_least(std::vector<float>& room, int64_t n) {
  if (room.size() < size_t(n)) room.resize(size_t(n));
  return room.data();
}
}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Named& t : tables())
    if (t.supported) names.push_back(t.kernels->name);
  return names;
}

void encode(const Encode& pages, int64_t n, const std::string& isa, int threads) {
  const Kernels* kernels = kernels_named(isa);
  if (pages.width > MAX_WIDTH) throw std::invalid_argument("heads are wider than " + std::to_string(MAX_WIDTH));
#pragma omp parallel for num_threads(std::max(1, threads)) schedule(static)
  for (int64_t page = 0; page < n; page++) kernels->encode(pages, page);
}

Handle::Handle(int rows, int heads, int group, int key_dim, int value_dim, const std::string& isa)
    : kernels_(kernels_named(isa)) {
  if (std::max(key_dim, value_dim) > MAX_WIDTH)
    throw std::invalid_argument("heads are wider than " + std::to_string(MAX_WIDTH));
  layer.rows = rows, layer.heads = heads, layer.group = group;
  layer.key_dim = key_dim, layer.value_dim = value_dim;
}

void Handle::add_tasks(Task task, int64_t n, int64_t each) {
  const int64_t most = MAX_PARTS / int64_t(1 + runs.size());
  each = std::max(each, round_up((n + most - 1) / most, BLOCK_TILES));
  for (int64_t from = 0; from < n; from += each) {
    task.from = from, task.to = std::min(n, from + each);
    tasks_.push_back(task);
  }
}

// Tasks of about equal size, several for each thread, since threads are disturbed.
void Handle::plan(int threads) {
  tasks_.clear(), first_.clear();
  const int64_t cells = int64_t(layer.rows) * layer.heads;
  int64_t total = 0;
  for (int64_t cell = 0; cell < cells; cell++) {
    for (const Slab& s : slabs) total += s.used[cell] * PAGE;
    for (const Run& r : runs) total += r.count ? r.count[cell] : r.n;
  }
  const int64_t each = std::max(GRAIN, round_up(total / (4 * int64_t(threads)) + 1, BLOCK));
  for (int64_t cell = 0; cell < cells; cell++) {
    first_.push_back(tasks_.size());
    Task task;
    task.row = int32_t(cell / layer.heads), task.head = int32_t(cell % layer.heads);
    int64_t tiles = 0;
    for (const Slab& s : slabs) tiles += std::max<int64_t>(0, s.used[cell] * 2 - s.skip[cell] / TILE);
    add_tasks(task, tiles, each / TILE);
    for (size_t i = 0; i < runs.size(); i++) {
      task.run = int32_t(i);
      add_tasks(task, runs[i].count ? runs[i].count[cell] : runs[i].n, each);
    }
  }
  first_.push_back(tasks_.size());
}

void Handle::attend(const float* query, int queries, const float* sinks, float* out, float* lse, float* raw,
                    int64_t raw_stride, int threads) {
  for (const Run& run : runs)
    for (int64_t cell = 0; run.back && cell < int64_t(layer.rows) * layer.heads; cell++) reach(std::abs(run.back[cell]));
  layer.slabs = slabs.data(), layer.n_slabs = int32_t(slabs.size());
  layer.runs = runs.data(), layer.n_runs = int32_t(runs.size());
  const int64_t R = int64_t(layer.group) * queries, E = layer.value_dim;
  threads = std::max(1, threads);
  plan(threads);
  int64_t work = 0;
  for (const Task& t : tasks_) work += (t.to - t.from) * (t.run < 0 ? TILE : 1);
  if (work * R < ONE_THREAD) threads = 1;
  const int64_t each = R * partial_floats(E);
  // partials of a (row, head) and the sum of its pages, beside two results
  const int64_t own = round16(std::max(scratch_floats(R, layer.key_dim, E), each + 2 * R * round16(E) + 2 * R + 16));
  thread_local Memory memory;
  float* const partials = at_least(memory.partials, int64_t(tasks_.size()) * each);
  float* const room = at_least(memory.scratch, threads * own);
  const Call call{query, int32_t(R), raw, raw_stride};
  const int64_t n = int64_t(tasks_.size()), cells = int64_t(first_.size()) - 1;
#pragma omp parallel num_threads(threads)
  {
    float* scratch = room + omp_get_thread_num() * own;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < n; i++) kernels_->attend(layer, call, tasks_[i], scratch, partials + i * each);
#pragma omp for schedule(static)
    for (int64_t cell = 0; cell < cells; cell++) {
      const float *pages[MAX_PARTS], *exact[MAX_PARTS];
      Result result;
      result.head = int32_t(cell % layer.heads), result.rows = int32_t(R), result.queries = queries;
      result.pages = pages, result.runs = exact;
      for (size_t i = first_[cell]; i < first_[cell + 1]; i++) {
        const float* part = partials + int64_t(i) * each;
        if (tasks_[i].run < 0)
          pages[result.n_pages++] = part;
        else
          exact[result.n_runs++] = part;
      }
      result.sinks = sinks ? sinks + result.head * layer.group : nullptr;
      result.out = out + cell * R * E;
      result.lse = lse ? lse + cell * R : nullptr;
      kernels_->finish(layer, result, scratch);
    }
  }
}

void Handle::mass(const float* raw, int64_t raw_stride, int queries, const float* lse, int64_t slots,
                  float* received, int threads) const {
  const int64_t R = int64_t(layer.group) * queries, cells = int64_t(layer.rows) * layer.heads;
#pragma omp parallel for num_threads(std::max(1, threads)) schedule(static)
  for (int64_t cell = 0; cell < cells; cell++)
    kernels_->mass(raw + cell * R * raw_stride, raw_stride, int(R), lse + cell * R, slots, received + cell * slots);
}

void Handle::decode(int index, int64_t slots, int64_t stride, float* keys, float* values, int threads) const {
  const Slab& slab = slabs.at(size_t(index));
  const int64_t cells = int64_t(layer.rows) * layer.heads, tiles = slots / TILE;
  const int64_t D = layer.key_dim, E = layer.value_dim;
#pragma omp parallel for num_threads(std::max(1, threads)) schedule(static) collapse(2)
  for (int64_t cell = 0; cell < cells; cell++)
    for (int64_t t = 0; t < tiles; t++) {
      float *k = keys + (cell * stride + t * TILE) * D, *v = values + (cell * stride + t * TILE) * E;
      if (t < slab.used[cell] * 2) {
        kernels_->decode(layer, slab, int(cell % layer.heads), slab.first[cell] * 2 + t, k, v);
      } else {
        std::fill(k, k + TILE * D, 0.f);
        std::fill(v, v + TILE * E, 0.f);
      }
    }
}

void Handle::rotate(std::vector<float> freq) {
  freq_ = std::move(freq);
  layer.rotation.pairs = int32_t(freq_.size());
  reach(PAGE);
}

void Handle::reach(int64_t last) {
  if (freq_.empty() || last / PAGE < layer.rotation.reach) return;
  angles_ = angles_of(freq_, last / PAGE + 1);
  layer.rotation.near = angles_->near.data(), layer.rotation.step = angles_->step.data();
  layer.rotation.far = angles_->far.data();
  layer.rotation.reach = angles_->reach;
}
}  // namespace kvloom
