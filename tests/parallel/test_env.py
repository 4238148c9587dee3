"""Who am I: torchrun, a Slurm step, or one rank alone."""

import pytest

from parallel.env import World, simulated_ranks

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "node1", "MASTER_PORT": "29400"}
STEP = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "11",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
    "SLURM_STEP_NODELIST": "gpu[03-05]",
}


def test_without_a_launcher_one_rank_is_alone():
    assert World.from_environment({"PATH": "/bin"}) == World(0, 1, 0, 1)


def test_torchrun():
    local = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert World.from_environment(TORCHRUN | local) == World(5, 8, 1, 4, "node1", 29400)
    # Launchers that set only what torch.distributed itself reads: everything is on this machine.
    assert World.from_environment(TORCHRUN) == World(5, 8, 5, 8, "node1", 29400)


def test_torchrun_inside_a_slurm_step_goes_first():
    step = STEP | {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "1"}
    assert World.from_environment(step | TORCHRUN).rank == 5


@pytest.mark.parametrize("missing", TORCHRUN)
def test_half_of_torchruns_variables(missing):
    rest = {key: value for key, value in TORCHRUN.items() if key != missing}
    with pytest.raises(ValueError, match=f"but not {missing}"):
        World.from_environment(rest)


@pytest.mark.parametrize(
    "rank, node, local, size", [(0, 0, 0, 4), (3, 0, 3, 4), (6, 1, 2, 4), (8, 2, 0, 3), (10, 2, 2, 3)]
)
def test_a_slurm_step_with_uneven_nodes(tmp_path, monkeypatch, rank, node, local, size):
    monkeypatch.setenv("PATH", str(tmp_path))  # a container has none of Slurm's commands
    mine = {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(node), "SLURM_LOCALID": str(local)}
    world = World.from_environment(STEP | mine)
    assert world == World(rank, 11, local, size, "gpu03", 10000 + 123456 % 20000)
    requeued = World.from_environment(STEP | mine | {"SLURM_RESTART_COUNT": "1"})
    assert requeued.port != world.port
    chosen = World.from_environment(STEP | mine | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"})
    assert (chosen.address, chosen.port) == ("10.0.0.1", 4000)


@pytest.mark.parametrize(
    "nodelist, first",
    [
        ("login1", "login1"),
        ("gpu-a.site,gpu-b.site", "gpu-a.site"),
        ("gpu3,gpu[5-6]", "gpu3"),
        ("n[008-010,12],login1", "n008"),
        ("n[7,9]", "n7"),
        ("rack[1-2]node[03-4]", "rack1node03"),
    ],
)
def test_the_first_host_of_a_step(nodelist, first):
    rank = STEP | {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": nodelist}
    assert World.from_environment(rank).address == first


@pytest.mark.parametrize("nodelist", ["", "(null)", "n[", "n[1-2", "n[]", "n[-2]", "bgq[000x133]"])
def test_a_list_of_nodes_that_cannot_be_read(nodelist):
    rank = STEP | {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": nodelist}
    with pytest.raises(ValueError, match="set MASTER_ADDR"):
        World.from_environment(rank)
    assert World.from_environment(rank | {"MASTER_ADDR": "gpu1"}).address == "gpu1"


def test_a_shell_in_an_allocation_is_one_rank_alone():
    allocation = {key: STEP[key] for key in ("SLURM_JOB_ID", "SLURM_NTASKS")}
    assert World.from_environment(allocation) == World()
    # So is the batch script, which Slurm also calls process 0.
    assert World.from_environment(allocation | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"}) == World()


def test_a_slurm_step_of_one_task_needs_no_address():
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
    assert World.from_environment(step) == World()


def test_nproc():
    assert simulated_ranks({}) == 1
    assert simulated_ranks({"NPROC": "8"}) == 8


@pytest.mark.parametrize("given", ["", "0", "-2", "2.0", "two", " 2"])
def test_a_bad_nproc_is_quoted(given):
    with pytest.raises(ValueError, match=f"NPROC={given} is not a number of ranks"):
        simulated_ranks({"NPROC": given})
