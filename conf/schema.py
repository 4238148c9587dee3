"""The typed settings of a run, with their units and defaults. The settings of the model are in conf/model_schema.py,
conf/moe_schema.py and conf/rope_schema.py, those of FP8 in conf/fp8_schema.py, of adapters in conf/lora_schema.py, of
preferences in conf/preference_schema.py, of evaluation tasks in conf/eval_schema.py and of the machine in
conf/cluster_schema.py.

Defaults are defined in these files only; the YAML files in conf/GROUP/ are presets, which override some of them.
Nothing heavy is imported here, so that a configuration can be read and checked on a login node without PyTorch.
"""

from dataclasses import dataclass, field

# All names of the schema are importable from this module.
from conf.cluster_schema import ClusterConfig, SlurmConfig
from conf.eval_schema import EvalTasksConfig
from conf.fp8_schema import Fp8Config
from conf.lora_schema import LoraConfig
from conf.model_schema import ACTIVATIONS, RECOMPUTE, ModelConfig  # noqa: F401
from conf.moe_schema import DROP_POLICIES, LOAD_BALANCING, MoeConfig  # noqa: F401
from conf.preference_schema import OBJECTIVES, PREFERENCE_LOSSES, PreferenceConfig  # noqa: F401
from conf.rope_schema import RopeScalingConfig  # noqa: F401
from conf.setting import setting

DATA_KINDS = ("stdlib", "text", "megatron", "blend", "chat", "preference")
LOGGERS = ("tensorboard", "wandb", "mlflow")
OPTIMIZERS = ("adamw", "muon")
MUON_ITERATIONS = 5
"""Newton-Schulz iterations of Muon's directions (Jordan et al. 2024; arXiv:2502.16982, section 2.1)."""
PRECISIONS = ("auto", "fp32", "bf16", "fp8")
SCHEDULES = ("cosine", "linear", "wsd", "constant")


@dataclass
class ParallelConfig:
    """Degrees of parallelism. The data-parallel size is world_size / (tp * pp * cp)."""

    tp: int = setting(1, ge=1)
    """Tensor-parallel size: attention heads, dense feed-forward layers and the vocabulary are sharded over tp ranks."""
    sequence_parallel: bool = False
    """Shard activations outside of the tensor-parallel layers along the sequence over the tp ranks. Needs tp > 1."""
    pp: int = setting(1, ge=1)
    """Pipeline-parallel size: the number of pipeline stages."""
    vpp: int | None = setting(None, ge=2)
    """Virtual pipeline size: model chunks per stage in the interleaved schedule. Needs pp > 1. null: no
    interleaving."""
    pp_layers: list[int] | None = None
    """Number of layers of each pipeline stage, for example [3, 5]. With vpp, one number for each of the pp * vpp model
    chunks, in model order. The first may be 0, a chunk of the embedding alone, and the last, of the output layer alone
    with the layers for multi-token prediction. null: the same number in each. Needs pp > 1."""
    pp_layout: str | None = None
    """The same as text, in the notation of Megatron-Core's pipeline_model_parallel_layout, for example
    "E|(tt|)*30t|mL": E the embedding, t a layer, m a layer for multi-token prediction, L the output layer and the loss,
    | between chunks. Every m is in the last chunk. null: as pp_layers. Needs pp > 1."""
    cp: int = setting(1, ge=1)
    """Context-parallel size: each sequence is sharded over cp ranks."""
    cp_comm_type: str = setting("all_gather", choices=("all_gather", "p2p", "a2a"))
    """How the ranks of cp attend in training, as Megatron-Core's setting of this name: all_gather, p2p or a2a.
    all_gather: each gathers keys and values of the whole sequence; with every attention. p2p: TransformerEngine passes
    keys and values from rank to rank while it attends, and no rank holds them all; without windows and sinks. a2a:
    TransformerEngine gives each rank some heads of all tokens; the heads and query groups of a rank are divisible by
    cp; also with windows and sinks, with documents or chunks from TransformerEngine 2.10 on, and with these and sinks
    from 2.12 and cuDNN 9.18 on. Evaluation by launch.evaluate, and text generation, always gather. p2p and a2a have not
    run on a GPU yet. Needs cp > 1."""
    ep: int = setting(1, ge=1)
    """Expert-parallel size: the experts of a layer are distributed over ep ranks of the same pipeline stage."""
    etp: int = setting(1, ge=1)
    """Expert-tensor-parallel size: the hidden dimension of each expert is sharded over etp ranks."""
    optimizer_instances: int = setting(1, ge=1)
    """Number of groups of data-parallel ranks that each hold all gradient and optimizer shards (Megatron-Core's
    num_distributed_optimizer_instances; hybrid sharding, HSDP). Parameters are then gathered, and gradients
    reduce-scattered, within a group; the groups all-reduce their gradient shards. A rank keeps as many times more
    optimizer state. Must divide the data-parallel sizes, of the experts too."""
    overlap_grad_reduce: bool | None = None
    """Reduce gradient buckets over the data-parallel ranks during the backward pass. null: on GPUs only."""
    overlap_param_gather: bool | None = None
    """Gather updated parameters bucket by bucket during the next forward pass. Needs overlap_grad_reduce. null: as
    overlap_grad_reduce."""
    auto: bool = False
    """Choose tp, sequence_parallel, pp, vpp, pp_layers, cp, ep and etp at each start, for the ranks that there are: the
    fastest layout of launch.plan that fits, or the simplest where it has no rates of the GPUs. Micro-batch and global
    batch stay as they are; model.recompute and optim.cpu_offload are set where nothing fits without. parallel=auto sets
    it."""


