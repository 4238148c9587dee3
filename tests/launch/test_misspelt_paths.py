"""Commands with a misspelt path."""

from importlib import import_module
from pathlib import Path

import pytest

from conf.commands import EvaluateConfig, ExportConfig, GenerateConfig, ImportConfig, InspectConfig, UpcycleConfig


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


def test_the_source_of_an_import(tmp_path: Path) -> None:
    (tmp_path / "mixtral").mkdir()
    config = ImportConfig(source=str(tmp_path / "mixtrall"), output=str(tmp_path / "run"), verify=False)
    with pytest.raises(ValueError, match=r"^source=\S*/mixtrall does not exist; did you mean \S*/mixtral\?$"):
        import_module("launch.import_hf").main(config)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"output": "none/page.html"}, "there is no folder"),
        ({"output": "run"}, "is a directory; name a file"),
        ({"text": "run"}, "is a directory; name a file"),
        ({"text": "txt.tx"}, r"does not exist; did you mean \S*/txt.txt\?"),
        ({"compare": "rnu"}, r"does not exist; did you mean \S*/run\?"),
    ],
)
def test_inspection_looks_at_its_paths_before_the_model_is_loaded(
    given: dict[str, str], says: str, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "txt.txt").write_text("text")
    ((name, path),) = given.items()
    config = InspectConfig(checkpoint=str(tmp_path / "run"), **{name: str(tmp_path / path)})
    with pytest.raises(ValueError, match=rf"^{name}=\S+ {says}"):
        import_module("launch.inspect").main(config)
