"""The steps of a preparation pipeline by name, and the options that each takes."""

import importlib.util
import inspect
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

from conf.registry import Registry


@dataclass(frozen=True)
class StepKind:
    """A step that `prepare.steps` can name. Its class is imported when it is used, since datatrove is optional."""

    name: str
    module: str
    attribute: str
    """The class of the step, of datatrove's BaseFilter or BaseFormatter; of a deduplication, its configuration."""
    does: Literal["filter", "deduplicate"] = "filter"
    packages: tuple[str, ...] = ()
    """Modules that it imports besides datatrove."""
    unused: tuple[str, ...] = ("exclusion_writer", "batch_size", "norm_config", "hash_config", "index")
    """Parameters of the class that are not options of the step."""
    more: dict[str, Any] = field(default_factory=dict)
    """Further options, with their defaults."""

    def load(self) -> Callable[..., Any]:
        return getattr(importlib.import_module(self.module), self.attribute)

    def options(self) -> dict[str, Any]:
        """The options, with their defaults."""
        parameters = inspect.signature(self.load()).parameters.values()
        return {p.name: p.default for p in parameters if p.name not in self.unused} | self.more


_FILTERS = "datatrove.pipeline.filters"
_WORDS = ("spacy",)

STEPS = Registry(
    "step of a preparation",
    StepKind("normalize", "corpus.pipeline.normalize", "Normalize"),
    StepKind("gopher_quality", f"{_FILTERS}.gopher_quality_filter", "GopherQualityFilter", packages=_WORDS),
    StepKind("gopher_repetition", f"{_FILTERS}.gopher_repetition_filter", "GopherRepetitionFilter", packages=_WORDS),
    StepKind("c4", f"{_FILTERS}.c4_filters", "C4QualityFilter", packages=_WORDS),
    StepKind("fineweb", f"{_FILTERS}.fineweb_quality_filter", "FineWebQualityFilter", packages=_WORDS),
    StepKind("language", "corpus.pipeline.language", "Language"),
    StepKind("code_lines", "corpus.pipeline.code_rules", "CodeLines"),
    StepKind("code_generated", "corpus.pipeline.code_rules", "CodeGenerated"),
    StepKind("code_license", "corpus.pipeline.code_rules", "CodeLicense"),
    StepKind("pii", "datatrove.pipeline.formatters.pii", "PIIFormatter"),
    StepKind("decontaminate", "corpus.pipeline.decontamination", "Decontaminate", packages=_WORDS),
    StepKind("exact", "corpus.pipeline.deduplication", "Exact", does="deduplicate"),
    StepKind(
        "minhash",
        "datatrove.pipeline.dedup.minhash",
        "MinhashConfig",
        does="deduplicate",
        packages=_WORDS,
        more={"language": "eng"},
    ),
)


@dataclass(frozen=True)
class Step:
    """A step of a pipeline, as the settings have it."""

    name: str
    options: dict[str, Any]

    @property
    def kind(self) -> StepKind:
        return STEPS[self.name]

    def make(self) -> Any:
        """An object of the class of the step.

        Raises:
            ValueError: an option has a value that the class does not take.
        """
        options = {key: _tuples(value) for key, value in self.options.items() if key not in self.kind.more}
        try:
            return self.kind.load()(**options)
        except (ImportError, TypeError) as error:
            raise ValueError(f"prepare.steps: {self.name}: {error}") from error


def read_steps(given: Sequence[Any]) -> list[Step]:
    """The steps of `prepare.steps`: each is a name, or a name with options, {gopher_quality: {min_doc_words: 20}}.

    Raises:
        ValueError: an unknown step or option, a package that is missing, or a value of another type.
    """
    steps = []
    for number, entry in enumerate(given, start=1):
        if isinstance(entry, str):
            entry = {entry: None}
        if not isinstance(entry, dict) or len(entry) != 1:
            raise ValueError(
                f"prepare.steps: step {number} is {entry!r}, but a step is a name, or a name with its options: "
                "{gopher_quality: {min_doc_words: 20}}"
            )
        ((name, options),) = entry.items()
        step = Step(_known(str(name), STEPS, "step"), dict(options or {}))
        _check_packages(step.kind)
        _check_options(step)
        steps.append(step)
    return steps


def check_installed(executor: str | None = None) -> None:
    """Raises ValueError if datatrove, or what an executor needs, is not installed."""
    if executor == "ray" and importlib.util.find_spec("ray") is None:
        raise ValueError('executor=ray needs Ray: pip install "ray[default]"')
    if executor == "slurm" and shutil.which("sbatch") is None:
        raise ValueError("executor=slurm needs Slurm's sbatch, which is not on this machine; executor=local needs none")
    if importlib.util.find_spec("datatrove") is None:
        raise ValueError("executor= and prepare.steps need datatrove: bash launch/setup.sh data")


def _check_packages(kind: StepKind) -> None:
    check_installed()
    for package in kind.packages:
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"prepare.steps: {kind.name} needs {package}: bash launch/setup.sh data")


def _check_options(step: Step) -> None:
    defaults = step.kind.options()
    for key, value in step.options.items():
        _known(key, defaults, f"option of {step.name}")
        default = defaults[key]
        if not _alike(value, default):
            raise ValueError(
                f"prepare.steps: {step.name}: {key}={value!r} is a {type(value).__name__}, but its default is "
                f"{default!r}"
            )
    step.make()


def _known(name: str, known: Any, what: str) -> str:
    if name in known:
        return name
    near = get_close_matches(name, list(known), n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known) or 'none'}"
    raise ValueError(f"prepare.steps: there is no {what} {name}; {hint}")


def _alike(value: Any, default: Any) -> bool:
    """Whether a value may stand for the default: of its type, or either is null."""
    if value is None or default is None or default is inspect.Parameter.empty:
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    if isinstance(default, tuple | list):
        return isinstance(value, list | str)
    return isinstance(value, type(default))


def _tuples(value: Any) -> Any:
    """Lists as tuples, as datatrove has them."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
