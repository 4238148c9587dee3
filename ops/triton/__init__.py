"""Kernels in Triton, for GPUs. Every module here imports Triton, so it is imported only where Triton is."""
