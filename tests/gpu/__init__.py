"""What needs a CUDA device; skips without one."""
