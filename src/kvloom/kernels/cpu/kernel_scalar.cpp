// See kernel.h.
#include "isa_scalar.h"
// the Isa comes first: everything below is made of it
#include "kernel.h"

namespace kvloom {
const Kernels kernels_scalar = {"scalar", attend, decode, encode, finish, mass};
}
