"""Stands for transformer_engine.pytorch.fp8, where the module quantization was before 2.9."""

from transformer_engine.pytorch.quantization import FP8GlobalStateManager

__all__ = ["FP8GlobalStateManager"]
