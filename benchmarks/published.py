"""`python -m benchmarks.published`: what `launch.plan` predicts beside published training steps of other trainers, time
of a step and peak memory. Launches cost nothing here and rotary embeddings and activations are single kernels, since
these runs used TransformerEngine's fused layers or CUDA graphs; data-parallel communication is overlapped, as it was
there.

The rates are those of an H200 (conf/cluster/rates), measured before; nothing is fitted to the rows."""

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from conf.schema import Config
from parallel.layout import Layout
from training.flops import attention_span, model_cost
from training.memory_estimate import stage_memory, stages_of
from training.planner.rates import rates_of
from training.planner.step import predict

SOURCES = {
    "a": "Megatron-LM, tests/functional_tests/test_cases: golden_values_dev_dgx_h100.json beside model_config.yaml",
    "b": "Megatron-MoE-ModelZoo, best_practice/mixtral/run_mixtral_8x22B.sh, which states TFLOP/s a GPU",
    "c": "Megatron-Bridge, examples/model_verification_cards/*/card.yaml",
    "d": "Megatron-Bridge, skills/nemo-mbridge-perf-expert-parallel-overlap",
    "f": "Megatron-MoE-ModelZoo, best_practice/qwen3/readme.md",
    "g": "Megatron-Bridge, docs/performance-summary-archive.md, 26.04.01",
    "i": "Megatron-Bridge, skills/nemo-mbridge-perf-activation-recompute/SKILL.md",
}
SEQUENCE = 4096
DEEP_EP = "model.moe.dispatcher=deep_ep"
SMALL = ("optim.grad_dtype=bf16", DEEP_EP)
SMALLER = ("optim.grad_dtype=bf16", "optim.state_dtype=bf16", DEEP_EP)


def composed(overrides: list[str]) -> Config:
    """A configuration from overrides, as `launch.train` composes it."""
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_dir(str(Path("conf").resolve()), version_base=None):
        config = OmegaConf.to_object(compose("config", overrides))
    assert isinstance(config, Config)
    return config


@dataclass(frozen=True)
class Row:
    """A published step."""

    name: str
    source: str
    model: str
    ranks: int
    layout: str
    """tp/pp/vpp/cp/ep/etp."""
    micro_batch: int
    batch: int
    forced: bool
    """Whether the routing was forced to be balanced."""
    seconds: float | None
    peak_gb: float | None = None
    """1e9 bytes."""
    overrides: tuple[str, ...] = ()
    cluster: str = "h100"
    of_last_rank: bool = False
    """Whether memory is that of the last pipeline stage, with balanced experts."""
    why_missed: str = ""
    """Why the prediction is far off, where it is."""
    is_overlapped: bool = False
    """Whether the all-to-all was hidden behind another micro-batch's computation, which Switchyard does not do."""
    tflops: float | None = None
    """TFLOP/s a GPU as Megatron-LM counts them, where that was published in place of seconds."""

    def published_seconds(self) -> float | None:
        """Seconds of a step. Megatron-LM counts half of the products of attention that training/flops.py counts, since
        it is causal."""
        if self.tflops is None:
            return self.seconds
        model = self.configuration().model
        flops = model_cost(model, SEQUENCE).flops_per_token - 6 * attention_span(model, SEQUENCE) * model.query_width
        return flops * self.batch * SEQUENCE / (self.tflops * 1e12 * self.ranks)

    def configuration(self) -> Config:
        tp, pp, vpp, cp, ep, etp = (int(n) for n in self.layout.split("/"))
        degrees = {"tp": tp, "pp": pp, "cp": cp, "ep": ep, "etp": etp}
        words = [f"model={self.model}", f"cluster={self.cluster}", f"train.sequence_length={SEQUENCE}"]
        words += [f"train.micro_batch_size={self.micro_batch}", f"train.global_batch_size={self.batch}"]
        words += [f"parallel.{name}={size}" for name, size in degrees.items()]
        words += [f"parallel.vpp={vpp}"] if vpp > 1 else []
        words += ["parallel.sequence_parallel=true"] if tp > 1 else []
        return composed([*words, *self.overrides])


