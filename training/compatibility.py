"""Compares model settings when a run is resumed or starts from another run's weights: some changes make trained weights
invalid. The `resumable` metadata in conf/model_schema.py says which changes are allowed."""

from collections.abc import Mapping
from typing import Any

from conf.config_view import format_value
from conf.limits import MODEL_SETTINGS
from conf.setting import Change

Differences = dict[str, tuple[Any, Any]]
"""{setting: (old value, new value)}"""


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Differences:
    """The settings that differ. Keys that only one side has belong to another version and are ignored."""
    old, new = flatten(old), flatten(new)
    return {key: (old[key], new[key]) for key in new if key in old and old[key] != new[key]}


def model_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Differences:
    """The differences with which weights trained under the old settings are invalid under the new ones."""
    changes = differences(_without_null(old), _without_null(new))
    raw = differences(old, new)  # widths that are null on both sides follow from other settings, which are reported
    return {
        key: change
        for key, change in changes.items()
        if key.startswith("model.")
        and (key in raw or key not in _WIDTHS)
        and not _RESUMABLE.get(key, lambda *_: False)(*change)
    }


def describe_changes(changes: Differences) -> str:
    """`key: old -> new; ...`"""
    return "; ".join(f"{key}: {format_value(old)} -> {format_value(new)}" for key, (old, new) in changes.items())


def overrides_to_restore(changes: Differences) -> str:
    """The overrides that undo the changes."""
    words = [f"{key}={format_value(old)}" for key, (old, _) in changes.items()]
    if "model.moe.bias_update_rate" in changes:
        words.append("or model.moe.bias_update_rate=0, which keeps the trained bias as it is")
    return " ".join(words)


def _without_null(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings flattened, with null replaced by what it means, and without expert settings if there are no
    experts."""
    flat = flatten(settings)
    if flat.get("model.num_query_groups", 0) is None:
        flat["model.num_query_groups"] = flat.get("model.num_attention_heads")
    if flat.get("model.head_dim", 0) is None:
        flat["model.head_dim"] = flat.get("model.hidden_size", 0) // flat.get("model.num_attention_heads", 1)
    for inner, outer in (("moe.", ""), ("moe.shared_", "moe.")):
        if flat.get(f"model.{inner}ffn_hidden_size", 0) is None:
            flat[f"model.{inner}ffn_hidden_size"] = flat.get(f"model.{outer}ffn_hidden_size")
    if flat.get("model.moe.renormalize", 0) is None:
        flat["model.moe.renormalize"] = flat.get("model.moe.top_k", 1) > 1
    if not flat.get("model.moe.num_experts", 1):
        flat = {k: v for k, v in flat.items() if not k.startswith("model.moe.") or k == "model.moe.num_experts"}
    return flat


_RESUMABLE: dict[str, Change] = {
    key: field.metadata["resumable"] for key, field in MODEL_SETTINGS.items() if "resumable" in field.metadata
}
_WIDTHS = ("model.head_dim", "model.moe.ffn_hidden_size", "model.moe.shared_ffn_hidden_size")
