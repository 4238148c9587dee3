"""The command for hearing from a trained model."""

from pathlib import Path
from typing import Any

import pytest

from conf.moe_schema import MoeConfig
from conf.schema import Config, DataConfig, ModelConfig
from training.writing_command import writing_command

RUN = Path("runs/one")
GENERATE = [("write text", """.venv/bin/python -m launch.generate checkpoint=runs/one "prompt='def '\"""")]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, GENERATE),
        ({"data": DataConfig(kind="chat")}, [("chat", ".venv/bin/python -m launch.chat checkpoint=runs/one")]),
        ({"data": DataConfig(kind="chat"), "extensions": ["mine"]}, [("chat", '"extensions=[mine]"')]),
        ({"model": ModelConfig(reward_head=True)}, []),
        ({"model": ModelConfig(moe=MoeConfig(num_experts=4, load_balancing="expert_choice"))}, []),
    ],
    ids=str,
)
def test_a_model_is_heard_by_the_command_that_suits_it(settings: dict[str, Any], wanted: list[tuple[str, str]]) -> None:
    found = writing_command(Config(**settings), RUN, has_tokenizer=True)
    assert [what for what, _ in found] == [what for what, _ in wanted]
    assert all(line.endswith(end) for (_, line), (_, end) in zip(found, wanted, strict=True))
    assert writing_command(Config(**settings), RUN, has_tokenizer=False) == []
