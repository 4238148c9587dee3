"""Stands for apex.normalization."""

from apex.normalization.fused_layer_norm import FusedRMSNorm, fused_rms_norm_affine

__all__ = ["FusedRMSNorm", "fused_rms_norm_affine"]