@dataclass
class BlendPart:
    """One data set of data=blend."""

    weight: float = 1.0
    """Share of the training samples, relative to the other parts; with data.temperature, of what its tokens give it. Of
    a part with epochs: how densely the stage takes them, relative to the other stages (data.stages)."""
    epochs: float | None = None
    """How often the run passes through the part, for example 2.5: its samples are spread evenly over train.steps, and
    the parts that have weights share the others. null: as often as its weight gives."""
    kind: str = "text"
    """stdlib, text, megatron or chat, as data.kind."""
    files: list[str] = field(default_factory=list)
    """Paths or globs (text, chat), or prefixes without .bin/.idx (megatron)."""
    name: str = ""
    """Name in the metrics. Empty: number and kind, such as 0_text."""


@dataclass
class BlendStage:
    """Weights of data=blend from a step on."""

    step: int = 2
    """The first optimizer step that takes samples by these weights."""
    weights: list[float] = field(default_factory=list)
    """The weight of each part of data.blend, in its place; 0 leaves the part out. Of a part with epochs: how densely
    the stage takes them; with weight: 0 in data.blend and 1 here, the stage takes all of them."""


@dataclass
class DataConfig:
    kind: str = setting("stdlib", choices=DATA_KINDS)
    """Source of the data: stdlib, text, megatron, blend, chat or preference. stdlib: the source files of the running
    Python's standard library. text: files in the formats of docs/guides/data.md. megatron: Megatron token files
    (.bin/.idx pairs). blend: a weighted mixture of these. chat: conversations, whose assistant's tokens are trained on
    (docs/guides/fine_tuning.md). preference: ranked responses to prompts, for train.objective=dpo and reward
    (docs/guides/preferences.md)."""
    files: list[str] = field(default_factory=list)
    """Paths, globs or folders (text, chat, preference), or prefixes without .bin/.idx (megatron). Each may be a URL
    (s3://, gs://, hf://): text is read where it is, token files as data.objects says."""
    valid_files: list[str] = field(default_factory=list)
    """Held-out files, or prefixes for megatron data. Empty: valid_fraction of the documents is held out instead."""
    valid_fraction: float = setting(0.02, gt=0, lt=1)
    """Fraction of the documents that is held out. They are selected by a hash of the path (stdlib) or of the document
    (text), or are the last ones (megatron). If the hash selects no document of a text corpus, the document with the
    smallest hash is held out if it is short, otherwise only its end: this fraction of all characters, at least 4,096
    and at most a quarter of the document."""
    text_key: str = "text"
    """Field of a row that holds its text, a string or a list of lines. `a.b`: field b of the object in a."""
    strict: bool = False
    """Stop at the first row without text (null, another type, no such field, invalid JSON), or of chats without a
    valid conversation, at a damaged file, and at a token file shorter than a sequence. false: leave such rows, and
    files from where they are damaged, out and report their number and positions; data of which nothing is left is an
    error in both cases."""
    tokenizer: str | None = None
    """Path of a Hugging Face tokenizer.json, or of a directory that holds one, or whose files Transformers converts to
    one (the run keeps its settings and chat template too), or of a file of SentencePiece (.model) or tiktoken
    (.tiktoken), which is converted. Files may be URLs. null: train a byte-level BPE of model.vocab_size tokens on the
    training documents and cache it."""
    tokenizer_sample_mib: int = setting(64, ge=1)
    """Maximum size in MiB of the text that the tokenizer is trained on: the beginning of every file, by its size."""
    eod_token: str = "<|endoftext|>"
    """End-of-document token, appended to every document."""
    document_mask: bool = False
    """Reset attention and positions at document boundaries."""
    blend: list[BlendPart] = field(default_factory=list)
    """The parts of data=blend: [{weight: 1, kind: text, files: [PATH]}, ...]."""
    temperature: float | None = setting(None, ge=0.05)
    """Lets the size of a part of data=blend count: its share is proportional to weight * tokens^(1 / temperature). 1:
    parts of equal weight pass through their epochs at the same rate, and weights are relative numbers of epochs. Larger
    values favour small parts. null: the weights alone count. Parts with epochs are left as they are."""
    stages: list[BlendStage] = field(default_factory=list)
    """Other weights of data=blend from later steps on: [{step: 8001, weights: [1, 4]}, ...]. Stages of later steps can
    be added to a run, without a change to the samples of earlier ones."""
    packing_strategy: str = setting("concatenate", choices=("concatenate", "best_fit"))
    """How documents fill sequences (of other data than chat and preference): concatenate or best_fit. concatenate: one
    after the other, cut wherever a sequence ends. best_fit: only documents longer than a sequence are cut, into full
    sequences; the remainders are packed by best-fit decreasing (arXiv:2404.10830) in windows of 2^18 shuffled
    documents, and the rest of a sequence is padding. No label then belongs to another document. The share of documents
    that are cut, and of padding, is printed. Held-out text is concatenated in both cases."""
    packing: bool = True
    """With data=chat or a part of kind chat, whether several conversations share a sequence, each attending to itself
    alone (which needs data.document_mask). They are packed by best-fit decreasing in windows of shuffled conversations.
    false: one conversation per sequence. The rest of a sequence is padding."""
    too_long: str = setting("truncate", choices=("truncate", "drop"))
    """What happens to conversations with more than train.sequence_length + 1 tokens: truncate (the end is left out) or
    drop. Their number is printed."""
    chat_template: str | None = None
    """File with the Jinja template of conversations. null: that of the tokenizer's directory, or else a plain one that
    needs no special token but the one that ends a document."""
    cache_dir: str = "~/.cache/switchyard"
    """Directory in which tokenizers and token files are cached. Entries are addressed by content and verified by hash.
    Without write permission existing entries are still used. Users who share a cache must trust each other: whoever can
    write to it can change the training data. One process of each node writes to it: a directory on the node's own disk
    works as well as one that the nodes share."""
    objects: str = setting("stream", choices=("stream", "copy"))
    """How token files at URLs are read. stream: the first step waits for their index and its own blocks; blocks are
    requested 2 * data.read_ahead steps before they are read, checked then, and kept in data.cache_dir. copy: whole
    files are copied into data.cache_dir and checked before the first step."""
    read_ahead: int = setting(2, ge=0)
    """Steps whose batches each rank holds ready, read by a thread while earlier steps are computed. 0: a step reads its
    batches itself. data_wait in metrics.jsonl is what a step still waits for them."""


