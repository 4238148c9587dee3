"""Pipeline layouts as text: read as Megatron-Core reads them, and refused with one that works."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from conf.pipeline_layout import chunks_of, layers_of, written
from parallel.layout import Layout
from tests.conf.test_rules import assert_violation_has_a_suggestion_that_works, error_message, view

LETTERS = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}


@pytest.mark.parametrize(
    "text",
    [
        "Et*3|(tt|)*29,m|L",
        "Ettt|(tt|)*29,mL",
        "E|(t|)*94L",
        "Et|t*2|(t*2|t|)*2 ttmmL",
        "E(t|)*2,tL",
        "Et|(tt|tt|t)*2|L",
    ],
)
def test_a_text_is_read_as_megatron_core_reads_it(text: str) -> None:
    theirs = PipelineParallelLayerLayout.parse_str_to_list(text.replace(" ", ""))
    assert chunks_of(text) == ["".join(LETTERS[part.name] for part in chunk) for chunk in theirs]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(layers=st.lists(st.integers(1, 12), min_size=2, max_size=6), mtp=st.integers(0, 3), alone=st.booleans())
def test_what_is_written_is_read_again(layers: list[int], mtp: int, alone: bool) -> None:
    layers = [0, *layers, 0] if alone else layers
    assert layers_of(written(layers, mtp)) == layers
    theirs = PipelineParallelLayerLayout(written(layers, mtp), len(layers))
    theirs.validate_layer_layout(sum(layers), mtp)
    assert [len(theirs.get_layer_id_list(pp_rank=i)) for i in range(len(layers))] == layers


PP2, PP4 = {"parallel.pp": 2}, {"parallel.pp": 4}
VPP = PP2 | {"parallel.vpp": 2}
MTP = {"model.mtp_num_layers": 1}
BROKEN = [
    ({"parallel.pp_layout": "Et*4L"}, 1, "pp_layout needs parallel.pp > 1", "parallel.pp_layout=null"),
    (PP2 | {"parallel.pp_layout": "Et*4|L", "parallel.pp_layers": [2, 2]}, 2, "both are given", "pp_layers=null"),
    (PP2 | {"parallel.pp_layout": "Ed*4|L"}, 2, "it has * 4 d", "parallel.pp_layout=Et*2|t*2L"),
    (PP2 | {"parallel.pp_layout": "E|t*4|L"}, 2, "has parallel.pp chunks, but 3 != 2", "pp_layout=Et*2|t*2L"),
    (PP2 | {"parallel.pp_layout": "E|tt|tt|L"}, 2, "has parallel.pp chunks, but 4 != 2", "parallel.vpp=2"),
    (VPP | {"parallel.pp_layout": "Ett|ttL"}, 2, "parallel.pp * parallel.vpp chunks, but 2 != 4", "parallel.vpp=null"),
    (PP2 | {"parallel.pp_layout": "tt|Ett"}, 2, "it has ttEtt", "parallel.pp_layout=Et*2|t*2L"),
    (PP4 | {"parallel.pp_layout": "E||t*4|L"}, 4, "chunk 2 is empty", "parallel.pp_layout=Et|t|t|tL"),
    (PP2 | {"parallel.pp_layout": "Et|ttL"}, 2, "3 != 4", "parallel.pp_layout=Et*2|t*2L or model.num_layers=3"),
    (PP2 | MTP | {"parallel.pp_layout": "Ett|ttL"}, 2, "0 != 1", "pp_layout=Et*2|t*2mL or model.mtp_num_layers=0"),
    (PP4 | MTP | {"parallel.pp_layout": "Ett|tt|m|L"}, 4, "it reads the embedding", "parallel.pp_layout=Et|t|t|tmL"),
    (PP2 | MTP | {"parallel.pp_layout": "Ettttm|L"}, 2, "it reads the embedding", "parallel.pp_layout=Et*4|mL"),
    ({"parallel.pp": 3, "parallel.pp_layers": [2, 0, 2]}, 3, "it is [2,0,2]", "parallel.pp_layers=[2,1,1]"),
]


@pytest.mark.parametrize(("changes", "world_size", "numbers", "suggestion"), BROKEN, ids=lambda value: str(value)[:60])
def test_violation_has_a_suggestion_that_works(
    changes: dict[str, object], world_size: int, numbers: str, suggestion: str
) -> None:
    assert_violation_has_a_suggestion_that_works(changes, world_size, numbers, suggestion)


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        (PP4 | {"parallel.pp_layout": "E|tt|tt|L"}, [0, 2, 2, 0]),
        (PP2 | MTP | {"parallel.pp_layout": "Et*4|mL"}, [4, 0]),
        (VPP | {"parallel.pp_layout": "Et,|t|(t|)*1tL"}, [1, 1, 1, 1]),
        (PP4 | {"parallel.pp_layers": [0, 2, 2, 0]}, [0, 2, 2, 0]),
    ],
    ids=str,
)
def test_a_layout_has_its_layers(changes: dict[str, object], layers: list[int]) -> None:
    cfg = view(changes, 4)
    assert error_message(cfg) == ""
    layout = Layout.of(cfg.config.parallel, 4)
    assert [len(layout.chunk_layers(chunk, 4)) for chunk in range(len(layers))] == layers
    assert f"(layers {'+'.join(map(str, layers))})" in layout.describe()
