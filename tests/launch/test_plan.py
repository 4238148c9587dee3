"""launch.plan as a command: what it prints, and what it refuses."""

import json
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
QWEN = ["model=qwen3_30b_a3b", "cluster=h100", "train.sequence_length=4096", "train.global_batch_size=1024"]


def plan(*overrides: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.plan", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_the_best_layouts_as_a_table_and_the_command_that_runs_the_first() -> None:
    out = plan(*QWEN, "nodes=2", "parallel=auto", "plan.gpu_mtbf_hours=16000", "plan.restart_minutes=5").stdout
    lines = out.splitlines()
    assert "30.53 B parameters, 3.353 B active; 16 GPUs on 2 nodes of h100" in lines[0]
    assert [line.split()[0] for line in lines if line[:1] in "12345" and line[1:2] == " "] == list("12345")
    assert any(line.startswith("time") and "passes over memory" in line for line in lines)
    command = lines[-1].split()
    assert command[0] == "sbatch" and "--nodes=2" in command and "model=qwen3_30b_a3b" in command
    assert not any(word.startswith(("nodes=", "ranks=", "plan.", "parallel=")) for word in command)
    failures, advice = (line.split() for line in lines if line.startswith(("failures", "advice")))
    assert failures[3:5] == ["41.7", "days"] and "(plan.restart_minutes=5," in failures  # 1,000 hours
    assert advice[1].startswith("checkpoint.every=") and "a day" in out
    given = [word.strip("'") for word in command if "=" in word and not word.startswith("-")]
    check = [sys.executable, "-m", "launch.plan", *given, "ranks=16"]
    again = subprocess.run(check, capture_output=True, text=True, cwd=ROOT, timeout=100, check=True)
    assert again.stdout.splitlines()[4].split()[:12] == lines[4].split()[:12]  # the same plan, evaluated alone


def test_json_is_all_that_is_printed() -> None:
    shown = json.loads(plan(*QWEN, "ranks=16", "format=json").stdout)
    plans = shown["plans"]
    assert len(plans) == 5
    keys = {"override", "memory_gb", "step_seconds", "tokens_per_second_per_gpu", "tflops_per_gpu", "mfu", "parts"}
    assert keys <= set(plans[0])
    assert plans[0]["step_seconds"] <= plans[1]["step_seconds"] and plans[0]["memory_gb"] < 80
    failures = shown["failures"]
    assert failures["mtbf_seconds"] == pytest.approx(50_000 * 3600 / 16)
    assert failures["checkpoint_gb"] == pytest.approx(12 * 30.53, rel=1e-3)
    assert failures["checkpoint_seconds"] == pytest.approx(failures["checkpoint_gb"] / 2, rel=1e-3)  # two nodes, 1 GB/s
    assert failures["interval_seconds"] == pytest.approx(
        failures["checkpoint.every"] * plans[0]["step_seconds"], rel=1e-3
    )


def test_a_given_layout_is_evaluated_alone() -> None:
    (one,) = json.loads(plan(*QWEN, "ranks=16", "parallel.ep=8", "format=json").stdout)["plans"]
    assert "parallel.ep=8" in one["override"] and "parallel.pp" not in one["override"]


def test_a_thousand_experts_on_thousands_of_gpus_take_seconds(tmp_path: Path) -> None:
    """In the time and memory of a login node."""
    code = "import resource, runpy, sys; sys.argv = ['launch.plan', *sys.argv[1:]]\n"
    code += "try: runpy.run_module('launch.plan', run_name='__main__')\n"
    code += (
        "finally: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 'torch' in sys.modules, file=sys.stderr)"
    )
    large = ["model=qwen3_235b_a22b", "model.moe.num_experts=256", "cluster=h100", "ranks=2048"]
    large += ["train.sequence_length=4096", "train.global_batch_size=8192", "format=json"]
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *large], capture_output=True, text=True, cwd=ROOT, timeout=100)
    seconds = time.perf_counter() - begin
    kib, torch = done.stderr.split()[-2:]
    assert done.returncode == 0 and len(json.loads(done.stdout)["plans"]) == 5
    assert int(kib) < 2 * 2**20 and torch == "False"
    assert seconds < 60, "15 s on a machine with nothing else to do"


PLOT = "nearest: plot=plan.png" if find_spec("matplotlib") else "needs matplotlib: bash launch/setup.sh plots"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["cluster=any", "nodes=1"], "no rates for cluster=any: it plans for a100, b200, h100, h200"),
        (["cluster=h100"], "needs the number of GPUs: nodes=N, or ranks=N"),
        (["cluster=h100", "nodes=1", "ranks=8"], "give one of them"),
        (["cluster=h100", "nodes=0"], "nodes > 0, but it is 0; nearest: nodes=1"),
        (["cluster=h100", "nodes=1", "goal=speed"], "goal is one of throughput, memory, but speed is not"),
        (["cluster=h100", "nodes=1", "plan.imbalance=0.5"], "nearest: plan.imbalance=1"),
        (["cluster=h100", "nodes=1", "plan.gpu_mtbf_hours=0"], "nearest: plan.gpu_mtbf_hours=50000"),
        (["cluster=h100", "nodes=1", "plan.restart_minutes=-1"], "nearest: plan.restart_minutes=0"),
        (["cluster=h100", "ranks=8", "parallel.ep=3"], "nearest: "),
        (["cluster=h100", "ranks=7", "train.global_batch_size=1024"], "nearest: train.global_batch_size=1029"),
        (["model=qwen3_235b_a22b", "cluster=h100", "nodes=1"], "does not fit into 8 x 80 GB"),
        (["model=qwen3_30b_a3b", "cluster=h100", "nodes=1", "plot=plan.xyz"], PLOT),
        (["cluster=h100", "nodes=1", "parallel.tp=-1"], "parallel.tp"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_input_is_answered_in_a_message(overrides: list[str], words: str) -> None:
    done = plan(*overrides, code=2)
    assert words in done.stderr and "Traceback" not in done.stderr and not done.stdout


def test_a_chart(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: bash launch/setup.sh plots")
    plan(*QWEN, "nodes=2", f"plot={tmp_path / 'plan.png'}")
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"


def test_a_budget_instead_of_a_layout() -> None:
    out = plan("budget=1e21", "cluster=h100").stdout
    assert "Chinchilla" in out and "Kaplan" in out and "GPU-hours" in out
