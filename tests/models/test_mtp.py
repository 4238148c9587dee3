"""Multi-token prediction against a float64 loop of DeepSeek-V3's formulas (arXiv:2412.19437, eq. 21 to 25)."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from conf.schema import ModelConfig, MoeConfig
from models.mtp import collect_losses
from parallel.batch_context import EVALUATE, GENERATE, BatchContext
from parallel.process_groups import Runtime
from tests.models import reference
from tests.models.test_decoder import tokens_of
from tests.moe.helpers import assert_close, assert_gradients_close, in_float64, random, tiny, whole_model
from tests.moe.reference import Sparse, Weights, norm_all, under

LENGTH = 7
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6]])
LOSS_MASK = torch.ones(2, LENGTH).index_put((torch.tensor([0, 1, 1]), torch.tensor([2, 4, 6])), torch.tensor(0.0))
LOSS_MASK[:, 3] = torch.tensor([0.25, 0.5])
LABELS = 11.0
"""What the losses of a micro-batch are divided by."""
DROPPING = MoeConfig(num_experts=4, top_k=2, every=2, capacity_factor=0.75, aux_loss_coeff=0.3, z_loss_coeff=0.1)
SEQUENCE_AUX = MoeConfig(
    num_experts=4,
    top_k=2,
    score_function="sigmoid",
    load_balancing="seq_aux_loss",
    aux_loss_coeff=0.3,
    z_loss_coeff=0.1,
)


def further_losses(
    weights: Weights, model: ModelConfig, text: list[list[int]], mask: list[list[float]], document_mask: bool
) -> tuple[list[list[Tensor]], dict[int, Sparse]]:
    """(for each depth the cross-entropies that count, weighted, what each sparse layer did).

    Args:
        text: the S + 1 tokens of each sequence.
        mask: of the S labels.
    """
    tokens_BS = torch.tensor([row[:-1] for row in text])
    hidden_BSD, sparse = reference.final_states(weights, model, tokens_BS, POSITIONS, document_mask)
    losses: list[list[Tensor]] = []
    for k in range(1, model.mtp_num_layers + 1):
        part = under(weights, f"mtp.{k - 1}.")
        # Of the text t_0 ... t_S, position i reads t_(i + k) and predicts t_(i + k + 1).
        there = [
            (i, b)
            for i in range(LENGTH)
            for b in range(2)
            if i + k + 1 <= LENGTH and (not document_mask or same_document(b, i, i + k + 1))
        ]
        read = torch.tensor([[row[i + k] if i + k <= LENGTH else 5 for i in range(LENGTH)] for row in text])
        embedded_BSD = norm_all(reference.embed(weights, model, read), part, "enorm", model)
        joined = torch.cat([embedded_BSD, norm_all(hidden_BSD, part, "hnorm", model)], -1)
        x_BSD = torch.stack([torch.stack([part["eh_proj.weight"] @ x_2D for x_2D in x_S2D]) for x_S2D in joined])
        how = {"layer": model.num_layers - 1, "routed": there}
        x_BSD, did = reference.block(x_BSD, under(part, "block."), model, POSITIONS, document_mask, **how)
        if did is not None:
            sparse[model.num_layers + k - 1] = did
        hidden_BSD = norm_all(x_BSD, part, "final_norm", model)
        logits_BSV = reference.head(weights, model, hidden_BSD)
        losses.append(
            [
                mask[b][i + k] * (torch.logsumexp(logits_BSV[b, i], 0) - logits_BSV[b, i, text[b][i + k + 1]])
                for i, b in there
                if mask[b][i + k]
            ]
        )
    return losses, sparse


def weight_of(k: int, document_mask: bool) -> float:
    """The weights of the targets of layer k, added up."""
    where = [(b, i) for b in range(2) for i in range(LENGTH - k)]
    return sum(LOSS_MASK[b, i + k].item() for b, i in where if not document_mask or same_document(b, i, i + k + 1))


def same_document(b: int, first: int, last: int) -> bool:
    """Whether no document begins after `first` up to `last`; of the token after the last position it is not known."""
    return last < LENGTH and 0 not in POSITIONS[b, first + 1 : last + 1].tolist()


CASES: dict[str, tuple[ModelConfig, bool]] = {
    "dense": (tiny(mtp_num_layers=1), False),
    "sparse, with drops": (tiny(DROPPING, mtp_num_layers=1, mtp_loss_scaling_factor=0.3), False),
    "two layers": (tiny(DROPPING, mtp_num_layers=2, num_attention_heads=4, num_query_groups=2), False),
    "documents": (tiny(DROPPING, mtp_num_layers=2, mtp_loss_scaling_factor=0.7), True),
    "tied, per sequence": (tiny(SEQUENCE_AUX, mtp_num_layers=2, tie_embeddings=True), True),
    "dense after sparse": (tiny(DROPPING, num_layers=3, mtp_num_layers=1), False),
    "multipliers and window": (
        tiny(
            mtp_num_layers=2,
            **{"embedding_multiplier": 1.7, "residual_multiplier": 0.6, "logit_multiplier": 0.4, "logit_softcap": 2.0},
            **{"sliding_window": 2, "norm": "layernorm", "norm_zero_centered": True},
        ),
        False,
    ),
}


@pytest.mark.parametrize("recompute", [[], ["norm", "activation"], ["full"]], ids=lambda r: ",".join(r) or "saved")
@pytest.mark.parametrize(("model", "document_mask"), CASES.values(), ids=CASES)
def test_equals_the_formula(model: ModelConfig, document_mask: bool, recompute: list[str], runtime: Runtime) -> None:
    """The loss of the next token, those of further ones, and the gradient of every weight."""
    model = replace(model, recompute=recompute)
    stage = whole_model(model, runtime, sequence_length=LENGTH, document_mask=document_mask)
    for seed, parameter in enumerate(stage.parameters()):  # those that start as zeros, which would hide them
        if not parameter.any():
            parameter.data.copy_(random(*parameter.shape, seed=seed))
    text_BS = tokens_of(2, LENGTH + 1, seed=1)
    weights = in_float64(stage)
    losses, sparse = further_losses(weights, model, text_BS.tolist(), LOSS_MASK.tolist(), document_mask)
    logits_BSV, _ = reference.decoder(weights, model, text_BS[:, :-1], POSITIONS, document_mask)
    next_BS = reference.cross_entropy(logits_BSV, text_BS[:, 1:])
    coeffs = model.moe.aux_loss_coeff, model.moe.z_loss_coeff
    auxiliary = sum(coeffs[0] * did.aux_loss + coeffs[1] * did.z_loss for did in sparse.values())
    further = sum(sum(of_layer) / LABELS for of_layer in losses) / model.mtp_num_layers
    (next_BS.mean() + 0.5 * (auxiliary + model.mtp_loss_scaling_factor * further)).backward()

    labels = torch.tensor(LABELS, device=runtime.device)
    got_BS = run(stage, text_BS, BatchContext(loss_scale=0.5, loss_labels=labels), runtime)
    got_BS.mean().backward()
    assert_close(got_BS, next_BS)
    assert_gradients_close(stage, weights)
    assert model.routed_layers == sorted(sparse) == sorted(stage.sparse())
    means = collect_losses([stage], model.mtp_num_layers, runtime.device)
    wanted = [sum(of_layer).item() / weight_of(k, document_mask) for k, of_layer in enumerate(losses, start=1)]
    assert means == pytest.approx(wanted, rel=1e-5)
    assert collect_losses([stage], model.mtp_num_layers, runtime.device) == [0.0] * model.mtp_num_layers


def run(stage: Any, text_BS: Tensor, batch_ctx: BatchContext, runtime: Runtime) -> Tensor:
    tokens_BS, labels_BS, positions_BS, mask_BS = (
        t.to(runtime.device) for t in (text_BS[:, :-1], text_BS[:, 1:], POSITIONS, LOSS_MASK)
    )
    return stage(tokens_BS, positions_BS, labels_BS, replace(batch_ctx, labels_BS=labels_BS, loss_mask_BS=mask_BS))


def test_the_cases_have_what_they_are_for(runtime: Runtime) -> None:
    """Drops in a layer for multi-token prediction, targets in other documents, and a masked one."""
    model, _ = CASES["documents"]
    weights = in_float64(whole_model(model, runtime, sequence_length=LENGTH))
    text = tokens_of(2, LENGTH + 1, seed=1).tolist()
    losses, sparse = further_losses(weights, model, text, LOSS_MASK.tolist(), True)
    assert [len(of_layer) for of_layer in losses] == [6, 3]
    assert not all(all(row) for row in sparse[2].kept) and len(sparse[2].kept) == 8 and len(sparse[3].kept) == 5
    losses, _ = further_losses(weights, model, text, LOSS_MASK.tolist(), False)
    assert [len(of_layer) for of_layer in losses] == [9, 7]


@pytest.mark.parametrize("mode", [EVALUATE, GENERATE])
def test_nothing_is_predicted_further_without_training(mode: str, runtime: Runtime) -> None:
    model = tiny(DROPPING, mtp_num_layers=1)
    stage, plain = (whole_model(m, runtime, sequence_length=LENGTH) for m in (model, replace(model, mtp_num_layers=0)))
    for parameter in stage.mtp.parameters():
        parameter.data.fill_(torch.nan)
    text_BS = tokens_of(2, LENGTH + 1)
    with torch.no_grad():
        got_BS, wanted_BS = (run(s, text_BS, BatchContext(mode), runtime) for s in (stage, plain))
    assert torch.equal(got_BS, wanted_BS)


def test_the_other_weights_and_losses_are_those_of_the_model_without(runtime: Runtime) -> None:
    model = tiny(DROPPING, mtp_num_layers=2)
    stage, plain = (whole_model(m, runtime, sequence_length=LENGTH) for m in (model, replace(model, mtp_num_layers=0)))
    ours = dict(stage.named_parameters())
    assert all(torch.equal(ours[name], weight) for name, weight in plain.named_parameters())
    text_BS = tokens_of(2, LENGTH + 1)
    got_BS, wanted_BS = (run(s, text_BS, BatchContext(), runtime) for s in (stage, plain))
    assert torch.equal(got_BS, wanted_BS)
