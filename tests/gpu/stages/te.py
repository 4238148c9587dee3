"""Every implementation by TransformerEngine and Apex beside its reference, where the packages are importable; otherwise
why they are not."""

from tests.gpu.packages import PACKAGES, RECIPES, implementations, missing, recipe_verified, verified
from tests.gpu.stages.common import attempt, emit


def main() -> None:
    found = {package: missing(package) or "importable" for package in PACKAGES}
    emit("packages", **found)
    if "importable" not in found.values():
        return
    from parallel import process_groups
    from parallel.env import World
    from parallel.layout import Layout

    runtime = process_groups.start(World(), Layout(1), seed=1, timeout=60, threads=1)
    for name, operation, implementation in implementations():
        attempt(name, lambda how=(operation, implementation): _row(*verified(*how, runtime)))
    for recipe in RECIPES:
        attempt(f"FP8: {recipe}", lambda recipe=recipe: _row(*recipe_verified(recipe, runtime)))
    process_groups.stop()


def _row(passed: bool, why: str) -> dict[str, object]:
    return {"passed": passed, "why": why}


if __name__ == "__main__":
    main()
