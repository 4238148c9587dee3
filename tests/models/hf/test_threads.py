"""NPROC=N converts N files at a time, to the same bytes."""

import threading
from pathlib import Path
from unittest import mock

import pytest

from models.hf import convert
from parallel.env import World
from parallel.local_launcher import RankPool
from tests.models.hf.helpers import _export, _import, in_rank


def converted(world: World, source: str, folder: str, threads: int) -> tuple[str, int]:
    """An import and an export with NPROC=threads. Returns (what was printed, the most files written at one time)."""
    from conf.commands import ExportConfig, ImportConfig

    lock, open_now, most, printed = threading.Lock(), 0, 0, ""
    write_stream, together, waited = convert.write_stream, threading.Barrier(threads), threading.local()

    def counted(*args, **kwargs):
        nonlocal open_now, most
        with lock:
            open_now += 1
            most = max(most, open_now)
        if not hasattr(waited, "once"):  # the first file of each thread
            waited.once = True
            together.wait(30.0)
        try:
            return write_stream(*args, **kwargs)
        finally:
            with lock:
                open_now -= 1

    run = f"{folder}/run"
    imported = ImportConfig(source=source, output=run, verify=False)
    exported = ExportConfig(checkpoint=run, output=f"{folder}/exported", verify=False, shard_gib=2e-5)
    with (
        mock.patch.dict("os.environ", NPROC=str(threads)),
        mock.patch.object(convert, "FILE_BYTES", 30_000),
        mock.patch.object(convert, "write_stream", counted),
    ):
        for command, config in ((_import, imported), (_export, exported)):
            code, words = in_rank(world, command, config)
            printed += words
            assert code == 0, words
    return printed, most


@pytest.mark.parametrize("name", ["mixtral", "llama"])
def test_several_threads_write_the_bytes_of_one(name: str, sources, ranks: RankPool, tmp_path: Path) -> None:
    files: dict[int, dict[str, bytes]] = {}
    for threads in (1, 2):
        folder = tmp_path / str(threads)
        _, most = ranks.run(1, converted, str(sources[name]), str(folder), threads, timeout=120.0)[0]
        assert most == threads
        places = (folder / "run" / "checkpoints" / "step_00000000", folder / "exported")
        files[threads] = {str(p.relative_to(folder)): p.read_bytes() for place in places for p in place.iterdir()}
    assert len([name for name in files[1] if "/weights_" in name]) >= 2
    assert len([name for name in files[1] if "exported/model-0" in name]) >= 2
    assert files[1] == files[2]
