"""A directory of a Hugging Face tokenizer wherever a tokenizer.json is taken."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from conf.commands import PrepareConfig
from corpus.prepare import prepare
from corpus.tokenizer import Tokenizer
from corpus.tokenizer_files import companions, tokenizer_json
from launch.prepare import main
from tests.training.helpers import tiny_config, write_corpus
from training.run_dir import open_run_dir

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A tokenizer as Transformers writes one."""
    transformers = pytest.importorskip("transformers")
    texts = [json.loads(line)["text"] for line in write_corpus(tmp_path).read_text().splitlines()]
    made = Tokenizer.train(texts, vocab_size=300, eod_token="<|endoftext|>")
    made.save(str(tmp_path / "made.json"))
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "made.json"), eos_token="<|endoftext|>"
    )
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def test_a_directory_is_its_tokenizer_json(directory: Path, tmp_path: Path) -> None:
    config = tiny_config(write_corpus(tmp_path), tmp_path / "run")
    tokens = []
    for given in (directory, directory / "tokenizer.json"):
        data = replace(config.data, tokenizer=str(given))
        prepared = prepare(data, vocab_size=320, sequence_length=32)
        assert prepared.tokenizer == str(directory / "tokenizer.json")
        tokens.append([source.sha256 for source in prepared.train])
    assert tokens[0] == tokens[1]


def test_a_run_keeps_the_chat_template(directory: Path, tmp_path: Path) -> None:
    config = tiny_config(write_corpus(tmp_path), tmp_path / "run")
    config = replace(config, data=replace(config.data, tokenizer=str(directory)))
    run = open_run_dir(config)
    run.adopt(config, tokenizer_json(str(directory), "data.tokenizer"))
    kept = {path.name: path.read_text() for path in companions(run.path / "tokenizer.json")}
    assert kept["chat_template.jinja"] == TEMPLATE
    assert json.loads(kept["tokenizer_config.json"])["eos_token"] == "<|endoftext|>"
    # A run that starts from it finds them as well: there they belong to the run's tokenizer.json.
    assert {path.name for path in companions(tokenizer_json(str(run.path), "data.tokenizer"))} == set(kept)


def test_prepare_takes_a_directory(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.txt").write_text("words and words\n" * 50)
    settings = {"input": [str(tmp_path / "own.txt")], "output": str(tmp_path / "own")}
    assert main(PrepareConfig(tokenizer=str(directory), **settings)) == 0
    assert (tmp_path / "own.tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()
    assert "train on it" in capsys.readouterr().out


def test_neighbours_of_a_file_with_another_name_are_not_its_own(directory: Path) -> None:
    other = (directory / "tokenizer.json").rename(directory / "other.json")
    assert companions(other) == []


def test_what_is_missing_is_named(directory: Path) -> None:
    with pytest.raises(ValueError, match=r"data.tokenizer .*theirz does not exist; .*theirs"):
        tokenizer_json(f"{directory.parent}/theirz", "data.tokenizer")
    (directory / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"theirs has no tokenizer.json$"):
        tokenizer_json(str(directory), "data.tokenizer")
    (directory / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ValueError, match=r"only tokenizer.model: convert it with Transformers: .*save_pretrained"):
        tokenizer_json(str(directory), "data.tokenizer")
