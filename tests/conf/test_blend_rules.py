"""Rules for the parts and stages of a blend."""

from dataclasses import asdict, replace

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from conf.blend_plan import overrides_to_continue, refused_change
from conf.schema import BlendPart, BlendStage, Config
from tests.conf.test_rules import error_message, view


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([], "data=blend needs data.blend"),
        ([BlendPart(weight=0.0, kind="stdlib")], "data.blend[0].weight > 0, but it is 0"),
        ([BlendPart(kind="stdlib"), BlendPart(kind="txt", files=["a"])], "data.blend[1].kind is one of stdlib, text"),
        ([BlendPart(kind="blend")], "data.blend[0].kind is one of"),
        ([BlendPart(kind="preference", files=["a.jsonl"])], "nearest: data=preference in a run of its own, with"),
        ([BlendPart(kind="chat")], "data.blend[0].files is needed"),
        ([BlendPart(kind="chat", files=["a.jsonl"])], "a part of kind chat with data.packing=true needs"),
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


def test_settings_of_conversations_apply_to_a_part():
    settings = {"data.packing": False, "data.too_long": "drop", "data.chat_template": "a.jinja"}
    chats = [*GOOD_BLEND["data.blend"], BlendPart(kind="chat", files=["a.jsonl"])]
    assert error_message(view({**GOOD_BLEND, "data.blend": chats, **settings})) == ""
    assert error_message(view({**GOOD_BLEND, "data.blend": chats, "data.document_mask": True})) == ""
    for name in settings:
        assert f"{name} needs data=chat or a part of kind chat" in error_message(view({**GOOD_BLEND, **settings}))


def test_good_blend_passes():
    stages = [BlendStage(100, [0, 1]), BlendStage(200, [2.5, 1])]
    for more in ({}, {"data.temperature": 1.5, "data.stages": stages}):
        assert error_message(view({**GOOD_BLEND, **more})) == ""
    with_epochs = [BlendPart(kind="stdlib"), BlendPart(kind="text", files=["a.txt"], epochs=2.5, weight=0)]
    assert error_message(view({**GOOD_BLEND, "data.blend": with_epochs, "data.stages": [BlendStage(9, [1, 3])]})) == ""
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


WEB, WIKI = BlendPart(kind="stdlib", name="web"), BlendPart(kind="stdlib", epochs=2)


@pytest.mark.parametrize(
    ("parts", "stages", "expected"),
    [
        ([WEB, replace(WIKI, epochs=0.0)], [], "data.blend[1].epochs > 0, but it is 0; nearest: epochs: 1"),
        ([WEB, replace(WIKI, weight=2)], [], "data.blend[1].weight with epochs has an effect only with data.stages"),
        ([WEB, replace(WIKI, weight=-1)], [BlendStage(9, [1, 1])], "data.blend[1].weight >= 0, but it is -1"),
        (
            [WEB, replace(WIKI, weight=0)],
            [BlendStage(9, [1, 0])],
            "data.blend[1].weight > 0 in data.blend or in a",
        ),
        ([WEB, WIKI], [BlendStage(9, [0, 1])], "a part without epochs has a weight above 0 in data.stages[0]"),
        ([WIKI], [BlendStage(9, [1])], "data.stages needs a part of data.blend with a weight"),
    ],
)
def test_epochs_of_a_part(parts, stages, expected):
    assert expected in error_message(view({"data.kind": "blend", "data.blend": parts, "data.stages": stages}))


def test_temperature_needs_weights_and_is_no_smaller_than_floats_can_tell():
    cfg = view({"data.kind": "blend", "data.blend": [WIKI], "data.temperature": 2.0})
    assert "data.temperature needs a part of data.blend with a weight, but all have epochs; nearest: data.temper" in (
        error_message(cfg)
    )
    cfg = view({"data.kind": "blend", "data.blend": [WEB], "data.temperature": 0.01})
    assert "data.temperature >= 0.05, but it is 0.01; nearest: data.temperature=0.05" in error_message(cfg)


def config_of(parts: list[BlendPart], steps: int, stages: list[BlendStage] = []) -> Config:  # noqa: B006
    result = Config()
    result.data = replace(result.data, kind="blend", blend=parts, stages=stages)
    result.train.steps = steps
    return result


