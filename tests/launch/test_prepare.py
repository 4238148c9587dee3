import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conf.commands import PrepareConfig
from conf.schema import DataConfig
from corpus.prepare import prepare
from corpus.resumable import resumable_folder
from corpus.tokenizer import Tokenizer
from launch.prepare import main
from tests.corpus.helpers import token_range
from training.console import Console

TEXTS = [f"Document {i} is about {'numbers ' * (i % 5)}and words.\n" for i in range(80)]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    (tmp_path / "one.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in TEXTS))
    (tmp_path / "two.txt").write_bytes(b"\xffplain text")
    (tmp_path / "null").mkdir()
    (tmp_path / "null" / "null.jsonl").write_text('{"body": "x"}\n{"body": null}')
    return [f"{tmp_path}/*.jsonl", f"{tmp_path}/two.txt"]


def test_the_output_is_trained_on_as_megatron_data(files, tmp_path, capsys):
    prefix = f"{tmp_path}/made/here/corpus"
    assert main(PrepareConfig(input=files, output=prefix, vocab_size=300, text_key="body")) == 0
    printed = capsys.readouterr().out
    assert f"1 invalid UTF-8 sequence replaced in {tmp_path}/two.txt" in printed
    words = shlex.split(printed[printed.index("train on it: ") :].splitlines()[0])[3:]
    assert words == ["data=megatron", f"data.files=[{prefix}]", f"data.tokenizer={prefix}.tokenizer.json"]
    assert sorted(path.name for path in Path(prefix).parent.iterdir()) == [
        "corpus.bin",
        "corpus.idx",
        "corpus.tokenizer.json",
    ]
    data = DataConfig(kind="megatron", files=[prefix], tokenizer=f"{prefix}.tokenizer.json", valid_fraction=0.1)
    data.cache_dir = str(tmp_path / "cache")
    prepared = prepare(data, vocab_size=300, sequence_length=16)
    assert (prepared.train[0].num_documents, prepared.valid[0].num_documents) == (73, 8)
    text = Tokenizer.load(f"{prefix}.tokenizer.json", "<|endoftext|>").decode(token_range(prefix, 0, 81).tolist())
    assert text == "".join(f"{text}<|endoftext|>" for text in [*TEXTS, "\ufffdplain text"])


def test_a_given_tokenizer_is_used_and_copied(files, tmp_path):
    Tokenizer.train(["abc"], vocab_size=280, eod_token="<end>").save(f"{tmp_path}/given.json")
    config = PrepareConfig(input=files[1], output=f"{tmp_path}/out", tokenizer=f"{tmp_path}/given.json")
    config.eod_token = "<end>"
    assert main(config) == 0
    assert Path(f"{tmp_path}/out.tokenizer.json").read_bytes() == Path(f"{tmp_path}/given.json").read_bytes()


def test_an_interrupted_command_continues(files, tmp_path, monkeypatch):
    """With the tokenizer and the token files that it has left, unless it is another command."""
    settings = {"input": files, "vocab_size": 300, "text_key": "body"}
    assert main(PrepareConfig(output=f"{tmp_path}/whole", **settings)) == 0

    def interrupt(self: Console, what: str, done: float) -> None:
        if what == "tokenising":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Console, "progress", interrupt)
        with pytest.raises(KeyboardInterrupt):
            main(PrepareConfig(output=f"{tmp_path}/out", **settings))
    left = tmp_path / ".out.partial"
    assert (left / "tokenizer.json").exists() and not [*tmp_path.glob("out*")]
    train, trained = Tokenizer.train, []
    monkeypatch.setattr(Tokenizer, "train", lambda *a, **k: trained.append(1) or train(*a, **k))
    shutil.copytree(left, tmp_path / ".other.partial")
    assert main(PrepareConfig(output=f"{tmp_path}/out", **settings)) == 0 and not trained
    for suffix in (".bin", ".idx", ".tokenizer.json"):
        assert Path(f"{tmp_path}/out{suffix}").read_bytes() == Path(f"{tmp_path}/whole{suffix}").read_bytes()
    assert main(PrepareConfig(output=f"{tmp_path}/other", **settings | {"vocab_size": 290})) == 0 and trained
    assert not [*tmp_path.glob(".*")]


def test_two_commands_do_not_write_the_same_output(files, tmp_path):
    with (
        resumable_folder(tmp_path / ".out.partial", ["work"]),
        pytest.raises(ValueError, match=r"another process writes to .*\.out\.partial"),
    ):
        main(PrepareConfig(input=files, output=f"{tmp_path}/out", vocab_size=300, text_key="body"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": "{}/three.txt"}, r"three\.txt does not exist"),
        (
            {"text_key": "text", "input": "{}/one.jsonl"},
            r"one\.jsonl line 1 has no field 'text'; set text_key to one that it has: body",
        ),
        ({"output": "{}/out.bin"}, r"name it without the suffix, output=.*/out$"),
        ({"output": "{}/there"}, r"there\.idx exists already"),
        ({"output": "{}/two.txt/out"}, r"cannot be created"),
        ({"output": ""}, "output= names a folder; add a name for the files: output=corpus$"),
        ({"output": "{}/"}, r"names a folder; add a name for the files: output=/.*[^/]/corpus$"),
        ({"output": "{}"}, "names a folder"),
        ({"output": "{}/.."}, "names a folder"),
        ({"output": "{}/" + "a" * 250}, "cannot be written: File name too long"),
        ({"tokenizer": "{}/" + "a" * 300}, "cannot be read: File name too long"),
        (
            {"strict": True, "text_key": "body", "input": "{}/null/null.jsonl"},
            r"null\.jsonl line 2: field 'body' is null",
        ),
        ({"vocab_size": 10}, "vocab_size=10 is too small"),
        ({"tokenizer": "{}/two.txt"}, "is not a Hugging Face tokenizer"),
    ],
)
def test_what_is_refused_leaves_nothing_behind(files, tmp_path, change, message):
    (tmp_path / "there.idx").write_text("")
    before = sorted(tmp_path.iterdir())
    settings = {"input": files, "output": f"{tmp_path}/out", "text_key": "body"}
    settings |= {key: value.format(tmp_path) if isinstance(value, str) else value for key, value in change.items()}
    with pytest.raises(ValueError, match=message):
        main(PrepareConfig(**settings))
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_maps_a_bad_input_to_exit_code_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "launch.prepare", f"input={tmp_path}/no.txt", f"output={tmp_path}/out"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 2 and "no.txt does not exist" in done.stderr and "Traceback" not in done.stderr
