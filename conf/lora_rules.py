"""The rules of low-rank adapters."""

from collections.abc import Iterator

from conf.config_view import ConfigView, Violation, divisible, format_value
from conf.lora_layers import adapted_layers


def lora_rules(cfg: ConfigView) -> Iterator[Violation]:
    """What lora.rank does not go together with. lora.target is checked once the model's own settings are valid."""
    if cfg["lora.rank"] is None:
        return
    if cfg["optim.frozen"]:
        yield Violation(
            "lora.rank freezes every weight of the model, and trains the adapters: optim.frozen must be empty",
            f"it is {format_value(cfg['optim.frozen'])}; lora.target chooses what is trained",
            {"optim.frozen": [[]], "lora.rank": [None]},
        )
    if cfg["optim.name"] == "muon":
        yield Violation(
            "lora.rank needs an optimizer of single elements: Muon would orthogonalize the factors A and B, not the "
            "update B A of a weight",
            "optim.name is muon",
            {"optim.name": ["adamw"], "lora.rank": [None]},
        )
    if cfg["model.reward_head"]:
        yield Violation(
            "lora.rank trains adapters alone: model.reward_head is new, and would stay random",
            "it is true",
            {"lora.rank": [None]},
        )
    kept = [name for name in cfg["checkpoint.load_except"] if not name.startswith("model.")]
    if kept != cfg["checkpoint.load_except"]:
        yield Violation(
            "lora.rank needs the model of checkpoint.load as it is: no setting of the model in checkpoint.load_except",
            f"it is {format_value(cfg['checkpoint.load_except'])}, and frozen weights that are new would stay random",
            {"checkpoint.load_except": [kept], "lora.rank": [None]},
        )
    if cfg["model.moe.bias_update_rate"]:
        yield Violation(
            "lora.rank needs model.moe.bias_update_rate=0: a balancing bias that changes is no part of the adapters",
            f"it is {cfg['model.moe.bias_update_rate']:g}",
            {"model.moe.bias_update_rate": [0.0], "lora.rank": [None]},
        )
    if cfg["lora.dora"] and cfg["lora.dropout"]:
        yield Violation(
            "lora.dora needs lora.dropout=0: the product with W would have to be computed a second time, of the inputs "
            "that are left",
            f"it is {cfg['lora.dropout']:g}",
            {"lora.dropout": [0.0], "lora.dora": [False]},
        )
    if cfg["parallel.etp"] > 1 and cfg["model.moe.num_experts"]:
        # The factors that every expert-tensor-parallel rank needs whole are stored sharded over the hidden size.
        yield from divisible(cfg, "model.hidden_size", "parallel.etp")


def check_targets(cfg: ConfigView) -> Iterator[Violation]:
    """Violations of lora.target and of the rank, as `conf.lora_layers.adapted_layers` finds them."""
    config = cfg.config
    try:
        adapted_layers(config.model, config.lora)
    except ValueError as error:
        rule, _, actual = str(error).partition(", but ")
        yield Violation(rule, actual)
