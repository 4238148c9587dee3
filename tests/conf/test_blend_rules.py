"""Rules for the parts and stages of a blend."""

import pytest

from conf.schema import BlendPart, BlendStage
from tests.conf.test_rules import error_message, view


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([], "data=blend needs data.blend"),
        ([BlendPart(weight=0.0, kind="stdlib")], "data.blend[0].weight > 0, but it is 0"),
        ([BlendPart(kind="stdlib"), BlendPart(kind="txt", files=["a"])], "data.blend[1].kind is one of stdlib, text"),
        ([BlendPart(kind="blend")], "data.blend[0].kind is one of"),
        ([BlendPart(kind="chat", files=["a.jsonl"])], "nearest: data=chat in a run of its own, with checkpoint.load"),
        ([BlendPart(kind="megatron")], "data.blend[0].files is needed"),
        ([BlendPart(kind="stdlib", files=["a"])], "data.blend[0].files has an effect only"),
        ([BlendPart(kind="stdlib", name="a"), BlendPart(kind="stdlib", name="a")], "data.blend[1].name is no other"),
        ([BlendPart(kind="stdlib", name="a/b")], "letters, digits, _ . and -, but it is 'a/b'; nearest: name: a_b"),
    ],
)
def test_blend_parts(parts, expected):
    assert expected in error_message(view({"data.kind": "blend", "data.blend": parts}))


GOOD_BLEND = {
    "data.kind": "blend",
    "data.blend": [BlendPart(kind="stdlib"), BlendPart(weight=2, kind="text", files=["a.txt"], name="a")],
}


def test_good_blend_passes():
    stages = [BlendStage(100, [0, 1]), BlendStage(200, [2.5, 1])]
    for more in ({}, {"data.temperature": 1.5, "data.stages": stages}):
        assert error_message(view({**GOOD_BLEND, **more})) == ""
    assert "data.stages needs data=blend" in error_message(view({"data.stages": stages}))
    assert "eval.by_part needs data=blend" in error_message(view({"eval.by_part": True}))


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ([BlendStage(1, [1, 1])], "data.stages[0].step > 1, which data.blend's own weights begin with, but it is 1"),
        ([BlendStage(9, [1, 1]), BlendStage(9, [1, 2])], "data.stages[1].step > 9, of data.stages[0], but it is 9"),
        ([BlendStage(201, [1, 1])], "data.stages[0].step <= train.steps=200, but it is 201 and would be ignored"),
        ([BlendStage(9, [1])], "data.stages[0].weights has a weight for each of the 2 parts of data.blend, but it has"),
        ([BlendStage(9, [0, 0])], "data.stages[0].weights are 0 or more, and one of them is more"),
        ([BlendStage(9, [2, -1])], "data.stages[0].weights are 0 or more, and one of them is more"),
    ],
)
def test_stages_of_a_blend(stages, expected):
    assert expected in error_message(view({**GOOD_BLEND, "data.stages": stages}))
