"""The weights of a sparse model whose experts begin as copies of a dense model's feed-forward layers.

Legend: D hidden, F hidden width of the dense layer, E experts, N granularity: experts that make one copy of the dense
layer, G 2 for gated activations, else 1.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from conf.commands import UpcycleConfig
from conf.schema import ModelConfig, MoeConfig
from models.hf.convert import CheckpointWeights, write_step
from models.init import draw, generator


def gates_add_up(moe: MoeConfig) -> bool:
    """Whether the gates of a token are 1 together, so that copies of a layer compute what the layer does."""
    return moe.top_k > 1 if moe.renormalize is None else moe.renormalize


def output_scale(model: ModelConfig, granularity: int) -> float:
    """What the product of an expert's scales must be for the layer to begin with the dense layer's output.

    A token visits top_k / N whole copies. If its gates g add up to 1, each copy's N experts have the same gate, and
    the sum over all of them is dense * sum(g) / N: the scale is N. If not, a gate is 1 / E on average, and top_k / N
    copies add up to dense * top_k / (N * E): the scale is E * N / top_k.
    """
    moe = model.moe
    return float(granularity) if gates_add_up(moe) else moe.num_experts * granularity / moe.top_k


def write_weights(config: UpcycleConfig, weights: CheckpointWeights, directory: Path, model: ModelConfig) -> None:
    """Writes the weights of the sparse model as a checkpoint of step 0.

    Args:
        weights: of the dense model.
        directory: the step's directory to make.
    """
    kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    parts: dict[str, Callable[[], Iterator[Tensor]]] = {}
    replaced = tuple(f"{_ffn(model, layer)}." for layer in model.routed_layers)
    for name, shape in weights.shapes().items():
        if not name.startswith(replaced):
            kinds[name] = weights.dtype(name), shape
            parts[name] = lambda name=name: iter([weights.read(name)])
    for layer in model.routed_layers:
        made = _Experts(config, model, weights, layer)
        kinds |= made.kinds()
        parts |= made.parts()
    write_step(directory, kinds, lambda name: parts[name]())


def _ffn(model: ModelConfig, layer: int) -> str:
    """The name of a layer's feed-forward layer; those for multi-token prediction are counted after the others."""
    return f"layers.{layer}.ffn" if layer < model.num_layers else f"mtp.{layer - model.num_layers}.block.ffn"


class _Experts:
    """The parameters of one sparse layer."""

    def __init__(self, config: UpcycleConfig, model: ModelConfig, weights: CheckpointWeights, layer: int):
        self.config, self.model, self.weights = config, model, weights
        self.dense = _ffn(model, layer)
        gated = f"{self.dense}.gate.weight" in weights.shapes()
        self.into = [f"{self.dense}.gate.weight"] * gated + [f"{self.dense}.up.weight"]

    def kinds(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        e, d, width = self.config.num_experts, self.model.hidden_size, self.model.expert_width
        dtype = self.weights.dtype(self.into[-1])
        return {
            f"{self.dense}.router.weight": (torch.float32, (e, d)),
            f"{self.dense}.experts.w_in": (dtype, (e, d, len(self.into), width)),
            f"{self.dense}.experts.w_out": (dtype, (e, width, d)),
        }

    def parts(self) -> dict[str, Callable[[], Iterator[Tensor]]]:
        return dict(zip(self.kinds(), (self._router, self._w_in, self._w_out), strict=True))

    def _router(self) -> Iterator[Tensor]:
        """The experts of a copy have one row: with equal scores, the choice takes the copy as a whole."""
        d, n = self.model.hidden_size, self.config.granularity
        source = generator(self.config.seed, f"{self.dense}.router.weight")
        yield draw((self.config.num_experts // n, d), self.model.router_std, source).repeat_interleave(n, dim=0)

    def _w_in(self) -> Iterator[Tensor]:
        """[1, D, G, F / N] of each expert. Only the linear branch is scaled: act(s * gate) is not s * act(gate)."""
        whole = torch.stack([self.weights.read(name).t() for name in self.into], dim=1)
        if len(self.into) == 2:
            whole[:, 1] *= output_scale(self.model, self.config.granularity) ** 0.5
        yield from self._copies(whole.chunk(self.config.granularity, dim=2), "w_in")

    def _w_out(self) -> Iterator[Tensor]:
        scale = output_scale(self.model, self.config.granularity) ** (0.5 if len(self.into) == 2 else 1.0)
        whole = self.weights.read(f"{self.dense}.down.weight").t() * scale
        yield from self._copies(whole.chunk(self.config.granularity), "w_out")

    def _copies(self, shards: tuple[Tensor, ...], name: str) -> Iterator[Tensor]:
        for expert in range(self.config.num_experts):
            shard = shards[expert % len(shards)]
            if self.config.noise:
                source = generator(self.config.seed, f"{self.dense}.experts.{name}", expert)
                noise = torch.randn(shard.shape, generator=source) * self.config.noise
                shard = (shard.float() + noise * shard.float().std()).to(shard.dtype)
            yield shard[None].contiguous()
