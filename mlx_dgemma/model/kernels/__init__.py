"""Custom kernels for GPUs: their sources, and the functions that launch them."""