@dataclass
class TrainConfig:
    objective: str = setting("language_modeling", choices=OBJECTIVES)
    """What is minimised: language_modeling, dpo or reward. language_modeling: the cross-entropy of the next token. dpo:
    a loss on pairs of responses, against the weights that the run starts from (preference.loss). reward: the ranking
    loss of a reward model. The last two, and those that an extension adds (CONTRIBUTING.md, Extending), need
    data=preference."""
    steps: int = setting(200, ge=1)
    """Optimizer steps of the whole schedule."""
    micro_batch_size: int = setting(4, ge=1)
    """Sequences per micro-batch and data-parallel rank."""
    global_batch_size: int = setting(32, ge=1)
    """Sequences per optimizer step, over all data-parallel ranks and micro-batches."""
    sequence_length: int = setting(256, ge=1)
    """Sequence length in tokens."""
    seed: int = setting(1234, ge=0)
    """Seed of the initial weights, sample order, dropout and router noise."""
    deterministic: bool = False
    """Use deterministic algorithms only: repeated runs give bitwise equal results."""
    stop_after: int | None = setting(None, ge=1)
    """Write a checkpoint and stop after this step; the learning-rate schedule still spans `steps`. null: never."""
    log_every: int = setting(1, ge=1)
    """Optimizer steps between lines of metrics.jsonl."""
    profile: list[int] | None = None
    """[first, last]: record a torch profiler trace of these steps, both included. null: no trace."""


