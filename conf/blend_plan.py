"""What each stage of a blend takes of its parts: shares by weight, and numbers of epochs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

from conf.schema import BlendPart, BlendStage, Config


@dataclass(frozen=True)
class StagePlan:
    """A stage of a run."""

    begin: int
    """The first sample."""
    end: int
    """The sample after the last one."""
    weights: tuple[float, ...]
    """Of each part; 0 for parts with epochs."""
    epochs: tuple[Fraction, ...]
    """Epochs of each part up to the end of the stage; 0 for parts with weights."""


def blend_plan(config: Config) -> list[StagePlan]:
    """The stages of a blend; none for other data."""
    data, train = config.data, config.train
    if data.kind != "blend":
        return []
    return _plan(data.blend, data.stages, train.steps, train.global_batch_size)


def _plan(
    parts: Sequence[BlendPart], stages: Sequence[BlendStage], steps: int, global_batch_size: int
) -> list[StagePlan]:
    """The epochs of a part are divided among the stages by its weight and the samples of each. The arithmetic is exact:
    what a stage takes does not depend on later ones that take nothing."""
    begins = [0, *((stage.step - 1) * global_batch_size for stage in stages)]
    ends = [*begins[1:], steps * global_batch_size]
    weights = [[part.weight for part in parts], *(stage.weights for stage in stages)]
    passed = []
    for number, part in enumerate(parts):
        shares = [
            Fraction(str(of_stage[number])) * (end - begin)
            for of_stage, begin, end in zip(weights, begins, ends, strict=True)
        ]
        total = Fraction(str(part.epochs or 0))
        passed.append([total * sum(shares[: i + 1]) / (sum(shares) or 1) for i in range(len(shares))])
    return [
        StagePlan(
            begin,
            end,
            tuple(0.0 if part.epochs is not None else float(w) for part, w in zip(parts, of_stage, strict=True)),
            tuple(of_part[i] for of_part in passed),
        )
        for i, (begin, end, of_stage) in enumerate(zip(begins, ends, weights, strict=True))
    ]


def refused_change(old: Mapping[str, Any], config: Config, step: int) -> str | None:
    """Why a run cannot continue after a step: some of the samples that it has had would be others, and documents would
    be repeated or left out. Other weights in data.blend are other data, which `RunDir.changed_data` names.

    Args:
        old: the settings that the run had until then.

    Returns:
        What to do instead; None: it can continue.
    """
    data, train = old.get("data", {}), old.get("train", {})
    is_blend = data.get("kind") == "blend"
    parts = [_of(BlendPart, part) for part in data.get("blend", ())] if is_blend else []
    stages = [_of(BlendStage, stage) for stage in data.get("stages", ())] if is_blend else []
    if not is_blend and all(part.epochs is None for part in config.data.blend):
        return None
    steps, size = train["steps"], train["global_batch_size"]
    before = _plan(parts, stages, steps, size)
    if all(part.epochs is None for part in (*parts, *config.data.blend)):
        return _refused_stages(before, config, step, size)
    taken = _taken(before, step * size)
    if taken == _taken(blend_plan(config), step * size):
        return None
    if config.train.steps > steps and before == _plan(config.data.blend, config.data.stages, steps, size):
        if all(part.epochs is not None for part in parts):
            return (
                f"the epochs of data.blend end at step {steps}, and no part has a weight. Restore train.steps={steps}, "
                "or start another run from its weights (checkpoint.load)"
            )
        return (
            f"the epochs of data.blend were spread over {steps} steps. Continue to more steps with the parts that have "
            f"weights: '{_without_epochs(parts, stages, steps)}'; or restore train.steps={steps}"
        )
    return (
        "the epochs of data.blend were spread over the steps in another way, and earlier samples would be others. "
        "Restore data.blend, data.stages, train.steps and train.global_batch_size, or start another run from its "
        "weights (checkpoint.load)"
    )


def _refused_stages(before: Sequence[StagePlan], config: Config, step: int, size: int) -> str | None:
    """`refused_change` where all parts have weights.

    Args:
        size: the global batch size until then.
    """
    after = blend_plan(config)
    if max(len(before), len(after)) < 2 or not after:
        return None
    if size != config.train.global_batch_size:
        return (
            f"data.stages begin at steps of train.global_batch_size={size} sequences, and would begin elsewhere with "
            f"{config.train.global_batch_size}. Restore it, or start another run from its weights (checkpoint.load)"
        )

    def begun(plan: Sequence[StagePlan]) -> list[Any]:
        return [(stage.begin, stage.weights) for stage in plan[1:] if stage.begin < step * size]

    if begun(before) != begun(after):
        return (
            f"data.stages may change from step {step + 1} on: samples up to there would be others. Restore the stages "
            "before it, or start another run from its weights (checkpoint.load)"
        )
    return None


def overrides_to_continue(config: Config) -> list[str] | None:
    """The overrides besides train.steps with which a run that has ended continues to more steps. None: it cannot, since
    all parts of its blend have epochs, which have ended."""
    data, steps = config.data, config.train.steps
    if data.kind != "blend" or all(part.epochs is None for part in data.blend):
        return []
    if all(part.epochs is not None for part in data.blend):
        return None
    return [_without_epochs(data.blend, data.stages, steps)]


def _without_epochs(parts: Sequence[BlendPart], stages: Sequence[BlendStage], steps: int) -> str:
    """The override of data.stages by which the parts with weights go on alone after some steps."""
    last = stages[-1].weights if stages else [part.weight for part in parts]
    weights = [0 if part.epochs is not None else w for part, w in zip(parts, last, strict=True)]
    added = ", ".join(f"{{step: {s.step}, weights: {s.weights}}}" for s in (*stages, BlendStage(steps + 1, weights)))
    return f"data.stages=[{added}]"


def _of(kind: type, values: Mapping[str, Any]) -> Any:
    """Without settings of other versions."""
    return kind(**{field.name: values[field.name] for field in fields(kind) if field.name in values})


def _taken(plan: Sequence[StagePlan], samples: int) -> list[Any]:
    """What the first samples depend on: where a stage ends matters if it takes epochs."""
    found, before = [], tuple(Fraction(0) for _ in (plan[0].epochs if plan else ()))
    for stage in plan:
        if stage.begin < samples:
            found.append((stage.begin, stage.weights, stage.epochs, stage.end if stage.epochs != before else None))
            before = stage.epochs
    return found
