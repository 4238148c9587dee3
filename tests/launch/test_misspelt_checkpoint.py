"""Commands on a checkpoint whose path is misspelt."""

from importlib import import_module
from pathlib import Path

import pytest

from conf.commands import EvaluateConfig, ExportConfig, GenerateConfig, UpcycleConfig


@pytest.mark.parametrize(
    ("module", "schema", "others"),
    [
        ("generate", GenerateConfig, ("prompt",)),
        ("evaluate", EvaluateConfig, ()),
        ("export_hf", ExportConfig, ("output",)),
        ("upcycle", UpcycleConfig, ("output",)),
    ],
)
def test_the_nearest_is_named_and_nothing_is_written(
    module: str, schema: type, others: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    given = {name: str(tmp_path / "new") for name in others}
    with pytest.raises(ValueError, match=r"^checkpoint=\S*/mien does not exist; did you mean \S*/mine\?$"):
        import_module(f"launch.{module}").main(schema(checkpoint=str(tmp_path / "mien"), **given))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
