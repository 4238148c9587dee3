"""Tokenizers of SentencePiece and tiktoken, beside the original packages where these are installed."""

import base64
import functools
import struct
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.documents import standard_library_files
from corpus.tokenizer import Tokenizer
from corpus.tokenizer_files import tokenizer_json
from corpus.tokenizer_formats import sentencepiece, tiktoken

PARTS = [
    "a",
    "Ab",
    "the ",
    " The",
    "  ",
    "\n",
    "\r\n",
    "\t",
    " ",
    "'s",
    "'LL",
    "123",
    "4567",
    "é",
    "É",
    "ﬁ",
    "ｶﾞ",
    "中文",
]
PARTS += ["\U0001f389", "\0", "<s>", "</s>", "<0x41>", "<unk>", "▁", "...", "!?", "def f(x):", "\u200b", "e\u0301", "/"]
texts = st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=12).map("".join)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def message(*fields: tuple[int, Any]) -> bytes:
    """In the encoding of Protocol Buffers, by its documentation."""
    written = b""
    for number, value in fields:
        if isinstance(value, float):
            written += varint(number << 3 | 5) + struct.pack("<f", value)
        elif isinstance(value, int):
            written += varint(number << 3) + varint(value)
        else:
            data = value.encode() if isinstance(value, str) else value
            written += varint(number << 3 | 2) + varint(len(data)) + data
    return written


def model(kind: int, pieces: list[tuple[str, float, int]], **normalizer: int) -> bytes:
    numbers = {"dummy_prefix": 3, "remove_spaces": 4}
    return message(
        *((1, message((1, text), (2, score), (3, of))) for text, score, of in pieces),
        (2, message((3, kind), (35, 1), (40, 0))),
        (3, message(*((numbers[name], value) for name, value in normalizer.items()))),
    )


PIECES = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
BYTES = [(f"<0x{i:02X}>", 0.0, 6) for i in range(256)]
WORDS = [("▁the", -1.0, 1), ("▁", -2.0, 1), ("th", -2.5, 1), ("the", -2.75, 1), ("▁t", -2.8, 1)]
WORDS += [*((c, -3.0 - i, 1) for i, c in enumerate("thes<>/")), ("<s", -20.0, 1)]


@pytest.mark.parametrize(("kind", "name"), [(1, "unigram"), (2, "bpe")])
def test_a_sentencepiece_model_drawn_by_hand(kind: int, name: str, tmp_path: Path) -> None:
    (tmp_path / "m.model").write_bytes(model(kind, [*PIECES, *BYTES, *WORDS], remove_spaces=0))
    tokenizer = Tokenizer.load(tokenizer_json(str(tmp_path / "m.model"), "data.tokenizer"), "</s>")
    ids = {text: i for i, (text, _, _) in enumerate([*PIECES, *BYTES, *WORDS])}
    assert tokenizer.eod_id == 2 and tokenizer.vocab_size == len(ids)

    def pieces(text: str) -> list[str | None]:
        return [tokenizer.token(i) for i in tokenizer.encode(text)]

    assert pieces("the  the") == ["▁the", "▁", "▁the"]
    assert pieces("é") == ["▁", "<0xC3>", "<0xA9>"]
    # Never the control symbol. A unigram model takes what scores best, BPE every merge that there is.
    assert pieces("<s>") == (["▁", "<", "s", ">"] if name == "unigram" else ["▁", "<s", ">"])
    assert pieces("") == []
    for text in ("the  é <s> the", " the"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_models_that_cannot_be_represented(tmp_path: Path) -> None:
    path = tmp_path / "m.model"
    for content, why in {
        model(3, [*PIECES, *WORDS]): "of words or characters",
        model(1, [*PIECES, ("<mask>", 0.0, 4)]): r"symbols of its own \(<mask>\)",
        model(1, [*PIECES, ("x", 0.0, 5)]): "with unused pieces",
        model(1, WORDS): "without a piece for what is unknown",
        b"\x0a\x05": "no SentencePiece model",
        b"": "it has no pieces",
        b"YQ== 0\nYg== 1\n": "no rank of 254 of the 256 bytes, such as 0",
        b"YQ== 0\nb\n": "line 2 is not a token in Base64 and its rank",
    }.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"data.tokenizer .*m.model cannot be read: .*{why}"):
            tokenizer_json(str(path), "data.tokenizer")


