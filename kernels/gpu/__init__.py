"""The ops in Triton, for NVIDIA GPUs: a file an op, of the name that its contract has in `rtx.kernels`.

Functions take and give tensors of PyTorch on the GPU. Importing a file of this package needs torch and triton; the ops'
fallback, the reference, needs neither. `rtx.kernels.operators` decides between them.
"""

OPS = ("add_norm_quantize", "info_nce", "int8_linear", "maxsim", "packed_attention", "pool")
"""The files of this package that have an op."""
