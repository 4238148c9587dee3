"""What a rank costs in worlds of two sizes: what should not depend on the world does not."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONSTANT = ("process groups", "store requests of the start", "messages per step", "open files")


def test_what_should_be_constant_is():
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.scale", "--worlds", "8", "64", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    small, large = (json.loads(done.stdout.splitlines()[-1])["rows"][world] for world in ("8", "64"))
    assert {name: small[name] for name in CONSTANT} == {name: large[name] for name in CONSTANT}
    assert small.keys() == large.keys()
    # By hand, for tp2 pp2 ep2: data, tensor and pipeline groups, experts', experts' data, the world, and this rank.
    assert large["process groups"] == 7
    # A rank says that it is there, counts itself, and waits for the others; the last one tells them.
    assert large["store requests of the start"] == 4
    # dp, dp_cp and edp 4 each; tp, pp, tp_cp, ep, tp_ep and two for embeddings 32; cp and etp 64; mp and tp_ep_pp 16;
    # tp_dp and tp_dp_cp 2; the world and the distributed optimizer's.
    assert large["process groups, Megatron-Core's"] == 3 * 4 + 7 * 32 + 2 * 64 + 2 * 16 + 2 * 2 + 2
    for name in ("messages per step", "bytes per step", "bytes of a checkpoint's metadata", "host MiB"):
        assert large[name] > 0
