"""`python -m benchmarks.train_step`: compares training steps (forward, backward, clipping, AdamW) with Transformers'
Mixtral and Megatron-Core's GPTModel, on random tokens. All are bf16, dropless, top-2 SwiGLU. Switchyard and
Megatron-Core keep fp32 master weights and gradients; Transformers' weights and moments are bf16, which is less work.

Legend: B batch, S sequence.
"""

import argparse
import functools
import json
import os
from typing import Any

import torch
from torch import Tensor

from benchmarks.measurement import Implementation, Result, saved_bytes, table, version
from benchmarks.peers import megatron_config
from benchmarks.workers import AS_OURS, Measurements, alternate, start_workers, timed
from conf.schema import Config, ModelConfig, MoeConfig, OptimConfig, TrainConfig
from parallel.megatron_compat import name_missing_gemm

OURS, BALANCED, MEGATRON = "switchyard", "switchyard, balance forced", "megatron"
TRANSFORMERS = ("transformers eager", "transformers grouped_mm")
LR = 1e-4


def configuration(args: argparse.Namespace) -> Config:
    moe = MoeConfig(num_experts=8, top_k=2, capacity_factor=None, backend=args.backend)
    model = ModelConfig(
        num_layers=args.layers,
        hidden_size=args.hidden,
        num_attention_heads=args.heads,
        ffn_hidden_size=args.width,
        vocab_size=args.vocabulary,
        activation="swiglu",
        moe=moe,
    )
    train = TrainConfig(
        micro_batch_size=args.batch, global_batch_size=args.batch, sequence_length=args.sequence, steps=1
    )
    return Config(model=model, train=train, optim=OptimConfig(lr=LR), precision="bf16")


def ours(config: Config, tokens_BS: Tensor, labels_BS: Tensor) -> Implementation:
    """A training step with the same calls as training/trainer.py."""
    from parallel.env import World
    from training import builder

    return implementation(builder.start(config, World(), train=True).engine, tokens_BS, labels_BS)


def implementation(engine: Any, tokens_BS: Tensor, labels_BS: Tensor) -> Implementation:
    device = engine.runtime.device
    positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    batch = {"tokens": tokens_BS, "positions": positions_BS, "labels": labels_BS}
    batch = {name: t.to(device) for name, t in batch.items()}

    def step() -> None:
        engine.compute_gradients([batch], step=1)
        engine.update(LR)

    return Implementation(step, lambda: engine.modules[0](*batch.values()))


