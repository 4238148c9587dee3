"""Validates a configuration before data is read, PyTorch is imported or a rank is started.

A rule is a condition on settings. A violation is reported with the actual values and the nearest values that work;
all rules are checked again to make sure that they do.
"""

import difflib
import functools
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from conf.attention_rules import attention_rules
from conf.blend_rules import blend_rules
from conf.config_view import (
    DEFAULTS,
    WORLD_SIZE,
    ConfigView,
    Violation,
    divisible,
    divisors,
    format_value,
    multiples,
)
from conf.eval_rules import eval_task_rules
from conf.extensions import REGISTRIES, missing_package, registered, schedule_reads, takes_files
from conf.fp8_rules import fp8_rules
from conf.layout_rules import batch_rules, layout_rules
from conf.limits import ALTERNATIVES, BOUNDS, CHOICES, CONDITIONS, MODEL_SETTINGS, has_chats
from conf.lora_rules import check_targets, lora_rules
from conf.nearest import nearest_layouts
from conf.preference_rules import preference_rules
from conf.printable import one_line
from conf.schema import LOGGERS, RECOMPUTE, Config
from conf.te_rules import te_rules

Checker = Callable[[ConfigView], list[Violation]]
_FURTHER = ", each with further changes"


def check(config: Config, world_size: int) -> None:
    """Raises ValueError if a training run of world_size ranks violates a rule: one line per violated rule."""
    _check(ConfigView(config, world_size), violations)


def check_layout(config: Config, world_size: int) -> None:
    """Raises ValueError if world_size ranks cannot hold the model of config. Rules that concern only training, such as
    those of the batch, are not checked."""
    _check(ConfigView(config, world_size), _layout_violations)


def reset_unused(config: Config, world_size: int) -> tuple[Config, dict[str, tuple[Any, str]]]:
    """The configuration with every unused setting reset to its default (of a list: without the unused elements), and
    {setting: (new value, reason)} of those. For the runs of a sweep, each of which may use only some of the
    settings."""
    cfg, reset = ConfigView(config, world_size), {}
    while unused := next((violation for violation in (*_recompute(cfg), *_unused(cfg)) if violation.unused), None):
        ((key, (value,)),) = unused.suggestions.items()
        reset[key] = (value, f"{unused.rule}, but {unused.actual}")
        cfg = cfg.replace(key, value)
    return cfg.config, reset


def _layout_violations(cfg: ConfigView) -> list[Violation]:
    unused = [v for v in _unused(cfg) if v.rule.startswith(("parallel.", "model.moe.backend "))]
    return [*_choices(cfg), *_bounds(cfg), *_auto_without_training(cfg), *layout_rules(cfg), *fp8_rules(cfg), *unused]


def _auto_without_training(cfg: ConfigView) -> Iterator[Violation]:
    if cfg["parallel.auto"]:
        key = "parallel.auto"
        yield Violation(f"{key} needs training", "this command takes the layout that is given", {key: [False]})


def _check(cfg: ConfigView, checker: Checker) -> None:
    world_size, found = cfg.world_size, checker(cfg)
    lines = [
        f"{violation.rule}, but {violation.actual}{_suggest(violation, cfg, found, checker)}" for violation in found
    ]
    concerns_layout = any(key.startswith("parallel.") for violation in found for key in violation.suggestions)
    has_single_fix = len(found) == 1 and "; nearest: " in lines[0] and not lines[0].endswith(_FURTHER)
    if concerns_layout and not has_single_fix and (layouts := nearest_layouts(cfg, lambda other: not checker(other))):
        lines[-1] += f"\n  nearest layouts of {world_size} ranks: {', or '.join(layouts)}"
    if len(found) == 1:
        raise ValueError(lines[0])
    if lines:
        raise ValueError("\n  ".join([f"{len(found)} rules are violated:", *lines]))


def violations(cfg: ConfigView) -> list[Violation]:
    """The violated rules. Those between settings are checked as if invalid single settings had the suggested values."""
    found = [*_choices(cfg), *_bounds(cfg)]
    for violation in found:
        for key, values in violation.suggestions.items():
            cfg = cfg.replace(key, next(iter(values)))
    sections = (attention_rules, _recompute, _experts, _prediction, layout_rules, fp8_rules, lora_rules, batch_rules)
    sections += (
        te_rules,
        preference_rules,
        _schedule,
        _names,
        _load,
        _loggers,
        eval_task_rules,
        _data,
        blend_rules,
        _unused,
    )
    found += [violation for section in sections for violation in section(cfg)]
    return found or [*check_targets(cfg)]


