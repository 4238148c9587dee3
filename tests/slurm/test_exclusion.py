"""Which nodes launch/job.sh keeps a requeued job off, with stand-ins for Slurm's commands and for Python."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.training.helpers import ROOT

COMMANDS = {
    "python": """#!/bin/bash
case $* in
*launch.check*) echo '3 3 {{"parallel.ep":3}} {here}/a run' ;;
*launch.verdict*)
    printf '%s' "$SWITCHYARD_ERRORS" >{here}/errors
    echo "$*" >{here}/verdict
    echo requeue node2 node3
    ;;
esac
""",
    "srun": """#!/bin/bash
echo "$* layout=$SWITCHYARD_LAYOUT" >>{here}/srun.log
echo 'srun: error: node2: task 1: Killed' >&2
echo 'step 3' >&2
""",
    "squeue": """#!/bin/bash
case $* in
*%x*) echo "batch $(cat {here}/excluded)" ;;
*NumTasks*) echo "$NEEDED" ;;
*) echo "7 7 0 RUNNING 10:00" ;;
esac
""",
    "sinfo": r"""#!/bin/bash
for n in 1 2 3 4 5 6; do echo "(null) gpu:8|${{STATES:n-1:1}}|node$n"; done |
    sed 's/|i|/|idle|/; s/|d|/|drained|/; s/|a|/|allocated|/'
echo '(null) (null)|idle|login1'
""",
    "scontrol": """#!/bin/bash
case $* in
show*) echo "$3" | sed 's/node\\[1-4\\]/node1,node2,node3,node4/' | tr , '\\n' | grep . ;;
*)
    echo "$*" >>{here}/scontrol.log
    [[ ${{!#}} != ExcNodeList=* ]] || echo "${{!##*=}}" >{here}/excluded
    ;;
esac
""",
    "sleep": "#!/bin/sh\nexit 0\n",
}


@pytest.mark.parametrize(
    ("states", "needed", "tasks", "update", "said"),
    [
        ("aaaaii", "3", {}, ["node2", "node2,node3"], "node3 has failed repeatedly: the job is kept off it"),
        ("aaaaid", "4", {}, ["node2"], "of nodes like it only 3 others are available, and the job needs 4: not"),
        ("aaaddd", "3", {}, [], "node2 has failed repeatedly, but of nodes like it only 2 others are available"),
        # Eight tasks on each of three nodes.
        ("aaaaid", "24", {"SLURM_NTASKS": "32", "SLURM_NTASKS_PER_NODE": "8"}, ["node2", "node2,node3"], "kept off"),
        # Tasks that may be distributed anyhow: as many nodes as it had.
        ("aaaaid", "4", {"SLURM_NTASKS": "4"}, ["node2"], "the job needs 4: not"),
    ],
    ids=["both", "one", "none", "tasks-per-node", "tasks"],
)
def test_a_node_is_left_out_while_enough_others_are_there(
    tmp_path: Path, states: str, needed: str, tasks: dict[str, str], update: list[str], said: str
) -> None:
    """node9 was excluded when the job was submitted."""
    (tmp_path / "excluded").write_text("node9\n")
    for name, text in COMMANDS.items():
        (tmp_path / name).write_text(text.format(here=tmp_path))
        (tmp_path / name).chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-4]", "SLURM_JOB_NUM_NODES": "4", "ENVIRONMENT": "BATCH"}
    slurm |= {"STATES": states, "NEEDED": needed, **tasks}
    env = {**kept, **slurm, "PATH": f"{tmp_path}:{kept['PATH']}", "SWITCHYARD_PYTHON": f"'{tmp_path}/python'"}
    done = subprocess.run(
        ["bash", "launch/train.sh", "parallel=auto"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 75 and said in done.stderr, done.stderr
    asked = (tmp_path / "scontrol.log").read_text().splitlines()
    assert asked == ["requeue 7", *(f"update JobId=7 ExcNodeList=node9,{nodes}" for nodes in update)]
    # The rest of what launch.check and launch.verdict were told, and told.
    (started,) = [line for line in (tmp_path / "srun.log").read_text().splitlines() if "launch.train" in line]
    assert "--nodes=3 --ntasks=3 --nodelist=node1,node2,node3" in started and 'layout={"parallel.ep":3}' in started
    assert (tmp_path / "errors").read_text().splitlines() == ["srun: error: node2: task 1: Killed", "end"]
    assert (tmp_path / "verdict").read_text().strip().endswith(f"{tmp_path}/a run") and "step 3" in done.stderr
