import json
from itertools import chain

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from corpus import tokenizer as module
from corpus.tokenizer import Tokenizer

EOD = "<|endoftext|>"
TRAINING = [
    "def f(x):\n    return x + 1\n" * 20,
    "naïve café, naïve café. 東京 東京 🎉🎉",
    "it's what we're after\n\n\nsaid   \n\n he\n\n",
] * 3


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train(TRAINING, vocab_size=400, eod_token=EOD)


texts = st.text() | st.lists(st.sampled_from([" ", "\n", "\r\n", "x", "return", EOD, "é", "🎉", "'s"])).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=texts)
def test_every_text_comes_back_and_its_bytes_add_up(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.byte_lengths()[ids].sum() == len(text.encode())
    assert trained.eod_id not in ids  # spelled out, it is text


def test_merges_are_learned(trained):
    assert len(trained.encode(" return")) == 1 and trained.vocab_size <= 400
    lengths = trained.byte_lengths()
    assert lengths[trained.eod_id] == 0
    assert lengths[trained.encode(" return")].tolist() == [7]
    assert lengths[trained.encode("\U0001f600")].tolist() == [2, 1, 1]  # "🎉" has taught the first two bytes together
    assert (lengths[[i for i in range(trained.vocab_size) if i != trained.eod_id]] > 0).all()


def test_training_again_gives_the_same_tokenizer(trained, tmp_path):
    trained.save(str(tmp_path / "one.json"))
    Tokenizer.train(TRAINING, vocab_size=400, eod_token=EOD).save(str(tmp_path / "two.json"))
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    loaded = Tokenizer.load(str(tmp_path / "one.json"), EOD)
    assert (loaded.vocab_size, loaded.eod_id) == (trained.vocab_size, trained.eod_id)
    assert loaded.encode_batch(TRAINING) == [trained.encode(text) for text in TRAINING]


def byte_level(**settings) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **settings})


def split(regex: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(tokenizers.Regex(regex), behavior="isolated"), byte_level(use_regex=False)]
    )


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
METASPACE = pre_tokenizers.Metaspace
PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
# Whether a text may be cut, then the tokenizer's normalizer, pre-tokenizer and added tokens.
CUTS = {
    "gpt 2": (True, None, byte_level(), []),
    "a space before the text": (True, None, byte_level(add_prefix_space=True), []),
    "no words": (False, None, byte_level(use_regex=False), []),
    "llama 3": (True, None, split(LLAMA_3), []),
    "qwen": (True, normalizers.NFC(), split(LLAMA_3.replace("{1,3}", "")), []),
    "another regex": (False, None, split(r"\w+ \w+|."), []),
    "metaspace always": (True, None, METASPACE(prepend_scheme="always"), []),
    "metaspace first": (True, None, METASPACE(prepend_scheme="first"), []),
    "metaspace never": (True, None, METASPACE(prepend_scheme="never"), []),
    "metaspace unsplit": (False, None, METASPACE(prepend_scheme="always", split=False), []),
    "sentencepiece": (False, PREPEND, None, []),
    "stripped": (False, normalizers.Strip(), byte_level(), []),
    "runs of spaces": (True, None, byte_level(), [AddedToken("  "), AddedToken("\n\n")]),
    "a token over the cut": (False, None, byte_level(), [AddedToken("x a")]),
    "a token that takes spaces": (False, None, byte_level(), [AddedToken("bc", rstrip=True)]),
}


