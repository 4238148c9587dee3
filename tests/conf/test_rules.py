"""The rules of a configuration: each with an invalid configuration written by hand, and every suggestion applied."""

import math
import re
from typing import get_args

import pytest

from conf.config_view import ConfigView
from conf.limits import BOUNDS, CONDITIONS
from conf.rules import check
from conf.schema import BlendPart, Config
from launch.settings import setting_types

FURTHER = ", each with further changes"
SPARSE = {"model.moe.num_experts": 8}
EXPERT_CHOICE = {"model.moe.load_balancing": "expert_choice", "eval.sample_tokens": 0, **SPARSE}


def view(changes: dict, world_size: int = 1) -> ConfigView:
    """The default configuration with some settings changed."""
    result = ConfigView(Config(), world_size)
    for key, value in changes.items():
        result = result.replace(key, value)
    return result


def error_message(cfg: ConfigView) -> str:
    """The message of check; empty if the configuration is valid."""
    try:
        check(cfg.config, cfg.world_size)
    except ValueError as error:
        return str(error)
    return ""


def suggestions(line: str) -> list[tuple[str, object]]:
    """The suggestions in one line of a message, as (key, value)."""
    found: list[tuple[str, object]] = []
    for text in line.partition("; nearest: ")[2].removesuffix(FURTHER).split(" or "):
        if ranks := re.match(r"(\d+) ranks", text):
            found.append(("world_size", int(ranks[1])))
        elif "=" in text:
            key, _, value = text.partition("=")
            found.append((key, parsed(value)))
    return found


def parsed(value: str) -> object:
    if value.startswith("["):
        return [parsed(part) for part in value[1:-1].split(",")] if len(value) > 2 else []
    if value in ("null", "true", "false"):
        return {"null": None, "true": True, "false": False}[value]
    try:
        return int(value)
    except ValueError:
        try:
            return float(value)
        except ValueError:
            return value


FP8 = {"precision": "fp8"}
CHAT = {"data.kind": "chat", "data.files": ["a.jsonl"], "data.document_mask": True}

