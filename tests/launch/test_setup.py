"""The shell doors, with a stand-in for Python and pip that writes down how it is called; and what is installed here."""

import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
REQUIREMENTS = [Requirement(r) for r in PROJECT["project"]["dependencies"]]
REQUIREMENTS = [r for r in REQUIREMENTS if not r.marker or r.marker.evaluate()]  # Megatron-Core's depends on Python
DEV_REQUIREMENTS = [Requirement(r) for r in PROJECT["project"]["optional-dependencies"]["dev"]]

FAKE_PYTHON = r"""#!/usr/bin/env bash
# Plays python, the interpreter of .venv and pip.
printf '%s\n' "$*" >>"$CALLS"
case "$*" in
*platform.python_version*) echo "${FAKE_VERSION:-3.12.4}" ;;
*'version("torch")'*) echo torch==2.11.0 ;;
"-m venv "*) mkdir -p .venv/bin && cp "$SELF" .venv/bin/python ;;
"-m pip show "*) exit 1 ;;
"-m pip install "*) eval "${DURING_PIP:-}" ;;
"-m launch.train"* | "-m pytest"*) shift 2; echo "pid $$ in $PWD"; printf '<%s>\n' "$@" ;;
"-" | "- "*) exec "$REAL_PYTHON" "$@" ;;
esac
"""


class Clone:
    """A copy of the repository's shell doors, with the stand-in first in PATH."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a clone"
        shutil.copytree(ROOT / "launch", self.root / "launch", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.root / name)
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name in ("python3", "python3.13", "python3.12", "python3.11", "python"):
            self.add_program(name, FAKE_PYTHON)
        self.calls_file = folder / "calls"
        self.environment = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "CALLS": str(self.calls_file),
            "SELF": str(self.bin / "python3"),
            "REAL_PYTHON": sys.executable,
        }

    def add_program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def start(self, script: str, *arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", script if "/" in script else f"{self.root}/launch/{script}", *arguments],
            cwd=cwd or self.root,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, script: str, *arguments: str, **options) -> subprocess.CompletedProcess:
        process = self.start(script, *arguments, **options)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def calls(self, beginning: str) -> list[str]:
        """The calls of the stand-in since the last look."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [line for line in lines if line.startswith(beginning)]

    def forget(self) -> None:
        self.calls_file.unlink(missing_ok=True)


@pytest.fixture
def clone(tmp_path) -> Clone:
    return Clone(tmp_path)


def test_second_run_does_nothing(clone):
    first = clone.run("setup.sh")
    assert first.returncode == 0, first.stderr
    assert len(clone.calls("-m venv")) == len(clone.calls("-m pip install")) == 1
    assert "creating .venv with Python 3.12.4" in first.stderr
    assert (clone.root / ".venv/requirements.txt").read_text().split("\n")[0].startswith("torch>=")
    clone.forget()
    second = clone.run("setup.sh")
    assert (second.returncode, second.stderr) == (0, "setup: .venv is up to date\n")
    assert clone.calls("") == []


