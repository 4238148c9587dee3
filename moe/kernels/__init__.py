"""Products of the experts in FP8 and in fused kernels, each beside its plain-torch reference."""
