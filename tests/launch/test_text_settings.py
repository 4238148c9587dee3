"""Text settings take what a person types, and what a command prints to be copied is read back as it was meant."""

import shlex
import subprocess
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from conf.commands import GenerateConfig, PrepareConfig
from conf.override_text import as_typed, command, override
from conf.schema import Config
from launch.settings import setting_types

AWKWARD = [
    "def f(x):",
    "a, b",
    "f(x)",
    '/data/a b/x=1,(2)/it\'s "here".txt',
    "    def __init__(self",
    "trailing ",
    "1e3",
    "007",
    "true",
    "[1, 2]",
    "{a: 1}",
    "range(3)",
    "x = 'a' + \"b\"",
    "back\\slash\\",
    "\\${escaped} ${no.such} \\\\${x}",
    "# comment",
    "~/home",
    "é 漢\nline",
    "100%",
    "$HOME `ls`",
    "a\\ b",
    "",
]


def read(word: str) -> Any:
    """The value that Hydra and OmegaConf make of an override."""
    (found,) = OverridesParser.create().parse_overrides([word])
    config = OmegaConf.create({"value": found.value(), "model": {"name": "tiny"}})
    return OmegaConf.to_container(config, resolve=True)["value"]


def typed(word: str, schema: type, *, sweep: bool = False) -> str:
    return as_typed(word, setting_types(schema), sweep=sweep)


@pytest.mark.parametrize("text", AWKWARD)
def test_a_prompt_is_what_was_typed(text: str) -> None:
    if text != "a\\ b" and "${" not in text:  # Hydra's own escape, and interpolations, in what is not free text
        assert read(typed(f"run.dir={text}", Config)) == text
    assert read(typed(f"prompt={text}", GenerateConfig)) == text
    assert read(typed(f"eval.sample_prompt={text}", Config)) == text


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("data.files=/a b/x=1.txt", ["/a b/x=1.txt"]),
        ("data.files=a, b (1).txt", ["a, b (1).txt"]),
        ("data.files=[a.txt,/b (1)/x=2.txt]", ["a.txt", "/b (1)/x=2.txt"]),
        ("data.files=['a, b.txt',c=d.txt]", ["a, b.txt", "c=d.txt"]),
        ("data.files=[]", []),
        ("++data.files='a b.txt'", ["a b.txt"]),
    ],
)
def test_a_list_of_paths_is_what_was_typed(word: str, value: list[str]) -> None:
    assert read(typed(word, Config)) == value


def test_what_hydra_reads_as_it_is_meant_stays() -> None:
    for word in ("run.name='a, b'", "run.name=null", "run.name=${model.name}-x", "train.steps=3", "model=tiny_dense"):
        assert typed(word, Config) == word
    assert typed("input=[a,b]", PrepareConfig) == "input=[a,b]"
    assert typed("precision=fp32,bf16", Config, sweep=True) == "precision=fp32,bf16"
    assert typed("precision=fp32,bf16", Config) == "precision='fp32,bf16'"
    assert read(typed("input=a (1).txt", PrepareConfig)) == "a (1).txt"


@pytest.mark.parametrize("text", AWKWARD)
def test_what_is_printed_for_copying_is_valid_shell_and_valid_hydra(text: str) -> None:
    line = command(["printf", "%s\\0"], [override("run.dir", text), override("data.files", [text, "b"])], {"A": text})
    words = subprocess.run(["bash", "-c", line], capture_output=True, check=True).stdout.decode().split("\0")[:-1]
    assert words == shlex.split(line)[-2:]
    assert [read(word) for word in words] == [text, [text, "b"]]
    # Again through a command of ours.
    assert [typed(word, Config) for word in words] == words