Q235_STAGES = "parallel.pp_layers=[" + ",".join(["3"] * 30 + ["2"] * 2) + "]"
NORM, FULL = "model.recompute=[norm,activation]", "model.recompute=[full]"
CHUNKS_96 = "parallel.pp_layout='E|(t|)*94L'"
Q235_H800 = ("qwen3_235b_a22b", 256)
MIXTRAL, QWEN, MOONLIGHT = "mixtral_8x7b", "qwen3_30b_a3b", "moonlight_16b_a3b"
EP16, EP32 = "1/1/1/1/16/1", "2/8/4/1/32/1"
STAGED = (NORM, Q235_STAGES, DEEP_EP)
FP8 = ("precision=fp8", Q235_STAGES, DEEP_EP)
# One layer more in place of multi-token prediction's.
D3_MTP = ("model.num_layers=62", "parallel.pp_layers=[" + ",".join(["2"] * 30 + ["1"] * 2) + "]", DEEP_EP)
D3_FP8 = ("precision=fp8", "parallel.pp_layers=[" + ",".join(["4"] * 13 + ["3"] * 3) + "]", DEEP_EP)
LAST, HIDDEN = {"of_last_rank": True}, {"is_overlapped": True}
LARGE = ("model.vocab_size=256000",)
M22 = "mixtral_8x22b"
M22_RUN = (M22, 128, "2/4/7/1/8/1", 1, 256)


ROWS = [
    Row("1 Mixtral 8x7B, 256k words", "a", MIXTRAL, 128, "2/4/1/1/4/2", 1, 1024, False, 8.961, 25.4, LARGE, **LAST),
    Row("2 Mixtral 8x7B, interleaved", "a", MIXTRAL, 64, "2/4/8/1/8/1", 1, 256, False, 3.303, 35.5, **LAST),
    Row("3 Mixtral 8x22B", "a", M22, 128, "2/8/1/1/8/2", 1, 256, False, 6.914, 28.5, **LAST),
    Row(
        "5 Mixtral 8x22B, interleaved",
        "b",
        *M22_RUN,
        False,
        None,
        tflops=445,
    ),
    Row("5 Mixtral 8x22B, forced", "b", *M22_RUN, True, None, tflops=465),
    Row(
        "5 Mixtral 8x22B, FP8",
        "b",
        *M22_RUN,
        True,
        None,
        overrides=("precision=fp8",),
        tflops=560,
    ),
    Row("6 Qwen3 30B-A3B, all-to-all hidden", "c", QWEN, 16, EP16, 1, 1024, True, 20.147, 66.76, SMALL, **HIDDEN),
    Row("7 Qwen3 30B-A3B", "c", QWEN, 16, EP16, 1, 1024, False, 30.290, None, SMALL),
    Row("8 Qwen3 30B-A3B, forced", "d", QWEN, 16, EP16, 1, 1024, True, 24.71, None, SMALL),
    Row("8 Qwen3 30B-A3B, hidden", "d", QWEN, 16, EP16, 1, 1024, True, 20.99, None, SMALL, **HIDDEN),
    Row(
        "10 Qwen3 235B-A22B, hidden",
        "f",
        "qwen3_235b_a22b",
        256,
        EP32,
        1,
        2048,
        True,
        17.6,
        None,
        STAGED,
        **HIDDEN,
    ),
    Row("10 Qwen3 235B-A22B", "f", "qwen3_235b_a22b", 256, EP32, 1, 2048, True, 19.7, None, STAGED),
    Row(
        "18 Moonlight 16B-A3B, one micro-batch",
        "i",
        MOONLIGHT,
        8,
        "2/1/1/1/8/1",
        1,
        4,
        True,
        0.4572,
        36.618,
        SMALLER,
        why_missed="bound by launches, which cost nothing here",
    ),
    Row(
        "19 Moonlight 16B-A3B",
        "c",
        MOONLIGHT,
        16,
        "1/1/1/1/8/1",
        2,
        1024,
        False,
        11.636,
        None,
        SMALLER,
    ),
    Row(
        "20 gpt-oss 120B",
        "c",
        "gpt_oss_120b",
        64,
        "2/4/1/1/16/1",
        1,
        512,
        False,
        16.66,
        None,
        (DEEP_EP,),
        why_missed="58 TFLOP/s a GPU: a check of the model, not of its speed",
    ),
    Row(
        "12 Qwen3 235B-A22B, 96 chunks", "h", *Q235_H800, "1/32/3/1/8/1", 4, 4096, True, 42.54, None, (FULL, CHUNKS_96)
    ),
    Row("12 Qwen3 235B-A22B, tp=2", "h", *Q235_H800, "2/32/3/1/8/1", 1, 2048, True, 22.42, None, (NORM, CHUNKS_96)),
    Row("11 Qwen3 235B-A22B, FP8", "g", "qwen3_235b_a22b", 256, EP32, 1, 8192, True, 76.6, None, FP8),
    Row("13 DeepSeek-V3", "c", "deepseek_v3", 1024, "2/8/4/1/64/1", 1, 16384, True, 61.756, None, D3_MTP),
    Row(
        "15 DeepSeek-V3, FP8",
        "g",
        "deepseek_v3",
        256,
        "1/8/2/1/32/1",
        1,
        4096,
        True,
        19.7,
        None,
        D3_FP8,
        "b200",
        why_missed="the all-to-all alone takes 16 s here: hidden or in FP8 there, which the source does not say",
    ),
]


