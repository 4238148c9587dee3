"""Router replay: the routing of a forward pass is recorded, and later passes are forced to route alike (rollout routing
replay, arXiv:2510.11370; Megatron-Core's moe_enable_routing_replay).

A file of recorded routing is a safetensors file (docs/guides/router_replay.md). Only the indices are replayed: gates
are computed from the present logits at the replayed experts, so that the gradient reaches the router.

Legend: N sequences of a file, B sequences of a micro-batch, S sequence, L sparse layers, K choices per token.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from conf.schema import ModelConfig
from parallel.process_groups import Runtime

FORMAT = "switchyard-routing-1"


def replayable(model: ModelConfig) -> None:
    """Raises ValueError if the model has no routing that could be recorded and replayed."""
    if not model.sparse_layers:
        raise ValueError("router replay needs sparse layers, and this model has none: model.moe.num_experts=0")
    if model.moe.load_balancing == "expert_choice":
        raise ValueError(
            "router replay records the top_k experts of every token, and with model.moe.load_balancing=expert_choice "
            "experts choose tokens, any number of experts per token"
        )


def check_routing(
    routing_BSLK: Tensor | None,
    kept_BSLK: Tensor | None,
    model: ModelConfig,
    shape_BS: Sequence[int],
    padding_BS: Tensor | None = None,
) -> None:
    """Whether a model can route that way.

    Args:
        routing_BSLK: integers in host memory. Those of padding are not read.
        kept_BSLK: which assignments are kept; None: the capacity decides.

    Raises:
        ValueError: naming the size that is wrong, or the layer, the token and the expert.
    """
    replayable(model)
    if routing_BSLK is None:
        raise ValueError("routing_kept says which of the assignments in routing are kept, and there is no routing")
    if kept_BSLK is not None and (kept_BSLK.dtype != torch.bool or kept_BSLK.shape != routing_BSLK.shape):
        raise ValueError(
            f"routing_kept is {list(kept_BSLK.shape)} of {kept_BSLK.dtype}; it must be torch.bool of routing's shape, "
            f"{list(routing_BSLK.shape)}"
        )
    layers, moe = model.sparse_layers, model.moe
    wanted = {"sequences": shape_BS[0], "tokens": shape_BS[1], "sparse layers": len(layers), "top_k": moe.top_k}
    if routing_BSLK.dim() != 4 or routing_BSLK.dtype.is_floating_point:
        raise ValueError(
            f"routing is {list(routing_BSLK.shape)} of {routing_BSLK.dtype}; it must be integers [sequences, tokens, "
            f"sparse layers, top_k], here {list(wanted.values())}"
        )
    for got, (name, size) in zip(routing_BSLK.shape, wanted.items(), strict=True):
        if got != size:
            raise ValueError(f"routing is {list(routing_BSLK.shape)}: {got} {name}, but the model's batch has {size}")
    there_BS = torch.ones(*shape_BS, dtype=torch.bool) if padding_BS is None else ~padding_BS
    wrong = ((routing_BSLK < 0) | (routing_BSLK >= moe.num_experts)) & there_BS[:, :, None, None]
    if wrong.any():
        b, s, layer, k = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"routing sends token {s} of sequence {b} in layer {layers[layer]} to expert "
            f"{int(routing_BSLK[b, s, layer, k])}, but model.moe.num_experts={moe.num_experts}"
        )
    ordered = routing_BSLK.sort(dim=-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]).any(-1) & there_BS[:, :, None]
    if twice.any():
        b, s, layer = twice.nonzero()[0].tolist()
        raise ValueError(
            f"routing sends token {s} of sequence {b} in layer {layers[layer]} to one expert twice: "
            f"{routing_BSLK[b, s, layer].tolist()}"
        )


@dataclass(frozen=True)
class RecordedRouting:
    """The routing of N sequences, whichever layout recorded it: token s of sequence n is global token n * S + s."""

    experts_NSLK: Tensor
    """int16, the experts in the router's order; num_experts for padding."""
    tokens_NS: Tensor
    """int32, the tokens that were routed."""
    layers: list[int]
    """Of the model."""
    num_experts: int
    kept_NSLK: Tensor | None = None
    """bool, False where the assignment was dropped; None: it is not recorded, and the capacity of the pass that replays
    decides."""
    weights_NSLK: Tensor | None = None
    """fp32, the recorded gates, for whoever compares them; they are not replayed."""

    def save(self, path: Path) -> None:
        """Writes the file, atomically. Raises OSError."""
        from safetensors.torch import save_file

        given = {"experts": self.experts_NSLK, "tokens": self.tokens_NS}
        given |= {"kept": self.kept_NSLK, "weights": self.weights_NSLK}
        tensors = {name: tensor.contiguous() for name, tensor in given.items() if tensor is not None}
        facts = {"format": FORMAT, "layers": json.dumps(self.layers), "num_experts": str(self.num_experts)}
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.tmp")
        save_file(tensors, aside, facts)
        os.replace(aside, path)

    @classmethod
    def read(cls, path: Path) -> "RecordedRouting":
        """Raises ValueError if this is not a file of recorded routing."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                facts, names = file.metadata() or {}, set(file.keys())
                if facts.get("format") != FORMAT or not {"experts", "tokens"} <= names:
                    raise ValueError(
                        f"{path} is not a recorded routing: record one with launch.evaluate record_routing"
                    )
                kept, weights = (file.get_tensor(n) if n in names else None for n in ("kept", "weights"))
                experts, tokens = file.get_tensor("experts"), file.get_tensor("tokens")
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist") from None
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read as a safetensors file: {error}") from None
        if experts.dim() != 4 or tokens.shape != experts.shape[:2]:
            raise ValueError(f"{path}: experts {list(experts.shape)} and tokens {list(tokens.shape)} do not fit")
        return cls(experts, tokens, json.loads(facts["layers"]), int(facts["num_experts"]), kept, weights)

    def check(self, path: Path, model: ModelConfig, sequence_length: int) -> None:
        """Raises ValueError, naming what differs, if it is the routing of another model."""
        replayable(model)
        got = {
            "model.moe.num_experts": self.num_experts,
            "model.moe.top_k": self.experts_NSLK.shape[3],
            "sparse layers": self.layers,
            "train.sequence_length": self.experts_NSLK.shape[1],
        }
        moe = model.moe
        for (name, value), wanted in zip(
            got.items(), (moe.num_experts, moe.top_k, model.sparse_layers, sequence_length), strict=True
        ):
            if value != wanted:
                raise ValueError(f"{path} was recorded with {name} {value}, and this model has {wanted}")
        padding_NS = (self.experts_NSLK == self.num_experts)[:, :, 0, 0]
        try:
            check_routing(self.experts_NSLK, self.kept_NSLK, model, self.tokens_NS.shape, padding_NS)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


class RouterReplayRecorder:
    """Receives the choices of this rank's routers, one forward pass of the engine at a time."""

    def __init__(self, model: ModelConfig, runtime: Runtime, *, weights: bool = False):
        """Args:
        weights: whether to keep the gates, too.
        """
        replayable(model)
        self.model, self.runtime, self.weights = model, runtime, weights
        self._chosen: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def record(self, micro_batch: int, layer: int, experts_SBK: Tensor, gates_SBK: Tensor, kept_SBK: Tensor) -> None:
        # One number for both: ~expert where the assignment was dropped.
        self._chosen[micro_batch, layer] = torch.where(kept_SBK, experts_SBK, ~experts_SBK).int(), gates_SBK.float()

    def collect(self, rounds: int, micro_batch_size: int, sequence: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Puts together what the ranks have recorded since the last call. Every rank calls this together.

        Args:
            rounds: micro-batches per data-parallel rank.

        Returns:
            int16 experts [rounds * dp * B, S, L, K] on the CPU, sequences in the order of the global micro-batches;
            bool, whether each was kept, False for padding; and the gates (fp32) if there are to be any.
        """
        layers, dp = self.model.sparse_layers, self.runtime.groups.dp.size()
        size = (rounds, dp, micro_batch_size, sequence, len(layers), self.model.moe.top_k)
        experts = torch.empty(size, dtype=torch.int16)
        gates = torch.empty(size, dtype=torch.float32) if self.weights else None
        for j in range(rounds):
            for index, layer in enumerate(layers):
                chosen = self._chosen.get((j * dp + self.runtime.groups.dp.rank(), layer))
                whole = (dp, sequence, micro_batch_size, size[-1])
                for found, number, dtype in ((experts, 0, torch.int32), (gates, 1, torch.float32)):
                    if found is not None:
                        table = self._whole(whole, dtype, None if chosen is None else chosen[number])
                        found[j, :, :, :, index] = table.transpose(1, 2).to(found.dtype).cpu()
        self._chosen.clear()
        experts, kept = experts.flatten(0, 2), experts.flatten(0, 2) >= 0
        return torch.where(kept, experts, ~experts), kept, None if gates is None else gates.flatten(0, 2)

    def _whole(self, shape: tuple[int, ...], dtype: torch.dtype, mine_SBK: Tensor | None) -> Tensor:
        """[dp, S, B, K] of one layer from the shards of all ranks, which fill different parts of it."""
        groups, scattered = self.runtime.groups, self.runtime.layout.sequence_parallel
        table = torch.zeros(shape, dtype=dtype, device=self.runtime.device)
        if mine_SBK is not None and (scattered or groups.tp.rank() == 0):
            shard = table[groups.dp.rank()].chunk(groups.cp.size())[groups.cp.rank()]
            (shard.chunk(groups.tp.size())[groups.tp.rank()] if scattered else shard).copy_(mine_SBK)
        dist.all_reduce(table)
        return table
