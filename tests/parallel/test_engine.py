"""The update against torch's own optimizer and clipping; losses against the logits they come from."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from conf.schema import ModelConfig, OptimConfig, ParallelConfig
from models.logits import next_token_logits
from models.megatron_config import transformer_config
from parallel import optimizer_state
from parallel.distributed_optimizer import Overlap
from parallel.engine import Engine
from parallel.env import World
from tests.parallel.helpers import (
    MICRO_BATCH,
    OPTIM,
    VOCABULARY,
    Variant,
    build_engine,
    gradients,
    micro_batch,
    my_batches,
    optimizer_tensors,
    started,
    train,
    weights,
)

SPARSE = Variant()
DENSE = Variant({"tie_embeddings": True}, {"num_experts": 0})


def is_decayed(name: str) -> bool:
    return not name.endswith("norm.weight")


@pytest.mark.parametrize("vpp", [1, 2])
@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_pipeline_messages_neither_synchronise_the_device_nor_lose_their_tensor(runtime, backend, vpp):
    """Interleaved stages overlap their messages with computation (benchmarks.parity has such cells); an output that is
    freed meanwhile would be sent as whatever then lies there."""
    here = replace(runtime, backend=backend, layout=replace(runtime.layout, pp=2, vpp=vpp))
    config = transformer_config(ModelConfig(num_layers=4), here, torch.float32, deterministic=False)
    assert not config.batch_p2p_sync
    assert config.overlap_p2p_comm == (vpp == 2) and config.batch_p2p_comm == (backend == "nccl" and vpp == 1)
    assert not (config.overlap_p2p_comm and config.deallocate_pipeline_outputs)


def test_weight_decay_leaves_norms_alone(runtime):
    engine = build_engine(runtime, SPARSE, OptimConfig(weight_decay=0.1))
    before = weights(engine)
    norm, applied = engine.update(0.01, loss=1.0)  # gradients are zero before the first backward
    after = weights(engine)
    assert (norm, applied) == (0.0, True)
    assert sum(map(is_decayed, before)) == 4 * 5 + 2 and sum(not is_decayed(name) for name in before) == 4 * 2 + 1
    for name, weight in before.items():
        wanted = weight * (1 - 0.01 * 0.1) if is_decayed(name) else weight
        torch.testing.assert_close(after[name], wanted, rtol=1e-7 if is_decayed(name) else 0, atol=0)


def test_weight_decay_leaves_the_experts_biases_alone(runtime):
    """Which are matrices, a row for each expert."""
    engine = build_engine(runtime, Variant(moe={"expert_bias": True}), OptimConfig(weight_decay=0.1))
    biases = [p for name, p in engine.modules[0].named_parameters() if name.endswith(("b_in", "b_out"))]
    for parameter, piece in optimizer_state._optimizer_shards(engine).items():
        if any(parameter is bias for bias in biases):
            piece.master.data.fill_(1.0)
    engine.update(0.01, loss=1.0)
    after = {name: w for name, w in weights(engine).items() if name.endswith(("b_in", "b_out"))}
    assert len(biases) == len(after) == 2 * 4 and all((w == 1.0).all() for w in after.values())


@pytest.mark.parametrize("clip_grad", [0.3, 1e9, 0.0], ids=["clipped", "small enough", "off"])
def test_clipping_is_torchs(runtime, clip_grad):
    engine = build_engine(runtime, SPARSE, OptimConfig(clip_grad=clip_grad))
    loss = engine.forward_backward(my_batches(runtime, 0), step=0).item()
    copies = {name: torch.nn.Parameter(torch.empty_like(g)) for name, g in gradients(engine).items()}
    for name, gradient in gradients(engine).items():
        copies[name].grad = gradient.clone()
    wanted_norm = torch.nn.utils.clip_grad_norm_(copies.values(), clip_grad or math.inf)
    norm, _ = engine.update(1e-3, loss=loss)
    assert norm == pytest.approx(wanted_norm.item(), rel=1e-6)
    # From zero, the first moment becomes (1 - beta1) times the gradient that Adam was given.
    for name, moment in optimizer_tensors(engine)["exp_avg"].items():
        torch.testing.assert_close(moment, (1 - 0.9) * copies[name].grad, rtol=1e-5, atol=1e-12)


def test_the_norm_of_large_gradients_keeps_its_digits(runtime):
    """fp32 sums of a million squares lose five digits on a CPU, and others under every layout."""
    engine = build_engine(runtime, Variant({"vocab_size": 2**16}), OptimConfig())
    generator = torch.Generator().manual_seed(0)
    square = 0.0
    for parameter in engine.modules[0].parameters():
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        square += parameter.main_grad.double().square().sum().item()
    norm, _ = engine.update(0.0, loss=1.0)
    assert norm == pytest.approx(math.sqrt(square), rel=1e-9)


def test_three_updates_are_torchs_adamw(runtime):
    optim = OptimConfig(weight_decay=0.1, clip_grad=0.5, beta1=0.8, beta2=0.9, eps=1e-4)
    engine = build_engine(runtime, SPARSE, optim)
    copies = {name: torch.nn.Parameter(weight.double()) for name, weight in weights(engine).items()}
    decayed, others = ([c for n, c in copies.items() if is_decayed(n) is yes] for yes in (True, False))
    reference = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}], betas=(0.8, 0.9), eps=1e-4, weight_decay=0.1
    )
    for step, lr in enumerate((1e-2, 3e-2, 2e-2)):
        loss = engine.forward_backward(my_batches(runtime, step), step=step).item()
        for name, gradient in gradients(engine).items():
            copies[name].grad = gradient.double()
        torch.nn.utils.clip_grad_norm_(copies.values(), 0.5)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        engine.update(lr, loss=loss)
        for name, weight in weights(engine).items():
            torch.testing.assert_close(weight.double(), copies[name].detach(), rtol=1e-5, atol=1e-7)
    # The model computes with what the optimizer holds.
    held = weights(engine)
    for name, parameter in engine.modules[0].named_parameters():
        assert torch.equal(parameter, held[name])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_gradient_changes_nothing(runtime, bad):
    engine = build_engine(runtime, SPARSE)
    train(engine, range(1))
    before = copy.deepcopy(optimizer_tensors(engine))
    loss = engine.forward_backward(my_batches(runtime, 1), step=1).item()
    assert engine.nonfinite_gradients() == []
    for name in ("layers.1.ffn.experts.w_in", "final_norm.weight"):
        engine.modules[0].get_parameter(name).main_grad.view(-1)[3] = bad
    norm, applied = engine.update(1e-2, loss=loss)
    assert not math.isfinite(norm) and not applied
    assert engine.nonfinite_gradients() == ["layers.1.ffn.experts.w_in", "final_norm.weight"]
    assert engine.nonfinite_gradients(limit=1) == ["layers.1.ffn.experts.w_in"]
    assert_untouched(engine, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_loss_changes_nothing(runtime, bad):
    engine = build_engine(runtime, SPARSE)
    train(engine, range(1))
    before = copy.deepcopy(optimizer_tensors(engine))
    engine.forward_backward(my_batches(runtime, 1), step=1)
    norm, applied = engine.update(1e-2, loss=bad)
    assert math.isfinite(norm) and not applied and engine.nonfinite_gradients() == []
    assert_untouched(engine, before)
    assert engine.update(1e-2, loss=1.0)[1]  # and the next may


def assert_untouched(engine: Engine, before: dict[str, dict[str, torch.Tensor]]) -> None:
    for kind, tensors in optimizer_tensors(engine).items():
        assert all(torch.equal(tensor, before[kind][name]) for name, tensor in tensors.items())
    for name, parameter in engine.modules[0].named_parameters():
        assert torch.equal(parameter, before["weights"][name])


def sum_together_and_apart(world: World) -> tuple[bool, list[float]]:
    """Whether loss, norm and weights of two steps are those of steps that sum the loss by itself, and what else the
    last step summed (rank function for the pool)."""
    with started(world, ParallelConfig(tp=2)) as runtime:
        apart, together = build_engine(runtime, SPARSE), build_engine(runtime, SPARSE)
        figures = train(apart, range(2))
        for step, (loss, norm) in enumerate(figures):
            together.compute_gradients(my_batches(runtime, step), step=step)
            beside = {"ranks": torch.tensor([world.rank, 1.0], dtype=torch.float64)}
            if together.update(OPTIM.lr, beside=beside) != (norm, True) or together.loss != loss:
                return False, []
        mine, theirs = (weights(engine) for engine in (together, apart))
        return all(torch.equal(weight, theirs[name]) for name, weight in mine.items()), together.summed[
            "ranks"
        ].tolist()


def test_the_loss_travels_with_the_norm(ranks):
    assert ranks.run(4, sum_together_and_apart, timeout=60) == [(True, [6.0, 4.0])] * 4


def spoil_one_rank(world: World) -> tuple[bool, bool]:
    """(whether the update was applied, whether any weight changed) after one rank's gradients went bad."""
    with started(world, ParallelConfig(ep=2)) as runtime:
        engine = build_engine(runtime, SPARSE)
        before = copy.deepcopy(weights(engine))
        loss = engine.forward_backward(my_batches(runtime, 0), step=0).item()
        if world.rank == 1:
            engine.modules[0].get_parameter("layers.0.ffn.experts.w_out").main_grad.view(-1)[0] = math.inf
        _, applied = engine.update(1e-2, loss=loss)
        return applied, any(not torch.equal(w, before[name]) for name, w in weights(engine).items())