# settings, world size, and what the message must contain: the actual values and the suggestion
BROKEN = [
    ({"precision": "fp16"}, 1, "precision is one of auto, fp32, bf16, fp8, but fp16", "precision=bf16"),
    ({"checkpoint.resume": "frsh"}, 1, "checkpoint.resume is one of true, false, fresh", "checkpoint.resume=fresh"),
    ({**FP8, "fp8.recipe": "rowise"}, 1, "blockwise, rowwise, tensorwise", "fp8.recipe=rowwise"),
    ({**FP8, "fp8.last_layers_high": 4}, 1, "< model.num_layers (else no layer", "fp8.last_layers_high=3"),
    ({**FP8, "model.hidden_size": 192}, 1, "192 % 128 = 64", "model.hidden_size=128"),
    ({**FP8, "model.ffn_hidden_size": 384, "parallel.tp": 2}, 2, "384 % 256 = 128", "parallel.tp=1"),
    ({**FP8, "model.num_query_groups": 1, "parallel.tp": 1, "model.num_attention_heads": 8}, 1, "64 % 128", "bf16"),
    ({**FP8, "fp8.linear_layers": False, "model.moe.num_experts": 0}, 1, "else no layer", "fp8.linear_layers=true"),
    (
        {**FP8, **SPARSE, "model.moe.every": 4, "fp8.linear_layers": False, "fp8.last_layers_high": 1},
        1,
        "no layer in FP8 has experts",
        "fp8.linear_layers=true",
    ),
    ({"fp8.linear_layers": False}, 1, "fp8.linear_layers needs precision=fp8", "fp8.linear_layers=true"),
    ({"fp8.recipe": "rowwise"}, 1, "fp8.recipe needs precision=fp8", "fp8.recipe=blockwise"),
    ({**FP8, **SPARSE, "model.moe.backend": "loop"}, 1, "needs a layer in bf16", "model.moe.backend=auto"),
    ({"precision": "fp31"}, 1, "fp31 is not available", "precision=fp32"),
    ({"model.activation": "swigul"}, 1, "one of swiglu, geglu, gelu, relu", "model.activation=swiglu"),
    (
        {"model.recompute": ["norms"]},
        1,
        "contains only norm, activation, moe, full, but it is [norms]",
        "model.recompute=[norm]",
    ),
    ({"model.recompute": ["norm", "full"]}, 1, "[full] excludes all others", "model.recompute=[full]"),
    ({"model.recompute": ["norm", "moe"]}, 1, "the model is dense", "model.recompute=[norm]"),
    ({"model.moe.backend": "triton_fp8", **SPARSE}, 1, "precision=fp8 fp8.kernels=triton", "model.moe.backend=auto"),
    ({"model.moe.backend": "groupedmm", **SPARSE}, 1, "groupedmm is not available", "model.moe.backend=grouped_mm"),
    ({"data.kind": "stdlb"}, 1, "stdlib, text, megatron, blend", "data.kind=stdlib"),
    ({"optim.schedule": "cosin"}, 1, "cosine, linear, wsd, constant", "optim.schedule=cosine"),
    ({"run.name": "../../x"}, 1, "run.name is a name: no /", "run.name=.._.._x"),
    ({"run.name": "a\x1b[2J\nb"}, 1, "no control characters", "run.name=a_[2J_b"),
    ({"run.name": ".."}, 1, "not a path, but it is ..", "run.name=null"),
    ({"model.name": "a/b"}, 1, "model.name is a name", "model.name=a_b"),
    ({"train.steps": 0}, 1, "train.steps >= 1, but it is 0", "train.steps=1"),
    ({"train.stop_after": 0}, 1, "train.stop_after >= 1, but it is 0", "train.stop_after=1"),
    ({"checkpoint.keep": 0}, 1, "checkpoint.keep >= 1, but it is 0", "checkpoint.keep=1"),
    (
        {"checkpoint.asynchronous": True, "checkpoint.every": 0},
        1,
        "asynchronous needs checkpoint.every > 0",
        "checkpoint.asynchronous=false",
    ),
    ({"optim.warmup_steps": -1}, 1, "optim.warmup_steps >= 0, but it is -1", "optim.warmup_steps=0"),
    ({"optim.lr": math.nan}, 1, "optim.lr > 0, but it is nan", "optim.lr=0.002"),
    ({"optim.eps": 0.0}, 1, "optim.eps > 0, but it is 0.0", "optim.eps=1e-08"),
    ({"runtime.timeout": math.inf}, 1, "runtime.timeout > 0, but it is inf", "runtime.timeout=600.0"),
    ({"optim.beta2": 1.0}, 1, "optim.beta2 >= 0 and < 1, but it is 1.0", "optim.beta2=0.95"),
    ({"data.valid_fraction": 0.0}, 1, "data.valid_fraction > 0 and < 1", "data.valid_fraction=0.02"),
    ({"optim.schedule": "wsd", "optim.decay_fraction": 1.1}, 1, "> 0 and <= 1, but it is 1.1", "decay_fraction=0.2"),
    ({"model.moe.capacity_factor": 0.0, **SPARSE}, 1, "capacity_factor > 0", "model.moe.capacity_factor=1.25"),
    ({"model.moe.top_k": 9, **SPARSE}, 1, "9 > 8", "model.moe.top_k=8"),
    ({"model.moe.renormalize": True, **SPARSE}, 1, "no gradient", "model.moe.renormalize=null or model.moe.top_k=2"),
    ({"model.moe.score_function": "sigmoidal", **SPARSE}, 1, "softmax, sigmoid", "model.moe.score_function=sigmoid"),
    ({"model.moe.softmax_order": "befor", **SPARSE}, 1, "before, after", "model.moe.softmax_order=before"),
    (
        {"model.moe.softmax_order": "after", **SPARSE},
        1,
        "constant 1",
        "model.moe.softmax_order=before or model.moe.top_k=2",
    ),
    (
        {"model.moe.softmax_order": "after", "model.moe.top_k": 2, "model.moe.renormalize": False, **SPARSE},
        1,
        "model.moe.renormalize needs model.moe.softmax_order=before",
        "model.moe.renormalize=null",
    ),
    (
        {"model.moe.score_function": "sigmoid", "model.moe.top_k": 2, "model.moe.softmax_order": "after", **SPARSE},
        1,
        "softmax_order needs model.moe.score_function=softmax",
        "model.moe.softmax_order=before",
    ),
    ({"model.moe.load_balancing": "aux", **SPARSE}, 1, "aux_loss, seq_aux_loss, global", "load_balancing=aux_loss"),
    (
        {"model.moe.load_balancing": "global", **SPARSE},
        1,
        "global is not available",
        "model.moe.load_balancing=global_aux_loss",
    ),
    (
        {**EXPERT_CHOICE, "model.moe.dispatcher": "all_gather", "parallel.ep": 2},
        2,
        "differs between ranks",
        "model.moe.dispatcher=auto",
    ),
    ({"model.moe.dispatcher": "all_gather", **SPARSE}, 1, "needs parallel.ep > 1", "model.moe.dispatcher=auto"),
    ({"model.moe.dispatcher": "deepep", **SPARSE, "parallel.ep": 2}, 2, "not available", "dispatcher=deep_ep"),
    (
        {"model.moe.pad_to_capacity": True, "model.moe.capacity_factor": None, **SPARSE},
        1,
        "model.moe.pad_to_capacity needs",
        "model.moe.pad_to_capacity=false",
    ),
    ({"model.moe.shared_expert_gate": True, **SPARSE}, 1, "num_shared_experts > 0", "shared_expert_gate=false"),
    ({"model.moe.num_shared_experts": 2}, 1, "model.moe.num_experts > 0", "model.moe.num_shared_experts=0"),
    ({"model.moe.num_shared_experts": -1, **SPARSE}, 1, ">= 0, but it is -1", "model.moe.num_shared_experts=0"),
    ({"model.moe.expert_dropout": 1.0, **SPARSE}, 1, ">= 0 and < 1, but it is 1.0", "model.moe.expert_dropout=0.0"),
    ({"model.moe.expert_chunk_rows": 0, **SPARSE}, 1, ">= 1, but it is 0", "model.moe.expert_chunk_rows=1"),
    (
        {"model.moe.expert_bias": True, **SPARSE, "model.hidden_size": 260, "model.num_attention_heads": 2}
        | {"parallel.etp": 8},
        8,
        "model.hidden_size % parallel.etp == 0, but 260 % 8 = 4",
        "parallel.etp=4",
    ),
    ({**EXPERT_CHOICE, "eval.sample_tokens": 96}, 1, "it is 96: experts select among all", "eval.sample_tokens=0 or"),
    (
        {**EXPERT_CHOICE, "model.moe.capacity_factor": None},
        1,
        "how many tokens each expert selects",
        "capacity_factor=1.25 or",
    ),
    ({**EXPERT_CHOICE, "model.moe.drop_policy": "random"}, 1, "load_balancing other than expert_choice", "=position"),
    (
        {**EXPERT_CHOICE, "model.moe.top_k": 2, "model.moe.renormalize": True},
        1,
        "renormalize needs",
        "renormalize=null",
    ),
    ({**EXPERT_CHOICE, "model.moe.eval_capacity_factor": 1.0}, 1, "eval_capacity_factor needs", "factor=2.0"),
    (
        {"checkpoint.load": "x", "checkpoint.load_except": ["model.moe.topk", "model.num_layers"]},
        1,
        "there is no model.moe.topk",
        "checkpoint.load_except=[model.moe.top_k,model.num_layers]",
    ),
    ({"checkpoint.load_except": ["model.num_layers"]}, 1, "load_except needs checkpoint.load", "load_except=[]"),
    ({**EXPERT_CHOICE, "model.moe.bias_update_rate": 0.1}, 1, "bias_update_rate needs", "bias_update_rate=null"),
    (
        {"model.moe.load_balancing": "sinkhorn", "model.moe.aux_loss_coeff": 0.1, **SPARSE},
        1,
        "model.moe.aux_loss_coeff needs model.moe.load_balancing=aux_loss, seq_aux_loss or global_aux_loss",
        "model.moe.aux_loss_coeff=0.01",
    ),
    (
        {"model.moe.load_balancing": "sinkhorn", "model.moe.num_expert_groups": 2, **SPARSE},
        1,
        "num_expert_groups needs model.moe.load_balancing=aux_loss, seq_aux_loss or global_aux_loss",
        "model.moe.num_expert_groups=1",
    ),
    ({"model.moe.jitter": 1.0, **SPARSE}, 1, "jitter >= 0 and < 1, but it is 1.0", "model.moe.jitter=0.0"),
    ({"model.moe.jitter": -0.1, **SPARSE}, 1, "jitter >= 0 and < 1, but it is -0.1", "model.moe.jitter=0.0"),
    ({"model.moe.jitter": 0.1}, 1, "model.moe.jitter needs model.moe.num_experts > 0", "model.moe.jitter=0.0"),
    ({"model.moe.drop_policy": "probs", **SPARSE}, 1, "position, probability", "model.moe.drop_policy=probability"),
    (
        {
            "model.moe.drop_policy": "probability",
            "model.moe.capacity_factor": None,
            "model.moe.eval_capacity_factor": None,
            **SPARSE,
        },
        1,
        "drop_policy needs model.moe.num_experts > 0 and a capacity factor",
        "model.moe.drop_policy=position",
    ),
    ({"model.moe.routed_scaling_factor": 0.0, **SPARSE}, 1, "routed_scaling_factor > 0", "routed_scaling_factor=1.0"),
    ({"model.moe.top_k_groups": 2, **SPARSE}, 1, "needs model.moe.num_expert_groups > 1", "top_k_groups=1"),
    ({"model.moe.group_score": "max", **SPARSE}, 1, "needs model.moe.num_expert_groups > 1", "group_score=top2"),
    ({"model.moe.num_expert_groups": 3, **SPARSE}, 1, "8 % 3 = 2", "num_expert_groups=2 or model.moe.num_experts=9"),
    ({"model.moe.num_expert_groups": 8, **SPARSE}, 1, "8 / 8 = 1", "num_expert_groups=4 or model.moe.num_experts=16"),
    (
        {"model.moe.num_expert_groups": 4, "model.moe.top_k_groups": 4, **SPARSE},
        1,
        "4 >= 4",
        "model.moe.top_k_groups=3",
    ),
    (
        {"model.moe.num_expert_groups": 4, "model.moe.top_k": 3, **SPARSE},
        1,
        "3 > 1 * 2",
        "model.moe.top_k=2 or model.moe.top_k_groups=2",
    ),
    ({"model.moe.every": 5, **SPARSE}, 1, "model.moe.every <= model.num_layers, but 5 > 4", "model.moe.every=4"),
    ({"model.hidden_size": 250}, 1, "250 % 4 = 2", "model.num_attention_heads=5 or model.hidden_size=248"),
    ({"model.hidden_size": 252, "model.num_attention_heads": 84}, 1, "252 / 84 = 3", "num_attention_heads=63"),
    ({"model.num_query_groups": 3}, 1, "4 % 3 = 1", "model.num_query_groups=2"),
    (
        {"parallel.tp": 3},
        3,
        "model.num_attention_heads % parallel.tp == 0, but 4 % 3 = 1",
        "parallel.tp=2 or model.num_attention_heads=3, each with further changes",
    ),
    ({"parallel.tp": 2, "model.num_query_groups": 1}, 2, "1 % 2 = 1", "parallel.tp=1 or model.num_query_groups=2"),
    ({"parallel.tp": 4, "model.ffn_hidden_size": 510}, 4, "510 % 4 = 2", "model.ffn_hidden_size=508"),
    ({"parallel.tp": 4, "model.vocab_size": 50257}, 4, "50257 % 4 = 1", "model.vocab_size=50256"),
    ({"parallel.ep": 3, **SPARSE}, 6, "model.moe.num_experts % parallel.ep == 0, but 8 % 3 = 2", "parallel.ep=2"),
    ({"parallel.etp": 3, **SPARSE}, 3, "512 % 3 = 2", "parallel.etp=1"),
    ({"parallel.tp": 2}, 1, "1 % 2 = 1", "parallel.tp=1 or 2 ranks"),
    ({"parallel.tp": 4, "train.global_batch_size": 48}, 6, "6 % 4 = 2", "parallel.tp=2 or 4 ranks"),
    ({"parallel.ep": 4, **SPARSE}, 2, "2 % 4 = 2", "parallel.ep=2 or 4 ranks"),
    ({"parallel.pp": 3}, 3, "model.num_layers % parallel.pp == 0, but 4 % 3 = 1", "parallel.pp_layers=[2,1,1]"),
    (
        {"parallel.pp": 16, "model.num_layers": 61, "train.global_batch_size": 64},
        16,
        "61 % 16 = 13",
        "nearest: parallel.pp_layers=[4,4,4,4,4,4,4,4,4,4,4,4,4,3,3,3] or parallel.pp=1",
    ),
    ({"parallel.pp": 2, "parallel.vpp": 3}, 2, "4 % 6 = 4", "parallel.vpp=2 or model.num_layers=6"),
    ({"parallel.pp": 2, "parallel.vpp": 1}, 2, "parallel.vpp >= 2, but it is 1", "parallel.vpp=2"),
    ({"parallel.vpp": 2}, 1, "parallel.vpp needs parallel.pp > 1", "parallel.vpp=null"),
    (
        {"parallel.pp": 2, "parallel.vpp": 2, "train.global_batch_size": 12},
        2,
        "12 / (4 * 1) = 3 and 3 % 2 = 1",
        "train.global_batch_size=8 or train.micro_batch_size=3",
    ),
    ({"parallel.pp_layers": [2, 2]}, 1, "pp_layers needs parallel.pp > 1", "parallel.pp_layers=null"),
    ({"parallel.pp": 2, "parallel.pp_layers": [1, 2]}, 2, "1 + 2 = 3 != 4", "pp_layers=[2,2] or model.num_layers=3"),
    ({"parallel.pp": 2, "parallel.pp_layers": [0, 4]}, 2, "it is [0,4]", "parallel.pp_layers=[2,2]"),
    (
        {"parallel.pp": 2, "parallel.vpp": 2, "parallel.pp_layers": [2, 2]},
        2,
        "parallel.pp_layers has parallel.pp * parallel.vpp elements, but 2 != 4",
        "parallel.pp_layers=[1,1,1,1]",
    ),
    ({"train.global_batch_size": 30}, 2, "30 % (4 * 2) = 6", "train.global_batch_size=32"),
    ({"parallel.cp": 2, "train.sequence_length": 254}, 2, "254 % 4 = 2", "parallel.cp=1 or train.sequence_length=252"),
    ({"parallel.sequence_parallel": True}, 1, "sequence_parallel needs parallel.tp > 1", "sequence_parallel=false"),
    (
        {"parallel.tp": 2, "parallel.sequence_parallel": True, "train.sequence_length": 33},
        2,
        "train.sequence_length % (parallel.cp * parallel.tp) == 0, but 33 % 2 = 1",
        "train.sequence_length=32",
    ),
    ({"parallel.tp": 2, "train.sequence_length": 33, **SPARSE}, 2, "33 % 2 = 1", "train.sequence_length=32"),
    ({"parallel.overlap_grad_reduce": True, "parallel.tp": 2}, 2, "needs data parallelism", "overlap_grad_reduce=null"),
    (
        {"parallel.overlap_param_gather": True, "parallel.overlap_grad_reduce": False},
        2,
        "needs parallel.overlap_grad_reduce=true (both use the same buckets), but it is false",
        "parallel.overlap_grad_reduce=true or parallel.overlap_param_gather=null",
    ),
    ({"parallel.ep": 2}, 2, "parallel.ep needs model.moe.num_experts > 0", "parallel.ep=1"),
    ({"model.moe.top_k": 2}, 1, "model.moe.top_k needs model.moe.num_experts > 0", "model.moe.top_k=1"),
    ({"optim.grad_dtype": "bf16", "precision": "fp32"}, 1, "needs parameters in bf16", "optim.grad_dtype=fp32"),
    ({"optim.state_dtype": "fp16"}, 1, "optim.state_dtype is one of fp32, bf16, but fp16", "optim.state_dtype=bf16"),
    ({"optim.grad_dtype": "float32"}, 1, "optim.grad_dtype is one of fp32, bf16", "optim.grad_dtype=fp32"),
    ({"optim.min_lr": 0.01}, 1, "0.01 > 0.002", "optim.min_lr=null or optim.lr=0.01"),
    ({"train.stop_after": 500}, 1, "500 > 200", "train.stop_after=200 or train.steps=500"),
    ({"train.profile": [9, 5]}, 1, "1 <= a <= b <= 200", "train.profile=[5,9]"),
    ({"train.profile": [3]}, 1, "it is [3]", "train.profile=[1,3]"),
    ({"train.profile": [3, 8], "train.stop_after": 5}, 1, "b <= 5", "train.profile=[3,5]"),
    ({"data.kind": "text"}, 1, "data=text needs data.files", "data.kind=stdlib"),
    ({"data.files": ["a.txt"]}, 1, "data.files needs data=text, megatron, chat or preference", "data.files=[]"),
    ({"data.too_long": "drop"}, 1, "data.too_long needs data=chat", "data.too_long=truncate"),
    ({**CHAT, "data.text_key": "x"}, 1, "data.text_key needs data=text or data=blend", "data.text_key=text"),
    ({**CHAT, "data.document_mask": False}, 1, "needs data.document_mask=true", "data.document_mask=true"),
    ({**CHAT, "data.too_long": "cut"}, 1, "data.too_long is one of truncate, drop", "data.too_long=truncate"),
    ({"data.valid_files": ["a.txt"]}, 1, "data.valid_files needs data other than stdlib", "data.valid_files=[]"),
]


