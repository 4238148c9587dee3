"""Preferences: the formats of a row, its token ids, and the sequences of a run."""

import json

import numpy as np
import pytest

from conf.schema import DataConfig
from corpus.chat_template import ChatTemplate
from corpus.documents import BadRow
from corpus.preference_stream import PreferenceStream, held_out_set, training_set
from corpus.preferences import InvalidRow, encode, parse
from corpus.prepare import prepare
from corpus.tokenizer import Tokenizer

USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "2 + 2?"), ("assistant", "4"), ("assistant", "5")))
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    texts = ["User:\nAssistant:\n2 + 2? It is green. It is blue." * 3]
    Tokenizer.train(texts, vocab_size=280, eod_token="<|endoftext|>").save(str(path))
    return path


def loaded(path):
    return Tokenizer.load(str(path), "<|endoftext|>")


@pytest.mark.parametrize(
    ("row", "prompt", "responses"),
    [
        ({"prompt": "a ", "chosen": "b", "rejected": "c"}, "a ", ["b", "c"]),
        ({"chosen": "It is blue.", "rejected": "It is brown."}, "It is", [" blue.", " brown."]),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, [USER], [[GOOD], [BAD]]),
        ({"prompt": [USER], "chosen": "4", "rejected": "5"}, [USER], [[GOOD], [BAD]]),
        ({"prompt": "2 + 2?", "chosen": [GOOD], "rejected": [BAD]}, [USER], [[GOOD], [BAD]]),
        ({"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, [SYSTEM, USER], [[GOOD], [BAD]]),
        ({"prompt": "2 + 2?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER], [[GOOD], [BAD]]),
        ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER], [[GOOD], [BAD]]),
        ({"prompt": "a", "responses": ["b", "c", "d"]}, "a", ["b", "c", "d"]),
    ],
)
def test_the_formats_of_a_row(row, prompt, responses):
    got = parse(row, 3)
    assert (got.prompt, got.responses) == (prompt, responses)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "has no field rejected"),
        ({"prompt": "a", "text": "b"}, "has no field chosen and no field rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "has no field rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "two answers alike (chosen and rejected)"),
        ({"prompt": "a", "chosen": "b", "rejected": " \n"}, "empty answer (rejected)"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": []}, "empty answer (rejected)"),
        ({"prompt": [USER], "chosen": [GOOD | {"content": ""}], "rejected": [BAD]}, "empty answer (chosen)"),
        ({"chosen": "It is", "rejected": "It is"}, "two answers alike"),
        ({"prompt": "a", "chosen": 3, "rejected": "b"}, "'chosen' is int"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "'prompt' is int"),
        ({"prompt": [USER], "chosen": [{"content": "4"}], "rejected": [BAD]}, "'chosen': message 1 has no role"),
        ({"prompt": [USER | {"role": "robot"}], "chosen": [GOOD], "rejected": [BAD]}, "has the unknown role 'robot'"),
        ({"prompt": [{"role": "user"}], "chosen": [GOOD], "rejected": [BAD]}, "'prompt': message 1 (user) has no cont"),
        ({"prompt": "a", "chosen": "\ud800", "rejected": "b"}, "half a surrogate pair"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "has no prompt"),
        ({"prompt": "a", "responses": ["b"]}, "at least 2"),
        ({"prompt": "a", "responses": ["b", "c", "d", "e"]}, "preference.max_responses=4"),
        ({"prompt": "a", "responses": "b"}, "'responses' is str"),
        (BadRow("line 1", " is not valid JSON: x"), "is not valid JSON: x"),
    ],
)
def test_rows_that_cannot_be_used(row, message):
    with pytest.raises(InvalidRow) as raised:
        parse(row, 3)
    assert message in str(raised.value)


def test_the_tokens_of_strings_end_with_the_document(tokenizer):
    tokens = loaded(tokenizer)
    chosen, rejected = encode(parse({"prompt": "It is", "chosen": " blue.", "rejected": " green."}, 2), tokens, None)
    prompt = tokens.encode("It is")
    for got, text in ((chosen, " blue."), (rejected, " green.")):
        assert got.ids == [*tokens.encode("It is" + text), tokens.eod_id]
        assert got.counts == [i >= len(prompt) for i in range(len(got.ids))]


