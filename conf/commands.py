"""The settings of the commands beside training, each with its default, as conf/schema.py has those of a run."""

from dataclasses import dataclass, field
from typing import Any

from conf.schema import Config, ParallelConfig


@dataclass
class CheckConfig(Config):
    """python -m launch.check: a training run, before it is one."""

    ranks: int | None = None
    """How many there are to be. null: the tasks of the Slurm job that this runs in, else NPROC, else the fewest that
    hold the layout."""


@dataclass
class PrepareConfig:
    """python -m launch.prepare: text files to Megatron's .bin/.idx."""

    input: Any = "???"
    """A file, a glob, or a list of them."""
    output: str = "???"
    """Prefix of the .bin and .idx files; the tokenizer goes beside them as PREFIX.tokenizer.json."""
    tokenizer: str | None = None
    """A tokenizer.json, or a directory that holds one. null: train one of vocab_size entries on the input."""
    vocab_size: int = 4096
    """Entries of the tokenizer that is trained."""
    tokenizer_sample_mib: int = 64
    """At most this much text trains the tokenizer, in MiB."""
    text_key: str = "text"
    """The field of .jsonl and .parquet rows that holds the text."""
    strict: bool = False
    """Stop at the first row that has no text, as data.strict does."""
    eod_token: str = "<|endoftext|>"
    """Token at the end of each document; added to a tokenizer that is trained."""


@dataclass
class HereMoe:
    backend: str | None = None
    """How the experts' matrix products run here, as in training. null: as recorded in the run."""


@dataclass
class HereModel:
    moe: HereMoe = field(default_factory=HereMoe)


@dataclass
class HereRuntime:
    timeout: float | None = None
    """Seconds that a rank waits for the others. null: as recorded in the run."""
    threads: int | None = None
    """CPU threads per rank. null: as recorded in the run."""


@dataclass
class Here:
    """How a trained model is computed here, whatever the layout it was trained under. Ranks are started as for
    training: NPROC=N, torchrun or srun."""

    model: HereModel = field(default_factory=HereModel)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    runtime: HereRuntime = field(default_factory=HereRuntime)
    extensions: list[str] = field(default_factory=list)
    """As in training: modules to import. Those that the run was trained with are not imported by themselves."""
    precision: str = "auto"
    """As in training, and independent of what the run was trained in: fp32, bf16, fp8 or auto."""


@dataclass
class OwnText:
    files: list[str] = field(default_factory=list)
    """Text files (.txt .jsonl .jsonl.gz .jsonl.zst .parquet) to evaluate on, all of each. Empty: the run's held-out
    text."""
    text_key: str = "text"
    """The field of .jsonl and .parquet rows that holds the text."""
    cache_dir: str | None = None
    """Where tokenised text is kept. null: as recorded in the run."""


@dataclass(kw_only=True)
class EvaluateConfig(Here):
    """python -m launch.evaluate: loss, perplexity and bits per byte of a checkpoint on held-out text."""

    checkpoint: str = "???"
    """A run directory (its newest whole checkpoint) or one step's directory."""
    data: OwnText = field(default_factory=OwnText)
    batches: int | None = None
    """Global batches of the run's size; null: all of the text."""


@dataclass(kw_only=True)
class GenerateConfig(Here):
    """python -m launch.generate: text from a checkpoint."""

    checkpoint: str = "???"
    """A run directory (its newest whole checkpoint) or one step's directory."""
    prompt: str = ""
    """What the text begins with, taken as it is typed."""
    max_tokens: int = 128
    """Tokens to write at most; the text ends earlier with its document."""
    temperature: float = 0.8
    """0: greedy, always the likeliest token."""
    top_k: int | None = None
    """Sample among the k likeliest tokens."""
    top_p: float | None = None
    """Sample among the likeliest tokens that together hold this probability."""
    seed: int = 1234
    """Of the sampling."""


@dataclass(kw_only=True)
class ImportConfig(Here):
    """python -m launch.import_hf: a run directory from a Hugging Face model."""

    source: str = "???"
    """A directory with config.json and safetensors, as `hf download` and save_pretrained make it."""
    output: str = "???"
    """The run directory to make; it must not exist. Nothing is there until all of it is right."""
    verify: bool = True
    """Compute logits and loss of both models and fail where they differ. false: nothing is proven."""
    precision: str = "fp32"
    """What both models are compared in: fp32 (differences up to 1e-4), or bf16 (1e-1 of the largest logit, 2e-2 nats),
    which needs half the memory."""
    eod_token: str | None = None
    """The token put after documents of text. null: the source's end of sequence."""
    sequence_length: int = 2048
    """Tokens of a sequence when the run is evaluated or writes text; fewer where the source's positions end before."""


@dataclass(kw_only=True)
class ExportConfig(Here):
    """python -m launch.export_hf: a Hugging Face model from a checkpoint."""

    checkpoint: str = "???"
    """A run directory (its newest whole checkpoint) or one step's directory."""
    output: str = "???"
    """The directory to make; it must not exist. Nothing is there until all of it is right."""
    verify: bool = True
    """Compute logits and loss of both models and fail where they differ. false: nothing is proven."""
    precision: str = "fp32"
    """What both models are compared in: fp32 (differences up to 1e-4), or bf16 (1e-1 of the largest logit, 2e-2 nats),
    which needs half the memory."""
    family: str | None = None
    """The model_type to write. null: that of the model that the run was imported from, else the first that fits."""
    dtype: str = "stored"
    """Of the weights: fp32, bf16, or stored, in which an import comes back bit for bit and a trained model is fp32."""
    shard_gib: float = 5.0
    """Largest file of weights, in GiB."""


@dataclass(kw_only=True)
class UpcycleConfig(Here):
    """python -m launch.upcycle: a sparse model whose experts are copies of a dense model's feed-forward layers (sparse
    upcycling, arXiv:2212.05055; fine-grained experts as in arXiv:2410.07524)."""

    checkpoint: str = "???"
    """A run directory (its newest whole checkpoint) or one step's directory, of a dense model."""
    output: str = "???"
    """The run directory to make; it must not exist."""
    num_experts: int = 8
    """Experts of a sparse layer: num_experts / granularity copies of the dense layer."""
    top_k: int = 2
    """Experts that a token visits. A multiple of granularity."""
    granularity: int = 1
    """Divides each copy into this many experts of ffn_hidden_size / granularity. The experts of a copy begin with the
    same router weights, so that a token visits whole copies at first (a virtual group, arXiv:2410.07524)."""
    every: int = 1
    """As model.moe.every: which layers become sparse."""
    first_dense_layers: int = 0
    """As model.moe.first_dense_layers: the first layers that stay dense."""
    renormalize: bool | None = None
    """As model.moe.renormalize. If the gates of a token add up to 1 (null with top_k > 1, or true), the sparse model
    first computes what the dense one does."""
    noise: float = 0.0
    """Standard deviation of noise added to every expert's weights, relative to that of the weights: breaks the symmetry
    between copies. 0: none."""
    seed: int = 1234
    """Of the router's initial weights and of the noise."""
    verify: bool = True
    """Compute logits and loss of both models, and fail where they should be equal and are not."""
    precision: str = "fp32"
    """What both are compared in: fp32 (differences up to 1e-5), or bf16 (1e-1 of the largest logit, 2e-2 nats)."""
