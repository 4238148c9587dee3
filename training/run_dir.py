"""The run directory: its name, its recorded configuration, and whether a run may be resumed in it."""

import contextlib
import dataclasses
import errno
import fcntl
import itertools
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig

from conf.blend_plan import refused_change
from conf.config_view import ConfigView
from conf.limits import has_chats
from conf.override_text import command, override, setting
from conf.schema import Config
from corpus.chat_template import DEFAULT_NAME, ChatTemplate
from corpus.prepare import Prepared
from corpus.tokenizer_files import CHAT_TEMPLATE, COMPANION_DIR, TOKENIZER, companions
from training.compatibility import describe_changes, differences, model_differences, overrides_to_restore
from training.requeue import Ownership
from training.run_files import EXPERT_LOAD, METRICS, write_atomically
from training.sweep import name_in_sweep

CONFIG = "config.yaml"
DATA = "data.json"


@dataclass(frozen=True)
class RunDir:
    """An opened run directory."""

    path: Path
    created: bool
    """Whether it was created by this start."""
    continued: bool
    """Whether it holds checkpoints of an earlier attempt."""
    changed: list[str]
    """`key: old -> new` for settings that differ from those of the earlier attempt."""
    overrides: list[str]
    """The overrides on the command line."""

    def command(self, steps: int, more: Sequence[str] = ()) -> str:
        """The command that continues this run to another number of steps, with further overrides."""
        replaced = {"run.dir", "train.steps", "train.stop_after", "checkpoint.resume"}  # false would refuse run.dir
        replaced |= {word.partition("=")[0] for word in more}
        kept = [o for o in self.overrides if o.split("=")[0].lstrip("+") not in replaced]
        words = [*kept, override("run.dir", str(self.path)), override("train.steps", steps), *more]
        ranks = {"NPROC": os.environ["NPROC"]} if "NPROC" in os.environ else {}
        return command(["bash", "launch/train.sh"], words, ranks)

    def adopt(self, config: Config, tokenizer: str | None) -> None:
        """Keeps the configuration and the tokenizer of a new run, so that checkpoints can be evaluated and write text
        wherever the directory is moved. Those of an existing run are left as they are until `keep_settings`.

        Raises:
            ValueError: the run was trained with another tokenizer: its token ids mean other text; or the directory
                cannot be written.
        """
        with self._explained():
            self.path.mkdir(parents=True, exist_ok=True)  # another start that failed may have removed it, still empty
            self._check_tokenizer(tokenizer)
            if not (self.path / CONFIG).exists():
                self._keep(config, tokenizer)

    def take_over(self, tokenizer: str | None) -> Ownership:
        """Makes this process the only writer; of several processes that start at the same time, the last one. Arguments
        and errors as for `adopt`."""
        with self._explained(), _locked(self.path / ".lock"):
            self._check_tokenizer(tokenizer)
            return Ownership(self.path)

    def keep_settings(self, owner: Ownership, config: Config, prepared: Prepared) -> None:
        """Records the settings, the tokenizer and the data of a run that has restored its checkpoint, unless another
        process has taken over the directory."""
        with self._explained(), _locked(self.path / ".lock"):
            if owner.holds():
                self._keep(config, prepared.tokenizer)
                write_atomically(self.path / DATA, (prepared.to_json() + "\n").encode())

    def changed_data(self, prepared: Prepared) -> str | None:
        """How the data differ from those that the run was trained on: files with the same path may have changed. None:
        they do not differ, or it is unknown."""
        try:
            before = Prepared.from_json((self.path / DATA).read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):  # torn, or another version's
            return None
        if before.key == prepared.key:
            return None
        known = {(source.sha256, source.num_documents) for source in (*before.train, *before.valid)}
        others = [s for s in (*prepared.train, *prepared.valid) if (s.sha256, s.num_documents) not in known]
        tokens = [sum(source.num_tokens for source in data.train) for data in (before, prepared)]
        what = (
            f"other token files: {', '.join(s.prefix for s in others)}" if others else "other weights or another order"
        )
        return f"{what} ({tokens[0]} -> {tokens[1]} tokens to train on)"

    def discard(self) -> None:
        """Removes the directory after a failed start, if this process has created it and it is empty."""
        if self.created:
            with contextlib.suppress(OSError):
                self.path.rmdir()

    def _keep(self, config: Config, tokenizer: str | None) -> None:
        if tokenizer:
            write_atomically(self.path / TOKENIZER, Path(tokenizer).read_bytes())
            for file in companions(tokenizer):
                (self.path / COMPANION_DIR).mkdir(exist_ok=True)
                write_atomically(self.path / COMPANION_DIR / file.name, file.read_bytes())
            if has_chats(ConfigView(config, 1)):
                # Also the default one, so that an export and lm-eval have it.
                template = ChatTemplate.of_data(config.data, tokenizer)
                if config.data.chat_template is not None or template.name == DEFAULT_NAME:
                    (self.path / COMPANION_DIR).mkdir(exist_ok=True)
                    write_atomically(self.path / COMPANION_DIR / CHAT_TEMPLATE, template.source.encode())
        write_atomically(self.path / CONFIG, yaml.safe_dump(dataclasses.asdict(config), sort_keys=False).encode())

    def _check_tokenizer(self, tokenizer: str | None) -> None:
        kept = self.path / TOKENIZER
        if tokenizer and kept.exists() and kept.read_bytes() != Path(tokenizer).read_bytes():
            raise ValueError(
                f"the data's tokenizer {tokenizer} is not the one that this run was trained with ({kept}). "
                f"Set {setting('data.tokenizer', str(kept))}, or choose another run.dir"
            )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ValueError(f"run.dir={self.path} cannot be written: {error}") from None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"


