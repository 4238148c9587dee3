"""Kernels in C++ for a CPU with AVX512-BF16."""
