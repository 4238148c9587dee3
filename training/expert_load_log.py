"""Formats the load of every expert: rows of expert_load.jsonl, TensorBoard series, a heat map and a table.

Legend: L sparse layers, E experts."""

import math
from typing import Any

import numpy as np

from conf.schema import MoeConfig
from moe.expert_load import ExpertLoad

VALUES_PER_LINE = 1024
"""What a logged step may cost on average. A model with more experts than that, over all its layers, has them recorded
every ceil(L * E / VALUES_PER_LINE) logged steps, so that a run's files stay of a size that can be read."""

HIGH_DROPS = 0.2
"""Dropped fraction above which a run prints an explanation, once."""


def recorded_every(load: ExpertLoad) -> int:
    """Logged steps from one record of every expert to the next."""
    return math.ceil(load.load_LE.size / VALUES_PER_LINE)


def has_heat_map(logged: int) -> bool:
    """Whether a heat map is drawn for the logged step with this index from 0: every tenth, after the hundredth every
    hundredth."""
    return logged % (10 if logged <= 100 else 100) == 0


def load_lines(load: ExpertLoad, width: int) -> list[str]:
    """The expert load as a table, a row per layer: each expert's share of the layer's assignments in percent if that
    fits `width` columns, otherwise minimum, median, maximum and the busiest experts. The first line is a heading."""
    percent_LE = 100 * load.share_LE
    experts = percent_LE.shape[1]
    every_expert = 16 + 6 * experts <= width
    heading = f"expert load in percent ({experts} experts, balanced: {100 / experts:.3g})"
    if every_expert:
        title = "".join(f"{f'e{expert}':>6}" for expert in range(experts))
    else:
        title = f"{'min':>7}{'median':>8}{'max':>7}{'unused':>8}   {'busiest':<31}"
    lines = [heading, f"layer{title}   dropped"]
    for layer, percent_E, dropped in zip(load.layer_ids, percent_LE, load.dropped_L, strict=True):
        if every_expert:
            shares = "".join(f"{share:6.1f}" for share in percent_E)
        else:
            low, middle, high = percent_E.min(), np.median(percent_E), percent_E.max()
            busiest = "  ".join(f"e{e} {percent_E[e]:.2f}" for e in np.argsort(-percent_E, kind="stable")[:3])
            shares = f"{low:7.2f}{middle:8.2f}{high:7.2f}{(percent_E == 0).sum():8d}   {busiest:<31}"
        lines.append(f"{layer:5d}{shares}   {dropped:7.1%}")
    return lines


def explain_drops(moe: MoeConfig, dropped: float) -> str | None:
    """An explanation of a high dropped fraction; None if it is not high."""
    if dropped <= HIGH_DROPS or moe.capacity_factor is None:
        return None
    return (
        f"dropped {dropped:.0%}: the assignments beyond their expert's capacity, whose tokens are carried by the "
        "residual connection alone. It falls while the router learns to balance the load; "
        f"model.moe.capacity_factor (now {moe.capacity_factor:g}) sets the capacity, null drops nothing"
    )


def layer_name(layer: int) -> str:
    return f"layer_{layer:02d}"


def load_rows(step: int, load: ExpertLoad) -> list[dict[str, Any]]:
    """A row per sparse layer: its number in the model (from 0), how many assignments each expert got since the logged
    step before, in the order of the experts, counted before drops, and the fraction that was dropped."""
    return [
        {"step": step, "layer": layer, "assignments": load_E.tolist(), "dropped_fraction": float(dropped)}
        for layer, load_E, dropped in zip(load.layer_ids, load.load_LE, load.dropped_L, strict=True)
    ]


def load_series(load: ExpertLoad) -> dict[str, float]:
    """TensorBoard's tag of each expert -> its load over the layer's mean load; 1 is perfect balance."""
    experts = load.load_LE.shape[1]
    width = len(str(experts - 1))
    return {
        f"expert_load/{layer_name(layer)}/expert_{expert:0{width}d}": ratio
        for layer, ratio_E in zip(load.layer_ids, load.share_LE * experts, strict=True)
        for expert, ratio in enumerate(ratio_E.tolist())
    }


