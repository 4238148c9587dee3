"""Rows of `launch.check`: what a run on GPUs would use of TransformerEngine and Apex, when, and why not."""

from conf.schema import Config
from conf.te_rules import te_parts
from parallel.block_adamw import is_needed

TE, APEX = "TransformerEngine", "Apex"
SHOWN_AT_START = "which the start of the run shows"


def package_rows(config: Config, *, bf16: bool) -> list[tuple[str, str, str]]:
    """(package, what it would compute, when or why not). Nothing on a CPU, unless the package was asked for."""
    asked = config.precision == "fp8" and config.fp8.kernels == "te"
    if not (config.cluster.gpus or asked):
        return []
    return [_te_row(config, asked=asked, bf16=bf16), *_te_candidates(config, bf16=bf16), _apex_row(config)]


def _te_row(config: Config, *, asked: bool, bf16: bool) -> tuple[str, str, str]:
    """What it computes where it is installed."""
    parts, wanted = te_parts(config), config.model.transformer_impl
    setting = f"(model.transformer_impl={wanted})"
    if asked:
        recipe = f"FP8 products ({config.fp8.recipe})"
        why = f"has to be installed and to have the recipe for these GPUs, {SHOWN_AT_START}"
        return TE, ", ".join([recipe, *parts]), f"{why}; in training, evaluation is in bf16 (fp8.kernels=te)"
    if wanted == "local":
        return TE, "nothing", f"turned off {setting}"
    if not bf16:
        return TE, "nothing", f"its layers compute in bf16, and precision is fp32 {setting}"
    why = f"where it is installed and computes the same, {SHOWN_AT_START}"
    return TE, ", ".join(parts), f"{'has to be installed and compute the same' if wanted != 'auto' else why} {setting}"


def _te_candidates(config: Config, *, bf16: bool) -> list[tuple[str, str, str]]:
    """What it is one of several candidates for."""
    moe = config.model.moe
    if config.model.transformer_impl == "local":
        return []
    firsts = [] if is_needed(config.optim) else ["optimizer"]
    others = ["norm"] if bf16 and _has_rms_norm(config) else []
    others += ["router", "permutation"] if bf16 and moe.num_experts else []
    why = [f"{', '.join(firsts)}: before Apex's and torch's"] if firsts else []
    why += [f"{', '.join(others)}: where Triton's is left out"] if others else []
    if bf16 and config.precision != "fp8" and moe.num_experts and moe.backend in ("auto", "te"):
        others.append("experts")
        when = "if it is the fastest at the start" if moe.backend == "auto" else "asked for"
        why.append(f"experts: {when} (model.moe.backend={moe.backend})")
    return [(f"{TE}, candidate", ", ".join([*firsts, *others]), "; ".join(why))] if why else []


def _apex_row(config: Config) -> tuple[str, str, str]:
    """What it computes where it is installed, and the others' are not."""
    te = [] if config.model.transformer_impl == "local" else [TE]
    parts = {"weight gradients": "of Megatron-Core's linear layers"}
    why_not: list[str] = []
    if is_needed(config.optim):
        why_not.append("the optimizer, which has settings that Apex's lacks")
    else:
        parts["optimizer"] = f"where {te[0]}'s is left out" if te else "before torch's"
    if _has_rms_norm(config):
        parts["norm"] = f"where those of {' and '.join(['Triton', *te])} are left out"
    else:
        why_not.append("the norm, which is no RMSNorm")
    why = "; ".join([*(f"{part}: {when}" for part, when in parts.items()), *(f"not for {what}" for what in why_not)])
    return APEX, ", ".join(parts), f"where it is installed and computes the same; {why}"


def _has_rms_norm(config: Config) -> bool:
    model = config.model
    return model.norm == "rmsnorm" or (model.qk_norm or model.kv_lora_rank) is not None
