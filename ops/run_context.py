"""What a run's operations are shaped by."""

from dataclasses import dataclass

import torch

from conf.fp8_rules import fp8_layers
from conf.schema import Config, ModelConfig
from parallel.process_groups import Groups, Runtime


@dataclass(frozen=True)
class RunContext:
    """A run's configuration, and the rank that computes it."""

    config: Config
    runtime: Runtime
    dtype: torch.dtype
    """Of weights and activations."""
    train: bool = True
    """Whether there is an optimizer."""

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def device(self) -> torch.device:
        return self.runtime.device

    @property
    def groups(self) -> Groups:
        return self.runtime.groups

    @property
    def needs_varlen(self) -> bool:
        """Whether in a layer a query does not see all tokens before it, sees those of other ranks, or sees sinks."""
        return not self.exchanges_sequence and (not self.needs_causal or bool(self.model.local_layers))

    @property
    def needs_causal(self) -> bool:
        """Whether in a layer a query sees the tokens before it and nothing else: in one without a window or chunks, or
        with short sequences."""
        return not (self.config.data.document_mask or self.runtime.layout.cp > 1 or self.model.attention_sinks)

    @property
    def exchanges_sequence(self) -> bool:
        """Whether context-parallel ranks attend together, instead of gathering keys and values (ops.cp_attention)."""
        return self.train and self.runtime.layout.cp > 1 and self.config.parallel.cp_comm_type != "all_gather"

    @property
    def fp8_layers(self) -> range:
        """The layers in FP8, counted from 0 over the whole model; empty but for precision=fp8."""
        fp8, is_fp8 = self.config.fp8, self.config.precision == "fp8"
        return fp8_layers(fp8.first_layers_high, fp8.last_layers_high, self.model.num_layers) if is_fp8 else range(0)

    def randn(self, *shape: int, seed: int = 0, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Standard normal, the same for every call with this shape and seed, in the run's precision."""
        generator = torch.Generator(self.device).manual_seed(seed)
        drawn = torch.randn(shape, generator=generator, device=self.device)
        return drawn.to(self.dtype if dtype is None else dtype)
