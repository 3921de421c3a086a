// Codes of packed panels as vectors; kvloom/kernels/layout.py defines where they lie.
//
//   8 bits  | A quad 0 | B quad 0 | A quad 1 ...        a unit is 1 quad,  128 bytes
//   4 bits  | A + 16 B of quad 0 | ...                  a unit is 1 quad,   64 bytes
//   2 bits  | A0 + 4 B0 + 16 A1 + 64 B1 | ...           a unit is 2 quads,  64 bytes
//   3 bits  | 2 low bits of quads 0, 1 | of 2, 3 | high bits of all |  4 quads, 192 bytes
//
// Each vector of 64 bytes is 16 lanes of 32 bits, one byte for each e = 0..3 of its quad; an Isa with W
// lanes reads it in 16 / W parts, `unit` pointing at its own.
#pragma once

namespace {
constexpr int quads_of_unit(int bits) { return bits == 2 ? 2 : bits == 3 ? 4 : 1; }
constexpr int bytes_of_unit(int bits) { return bits == 8 ? 128 : bits == 3 ? 192 : 64; }
constexpr int HIGH[4] = {0, 1, 4, 5};  // place of the high bit of a 3-bit code, by quad

// The vector that holds quad `k` of a unit (its low bits), and by how much these are shifted.
template <int BITS> constexpr int offset_of(int k, int half) {
  return BITS == 8 ? half * 64 : BITS == 3 ? (k / 2) * 64 : 0;
}
template <int BITS> constexpr int shift_of(int k, int half) {
  return BITS == 8 ? 0 : BITS == 4 ? 4 * half : 2 * half + 4 * (k % 2);
}

// e = 0 and 2 (or 1 and 3 if `odd`) in 16 bits each.
template <int BITS>
static inline __attribute__((always_inline)) Isa::I codes16(const uint8_t* unit, int k, int half, int odd) {
  constexpr uint32_t MASK = (1u << (BITS == 3 ? 2 : BITS)) - 1;
  const Isa::I x = Isa::loadi(unit + offset_of<BITS>(k, half));
  const int shift = shift_of<BITS>(k, half) + 8 * odd;
  Isa::I code = shift ? Isa::srl16(x, shift) : x;
  if (shift + BITS < 16 || BITS == 3) code = Isa::land(code, Isa::seti(MASK * 0x10001u));
  if constexpr (BITS == 3) {
    const Isa::I y = Isa::srl16(Isa::loadi(unit + 128), HIGH[k] + 2 * half + 8 * odd);
    code = Isa::lor(code, Isa::sll32(Isa::land(y, Isa::seti(0x10001u)), 2));
  }
  return code;
}

// All four e of W lanes, a byte each, in the order that `lookup4` takes.
template <int BITS>
static inline __attribute__((always_inline)) Isa::I bytes32(const uint8_t* unit, int k, int half) {
  constexpr uint32_t MASK = (1u << (BITS == 3 ? 2 : BITS)) - 1;
  const Isa::I x = Isa::by_e(Isa::loadi(unit + offset_of<BITS>(k, half)));
  if constexpr (BITS == 8) return x;
  Isa::I code = Isa::land(Isa::srl16(x, shift_of<BITS>(k, half)), Isa::seti(MASK * 0x01010101u));
  if constexpr (BITS == 3) {
    const Isa::I y = Isa::srl16(Isa::by_e(Isa::loadi(unit + 128)), HIGH[k] + 2 * half);
    code = Isa::lor(code, Isa::sll32(Isa::land(y, Isa::seti(0x01010101u)), 2));
  }
  return code;
}

// One e in 32 bits each.
template <int BITS>
static inline __attribute__((always_inline)) Isa::I codes32(const uint8_t* unit, int k, int half, int e) {
  constexpr uint32_t MASK = (1u << (BITS == 3 ? 2 : BITS)) - 1;
  const Isa::I x = Isa::loadi(unit + offset_of<BITS>(k, half));
  Isa::I code = Isa::land(Isa::srl32(x, shift_of<BITS>(k, half) + 8 * e), Isa::seti(MASK));
  if constexpr (BITS == 3) {
    const Isa::I y = Isa::srl32(Isa::loadi(unit + 128), HIGH[k] + 2 * half + 8 * e);
    code = Isa::lor(code, Isa::sll32(Isa::land(y, Isa::seti(1)), 2));
  }
  return code;
}
}  // namespace
