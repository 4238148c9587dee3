"""Ranks that a launcher has started on one node: one of them prepares the data."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.training.helpers import ROOT, command_line, rows, write_corpus

TRAIN = """
import os, runpy, sys
import corpus.prepare
def never(*args, **named):
    raise SystemExit("rank 1 prepares as well")
if os.environ["RANK"] == "1":
    corpus.prepare.prepare = never
runpy.run_module("launch.train", run_name="__main__", alter_sys=True)
"""


def run_ranks(corpus: Path, run_dir: Path, *overrides: str) -> list[tuple[int, str]]:
    """(exit code, standard error) of two ranks, as torchrun would start them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", TRAIN, *command_line(corpus, run_dir, *overrides)[3:]]
    started = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=600)[1] for process in started]
        return [(process.returncode, text) for process, text in zip(started, errors, strict=True)]
    finally:
        for process in started:
            process.kill()


def test_one_prepares_for_both(tmp_path: Path) -> None:
    done = run_ranks(write_corpus(tmp_path), tmp_path / "run", "train.steps=2")
    assert [code for code, _ in done] == [0, 0], done
    assert len(rows(tmp_path / "run")) == 2
    assert json.loads((tmp_path / "run/data.json").read_text())["train"]


def test_both_end_with_the_message_of_the_one_that_prepares(tmp_path: Path) -> None:
    done = run_ranks(write_corpus(tmp_path), tmp_path / "run", "data.files=[nothing.txt]")
    assert [code for code, _ in done] == [2, 2], done
    assert all("nothing.txt" in text and text.startswith("switchyard: error: ") for _, text in done)
