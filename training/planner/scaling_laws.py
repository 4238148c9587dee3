"""Compute-optimal models: how many parameters and tokens a budget of FLOPs should be spent on.

Legend: C compute in FLOPs, N parameters, D tokens; C = 6 N D.
"""

from dataclasses import dataclass

from training.planner.rates import Rates

DAY = 86400.0


@dataclass(frozen=True)
class Law:
    """N = n_scale C^n_power and D = d_scale C^d_power."""

    name: str
    source: str
    n_scale: float
    n_power: float
    d_scale: float
    d_power: float

    def optimum(self, compute: float) -> tuple[float, float]:
        """(parameters, tokens)."""
        return self.n_scale * compute**self.n_power, self.d_scale * compute**self.d_power


PF_DAY = 1e15 * DAY
"""FLOPs in the unit of Kaplan et al."""
KAPLAN = Law(
    "Kaplan",
    "Kaplan et al. 2020 (arXiv:2001.08361), section 6.1, table 6: N = 1.3e9 C^0.73 (C in PF-days), D = C / 6 N",
    1.3e9 / PF_DAY**0.73,
    0.73,
    1 / (6 * 1.3e9 / PF_DAY**0.73),
    0.27,
)
"""Of parameters without embeddings. Its tokens follow from C = 6 N D."""
CHINCHILLA = Law(
    "Chinchilla",
    "Hoffmann et al. 2022 (arXiv:2203.15556), approach 1 (table 2: both exponents 0.50), 20 tokens a parameter",
    (1 / 120) ** 0.5,
    0.5,
    20 * (1 / 120) ** 0.5,
    0.5,
)
"""C = 6 N (20 N). The coefficients of approach 3 were corrected by Besiroglu et al. 2024 (arXiv:2404.10102), to the
same 20 tokens a parameter."""
LAWS = (KAPLAN, CHINCHILLA)


@dataclass(frozen=True)
class FineGrained:
    """A compute-optimal mixture of experts."""

    active: float
    """Parameters that a token uses, without embeddings."""
    total: float
    """All parameters, without embeddings."""
    tokens: float
    granularity: int
    """How many times narrower than a dense layer's an expert is; a token is routed to as many of them."""
    loss: float
    """On C4 with GPT-2's tokenizer, in nats per token."""


EXPANSION = 64
"""Parameters of all experts relative to those of the ones that a token uses."""
FINE_GRAINED = (
    "Krajewski et al. 2024 (arXiv:2402.07871), eq. 9 and 10, table 1: fitted to models of at most 85 M active and 3.7 "
    "B total parameters, 16 to 130 B tokens, expert-choice routing; larger budgets extrapolate"
)


def fine_grained(compute: float) -> FineGrained:
    """Minimises L = c + (g / G^gamma + a) / N^alpha + b / D^beta over models of n blocks of width d = 64 n, with
    N = d^2 (8 E + 4) n parameters, 12 d^2 n of them active, and compute = (6 x 12 d^2 + 14 d E G) n D."""
    best: FineGrained | None = None
    for granularity in (1, 2, 4, 8, 16, 32, 64, 128):
        for step in range(600):
            n = 1.01**step
            d = 64 * n
            active, total = 12 * d**2 * n, d**2 * (8 * EXPANSION + 4) * n
            tokens = compute / ((6 * 12 * d**2 + 14 * d * EXPANSION * granularity) * n)
            loss = 0.47 + (2.1 / granularity**0.58 + 18.1) / total**0.115 + 30.8 / tokens**0.147
            if best is None or loss < best.loss:
                best = FineGrained(active, total, tokens, granularity, loss)
    assert best is not None
    return best


def table(budget: float, rates: Rates | None, cluster: str | None) -> str:
    """The optimum of each law for this budget, ten times as much and, on a cluster, the time that it takes."""
    lines = [f"budget {budget:.3g} FLOPs, spent as 6 x parameters x tokens", ""]
    lines += ["law           parameters      tokens   tokens/parameter   10 x compute"]
    for law in LAWS:
        n, d = law.optimum(budget)
        more_n, more_d = law.optimum(10 * budget)
        lines.append(
            f"{law.name:<12} {n / 1e9:>9,.3g} B {d / 1e9:>9,.3g} B {d / n:>18,.1f}   "
            f"{more_n / n:.1f}x parameters, {more_d / d:.1f}x tokens"
        )
    sparse, more = fine_grained(budget), fine_grained(10 * budget)
    lines.append(
        f"{'MoE':<12} {sparse.active / 1e9:>9,.3g} B {sparse.tokens / 1e9:>9,.3g} B "
        f"{sparse.tokens / sparse.active:>18,.1f}   {more.active / sparse.active:.1f}x active parameters, "
        f"{more.tokens / sparse.tokens:.1f}x tokens"
    )
    lines += ["", *(f"{law.name}: {law.source}" for law in LAWS), f"MoE: {FINE_GRAINED}"]
    experts = EXPANSION * sparse.granularity
    lines += [
        f"     of {sparse.total / 1e9:,.3g} B parameters in all: {experts:,} experts a layer, each 1 / "
        f"{sparse.granularity} of a dense layer's width, top-{sparse.granularity}; loss {sparse.loss:.3f} on C4"
    ]
    if rates is not None:
        lines += ["", *_cost(budget, rates, cluster)]
    return "\n".join(lines)


def _cost(budget: float, rates: Rates, cluster: str | None) -> list[str]:
    lines = [f"on {cluster}, at an MFU of"]
    for mfu in (0.2, 0.4):
        hours = budget / (rates.peak * mfu) / 3600
        days = ", ".join(f"{gpus} GPUs {hours / gpus / 24:,.3g} days" for gpus in (8, 64, 512))
        lines.append(f"  {mfu:.0%}: {hours:,.4g} GPU-hours ({days})")
    return lines
