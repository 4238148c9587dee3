"""Four simulated ranks that share the card, through gloo and the host's memory: three cells of the parity matrix."""

from benchmarks import parity
from parallel.local_launcher import RankPool
from tests.gpu.stages.common import attempt

CELLS = {"tp2 ep2": "drops", "cp2 tp2": "switch_documents", "pp2 dp2 +overlap": "switch"}


def main() -> None:
    with RankPool(4) as pool:
        alone = parity.one_rank(pool, {name: parity.VARIANTS[name] for name in set(CELLS.values())})
        for layout, variant in CELLS.items():
            attempt(f"{layout}, {variant}", lambda layout=layout, variant=variant: cell(pool, alone, layout, variant))


def cell(pool: RankPool, alone: dict[str, parity.Outcome], name: str, variant: str) -> dict[str, object]:
    [layouts] = [layouts for layouts in parity.MATRIX if layouts.name == name]
    [(_, every)] = parity.cells(pool, layouts, [variant])
    found = {**parity.deviations(every[0], alone[variant]), "agreement of the ranks": parity.agreement(every)}
    worst = max(found, key=lambda what: found[what])
    return {"deviation": found[worst], "of": worst, "passed": found[worst] <= parity.LIMIT}


if __name__ == "__main__":
    main()
