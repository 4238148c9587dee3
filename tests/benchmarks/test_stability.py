"""What the stability benchmark says of a run, from rows drawn by hand, and that its variants are what they say."""

import pytest
import torch

from benchmarks import stability
from benchmarks.stability import (
    REPEATED,
    STRESSED,
    _router,
    base,
    changed,
    figures,
    over_seeds,
    show,
    unstable_rate,
)
from conf import rules
from conf.schema import Config, DataConfig, ModelConfig, MoeConfig
from moe.router import Router
from parallel.env import World
from parallel.local_launcher import RankPool


def row(step: int, loss: float | None, norm: float, dropped: float = 0.0) -> dict[str, object]:
    return {"step": step, "loss": loss, "grad_norm": norm, "dropped_fraction": dropped} | dict.fromkeys(
        ("load_max_over_mean", "z_loss"), float(step)
    )


def test_figures_of_a_run_that_rises_and_recovers() -> None:
    rows = [row(1, 5.0, 9.0), row(2, 3.0, 1.0), row(3, 4.5, 2.0, 0.2), row(4, 2.0, 1.5, 0.4)]
    rows += [{"step": 2, "val_loss": 3.5}, {"step": 4, "val_loss": 3.75}]
    found = figures(rows)
    assert found["held-out"] == 3.75 and found["best held-out"] == 3.5
    assert found["worst rise"] == 1.5  # from 3.0 to 4.5
    assert found["grad norm"] == 2.0 and found["dropped"] == pytest.approx(0.3)  # of the second half
    assert found["load"] == 4 and found["z"] == 3.5


def test_a_loss_that_is_not_finite_is_an_endless_rise() -> None:
    rows = [row(1, 5.0, 1.0), row(2, None, 1.0), {"step": 2, "val_loss": 5.0}]
    assert figures(rows)["worst rise"] == float("inf")


def test_a_run_that_ended_before_it_was_evaluated_has_no_held_out_loss() -> None:
    found = figures([row(1, 9.0, 1.0), row(2, None, 1.0)])
    assert found["held-out"] == found["best held-out"] == float("inf")


def test_effects_within_the_range_of_the_seeds_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    seeds = {"as shipped": (5.0, 5.25, 5.0), "little": (5.125, 5.0, 5.25), "much": (6.0, 6.0, 6.125)}
    table = over_seeds({name: [{"loss": value} for value in values] for name, values in seeds.items()})
    assert table["as shipped"]["loss"] == {"median": 5.0, "range": 0.25, "within_range": None}
    assert table["little"]["loss"] == {"median": 5.125, "range": 0.25, "within_range": True}
    assert table["much"]["loss"] == {"median": 6.0, "range": 0.125, "within_range": False}
    show("title", table)
    shown = capsys.readouterr().out
    assert "~5.1250 (0.2500)" in shown and " 6.0000 (0.1250)" in shown and "~6" not in shown
    one = over_seeds({"as shipped": [{"loss": 5.0}], "much": [{"loss": 6.0}]})
    assert one["much"]["loss"] == {"median": 6.0, "range": None, "within_range": None}
    show("title", one)
    assert "one seed: no range" in capsys.readouterr().out


def test_the_lowest_unstable_rate_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stability, "measure", lambda variant, steps, seed, data, lr: {"worst rise": 40 * lr})
    assert unstable_rate([0.1, 0.01, 0.03], 10, DataConfig()) == (0.03, True)
    assert unstable_rate([0.01, 0.02], 10, DataConfig()) == (0.02, False)


@pytest.mark.parametrize("variant", [*STRESSED.values(), *REPEATED.values()], ids=str)
def test_every_variant_can_be_run(variant, tmp_path) -> None:
    rules.check(changed(base(10, 1, tmp_path, DataConfig(), 1e-2), variant.changes), 1)


def router_rounds(world: World, low_precision: bool) -> bool:
    """Whether the logits of a run's router are numbers of bf16 (rank function)."""
    from training import builder
    from training.output_redirect import redirect_output

    redirection = redirect_output(world.rank)
    moe = MoeConfig(num_experts=4, every=1, backend="loop")
    with _router(low_precision):
        built = builder.start(Config(model=ModelConfig(num_layers=1, moe=moe), precision="bf16"), world, train=False)
    (router,) = (m for stage in built.engine.modules for m in stage.modules() if isinstance(m, Router))
    x_TD = torch.randn(5, built.config.model.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits_TE = router.ops.router_logits(x_TD, router.weight)
    builder.stop()
    redirection.undo()
    return torch.equal(logits_TE, logits_TE.bfloat16().float())


@pytest.mark.parametrize("low_precision", [False, True])
def test_a_router_in_bf16_is_one(low_precision: bool, ranks: RankPool) -> None:
    assert ranks.run(1, router_rounds, low_precision, timeout=60) == [low_precision]