def test_all_ranks_skip_together(ranks):
    assert ranks.run(2, spoil_one_rank, timeout=60) == [(False, False)] * 2


def test_micro_batches_add_up_to_one_batch(runtime):
    small, large = build_engine(runtime, DENSE), build_engine(runtime, DENSE)
    parts = [micro_batch(key) for key in range(4)]
    whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    assert whole["tokens"].shape[0] == 4 * MICRO_BATCH
    losses = small.forward_backward(parts, step=0).item(), large.forward_backward([whole], step=0).item()
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    wanted = gradients(large)
    for name, gradient in gradients(small).items():
        assert (gradient - wanted[name]).norm() <= 1e-5 * wanted[name].norm()


def test_losses_are_those_of_the_logits(runtime):
    engine = build_engine(runtime, DENSE)
    batches = my_batches(runtime, 0)
    with torch.no_grad():
        nats = [
            F.cross_entropy(
                engine.modules[0](b["tokens"], b["positions"]).double().transpose(1, 2), b["labels"], reduction="none"
            )
            for b in batches
        ]
    counted, tokens = engine.evaluate(batches)
    assert tokens == sum(int(b["loss_mask"].sum()) for b in batches) < sum(n.numel() for n in nats)
    masked = sum((n * b["loss_mask"]).sum().item() for n, b in zip(nats, batches, strict=True))
    assert counted == pytest.approx(masked, rel=1e-6)
    assert engine.forward_backward(batches, step=0).item() == pytest.approx(masked / tokens, rel=1e-6)
    # Weights are fractions too, and a micro-batch without any adds nothing.
    for batch, factor in zip(batches, (0.25, 0.0, 1.0, 0.5), strict=True):
        batch["loss_mask"] = batch["loss_mask"] * factor
    weighted = sum((n * b["loss_mask"]).sum().item() for n, b in zip(nats, batches, strict=True))
    wanted = weighted / sum(b["loss_mask"].sum().item() for b in batches)
    assert engine.forward_backward(batches, step=0).item() == pytest.approx(wanted, rel=1e-6) != masked / tokens
    nothing = [batch | {"loss_mask": torch.zeros_like(batch["loss_mask"])} for batch in batches]
    assert engine.forward_backward(nothing, step=0).item() == 0.0


