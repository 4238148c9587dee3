"""The run directory: its name, its configuration, and whether a run may go on in it."""

import dataclasses
import os
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig

from conf.schema import Config

CONFIG = "config.yaml"
TOKENIZER = "tokenizer.json"
# Settings under `model.` that may change between two lives of a run: they change how it is computed or trained, not
# what the saved weights mean.
_MAY_CHANGE = {
    "model.name",
    "model.init_scale",
    "model.moe.capacity_factor",
    "model.moe.eval_capacity_factor",
    "model.moe.aux_loss_coeff",
    "model.moe.z_loss_coeff",
    "model.moe.drop_policy",
    "model.moe.jitter",
    "model.moe.backend",
    "model.moe.dispatcher",
    "model.moe.pad_to_capacity",
    "model.moe.expert_dropout",
    "model.moe.expert_chunk_rows",
}


@dataclass(frozen=True)
class RunDir:
    """An opened run directory."""

    path: Path
    created: bool
    """It did not exist before."""
    continued: bool
    """It holds checkpoints of an earlier life."""
    changed: list[str]
    """`key: old -> new` for settings that differ from the earlier life's."""
    overrides: list[str]
    """What the command line said."""

    def command(self, steps: int) -> str:
        """The command that takes this run on to another number of steps."""
        kept = [o for o in self.overrides if o.split("=")[0] not in ("run.dir", "train.steps", "train.stop_after")]
        words = [*kept, f"run.dir={self.path}", f"train.steps={steps}"]
        ranks = f"NPROC={os.environ['NPROC']} " if "NPROC" in os.environ else ""
        return f"{ranks}bash launch/train.sh {shlex.join(words)}"

    def adopt(self, config: Config, tokenizer: str | None) -> None:
        """Keeps the configuration, and the tokenizer, so that checkpoints can be evaluated and write text wherever the
        directory is moved.

        Raises:
            ValueError: the run was trained with another tokenizer: its token ids mean other text.
        """
        if tokenizer:
            kept = self.path / TOKENIZER
            if kept.exists() and kept.read_bytes() != Path(tokenizer).read_bytes():
                raise ValueError(
                    f"the data's tokenizer {tokenizer} is not the one that this run was trained with ({kept}). "
                    f"Set data.tokenizer={kept}, or choose another run.dir"
                )
            _write_whole(kept, Path(tokenizer).read_bytes())
        _write_whole(self.path / CONFIG, yaml.safe_dump(dataclasses.asdict(config), sort_keys=False).encode())

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"


def default_name(config: Config, env: Mapping[str, str] = os.environ) -> str:
    """NAME-<array job and task, or job, or timestamp>."""
    name = config.run.name or config.model.name
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"{name}-{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return f"{name}-{env.get('SLURM_JOB_ID') or time.strftime('%Y%m%d-%H%M%S')}"


def expected_path(config: Config, env: Mapping[str, str] = os.environ) -> Path:
    """Where a run is kept, unless another of the same second is there."""
    return Path(config.run.dir).expanduser() if config.run.dir else Path("runs") / default_name(config, env)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """{key: "old -> new"}; a key that only one side has belongs to another version and is left out."""
    old, new = flatten(old), flatten(new)
    both = [key for key in new if key in old and not key.startswith("run.")]
    return {key: f"{old[key]} -> {new[key]}" for key in both if old[key] != new[key]}


def open_run_dir(config: Config, env: Mapping[str, str] = os.environ) -> RunDir:
    """Makes or reopens the run directory. One process of a run calls this, and `adopt` once the data is known.

    Raises:
        ValueError: it cannot be written, or holds a run of another model.
    """
    path = expected_path(config, env)
    path = path if config.run.dir else _fresh(path, env)
    created = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(f"Permission denied: '{path}'")
    except OSError as error:
        raise ValueError(f"run.dir={path} cannot be written: {error}") from None
    continued = any((path / "checkpoints").glob("step_*"))
    changed: dict[str, str] = {}
    if continued:
        if not config.checkpoint.resume:
            raise ValueError(f"run.dir={path} holds checkpoints and checkpoint.resume is false. Choose another run.dir")
        changed = _differences(read_settings(path), dataclasses.asdict(config))
        fatal = [f"{k}: {v}" for k, v in changed.items() if k.startswith("model.") and k not in _MAY_CHANGE]
        if fatal:
            raise ValueError(
                f"run.dir={path} holds a run of another model ({'; '.join(fatal)}). "
                "Restore these settings or choose another run.dir"
            )
    overrides = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    return RunDir(path, created, continued, [f"{key}: {change}" for key, change in changed.items()], overrides)


def _write_whole(path: Path, content: bytes) -> None:
    """Written aside and renamed: a reader never sees half of it."""
    aside = path.with_name(f".{path.name}.writing")
    aside.write_bytes(content)
    aside.rename(path)


def _fresh(path: Path, env: Mapping[str, str]) -> Path:
    """The path, or with -2, -3, ... appended the first that does not exist: runs of one second stay apart. A job's
    directory is meant to be found again."""
    if "SLURM_JOB_ID" in env:
        return path
    candidates = (path if n == 1 else path.with_name(f"{path.name}-{n}") for n in range(1, 10_000))
    return next(p for p in candidates if not p.exists())


def read_settings(path: Path) -> dict[str, Any]:
    """The configuration that a run directory was trained with, as it was written.

    Raises:
        ValueError: not a run directory.
    """
    try:
        settings = yaml.safe_load((path / CONFIG).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not a run directory: {CONFIG}: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is not a run directory: {CONFIG} holds no settings")
    return settings


def load_config(path: Path) -> Config:
    """The configuration that a run directory was trained with: what later commands need of it.

    Raises:
        ValueError: not a run directory, or of a version with other settings.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), read_settings(path)))
    except OmegaConfBaseException as error:
        raise ValueError(f"{path / CONFIG} does not fit this version: {error}") from None