def assert_violation_has_a_suggestion_that_works(changes, world_size, numbers, suggestion):
    broken = view(changes, world_size)
    message = error_message(broken)
    lines = [line for line in message.splitlines() if numbers in line and suggestion in line]
    assert len(lines) == 1, message
    others = len(message.splitlines()) > 1
    for key, value in suggestions(lines[0]):
        left = error_message(broken.replace(key, value))
        assert lines[0].strip().split(", but ")[0] not in left
        assert others or not left


@pytest.mark.parametrize(("changes", "world_size", "numbers", "suggestion"), BROKEN, ids=lambda value: str(value)[:60])
def test_violation_has_a_suggestion_that_works(changes, world_size, numbers, suggestion):
    assert_violation_has_a_suggestion_that_works(changes, world_size, numbers, suggestion)


def test_a_nearer_value_would_not_have_worked():
    broken = view({"parallel.tp": 4, "model.vocab_size": 50257}, 4)
    suggested = dict(suggestions(error_message(broken)))["model.vocab_size"]
    distance = abs(suggested - 50257)
    assert distance == 1
    assert all(error_message(broken.replace("model.vocab_size", 50257 + d)) for d in range(-distance + 1, distance))


def test_all_violations_in_one_message():
    broken = view({"train.steps": 0, "model.activation": "silu", "model.hidden_size": 255, "optim.eps": -1.0})
    message = error_message(broken)
    assert message.startswith("4 rules are violated:\n")
    assert all(key in message for key in ("train.steps", "model.activation", "255 % 4 = 3", "optim.eps"))


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([], "data=blend needs data.blend"),
        ([BlendPart(weight=0.0, kind="stdlib")], "data.blend[0].weight > 0, but it is 0"),
        ([BlendPart(kind="stdlib"), BlendPart(kind="txt", files=["a"])], "data.blend[1].kind is one of stdlib, text"),
        ([BlendPart(kind="blend")], "data.blend[0].kind is one of"),
        ([BlendPart(kind="chat", files=["a.jsonl"])], "nearest: data=chat in a run of its own, with checkpoint.load"),
        ([BlendPart(kind="megatron")], "data.blend[0].files is needed"),
        ([BlendPart(kind="stdlib", files=["a"])], "data.blend[0].files has an effect only"),
    ],
)
def test_blend_parts(parts, expected):
    assert expected in error_message(view({"data.kind": "blend", "data.blend": parts}))


