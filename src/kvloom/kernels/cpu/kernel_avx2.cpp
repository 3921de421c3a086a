// See kernel.h.
#include "isa_avx2.h"
// the Isa comes first: everything below is made of it
#include "kernel.h"

namespace kvloom {
const Kernels kernels_avx2 = {"avx2", attend, decode, encode, finish, mass};
}
