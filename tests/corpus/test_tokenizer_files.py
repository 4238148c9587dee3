"""A directory of a Hugging Face tokenizer wherever a tokenizer.json is taken."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers

from conf.commands import PrepareConfig
from corpus.prepare import prepare
from corpus.tokenizer import Tokenizer
from corpus.tokenizer_files import companions, tokenizer_json
from corpus.tokenizer_formats import transformers_folder
from corpus.tokenizer_formats.transformers_folder import SAMPLE
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


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("corpus.tokenizer_files.ROOT", str(tmp_path / "cache"))
    return tmp_path / "cache"


TEXTS = ["The router sends 1234 tokens.\n" * 3, "def f(x):\n    return x + 1\n", "\u00dcn\u00efc\u00f6d\u00e9"]


def of_class(folder: Path, name: str, **settings: str) -> Path:
    """The folder of a tokenizer of one of Transformers' classes, without tokenizer.json."""
    folder.mkdir(exist_ok=True)
    settings |= {"tokenizer_class": name, "eos_token": "<|endoftext|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_vocab_and_merges_are_converted(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    made = Tokenizer.train(TEXTS, vocab_size=330, eod_token="<|endoftext|>")
    folder = of_class(tmp_path / "gpt2", "GPT2Tokenizer", unk_token="<|endoftext|>")
    made._inner.model.save(str(folder))
    path = tokenizer_json(str(folder), "data.tokenizer")
    found = Tokenizer.load(path, "<|endoftext|>")
    assert [found.encode(text) for text in SAMPLE] == [made.encode(text) for text in SAMPLE]
    assert [json.loads(file.read_text())["chat_template"] for file in companions(path)] == [TEMPLATE]
    with monkeypatch.context() as patch:  # the next start takes it from the cache
        patch.setattr(transformers_folder, "convert", lambda folder: pytest.fail("converted again"))
        assert tokenizer_json(str(folder), "data.tokenizer") == path
    # One that gives other ids is refused: here one whose merges were lost.
    wrong = json.loads(Path(path).read_text())
    wrong["model"]["merges"] = []
    backend = transformers.tokenization_utils_tokenizers.TokenizersBackend
    monkeypatch.setattr(backend, "backend_tokenizer", tokenizers.Tokenizer.from_str(json.dumps(wrong)))
    of_class(folder, "GPT2Tokenizer", unk_token="<|endoftext|>", pad_token="<|endoftext|>")
    with pytest.raises(ValueError, match=r"has no tokenizer.json, and the conversion of GPT2Tokenizer gives other ids"):
        tokenizer_json(str(folder), "data.tokenizer")


def test_a_sentencepiece_model_with_its_class(tmp_path: Path, cache: Path) -> None:
    """The ids are those of the class, which are not always SentencePiece's."""
    transformers, sentencepiece = map(pytest.importorskip, ("transformers", "sentencepiece"))
    model = io.BytesIO()
    lines = [line for text in TEXTS for line in text.splitlines()] * 50
    how = {"vocab_size": 330, "model_type": "bpe", "byte_fallback": True, "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **how)
    folder = of_class(tmp_path / "llama", "LlamaTokenizer")
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    found = Tokenizer.load(tokenizer_json(str(folder), "data.tokenizer"), "<|endoftext|>")
    for text in (*SAMPLE, *TEXTS):
        assert found.encode(text) == theirs.encode(text, add_special_tokens=False)
    (folder / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ValueError, match=r"and Transformers finds no vocabulary for LlamaTokenizer in it; name"):
        tokenizer_json(str(folder), "data.tokenizer")


def test_what_has_no_conversion_is_refused_with_the_reason(tmp_path: Path, cache: Path) -> None:
    pytest.importorskip("transformers")
    folder = of_class(tmp_path / "byt5", "ByT5Tokenizer")
    (folder / "vocab.txt").write_text("")
    with pytest.raises(ValueError, match=r"byt5 has no tokenizer.json, and Transformers has no conversion of ByT5Tok"):
        tokenizer_json(str(folder), "data.tokenizer")
    assert not list(cache.glob("tokenizers/*"))
