"""A run directory with a sparse model made from a dense run's."""

import dataclasses
import shutil
from pathlib import Path

from conf import rules
from conf.commands import UpcycleConfig
from conf.config_view import format_value
from conf.override_text import command, override
from conf.schema import CheckpointConfig, Config, LoraConfig, ModelConfig, MoeConfig, ParallelConfig, RunConfig
from corpus.paths import check_exists
from corpus.tokenizer_files import COMPANION_DIR, TOKENIZER
from parallel.env import World, started_ranks
from training import hf_verify
from training.adapters import open_weights
from training.hf_runs import STEP, atomic_directory, keep_settings, model_name
from training.load_checkpoint import load_model
from training.run_dir import load_config

EXACT = (1e-5, 1e-5)
"""Bounds of hf_verify where both models compute the same in fp32."""


def upcycle(config: UpcycleConfig) -> int:
    """Writes the run of the sparse model. Returns the exit code.

    Raises:
        ValueError: the checkpoint is not of a dense model, the sizes do not divide, or `output` is taken.
    """
    from parallel.checkpoint_manifest import resolve
    from training.upcycle_weights import write_weights

    world, ranks = started_ranks()
    if world.size > 1:
        raise ValueError("start a single process, with NPROC=N to verify on N simulated ranks")
    if config.precision not in hf_verify.BOUNDS:
        raise ValueError(f"precision={config.precision} is not one of {', '.join(hf_verify.BOUNDS)}; nearest: fp32")
    check_exists("checkpoint", config.checkpoint)
    source, output = resolve(config.checkpoint), Path(config.output).expanduser()
    dense = load_config(source.parent.parent)
    _check(config, dense.model)
    run = _run_of(config, dense, output)
    rules.check(run, 1)
    rules.check_layout(dataclasses.replace(run, parallel=config.parallel), ranks)
    try:
        with atomic_directory(output) as aside:
            write_weights(config, open_weights(source, dense), aside / STEP, run.model)
            keep_settings(aside, run)
            _keep_tokenizer(source.parent.parent, aside)
            if config.verify:
                _compare(config, source, aside, run)
            else:
                print("verify=false: the converted weights were not verified")
    except hf_verify.Different as found:
        print(f"{found}: {output} is not written")
        return 1
    print(f"upcycled {source} to {_words(config)} -> {output}")
    words = [override("checkpoint.load", str(output))]
    print(
        "train on: " + command(["bash", "launch/train.sh", f"--config-dir={output}", f"model={run.model.name}"], words)
    )
    return 0


def _words(config: UpcycleConfig) -> str:
    fine = f", {config.granularity} of them a copy" if config.granularity > 1 else ""
    return f"{config.num_experts} experts a layer{fine}, top-{config.top_k}"


def _check(config: UpcycleConfig, dense: ModelConfig) -> None:
    """Raises ValueError with the rule that is broken and the nearest value that is not."""
    n = config.granularity
    if dense.moe.num_experts:
        raise ValueError(f"checkpoint={config.checkpoint} is of a sparse model; upcycling takes a dense one")
    if dense.ffn_bias:
        raise ValueError(
            f"checkpoint={config.checkpoint} has model.ffn_bias=true; upcycling takes layers without biases"
        )
    if n > 1 and dense.activation == "clamped_swiglu":
        raise ValueError(f"granularity={n} scales weights, which does not scale clamped_swiglu; nearest: 1")
    if n < 1 or dense.ffn_hidden_size % n:
        nearest = max(d for d in range(1, max(1, n) + 1) if dense.ffn_hidden_size % d == 0)
        raise ValueError(f"granularity={n} must divide ffn_hidden_size={dense.ffn_hidden_size}; nearest: {nearest}")
    for name in ("num_experts", "top_k"):
        value = getattr(config, name)
        if value < 1 or value % n:
            nearest = max(1, round(value / n)) * n
            raise ValueError(f"{name}={value} must be a multiple of granularity={n}; nearest: {name}={nearest}")
    if not config.noise >= 0:
        raise ValueError(f"noise={format_value(config.noise)} must be >= 0")


def _run_of(config: UpcycleConfig, dense: Config, output: Path) -> Config:
    n, width = config.granularity, dense.model.ffn_hidden_size
    moe = MoeConfig(
        num_experts=config.num_experts,
        ffn_hidden_size=width // n if n > 1 else None,
        top_k=config.top_k,
        every=config.every,
        first_dense_layers=config.first_dense_layers,
        renormalize=config.renormalize,
        capacity_factor=None,
        eval_capacity_factor=None,
    )
    model = dataclasses.replace(dense.model, name=model_name(output, "upcycled"), moe=moe)
    return dataclasses.replace(
        dense,
        model=model,
        checkpoint=CheckpointConfig(),
        parallel=ParallelConfig(),
        lora=LoraConfig(),
        run=RunConfig(name=model.name),
    )


def _keep_tokenizer(run_dir: Path, aside: Path) -> None:
    if (run_dir / TOKENIZER).is_file():
        shutil.copyfile(run_dir / TOKENIZER, aside / TOKENIZER)
    if (run_dir / COMPANION_DIR).is_dir():
        shutil.copytree(run_dir / COMPANION_DIR, aside / COMPANION_DIR)


def _compare(config: UpcycleConfig, dense: Path, aside: Path, run: Config) -> None:
    """Raises Different where the sparse model should compute what the dense one does, and does not."""
    from training.upcycle_weights import gates_add_up

    reference = aside / "reference.safetensors"
    text = _write_reference(config, dense, reference)
    exact = gates_add_up(run.model.moe) and not config.noise
    if not exact:
        why = "noise was added" if config.noise else "the gates of a token do not add up to 1"
        print(f"the sparse model is not equal to the dense one: {why}")
    inf = float("inf")
    bounds = (inf, inf) if not exact else EXACT if config.precision == "fp32" else hf_verify.BOUNDS["bf16"]
    comparison = hf_verify.Comparison(config, str(aside / STEP), str(reference), bounds, text)
    code = hf_verify.compare(comparison)
    reference.unlink()
    if code:
        raise hf_verify.Different("the models do not compute the same")


def _write_reference(config: UpcycleConfig, dense: Path, path: Path) -> str:
    """What the dense model computes on one rank, as hf_verify.compare reads it. Returns what the tokens are."""
    import torch
    from safetensors.torch import save_file

    here = dataclasses.replace(config, parallel=ParallelConfig())
    with load_model(str(dense), here, World()) as loaded:
        run = loaded.built.config
        ids, text = hf_verify.tokens_for(loaded.tokenizer, run.model.vocab_size, run.train.sequence_length)
        with hf_verify.outputs_kept(loaded) as kept:
            logits_SV = hf_verify.our_logits(loaded, ids)
        layers = {f"{hf_verify.LAYER}{i}": output[: len(ids)].contiguous() for i, output in kept.items()}
    save_file({**layers, hf_verify.LOGITS: logits_SV.contiguous(), hf_verify.IDS: torch.tensor(ids)}, path)
    return text