REAL = 1.2
"""Rows of the fullest rank's experts relative to the mean, where the routing is real."""
COMMUNICATION_SHARE = 20 / 132
"""Share of a GPU's multiprocessors that a hidden all-to-all takes from the computation beside it: Megatron-Core's
default for DeepEP (transformer_config.py, moe_deepep_num_sms) of an H100's 132."""


def predicted(row: Row) -> tuple[float, float]:
    """(seconds of a step, peak of the tensors in bytes)."""
    config = row.configuration()
    layout = Layout.of(config.parallel, row.ranks)
    imbalance = 1.0 if row.forced else REAL
    got = predict(config, layout, rates_of(row.cluster), imbalance=imbalance, host=False, fused=True)
    hidden = 1 - COMMUNICATION_SHARE if row.is_overlapped else 0.0
    seconds = got.seconds - hidden * got.parts["all-to-all"]
    if not row.of_last_rank:
        return seconds, got.memory.total
    last = stages_of(config.model, layout)[-1]
    return seconds, stage_memory(config, layout, last, bf16=True, on_gpu=True).total


def main() -> int:
    errors: dict[str, list[float]] = {"time": [], "memory": []}
    head = ("step, s", "predicted", "error", "peak, GB", "predicted", "error")
    print(f"{'':<38} {'routing':<7} {head[0]:>9} {head[1]:>10} {head[2]:>6}   {head[3]:>8} {head[4]:>10} {head[5]:>6}")
    for row in ROWS:
        seconds, memory = predicted(row)
        cells = []
        for what, value, published in (
            ("time", seconds, row.published_seconds()),
            ("memory", memory / 1e9, row.peak_gb),
        ):
            if published is None:
                cells.append(" " * 27)
                continue
            error = value / published - 1
            errors[what].append(abs(error))
            cells.append(f"{published:>9.4g} {value:>10.4g} {error:>+6.0%}")
        print(f"{row.name:<38} {'forced' if row.forced else 'real':<7} {'  '.join(cells)}  {row.why_missed}".rstrip())
    print()
    for what, values in errors.items():
        bound = {"time": 0.2, "memory": 0.1}[what]
        near = sum(error <= bound for error in values)
        print(f"{what}: {near} of {len(values)} rows within {bound:.0%}, median error {statistics.median(values):.0%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