def test_changed_constraints_are_installed_into_the_same_venv(clone):
    clone.run("setup.sh")
    clone.forget()
    with (clone.root / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    assert clone.run("setup.sh", "--check").returncode == 1
    assert clone.run("setup.sh").returncode == 0
    assert clone.calls("-m venv") == [] and len(clone.calls("-m pip install")) == 1
    assert clone.run("setup.sh", "--check").returncode == 0


@pytest.mark.parametrize("how", ["kill -9 $PPID", "trap '' INT; kill -INT 0; exit 1"])
def test_interrupted_set_up_is_not_taken_for_a_finished_one(clone, how):
    interrupted = clone.run("setup.sh", DURING_PIP=f"touch .venv/half_a_package; {how}")
    assert interrupted.returncode != 0
    assert clone.run("setup.sh", "--check").returncode == 1
    clone.forget()
    again = clone.run("setup.sh")
    assert again.returncode == 0 and "interrupted" in again.stderr
    assert len(clone.calls("-m venv")) == 1
    assert not (clone.root / ".venv/half_a_package").exists()


def test_failure_shows_pips_last_words_and_is_completed_later(clone):
    failed = clone.run("setup.sh", DURING_PIP="echo 'No matching distribution for x'; exit 1")
    assert failed.returncode == 1
    assert "No matching distribution for x" in failed.stderr and ".venv/setup.log" in failed.stderr
    assert clone.run("setup.sh", "--check").returncode == 1
    clone.forget()
    assert clone.run("setup.sh").returncode == 0
    assert clone.calls("-m venv") == []


def test_two_at_once_install_once(clone):
    both = [clone.start("setup.sh", DURING_PIP="sleep 0.7") for _ in range(2)]
    messages = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert len(clone.calls("-m pip install")) == len(clone.calls("-m venv")) == 1
    assert sum("waiting for it" in message for message in messages) == 1


def test_torch_spec_is_installed_first_and_remembered(clone):
    first = clone.run("setup.sh", TORCH_SPEC="torch==2.11.0 --index-url https://example.org/cpu")
    assert first.returncode == 0, first.stderr
    spec, rest = clone.calls("-m pip install")
    assert spec.endswith("torch==2.11.0 --index-url https://example.org/cpu") and "-r .venv/requirements.txt" in rest
    pins = (clone.root / ".venv/constraints.txt").read_text().splitlines()
    assert [pin for pin in pins if pin.startswith("torch==")] == ["torch==2.11.0"]
    assert clone.run("setup.sh", "--check").returncode == 0
    assert clone.run("setup.sh", "--check", TORCH_SPEC="torch==2.12.0").returncode == 1


def test_extras_are_installed_and_remembered(clone):
    assert "no extra tea" in clone.run("setup.sh", "tea").stderr
    assert clone.run("setup.sh", "kernels").returncode == 0
    assert len(clone.calls("-m pip install")) == 2
    assert (clone.root / ".venv/extras.txt").read_text().startswith("triton")
    assert clone.run("setup.sh", "--check").returncode == 0


def test_says_what_it_cannot_use(clone):
    old = clone.run("setup.sh", FAKE_VERSION="3.9.2")
    assert old.returncode == 1 and "python3 is 3.9.2" in old.stderr and "3.11, 3.12 and 3.13" in old.stderr
    new = clone.run("setup.sh", FAKE_VERSION="3.14.0", PYTHON="python3.13")
    assert new.returncode == 1 and "python3.13 is 3.14.0" in new.stderr
    clone.add_program("uname", '#!/bin/sh\n[ "$1" = -s ] && echo Darwin || echo arm64\n')
    other = clone.run("setup.sh")
    assert other.returncode == 1 and "Darwin on arm64" in other.stderr and "container" in other.stderr
    assert clone.calls("-m pip install") == []


OVERRIDES = ["run.name=a b", "data.files=['x y.txt',\"z\"]", "", "optim={lr: 1}", "$HOME", "*", "back\\slash"]


@pytest.mark.parametrize(("script", "module"), [("train.sh", "launch.train"), ("test.sh", "pytest")])
def test_first_command_sets_up_and_passes_arguments_untouched(clone, tmp_path, script, module):
    process = clone.start(script, *OVERRIDES, cwd=tmp_path, TEST_PROCESSES="1")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    lines = out.splitlines()
    assert lines[0] == f"pid {process.pid} in {clone.root}"  # exec: signals reach Python
    assert lines[1:] == [f"<{override}>" for override in OVERRIDES]
    clone.forget()
    other = {"train.sh": "test.sh", "test.sh": "train.sh"}[script]
    assert clone.run(other).returncode == 0
    assert clone.calls("-m pip") == []


@pytest.mark.parametrize(
    ("arguments", "processes", "distributed"),
    [
        (["tests/moe", "-k", "a b"], "3", ["-n", "3"]),
        (["tests/moe"], "1", []),
        (["-n", "2"], "3", []),
        (["--pdb"], "3", []),
        (["tests/moe/test_router.py::test_it"], "3", []),
    ],
)
def test_tests_run_in_several_processes(clone, arguments, processes, distributed):
    clone.run("setup.sh")
    lines = clone.run("test.sh", *arguments, TEST_PROCESSES=processes).stdout.splitlines()
    assert lines[1:] == [f"<{argument}>" for argument in [*distributed, *arguments]]


def test_slurm_job_without_venv_is_told_to_set_up(clone):
    result = clone.run("train.sh", SLURM_JOB_ID="7")
    assert result.returncode == 2
    assert result.stderr.startswith("switchyard: error: ") and "bash launch/setup.sh" in result.stderr
    assert clone.calls("") == []


def test_sbatch_runs_a_copy_from_its_spool_folder(clone, tmp_path):
    clone.run("setup.sh")
    spool = tmp_path / "spool" / "job7"
    spool.mkdir(parents=True)
    copy = shutil.copy(clone.root / "launch/train.sh", spool / "slurm_script")
    job = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "cwd": tmp_path}  # a task: it does not start more
    found = clone.run(str(copy), "train.steps=3", SLURM_SUBMIT_DIR=str(clone.root), **job)
    assert found.returncode == 0 and f"in {clone.root}\n<train.steps=3>" in found.stdout
    elsewhere = clone.run(str(copy), SLURM_SUBMIT_DIR=str(tmp_path), **job)
    assert elsewhere.returncode == 2 and "is not the repository" in elsewhere.stderr


