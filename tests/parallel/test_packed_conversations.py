"""Packed conversations have the losses that each has alone, under every layout."""

from pathlib import Path

import numpy as np
import pytest
import torch

from conf.schema import DataConfig, ParallelConfig
from corpus.chat_stream import ChatStream
from corpus.conversations import FIRST_LABEL, WEIGHTS
from corpus.prepare import Source
from parallel.engine import Batch
from parallel.env import World
from tests.corpus.helpers import write_pair
from tests.parallel.helpers import SEQUENCE, VOCABULARY, Variant, build_engine, gradients, started

# Dropless and without losses of the routers, which are of a micro-batch.
MODEL = Variant(
    {"sliding_window": 6, "full_attention_every": 2},
    {"capacity_factor": None, "aux_loss_coeff": 0.0, "z_loss_coeff": 0.0},
    document_mask=True,
)
LENGTHS = [4, 13, 9, 5, 3, 17, 8, 6, 20, 7]
LAYOUTS = [{}, {"tp": 2, "sequence_parallel": True}, {"cp": 2}, {"pp": 2}, {"ep": 2}]


def write_chats(folder: Path) -> tuple[Source, list[list[int]], list[np.ndarray]]:
    """Conversations of random tokens, some longer than a sequence, with random weights that are often 0."""
    draw = np.random.default_rng(0)
    chats = [draw.integers(0, VOCABULARY, n).tolist() for n in LENGTHS]
    weights = [(draw.random(n) * (draw.random(n) < 0.6)).astype(np.float32) for n in LENGTHS]
    for w in weights:
        w[2] = 0.5
    prefix = write_pair(folder / "chats", chats)
    np.concatenate(weights).tofile(prefix + WEIGHTS)
    np.array([1 + np.flatnonzero(w[1:])[0] for w in weights], dtype=np.int32).tofile(prefix + FIRST_LABEL)
    return Source(prefix, 1.0, 0, len(chats), sum(LENGTHS)), chats, weights


def batches_of(source: Source, cache: Path, *, packing: bool) -> list[Batch]:
    """An epoch in micro-batches of one sequence."""
    data = DataConfig(kind="chat", cache_dir=str(cache), packing=packing)
    notes: list[str] = []
    stream = ChatStream(source, data, sequence_length=SEQUENCE, seed=[1], note=notes.append)
    count = int(notes[0].split(" sequences")[0].split()[-1])
    return [{name: value[None] for name, value in stream.sample(i).items()} for i in range(count)]


def alone(chats: list[list[int]], weights: list[np.ndarray]) -> list[Batch]:
    """Each conversation as a sequence of its own, written down without the stream and without padding."""
    batches = []
    for ids, weight in zip(chats, weights, strict=True):
        text = torch.tensor([ids[: SEQUENCE + 1]])
        mask = torch.from_numpy(weight[1 : SEQUENCE + 1])[None]
        at = torch.arange(text.shape[1] - 1)[None]
        batches.append({"tokens": text[:, :-1], "labels": text[:, 1:], "positions": at, "loss_mask": mask})
    return batches


def losses(
    world: World, degrees: dict, packed: list[Batch], unpacked: list[Batch], single: list[Batch] | None
) -> list[tuple[float, float, dict]]:
    """Of each way of feeding the same conversations: the summed losses of the labels, the training loss, and the
    gradients on rank 0."""
    with started(world, ParallelConfig(**degrees)) as runtime:
        engine, dp = build_engine(runtime, MODEL), runtime.layout.dp
        ways = [packed, unpacked]
        results = []
        for batches in ways:
            extra = -len(batches) % dp  # an epoch need not fill the global batch: padding alone does
            empty = {name: torch.zeros_like(value) for name, value in batches[0].items()}
            empty |= {"padding": torch.ones(1, SEQUENCE, dtype=torch.bool), "positions": torch.arange(SEQUENCE)[None]}
            mine = [*batches, *[empty] * extra][runtime.groups.dp.rank() :: dp]
            results.append((engine.evaluate(mine)[0], engine.forward_backward(mine, step=0).item(), gradients(engine)))
        if single is not None:
            # Of different lengths: one by one, and the loss is the weighted mean of theirs.
            of_each = [engine.evaluate([batch]) for batch in single]
            nats, weight = (sum(values) for values in zip(*of_each, strict=True))
            results.append((nats, nats / weight, {}))
        return results if world.rank == 0 else []


def test_packed_losses_are_those_of_each_conversation_alone(ranks, tmp_path: Path) -> None:
    source, chats, weights = write_chats(tmp_path)
    packed, unpacked = (batches_of(source, tmp_path / "cache", packing=packing) for packing in (True, False))
    assert len(packed) < len(unpacked) == len(LENGTHS)
    single = alone(chats, weights)
    wanted: list = []
    for degrees in LAYOUTS:
        size = 1 if not degrees else 2
        results = ranks.run(size, losses, degrees, packed, unpacked, single if not degrees else None, timeout=120)[0]
        wanted = wanted or results
        for nats, loss, grads in results:
            assert nats == pytest.approx(wanted[2][0], rel=1e-6), degrees
            assert loss == pytest.approx(wanted[2][1], rel=1e-6), degrees
            for name, grad in grads.items():
                assert (grad - wanted[1][2][name]).norm() <= 1e-5 * wanted[1][2][name].norm(), (degrees, name)
