"""Every kernel at real shapes beside torch in fp64: largest relative error of each output."""

import torch

from tests.gpu.stages.cases import Pairs, cases
from tests.gpu.stages.common import attempt


def errors(pairs: Pairs, bar: float) -> dict[str, object]:
    found = {}
    for name, (got, wanted) in pairs.items():
        assert got.shape == wanted.shape, (name, got.shape, wanted.shape)
        norm = wanted.double().norm().clamp(min=1e-30)
        difference = ((got.double() - wanted.double()).norm() / norm).item()
        found[name] = difference if difference == difference else float("inf")
    return {"errors": found, "bar": bar, "passed": max(found.values()) <= bar}


def main() -> None:
    # Fresh tensors hold not-a-number until they are written.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    for name, (case, bar) in cases().items():
        attempt(name, lambda case=case, bar=bar: errors(case(), bar))


if __name__ == "__main__":
    main()
