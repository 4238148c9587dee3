from pathlib import Path

import pytest

from tests.models.hf.helpers import run_import, save_by_hand, save_model
from tests.training.helpers import write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("hf_corpus"))


@pytest.fixture(scope="session")
def sources(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of Transformers' models, by a name. Nobody changes them."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hf")
    moe = {"num_local_experts": 4, "router_aux_loss_coef": 0.0}
    return {
        "mixtral": save_model("Mixtral", folder / "mixtral", corpus, **moe),
        "llama": save_model("Llama", folder / "llama", corpus, tie_word_embeddings=True, rope_theta=300.0),
        "hub": save_by_hand(folder / "hub"),
    }


@pytest.fixture(scope="session")
def runs(sources: dict[str, Path], ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The runs that they are imported as, each compared with its source."""
    folder, made = tmp_path_factory.mktemp("hf_runs"), {}
    for name, source in sources.items():
        code, printed = run_import(ranks, source, folder / name)
        assert code == 0 and "verified on" in printed, printed
        made[name] = folder / name
    return made
