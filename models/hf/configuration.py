"""Converts config.json to the settings of a model and back. Unsupported or unknown keys are refused by name."""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conf.config_view import format_value
from conf.schema import ModelConfig, MoeConfig
from models.hf.decoder import FULL
from models.hf.families import FAMILIES, family_named
from models.hf.family import Family, Field, HfConfig
from models.hf.quantization import KEY as QUANTIZATION
from models.hf.quantization import unsupported as quantization_error
from models.hf.rope import PARTIAL, ROPE_KEYS, ROPE_SETTINGS, ROTATED, rope_settings, with_rope

CONFIG = "config.json"
NEUTRAL_KEYS = (
    *("architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "use_cache"),
    *("_name_or_path", "_model_name_or_path"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "max_position_embeddings", "initializer_range"),
    *("output_router_logits", "output_attentions", "output_hidden_states", "return_dict", "id2label", "label2id"),
)
"""Keys of any config.json that do not change what the model computes. (In Transformers output_router_logits determines
whether the load-balancing loss is added; here only its coefficient does.)"""

_MOST_NAMED = 3
"""Families whose differences a message names."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError if it is missing or something else."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} does not contain a JSON object")
    return found


def model_of(config: HfConfig, where: Path) -> tuple[Family, ModelConfig]:
    """The family and the settings of the model that a config.json describes.

    Raises:
        ValueError: an unknown family, or unsupported features; the message names all of them.
    """
    family = family_named(config.get("model_type"), f"{where}: model_type")
    wrong = _unsupported(family, config)
    full = {field.key: config.get(_key_in(config, field), field.default) for field in family.fields}
    values: dict[str, Any] = {key: allowed[0] for key, allowed in family.settings.items()} | dict(family.training)
    wrong += [error for field in family.fields if (error := _value_error(field, full[field.key]))]
    if wrong:
        raise ValueError(f"{where} has unsupported settings: {'; '.join(wrong)}")
    for field in family.fields:
        value = full[field.key]
        try:
            values[field.setting] = field.from_hf(value if field.values is None else field.values[value], full)
        except ValueError as error:
            wrong.append(f"{field.key}={json.dumps(value)}: {error}")
    rope, rope_wrong = rope_settings(config, family)
    wrong += rope_wrong
    if wrong:
        raise ValueError(f"{where} has unsupported settings: {'; '.join(wrong)}")
    model = _settings(values | rope | {"name": family.name})
    scaling, frequencies = model.rope_scaling, model.rotary_width // 2
    for key in ("short_factor", "long_factor") if scaling.type == "longrope" else ():
        if (count := len(getattr(scaling, key))) != frequencies:
            raise ValueError(f"{where} has unsupported settings: {key} of {count} numbers instead of {frequencies}")
    return family, model


def _key_in(config: HfConfig, field: Field) -> str:
    """The name that a config.json uses for a field."""
    return next((name for name in (field.key, *field.aliases) if name in config), field.key)


def _value_error(field: Field, value: Any) -> str | None:
    """Why a value of config.json is invalid or unsupported. None: it is not."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    whole, positive = type(value) is int and value >= field.minimum, f"an integer >= {field.minimum}"
    positive = "a positive integer" if field.minimum == 1 else positive
    item = f"{field.key}={json.dumps(value)}"
    if field.values is not None:
        known = isinstance(value, str) and value in field.values
        return None if known else f"{item}: only {', '.join(field.values)}"
    if isinstance(field.default, list):
        return None if value is None or isinstance(value, list) else f"{item}: must be a list"
    if field.fractional:
        return None if value is None or number else f"{item}: must be a number, or null"
    if field.default is None:
        return None if value is None or whole else f"{item}: must be {positive}, or null"
    if type(field.default) is int:
        # null means a default that depends on other keys, for fields that have one.
        return None if whole or (value is None and field.nullable) else f"{item}: must be {positive}"
    if isinstance(field.default, bool):
        return None if isinstance(value, bool) else f"{item}: must be true or false"
    return None if number else f"{item}: must be a number"


def _unsupported(family: Family, config: HfConfig) -> list[str]:
    """Keys of config.json that enable unsupported features or are unknown."""
    rope = ROPE_KEYS if family.partial_rotary is None else (*ROPE_KEYS, PARTIAL, ROTATED)
    known = {*NEUTRAL_KEYS, *family.neutral_keys, *rope, *(_key_in(config, field) for field in family.fields)}
    wrong = []
    if config.get("architectures") not in (None, [family.architecture]):
        wrong.append(f"architectures={format_value(config['architectures'])}: only {family.architecture}")
    for key, value in config.items():
        if key in family.disabled:
            if value != family.disabled[key] and value is not None:
                wrong.append(f"{key}={format_value(value)}: only {format_value(family.disabled[key])}")
        elif key == QUANTIZATION and value is not None:
            wrong += [error] if (error := quantization_error(value)) else []
        elif key == "layer_types" and key not in known:
            if others := sorted({str(kind) for kind in value or []} - {FULL}):
                wrong.append(f"{key} has {', '.join(others)}: only {FULL}")
        elif key not in known and value not in (None, False, 0, "", [], {}):
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
            meant = f" (did you mean {near[0]}?)" if near else ""
            wrong.append(f"{key}={json.dumps(value)}: unknown key of {family.name}{meant}")
    return wrong


def _settings(values: Mapping[str, Any]) -> ModelConfig:
    moe = {key.removeprefix("moe."): value for key, value in values.items() if key.startswith("moe.")}
    return ModelConfig(**{k: v for k, v in values.items() if not k.startswith("moe.")}, moe=MoeConfig(**moe))


def family_for(model: ModelConfig, wanted: str | None) -> Family:
    """The family that a model can be exported as.

    Args:
        wanted: the name of the family. None: the first one that fits.

    Raises:
        ValueError: none fits, or not the wanted one; the message names the settings, those of the nearest families.
    """
    tried = [family_named(wanted, "family")] if wanted else list(FAMILIES.values())
    reasons: dict[str, list[str]] = {}
    for family in tried:
        if not (wrong := differences(family, model)):
            return family
        reasons[family.name] = wrong
    nearest = sorted(reasons, key=lambda name: len(reasons[name]))
    named = " | ".join(f"{name}: {'; '.join(reasons[name])}" for name in nearest[:_MOST_NAMED])
    others = f". Further from it: {', '.join(rest)} (family=NAME says why)" if (rest := nearest[_MOST_NAMED:]) else ""
    raise ValueError(f"the model fits no supported family{', nearest first' if rest else ''}. {named}{others}")


def differences(family: Family, model: ModelConfig) -> list[str]:
    """The settings that prevent a model from being exported as a family, with the values that they would need."""
    mapped, model = {field.setting for field in family.fields}, _with_common_width(family, model)
    rope = [key for key in ROPE_SETTINGS if key != PARTIAL or family.partial_rotary is not None]
    wrong = []
    for prefix, part in (("", model), ("moe.", model.moe)):
        if prefix and not model.moe.num_experts and "moe.num_experts" not in mapped:
            continue
        for field in dataclasses.fields(part):
            key, value = prefix + field.name, getattr(part, field.name)
            if key in mapped or key in ("moe", *rope) or "resumable" in field.metadata:
                continue
            allowed = family.settings.get(key, (field.default,))
            if value not in allowed:
                supported = " or ".join(map(format_value, allowed))
                wrong.append(f"model.{key}={format_value(value)}, but the family has only {supported}")
    for field in family.fields:
        value = _get(model, field.setting)
        if field.values is not None and value not in field.values.values():
            supported = ", ".join(dict.fromkeys(field.values.values()))
            wrong.append(f"model.{field.setting}={value}, but the family has only {supported}")
    if "moe.num_experts" in mapped and not model.moe.num_experts:
        wrong.append("model.moe.num_experts=0, but every layer of the family has experts")
    if model.moe.num_experts and model.moe.load_balancing == "expert_choice":
        wrong.append("model.moe.load_balancing=expert_choice, but in the family tokens select experts")
    if reason := None if wrong else family.refuse(model):
        wrong.append(reason)
    return wrong


def _with_common_width(family: Family, model: ModelConfig) -> ModelConfig:
    """The same model with ffn_hidden_size as the experts' hidden size, if the family has no key for the latter and no
    dense layer has another."""
    only_sparse = len(model.sparse_layers) == model.num_layers
    if any(field.setting == "moe.ffn_hidden_size" for field in family.fields) or not (
        only_sparse or model.expert_width == model.ffn_hidden_size
    ):
        return model
    moe = dataclasses.replace(model.moe, ffn_hidden_size=None)
    return dataclasses.replace(model, ffn_hidden_size=model.expert_width, moe=moe)


def config_of(family: Family, model: ModelConfig, base: HfConfig) -> dict[str, Any]:
    """The config.json of a model.

    Args:
        base: the config.json of the model that it was imported from, whose other keys are kept. Empty: there is none.
    """
    model = _with_common_width(family, model)
    config = dict(base) or {"architectures": [family.architecture], "model_type": family.name}
    config.pop(QUANTIZATION, None)  # an import dequantises
    for field in family.fields:
        value, key = _get(model, field.setting), _key_in(base, field)
        if key in base and _setting_of(field, base, family) == value:
            continue
        if field.values is not None:
            value = next(in_hf for in_hf, in_setting in field.values.items() if in_setting == value)
        new = field.to_hf(value, model)
        # A key that the base does not have is added only if Transformers' default would be wrong.
        if not _same(base.get(key, field.default), new) or (not base and new is not None):
            config[key] = new
    return with_rope(config, family, model)


def _setting_of(field: Field, config: HfConfig, family: Family) -> Any:
    """The value of a setting that a config.json has; None if it is invalid."""
    full = {other.key: config.get(_key_in(config, other), other.default) for other in family.fields}
    value = full[field.key]
    try:
        return field.from_hf(value if field.values is None else field.values[value], full)
    except (ValueError, KeyError):
        return None


def _same(old: Any, new: Any) -> bool:
    """Whether two values are equal up to the rounding of a multiplication and division."""
    numbers = isinstance(old, int | float) and isinstance(new, int | float)
    return old == new or (numbers and abs(old - new) <= 1e-9 * abs(new))


def _get(model: ModelConfig, key: str) -> Any:
    part: Any = model
    for name in key.split("."):
        part = getattr(part, name)
    return part