def test_the_tokens_of_a_conversation(tokenizer):
    """Only what the assistant generates in the answer counts, not its earlier turns."""
    tokens = loaded(tokenizer)
    before = [USER, {"role": "assistant", "content": "what?"}, USER]
    got = encode(parse({"prompt": before, "chosen": [GOOD], "rejected": [BAD]}, 2), tokens, ChatTemplate.of(None))
    for one, answer in zip(got, "45", strict=True):
        counted = [i for i, counts in zip(one.ids, one.counts, strict=True) if counts]
        assert tokens.decode(counted) == f"{answer}<|endoftext|>"
        assert tokens.decode(one.ids).startswith("User:\n2 + 2?\nAssistant:\nwhat?<|endoftext|>\nUser:\n2 + 2?\nAss")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def settings(tmp_path, tokenizer, rows, /, **given):
    files = [write(tmp_path / "rows.jsonl", rows)]
    given = {"tokenizer": str(tokenizer)} | given
    values = {"kind": "preference", "files": files, "cache_dir": str(tmp_path / "cache")}
    return DataConfig(**values | given)


def rows(count):
    return [{"prompt": f"{i} + 1?", "responses": [str(i + 1), str(i), "?"][: 2 + i % 2]} for i in range(count)]


def test_sequences_are_grouped_by_prompt_and_every_epoch_has_its_own_order(tmp_path, tokenizer):
    data = settings(tmp_path, tokenizer, rows(20), valid_fraction=0.2)
    prepared = prepare(data, vocab_size=280, sequence_length=16, max_responses=3)
    sizes = {"sequence_length": 16, "responses": 3}
    train, held_out = training_set(prepared, **sizes), held_out_set(prepared, **sizes)
    assert train.num_prompts + held_out.num_prompts == 20 and held_out.num_prompts > 0
    stream, tokens = PreferenceStream(train, seed=1), loaded(tokenizer)

    def text(index):
        sample = stream.sample(index)
        return tokens.decode(sample["tokens"][~sample["padding"]].tolist()).removesuffix("<|endoftext|>")

    epochs = [
        [[text((e * train.num_prompts + p) * 3 + k) for k in range(3)] for p in range(train.num_prompts)]
        for e in (0, 1)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    for first, second, third in epochs[0]:
        prompt = first.split("?")[0] + "?"
        number = int(prompt.split()[0])
        assert (first, second) == (f"{prompt}{number + 1}", f"{prompt}{number}")
        assert third == (f"{prompt}?" if number % 2 else "")
    padding = held_out.sample(len(held_out) + 1)
    assert padding["padding"].all() and not padding["loss_mask"].any()


def test_the_loss_mask_counts_labels_of_the_response(tmp_path, tokenizer):
    data = settings(tmp_path, tokenizer, rows(8))
    train = training_set(prepare(data, vocab_size=280, sequence_length=16), sequence_length=16, responses=2)
    train.reference_PK = np.arange(2.0 * train.num_prompts).reshape(-1, 2)
    tokens = loaded(tokenizer)
    for index in range(len(train)):
        sample = train.sample(index)
        labels = sample["labels"][sample["loss_mask"] > 0].tolist()
        whole = tokens.decode(sample["tokens"][~sample["padding"]].tolist())
        assert whole.split("?")[1] == tokens.decode(labels) and sample["reference_logps"] == index


BAD_ROWS = [
    {"prompt": "a", "chosen": "b", "rejected": "b"},
    {"prompt": "a"},
    {"prompt": "a" * 99, "chosen": "b", "rejected": "c"},
]


def test_bad_rows_are_counted_and_named_or_end_the_run(tmp_path, tokenizer):
    data = settings(tmp_path, tokenizer, [*rows(4), *BAD_ROWS])
    (note,) = prepare(data, vocab_size=280, sequence_length=16, max_responses=3).notes
    assert "3 rows skipped" in note and "line 5 has two answers alike" in note and "line 7 has 10" in note
    data.strict = True
    with pytest.raises(ValueError, match=r"rows\.jsonl line 5 has two answers alike"):
        prepare(data, vocab_size=280, sequence_length=16, max_responses=3)
    with pytest.raises(ValueError, match="none of its 3 rows can be used"):
        prepare(settings(tmp_path, tokenizer, BAD_ROWS), vocab_size=280, sequence_length=16)
    with pytest.raises(ValueError, match=r"needs data\.tokenizer"):
        prepare(settings(tmp_path, tokenizer, rows(4), tokenizer=None), vocab_size=280, sequence_length=16)


def test_parquet_has_the_same_rows(tmp_path, tokenizer):
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    prompts = [[USER | {"content": f"{i} + 1?"}] for i in range(10)]
    pairs = [{"prompt": prompt, "chosen": [GOOD], "rejected": [BAD]} for prompt in prompts]
    parquet.write_table(arrow.Table.from_pylist(pairs), tmp_path / "rows.parquet")
    sizes = {"vocab_size": 280, "sequence_length": 64}
    both = [
        prepare(settings(tmp_path, tokenizer, pairs), **sizes),
        prepare(settings(tmp_path, tokenizer, [], files=[str(tmp_path / "rows.parquet")]), **sizes),
    ]
    assert both[0].key == both[1].key
