"""The typed settings of the commands other than training, as conf/schema.py has those of a run."""

from dataclasses import dataclass, field
from typing import Any

from conf.eval_schema import TaskSettings
from conf.schema import Config, ModelConfig, ParallelConfig


@dataclass
class CheckConfig(Config):
    """python -m launch.check: validates a training run before it is submitted."""

    ranks: int | None = None
    """Number of ranks. null: the tasks of the surrounding Slurm job, else NPROC, else the smallest number that fits the
    layout."""


@dataclass
class PlanOptions:
    imbalance: float = 1.2
    """Rows of the experts on the fullest rank, relative to the mean: 1 with forced balance."""
    gpu_mtbf_hours: float = 50_000.0
    """Hours of a GPU per failure that ends the job, whatever part of the machine fails. The default is that of
    Llama 3's pre-training (arXiv:2407.21783, section 3.3.4): 419 unexpected interruptions of 16,384 GPUs in 54 days."""
    restart_minutes: float = 10.0
    """Minutes from a failure to the first step after it, without the time of reading the checkpoint."""


@dataclass
class PlanConfig(Config):
    """python -m launch.plan: the fastest layouts of a model on a cluster that fit into memory. Settings that are given
    (parallel.*, train.micro_batch_size, model.recompute, optim.cpu_offload) are kept, the others searched."""

    ranks: int | None = None
    """Number of GPUs. null: nodes * cluster.ranks_per_node."""
    nodes: int | None = None
    """Number of nodes."""
    goal: str = "throughput"
    """throughput, or memory: the layouts that take least of it first."""
    format: str = "table"
    """table or json."""
    plot: str | None = None
    """File of a chart of memory and time by part, such as plan.png. null: none."""
    budget: float | None = None
    """FLOPs of a training run: prints the compute-optimal parameters and tokens of published scaling laws instead of
    layouts."""
    plan: PlanOptions = field(default_factory=PlanOptions)


@dataclass
class PrepareStepsConfig:
    steps: list[Any] = field(default_factory=list)
    """Filters and deduplications in order, each a name or {name: {option: value}} (docs/guides/data.md). Needs
    executor."""


@dataclass
class PrepareSlurmConfig:
    partition: str | None = None
    """Partition of the jobs. null: the cluster's default."""
    time: str = "24:00:00"
    """Time limit of a task, as of sbatch --time."""
    cpus_per_task: int = 1
    """CPUs of a task."""
    mem_per_cpu_gb: int = 4
    """Memory per CPU of a task, in GB."""
    sbatch: list[str] = field(default_factory=list)
    """Further options of sbatch: [--account=lab,--qos=cpu]."""


@dataclass
class PrepareConfig:
    """python -m launch.prepare: tokenises text files into Megatron token files (.bin/.idx)."""

    input: Any = "???"
    """Text files: a path, a glob, a folder, or a list of these. Input and output may be URLs (s3://, gs://, hf://)."""
    output: str = "???"
    """Prefix of the .bin and .idx files; the tokenizer is written to PREFIX.tokenizer.json. With executor: a folder of
    shards with a manifest."""
    tokenizer: str | None = None
    """Path of a tokenizer, as data.tokenizer. null: train one of vocab_size tokens on the input."""
    vocab_size: int = 4096
    """Vocabulary size of a tokenizer that is trained."""
    tokenizer_sample_mib: int = 64
    """Maximum size of the text that the tokenizer is trained on, in MiB."""
    text_key: str = "text"
    """Name of the field that holds the text of a row, as data.text_key."""
    strict: bool = False
    """Stop at the first row without text or damaged file, as data.strict."""
    eod_token: str = "<|endoftext|>"
    """End-of-document token, appended to every document and part of a tokenizer that is trained."""
    executor: str | None = None
    """What runs the tasks: local (processes of this machine), slurm (job arrays) or ray. null: this process, without
    steps and shards."""
    workers: int = 1
    """Number of tasks that run at the same time. It does not change the result. Needs executor."""
    task_mib: float = 256.0
    """Input of a task in MiB: files that follow each other, and at least one. Each task writes a shard. Needs
    executor."""
    samples: int = 3
    """Samples of removed text in summary.json, for each step and reason. Needs executor."""
    prepare: PrepareStepsConfig = field(default_factory=PrepareStepsConfig)
    slurm: PrepareSlurmConfig = field(default_factory=PrepareSlurmConfig)


