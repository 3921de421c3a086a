"""Kernels in Triton; `kvloom.kernels.triton_backend` says whether they can run, and imports them."""
