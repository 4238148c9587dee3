"""Evaluation tasks against lm-eval's own Hugging Face model on the exported checkpoint, for three tasks of local
files; and during training."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from conf.commands import EvaluateConfig, ExportConfig
from conf.schema import EvalTasksConfig, MoeConfig, ParallelConfig
from parallel.env import World
from parallel.local_launcher import RankPool
from tests.training.helpers import tiny_config, train, write_corpus

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: bash launch/setup.sh eval"
)
LIMIT = 300.0
SEQUENCE = 32
TASKS = ["local_choice", "local_text", "local_answer"]
LONG = "The cat sees a token. The dog takes the ball. "


def write_tasks(folder: Path) -> Path:
    """Three tasks, some of whose samples are longer than the model's sequences."""
    who = ("cat", "dog", "router", "expert", "cat")
    choices = [
        {
            "question": f"{LONG * 2 * (n % 3)}The {w}",
            "choices": [" sees a token.", " drops the ball.", " !"],
            "answer": n % 3,
        }
        for n, w in enumerate(who)
    ]
    texts = [{"text": LONG * n + f"The expert drops {n}."} for n in range(4)]
    answers = [{"question": f"{LONG[:23] * 2 * n}The {w} takes", "answer": " a token"} for n, w in enumerate(who)]
    common: dict[str, Any] = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1.0}}
    tasks: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
        "local_choice": (
            choices,
            {
                "output_type": "multiple_choice",
                "fewshot_split": "test",
                "doc_to_text": "{{question}}",
                "doc_to_choice": "{{choices}}",
                "doc_to_target": "{{answer}}",
                "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
            },
        ),
        "local_text": (
            texts,
            {
                "output_type": "loglikelihood_rolling",
                "doc_to_text": "",
                "doc_to_target": "{{text}}",
                "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
            },
        ),
        "local_answer": (
            answers,
            {
                "output_type": "generate_until",
                "doc_to_text": "{{question}}",
                "doc_to_target": "{{answer}}",
                "generation_kwargs": {"until": ["."], "max_gen_toks": 10, "do_sample": False},
                "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
            },
        ),
    }
    (folder / "tasks").mkdir()
    for name, (rows, settings) in tasks.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        kwargs = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "datasets")}
        task = {"task": name, "dataset_kwargs": kwargs, **common, **settings}
        (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return folder / "tasks"


@pytest.fixture(scope="module")
def folder(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a run (run), tasks (tasks) and the exported model (hf). The tasks are evaluated during training, too."""
    folder = tmp_path_factory.mktemp("eval_tasks")
    write_tasks(folder)
    config = tiny_config(write_corpus(folder), folder / "run", steps=12, sequence_length=SEQUENCE)
    config.model.moe = MoeConfig(num_experts=4, top_k=2)
    config.eval.sample_tokens = 0
    config.eval_tasks = EvalTasksConfig(tasks=TASKS, include_path=str(folder / "tasks"), limit=2, every=4)
    assert ranks.run(1, train, config, timeout=LIMIT) == [0]
    assert ranks.run(1, export, str(folder), timeout=LIMIT) == [0]
    return folder


def export(world: World, folder: str) -> int:
    from training.hf_export import export_model

    return export_model(ExportConfig(checkpoint=f"{folder}/run", output=f"{folder}/hf", verify=False))


def settings_for(folder: Path, **settings: Any) -> EvaluateConfig:
    return EvaluateConfig(
        **{
            "checkpoint": str(folder / "run"),
            "tasks": ["local_*"],
            "include_path": str(folder / "tasks"),
            "log_samples": True,
            "batch_size": 3,
            "precision": "fp32",
            "output": str(folder / "results.json"),
            **settings,
        }
    )


def ours(world: World, settings: EvaluateConfig) -> str:
    """The results that a rank of launch.evaluate writes (rank function)."""
    from launch.evaluate import tasks_rank

    assert tasks_rank(world, settings) == 0
    assert settings.output is not None
    return Path(settings.output).read_text() if world.rank == 0 else ""


@pytest.fixture(scope="module")
def theirs(folder: Path) -> dict[str, Any]:
    """The results of lm-eval's Hugging Face model."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from training.eval_tasks import BOOTSTRAP, load_tasks

    settings = settings_for(folder, num_fewshot=None)
    manager = load_tasks(settings)
    model = HFLM(pretrained=str(folder / "hf"), device="cpu", batch_size=2, max_length=SEQUENCE, dtype="float32")
    found = simple_evaluate(
        model, tasks=manager.names, task_manager=manager, bootstrap_iters=BOOTSTRAP, log_samples=True
    )
    assert found is not None
    return dict(found)


def responses(results: dict[str, Any], task: str) -> list[Any]:
    """Of every sample: its log-likelihoods, or its text."""
    return [sample["filtered_resps"] for sample in sorted(results["samples"][task], key=lambda s: s["doc_id"])]


def same(got: Any, wanted: Any) -> bool:
    """Equal, numbers to 1e-4."""
    if isinstance(wanted, list | tuple):
        return len(got) == len(wanted) and all(map(same, got, wanted))
    if isinstance(wanted, float):
        return got == pytest.approx(wanted, abs=1e-4)
    return got == wanted


@pytest.mark.parametrize(
    ("size", "degrees"), [(1, {}), (2, {"tp": 2, "sequence_parallel": True}), (2, {"pp": 2})], ids=str
)
def test_the_results_are_those_of_lm_evals_hugging_face_model(
    size: int, degrees: dict[str, Any], ranks: RankPool, folder: Path, theirs: dict[str, Any]
) -> None:
    settings = settings_for(folder, parallel=ParallelConfig(**degrees))
    got = json.loads(ranks.run(size, ours, settings, timeout=LIMIT)[0])
    assert set(got["results"]) == set(TASKS)
    for task in TASKS:
        assert same(responses(got, task), responses(theirs, task)), task
        for name, value in theirs["results"][task].items():
            wanted = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert got["results"][task][name] == wanted, (task, name)
    answers = [text for (text,) in responses(theirs, "local_answer")]
    assert len(set(answers)) > 1 and not any("." in text for text in answers)
    written = sorted((folder / "run" / "eval_tasks").glob("step_00000012_*.json"))
    assert written and json.loads(written[-1].read_text())["step"] == 12


def test_the_results_during_training_are_in_the_metrics(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "eval_tasks/local_choice/acc" in row]
    assert [row["step"] for row in rows] == [4, 8, 12]
    assert {"eval_tasks/local_text/bits_per_byte", "eval_tasks/local_answer/exact_match"} <= rows[0].keys()
    bits = [row["eval_tasks/local_text/bits_per_byte"] for row in rows]
    assert bits[0] > bits[1] > bits[2]
    events = next((folder / "run" / "tensorboard").glob("events*")).read_bytes()
    assert b"eval_tasks/local_text/bits_per_byte" in events


def refusals(world: World, all_settings: list[EvaluateConfig]) -> list[str]:
    """The message of each evaluation (rank function)."""
    from launch.evaluate import tasks_rank

    messages = []
    for settings in all_settings:
        with pytest.raises(ValueError) as error:
            tasks_rank(world, settings)
        messages.append(str(error.value))
    return messages


def test_what_cannot_be_evaluated_is_one_message(ranks: RankPool, folder: Path) -> None:
    (folder / "other").mkdir()
    text = yaml.safe_load((folder / "tasks" / "local_text.yaml").read_text())
    text["dataset_kwargs"]["data_files"] = {"test": str(folder / "nothing.jsonl")}
    answer = yaml.safe_load((folder / "tasks" / "local_answer.yaml").read_text())
    for name, task in {
        "no_data": text,
        "too_long": answer | {"generation_kwargs": {"until": ["."], "max_gen_toks": 32}},
        "beams": answer | {"generation_kwargs": {"until": ["."], "max_gen_toks": 8, "num_beams": 4}},
    }.items():
        (folder / "other" / f"{name}.yaml").write_text(yaml.safe_dump(task | {"task": name}))
    (folder / "other" / "broken.yaml").write_text("task: one\n  x: [")
    wanted = {
        "has no chat template": {"apply_chat_template": True},
        "include_path=nowhere is not a directory": {"include_path": "nowhere"},
        "no_data cannot be loaded: FileNotFoundError": {"tasks": ["no_data"]},
        "no room for its prompt in train.sequence_length=32": {"tasks": ["too_long"]},
        "generation_kwargs num_beams are not supported": {"tasks": ["beams"]},
        "lm-eval has no task beans; nearest: beams, ": {"tasks": ["beans"]},
    }
    other = {"include_path": str(folder / "other")}
    settings = [settings_for(folder, **({} if "apply_chat_template" in c else other) | c) for c in wanted.values()]
    (messages,) = ranks.run(1, refusals, settings, timeout=LIMIT)
    for message, part in zip(messages, wanted, strict=True):
        assert part in message and "\n" not in message
    assert "broken.yaml is not valid YAML, line 2: " in messages[-1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_fewshot": 1}, r"num_fewshot needs tasks=\[\.\.\.\]"),
        ({"tasks": ["a"], "batches": 1}, r"batches needs held-out text"),
        ({"tasks": ["a"], "record_routing": "f"}, r"record_routing needs held-out text"),
        ({"tasks": ["a"], "batch_size": 0}, r"batch_size >= 1, but it is 0; nearest: 1"),
        ({"record_routing_weights": True}, "record_routing_weights needs record_routing"),
        ({"batches": 0}, "batches=0 must be >= 1"),
        ({"tasks": ["a"], "limit": 0}, r"limit > 0, but it is 0; nearest: null"),
    ],
    ids=str,
)
def test_settings_that_would_be_ignored_are_refused(settings: dict[str, Any], message: str) -> None:
    from launch.evaluate import main

    with pytest.raises(ValueError, match=message):
        main(EvaluateConfig(checkpoint="nowhere", **settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"record_routing": "there"}, r"record_routing=.*there exists already"),
        ({"record_routing": "no/file"}, r"record_routing=.*file: there is no folder .*no; create it"),
        ({"tasks": ["a"], "output": "there"}, r"output=.*there exists already"),
        ({"replay_routing": "ther"}, r"replay_routing=.*ther does not exist; did you mean .*there\?"),
        ({"replay_routing": ""}, r"replay_routing=.* is a directory; name a file"),
    ],
    ids=str,
)
def test_files_are_checked_before_the_model_is_loaded(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    from launch.evaluate import main

    (tmp_path / "there").write_text("kept")
    paths = {name: f"{tmp_path}/{value}" if isinstance(value, str) else value for name, value in settings.items()}
    with pytest.raises(ValueError, match=message):
        main(EvaluateConfig(checkpoint="nowhere", **paths))
    assert (tmp_path / "there").read_text() == "kept"


def test_without_lm_eval_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from conf import eval_rules, rules
    from conf.schema import Config
    from launch.evaluate import main

    monkeypatch.setattr(eval_rules, "lm_eval_is_installed", lambda: False)
    with pytest.raises(ValueError, match=r"lm-eval: it is not installed: bash launch/setup\.sh eval"):
        main(EvaluateConfig(checkpoint="nowhere", tasks=["arc_easy"]))
    with pytest.raises(ValueError, match=r"lm-eval, but it is not installed: bash .* nearest: eval_tasks\.tasks=\[\]"):
        rules.check(Config(eval_tasks=EvalTasksConfig(tasks=["arc_easy"])), 1)
