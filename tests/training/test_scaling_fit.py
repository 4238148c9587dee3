"""launch.scaling: laws that runs were made from are found again."""

import json
import math
from pathlib import Path

import pytest

from launch import scaling
from tests.training.test_compare import write_run
from training.scaling_fit import Point, fit


def test_a_law_without_noise_is_found_exactly() -> None:
    found = [Point(str(n), 5 * (1e6 / n) ** 0.3, 6.0 * n, n, 1e9) for n in (1e6, 3e6, 1e7, 1e8)]
    law = fit(found, "parameters")
    assert law is not None
    assert (law.alpha, law.low, law.high) == pytest.approx((0.3, 0.3, 0.3))
    assert law.x_c == pytest.approx(1e6 * 5 ** (1 / 0.3)) and law.loss(1e7) == pytest.approx(5 * 0.1**0.3)
    assert fit(found, "tokens") is None  # they have all seen as many


def test_the_interval_covers_the_truth_and_grows_with_noise() -> None:
    def runs(noise: float) -> list[Point]:
        off = [math.exp(noise * math.sin(7 * i)) for i in range(12)]
        return [Point(str(i), 4 * 2 ** (-0.1 * i) * off[i], 2.0**i, 2.0**i, 2.0**i) for i in range(12)]

    widths = []
    for noise in (0.01, 0.05):
        law = fit(runs(noise), "compute")
        assert law is not None and law.low < 0.1 < law.high
        widths.append(law.high - law.low)
    assert widths[1] > 3 * widths[0]


def test_runs_of_three_sizes_give_laws_and_a_chart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for layers, loss in ((2, 4.0), (4, 3.6), (8, 3.24)):
        write_run(tmp_path / f"layers{layers}", [5.0, 4.5], val=loss, model__num_layers=layers)
    write_run(tmp_path / "young", [5.0])
    chart = tmp_path / "scaling.png"
    assert scaling.main([str(tmp_path), "format=json"]) == 0
    out, err = capsys.readouterr()
    laws = {law["what"]: law for law in json.loads(out)["laws"]}
    assert set(laws) == {"compute", "parameters"} and laws["parameters"]["runs"] == 3
    assert "young is left out: it has no held-out loss yet" in err
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: bash launch/setup.sh plots")
    assert scaling.main([str(tmp_path), f"plot={chart}"]) == 0
    assert "x = parameters" in capsys.readouterr().out and chart.read_bytes()[:4] == b"\x89PNG"


def test_what_cannot_be_fitted_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_run(tmp_path / "one", [5.0], val=4.0)
    assert scaling.main([str(one)]) == 2
    assert "a law needs three finished runs" in capsys.readouterr().err
    assert scaling.main([str(tmp_path / "none")]) == 2
    assert scaling.main(["format=xml", str(one)]) == 2 and "nearest is format=json" in capsys.readouterr().err
