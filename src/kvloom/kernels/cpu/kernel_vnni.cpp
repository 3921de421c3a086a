// See kernel.h.
#define KVLOOM_VNNI
#include "isa_avx512.h"
// the Isa comes first: everything below is made of it
#include "kernel.h"

namespace kvloom {
const Kernels kernels_vnni = {"vnni", attend, decode, encode, finish, mass};
}
