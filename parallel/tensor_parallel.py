"""What Megatron-Core's tensor-parallel layers are built with everywhere in the model."""

from collections.abc import Callable
from typing import Any, TypedDict, cast

import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig

INIT_LATER = cast("Callable[..., Any]", None)
"""In place of a layer's init_method, which Megatron-Core declares a function and does not call: models.init sets the
weights (perform_initialization=False)."""


class LinearOptions(TypedDict):
    """Keyword arguments of ColumnParallelLinear and RowParallelLinear."""

    config: TransformerConfig
    init_method: Callable[..., Any]
    tp_group: dist.ProcessGroup
    skip_bias_add: bool


def linear_options(config: TransformerConfig, group: dist.ProcessGroup) -> LinearOptions:
    """Of a layer sharded over the group, which returns its bias beside its output instead of adding it."""
    return {"config": config, "init_method": INIT_LATER, "tp_group": group, "skip_bias_add": True}