def _suggest(violation: Violation, cfg: ConfigView, found: list[Violation], checker: Checker) -> str:
    """For each setting, the nearest value with which all rules hold; else one that fixes this rule and violates no new
    one; else one that fixes this rule."""
    rest = {other.rule for other in found} - {violation.rule}
    criteria: list[tuple[Callable[[set[str]], bool], str]] = [
        (lambda left: not left, ""),
        (lambda left: left <= rest, ""),
        (lambda left: violation.rule not in left, _FURTHER),
    ]
    suggestions = {key: list(values) for key, values in violation.suggestions.items()}

    @functools.cache
    def left(key: str, position: int) -> set[str]:
        return {other.rule for other in checker(cfg.replace(key, suggestions[key][position]))}

    for is_sufficient, remark in criteria:
        texts = []
        for key, values in suggestions.items():
            nearest = (value for position, value in enumerate(values) if is_sufficient(left(key, position)))
            if key == WORLD_SIZE:
                texts += [f"{ranks} ranks (on one machine NPROC={ranks})" for ranks in islice(nearest, 2)]
            else:
                texts += [f"{key}={format_value(value)}" for value in islice(nearest, 1)]
        if texts:
            return f"; nearest: {' or '.join(texts)}{remark}"
    return ""


def _not_added(key: str, cfg: ConfigView) -> str:
    """Where a setting's unknown value could come from, if extensions can add values to it."""
    return f", and extensions={format_value(cfg['extensions'])} does not add it" if key in REGISTRIES else ""


def _choices(cfg: ConfigView) -> Iterator[Violation]:
    for key, built_in in CHOICES.items():
        value = cfg[key]
        options = (*built_in, *(name for name in registered(key) if name not in built_in))
        if value in options:
            continue
        by_name = {format_value(option): option for option in options}
        similar = difflib.get_close_matches(value, by_name, n=1, cutoff=0.0)
        nearest, words = ALTERNATIVES.get(
            (key, value), (by_name[similar[0]], f"is not available{_not_added(key, cfg)}")
        )
        yield Violation(f"{key} is one of {', '.join(by_name)}", f"{value} {words}", {key: [nearest]})


def _bounds(cfg: ConfigView) -> Iterator[Violation]:
    for key, bounds in BOUNDS.items():
        value = cfg[key]
        if value is not None and not bounds.contain(value):
            suggestions = {key: [bounds.nearest(DEFAULTS[key])]}
            yield Violation(f"{key} {bounds}", f"it is {format_value(value)}", suggestions)


def _recompute(cfg: ConfigView) -> Iterator[Violation]:
    key, wanted = "model.recompute", cfg["model.recompute"]
    known = [part for part in wanted if part in RECOMPUTE]
    if known != wanted:
        parts = [part if part in known else difflib.get_close_matches(part, RECOMPUTE, 1, 0.0)[0] for part in wanted]
        rule = f"{key} contains only {', '.join(RECOMPUTE)}"
        yield Violation(rule, f"it is {format_value(wanted)}", {key: [sorted(set(parts)), known]})
    elif "full" in wanted and len(wanted) > 1:
        yield Violation(f"{key}=[full] excludes all others", f"it is {format_value(wanted)}", {key: [["full"]]})
    elif "moe" in wanted and not cfg["model.moe.num_experts"]:
        without = [part for part in wanted if part != "moe"]
        yield Violation(
            f"moe in {key} needs model.moe.num_experts > 0", "the model is dense", {key: [without]}, unused=True
        )


