"""Rules for training on preferences."""

from collections.abc import Iterator

from conf.config_view import ConfigView, Violation, divisors, format_value, multiples
from conf.preference_schema import sequences_per_prompt


def preference_rules(cfg: ConfigView) -> Iterator[Violation]:
    objective, kind, head = "train.objective", "data.kind", "model.reward_head"
    on_preferences = cfg[objective] != "language_modeling"
    if on_preferences and cfg[kind] != "preference":
        yield Violation(
            f"{objective}={cfg[objective]} needs data=preference data.files=[PATH,...]",
            f"data is {cfg[kind]}",
            {objective: ["language_modeling"]},
        )
    if cfg[kind] == "preference" and not on_preferences:
        yield Violation(
            f"data=preference needs {objective}=dpo or reward",
            f"it is {cfg[objective]}",
            {objective: ["reward" if cfg[head] else "dpo"]},
        )
    if (cfg[objective] == "reward") != cfg[head]:
        wanted = {head: [not cfg[head]], objective: ["dpo" if cfg[kind] == "preference" else "language_modeling"]}
        yield Violation(
            f"{objective}=reward goes with {head}=true (with checkpoint.load: checkpoint.load_except=[{head}])",
            f"{objective} is {cfg[objective]} and {head} is {format_value(cfg[head])}",
            wanted if cfg[objective] == "reward" else {objective: ["reward"], head: [False]},
        )
    if on_preferences:
        yield from _sequences(cfg)


def _sequences(cfg: ConfigView) -> Iterator[Violation]:
    objective, layers, sample = "train.objective", "model.mtp_num_layers", "eval.sample_tokens"
    if cfg[layers]:
        yield Violation(
            f"{objective}={cfg[objective]} needs {layers}=0 (no multi-token prediction)",
            f"it is {cfg[layers]}",
            {layers: [0]},
        )
    if cfg["model.reward_head"] and cfg[sample]:
        actual = f"it is {cfg[sample]}, and a reward model writes no text"
        yield Violation(f"model.reward_head needs {sample}=0", actual, {sample: [0]})
    micro, ranked = "train.micro_batch_size", "preference.max_responses"
    responses = sequences_per_prompt(cfg[objective], cfg.config.preference)
    if responses and cfg[micro] % responses:
        what = ranked if cfg[objective] == "reward" else "2"
        suggestions = {micro: multiples(cfg[micro], responses)}
        if cfg[objective] == "reward":
            suggestions[ranked] = [n for n in divisors(responses, cfg[micro]) if n > 1]
        yield Violation(
            f"{micro} % {what} == 0 (the responses to a prompt are in one micro-batch)",
            f"{cfg[micro]} % {responses} = {cfg[micro] % responses}",
            suggestions,
        )
