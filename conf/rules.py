"""What a configuration must satisfy, as far as that can be known before anything is read, imported or started.

A rule is an equation over settings. A violated one is told with its numbers and the nearest values that work. That they
work is not estimated but tried, by asking all the rules again with the new value."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from conf.case import DEFAULTS, WORLD_SIZE, Case, Violation, divisible, divisors, multiples, shown
from conf.extensions import missing_package, registered, schedule_reads, takes_files
from conf.fp8_rules import fp8_rules
from conf.layout_rules import batch_rules, layout_rules
from conf.limits import BOUNDS, CHOICES, IDLE, MEANT
from conf.nearest import nearest_layouts
from conf.printable import one_line
from conf.schema import DATA_KINDS, LOGGERS, RECOMPUTE, Config

Judge = Callable[[Case], list[Violation]]
_FURTHER = ", each with further changes"


def check(config: Config, world_size: int) -> None:
    """Raises ValueError when a run of world_size ranks cannot be what config says: one line for each violated rule."""
    _check(Case(config, world_size), violations)


def check_layout(config: Config, world_size: int) -> None:
    """Raises ValueError when world_size ranks cannot hold a trained model as config says. What concerns training alone,
    such as the batch, is not looked at."""
    _check(Case(config, world_size), _layout_violations)


def without_idle(config: Config, world_size: int) -> tuple[Config, dict[str, tuple[Any, str]]]:
    """The configuration in which every setting that would be ignored has its default (of a list: the rest of it), and
    per such setting its new value and why: what one run of a sweep leaves to the others."""
    case, reset = Case(config, world_size), {}
    while idle := next((violation for violation in (*_recompute(case), *_idle(case)) if violation.idle), None):
        ((key, (value,)),) = idle.repairs.items()
        reset[key] = (value, f"{idle.rule}, but {idle.numbers}")
        case = case.replaced(key, value)
    return case.config, reset


def _layout_violations(case: Case) -> list[Violation]:
    idle = [v for v in _idle(case) if v.rule.startswith(("parallel.", "model.moe.backend "))]
    return [*_choices(case), *_bounds(case), *layout_rules(case), *fp8_rules(case), *idle]


def _check(case: Case, judge: Judge) -> None:
    world_size, found = case.world_size, judge(case)
    lines = [
        f"{violation.rule}, but {violation.numbers}{_advice(violation, case, found, judge)}" for violation in found
    ]
    of_layout = any(key.startswith("parallel.") for violation in found for key in violation.repairs)
    mended_by_one = len(found) == 1 and "; nearest: " in lines[0] and not lines[0].endswith(_FURTHER)
    if of_layout and not mended_by_one and (layouts := nearest_layouts(case, lambda other: not judge(other))):
        lines[-1] += f"\n  nearest layouts of {world_size} ranks: {', or '.join(layouts)}"
    if len(found) == 1:
        raise ValueError(lines[0])
    if lines:
        raise ValueError("\n  ".join([f"{len(found)} rules are violated:", *lines]))


def violations(case: Case) -> list[Violation]:
    """The violated rules; those between settings are judged as if each setting by itself had been mended."""
    found = [*_choices(case), *_bounds(case)]
    for violation in found:
        for key, values in violation.repairs.items():
            case = case.replaced(key, next(iter(values)))
    sections = (_model, _recompute, _experts, layout_rules, fp8_rules, batch_rules)
    sections += (_schedule, _names, _load, _loggers, _data, _blend, _idle)
    return found + [violation for section in sections for violation in section(case)]


def _advice(violation: Violation, case: Case, found: list[Violation], judge: Judge) -> str:
    """The nearest value of each setting that mends everything; else one that mends this rule and violates no other
    anew; else one that mends this rule."""
    rest = {other.rule for other in found} - {violation.rule}
    wishes: list[tuple[Callable[[set[str]], bool], str]] = [
        (lambda left: not left, ""),
        (lambda left: left <= rest, ""),
        (lambda left: violation.rule not in left, _FURTHER),
    ]
    for granted, remark in wishes:
        advice = []
        for key, values in violation.repairs.items():
            left = ((value, {other.rule for other in judge(case.replaced(key, value))}) for value in values)
            nearest = (value for value, rules in left if granted(rules))
            if key == WORLD_SIZE:
                advice += [f"{ranks} ranks (on one machine NPROC={ranks})" for ranks in islice(nearest, 2)]
            else:
                advice += [f"{key}={shown(value)}" for value in islice(nearest, 1)]
        if advice:
            return f"; nearest: {' or '.join(advice)}{remark}"
    return ""


def _choices(case: Case) -> Iterator[Violation]:
    for key, built_in in CHOICES.items():
        value = case[key]
        options = (*built_in, *(name for name in registered(key) if name not in built_in))
        if value in options:
            continue
        spelt = {shown(option): option for option in options}
        alike = difflib.get_close_matches(value, spelt, n=1, cutoff=0.0)
        nearest, words = MEANT.get((key, value), (spelt[alike[0]], "is not available"))
        yield Violation(f"{key} is one of {', '.join(spelt)}", f"{value} {words}", {key: [nearest]})


def _bounds(case: Case) -> Iterator[Violation]:
    for text, holds, nearest, keys in BOUNDS:
        for key in keys.split():
            value = case[key]
            if value is not None and not holds(value):
                repair = DEFAULTS[key] if nearest is None else nearest
                yield Violation(f"{key} {text}", f"it is {shown(value)}", {key: [repair]})


def _model(case: Case) -> Iterator[Violation]:
    hidden, heads, head_dim = "model.hidden_size", "model.num_attention_heads", "model.head_dim"
    even = "is even (rotary positions turn pairs)"
    if case[head_dim] is not None:
        if case[head_dim] % 2:
            yield Violation(f"{head_dim} {even}", f"it is {case[head_dim]}", {head_dim: [case[head_dim] + 1]})
    elif case[hidden] % case[heads]:
        for violation in divisible(case, hidden, heads):
            repairs = {**violation.repairs, head_dim: multiples(case[hidden] // case[heads], 2)}
            yield dataclasses.replace(violation, repairs=repairs)
    elif case[hidden] // case[heads] % 2:
        yield Violation(
            f"{hidden} / {heads} {even}",
            f"{case[hidden]} / {case[heads]} = {case[hidden] // case[heads]}",
            {heads: divisors(case[heads], case[hidden]), hidden: multiples(case[hidden], 2 * case[heads])},
        )
    if case["model.num_query_groups"] is not None:
        yield from divisible(case, heads, "model.num_query_groups")


def _recompute(case: Case) -> Iterator[Violation]:
    key, wanted = "model.recompute", case["model.recompute"]
    known = [part for part in wanted if part in RECOMPUTE]
    if known != wanted:
        parts = [part if part in known else difflib.get_close_matches(part, RECOMPUTE, 1, 0.0)[0] for part in wanted]
        rule = f"{key} is made of {', '.join(RECOMPUTE)}"
        yield Violation(rule, f"it is {shown(wanted)}", {key: [sorted(set(parts)), known]})
    elif "full" in wanted and len(wanted) > 1:
        yield Violation(f"{key}=[full] goes alone", f"it is {shown(wanted)}", {key: [["full"]]})
    elif "moe" in wanted and not case["model.moe.num_experts"]:
        without = [part for part in wanted if part != "moe"]
        yield Violation(
            f"moe in {key} needs model.moe.num_experts > 0", "the model is dense", {key: [without]}, idle=True
        )


def _experts(case: Case) -> Iterator[Violation]:
    experts, top_k, every = (f"model.moe.{key}" for key in ("num_experts", "top_k", "every"))
    if case[experts] == 0:
        return
    if case[top_k] > case[experts]:
        numbers = f"{case[top_k]} > {case[experts]}"
        yield Violation(f"{top_k} <= {experts}", numbers, {top_k: [case[experts]], experts: [case[top_k]]})
    if case[top_k] == 1 and case["model.moe.renormalize"]:
        yield Violation(
            f"model.moe.renormalize needs {top_k} > 1",
            "with one expert per token the gate would be the constant 1 and the router would get no gradient",
            {"model.moe.renormalize": [None], top_k: [2]},
        )
    if case[top_k] == 1 and case["model.moe.softmax_order"] == "after":
        yield Violation(
            f"model.moe.softmax_order=after needs {top_k} > 1",
            "the softmax over one chosen logit is the constant 1 and the router would get no gradient",
            {"model.moe.softmax_order": ["before"], top_k: [2]},
        )
    if case["model.moe.num_expert_groups"] > 1:
        yield from _expert_groups(case)
    if case["model.moe.load_balancing"] == "expert_choice":
        yield from _expert_choice(case)
    if case[every] > case["model.num_layers"]:
        yield Violation(
            f"{every} <= model.num_layers",
            f"{case[every]} > {case['model.num_layers']}, so no layer would have experts",
            {every: [case["model.num_layers"]], "model.num_layers": [case[every]]},
        )
    elif not case["model.sparse_layers"]:
        last, dense = case["model.num_layers"] // case[every] * case[every] - 1, "model.moe.first_dense_layers"
        yield Violation(
            f"{dense} <= the last layer that {every} gives experts (layers count from 0)",
            f"{case[dense]} > {last}, so no layer would have experts",
            {dense: [last], "model.num_layers": [(case[dense] // case[every] + 1) * case[every]]},
        )


def _expert_groups(case: Case) -> Iterator[Violation]:
    experts, top_k, groups, chosen = (
        f"model.moe.{key}" for key in ("num_experts", "top_k", "num_expert_groups", "top_k_groups")
    )
    if case[experts] % case[groups]:
        yield from divisible(case, experts, groups)
        return
    size = case[experts] // case[groups]
    if size < 2:
        yield Violation(
            f"{experts} / {groups} >= 2 (a group's score is the sum of its two best)",
            f"{case[experts]} / {case[groups]} = {size}",
            {groups: divisors(case[groups], case[experts]), experts: [2 * case[groups]]},
        )
    if case[chosen] >= case[groups]:
        yield Violation(
            f"{chosen} < {groups} (else every group is chosen)",
            f"{case[chosen]} >= {case[groups]}",
            {chosen: range(case[groups] - 1, 0, -1), groups: divisors(case[chosen] + 1, case[experts])},
        )
    elif case[top_k] > case[chosen] * size:
        yield Violation(
            f"{top_k} <= {chosen} * {experts} / {groups}",
            f"{case[top_k]} > {case[chosen]} * {size}",
            {top_k: [case[chosen] * size], chosen: range(case[chosen] + 1, case[groups])},
        )


def _expert_choice(case: Case) -> Iterator[Violation]:
    key, factor, sample = "model.moe.load_balancing", "model.moe.capacity_factor", "eval.sample_tokens"
    dispatcher = "model.moe.dispatcher"
    if case[dispatcher] not in ("auto", "all_to_all"):
        yield Violation(
            f"{key}=expert_choice needs {dispatcher}=all_to_all",
            f"it is {case[dispatcher]}, and how many experts take a token differs between ranks",
            {dispatcher: ["auto"], key: [DEFAULTS[key]]},
        )
    if case[factor] is None:
        repairs = {factor: [DEFAULTS[factor]], key: [DEFAULTS[key]]}
        yield Violation(f"{key}=expert_choice needs a {factor}", "it is null, and says how many each takes", repairs)
    if case[sample]:
        yield Violation(
            f"{key}=expert_choice needs {sample}=0",
            f"it is {case[sample]}: experts choose among all tokens, and a text being written has no later ones yet",
            {sample: [0], key: [DEFAULTS[key]]},
        )


def _schedule(case: Case) -> Iterator[Violation]:
    steps, stop, profile = case["train.steps"], case["train.stop_after"], case["train.profile"]
    lr, min_lr = case["optim.lr"], case["optim.min_lr"]
    if min_lr is not None and min_lr > lr and schedule_reads(case["optim.schedule"], "min_lr"):
        # Unset, it is a tenth of the peak; the nearest value, the peak itself, would leave no decay.
        repairs = {"optim.min_lr": [None], "optim.lr": [min_lr]}
        yield Violation("optim.min_lr <= optim.lr", f"{min_lr} > {lr}", repairs)
    if stop is not None and stop > steps:
        repairs = {"train.stop_after": [steps], "train.steps": [stop]}
        yield Violation("train.stop_after <= train.steps", f"{stop} > {steps}", repairs)
    if profile is None:
        return
    last = min(steps, stop or steps)
    if len(profile) != 2 or not 1 <= profile[0] <= profile[1] <= last:
        clamped = sorted(min(max(step, 1), last) for step in [*profile, 1, 1][:2])
        yield Violation(
            f"train.profile is [a,b] with 1 <= a <= b <= {last}, the last step",
            f"it is {shown(profile)}",
            {"train.profile": [clamped]},
        )


def _names(case: Case) -> Iterator[Violation]:
    """What names a run is a part of the path of its directory and is printed."""
    for key in ("run.name", "model.name"):
        name = case[key] or ""
        safe = "".join(letter if letter.isprintable() and letter != "/" else "_" for letter in name)
        if name in (".", ".."):
            yield Violation(f"{key} is a name, not a path", f"it is {name}", {key: [DEFAULTS[key]]})
        elif safe != name:
            rule = f"{key} is a name: no / and no control characters (run.dir takes a path)"
            yield Violation(rule, f"it is {one_line(name)}", {key: [safe]})


def _load(case: Case) -> Iterator[Violation]:
    """checkpoint.load_except names settings that there are."""
    key, sections = "checkpoint.load_except", {"model": case.config.model, "model.moe": case.config.model.moe}
    known = [f"{section}.{f.name}" for section, part in sections.items() for f in dataclasses.fields(part)]
    known = [name for name in known if name not in sections] + ["data.tokenizer"]
    if unknown := [name for name in case[key] if name not in known]:
        near = [difflib.get_close_matches(name, known, 1, 0.0)[0] if name in unknown else name for name in case[key]]
        yield Violation(
            f"{key} is made of settings of the model and data.tokenizer",
            f"there is no {', '.join(unknown)}",
            {key: [list(dict.fromkeys(near))]},
        )


def _loggers(case: Case) -> Iterator[Violation]:
    key, wanted = "logging.loggers", case["logging.loggers"]
    known = list(dict.fromkeys((*LOGGERS, *registered(key))))
    if unknown := [name for name in wanted if name not in known]:
        near = [difflib.get_close_matches(name, known, 1, 0.0)[0] if name in unknown else name for name in wanted]
        yield Violation(
            f"{key} is made of {', '.join(known)}", f"it is {shown(wanted)}", {key: [list(dict.fromkeys(near))]}
        )
    elif len(set(wanted)) < len(wanted):
        yield Violation(f"{key} names each once", f"it is {shown(wanted)}", {key: [list(dict.fromkeys(wanted))]})
    for name in wanted:
        if name not in unknown and (package := missing_package(name)):
            extra = f": bash launch/setup.sh {name}" if name in LOGGERS else ""
            without = [other for other in wanted if other != name]
            rule = f"{key}={name} needs the package {package}"
            yield Violation(rule, f"it is not installed{extra}", {key: [without]})


def _data(case: Case) -> Iterator[Violation]:
    kind = case["data.kind"]
    if takes_files(kind) and not case["data.files"]:
        yield Violation(
            f"data={kind} needs data.files",
            "there are none: give data.files=[PATH,...], or train on Python's own source files",
            {"data.kind": ["stdlib"]},
        )


def _blend(case: Case) -> Iterator[Violation]:
    if case["data.kind"] != "blend":
        return
    if not case["data.blend"]:
        example = "data.blend=[{weight: 1, kind: stdlib}, {weight: 2, kind: text, files: [PATH]}]"
        yield Violation("data=blend needs data.blend", f"it has no parts; for example '{example}'")
    kinds = [kind for kind in dict.fromkeys((*DATA_KINDS, *registered("data.kind"))) if kind != "blend"]
    for index, part in enumerate(case["data.blend"]):
        name = f"data.blend[{index}]"
        if not 0 < part.weight < math.inf:
            yield Violation(f"{name}.weight > 0", f"it is {part.weight:g}; nearest: weight: 1")
        if part.kind not in kinds:
            nearest = difflib.get_close_matches(part.kind, kinds, n=1, cutoff=0.0)[0]
            yield Violation(f"{name}.kind is one of {', '.join(kinds)}", f"it is {part.kind}; nearest: kind: {nearest}")
        elif part.files and not takes_files(part.kind):
            yield Violation(f"{name}.files has an effect only with kind: text or megatron", f"kind is {part.kind}")
        elif takes_files(part.kind) and not part.files:
            yield Violation(f"{name}.files is needed with kind: {part.kind}", "there are none: files: [PATH]")


def _idle(case: Case) -> Iterator[Violation]:
    """Settings that differ from their defaults and that nothing would read."""
    for condition, has_effect, keys in IDLE:
        if has_effect(case):
            continue
        for key in keys.split():
            if case[key] != DEFAULTS[key]:
                numbers = f"it is {shown(case[key])} and would be ignored"
                yield Violation(f"{key} needs {condition}", numbers, {key: [DEFAULTS[key]]}, idle=True)