def _experts(cfg: ConfigView) -> Iterator[Violation]:
    experts, top_k, every = (f"model.moe.{key}" for key in ("num_experts", "top_k", "every"))
    if cfg[experts] == 0:
        return
    if cfg[top_k] > cfg[experts]:
        actual = f"{cfg[top_k]} > {cfg[experts]}"
        yield Violation(f"{top_k} <= {experts}", actual, {top_k: [cfg[experts]], experts: [cfg[top_k]]})
    if cfg[top_k] == 1 and cfg["model.moe.renormalize"]:
        yield Violation(
            f"model.moe.renormalize needs {top_k} > 1",
            "with one expert per token the gate would be the constant 1 and the router would get no gradient",
            {"model.moe.renormalize": [None], top_k: [2]},
        )
    if cfg[top_k] == 1 and cfg["model.moe.softmax_order"] == "after":
        yield Violation(
            f"model.moe.softmax_order=after needs {top_k} > 1",
            "the softmax over one selected logit is the constant 1 and the router would get no gradient",
            {"model.moe.softmax_order": ["before"], top_k: [2]},
        )
    if cfg["model.moe.num_expert_groups"] > 1:
        yield from _expert_groups(cfg)
    if cfg["model.moe.load_balancing"] == "expert_choice":
        yield from _expert_choice(cfg)
    if cfg[every] > cfg["model.num_layers"]:
        yield Violation(
            f"{every} <= model.num_layers",
            f"{cfg[every]} > {cfg['model.num_layers']}, so no layer would have experts",
            {every: [cfg["model.num_layers"]], "model.num_layers": [cfg[every]]},
        )
    elif not cfg["model.sparse_layers"]:
        last, dense = cfg["model.num_layers"] // cfg[every] * cfg[every] - 1, "model.moe.first_dense_layers"
        yield Violation(
            f"{dense} <= the last layer that {every} gives experts (layers count from 0)",
            f"{cfg[dense]} > {last}, so no layer would have experts",
            {dense: [last], "model.num_layers": [(cfg[dense] // cfg[every] + 1) * cfg[every]]},
        )


def _expert_groups(cfg: ConfigView) -> Iterator[Violation]:
    experts, top_k, groups, chosen = (
        f"model.moe.{key}" for key in ("num_experts", "top_k", "num_expert_groups", "top_k_groups")
    )
    if cfg[experts] % cfg[groups]:
        yield from divisible(cfg, experts, groups)
        return
    size = cfg[experts] // cfg[groups]
    if size < 2:
        yield Violation(
            f"{experts} / {groups} >= 2 (a group's score is the sum of its two best)",
            f"{cfg[experts]} / {cfg[groups]} = {size}",
            {groups: divisors(cfg[groups], cfg[experts]), experts: [2 * cfg[groups]]},
        )
    if cfg[chosen] >= cfg[groups]:
        yield Violation(
            f"{chosen} < {groups} (else every group is selected)",
            f"{cfg[chosen]} >= {cfg[groups]}",
            {chosen: range(cfg[groups] - 1, 0, -1), groups: divisors(cfg[chosen] + 1, cfg[experts])},
        )
    elif cfg[top_k] > cfg[chosen] * size:
        yield Violation(
            f"{top_k} <= {chosen} * {experts} / {groups}",
            f"{cfg[top_k]} > {cfg[chosen]} * {size}",
            {top_k: [cfg[chosen] * size], chosen: range(cfg[chosen] + 1, cfg[groups])},
        )


def _expert_choice(cfg: ConfigView) -> Iterator[Violation]:
    key, factor, sample = "model.moe.load_balancing", "model.moe.capacity_factor", "eval.sample_tokens"
    dispatcher = "model.moe.dispatcher"
    if cfg[dispatcher] not in ("auto", "all_to_all"):
        yield Violation(
            f"{key}=expert_choice needs {dispatcher}=all_to_all",
            f"it is {cfg[dispatcher]}, and the number of experts per token differs between ranks",
            {dispatcher: ["auto"], key: [DEFAULTS[key]]},
        )
    if cfg[factor] is None:
        suggestions = {factor: [DEFAULTS[factor]], key: [DEFAULTS[key]]}
        yield Violation(
            f"{key}=expert_choice needs a {factor}",
            "it is null, and determines how many tokens each expert selects",
            suggestions,
        )
    if cfg[sample]:
        yield Violation(
            f"{key}=expert_choice needs {sample}=0",
            f"it is {cfg[sample]}: experts select among all tokens, and a text being generated has no later ones yet",
            {sample: [0], key: [DEFAULTS[key]]},
        )


def _prediction(cfg: ConfigView) -> Iterator[Violation]:
    layers, length = "model.mtp_num_layers", "train.sequence_length"
    if cfg[layers] >= cfg[length]:
        yield Violation(
            f"{layers} < {length} (else no sequence has a token so far ahead)",
            f"{cfg[layers]} >= {cfg[length]}",
            {layers: [cfg[length] - 1], length: multiples(2 * cfg[layers], 2)},
        )


def _schedule(cfg: ConfigView) -> Iterator[Violation]:
    steps, stop, profile = cfg["train.steps"], cfg["train.stop_after"], cfg["train.profile"]
    lr, min_lr = cfg["optim.lr"], cfg["optim.min_lr"]
    if min_lr is not None and min_lr > lr and schedule_reads(cfg["optim.schedule"], "min_lr"):
        # The default is a tenth of the peak; the nearest value, the peak itself, would leave no decay.
        suggestions = {"optim.min_lr": [None], "optim.lr": [min_lr]}
        yield Violation("optim.min_lr <= optim.lr", f"{min_lr} > {lr}", suggestions)
    if stop is not None and stop > steps:
        suggestions = {"train.stop_after": [steps], "train.steps": [stop]}
        yield Violation("train.stop_after <= train.steps", f"{stop} > {steps}", suggestions)
    if profile is None:
        return
    last = min(steps, stop or steps)
    if len(profile) != 2 or not 1 <= profile[0] <= profile[1] <= last:
        clamped = sorted(min(max(step, 1), last) for step in [*profile, 1, 1][:2])
        yield Violation(
            f"train.profile is [a,b] with 1 <= a <= b <= {last}, the last step",
            f"it is {format_value(profile)}",
            {"train.profile": [clamped]},
        )


def _names(cfg: ConfigView) -> Iterator[Violation]:
    """Names of runs are printed, and are part of the path of the run directory."""
    for key in ("run.name", "model.name"):
        name = cfg[key] or ""
        safe = "".join(letter if letter.isprintable() and letter != "/" else "_" for letter in name)
        if name in (".", ".."):
            yield Violation(f"{key} is a name, not a path", f"it is {name}", {key: [DEFAULTS[key]]})
        elif safe != name:
            rule = f"{key} is a name: no / and no control characters (run.dir takes a path)"
            yield Violation(rule, f"it is {one_line(name)}", {key: [safe]})


def _load(cfg: ConfigView) -> Iterator[Violation]:
    """checkpoint.load_except names existing settings."""
    key = "checkpoint.load_except"
    known = [*MODEL_SETTINGS, "data.tokenizer"]
    if unknown := [name for name in cfg[key] if name not in known]:
        near = [difflib.get_close_matches(name, known, 1, 0.0)[0] if name in unknown else name for name in cfg[key]]
        yield Violation(
            f"{key} contains only settings of the model and data.tokenizer",
            f"there is no {', '.join(unknown)}",
            {key: [list(dict.fromkeys(near))]},
        )


def _loggers(cfg: ConfigView) -> Iterator[Violation]:
    key, wanted = "logging.loggers", cfg["logging.loggers"]
    known = list(dict.fromkeys((*LOGGERS, *registered(key))))
    if unknown := [name for name in wanted if name not in known]:
        near = [difflib.get_close_matches(name, known, 1, 0.0)[0] if name in unknown else name for name in wanted]
        found = f"{', '.join(unknown)} is not available{_not_added(key, cfg)}"
        yield Violation(f"{key} is made of {', '.join(known)}", found, {key: [list(dict.fromkeys(near))]})
    elif len(set(wanted)) < len(wanted):
        yield Violation(f"{key} names each once", f"it is {format_value(wanted)}", {key: [list(dict.fromkeys(wanted))]})
    for name in wanted:
        if name not in unknown and (package := missing_package(name)):
            extra = f": bash launch/setup.sh {name}" if name in LOGGERS else ""
            without = [other for other in wanted if other != name]
            rule = f"{key}={name} needs the package {package}"
            yield Violation(rule, f"it is not installed{extra}", {key: [without]})


def _data(cfg: ConfigView) -> Iterator[Violation]:
    kind = cfg["data.kind"]
    if takes_files(kind) and not cfg["data.files"]:
        yield Violation(
            f"data={kind} needs data.files",
            "there are none: give data.files=[PATH,...], or train on Python's own source files",
            {"data.kind": ["stdlib"]},
        )
    if has_chats(cfg) and cfg["data.packing"] and not cfg["data.document_mask"]:
        yield Violation(
            f"{'data=chat' if kind == 'chat' else 'a part of kind chat'} with data.packing=true needs "
            "data.document_mask=true",
            "conversations in a sequence would attend to each other",
            {"data.document_mask": [True], "data.packing": [False]},
        )


def _unused(cfg: ConfigView) -> Iterator[Violation]:
    """Settings that differ from their defaults but have no effect."""
    for condition, holds, keys in CONDITIONS:
        if holds(cfg):
            continue
        for key in keys.split():
            if cfg[key] != DEFAULTS[key]:
                actual = f"it is {format_value(cfg[key])} and would be ignored"
                yield Violation(f"{key} needs {condition}", actual, {key: [DEFAULTS[key]]}, unused=True)