def default_name(config: Config, env: Mapping[str, str] = os.environ) -> str:
    """NAME-<array job and task, or job, or timestamp>; in a sweep NAME-SWEPT-..., with SWEPT as lr=0.001,top_k=2."""
    name = "-".join(filter(None, (config.run.name or config.model.name, name_in_sweep())))
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"{name}-{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return f"{name}-{env.get('SLURM_JOB_ID') or time.strftime('%Y%m%d-%H%M%S')}"


def expected_path(config: Config, env: Mapping[str, str] = os.environ) -> Path:
    """The run directory, unless another run of the same second has that name."""
    return Path(config.run.dir).expanduser() if config.run.dir else Path("runs") / default_name(config, env)


def open_run_dir(config: Config, env: Mapping[str, str] = os.environ) -> RunDir:
    """Creates or reopens the run directory. One process of a run calls this, and `adopt` after the data are prepared.

    Raises:
        ValueError: it cannot be written, or holds a run of another model.
    """
    try:
        path, created = _make(config, env)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(f"Permission denied: '{path}'")
    except OSError as error:
        raise ValueError(f"run.dir={expected_path(config, env)} cannot be written: {error}") from None
    steps = checkpoint_dirs(path)
    _check_access(path, steps)
    continued = bool(steps)
    changed: list[str] = []
    if continued:
        if not config.checkpoint.resume:
            raise ValueError(f"run.dir={path} holds checkpoints and checkpoint.resume is false. Choose another run.dir")
        old, new = read_settings(path), dataclasses.asdict(config)
        if fatal := model_differences(old, new):
            raise ValueError(
                f"run.dir={path} holds a run of another model ({describe_changes(fatal)}). "
                f"Restore these settings ({overrides_to_restore(fatal)}), or choose another run.dir"
            )
        if frozen := {k: v for k, v in differences(old, new).items() if k == "optim.frozen"}:
            raise ValueError(
                f"run.dir={path} has optimizer states of other parameters ({describe_changes(frozen)}). Restore "
                f"this setting ({overrides_to_restore(frozen)}), or start another run with checkpoint.load={path}"
            )
        if lora := {k: v for k, v in differences(old, new).items() if k.startswith("lora.") and k != "lora.dropout"}:
            raise ValueError(
                f"run.dir={path} has other adapters, or none ({describe_changes(lora)}). Restore "
                f"{'this setting' if len(lora) == 1 else 'these settings'} ({overrides_to_restore(lora)}), or choose "
                "another run.dir"
            )
        if name := {k: v for k, v in differences(old, new).items() if k == "optim.name"}:
            raise ValueError(
                f"run.dir={path} has the states of another optimizer ({describe_changes(name)}). Restore this setting "
                f"({overrides_to_restore(name)}), or start another run with checkpoint.load={path}"
            )
        if refused := refused_change(old, config, int(steps[-1].name.removeprefix("step_"))):
            raise ValueError(f"run.dir={path}: {refused}")
        changed = [describe_changes({k: v}) for k, v in differences(old, new).items() if not k.startswith("run.")]
    return RunDir(path, created, continued, changed, _typed())