def test_a_converted_tokenizer_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.model"
    path.write_bytes(model(1, [*PIECES, *WORDS]))
    first = tokenizer_json(str(path), "data.tokenizer")
    with monkeypatch.context() as patch:
        patch.setattr(sentencepiece, "convert", None)
        assert tokenizer_json(str(path), "data.tokenizer") == first
    path.write_bytes(model(1, [*PIECES, *WORDS[1:]]))
    assert tokenizer_json(str(path), "data.tokenizer") != first


def library_text() -> str:
    return "".join(Path(path).read_text(errors="replace") for path in standard_library_files()[::40])[:300_000]


@pytest.fixture(scope="module", params=["unigram", "bpe", "plain"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tokenizer]:
    """A model that sentencepiece trained, opened by it and by us: with the normalisation of T5 and ALBERT, or with
    the settings of Llama."""
    package = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(library_text())
    llama = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    settings = {"unigram": {}, "bpe": llama | {"model_type": "bpe"}, "plain": llama | {"add_dummy_prefix": False}}
    package.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "m"),
        vocab_size=600,
        minloglevel=2,
        max_sentence_length=2000,
        **settings[request.param],
    )
    theirs = package.SentencePieceProcessor(model_file=str(folder / "m.model"))
    (folder / "t.json").write_text(sentencepiece.convert((folder / "m.model").read_bytes()).to_str())
    return theirs, Tokenizer.load(str(folder / "t.json"), "</s>")


@settings(max_examples=150, deadline=None)
@given(text=texts)
def test_sentencepiece_gives_the_same_ids(trained: tuple[Any, Tokenizer], text: str) -> None:
    theirs, ours = trained
    if normalised(ours, text) != theirs.normalize(text).replace(" ", "▁"):
        graphemes = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\X"), "isolated").pre_tokenize_str(text)
        assert any(len(grapheme) > 1 for grapheme, _ in graphemes)  # the module's docstring
        return
    assert same_or_tied(trained, ours.encode(text), theirs.encode(text))


def normalised(ours: Tokenizer, text: str) -> str:
    steps = ours._inner.normalizer
    return (steps.normalize_str(text) if steps else text).replace(" ", "▁")


@pytest.mark.parametrize("trained", ["unigram"], indirect=True)
def test_rules_of_normalisation_are_applied_by_grapheme(trained: tuple[Any, Tokenizer]) -> None:
    theirs, ours = trained
    for text, by_grapheme, by_character in (
        ("e\u0301", "é", "é"),
        ("\ufb01", "fi", "fi"),
        ("e\u0301\U0001f3fb", "e\u0301\U0001f3fb", "é\U0001f3fb"),
        ("\ufb01\u0301", "fi", "fi\u0301"),
    ):
        assert normalised(ours, text) == f"▁{by_grapheme}"
        assert theirs.normalize(text).replace(" ", "▁") == f"▁{by_character}"


def test_a_long_text_of_sentencepiece(trained: tuple[Any, Tokenizer]) -> None:
    theirs, ours = trained
    lines = library_text().splitlines()[:1500]
    pairs = list(zip(ours.encode_batch(lines), theirs.encode(lines), strict=True))
    assert all(same_or_tied(trained, *pair) for pair in pairs)
    assert sum(found != wanted for found, wanted in pairs) < 0.01 * len(pairs)


def same_or_tied(trained: tuple[Any, Tokenizer], found: list[int], wanted: list[int]) -> bool:
    """Whether two splits of a text are one or, of a unigram model, the same pieces in another order (`0 0 000` and
    `0 000 0`): equally probable, so that the rounding of a sum decides between them."""
    theirs, ours = trained
    if isinstance(ours._inner.model, tokenizers.models.Unigram) and sorted(found) == sorted(wanted):
        return theirs.decode(found) == theirs.decode(wanted)
    return found == wanted