@dataclass
class OptimConfig:
    """AdamW (arXiv:1711.05101) or Muon (arXiv:2502.16982). Norm weights and biases have no weight decay."""

    name: str = setting("adamw", choices=OPTIMIZERS)
    """adamw, muon, or one that an extension adds (CONTRIBUTING.md, Extending). muon: the matrices of attention,
    feed-forward layers and experts, each by itself, are updated by Muon, scaled so that lr and weight_decay mean the
    same for both (arXiv:2502.16982, eq. 4); embeddings, output layer, routers, norms and biases by AdamW."""
    lr: float = setting(2e-3, gt=0)
    """Peak learning rate."""
    min_lr: float | None = setting(None, ge=0)
    """Learning rate at the end of the schedule. null: lr / 10."""
    router_lr_scale: float = setting(1.0, gt=0)
    """Learning rate of routers in multiples of lr. Below 1, assignments change less from step to step, and the load
    stays more even at high rates (docs/stability.md)."""
    expert_lr_scale: float = setting(1.0, gt=0)
    """Learning rate of the routed experts' weights in multiples of lr; each expert sees only some of the tokens."""
    warmup_steps: int = setting(30, ge=0)
    """Steps of linear warm-up from 0. May exceed train.steps."""
    schedule: str = setting("cosine", choices=SCHEDULES)
    """Decay after the warm-up: cosine, linear, wsd (constant, then linear over the last decay_fraction of the steps) or
    constant."""
    decay_fraction: float = setting(0.2, gt=0, le=1)
    """Fraction of the steps over which schedule=wsd decays."""
    weight_decay: float = setting(0.1, ge=0)
    """Decoupled weight decay."""
    beta1: float = setting(0.9, ge=0, lt=1)
    """Decay rate of the first moment."""
    beta2: float = setting(0.95, ge=0, lt=1)
    """Decay rate of the second moment."""
    eps: float = setting(1e-8, gt=0)
    """Term added to the square root of the second moment."""
    muon_momentum: float = setting(0.95, ge=0, lt=1)
    """Decay rate of Muon's momentum, which is Nesterov's. The default is that of arXiv:2502.16982."""
    muon_split_qkv: bool = True
    """Whether Muon takes the projections to queries, to keys and to values for three matrices. false: for one, as
    attention stores them. Latent attention's projections are separate."""
    clip_grad: float = setting(1.0, ge=0)
    """Maximum global gradient norm. 0: no clipping."""
    frozen: list[str] = field(default_factory=list)
    """Parameters that are not trained: patterns of their names in a checkpoint, such as 'layers.*.attention.*' or
    'embedding.weight'. '!PATTERN' exempts parameters of an earlier pattern: ['*', '!*.router.*'] trains only the
    routers. Frozen parameters need no gradients and no optimizer states."""
    grad_dtype: str = setting("fp32", choices=("fp32", "bf16"))
    """Type in which gradients are accumulated and reduced: fp32, or bf16 (2 instead of 4 bytes per parameter). Applies
    to parameters in bf16; the router's gradients stay in fp32. The measured effect on the loss, of this and of
    state_dtype, is below 0.25 % (docs/stability.md)."""
    state_dtype: str = setting("fp32", choices=("fp32", "bf16"))
    """Type of Adam's moments: fp32, or bf16 (4 instead of 8 bytes per parameter) with the update computed in fp32 and
    rounded stochastically, equally under every layout. Master weights stay in fp32. Checkpoints hold the type of the
    run that wrote them and are converted on load."""
    cpu_offload: bool = False
    """Keep moments and fp32 master weights in pinned host memory. The update streams them through the GPU block by
    block, with bitwise equal results, and takes as long as these transfers. No effect on CPUs."""


