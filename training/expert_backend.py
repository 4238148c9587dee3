"""Which backend the experts of a run take: asked for, ruled, remembered or measured, and the same on every rank."""

import json
import platform
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist

from conf.schema import Config, ModelConfig
from corpus.cache import Cache, ReadOnlyCache
from moe.experts import BACKENDS, available_backends, choose_backend, native_left_out
from ops.autotune import Shapes, TooSlow, measure
from parallel.process_groups import Runtime
from training.run_files import json_lines, write_atomically

FILE = "expert_backend.json"
WORTH = 0.95
"""A backend is taken for its speed when it needs at most this share of the ruled one's time: a smaller difference may
be noise, and the ruled one keeps less for the backward pass."""


def choose(config: Config, run: Runtime, dtype: torch.dtype, run_dir: Path | None) -> tuple[str, str]:
    """(backend, why). Backends round differently: what was once measured is kept, in run_dir for the run and in the
    cache for others of the same shapes on such a machine.

    Args:
        run_dir: where the run is or will be kept; None: not a training run.

    Raises:
        ValueError: the one asked for cannot run here.
    """
    # As a rank sees it: what must be aligned is its slice of an expert.
    moe = replace(config.model.moe, ffn_hidden_size=config.model.expert_width // run.layout.etp)
    model = replace(config.model, moe=moe)
    if model.moe.backend != "auto":
        return choose_backend(model, run.device, dtype)
    names = _available_everywhere(model, run.device, dtype)
    answer = [_decide(config, run, dtype, run_dir, names) if run.world.rank == 0 else None]
    dist.broadcast_object_list(answer)
    assert answer[0] is not None
    backend, why = answer[0]
    missing = native_left_out(names, run.device, dtype)
    return backend, f"{why}; native {missing}" if missing else why


def tells_of_a_failure(why: str) -> bool:
    """Whether the words of `choose` say that a backend which is made for this device cannot be used."""
    return " failed" in why or "; native " in why


def _available_everywhere(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Nodes may differ in what they have."""
    mine = available_backends(model, device, dtype)
    everyone: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return [name for name in mine if all(name in names for names in everyone)]


def remember(config: Config, run_dir: Path, backend: str | None) -> None:
    """For the run's next life. None: this one had no use for a backend."""
    if backend and config.model.moe.backend == "auto":
        write_atomically(run_dir / FILE, json.dumps({"backend": backend}).encode())


def shapes_of(config: Config, run: Runtime, dtype: torch.dtype) -> Shapes:
    model, layout, train = config.model, run.layout, config.train
    tokens = train.micro_batch_size * train.sequence_length // (layout.cp * layout.tp)
    return Shapes(
        rows=tokens * model.moe.top_k * layout.etp,
        hidden_size=model.hidden_size,
        width=model.expert_width // layout.etp,
        experts=model.moe.num_experts // layout.ep,
        activation=model.activation,
        bias=model.moe.expert_bias,
        dtype=str(dtype).removeprefix("torch."),
    )


def _decide(
    config: Config, run: Runtime, dtype: torch.dtype, run_dir: Path | None, names: list[str]
) -> tuple[str, str]:
    ruled, why = choose_backend(config.model, run.device, dtype, names)
    if run_dir is None:
        return ruled, why
    if config.train.deterministic:
        return ruled, f"{why}; not measured, since train.deterministic=true takes what the rule says"
    for kept in json_lines(run_dir / FILE):
        if (backend := kept.get("backend")) in names:
            return backend, "as before in this run"
    shapes, fresh = shapes_of(config, run, dtype), False

    def build(folder: Path) -> None:
        nonlocal fresh
        fresh = True
        (folder / FILE).write_text(json.dumps(measure({name: BACKENDS[name] for name in names}, shapes, run.device)))

    machine = {"device": _device_name(run.device), "threads": torch.get_num_threads(), "torch": torch.__version__}
    key = machine | asdict(shapes) | {"names": names}
    try:
        try:
            entry = Cache(config.data.cache_dir).entry("expert_backends", key, build)
            seconds = json.loads((entry / FILE).read_text())
        except ReadOnlyCache:
            fresh, seconds = True, measure({name: BACKENDS[name] for name in names}, shapes, run.device)
    except TooSlow as error:
        return ruled, f"by rule; not measured: {error}"
    best = min(seconds, key=seconds.__getitem__)
    even = ruled in seconds and seconds[best] > WORTH * seconds[ruled]
    told = ", ".join(f"{name} {s * 1e3:.1f} ms" for name, s in sorted(seconds.items(), key=lambda item: item[1]))
    told += "".join(f", {name} failed" for name in names if name not in seconds)
    if even and best != ruled:
        best, told = ruled, f"{told}; {ruled} is as fast, within noise"
    return best, f"measured{'' if fresh else ' before'}: {told}"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.cpu.get_capabilities().get("cpu_name") or platform.machine()
