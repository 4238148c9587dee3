"""A folder of presets that may be somebody else's: presets alone are taken from it."""

import argparse
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser

from launch.config_folders import check_folders

GROUPS = {"model", "data"}


def check(*arguments: str) -> None:
    options: argparse.Namespace = get_args_parser().parse_args(arguments)
    check_folders(options, OverridesParser.create().parse_overrides(options.overrides), GROUPS)


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("model/x.yaml", "# @package hydra.callbacks\na:\n  _target_: os.system\n", "@package"),
        ("model/x.yaml", "name: a\n_target_: os.system\n", "_target_"),
        ("data/x.yml", "blend:\n- {weight: 1, _target_: os.system}\n", "_target_"),
        ("model/x.yaml", "defaults:\n- override /hydra/launcher: joblib\n", "override /hydra/launcher"),
        ("model/x.yaml", "defaults:\n- /data@hydra.callbacks: y\n", "/data@hydra.callbacks"),
        ("model/x.yaml", "defaults:\n- ../elsewhere/y\n", "../elsewhere/y"),
        ("model/x.yaml", "defaults:\n- /elsewhere/y\n", "/elsewhere/y"),
        ("model/x.yaml", "defaults:\n- inner: y\n", "inner"),
        ("model/x.yaml", "defaults:\n- /data: [y, inner/y]\n", "inner/y"),
        ("model/x.yaml", "hydra:\n  callbacks: {}\n", "hydra is not allowed"),
        ("model/x.yaml", "name: ${oc.env:WANDB_API_KEY}\n", "${oc.env:WANDB_API_KEY}"),
        ("model/x.yaml", "name: ${oc.decode:${oc.env:TOKEN,1}}\n", "${oc.decode:"),
        ("model/x.yaml", "name: ${oc.select:a,${oc.env:TOKEN}}\n", "${oc.env:TOKEN}"),
        ("model/x.yaml", 'name: "${oc.select:${ oc.env : TOKEN}}"\n', "${oc.env:TOKEN}"),
        ("model/x.yaml", "name: ${hydra:runtime.cwd}\n", "${hydra:runtime.cwd}"),
        ("hydra/launcher/basic.yaml", "_target_: os.system\n", "configure Hydra itself"),
    ],
)
def test_what_runs_programs_or_reads_secrets_is_refused(tmp_path: Path, file: str, content: str, named: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(content)
    for arguments in ([f"--config-dir={tmp_path}"], [f"hydra.searchpath=[file://{tmp_path}]"]):
        with pytest.raises(ValueError) as refused:
            check(*arguments)
        assert named in str(refused.value) and str(tmp_path) in str(refused.value)


def test_presets_are_taken(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/x.yaml").write_text(
        "defaults:\n- tiny_switch\n- override /data: stdlib\n- _self_\nname: ${oc.env:USER}-${now:%H}-${.top}\n"
    )
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/x.yaml").write_text("_target_: os.system\n")  # no group of ours: never read
    check(f"--config-dir={tmp_path}", "model=x")


@pytest.mark.parametrize(
    "argument", ["--config-name=x", "--config-path=/x", "--experimental-rerun=x.pickle", "hydra.searchpath=[pkg://os]"]
)
def test_other_ways_in_are_closed(argument: str) -> None:
    with pytest.raises(ValueError, match=r"is not supported|is not a folder of presets"):
        check(argument)


@pytest.mark.parametrize("preset", ["inner/x", "../elsewhere/x", "tiny_switch,inner/x", "/elsewhere/x"])
def test_a_preset_is_no_path(preset: str) -> None:
    with pytest.raises(ValueError, match="without a path"):
        check(f"model={preset}")
