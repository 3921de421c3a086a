"""Named ways of storing.

`k8v4`: 8-bit keys, 4-bit values. `int4_channel`: the axes of KIVI (keys per channel, values per
token) without a residual window. `rotated_int4`: per-token 4-bit codes, keys in a rotated basis
(SAW-INT4, arXiv:2604.19157): 4.25 bits at head_dim 128, 4.5 at 64. `kivi4` and `kivi2`: KIVI as its
authors write it.
"""

from kvloom.core.registry import preset

preset("k8v4", "int8(value_bits=4)")
preset("int4_channel", "int4(keys='channel')")
preset("rotated_int4", "int4(hadamard='keys')")
preset("kivi4", "kivi(bits=4)")
preset("kivi2", "kivi(bits=2)")
