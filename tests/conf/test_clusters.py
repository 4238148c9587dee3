"""The cluster presets."""

from pathlib import Path

import pytest
import yaml

from conf import rules
from conf.schema import ClusterConfig, Config
from training.slurm import Shape

PRESETS = {path.stem: yaml.safe_load(path.read_text()) for path in Path("conf/cluster").glob("*.yaml")}


@pytest.mark.parametrize("name", sorted(PRESETS.keys() - {"any"}))
def test_a_preset_is_complete_and_makes_a_job(name: str) -> None:
    cluster = ClusterConfig(**PRESETS[name])
    assert set(PRESETS[name]) | {"gpus"} == set(vars(cluster)) and cluster.name == name
    rules.check(Config(cluster=cluster), 1)
    words = Shape.of(cluster, 2 * cluster.ranks_per_node).options()
    assert words[0] == "--nodes=2" and any("gpus" in word for word in words) == cluster.gpus


def test_the_clusters_of_the_readme() -> None:
    assert PRESETS.keys() == {"any", "a100", "b200", "cpu", "h100", "h200"}
    assert PRESETS["any"] == {"name": None}
