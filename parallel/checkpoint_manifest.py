"""The manifest of a checkpoint, the verification of a checkpoint against it, and the search for checkpoints."""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from parallel.checkpoint_format import (
    CheckpointDamaged,
    StoredTensor,
    TensorFile,
    TensorShard,
    digest,
    new_digest,
    read_tensors,
)

MANIFEST = "manifest.json"
FORMAT, _READ = 3, (2, 3)
"""Version of the format, and those that are read. Version 1 used torch.distributed.checkpoint's files, which hold
pickled objects; in version 2 the digest of a file was that of its bytes, the manifest listed random states, and there
was no data_order."""
COUNTERS = ("step", "samples", "tokens", "updates", "world_size")
"""The training loop's counters that a checkpoint stores."""
OPTIONAL_COUNTERS = ("data_order",)
"""Those that a checkpoint may lack. data_order: the version of the order in which the run takes its samples; absent
where it is 1, the only one of format 2."""
DATA_ORDER = 2
"""The order of a new run. 2: computed by keyed permutations (corpus/epochs.py). 1: corpus/megatron_order.py."""
UPDATES = "optimizer.updates"
"""A tensor of one element: the optimizer's own count of updates."""
Loaded = TypeVar("Loaded")
Manifest = dict[str, Any]
"""What `read_manifest` returns."""
_STEP = re.compile(r"step_(\d{8})$")


class UnsupportedVersion(ValueError):
    """The checkpoint was written by another version, in a format that this version does not read."""


def step_of(directory: Path) -> int | None:
    """The step in the name of a checkpoint directory; None: the name is not a checkpoint's."""
    match = _STEP.match(directory.name)
    return int(match[1]) if match else None


def step_directories(root: Path) -> list[Path]:
    """The checkpoints in a run's checkpoints directory, newest first, without verifying them.

    Raises:
        ValueError: the directory cannot be read.
    """
    try:
        names = os.listdir(root)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ValueError(f"the checkpoints in {root} cannot be read: {error}") from None
    return sorted((root / name for name in names if _STEP.match(name)), key=lambda p: p.name, reverse=True)


def set_aside(directory: Path) -> Path:
    """Renames a damaged checkpoint, so that it is neither loaded nor counted, and returns the new path."""
    candidates = (f"damaged-{directory.name}{f'-{n}' if n > 1 else ''}" for n in range(1, 10_000))
    aside = next(path for name in candidates if not (path := directory.with_name(name)).exists())
    os.rename(directory, aside)
    return aside


def _digest_of(manifest: Manifest) -> str:
    """The hash of a manifest's content. Every format has one, so that damage is told apart from another version."""
    return _digest_of_text(_as_text({key: value for key, value in manifest.items() if key != "digest"}))


def _as_text(said: Manifest) -> str:
    return json.dumps(said, sort_keys=True, separators=(",", ":"))


def _digest_of_text(text: str) -> str:
    found = new_digest()
    found.update(text.encode())
    return found.hexdigest()


def write_manifest(
    directory: Path,
    state: dict[str, int],
    files: dict[str, list[Any]],
    tensors: dict[str, StoredTensor],
    base: dict[str, str] | None = None,
) -> None:
    """Args:
    state: the training loop's COUNTERS, and some of OPTIONAL_COUNTERS.
    files: {name: [bytes, digest]}.
    base: of adapters, {"path": of the checkpoint that they were trained for, "digest": of its manifest}.
    """
    shards = {
        name: {"shape": [*t.shape], "boxes": [[b.file, [*b.offset], [*b.size]] for b in t.shards]}
        for name, t in sorted(tensors.items())
    }
    said = {"format": FORMAT, "state": state, "files": files, "tensors": shards}
    said |= {"base": base} if base else {}
    text = _as_text(said)  # once, without indentation, which would take many times as long
    with (directory / MANIFEST).open("w") as file:
        file.write(f'{text[:-1]},"digest":"{_digest_of_text(text)}"}}')
        file.flush()
        os.fsync(file.fileno())


