"""The heat map of the expert load."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from conf.schema import MoeConfig
from moe.expert_load import ExpertLoad
from training.expert_load_log import explain_drops, has_heat_map, load_charts, load_colours, load_heat_map, load_series


def load_of(load_LE: np.ndarray, layers: list[int]) -> ExpertLoad:
    return ExpertLoad(layers, load_LE, {})


def drawn(monkeypatch: pytest.MonkeyPatch, load: ExpertLoad, step: int = 7) -> tuple[np.ndarray, dict[str, tuple]]:
    """The picture, and the place of each text in it."""
    texts, original = {}, ImageDraw.ImageDraw.text

    def text(self: ImageDraw.ImageDraw, place: tuple, what: str, *args: object, **named: object) -> None:
        texts[what] = place
        original(self, place, what, *args, **named)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return load_heat_map(load, step), texts


def test_colours() -> None:
    colours = load_colours(load_of(np.array([[10, 10, 10, 10], [20, 0, 10, 10]]), [1, 3])).tolist()
    assert colours[0] == [[247, 247, 247]] * 4  # balanced: white
    assert colours[1] == [[244, 165, 130], [0, 0, 0], [247, 247, 247], [247, 247, 247]]  # twice, unused, once, once
    rising = load_colours(load_of(np.arange(128)[None], [0]))[0, 1:].astype(int)
    assert (np.diff(rising[:, 0] - rising[:, 2]) >= 0).all()  # ever redder as the load grows


def test_a_heat_map_has_axes_and_a_legend(monkeypatch: pytest.MonkeyPatch) -> None:
    load = load_of(np.array([[10, 10, 10, 10], [20, 0, 10, 10], [5, 35, 0, 0]]), [1, 3, 11])
    picture, texts = drawn(monkeypatch, load)
    assert list(texts) == [
        "expert load over the layer's mean, step 7",
        *("layer 1", "layer 3", "layer 11"),
        *("0", "1", "2", "3", "expert"),
        *("1/4 or less", "1/2", "mean", "2x", "4x or more", "no token"),
    ]
    # The cell beside each name, below each number, has the colour of that layer and expert.
    colours = load_colours(load)
    for row, layer in enumerate(load.layer_ids):
        for expert in range(4):
            assert (picture[texts[f"layer {layer}"][1], texts[str(expert)][0]] == colours[row, expert]).all()
    # And what the legend says of a colour stands right of it.
    x, y = texts["no token"]
    assert (picture[y + 4, x - 8] == 0).all()
    x, y = texts["4x or more"]
    assert picture[y + 4, x - 8].tolist() == [202, 0, 32]


@pytest.mark.parametrize(("layers", "experts"), [(1, 2), (58, 256), (24, 1000)])
def test_labels_do_not_overlap(monkeypatch: pytest.MonkeyPatch, layers: int, experts: int) -> None:
    picture, texts = drawn(monkeypatch, load_of(np.ones((layers, experts), int), list(range(layers))))
    rows = [place[1] for text, place in texts.items() if text.startswith("layer ")]
    columns = [place[0] for text, place in texts.items() if text.isdecimal()]
    assert min(np.diff(rows), default=99) >= 12 and min(np.diff(columns)) >= 12
    assert max(place[0] for place in texts.values()) < picture.shape[1]
    assert Image.fromarray(picture).size[0] < 5000


def test_names_of_the_series() -> None:
    load = load_of(np.array([[1, 3] + [2] * 10]), [5])
    series = load_series(load)
    assert list(series) == [f"expert_load/layer_05/expert_{expert:02d}" for expert in range(12)]
    assert series["expert_load/layer_05/expert_01"] == pytest.approx(1.5)
    assert load_charts(load) == {"expert load over mean": {"layer_05": "expert_load/layer_05/.*"}}


def test_when_a_heat_map_is_drawn() -> None:
    assert [n for n in range(401) if has_heat_map(n)] == [*range(0, 101, 10), 200, 300, 400]


def test_high_drops_are_explained() -> None:
    words = explain_drops(MoeConfig(num_experts=8, capacity_factor=1.25), 0.385)
    assert words is not None and words.startswith("dropped 38%") and "model.moe.capacity_factor (now 1.25)" in words
    assert explain_drops(MoeConfig(num_experts=8, capacity_factor=1.25), 0.07) is None
    assert explain_drops(MoeConfig(num_experts=8, capacity_factor=None), 0.9) is None