def load_charts(load: ExpertLoad) -> dict[str, dict[str, str]]:
    """A chart per layer with a line per expert, as EventFile.layout takes them."""
    return {"expert load over mean": {layer_name(i): f"expert_load/{layer_name(i)}/.*" for i in load.layer_ids}}


# ColorBrewer's RdBu, read from blue to red: experts with a quarter, half, once, twice and four times the mean load.
_LOG2_RATIO = (-2, -1, 0, 1, 2)
_COLOURS = np.array([[5, 113, 176], [146, 197, 222], [247, 247, 247], [244, 165, 130], [202, 0, 32]])
_LEGEND = ("1/4 or less", "1/2", "mean", "2x", "4x or more")
_UNUSED, _BACKGROUND, _INK, _FRAME = (0, 0, 0), (255, 255, 255), (40, 40, 40), (150, 150, 150)
_LINE = 14  # pixels, of a line of text
_GAP = 6  # pixels


def load_colours(load: ExpertLoad) -> np.ndarray:
    """uint8 [L, E, 3]: white is the mean load, blue a quarter of it or less, red four times as much or more, black an
    expert that got no assignment."""
    ratio_LE = load.share_LE * load.load_LE.shape[1]
    unused_LE = ratio_LE == 0
    log2_LE = np.log2(np.where(unused_LE, 1.0, ratio_LE))
    colours = np.stack([np.interp(log2_LE, _LOG2_RATIO, channel) for channel in _COLOURS.T], axis=-1)
    colours[unused_LE] = _UNUSED
    return colours.round().astype(np.uint8)


def load_heat_map(load: ExpertLoad, step: int) -> np.ndarray:
    """The expert load as a picture, uint8 [height, width, 3]: a row per sparse layer with its number in the model, a
    column per expert, and what the colours of `load_colours` mean."""
    from PIL import Image, ImageDraw, ImageFont

    layers, experts = load.load_LE.shape
    cell = int(np.clip(768 // experts, 4, 32)), int(np.clip(512 // layers, 4, 32))  # pixels: width, height
    font = ImageFont.load_default()
    names = [f"layer {layer}" for layer in load.layer_ids]
    left = _GAP + math.ceil(max(font.getlength(name) for name in names)) + _GAP
    top, right = 2 * _LINE + _GAP, left + experts * cell[0]
    bottom = top + layers * cell[1]
    legend = bottom + 2 * _LINE + 2 * _GAP
    entries = [*zip(_LEGEND, map(tuple, _COLOURS.tolist()), strict=True), ("no token", _UNUSED)]
    entry_width = math.ceil(max(font.getlength(text) for text, _ in entries)) + 2 * _LINE
    size = max(right + 2 * _GAP, left + len(entries) * entry_width), legend + _LINE + _GAP

    picture = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(picture)
    draw.text((left, _GAP), f"expert load over the layer's mean, step {step}", _INK, font)
    cells = Image.fromarray(load_colours(load)).resize((right - left, bottom - top), Image.Resampling.NEAREST)
    picture.paste(cells, (left, top))
    draw.rectangle((left - 1, top - 1, right, bottom), outline=_FRAME)
    for row in range(0, layers, math.ceil(_LINE / cell[1])):
        middle = top + row * cell[1] + cell[1] // 2
        draw.text((left - _GAP, middle), names[row], _INK, font, anchor="rm")
    apart = math.ceil((font.getlength(str(experts)) + _GAP) / cell[0])
    for expert in range(0, experts, apart):
        middle = left + expert * cell[0] + cell[0] // 2
        draw.line((middle, bottom, middle, bottom + 3), fill=_FRAME)
        draw.text((middle, bottom + _GAP), str(expert), _INK, font, anchor="mt")
    draw.text((left, bottom + _GAP + _LINE), "expert", _INK, font)
    for number, (text, colour) in enumerate(entries):
        x = left + number * entry_width
        draw.rectangle((x, legend, x + _LINE - 2, legend + _LINE - 2), fill=colour, outline=_FRAME)
        draw.text((x + _LINE + 2, legend + 1), text, _INK, font)
    return np.asarray(picture)
