"""File systems that fail: without a package, credentials or network. The message names the path, why and what to do."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest

from conf.commands import PrepareConfig
from conf.inspect_data_config import InspectDataConfig
from conf.schema import DataConfig
from corpus import storage
from corpus.prepare import prepare
from launch.data import main as inspect_main
from launch.prepare import main as prepare_main
from tests.corpus.bucket import Bucket
from tests.corpus.helpers import write_pair

LINES = b'{"text": "some words and more"}\n' * 50


class NoCredentialsError(Exception):
    """As of botocore, which is no OSError."""


class Broken(Bucket):
    protocol = "broken"
    where: ClassVar[str] = ""
    error: ClassVar[Exception] = OSError()

    def _fail(self, where: str) -> None:
        if where == Broken.where:
            raise Broken.error

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._fail("constructor")
        super().__init__(*args, **kwargs)

    def ls(self, *args: Any, **kwargs: Any) -> list[Any]:
        self._fail("list")
        return super().ls(*args, **kwargs)

    def cat_file(self, *args: Any, **kwargs: Any) -> bytes:
        self._fail("open")
        return super().cat_file(*args, **kwargs)

    def put_file(self, *args: Any, **kwargs: Any) -> None:
        raise Broken.error


fsspec.register_implementation("broken", Broken, clobber=True)


@pytest.fixture(autouse=True)
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(storage, "_PAUSES", (0.0, 0.0))
    monkeypatch.setattr("corpus.tokenizer_files.ROOT", str(tmp_path / "root"))
    Bucket.reset()
    Bucket.write("b/a.jsonl", LINES)
    Bucket.write("b/t.json", b"{}")
    prefix = write_pair(tmp_path / "p", [[1, 2, 3]] * 20)
    for suffix in (".bin", ".idx"):
        Bucket.write(f"b/p{suffix}", Path(prefix + suffix).read_bytes())
    (tmp_path / "a.jsonl").write_bytes(LINES)
    yield
    Broken.where = ""
    Bucket.reset()


def train(folder: Path, kind: str, path: str, **settings: Any) -> None:
    data = DataConfig(kind=kind, files=[path], cache_dir=str(folder / "cache"))
    prepare(replace(data, **settings), vocab_size=400, sequence_length=16)


def prepared(folder: Path, source: str, output: str, **settings: Any) -> None:
    prepare_main(PrepareConfig(input=source, output=output, vocab_size=300, **settings))


USES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "text": ("b/a.jsonl", lambda folder: train(folder, "text", "broken://b/a.jsonl")),
    "glob": ("b/", lambda folder: train(folder, "text", "broken://b/*.jsonl")),
    "folder": ("b", lambda folder: train(folder, "text", "broken://b")),
    "tokens": ("b/p", lambda folder: train(folder, "megatron", "broken://b/p")),
    "chat": ("b/a.jsonl", lambda folder: train(folder, "chat", "broken://b/a.jsonl", document_mask=True)),
    "tokenizer": (
        "b/t.json",
        lambda folder: train(folder, "text", f"{folder}/a.jsonl", tokenizer="broken://b/t.json"),
    ),
    "input": ("b/a.jsonl", lambda folder: prepared(folder, "broken://b/a.jsonl", f"{folder}/out")),
    "output": ("b/out", lambda folder: prepared(folder, f"{folder}/a.jsonl", "broken://b/out")),
    "inspect": ("b/a.jsonl", lambda folder: inspect_main(InspectDataConfig(path="broken://b/a.jsonl"))),
    "inspect tokens": ("b/p", lambda folder: inspect_main(InspectDataConfig(path="broken://b/p"))),
}
ERRORS = [
    (PermissionError("not yours"), "permission denied: not yours; set credentials ("),
    (
        NoCredentialsError("Unable to locate credentials"),
        "NoCredentialsError: Unable to locate credentials; set credentia",
    ),
    (ConnectionError("refused"), "ConnectionError: refused; check the network and the settings of broken://"),
    (KeyError("region"), "KeyError: 'region'; check the network and the settings of broken://"),
    (
        ModuleNotFoundError("No module named 'x.y'", name="x.y"),
        "No module named 'x.y'; install it: .venv/bin/pip install x",
    ),
]


@pytest.mark.parametrize("where", ["constructor", "list", "open"])
@pytest.mark.parametrize(("error", "message"), ERRORS, ids=lambda value: type(value).__name__)
def test_the_message_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str, error: Exception, message: str
) -> None:
    for use, (path, call) in USES.items():
        Broken.where, Broken.error = where, error
        with pytest.raises(ValueError, match=f"broken://{path}") as found:  # which ends a command with exit code 2
            call(tmp_path)
        assert message in str(found.value) + capsys.readouterr().out, use


def test_a_package_of_a_known_file_system_is_named() -> None:
    assert storage._needs_package("s3", ImportError("Install s3fs to access S3")) == (
        "needs the package s3fs, which is not installed: .venv/bin/pip install s3fs"
    )
    error = ModuleNotFoundError("No module named 'aiobotocore.session'", name="aiobotocore.session")
    assert storage._needs_package("s3", error).endswith(
        "'aiobotocore.session'; install it: .venv/bin/pip install aiobotocore"
    )
    denied = PermissionError(13, "Access Denied")
    assert "AWS_ACCESS_KEY_ID" in storage._reason("s3://b/a", denied) and "HF_TOKEN" in storage._reason(
        "hf://b", denied
    )
