"""What was measured of implementations: kept in the run directory for the run, and in the cache for others of the same
shapes on such a machine."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from corpus.cache import Cache, ReadOnlyCache
from training.run_files import json_lines, write_atomically

FILE = "expert_backend.json"


class Measurements:
    """ops.autotune.Memory."""

    def __init__(self, cache_dir: str, run_dir: Path):
        """run_dir: where the run is or will be kept."""
        self._cache_dir, self._path = cache_dir, run_dir / FILE

    def recall(self) -> str | None:
        return next((row["backend"] for row in json_lines(self._path) if "backend" in row), None)

    def remember(self, backend: str) -> None:
        """For the run's next start."""
        write_atomically(self._path, json.dumps({"backend": backend}).encode())

    def timings(
        self, key: Mapping[str, object], measure: Callable[[], dict[str, float]]
    ) -> tuple[dict[str, float], bool]:
        fresh: dict[str, float] = {}

        def build(folder: Path) -> None:
            fresh.update(measure())
            (folder / FILE).write_text(json.dumps(fresh))

        try:
            entry = Cache(self._cache_dir).entry("expert_backends", key, build)
            return json.loads((entry / FILE).read_text()), bool(fresh)
        except ReadOnlyCache:
            return measure(), True