@dataclass
class EvalConfig:
    every: int = setting(50, ge=0)
    """Optimizer steps between evaluations on the held-out text. 0: only at the end."""
    batches: int = setting(2, ge=1)
    """Global batches per evaluation during training."""
    final_batches: int | None = setting(None, ge=1)
    """Global batches of the final evaluation. null: all of the held-out text."""
    by_part: bool = False
    """Evaluate the held-out text of each part of data=blend by itself as well: val_loss/NAME in metrics.jsonl. An
    evaluation then takes that many global batches of each part besides."""
    sample_tokens: int = setting(96, ge=0)
    """Tokens of the sample text generated at the end of the run. 0: none."""
    sample_prompt: str = "    def __init__(self"
    """Prompt of the sample text."""


@dataclass
class CheckpointConfig:
    every: int = setting(50, ge=0)
    """Optimizer steps between checkpoints. 0: only at the end. A run that is stopped always writes one."""
    keep: int = setting(2, ge=1)
    """Number of checkpoints to keep; older ones are deleted."""
    asynchronous: bool = False
    """Write checkpoints in the background: training waits only until the tensors are copied to host memory. The last
    checkpoint of a run is always waited for."""
    resume: bool | str = setting(True, choices=(True, False, "fresh"))
    """Whether to resume from the checkpoints in run.dir. true: from the newest intact one. false: refuse a run.dir that
    has checkpoints. fresh: as true, but if all checkpoints are damaged, set them aside and start from step 0."""
    load: str | None = None
    """Run directory, or directory of one step, whose weights initialise the run; the optimizer state and the step are
    not loaded. The model must be the same except for the settings that conf/model_schema.py marks as resumable. The
    tokenizer is taken from there."""
    load_except: list[str] = field(default_factory=list)
    """Settings that may differ from those of checkpoint.load: of the model (model.num_layers), or data.tokenizer.
    Weights that are new or of another shape are then initialised; weights that no longer exist are ignored."""


@dataclass
class GuardConfig:
    max_skipped: int = setting(5, ge=0)
    """Maximum number of consecutive updates that are skipped because of a non-finite loss or gradient; more end the
    run."""


@dataclass
class LoggingConfig:
    loggers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Where metrics go besides metrics.jsonl: tensorboard; wandb (Weights & Biases; WANDB_MODE=offline needs no
    network); mlflow (files in the run directory, or MLFLOW_TRACKING_URI). The last two are extras: bash launch/setup.sh
    wandb mlflow. A logger that fails during the run is left out with a warning."""


@dataclass
class RunConfig:
    dir: str | None = None
    """Run directory. An existing run is resumed. null: runs/NAME-<job id or timestamp>, in a sweep runs/NAME-<swept
    settings>-<job id or timestamp>."""
    name: str | None = None
    """First part of the default run.dir, without / and control characters. null: model.name."""


@dataclass
class RuntimeConfig:
    timeout: float = setting(600.0, gt=0)
    """Seconds that a rank waits for the other ranks before the job is aborted."""
    threads: int | None = setting(None, ge=1)
    """CPU threads per rank. null: OMP_NUM_THREADS, else the CPUs that Slurm gave the task, else the cores of the
    machine divided by its ranks."""
    verbose: bool = False
    """Print the whole start table. false: only device, ranks, precision, model, data, run, and why a faster
    implementation is not used; train.log always has the whole table."""
    preflight: bool = False
    """Before training, measure memory, disk, matrix products and links of every rank, and stop if a node falls short,
    naming it."""


@dataclass
class Config:
    """A training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    eval_tasks: EvalTasksConfig = field(default_factory=EvalTasksConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    run: RunConfig = field(default_factory=RunConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    extensions: list[str] = field(default_factory=list)
    """Python modules that every rank imports, and that add to the extension points (CONTRIBUTING.md, Extending)."""
    precision: str = setting("auto", choices=PRECISIONS)
    """fp32, bf16 (with fp32 master weights and gradients), fp8 (bf16 with most matrix products in FP8, see fp8;
    emulated on CPUs) or auto: bf16 if the device supports it, otherwise fp32."""