@functools.cache
def ranks() -> dict[bytes, int]:
    """Of a byte-level BPE that is trained here: its tokens in the order of their ids, bytes first."""
    trained = Tokenizer.train([library_text()], vocab_size=900, eod_token="<eod>")
    byte_of = {letter: byte for byte, letter in enumerate(tiktoken._letters())}
    tokens = [bytes(byte_of[c] for c in trained.token(i) or "") for i in range(1, trained.vocab_size)]
    return {token: i for i, token in enumerate(sorted(tokens, key=lambda token: (len(token) > 1, tokens.index(token))))}


def file_of(found: dict[bytes, int]) -> bytes:
    return b"".join(b"%b %d\n" % (base64.b64encode(token), rank) for token, rank in found.items())


PATTERNS = {encoding.pattern: encoding.name for encoding in tiktoken.ENCODINGS}


@pytest.fixture(scope="module", params=PATTERNS, ids=lambda pattern: PATTERNS[pattern])
def ranked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tokenizer]:
    """An encoding with the pattern of a published one, ranks of its own, and ids without a token before the last."""
    package = pytest.importorskip("tiktoken")
    given = tiktoken.Encoding("own", len(ranks()), request.param, {"<|end|>": len(ranks()) + 3})
    theirs = package.Encoding("own", pat_str=given.pattern, mergeable_ranks=ranks(), special_tokens=given.special)
    path = tmp_path_factory.mktemp("ranked") / "t.json"
    path.write_text(tiktoken.convert(file_of(ranks()), given).to_str())
    return theirs, Tokenizer.load(str(path), "<|end|>")


@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_tiktoken_gives_the_same_ids(ranked: tuple[Any, Tokenizer], text: str) -> None:
    theirs, ours = ranked
    assert ours.encode(text) == theirs.encode_ordinary(text)
    assert ours.decode(ours.encode(text)) == text
    assert ours.eod_id == len(ranks()) + 3


def test_a_long_text_of_tiktoken(ranked: tuple[Any, Tokenizer]) -> None:
    theirs, ours = ranked
    text = library_text()
    assert ours.encode(text) == theirs.encode_ordinary(text)


def test_the_encoding_is_known_by_the_number_of_ranks(tmp_path: Path) -> None:
    """r50k_base has 256 bytes and 50,000 merges, and ends with <|endoftext|>."""
    tokens = [bytes([i]) for i in range(256)]
    tokens += [bytes([i, j]) for i in range(196) for j in range(256)][: 50256 - 256]
    (tmp_path / "gpt2.tiktoken").write_bytes(file_of({token: i for i, token in enumerate(tokens)}))
    tokenizer = Tokenizer.load(tokenizer_json(str(tmp_path / "gpt2.tiktoken"), "data.tokenizer"), "<|endoftext|>")
    assert (tokenizer.eod_id, tokenizer.vocab_size) == (50256, 50257)
    assert tokenizer.encode("\0\1<|endoftext|>")[0] == 256 + 1
    with pytest.raises(
        ValueError, match=r"it has 256 ranks of tiktoken, .*r50k_base \(GPT-2\) 50,256, .*tokenizer.json"
    ):
        tiktoken.convert(file_of({bytes([i]): i for i in range(256)}))


@pytest.mark.parametrize("encoding", tiktoken.ENCODINGS, ids=lambda encoding: encoding.name)
def test_special_tokens_have_the_published_ids(encoding: tiktoken.Encoding) -> None:
    published = {
        "cl100k_base (GPT-4)": {"<|endoftext|>": 100257, "<|fim_suffix|>": 100260, "<|endofprompt|>": 100276},
        "o200k_base (GPT-4o)": {"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
        "Llama 3": {"<|end_of_text|>": 128001, "<|end_header_id|>": 128007, "<|eot_id|>": 128009}
        | {"<|reserved_special_token_250|>": 128255},
        "Qwen": {"<|endoftext|>": 151643, "<|im_end|>": 151645, "<|extra_204|>": 151850},
    }
    expected = published.get(encoding.name, {"<|endoftext|>": 50256})
    assert {token: encoding.special[token] for token in expected} == expected
