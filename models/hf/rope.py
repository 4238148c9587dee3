"""Converts the rotary embedding's keys of config.json to settings and back."""

import dataclasses
import json
from typing import Any

from conf.schema import ModelConfig, RopeScalingConfig
from models.hf.family import Family, HfConfig

ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters")
"""Transformers 5 writes rope_parameters, earlier versions rope_theta and rope_scaling."""
PARTIAL, ROTATED = "partial_rotary_factor", "rotary_dim"
"""Of a head: the share that is rotated, and in older files the number of dimensions."""
ROPE_SETTINGS = ("rope_theta", "rope_scaling", PARTIAL)
_ORIGINAL = "original_max_position_embeddings"
_SCALING: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"),
    "yarn": (
        *("factor", _ORIGINAL, "beta_fast", "beta_slow", "truncate"),
        *("attention_factor", "mscale", "mscale_all_dim"),
    ),
    "longrope": ("short_factor", "long_factor", "short_mscale", "long_mscale", _ORIGINAL),
}
"""rope_type -> its further keys, which are those of conf.schema.RopeScalingConfig."""


def rope_settings(config: HfConfig, family: Family) -> tuple[dict[str, Any], list[str]]:
    """(ROPE_SETTINGS of a config.json with their values, unsupported values)."""
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    found = {
        key: value for key, value in (config.get(name) or family.rope_parameters or {}).items() if value is not None
    }
    kind = found.pop("rope_type", found.get("type", "default"))
    found.pop("type", None)
    theta = found.pop("rope_theta", None) or config.get("rope_theta") or family.rope_theta
    partial = found.pop(PARTIAL, config.get(PARTIAL, _rotated_share(config) or family.partial_rotary or 1.0))
    wrong = []
    if kind not in family.rope_types:
        wrong.append(f"rope_type={json.dumps(kind)}: only {', '.join(family.rope_types)}")
    elif unknown := sorted(found.keys() - {*_SCALING[kind]}):
        wrong.append(f"{', '.join(unknown)} with rope_type={kind}: only {', '.join(_SCALING[kind]) or 'rope_theta'}")
    if family.partial_rotary is None and partial != 1:
        wrong.append(f"{PARTIAL}={json.dumps(partial)}: only 1.0, the whole head")
    if not wrong:
        wrong = _complete(found, kind, config)
    if wrong:
        return {}, [f"{name}={json.dumps(config.get(name))}: {'; '.join(wrong)}"]
    if not found.get("mscale_all_dim"):  # without it mscale has no effect
        found = {key: value for key, value in found.items() if not key.startswith("mscale")}
    scaling = RopeScalingConfig(type=None if kind == "default" else kind, **found)
    return {"rope_theta": float(theta), PARTIAL: float(partial), "rope_scaling": scaling}, []


def _rotated_share(config: HfConfig) -> float | None:
    """rotary_dim as a share of a head; None: it is not given."""
    rotated = config.get(ROTATED)
    if rotated is None:
        return None
    return rotated / (config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _complete(found: dict[str, Any], kind: str, config: HfConfig) -> list[str]:
    """Adds the values that follow from others, as in Transformers. Returns what is missing or invalid."""
    longest = config.get("max_position_embeddings")
    if kind in ("llama3", "yarn") and longest:
        found.setdefault(_ORIGINAL, longest)
    if kind == "yarn" and longest and _ORIGINAL in found:
        found.setdefault("factor", longest / found[_ORIGINAL])
    needed = (
        _SCALING[kind]
        if kind in ("llama3", "longrope")
        else [key for key in _SCALING[kind] if key in ("factor", _ORIGINAL)]
    )
    wrong = [f"{key} is missing" for key in needed if key not in found]
    for field in dataclasses.fields(RopeScalingConfig):
        value = found.get(field.name)
        if field.name == "truncate" or value is None:
            valid = value is None or isinstance(value, bool)
        elif "bounds" in field.metadata:
            valid = _is_number(value) and field.metadata["bounds"].contain(value)
        else:
            valid = isinstance(value, list) and all(_is_number(one) and one > 0 for one in value)
        if not valid:
            wrong.append(f"{field.name}={json.dumps(value)} is invalid")
    return wrong


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def with_rope(config: dict[str, Any], family: Family, model: ModelConfig) -> dict[str, Any]:
    """A config.json with the rotary embedding of a model; unchanged if it has it already."""
    settings = {key: getattr(model, key) for key in ROPE_SETTINGS}
    if any(key in config for key in ROPE_KEYS) and rope_settings(config, family) == (settings, []):
        return config
    config = {key: value for key, value in config.items() if key not in ("rope_scaling", PARTIAL)}
    scaling = model.rope_scaling
    values = {} if scaling.type is None else {key: getattr(scaling, key) for key in _SCALING[scaling.type]}
    kind = {"rope_type": scaling.type or "default"} | {k: v for k, v in values.items() if v is not None}
    partial = {} if family.partial_rotary is None else {PARTIAL: model.partial_rotary_factor}
    if config.pop("rope_parameters", None):
        return config | {"rope_parameters": {"rope_theta": model.rope_theta, **partial, **kind}}
    return config | {"rope_theta": model.rope_theta, **partial} | ({"rope_scaling": kind} if scaling.type else {})