def read_manifest(directory: Path) -> Manifest:
    """{"state": the loop's counters, "files": {name: [bytes, digest]}, "tensors": {name: StoredTensor},
    "base": as `write_manifest` takes it}.

    Raises:
        CheckpointDamaged: the manifest is missing, unreadable or changed.
        UnsupportedVersion: it is in a format that this version does not read.
    """
    try:
        if not (directory / MANIFEST).is_file():  # reading a named pipe would block
            raise FileNotFoundError("there is no such file")
        manifest = json.loads((directory / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointDamaged(f"{directory} is not a complete checkpoint: {MANIFEST}: {error}") from None
    try:
        return _understood(manifest)
    except CheckpointDamaged as error:
        raise CheckpointDamaged(f"{directory} is not a complete checkpoint: {MANIFEST} {error}") from None
    except UnsupportedVersion as error:
        raise UnsupportedVersion(f"{directory} {error}") from None


def read_manifest_together(directory: Path) -> Manifest:
    """As `read_manifest`, with rank 0 reading for all ranks. Errors are raised on all. Every rank calls this
    together."""
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            answer[0] = read_manifest(directory)
        except (CheckpointDamaged, UnsupportedVersion) as error:
            answer[0] = error
    dist.broadcast_object_list(answer)
    if isinstance(answer[0], ValueError):
        raise answer[0]
    return answer[0]


def _understood(manifest: Any) -> Manifest:
    if not isinstance(manifest, dict):
        raise CheckpointDamaged("holds no JSON object")
    version = manifest.get("format")
    if "digest" in manifest and manifest["digest"] != _digest_of(manifest):
        raise CheckpointDamaged("has changed since it was written")
    if isinstance(version, int) and version > FORMAT:
        raise UnsupportedVersion(
            f"was written by a newer version of Switchyard (format {version}; this one reads {FORMAT}). "
            "Continue with that version, or choose another run.dir"
        )
    if version is None and all(isinstance(manifest.get(key), dict) for key in ("state", "files")):
        raise UnsupportedVersion(
            "was written by an earlier version of Switchyard (format 1), whose files hold pickled Python objects; "
            f"this version reads formats {_READ[0]} to {FORMAT}. Continue with that version, or choose another run.dir"
        )
    if version not in _READ or "digest" not in manifest:
        raise CheckpointDamaged("has no format version and no hash")
    try:
        state, files = manifest["state"], manifest["files"]
        tensors = {
            name: StoredTensor(
                tuple(entry["shape"]),
                [TensorShard(file, tuple(offset), tuple(size)) for file, offset, size in entry["boxes"]],
            )
            for name, entry in manifest["tensors"].items()
        }
        wrong = _wrong(state, files, tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointDamaged(f"does not follow format {version}: {error!r}") from None
    if wrong:
        raise CheckpointDamaged(wrong)
    return {"state": state, "files": files, "tensors": tensors, "base": manifest.get("base")}


def _wrong(state: dict[str, Any], files: dict[str, Any], tensors: dict[str, StoredTensor]) -> str | None:
    """The first impossible value in a well-formed manifest; None: there is none."""
    for counter in [*state, *COUNTERS]:
        if counter not in state or counter not in (*COUNTERS, *OPTIONAL_COUNTERS):
            return f"has {'no' if counter in COUNTERS else 'an unknown'} counter {counter}"
        if type(state[counter]) is not int or state[counter] < 0:
            return f"counts {state[counter]!r} for {counter}"
    for name, (size, _) in files.items():
        if Path(name).name != name or name == MANIFEST or type(size) is not int:
            return f"lists the file {name!r}"
    for name, tensor in tensors.items():
        for shard in tensor.shards:
            sides = zip(shard.offset, shard.size, tensor.shape, strict=True)
            if shard.file not in files or any(a < 0 or n < 0 or a + n > m for a, n, m in sides):
                return f"has no place for a part of {name}"
    return None


def verify(directory: Path, rank: int = 0, ranks: int = 1, *, but_tensors: bool = False) -> Iterator[int]:
    """Verifies a checkpoint against its manifest. With several ranks each hashes a part of the files, and the caller
    gathers the results. Yields the number of bytes of each piece that was read; returns None, or the error as a
    CheckpointDamaged or UnsupportedVersion.

    Args:
        but_tensors: of files with digests of their tensors, hash the header alone: `read_tensors` hashes the tensors
            when it reads them. Files of earlier versions are hashed.
    """
    try:
        manifest = read_manifest(directory)
        files = manifest["files"]
        if rank == 0:
            _check_list(directory, files)
        for name in sorted(files)[rank::ranks]:
            yield from _check_file(directory / name, *files[name], but_tensors=but_tensors)
        if rank == 0:
            yield from _check_counters(directory, manifest)
    except (CheckpointDamaged, UnsupportedVersion) as error:
        return error
    return None


def _check_file(path: Path, size: int, wanted: str, *, but_tensors: bool) -> Iterator[int]:
    try:
        if not path.is_file():
            raise CheckpointDamaged(f"{path.name} is missing")
        if path.stat().st_size != size:
            raise CheckpointDamaged(f"{path.name} has {path.stat().st_size} bytes instead of {size}")
        if but_tensors and _header_is(path, wanted):
            yield 0
        elif (yield from digest(path)) != wanted:
            raise CheckpointDamaged(f"{path.name} has changed since it was written")
    except OSError as error:
        raise CheckpointDamaged(f"{path.name} cannot be read: {error}") from None


def _header_is(path: Path, wanted: str) -> bool:
    """Whether a file's header has the digests of its tensors, and this digest itself."""
    try:
        with TensorFile(path) as file:
            return file.digests is not None and file.header_digest == wanted
    except CheckpointDamaged:
        return False


def _check_list(directory: Path, files: dict[str, Any]) -> None:
    try:
        # Hidden files belong to the file system, such as .nfs0001; nothing reads them.
        extra = sorted(n for n in os.listdir(directory) if n not in files and n != MANIFEST and not n.startswith("."))
    except OSError as error:
        raise CheckpointDamaged(f"cannot be read: {error}") from None
    if extra:
        raise CheckpointDamaged(f"{extra[0]} is not listed in {MANIFEST}")


def _check_counters(directory: Path, manifest: Manifest) -> Iterator[int]:
    """Compares the counters with the directory's name and with the optimizer's own count."""
    state, updates = manifest["state"], torch.zeros(1, dtype=torch.int64)
    if state["step"] != step_of(directory):
        raise CheckpointDamaged(f"{MANIFEST} is of step {state['step']}")
    yield from read_tensors(directory, manifest["tensors"], {UPDATES: (updates, (0,))}, manifest["files"])
    if updates.item() != state["updates"]:
        raise CheckpointDamaged(f"{MANIFEST} counts {state['updates']} updates, the optimizer {updates.item()}")


def run_to_completion(work: Iterator[int]) -> Any:
    """Runs a generator to its end and returns its return value."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def find_damage(directory: Path, *, but_tensors: bool = False) -> str | None:
    """Why a checkpoint cannot be loaded; None: it is complete. For commands of one process.

    Args:
        but_tensors: as `verify` takes it.
    """
    wrong = run_to_completion(verify(directory, but_tensors=but_tensors))
    return None if wrong is None else str(wrong)


def resolve(
    path: str,
    find_damage: Callable[[Path], str | None] = find_damage,
    step_directories: Callable[[Path], list[Path]] = step_directories,
) -> Path:
    """The checkpoint directory that a `checkpoint=` setting means: a step's directory, or the newest undamaged
    checkpoint of a run directory.

    Args:
        find_damage, step_directories: replaced where several ranks call this together.

    Raises:
        ValueError: there is none.
    """
    given = Path(path).expanduser()
    if step_of(given) is not None:
        damage = find_damage(given)
        if damage:
            raise ValueError(f"checkpoint={path}: {damage}")
        return given
    root = given if given.name == "checkpoints" else given / "checkpoints"
    damaged = []
    for directory in step_directories(root):
        damage = find_damage(directory)
        if damage is None:
            return directory
        damaged.append(f"{directory.name}: {damage}")
    what = f"found only damaged ones ({'; '.join(damaged)})" if damaged else "found none"
    raise ValueError(f"checkpoint={path}: looked for {root}/step_NNNNNNNN and {what}")


def resolve_and_load(
    path: str,
    load: Callable[[Path], Loaded],
    find_damage: Callable[[Path], str | None],
    step_directories: Callable[[Path], list[Path]] = step_directories,
) -> tuple[Path, Loaded]:
    """Loads the checkpoint that a `checkpoint=` setting means, with everything read once: `load` verifies what it
    reads. If it finds damage in a run's newest checkpoint, the one before is loaded.

    Args:
        load: raises CheckpointDamaged, on all ranks that call this together.
        find_damage, step_directories: as for `resolve`; damage of tensors may be left to `load`.

    Returns:
        (the directory, what `load` returned).

    Raises:
        ValueError: there is no undamaged one.
    """
    damaged: dict[Path, str] = {}
    while True:
        directory = resolve(path, lambda it: damaged.get(it) or find_damage(it), step_directories)
        try:
            return directory, load(directory)
        except CheckpointDamaged as error:
            damaged[directory] = str(error)


def incomplete(expected: dict[str, tuple[int, ...]], stored: dict[str, StoredTensor]) -> str | None:
    """The first expected tensor that a checkpoint does not hold completely; None: it holds all."""
    for name, shape in expected.items():
        found = stored.get(name)
        if found is None or found.shape != shape or not found.is_complete():
            return f"{name}: {found} instead of {shape}"
    return None
