// See kernel.h.
#include "isa_avx512.h"
// the Isa comes first: everything below is made of it
#include "kernel.h"

namespace kvloom {
const Kernels kernels_avx512 = {"avx512", attend, decode, encode, finish, mass};
}
