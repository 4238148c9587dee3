"""launch.inspect: what it counts, by hand; and the page, in a browser."""

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.schema import MoeConfig
from parallel.local_launcher import RankPool
from tests.training.helpers import tiny_config, train, write_corpus
from training.inspection.collect import STEPS, co_activation, flow, history, typical_tokens, weight_similarity
from training.inspection.write import page

ROOT = Path(__file__).resolve().parents[2]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_relations_by_hand() -> None:
    """Index 3 is no choice."""
    experts_TK = [[0, 1], [1, 2], [1, 0], [2, 3]]
    assert co_activation(experts_TK, 3) == [[0, 2, 0], [2, 0, 1], [0, 1, 0]]
    assert flow(experts_TK, [[2, 0], [2, 1], [0, 1], [3, 3]], 3) == [[0, 0, 1], [1, 0, 1], [0, 0, 0]]


def test_typical_tokens_are_those_with_more_than_their_share() -> None:
    texts = ["the"] * 8 + ["cat"] * 4
    experts_TK = [[0]] * 4 + [[1]] * 4 + [[1]] * 3 + [[0]]
    first, second, none = typical_tokens(texts, experts_TK, 3)
    # Of 12 assignments expert 1 has 7, and 3 of 4 cats: 3 / (4 * 7 / 12).
    assert second[0] == ("cat", 3, round(3 / (4 * 7 / 12), 2)) and first[0][0] == "the" and none == []


def test_similarity_is_the_cosine_of_experts() -> None:
    w = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]]).view(4, 2, 1, 1)
    assert weight_similarity(w)[0] == [1.0, 1.0, 0.0, -1.0]


def test_a_long_history_is_thinned_out(tmp_path: Path) -> None:
    steps = range(1, 2 * STEPS + 2)
    rows = [{"step": n, "loss": 1.0 / n, "dropped_fraction": 0.0} for n in steps]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"step": n, "layer": 1, "assignments": [n, 3 * n], "dropped_fraction": 0.5} for n in steps]
    (tmp_path / "expert_load.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = history(tmp_path)
    assert found["steps"] == found["load_steps"] == [*range(1, 2 * STEPS + 2, 3)]
    assert found["load"][1][0] == [0.5, 1.5] and set(found["curves"]) == {"loss", "dropped_fraction"}


@pytest.fixture(scope="module")
def run(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    config = tiny_config(write_corpus(folder), folder / "run", steps=3)
    config.model.num_layers, config.model.moe = 3, MoeConfig(num_experts=4, top_k=2, first_dense_layers=1)
    assert ranks.run(1, train, config, timeout=120.0) == [0]
    return folder / "run"


def inspected(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.inspect", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == code, done.stderr
    return done


def data_of(path: Path) -> list[dict[str, Any]]:
    match = re.search(r'<script id="data" type="application/json">(.*?)</script>', path.read_text(), re.S)
    assert match
    return json.loads(match[1])


@pytest.fixture(scope="module")
def written(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    text = folder / "text.txt"
    text.write_text("word1 word2 </script><b>bold</b> " * 30)
    out = folder / "page.html"
    inspected(f"checkpoint={run}", f"compare={run}", f"text={text}", "tokens=150", f"output={out}")
    return out


def test_the_page_holds_every_tokens_experts(written: Path) -> None:
    first, second = data_of(written)
    assert first == second and first["layers"] == [1, 2] and first["top_k"] == 2
    text = first["text"]
    assert "".join(text["tokens"]).startswith("word1 word2 </script><b>bold</b> word1")
    for layer in ("1", "2"):
        assert len(text["experts"][layer]) == len(text["gates"][layer]) == len(text["tokens"])
        assert all(len(set(row)) == 2 and 0 <= min(row) <= max(row) < 4 for row in text["experts"][layer])
        assert all(abs(sum(row) - 1) < 2e-3 for row in text["gates"][layer])  # renormalised at top-2
        assert sum(map(sum, first["together"][layer])) == 2 * len(text["tokens"])
    assert sum(map(sum, first["flow"]["1"])) == len(text["tokens"])
    assert "http" not in page([]).replace("http://www.w3.org", "")  # nothing is loaded from elsewhere


def test_a_text_of_its_own_is_its_held_out_text(run: Path, tmp_path: Path) -> None:
    inspected(f"checkpoint={run}", "tokens=40", f"output={tmp_path / 'page.html'}")
    (one,) = data_of(tmp_path / "page.html")
    assert len(one["text"]["tokens"]) == 40 and len(one["history"]["load"]["1"]) == 3


def in_a_browser(written: Path, script: str) -> str:
    """The page's text content after a script has run in it."""
    assert BROWSER is not None
    probe = written.with_name("probe.html")
    shown = "document.body.innerHTML = '<pre id=result></pre>'; document.getElementById('result').textContent = result;"
    probe.write_text(written.read_text().replace("</body>", f"<script>let result;{script};{shown}</script></body>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", probe.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    match = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.S)
    assert match, done.stdout[-2000:] + done.stderr[-2000:]
    return html.unescape(match[1])


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here: apt-get install chromium")
def test_clicks_change_what_a_browser_shows(written: Path) -> None:
    """Another layer; one expert's tokens alone; what a token's experts are, on hover."""
    script = """
    const found = [], $$ = query => [...document.querySelectorAll(query)];
    found.push($$("h2")[0].textContent, $$(".text").length, $$(".text")[0].textContent.slice(0, 11));
    $$("#layers button")[1].click();
    found.push($$("h2")[0].textContent, $$("#layers button")[1].getAttribute("aria-pressed"));
    found.push($$(".text span.off").length);
    $$(".legend span")[2].click();
    const off = $$(".text span.off").length / 2, all = $$(".text span").length / 2;
    found.push(runs[0].text.experts[2].filter(row => !row.includes(2)).length === off, off < all);
    const token = $$(".text span")[0], box = token.getBoundingClientRect();
    token.dispatchEvent(new MouseEvent("mousemove", {clientX: box.left, clientY: box.top}));
    found.push(document.getElementById("tip").textContent.split("\\n")[1]);
    found.push($$("canvas").every(canvas => canvas.width > 0 && canvas.height > 0), $$("canvas").length);
    result = JSON.stringify(found)
    """
    (first, _) = data_of(written)
    rows = first["text"]["experts"]["1"][0], first["text"]["gates"]["1"][0]
    words = ", ".join(f"{e} ({g:g})" for e, g in zip(*rows, strict=True))
    got = json.loads(in_a_browser(written, script))
    assert got[:3] == ["Load of layer 1", 2, "word1 word2"]
    assert got[3:6] == ["Load of layer 2", "true", 0]
    assert got[6:8] == [True, True] and got[8] == f"layer 1: {words}"
    assert got[9] is True and got[10] == 2 * 3  # loads, shared tokens and weights; the last layer flows nowhere


def test_what_cannot_be_shown_is_said(run: Path, tmp_path: Path) -> None:
    assert "nearest: tokens=2" in inspected(f"checkpoint={run}", "tokens=1", code=2).stderr
    assert "none does not exist" in inspected(f"checkpoint={run}", f"text={tmp_path / 'none'}", code=2).stderr
    (tmp_path / "empty.txt").write_text("")
    assert "has 0 tokens" in inspected(f"checkpoint={run}", f"text={tmp_path / 'empty.txt'}", code=2).stderr