def test_next_logits_are_those_after_the_last_token(runtime):
    engine = build_engine(runtime, DENSE, optim=None)
    ids = [5, 9, 2, 33, 60]
    with torch.no_grad():
        wanted = engine.modules[0](torch.tensor([ids]), torch.arange(5)[None])[0, -1]
    got = next_token_logits(engine, VOCABULARY, ids)
    assert got.shape == (VOCABULARY,)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def messages(world: World, degrees: dict) -> list[tuple[str, bool, str]]:
    """(what is sent over the data-parallel ranks, whether it travels while the model computes, during which call) of a
    step that is not the first, in which Megatron-Core learns the order of the gradients."""
    from megatron.core.distributed import param_and_grad_buffer as buffers

    told, during = [], []
    functions = {"gradients": "dist_reduce_scatter_func", "weights": "dist_all_gather_func"}
    originals = {name: getattr(buffers, function) for name, function in functions.items()}

    def recorded(name: str):
        def call(*args, async_op: bool, **kwargs):
            told.append((name, async_op, during[-1]))
            return originals[name](*args, async_op=async_op, **kwargs)

        return call

    parallel = ParallelConfig(**degrees)
    with started(world, parallel) as runtime:
        engine = build_engine(runtime, DENSE, overlap=Overlap.of(parallel, runtime.backend))
        schedule = engine._schedule

        def watched(**kwargs):
            during.append("passes")
            result = schedule(**kwargs)
            during.append("after")
            return result

        engine._schedule = watched
        for name, function in functions.items():
            setattr(buffers, function, recorded(name))
        try:
            train(engine, range(1))
            told.clear()
            train(engine, range(1, 2))
        finally:
            for name, function in functions.items():
                setattr(buffers, function, originals[name])
    return sorted(set(told))


def test_overlapped_messages_travel_during_the_passes(ranks):
    plain = [("gradients", False, "after"), ("weights", False, "after")]
    both = [("gradients", True, "passes"), ("weights", True, "passes")]
    for degrees, wanted in (
        ({}, plain),
        ({"overlap_grad_reduce": True, "overlap_param_gather": False}, [both[0], plain[1]]),
        ({"overlap_grad_reduce": True}, both),
        ({"overlap_grad_reduce": True, "pp": 2, "vpp": 2}, both),
    ):
        for told in ranks.run(2 * degrees.get("pp", 1), messages, degrees, timeout=60):
            assert told == wanted, degrees


def test_messages_overlap_where_sending_is_free():
    assert Overlap.of(ParallelConfig(), "nccl") == Overlap(True, True)
    assert Overlap.of(ParallelConfig(), "gloo") == Overlap.of(ParallelConfig(), "staged") == Overlap(False, False)
    assert Overlap.of(ParallelConfig(overlap_grad_reduce=False), "nccl") == Overlap(False, False)
    assert Overlap.of(ParallelConfig(overlap_param_gather=False), "nccl") == Overlap(True, False)