def megatron(config: Config, runtime: Any, tokens_BS: Tensor, labels_BS: Tensor) -> Implementation:
    """GPTModel with its local layers, with the same gradient buckets, distributed optimizer and schedule as ours."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from parallel.engine import Engine

    name_missing_gemm()
    model, core = config.model, megatron_config(config.model)

    def build(_: int) -> torch.nn.Module:
        gpt = GPTModel(
            core,
            get_gpt_layer_local_spec(num_experts=model.moe.num_experts, normalization="RMSNorm"),
            vocab_size=model.vocab_size,
            max_sequence_length=config.train.sequence_length,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
        )
        gpt.end_step = lambda applied: None  # it has no bias to move
        plain_forward = gpt.forward
        gpt.forward = lambda tokens, positions, labels, _=None: plain_forward(tokens, positions, hidden, labels=labels)
        return gpt.to(runtime.device)

    sequence = tokens_BS.shape[1]
    hidden = torch.ones(sequence, sequence, dtype=torch.bool, device=runtime.device).triu(1)[None, None]
    engine = Engine(core, runtime, config.optim, build)
    return implementation(engine, tokens_BS, labels_BS)


def transformers(
    config: Config, device: torch.device, implementation: str, tokens_BS: Tensor, labels_BS: Tensor
) -> Implementation:
    from transformers import MixtralConfig, MixtralForCausalLM

    model, optim = config.model, config.optim
    settings = MixtralConfig(
        num_hidden_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_attention_heads,
        intermediate_size=model.ffn_hidden_size,
        vocab_size=model.vocab_size,
        num_local_experts=model.moe.num_experts,
        num_experts_per_tok=model.moe.top_k,
        max_position_embeddings=config.train.sequence_length,
        output_router_logits=True,  # with the load-balancing loss
        router_aux_loss_coef=model.moe.aux_loss_coeff,
        use_cache=False,
    )
    with device:  # drawing billions of weights takes a CPU minutes
        net = MixtralForCausalLM._from_config(
            settings, dtype=torch.bfloat16, attn_implementation="sdpa", experts_implementation=implementation
        )
    net = net.train()
    adam = torch.optim.AdamW(net.parameters(), lr=LR, betas=(optim.beta1, optim.beta2), fused=True)
    tokens_BS, labels_BS = tokens_BS.to(device), labels_BS.to(device)

    def forward() -> Tensor:
        return net(input_ids=tokens_BS, labels=labels_BS, shift_labels=labels_BS).loss

    def step() -> None:
        adam.zero_grad(set_to_none=True)
        forward().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), optim.clip_grad)
        adam.step()

    return Implementation(step, forward)


def build(name: str, args: argparse.Namespace) -> Measurements:
    """Builds an implementation in the calling process."""
    from parallel import process_groups
    from parallel.env import World
    from parallel.layout import Layout

    config = configuration(args)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, args.vocabulary, (args.batch, args.sequence + 1), generator=generator)
    batch = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    if name in (OURS, BALANCED):
        config.model.moe.force_balance = name == BALANCED
        built = ours(config, *batch)
    elif name == MEGATRON:
        built = megatron(config, process_groups.start(World(), Layout(1), seed=1, timeout=60), *batch)
    else:
        built = transformers(config, process_groups.pick_device(World())[0], name.split()[1], *batch)
    return {"seconds": timed(built.step), "saved": lambda: saved_bytes(built.forward)}


def compare(args: argparse.Namespace) -> dict[str, Result]:
    """Results by implementation."""
    names = (OURS, BALANCED, MEGATRON, *(TRANSFORMERS if version("transformers") else ()))
    builds = {name: functools.partial(build, name, args) for name in names}
    with start_workers(builds, (OURS, BALANCED), peers_as_ours=args.peers_as_ours) as workers:
        seconds = alternate(workers, "seconds", args.repetitions)
        return {name: Result(seconds[name], worker.measure("saved")) for name, worker in workers.items()}


def summary(results: dict[str, Result], tokens: int) -> dict[str, object]:
    """Ratios of our tokens per second to those of the others (their fastest variant); null if not installed."""
    speed = {name: tokens / r.seconds for name, r in results.items()}

    def ratio(names: tuple[str, ...]) -> float | None:
        fastest = max((speed[n] for n in names if n in speed), default=None)
        return fastest and round(speed[OURS] / fastest, 3)

    return {
        "ratio_transformers": ratio(TRANSFORMERS),
        "ratio_megatron": ratio((MEGATRON,)),
        "tokens_per_second": {name: round(v) for name, v in speed.items()},
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compares training steps with Transformers and Megatron-Core.")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    sizes = {"layers": 4, "hidden": 512, "heads": 8, "width": 1024, "vocabulary": 8192, "sequence": 512, "batch": 8}
    for name, default in (sizes | {"repetitions": 5}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--backend", default="auto", help="model.moe.backend of our model")
    parser.add_argument("--peers-as-ours", action="store_true", help=AS_OURS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no downloads
    results = compare(args)
    tokens = args.batch * args.sequence
    if not args.json:
        print(
            f"{args.batch} x {args.sequence} tokens, {args.layers} layers, hidden {args.hidden}, 8 experts, top-2, bf16"
        )
        print(table(results, lambda seconds: f"{tokens / seconds:.0f} tokens/s"))
        if not version("transformers"):
            print("transformers: skipped, not installed (pip install transformers)")
    print(json.dumps(summary(results, tokens)))


if __name__ == "__main__":
    main()
