// Python's view. Addresses come as integers, which cost a tenth of what tensors do; whoever passes them
// has checked them (kvloom/kernels/cpu_backend.py).
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "attend.h"

namespace nb = nanobind;
using namespace kvloom;
using Address = uintptr_t;

template <class C, class T>
static void address(nb::class_<C>& c, const char* name, T* C::*field) {
  c.def_prop_rw(
      name, [field](const C& x) { return reinterpret_cast<Address>(x.*field); },
      [field](C& x, Address a) { x.*field = reinterpret_cast<T*>(a); });
}

template <class C>
static void untyped(nb::class_<C>& c, const char* name, const void* C::*field) {
  c.def_prop_rw(
      name, [field](const C& x) { return reinterpret_cast<Address>(x.*field); },
      [field](C& x, Address a) { x.*field = reinterpret_cast<const void*>(a); });
}

template <class C, class E>
static void number(nb::class_<C>& c, const char* name, E C::*field) {
  c.def_prop_rw(
      name, [field](const C& x) { return int(x.*field); }, [field](C& x, int v) { x.*field = E(v); });
}

static const float* floats(Address a) { return reinterpret_cast<const float*>(a); }
static float* out(Address a) { return reinterpret_cast<float*>(a); }

NB_MODULE(_cpu, m) {
  m.attr("INTERFACE") = 3;  // see cpu_backend.py
  m.def("instruction_sets", instruction_sets);
  nb::class_<Encode> job(m, "Encode");
  job.def(nb::init<>())
      .def_rw("width", &Encode::width)
      .def_rw("bits", &Encode::bits)
      .def_rw("keys", &Encode::keys)
      .def_rw("per_token", &Encode::per_token)
      .def_rw("symmetric", &Encode::symmetric)
      .def_rw("group", &Encode::group);
  number(job, "rule", &Encode::rule);
  number(job, "dtype", &Encode::dtype);
  untyped(job, "source", &Encode::source);
  address(job, "codes", &Encode::codes);
  address(job, "scale", &Encode::scale);
  address(job, "zero", &Encode::zero);
  address(job, "of", &Encode::of);
  address(job, "given", &Encode::given);
  address(job, "bounds", &Encode::bounds);
  address(job, "levels", &Encode::levels);
  address(job, "norms", &Encode::norms);
  m.def("encode", [](const Encode& e, int64_t pages, const std::string& isa, int threads) {
    nb::gil_scoped_release free;
    encode(e, pages, isa, threads);
  });

  nb::class_<Param> param(m, "Param");
  param.def(nb::init<>()).def_rw("stride", &Param::stride).def_rw("of_head", &Param::of_head);
  address(param, "data", &Param::data);
  address(param, "index", &Param::index);

  nb::class_<Sparse> sparse(m, "Sparse");
  sparse.def(nb::init<>()).def_rw("n", &Sparse::n).def_rw("wide", &Sparse::wide);
  untyped(sparse, "places", &Sparse::places);
  address(sparse, "numbers", &Sparse::numbers);
  number(sparse, "dtype", &Sparse::dtype);

  nb::class_<Plane> plane(m, "Plane");
  plane.def(nb::init<>()).def_rw("n", &Plane::n).def_rw("wide", &Plane::wide);
  address(plane, "index", &Plane::index);
  untyped(plane, "ids", &Plane::ids);
  untyped(plane, "numbers", &Plane::numbers);
  address(plane, "scale", &Plane::scale);

  nb::class_<Packed> packed(m, "Packed");
  packed.def(nb::init<>())
      .def_rw("tile_bytes", &Packed::tile_bytes)
      .def_rw("bits", &Packed::bits)
      .def_rw("width", &Packed::width)
      .def_rw("per_token", &Packed::per_token)
      .def_rw("group", &Packed::group)
      .def_rw("middle", &Packed::middle)
      .def_rw("scale", &Packed::scale)
      .def_rw("zero", &Packed::zero)
      .def_rw("levels_stride", &Packed::levels_stride)
      .def_rw("sparse", &Packed::sparse)
      .def_rw("plane", &Packed::plane);
  address(packed, "codes", &Packed::codes);
  address(packed, "levels", &Packed::levels);
  number(packed, "kind", &Packed::kind);

  nb::class_<Dense> dense(m, "Dense");
  dense.def(nb::init<>())
      .def_rw("width", &Dense::width)
      .def_rw("row", &Dense::row)
      .def_rw("head", &Dense::head)
      .def_rw("token", &Dense::token);
  untyped(dense, "data", &Dense::data);
  number(dense, "dtype", &Dense::dtype);

  nb::class_<Slab> slab(m, "Slab");
  slab.def(nb::init<>())
      .def_rw("keys", &Slab::keys)
      .def_rw("values", &Slab::values)
      .def_rw("dense_keys", &Slab::dense_keys)
      .def_rw("dense_values", &Slab::dense_values)
      .def_rw("alive_stride", &Slab::alive_stride)
      .def_rw("mass_stride", &Slab::mass_stride)
      .def_rw("position_stride", &Slab::position_stride)
      .def_rw("base_stride", &Slab::base_stride)
      .def_rw("extent", &Slab::extent);
  address(slab, "first", &Slab::first);
  address(slab, "used", &Slab::used);
  address(slab, "skip", &Slab::skip);
  address(slab, "alive", &Slab::alive);
  address(slab, "mass", &Slab::mass);
  address(slab, "base", &Slab::base);
  address(slab, "positions", &Slab::positions);

  nb::class_<Run> run(m, "Run");
  run.def(nb::init<>())
      .def_rw("keys", &Run::keys)
      .def_rw("values", &Run::values)
      .def_rw("n", &Run::n)
      .def_rw("bias_stride", &Run::bias_stride);
  address(run, "count", &Run::count);
  address(run, "bias", &Run::bias);

  nb::class_<Handle>(m, "Handle", nb::is_weak_referenceable())
      .def(nb::init<int, int, int, int, int, const std::string&>())
      .def_prop_ro("shape", [](const Handle& h) {
        return nb::make_tuple(h.layer.rows, h.layer.heads, h.layer.group, h.layer.key_dim, h.layer.value_dim);
      })
      .def_rw("slabs", &Handle::slabs)
      .def_rw("runs", &Handle::runs)
      .def_prop_rw("scale", [](Handle& h) { return h.layer.scale; }, [](Handle& h, float v) { h.layer.scale = v; })
      .def_prop_rw("softcap", [](Handle& h) { return h.layer.softcap; }, [](Handle& h, float v) { h.layer.softcap = v; })
      .def_prop_rw("mode", [](Handle& h) { return h.layer.mode; }, [](Handle& h, int v) { h.layer.mode = v; })
      .def("turn",
           [](Handle& h, Address key, Address key_signs, Address value_back, Address value_signs) {
             h.layer.turn = {floats(key), floats(value_back), reinterpret_cast<const int8_t*>(key_signs),
                             reinterpret_cast<const int8_t*>(value_signs)};
           })
      .def("rotate",
           [](Handle& h, std::vector<float> freq, bool interleaved, float gain, bool pages) {
             h.layer.rotation.interleaved = interleaved, h.layer.rotation.gain = gain;
             h.layer.rotation.pages = pages;
             h.rotate(std::move(freq));
           })
      .def("reach", &Handle::reach)
      .def("set_run",
           [](Handle& h, size_t i, Address keys, Address values, int64_t n, Address count, Address bias, int64_t stride,
              Address back, int64_t raw, int64_t key_row, int64_t key_head, int64_t key_token, int64_t value_row,
              int64_t value_head, int64_t value_token) {
             Run& r = h.runs.at(i);
             r.keys.row = key_row, r.keys.head = key_head, r.keys.token = key_token;
             r.values.row = value_row, r.values.head = value_head, r.values.token = value_token;
             r.keys.data = reinterpret_cast<const void*>(keys), r.values.data = reinterpret_cast<const void*>(values);
             r.n = n, r.count = reinterpret_cast<const int64_t*>(count);
             r.bias = floats(bias), r.bias_stride = stride;
             r.back = reinterpret_cast<const int64_t*>(back), r.raw = raw;
           })
      .def("attend",
           [](Handle& h, Address query, int queries, Address sinks, Address result, Address lse, Address raw,
              int64_t raw_stride, int threads) {
             nb::gil_scoped_release free;
             h.attend(floats(query), queries, floats(sinks), out(result), out(lse), out(raw), raw_stride, threads);
           })
      .def("mass",
           [](Handle& h, Address raw, int64_t raw_stride, int queries, Address lse, int64_t slots, Address received,
              int threads) {
             nb::gil_scoped_release free;
             h.mass(floats(raw), raw_stride, queries, floats(lse), slots, out(received), threads);
           })
      .def("decode", [](Handle& h, int slab, int64_t slots, int64_t stride, Address keys, Address values, int threads) {
        nb::gil_scoped_release free;
        h.decode(slab, slots, stride, out(keys), out(values), threads);
      });
}