@pytest.fixture(scope="module", params=CUTS)
def any_kind(request, tmp_path_factory) -> tuple[bool, Tokenizer]:
    """A BPE with merges over whatever its pre-tokenizer leaves together, and whether texts may be cut for it."""
    may_be_cut, normalizer, pre_tokenizer, added = CUTS[request.param]
    inner = tokenizers.Tokenizer(models.BPE(unk_token="?", byte_fallback=True))
    inner.normalizer, inner.pre_tokenizer = normalizer, pre_tokenizer
    alphabet = [*pre_tokenizers.ByteLevel.alphabet(), *" \n▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[EOD, "?"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(["a bc a bc\nx a x a\n 1 1\n1\n" * 3, *TRAINING], trainer)
    inner.add_tokens(added)
    return may_be_cut, Tokenizer.load(save(inner, tmp_path_factory.mktemp("kind") / "t.json"), EOD)


pieces = st.sampled_from(
    ["a", "bc", "x", " ", "  ", "\n", "\r\n", "1", ".", "'s", "▁", "é", "e", "\u0301", "\xa0", EOD]
)


@settings(max_examples=60, deadline=None)
@given(text=st.lists(pieces, max_size=24).map("".join) | st.text())
def test_cutting_a_long_text_changes_nothing(any_kind, text):
    _, tokenizer = any_kind
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SEGMENT", 3)
        parts = tokenizer.segments(text)
    assert "".join(parts) == text
    assert list(chain(*tokenizer.encode_batch(parts))) == tokenizer.encode(text)


def test_long_texts_are_cut_where_that_is_known_to_be_harmless(any_kind, monkeypatch):
    may_be_cut, tokenizer = any_kind
    monkeypatch.setattr(module, "_SEGMENT", 5)
    assert (len(tokenizer.segments("one two three four five")) > 1) == may_be_cut


def test_where_long_texts_are_cut(trained, monkeypatch):
    monkeypatch.setattr(module, "_SEGMENT", 5)
    assert trained.segments("one two three\nfour  five") == ["one two", " three\n", "four  five"]


def save(inner: tokenizers.Tokenizer, path) -> str:
    inner.save(str(path))
    return str(path)


def test_lengths_of_a_tokenizer_that_is_not_byte_level(tmp_path):
    """SentencePiece's manner: words begin with U+2581, rare characters are spelled out in bytes."""
    pieces = ["<unk>", "▁the", "▁cat", "s", "▁", "é", *(f"<0x{byte:02X}>" for byte in range(256))]
    inner = tokenizers.Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens([EOD])
    loaded = Tokenizer.load(save(inner, tmp_path / "t.json"), EOD)
    for text in (" the cats", " cat é \U0001f389", "s s"):
        assert loaded.byte_lengths()[loaded.encode(text)].sum() == len(text.encode())
    assert loaded.byte_lengths()[loaded.eod_id] == 0


def test_nothing_is_added_or_cut(tmp_path):
    inner = tokenizers.Tokenizer(models.WordLevel({"[CLS]": 0, "[SEP]": 1, "a": 2, "b": 7}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 1), ("[CLS]", 0))
    inner.add_special_tokens(["[CLS]", "[SEP]"])
    inner.enable_truncation(2)
    inner.enable_padding()
    loaded = Tokenizer.load(save(inner, tmp_path / "t.json"), "[SEP]")
    assert loaded.encode_batch(["b b b b", "a"]) == [[7, 7, 7, 7], [2]]
    assert loaded.vocab_size == 8  # ids have a gap


def test_unsuitable_tokenizer_files(trained, tmp_path):
    trained.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "other.json").write_text(json.dumps({"a": 1}))
    for name, eod, message in [
        ("tokenizer.json", "</s>", rf"has no token '</s>'; set eod_token to one that it has: {EOD.replace('|', '.')}"),
        ("tokeniser.json", EOD, r"tokeniser\.json does not exist; did you mean .*tokenizer\.json\?"),
        ("other.json", EOD, r"other\.json is not a Hugging Face tokenizer\.json"),
    ]:
        with pytest.raises(ValueError, match=message):
            Tokenizer.load(str(tmp_path / name), eod)
    with pytest.raises(ValueError, match=r"vocab_size=256 is too small .* set it to 257 or more"):
        Tokenizer.train(TRAINING, vocab_size=256, eod_token=EOD)
