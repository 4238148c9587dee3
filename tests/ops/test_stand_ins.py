"""The stand-ins for TransformerEngine and Apex have the names and parameters of the real packages, as recorded."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stand_ins import PACKAGES, installed
from tests.stand_ins.signatures import ATTRIBUTES, NAMES, as_signature, main, reader, signatures, table
from tests.stand_ins.versions import as_version, find, parameters_of

NEWEST = {package: max(versions, key=lambda v: [*map(int, v.split("."))] if "." in v else v)
          for package, versions in table().items()}  # fmt: skip


@pytest.fixture(autouse=True)
def packages() -> Iterator[None]:
    with installed(*PACKAGES):
        yield


@pytest.mark.parametrize(("package", "name"), [(p, n) for p in NAMES for n in NAMES[p]])
def test_a_stand_in_takes_nothing_that_the_newest_version_does_not_take(package: str, name: str) -> None:
    """The same parameters in the same order, some left out; a parameter has a default where the real one has it."""
    recorded = table()[package][NEWEST[package]][name]
    if recorded is None:
        with pytest.raises((ImportError, AttributeError)):
            find(name)
        return
    owner, attribute = find(name)
    if recorded == "native":
        return
    real, mine = as_signature(recorded).parameters, parameters_of(owner, attribute)
    assert [p.name for p in mine] == [n for n in real if n in {p.name for p in mine}]
    for parameter in mine:
        assert parameter.kind is real[parameter.name].kind
        assert (parameter.default is parameter.empty) == (real[parameter.name].default is parameter.empty)
    needed = [n for n, p in real.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    assert set(needed) <= {p.name for p in mine}


@pytest.mark.parametrize("package", ATTRIBUTES)
def test_every_version_has_the_attributes_that_are_used(package: str) -> None:
    for version, entries in table()[package].items():
        for name, wanted in ATTRIBUTES[package].items():
            assert entries[f"{name} attributes"] == wanted, (version, name)


def test_a_call_that_a_version_does_not_take_fails() -> None:
    from transformer_engine.pytorch import GroupedLinear

    with as_version("transformer_engine", "2.9.0") as called:
        with pytest.raises(TypeError, match="single_grouped_weight"):
            GroupedLinear(2, 8, 8, bias=False, device="meta", single_grouped_weight=True)
        GroupedLinear(2, 8, 8, bias=False, device="meta", rng_tracker_name="x")  # the stand-in does without it
        assert called == {"transformer_engine.pytorch.GroupedLinear"}


SOURCES = {
    "te/transformer_engine/pytorch/__init__.py": "from transformer_engine.pytorch.module import Linear\n",
    "te/transformer_engine/pytorch/module/__init__.py": "from .linear import *\n",
    "te/transformer_engine/pytorch/module/linear.py": (
        "class Linear(Base):\n"
        "    def __init__(self, a, b=1, *rest, c, d=None, **more): ...\n"
        "    def forward(self, inp): return getattr(self.weight, 'main_grad')\n"
        "class Base:\n"
        "    def init_fp8_metadata(self, num_gemms=1): ...\n"
    ),
    "te/transformer_engine/pytorch/fp8.py": (
        "class FP8GlobalStateManager:\n    @classmethod\n    def reset(cls): ...\n"
    ),
    "te/transformer_engine/common/recipe/__init__.py": (
        "@dataclass(repr=False)\nclass DelayedScaling(Recipe):\n    margin: int = 0\n    other: int\n    kept = 1\n"
    ),
}


def test_the_table_is_read_out_of_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: what a class is imported through, and every kind of parameter."""
    archive = tmp_path / "te.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, text in SOURCES.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    for sources in (archive, tmp_path / "te"):
        found = signatures("transformer_engine", reader(sources))
        assert found["transformer_engine.pytorch.Linear"] == ["a", "b=", "*rest", "c", "d=", "**more"]
        assert found["transformer_engine.pytorch.Linear.forward"] == ["inp"]
        assert found["transformer_engine.pytorch.moe_permute"] is None
        assert found["transformer_engine.pytorch.Linear attributes"] == ["weight", "main_grad"]
    found = signatures("transformer_engine_fp8", reader(archive))
    assert found["transformer_engine.pytorch.Linear.init_fp8_metadata"] == ["num_gemms="]
    assert found["transformer_engine.common.recipe.DelayedScaling"] == ["margin=", "other"]
    assert found["transformer_engine.pytorch.fp8.FP8GlobalStateManager.reset"] == []
    assert found["transformer_engine.pytorch.quantization.FP8GlobalStateManager.reset"] is None
    written = tmp_path / "table.json"
    monkeypatch.setattr("tests.stand_ins.signatures.TABLE", written)
    main("transformer_engine", "9.9", str(archive))
    assert set(NAMES["transformer_engine"]) < set(json.loads(written.read_text())["transformer_engine"]["9.9"])