def test_signal_to_train_sh_reaches_python(clone):
    clone.run("setup.sh")
    (clone.root / ".venv/bin/python").write_text(
        "#!/usr/bin/env bash\ntrap 'exit 75' USR1\necho ready\nsleep 9 & wait\n"
    )
    process = clone.start("train.sh")
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=5) == 75
    os.killpg(process.pid, signal.SIGKILL)  # the sleep


def test_shell_scripts_are_clean():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (it is in the dev extra)")
    scripts = [*ROOT.glob(".ci/*"), *ROOT.glob("launch/*.sh"), *ROOT.glob("slurm/**/*.sh")]
    result = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


FAKE_PYTHON312 = r"""#!/usr/bin/env bash
# Plays a Python 3.12, its virtual environment and pip.
printf '%s\n' "$*" >>"$CALLS"
case "$*" in
-c*"import torch") exit "${NO_TORCH:-0}" ;;
"-m venv "*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
"-m pip "*) cat "${@: -1}" "${@: -3:1}" >>"$CALLS" ;;
-) exec "$REAL" - ;;
esac
"""


def ci_with_python312(tmp_path: Path, **env: str) -> tuple[str, str]:
    """(what .ci/python312.sh prints, the calls of the interpreter in pyenv's folder)."""
    python = tmp_path / ".pyenv/versions/3.12.9/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(FAKE_PYTHON312)
    python.chmod(0o755)
    calls = tmp_path / "calls"
    env |= {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "CALLS": str(calls), "REAL": sys.executable}
    done = subprocess.run(["bash", ROOT / ".ci/python312.sh"], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout, calls.read_text()


def test_no_pytorch_is_fetched_for_the_newer_core(tmp_path):
    printed, calls = ci_with_python312(tmp_path, NO_TORCH="1")
    assert "SKIPPED" in printed and f"no PyTorch in {tmp_path}/.pyenv/versions/3.12.9/bin/python" in printed
    assert "pip" not in calls and "pytest" not in calls


def test_the_newer_core_is_tested_where_there_is_a_pytorch(tmp_path):
    printed, calls = ci_with_python312(tmp_path)
    assert f"{tmp_path}/.pyenv/versions/3.12.9/bin/python" in printed and "SKIPPED" not in printed
    lines = calls.splitlines()
    assert any(line.startswith("megatron-core>=0.19.2") for line in lines)
    assert any(line.startswith("megatron-core==0.19.2") for line in lines)
    assert not any(re.match("torch[>=]", line) for line in lines)
    (tested,) = (line for line in lines if line.startswith("-m pytest "))
    files = tested.split()[2:]
    assert {"tests/parallel/test_engine.py", "tests/parallel/test_parity.py"} < set(files)
    assert all((ROOT / file).is_file() for file in files)


def test_folder_names_are_nobody_elses():
    """A distribution with a module of the same name would be imported in place of ours, or ours in place of it."""
    ours = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert {"conf", "launch", "moe"} <= ours
    taken = importlib.metadata.packages_distributions()
    assert {name: taken[name] for name in ours & set(taken)} == {}
    assert PROJECT["tool"]["setuptools"]["packages"] == []


@pytest.mark.parametrize("requirement", [*REQUIREMENTS, *DEV_REQUIREMENTS], ids=lambda r: r.name)
def test_installed_version_is_in_the_range(requirement):
    assert requirement.specifier.contains(importlib.metadata.version(requirement.name))


def test_constraints_cover_every_dependency_within_its_range():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = [pin for line in lines if not (pin := Requirement(line)).marker or pin.marker.evaluate()]
    pinned = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert all(str(pin.specifier).startswith("==") for pin in pins) and len(pinned) == len(pins)
    # The other extras are followed where they are installed, as .ci/run does.
    optional = PROJECT["project"]["optional-dependencies"]
    extra = [Requirement(line) for name in ("docs", "lint", "plots", "eval", "data") for line in optional[name]]
    found = {canonicalize_name(distribution.name) for distribution in importlib.metadata.distributions()}
    complete = all(canonicalize_name(r.name) in found for r in extra)
    waiting, seen = [*REQUIREMENTS, *DEV_REQUIREMENTS, *(extra if complete else [])], set[tuple[str, ...]]()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if re.match("nvidia|cuda|triton", name):  # pinned by PyTorch itself
            continue
        assert name in pinned, f"constraints.txt has no {name}"
        assert requirement.specifier.contains(pinned[name])
        if (visit := (name, *sorted(requirement.extras))) not in seen:
            seen.add(visit)
            needed = [Requirement(r) for r in importlib.metadata.requires(name) or []]
            extras = requirement.extras or {""}
            waiting += [r for r in needed if not r.marker or any(r.marker.evaluate({"extra": e}) for e in extras)]
    unneeded = set(pinned) - {name for name, *_ in seen}
    assert not complete or not unneeded, f"constraints.txt pins what nothing needs: {unneeded}"
