"""Weights of another run as a start: of which model, with which tokenizer, and what of them is taken."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from conf.schema import CheckpointConfig, Config
from launch import check
from launch.train import prepare_run
from parallel.env import World
from parallel.local_launcher import RankFailed, RankPool
from tests.training.helpers import command_line, rows, start, tiny_config, with_layout, write_corpus
from training.console import Console
from training.run_dir import open_run_dir
from training.worker import train_rank

LIMIT = 120.0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def source(corpus: Path, ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps whose routers have a trained bias."""
    config = tiny_config(corpus, tmp_path_factory.mktemp("source") / "run", steps=12)
    config.model.moe.bias_update_rate = 0.01
    assert ranks.run(1, run, config, timeout=LIMIT) == [0]
    return Path(config.run.dir)


def run(world: World, config: Config) -> int:
    """What `python -m launch.train` does (rank function for the pool)."""
    opened = open_run_dir(config) if world.size == 1 else None
    with Console(rank=world.rank) as console:
        prepared = prepare_run(config, opened, console)
    return train_rank(world, config, opened, prepared)


@pytest.fixture
def config(corpus: Path, source: Path, tmp_path: Path) -> Config:
    """One step from the source's weights, which it hardly changes."""
    config = tiny_config(corpus, tmp_path / "run", steps=1)
    config.checkpoint = CheckpointConfig(every=0, load=str(source))
    config.model.moe.bias_update_rate = 0.01
    config.optim.lr = 1e-9
    return config


def refused(config: Config, *parts: str) -> None:
    """Before anything is prepared; and nothing is left."""
    config.data.cache_dir = str(Path(config.run.dir).parent / "no cache")
    opened = open_run_dir(config)
    with pytest.raises(ValueError, match=r"^checkpoint\.load|^data\.tokenizer") as told:
        prepare_run(config, opened, Console())
    for part in parts:
        assert part in str(told.value)
    assert not opened.path.exists() and not Path(config.data.cache_dir).exists()


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("num_layers", 1, "model.num_layers: 2 -> 1"),
        ("tie_embeddings", True, "model.tie_embeddings=false"),
        ("num_attention_heads", 2, "model.num_attention_heads: 4 -> 2"),
        ("num_query_groups", 2, "model.num_query_groups: 4 -> 2"),
        ("rope_theta", 5e5, "model.rope_theta=10000.0"),
        ("moe.top_k", 2, "load_except=[model.moe.top_k,model.moe.renormalize]"),
        ("moe.num_shared_experts", 1, "model.moe.num_shared_experts: 0 -> 1"),
        ("moe.bias_update_rate", None, "or model.moe.bias_update_rate=0, which keeps the trained bias as it is"),
        ("moe.load_balancing", "expert_choice", "model.moe.load_balancing: aux_loss -> expert_choice"),
    ],
)
def test_another_model_is_refused(config: Config, key: str, value: object, told: str) -> None:
    section, name = (config.model.moe, key.removeprefix("moe.")) if "moe." in key else (config.model, key)
    setattr(section, name, value)
    refused(config, "is of another model", told)


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_source_without_all_its_bytes_is_refused(config: Config, source: Path, tmp_path: Path, damage: str) -> None:
    copied = shutil.copytree(source, tmp_path / "copy")
    [step] = (copied / "checkpoints").glob("step_*")
    shard = next(step.glob("*.safetensors"))
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-1])
    config.checkpoint.load = str(copied)
    refused(config, f"found only incomplete ones ({step.name})")


def test_what_means_the_same_is_taken(config: Config, ranks: RankPool, source: Path) -> None:
    """Spelt out instead of null; computed and trained otherwise; under another layout."""
    config.model.num_query_groups, config.model.recompute = 4, ["moe"]
    config.model.moe = replace(
        config.model.moe, renormalize=False, load_balancing="global_aux_loss", bias_update_rate=0
    )
    config.model.moe.z_loss_coeff = 0.1
    assert ranks.run(2, run, with_layout(config, ep=2), timeout=LIMIT) == [0, 0]
    loaded = rows(source)[-1]["loss"]
    assert rows(Path(config.run.dir))[0]["loss"] == pytest.approx(loaded, abs=0.25)
    assert "warning: checkpoint.load_except" not in (Path(config.run.dir) / "train.log").read_text()


def test_a_bias_starts_where_there_was_none(config: Config, ranks: RankPool, source: Path, tmp_path: Path) -> None:
    """A source without one, whose statistics of a step the new run has no use for."""
    plain = replace(config, checkpoint=CheckpointConfig(every=0), run=replace(config.run, dir=str(tmp_path / "plain")))
    plain.model = replace(plain.model, moe=replace(plain.model.moe, bias_update_rate=None))
    plain.model.moe.load_balancing = "global_aux_loss"
    assert ranks.run(1, run, plain, timeout=LIMIT) == [0]
    config.checkpoint.load = str(tmp_path / "plain")
    assert ranks.run(2, run, with_layout(config, tp=2), timeout=LIMIT) == [0, 0]
    assert rows(Path(config.run.dir))[0]["loss"] == pytest.approx(rows(tmp_path / "plain")[0]["loss"], rel=1e-5)


