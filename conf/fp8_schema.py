"""The settings of FP8 training."""

from dataclasses import dataclass

from conf.setting import setting


@dataclass
class Fp8Config:
    """FP8 training (precision=fp8). The matrix products of the experts and of the linear layers of attention and
    feed-forward layers take operands in FP8 and accumulate in fp32. Router, norms, embedding, output layer, scaled
    dot-product attention, optimizer states and gradient buckets stay in higher precision."""

    recipe: str = setting("blockwise", choices=("blockwise", "rowwise", "tensorwise", "delayed", "mxfp8"))
    """How operands are scaled: blockwise, rowwise, tensorwise, delayed or mxfp8. blockwise: 1 x 128 for activations and
    gradients, 128 x 128 for weights (DeepSeek-V3, arXiv:2412.19437, section 3.3.2). rowwise: one scale per row or
    column of an operand; not with fp8.kernels=te. tensorwise: one per operand, of its values at that moment
    (TransformerEngine: current scaling). With fp8.kernels=te also delayed: one per operand, of the largest magnitudes
    of earlier micro-batches on all ranks of a pipeline stage; and mxfp8: 1 x 32, on Blackwell. Only blockwise and mxfp8
    give the same rounding of activations under every layout. tensorwise scales by the values that one rank holds, and
    the scales of delayed depend on which tokens the ranks' micro-batches had."""
    weight_gradient: str | None = setting(None, choices=(None, "bf16", "fp8"))
    """Operand type of the weight gradients' products: bf16 or fp8. fp8 scales blocks of 128 rows, which depend on the
    rows that a rank receives. null: bf16; with fp8.kernels=te fp8, since TransformerEngine has no other."""
    kernels: str = setting("auto", choices=("auto", "reference", "triton", "te"))
    """Implementation of the FP8 matrix products: reference, triton, te or auto. reference: plain PyTorch; operands are
    rounded to FP8 and multiplied in bf16, which is exact but not faster. triton: FP8 tensor cores. te: the layers and
    recipes of TransformerEngine, in training; evaluation and generation then compute in bf16. auto: reference on CPUs;
    on GPUs triton, and PyTorch's scaled_mm for linear layers if it supports the recipe and matches the reference."""
    format: str | None = setting(None, choices=(None, "e4m3", "hybrid"))
    """Numbers of fp8.kernels=te: e4m3, or hybrid, with E5M2 for gradients. null: hybrid with recipe delayed and
    tensorwise, else e4m3."""
    amax_history_len: int = setting(1024, ge=1)
    """Micro-batches whose largest magnitudes recipe=delayed remembers. The history is part of a checkpoint, and with
    another length it begins anew."""
    amax_compute_algo: str = setting("max", choices=("max", "most_recent"))
    """What recipe=delayed scales by: max (of the history) or most_recent."""
    linear_layers: bool = True
    """Use FP8 for the linear layers of attention and of dense and shared feed-forward layers. false: only for the
    experts, which account for most of a sparse model's FLOPs."""
    first_layers_high: int = setting(0, ge=0)
    """Number of layers at the beginning of the model that stay in bf16."""
    last_layers_high: int = setting(0, ge=0)
    """Number of layers at the end of the model that stay in bf16."""