@pytest.mark.parametrize(
    ("new", "step", "expected"),
    [
        (config_of([WEB, WIKI], 100), 50, None),
        (
            config_of([WEB, WIKI], 200),
            100,
            "'data.stages=[{step: 101, weights: [1.0, 0]}]'; or restore train.st",
        ),
        (config_of([WEB, WIKI], 80), 50, "Restore data.blend, data.stages, train.steps and"),
        (config_of([WEB, replace(WIKI, epochs=3)], 100), 50, "Restore data.blend"),
        (config_of([WEB, replace(WIKI, epochs=None)], 100), 50, "Restore data.blend"),
        (config_of([replace(WEB, weight=2), replace(WIKI)], 100), 50, "Restore data.blend"),
        (config_of([WEB, WIKI], 200, [BlendStage(101, [1, 0])]), 100, None),  # as the message says
        (config_of([WEB, replace(WIKI, epochs=3)], 200, [BlendStage(101, [1, 0.5])]), 100, None),  # a third epoch later
        (config_of([WEB, replace(WIKI, epochs=3)], 200, [BlendStage(101, [1, 1])]), 100, "Restore data.blend"),
    ],
)
def test_a_run_that_continues_keeps_its_samples(new, step, expected):
    old = config_of([WEB, WIKI], 100)
    found = refused_change(asdict(old), new, step)
    assert found is None if expected is None else expected in found
    without = config_of([WEB, replace(WIKI, epochs=None)], 100)
    assert refused_change(asdict(without), config_of(without.data.blend, 300), step) is None


STAGED = [BlendStage(41, [1, 1]), BlendStage(81, [0, 1])]


@pytest.mark.parametrize(
    ("stages", "size", "expected"),
    [
        (STAGED, 8, None),
        ([STAGED[0], BlendStage(51, [0, 1])], 8, None),
        ([STAGED[0], BlendStage(50, [0, 1])], 8, "data.stages may change from step 51 on"),
        ([STAGED[0]], 8, None),
        ([BlendStage(31, [1, 1]), STAGED[1]], 8, "data.stages may change from step 51 on"),
        ([BlendStage(41, [1, 2]), STAGED[1]], 8, "data.stages may change from step 51 on"),
        ([], 8, "data.stages may change from step 51 on"),
        (STAGED, 16, "begin at steps of train.global_batch_size=8 sequences"),
    ],
)
def test_stages_that_have_begun_stay(stages, size, expected):
    parts = [WEB, replace(WIKI, epochs=None)]
    old, new = config_of(parts, 100, STAGED), config_of(parts, 120, stages)
    old.train.global_batch_size, new.train.global_batch_size = 8, size
    found = refused_change(asdict(old), new, 50)
    assert found is None if expected is None else found is not None and expected in found


def test_steps_of_another_size_are_none_of_stages_business_without_stages():
    parts = [WEB, replace(WIKI, epochs=None)]
    old, new = config_of(parts, 100), config_of(parts, 100)
    new.train.global_batch_size *= 2
    assert refused_change(asdict(old), new, 50) is None
    new.data.stages = [BlendStage(60, [1, 1])]
    assert "begin at steps of train.global_batch_size=" in (refused_change(asdict(old), new, 50) or "")


@pytest.mark.parametrize("stages", [[], [BlendStage(60, [0.5, 1])], [BlendStage(60, [2, 0])]])
def test_the_command_at_the_end_of_a_run_is_one_that_works(stages):
    old = config_of([WEB, WIKI], 100, stages)
    (override,) = overrides_to_continue(old) or ()
    (parsed,) = OverridesParser.create().parse_overrides([override])
    added = [BlendStage(**stage) for stage in parsed.value()]
    assert parsed.key_or_group == "data.stages" and added[:-1] == stages
    new = config_of([WEB, WIKI], 200, added)
    assert refused_change(asdict(old), new, 100) is None
    settings = {"data.kind": "blend", "data.blend": [WEB, WIKI], "data.stages": added, "train.steps": 200}
    assert error_message(view(settings)) == ""


def test_where_all_parts_have_epochs_a_run_has_ended():
    old = config_of([WIKI], 100)
    assert overrides_to_continue(old) is None
    refused = refused_change(asdict(old), config_of([WIKI], 200), 100)
    assert refused is not None and "no part has a weight. Restore train.steps=100, or" in refused
    assert overrides_to_continue(config_of([WEB], 100)) == overrides_to_continue(Config()) == []