def test_a_deliberate_difference_is_named(config: Config, ranks: RankPool, source: Path) -> None:
    config.model.num_layers, config.model.tie_embeddings = 1, True
    config.model.moe.every = 1
    named = ["model.num_layers", "model.tie_embeddings", "model.moe.every"]
    config.checkpoint.load_except = named[:2]
    refused(config, f"checkpoint.load_except=[{','.join(named)}]")
    config.checkpoint.load_except, config.data.cache_dir = named, tiny_config(source, source).data.cache_dir
    assert ranks.run(1, run, config, timeout=LIMIT) == [0]
    log = (Path(config.run.dir) / "train.log").read_text()
    excepted = "model.num_layers,model.tie_embeddings,model.moe.every"
    assert f"warning: checkpoint.load_except=[{excepted}]: not in the checkpoint: " in log
    assert "not in the model: head.weight, layers.0." in log


def test_weights_that_only_one_side_has_are_refused_by_the_ranks_too(
    config: Config, ranks: RankPool, source: Path, tmp_path: Path
) -> None:
    """Settings that do not say what the weights are."""
    shutil.copytree(source, tmp_path / "copy")
    settings = tmp_path / "copy" / "config.yaml"
    settings.write_text(settings.read_text().replace("tie_embeddings: false", "tie_embeddings: true"))
    config.checkpoint.load, config.model.tie_embeddings = str(tmp_path / "copy"), True
    with pytest.raises(RankFailed, match=r"is of another model: not in the model: head\.weight"):
        ranks.run(1, run, config, timeout=LIMIT)


def test_the_tokenizer_is_the_weights_own(config: Config, ranks: RankPool, source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(f'{{"text": "completely different words make other merges {n}"}}\n' for n in range(400)))
    data = config.data
    config.data = replace(data, files=[str(other)])
    assert ranks.run(1, run, config, timeout=LIMIT) == [0]
    kept = (source / "tokenizer.json").read_bytes()
    path = Path(config.run.dir)
    assert (path / "tokenizer.json").read_bytes() == kept
    # Continued after the source is gone, it is still the same.
    config.checkpoint.load, config.train.steps = str(tmp_path / "gone"), 2
    assert ranks.run(1, run, config, timeout=LIMIT) == [0]
    assert [row["step"] for row in rows(path)] == [1, 2]
    # Another one is refused, or asked for by name.
    fresh = open_run_dir(
        replace(config, checkpoint=CheckpointConfig(), run=replace(config.run, dir=str(tmp_path / "x")))
    )
    config.checkpoint.load, config.run.dir = "", str(tmp_path / "fresh")
    prepare_run(
        replace(config, checkpoint=CheckpointConfig(), run=replace(config.run, dir=str(fresh.path))), fresh, Console()
    )
    assert (fresh.path / "tokenizer.json").read_bytes() != kept
    config.checkpoint.load, config.data.tokenizer = str(source), str(fresh.path / "tokenizer.json")
    refused(config, f"data.tokenizer={source}/tokenizer.json", "checkpoint.load_except=[data.tokenizer]")


def test_a_source_without_a_tokenizer(config: Config, source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").unlink()
    config.checkpoint.load = str(tmp_path / "copy")
    refused(config, "has no tokenizer.json", "checkpoint.load_except=[data.tokenizer]")


@pytest.mark.parametrize("module", ["launch.check", "launch.train"])
def test_a_source_that_is_not_there_is_found_out_first(corpus: Path, tmp_path: Path, module: str) -> None:
    command = command_line(corpus, tmp_path / "run", "checkpoint.load=/nonexistent", f"data.cache_dir={tmp_path}/cache")
    command[2] = module
    process = start(command)
    assert "checkpoint.load=/nonexistent: found no checkpoint" in process.communicate(timeout=LIMIT)[1]
    assert process.returncode == 2 and sorted(tmp_path.iterdir()) == []


def test_a_misspelt_source_is_told_the_nearest(config: Config, source: Path) -> None:
    config.checkpoint.load = f"{source}x"
    refused(config, f"checkpoint.load={source}x: found no checkpoint", f"did you mean {source}?")


def test_the_check_reads_every_file(config: Config, source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "copy")
    (step,) = (tmp_path / "copy" / "checkpoints").iterdir()
    check._check_files(str(tmp_path / "copy"))
    (step / "manifest.json").rename(step / "manifest")
    config.checkpoint.load = str(tmp_path / "copy")
    refused(config, "found only incomplete ones (step_00000012)")
    (step / "manifest").rename(step / "manifest.json")
    largest = max(step.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(ValueError, match="step_00000012"):
        check._check_files(str(tmp_path / "copy"))
