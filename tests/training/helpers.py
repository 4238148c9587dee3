"""Whole runs of a tiny model on a tiny text, in rank processes of the pool or as commands."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from conf import rules
from conf.preference_schema import sequences_per_prompt
from conf.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    MoeConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from corpus.blend_epochs import with_quotas
from corpus.prepare import prepare
from parallel.env import World
from training.run_dir import open_run_dir
from training.worker import train_rank

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {
    "model.num_layers": 2,
    "model.hidden_size": 32,
    "model.num_attention_heads": 4,
    "model.ffn_hidden_size": 48,
    "model.vocab_size": 320,
    "model.moe.num_experts": 4,
    "train.sequence_length": 32,
    "train.micro_batch_size": 2,
    "train.global_batch_size": 8,
    "eval.sample_tokens": 8,
    "optim.warmup_steps": 4,
    # As in the schema, whatever the preset says.
    "optim.lr": 2e-3,
    "model.embedding_multiplier": 1.0,
    "model.init_scale": 0.1,
    "model.qk_norm": "null",
    "model.moe.aux_loss_coeff": 0.01,
    "model.moe.router_init_scale": "null",
}


def write_corpus(folder: Path) -> Path:
    """Sentences with some structure to learn, in several documents."""
    path = folder / "text.jsonl"
    subjects, verbs, objects = ("cat", "dog", "router", "expert"), ("sees", "takes", "drops"), ("a token", "the ball")
    with path.open("w") as file:
        for n in range(400):
            words = (f"The {subjects[i % 4]} {verbs[i * n % 3]} {objects[(i + n) % 2]}." for i in range(n % 13 + 3))
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
    return path


def tiny_config(corpus: Path, run_dir: Path, **train: Any) -> Config:
    """fp32 and deterministic. Keyword arguments go to TrainConfig."""
    return Config(
        model=ModelConfig(
            name="tiny",
            num_layers=2,
            hidden_size=32,
            ffn_hidden_size=48,
            vocab_size=320,
            moe=MoeConfig(num_experts=4, every=2),
        ),
        data=DataConfig(kind="text", files=[str(corpus)], cache_dir=str(corpus.parent / "cache"), valid_fraction=0.05),
        train=replace(
            TrainConfig(steps=20, micro_batch_size=2, global_batch_size=8, sequence_length=32, deterministic=True),
            **train,
        ),
        optim=OptimConfig(warmup_steps=4),
        eval=EvalConfig(every=0, sample_tokens=8),
        checkpoint=CheckpointConfig(every=0),
        run=RunConfig(dir=str(run_dir)),
        precision="fp32",
    )


def train(world: World, config: Config) -> int:
    """One rank of a run; every rank calls it (rank function for the pool). Returns the exit code."""
    rules.check(config, world.size)
    prepared = prepare(
        config.data,
        vocab_size=config.model.vocab_size,
        sequence_length=config.train.sequence_length,
        max_responses=sequences_per_prompt(config.train.objective, config.preference),
    )
    prepared = with_quotas(prepared, config)
    # As under a launcher: rank 0 opens the directory for all.
    run_dir = open_run_dir(config) if world.size == 1 else None
    if run_dir:
        run_dir.adopt(config, prepared.tokenizer)
    return train_rank(world, config, run_dir, prepared)


def with_layout(config: Config, **degrees: Any) -> Config:
    return replace(config, parallel=ParallelConfig(**degrees))


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """The training rows of metrics.jsonl."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def trajectory(run_dir: Path) -> list[tuple[Any, ...]]:
    """What must be equal bit for bit between two runs, step by step."""
    keys = ("step", "loss", "lr", "grad_norm", "tokens", "aux_loss", "z_loss", "dropped_fraction", "router_entropy")
    return [tuple(row[key] for key in keys) for row in rows(run_dir)]


def command_line(corpus: Path, run_dir: Path, *overrides: str) -> list[str]:
    """`python -m launch.train` with the settings of tiny_config."""
    given = {
        **SHAPE,
        "model.moe.every": 2,
        "data": "text",
        "data.files": f"[{corpus}]",
        "data.cache_dir": corpus.parent / "cache",
        "data.valid_fraction": 0.05,
        "train.steps": 20,
        "train.deterministic": "true",
        "eval.every": 0,
        "checkpoint.every": 0,
        "run.dir": run_dir,
        "precision": "fp32",
    }
    shown = dict(item.split("=", 1) for item in overrides)
    return [sys.executable, "-m", "launch.train", *(f"{k}={v}" for k, v in {**given, **shown}.items())]


def start(command: list[str], **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