def _typed() -> list[str]:
    """The arguments on the command line: directories of presets, then overrides."""
    if not HydraConfig.initialized():
        return []
    hydra = HydraConfig.get()
    folders = [f"--config-dir={s.path}" for s in hydra.runtime.config_sources if s.provider == "command-line"]
    searched = [word for word in hydra.overrides.hydra if word.partition("=")[0].lstrip("+") == "hydra.searchpath"]
    return [*folders, *searched, *hydra.overrides.task]


def _make(config: Config, env: Mapping[str, str]) -> tuple[Path, bool]:
    """(the run directory, whether this call created it). Without run.dir, -2, -3, ... is appended until the name is
    new, since several runs may start in the same second. In a Slurm job the directory is reused after a restart."""
    path = expected_path(config, env)
    path.parent.mkdir(parents=True, exist_ok=True)
    named = config.run.dir or "SLURM_JOB_ID" in env
    for n in itertools.count(1):
        candidate = path if n == 1 else path.with_name(f"{path.name}-{n}")
        try:
            candidate.mkdir()
            return candidate, True
        except FileExistsError:
            if named and candidate.is_dir():
                return candidate, False
            if named:
                raise
    raise AssertionError("unreachable")


def checkpoint_dirs(path: Path) -> list[Path]:
    """The checkpoints in a run directory, oldest first, without verifying them.

    Raises:
        ValueError: the directory of checkpoints cannot be read.
    """
    root = path / "checkpoints"
    try:
        return sorted(root / name for name in os.listdir(root) if re.fullmatch(r"step_\d{8}", name))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ValueError(f"the checkpoints of {path} cannot be read: {error}") from None


def _check_access(path: Path, steps: list[Path]) -> None:
    """Checks the permissions of all files that a start reads or writes, before it changes any. Raises ValueError."""
    read, write, enter = os.R_OK, os.W_OK, os.X_OK
    needed = {path / CONFIG: read, path / "train.log": write}
    needed |= dict.fromkeys((path / METRICS, path / EXPERT_LOAD), read | write)
    needed |= {path / "checkpoints": read | write | enter}
    needed |= {step: read | enter for step in steps if step.is_dir()}  # what is not one is damage, found later
    for name, mode in needed.items():
        if name.exists() and not os.access(name, mode):
            raise ValueError(f"run.dir={path}: permission denied: {name}")


_LOCK_PATIENCE = 30.0
"""Seconds that a start waits for another process that is writing a few small files."""


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Context manager for an exclusive lock. File systems without locks are used without: files are written atomically,
    and there is one owner.

    Raises:
        ValueError: another process holds the lock.
    """
    with path.open("w") as lock:
        deadline = time.monotonic() + _LOCK_PATIENCE
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno != errno.EWOULDBLOCK:
                    break
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"another process has kept {path} locked for {_LOCK_PATIENCE:.0f} s (frozen?): end it "
                        f"(fuser {path}), or choose another run.dir"
                    ) from None
                time.sleep(0.05)
            else:
                break
        yield  # closing the file releases the lock


def read_settings(path: Path) -> dict[str, Any]:
    """The recorded configuration of a run directory, as a dictionary.

    Raises:
        ValueError: not a run directory.
    """
    try:
        settings = yaml.safe_load((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not a run directory: {CONFIG}: {error}") from None
    except RecursionError:
        raise ValueError(f"{path} is not a run directory: {CONFIG} is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path / CONFIG} is not UTF-8 text: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is not a run directory: {CONFIG} holds no settings")
    return settings


def load_config(path: Path) -> Config:
    """The recorded configuration of a run directory.

    Raises:
        ValueError: not a run directory, or it was written by a version with other settings.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), read_settings(path)))
    except OmegaConfBaseException as error:
        raise ValueError(f"{path / CONFIG} does not fit this version: {error}") from None
