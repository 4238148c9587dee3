"""Parts of a blend that a run passes through a given number of times: their samples in each stage, to the last one."""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

from conf.blend_plan import StagePlan, blend_plan
from conf.blend_rules import part_names
from conf.schema import Config
from corpus.cache import Cache
from corpus.prepare import Prepared


def with_quotas(prepared: Prepared, config: Config) -> Prepared:
    """The data with the `quotas` of every source of a part with epochs.

    Raises:
        ValueError: the run is too short for them, or if all parts have epochs, too long.
    """
    plan = blend_plan(config)
    if not plan or not any(plan[-1].epochs):
        return prepared
    quotas = _quotas(prepared, config, plan)
    for number, part in enumerate(part_names(config.data.blend)):
        of_part = [quota for source, quota in zip(prepared.train, quotas, strict=True) if source.part == number]
        if plan[-1].epochs[number] and not sum(map(sum, of_part)):
            raise ValueError(
                f"data.blend: {float(plan[-1].epochs[number]):g} epochs of {part} are less than one sequence; nearest: "
                "more epochs"
            )
    _check_space(plan, quotas, config)
    if all(plan[-1].epochs):
        quotas = _filled(quotas, plan, config)
    train = [
        replace(source, quotas=quota if plan[-1].epochs[source.part] else None)
        for source, quota in zip(prepared.train, quotas, strict=True)
    ]
    return replace(prepared, train=train)


def _quotas(prepared: Prepared, config: Config, plan: Sequence[StagePlan]) -> list[list[int]]:
    """Of each source, the samples in each stage; 0 for those of parts with weights."""
    from corpus.open_data import open_chats

    data, cache = config.data, Cache(config.data.cache_dir)
    how = {"sequence_length": config.train.sequence_length, "seed": config.train.seed}
    chats = open_chats(prepared, data, **how)
    how["without"] = chats
    if data.packing_strategy == "best_fit":
        from corpus.packed_epochs import open_packed

        epochs = open_packed(prepared, cache, document_mask=data.document_mask, **how)
    else:
        from corpus.epochs import open_epochs

        epochs = open_epochs(prepared, cache, **how)
    opened, found = {**epochs, **chats}, []
    for number, source in enumerate(prepared.train):
        ends = [Fraction(0), *(stage.epochs[source.part] for stage in plan)]
        counts = [opened[number].num_samples(end) for end in ends]
        found.append([end - begin for begin, end in pairwise(counts)])
    return found


def _check_space(plan: Sequence[StagePlan], quotas: Sequence[Sequence[int]], config: Config) -> None:
    """Raises ValueError if a stage has fewer samples than the epochs take."""
    size = config.train.global_batch_size
    for number, stage in enumerate(plan):
        wanted, have = sum(quota[number] for quota in quotas), stage.end - stage.begin
        if wanted <= have:
            continue
        if len(plan) == 1:
            where, nearest = f"train.steps={config.train.steps} has", f"train.steps={-(-wanted // size)}"
        else:
            where = f"the stage from step {stage.begin // size + 1} has"
            nearest = f"{have / wanted:.3g} times these epochs, a longer stage, or lower weights of these parts in it"
        raise ValueError(
            f"the epochs of data.blend take {wanted:,} sequences, but {where} {have:,}; nearest: {nearest}"
        )


def _filled(quotas: list[list[int]], plan: Sequence[StagePlan], config: Config) -> list[list[int]]:
    """Quotas that fill the last step, where no part has a weight.

    Raises:
        ValueError: more than a step would be left.
    """
    (stage,), size = plan, config.train.global_batch_size
    wanted, have = sum(quota for (quota,) in quotas), stage.end - stage.begin
    if have - wanted >= size:
        raise ValueError(
            f"train.steps={config.train.steps} has {have:,} sequences, but the epochs of data.blend end after "
            f"{wanted:,}; nearest: train.steps={-(-wanted // size)}, or a weight instead of epochs for one part"
        )
    filled, before = [], 0
    for (quota,) in quotas:
        ends = [(end * have + wanted // 2) // wanted for end in (before, before + quota)]
        filled.append([ends[1] - ends[0]])
        before += quota
    return filled