def test_good_blend_passes():
    parts = [BlendPart(kind="stdlib"), BlendPart(weight=2, kind="text", files=["a.txt"])]
    assert error_message(view({"data.kind": "blend", "data.blend": parts})) == ""


@pytest.mark.parametrize(
    "changes",
    [
        {"optim.warmup_steps": 1000},  # may exceed the steps
        {"optim.schedule": "constant", "optim.lr": 1e-4},  # min_lr is not used
        EXPERT_CHOICE,
        {"model.moe.every": 2},  # the dense twin of a sparse preset
        {"model.moe.capacity_factor": None, "model.moe.top_k": 2, "model.moe.renormalize": True, **SPARSE},
        {"model.hidden_size": 250, "model.head_dim": 64},
        {"train.profile": [200, 200], "train.stop_after": 200},
        {"data.kind": "text", "data.files": ["a.txt"], "data.valid_files": ["b.txt"]},
        {"model.num_layers": 5, "parallel.pp": 2, "parallel.pp_layers": [2, 3]},
    ],
)
def test_unusual_but_valid(changes):
    assert error_message(view(changes, changes.get("parallel.pp", 1))) == ""


def test_conditions_name_existing_settings():
    assert {key for *_, keys in CONDITIONS for key in keys.split()} <= set(setting_types(Config))


def test_every_number_has_bounds():
    numbers = {key for key, hint in setting_types(Config).items() if {int, float} & {hint, *get_args(hint)}}
    lists = {"train.profile", "parallel.pp_layers", "model.rope_scaling.short_factor", "model.rope_scaling.long_factor"}
    assert BOUNDS.keys() == {*numbers - lists, "world_size"}