@dataclass
class InferenceMoeConfig:
    backend: str | None = None
    """Implementation of the experts' matrix products, as in training. null: that of the run."""


@dataclass
class InferenceModelConfig:
    moe: InferenceMoeConfig = field(default_factory=InferenceMoeConfig)


@dataclass
class InferenceRuntimeConfig:
    timeout: float | None = None
    """Seconds that a rank waits for the other ranks. null: that of the run."""
    threads: int | None = None
    """CPU threads per rank. null: that of the run."""


@dataclass
class InferenceConfig:
    """How a trained model is run, independent of the layout that it was trained with. Ranks are started as in training:
    NPROC=N, torchrun or srun."""

    model: InferenceModelConfig = field(default_factory=InferenceModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    runtime: InferenceRuntimeConfig = field(default_factory=InferenceRuntimeConfig)
    extensions: list[str] = field(default_factory=list)
    """As in training: modules to import. Those that the run was trained with are not imported by themselves."""
    precision: str = "auto"
    """fp32, bf16, fp8 or auto, as in training; independent of the precision of the run."""


@dataclass
class EvaluateDataConfig:
    files: list[str] = field(default_factory=list)
    """Text files to evaluate on, as data.files of a run. Empty: the held-out text of the run."""
    text_key: str = "text"
    """Name of the field that holds the text of a row, as data.text_key of a run."""
    cache_dir: str | None = None
    """Directory in which tokenised text is cached. null: that of the run."""


@dataclass(kw_only=True)
class EvaluateConfig(InferenceConfig, TaskSettings):
    """python -m launch.evaluate: loss, perplexity and bits per byte of a checkpoint on held-out text, or its results on
    evaluation tasks of lm-eval."""

    checkpoint: str = "???"
    """Run directory (its newest intact checkpoint is used), or the directory of one step."""
    data: EvaluateDataConfig = field(default_factory=EvaluateDataConfig)
    batches: int | None = None
    """Number of global batches of the run's size. null: all of the text."""
    output: str | None = None
    """JSON file for the results of tasks, besides that in the run directory. null: none."""
    log_samples: bool = False
    """Write prompts, answers and log-likelihoods of every sample of tasks, too."""
    record_routing: str | None = None
    """File to write the routing of the held-out text to: the experts of every token in every sparse layer
    (docs/guides/router_replay.md). null: none."""
    record_routing_weights: bool = False
    """Write the gates, too. Needs record_routing."""
    replay_routing: str | None = None
    """File of recorded routing: every token goes to the experts recorded there, whatever the router prefers. null:
    none."""


@dataclass(kw_only=True)
class InspectConfig(InferenceConfig):
    """python -m launch.inspect: a page about the router of a run."""

    checkpoint: str = "???"
    """Run directory (its newest intact checkpoint is used), or the directory of one step."""
    compare: str | None = None
    """Another one, shown beside it."""
    text: str | None = None
    """Text file whose tokens are shown. null: the run's held-out text."""
    tokens: int = 2048
    """Number of tokens that are shown."""
    output: str | None = None
    """HTML file to write. null: the name of the run, in the current directory."""


@dataclass(kw_only=True)
class SamplingConfig(InferenceConfig):
    """How text is generated from a checkpoint."""

    checkpoint: str = "???"
    """Run directory (its newest intact checkpoint is used), or the directory of one step."""
    max_tokens: int = 128
    """Maximum number of tokens to generate; generation stops earlier at the end-of-document token."""
    temperature: float = 0.8
    """Sampling temperature. 0: greedy decoding."""
    top_k: int | None = None
    """Sample from the k most likely tokens. null: from all tokens."""
    top_p: float | None = None
    """Sample from the smallest set of most likely tokens with at least this total probability. null: from all
    tokens."""
    seed: int = 1234
    """Seed of the sampling."""
    stop: list[str] = field(default_factory=list)
    """Strings that end a text; they are no part of it."""


@dataclass(kw_only=True)
class GenerateConfig(SamplingConfig):
    """python -m launch.generate: generates text from a checkpoint."""

    prompt: str = ""
    """Beginning of the text; taken literally."""
    prompts: str | None = None
    """File of prompts: .txt, one a line, or .jsonl, with `prompt` or `messages` in each row. null: `prompt` alone."""
    output: str | None = None
    """JSONL file to write, a row for each text; it must not exist. null: print the texts."""
    samples: int = 1
    """Number of texts per prompt."""
    batch_size: int = 8
    """Number of texts that are generated together; it does not change them."""
    router_trace: str | None = None
    """JSONL file to write, a row for each token: its experts and their weights in every sparse layer. null: none."""


@dataclass(kw_only=True)
class ChatConfig(SamplingConfig):
    """python -m launch.chat: a conversation with a model in the terminal."""

    max_tokens: int = 512
    """Maximum number of tokens of an answer; it stops earlier at the end of the turn."""
    system: str | None = None
    """System message at the beginning of the conversation. null: none."""


@dataclass(kw_only=True)
class ImportConfig(InferenceConfig):
    """python -m launch.import_hf: converts a Hugging Face model to a run directory."""

    source: str = "???"
    """Directory with config.json and safetensors files, as written by `hf download` and save_pretrained."""
    output: str = "???"
    """Run directory to create; it must not exist. It appears only when the conversion has succeeded."""
    verify: bool = True
    """Compare logits and loss of both models, and fail if they differ. false: do not compare."""
    precision: str = "fp32"
    """Precision of the comparison: fp32 (tolerance 1e-4), or bf16 (1e-1 of the largest logit, 2e-2 nats), which needs
    half the memory."""
    eod_token: str | None = None
    """End-of-document token. null: the end-of-sequence token of the source."""
    sequence_length: int = 2048
    """Sequence length in tokens for evaluation and generation, limited to the maximum position of the source."""
    adapter: str | None = None
    """Directory of an adapter of peft (LoRA): output is then a run of adapters, and source the run directory of their
    base, or of one of its steps. null: source is a model."""


@dataclass(kw_only=True)
class ImportMegatronConfig:
    """python -m launch.import_megatron: converts the weights of a torch_dist checkpoint of Megatron-Core to a run
    directory."""

    model: ModelConfig = field(default_factory=ModelConfig)
    source: str = "???"
    """Directory with .metadata and .distcp files, or Megatron-LM's --save directory (its latest checkpoint is used)."""
    output: str = "???"
    """Run directory to create; it must not exist. It appears only when the conversion has succeeded."""
    tokenizer: str | None = None
    """Path of the model's tokenizer.json, or of a directory with one. null: the run has none."""
    eod_token: str = "<|endoftext|>"
    """End-of-document token of the tokenizer."""
    sequence_length: int = 2048
    """Sequence length in tokens for evaluation and generation."""
    extensions: list[str] = field(default_factory=list)
    """As in training: modules to import."""


@dataclass(kw_only=True)
class ExportConfig(InferenceConfig):
    """python -m launch.export_hf: converts a checkpoint to a Hugging Face model."""

    checkpoint: str = "???"
    """Run directory (its newest intact checkpoint is used), or the directory of one step."""
    output: str = "???"
    """Directory to create; it must not exist. It appears only when the conversion has succeeded."""
    verify: bool = True
    """Compare logits and loss of both models, and fail if they differ. false: do not compare."""
    precision: str = "fp32"
    """Precision of the comparison: fp32 (tolerance 1e-4), or bf16 (1e-1 of the largest logit, 2e-2 nats), which needs
    half the memory."""
    family: str | None = None
    """model_type to write. null: that of the model that the run was imported from, else the first one that fits."""
    dtype: str = "stored"
    """Type of the weights: fp32, bf16, or stored: imported weights keep their type, trained ones are fp32."""
    shard_gib: float = 5.0
    """Maximum size of a weight file, in GiB."""
    merge: bool = False
    """Of a run with adapters: add them to the weights, in fp32, and write the whole model."""
    adapter: bool = False
    """Of a run with adapters: write them alone, as adapter_config.json and adapter_model.safetensors of peft."""


@dataclass(kw_only=True)
class UpcycleConfig(InferenceConfig):
    """python -m launch.upcycle: a sparse model whose experts are copies of a dense model's feed-forward layers (sparse
    upcycling, arXiv:2212.05055; fine-grained experts as in arXiv:2410.07524)."""

    checkpoint: str = "???"
    """Run directory (its newest intact checkpoint is used), or the directory of one step, of a dense model."""
    output: str = "???"
    """Run directory to create; it must not exist."""
    num_experts: int = 8
    """Number of experts per sparse layer: num_experts / granularity copies of the dense layer."""
    top_k: int = 2
    """Number of experts that each token is routed to. A multiple of granularity."""
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
