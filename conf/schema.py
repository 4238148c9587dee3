"""Every setting of a run, with its unit and its default; those of the model are in conf/model_schema.py. Defaults live
only in these two; the YAML groups beside them hold presets, that is, departures from these defaults. Imports nothing
heavy, so that a login node without PyTorch can read and check a configuration."""

from dataclasses import dataclass, field

from conf.model_schema import (  # noqa: F401 - everything of the settings is imported from here
    ACTIVATIONS,
    AUX_LOSS_COUNTS,
    BACKENDS,
    CAPACITY_PER,
    DISPATCHERS,
    DROP_POLICIES,
    LOAD_BALANCING,
    QK_NORMS,
    RECOMPUTE,
    SCORE_FUNCTIONS,
    SOFTMAX_ORDERS,
    Change,
    ModelConfig,
    MoeConfig,
)

DATA_KINDS = ("stdlib", "text", "megatron", "blend")
FP8_KERNELS = ("auto", "reference", "triton")
FP8_RECIPES = ("blockwise", "rowwise", "tensorwise")
FP8_WEIGHT_GRADIENTS = ("bf16", "fp8")
OPTIM_DTYPES = ("fp32", "bf16")
PRECISIONS = ("auto", "fp32", "bf16", "fp8")
SCHEDULES = ("cosine", "linear", "wsd", "constant")


@dataclass
class ParallelConfig:
    """Degrees of parallelism; data parallelism is what is left of the world size."""

    tp: int = 1
    """Tensor parallelism: attention heads and dense feed-forward columns are cut."""
    sequence_parallel: bool = False
    """Between the tensor-parallel parts, each tensor-parallel rank keeps 1/tp of the sequence. Needs tp > 1."""
    pp: int = 1
    """Pipeline stages."""
    vpp: int | None = None
    """Layer chunks per pipeline stage, interleaved (virtual pipeline). Needs pp > 1."""
    pp_layers: list[int] | None = None
    """Layers of each pipeline stage, first to last, for example [3, 5]; with vpp those of all pp * vpp chunks in the
    order of the model. null: as many in each. Needs pp > 1."""
    cp: int = 1
    """Context parallelism: each rank holds a slice of every sequence."""
    ep: int = 1
    """Expert parallelism: experts are spread over ep ranks, taken from the data, context and tensor ranks."""
    etp: int = 1
    """Expert-tensor parallelism: each expert's hidden width is cut over etp ranks."""
    overlap_grad_reduce: bool | None = None
    """Sum gradients over the data-parallel ranks bucket by bucket while the backward pass goes on. null: on GPUs."""
    overlap_param_gather: bool | None = None
    """Gather updated weights bucket by bucket while the next forward pass goes on. Needs overlap_grad_reduce. null: as
    overlap_grad_reduce."""


@dataclass
class BlendPart:
    """One ingredient of data=blend."""

    weight: float = 1.0
    """Relative share of the training sequences."""
    kind: str = "text"
    """stdlib, text or megatron."""
    files: list[str] = field(default_factory=list)
    """Paths or globs (text), or prefixes without .bin/.idx (megatron)."""


@dataclass
class DataConfig:
    kind: str = "stdlib"
    """stdlib: the source files of the running Python's standard library. text: .txt .jsonl .jsonl.gz .jsonl.zst
    .parquet files. megatron: prefixes of .bin/.idx pairs. blend: a weighted mixture of these."""
    files: list[str] = field(default_factory=list)
    """Paths or globs (text), or prefixes without .bin/.idx (megatron)."""
    valid_files: list[str] = field(default_factory=list)
    """Held-out files, or prefixes for megatron data. Empty: valid_fraction of the documents is held out instead."""
    valid_fraction: float = 0.02
    """Share of the documents held out: chosen by a hash of the path (stdlib) or of the document (text), the last ones
    (megatron). Where the hash holds out no document of a text, the one with the smallest hash is held out if it is
    short, and the tail of it otherwise: this share of all characters, at least 4,096, at most a quarter of it."""
    text_key: str = "text"
    """The field of .jsonl and .parquet rows that holds the text."""
    strict: bool = False
    """Stop at the first .jsonl or .parquet row that has no text (null, another type, no such field, not JSON). false:
    leave such rows out and say how many there were and where; a file without any other stops all the same."""
    tokenizer: str | None = None
    """A Hugging Face tokenizer.json. null: a byte-level BPE of model.vocab_size entries is trained on the training
    documents and cached."""
    tokenizer_sample_mib: int = 64
    """At most this much text is used to train the tokenizer, every file giving in proportion to its size."""
    eod_token: str = "<|endoftext|>"
    """The token put after every document."""
    document_mask: bool = False
    """Keep attention and positions within documents."""
    blend: list[BlendPart] = field(default_factory=list)
    """The parts of data=blend: [{weight: 1, kind: text, files: [PATH]}, ...]."""
    cache_dir: str = "~/.cache/switchyard"
    """Tokenizers and token files are kept here, under a key of their content, with hashes. Who cannot write here can
    use what is there; users who share a folder trust each other, since who writes to it decides what is trained on."""


@dataclass
class TrainConfig:
    steps: int = 200
    """Optimizer steps of the whole schedule."""
    micro_batch_size: int = 4
    """Sequences that one data-parallel rank puts through the model at a time."""
    global_batch_size: int = 32
    """Sequences per optimizer step, over all ranks."""
    sequence_length: int = 256
    """Tokens."""
    seed: int = 1234
    """Of initial weights, sample order, dropout and router noise."""
    deterministic: bool = False
    """Only algorithms that give the same bits every time."""
    stop_after: int | None = None
    """Write a checkpoint and stop after this step, the schedule of `steps` unchanged."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl."""
    profile: list[int] | None = None
    """[a, b]: write a torch profiler trace of steps a to b, both included."""


@dataclass
class OptimConfig:
    """AdamW (arXiv:1711.05101); no weight decay on norms and biases."""

    lr: float = 2e-3
    """Peak learning rate."""
    min_lr: float | None = None
    """Learning rate at the end of the schedule. null: a tenth of the peak."""
    warmup_steps: int = 30
    """Linear warm-up from 0. May exceed train.steps."""
    schedule: str = "cosine"
    """After the warm-up: cosine, linear, wsd (constant, then linear over the last decay_fraction) or constant."""
    decay_fraction: float = 0.2
    """wsd only: share of the steps spent decaying."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    beta1: float = 0.9
    """Decay rate of the first moment."""
    beta2: float = 0.95
    """Decay rate of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0: no clipping."""
    grad_dtype: str = "fp32"
    """fp32, or bf16: gradients are added up over micro-batches and reduced over data-parallel ranks in bf16, 2 bytes
    a parameter instead of 4. Of parameters in bf16: the router's gradients stay in fp32. Their effect on the loss, and
    that of state_dtype, was within 0.25 % where it was measured (docs/stability.md)."""
    state_dtype: str = "fp32"
    """fp32, or bf16: Adam's two moments are kept in bf16, 4 bytes a parameter instead of 8, computed in fp32 and
    rounded stochastically, by random numbers that belong to the step and the element under every layout. Master weights
    stay in fp32. A checkpoint has the type of the run that wrote it; a run with the other one converts it."""
    cpu_offload: bool = False
    """Keep moments and fp32 master weights in page-locked host memory. They pass through the GPU a block at a time
    during the update, so that the numbers are the same bits as without; the update then takes as long as the bus needs
    for them. On a CPU nothing is moved."""


@dataclass
class EvalConfig:
    every: int = 50
    """Steps between evaluations on the held-out text; 0: only at the end."""
    batches: int = 2
    """Global batches of an evaluation during training."""
    final_batches: int | None = None
    """Global batches of the evaluation at the end. null: the whole held-out text."""
    sample_tokens: int = 96
    """Tokens of the text written at the end of a run; 0: none."""
    sample_prompt: str = "    def __init__(self"
    """Beginning of that text."""


@dataclass
class CheckpointConfig:
    every: int = 50
    """Steps between checkpoints; 0: only at the end. A stopped run always writes one."""
    keep: int = 2
    """Newest checkpoints kept."""
    asynchronous: bool = False
    """Write checkpoints while training goes on: it waits only until their tensors are copied. The last one of a run is
    waited for."""
    resume: bool | str = True
    """Continue from the newest whole checkpoint of run.dir. false: refuse a run.dir that has one. fresh: as true, but
    where every checkpoint is damaged set them aside and begin again at step 0."""
    load: str | None = None
    """A run directory or one step's directory whose weights (not optimizer, not step) the run starts from. Its model
    must be this one, as conf/model_schema.py says which settings may differ, and its tokenizer is taken."""
    load_except: list[str] = field(default_factory=list)
    """Settings that may nevertheless differ from those of checkpoint.load: of the model (model.num_layers), or
    data.tokenizer. Weights that only the run has, or in another shape, then start anew; those that only the source has
    are left there."""


@dataclass
class Fp8Config:
    """What precision=fp8 does. The products of the experts and of the linear layers in attention and feed-forward
    layers take E4M3 operands and add up in fp32. Router, norms, embedding, head and the attention itself stay high, as
    do the optimizer's weights and gradients."""

    recipe: str = "blockwise"
    """Which elements share a scale. blockwise: 1 x 128 of activations and gradients, 128 x 128 of weights (DeepSeek-V3,
    arXiv:2412.19437, section 3.3.2). rowwise: a row or column of an operand. tensorwise: all of it. Only blockwise
    rounds the same under every layout: the others scale by what one rank holds."""
    weight_gradient: str = "bf16"
    """bf16, or fp8: its operands then share scales over 128 rows, which depend on the rows that a rank gets."""
    kernels: str = "auto"
    """reference (plain torch: operands are rounded to FP8 and multiplied in bf16, which is exact and gains no time),
    triton (FP8 tensor cores), or auto: reference on a CPU; on a GPU triton, and for linear layers torch's scaled_mm
    where that serves the recipe and equals the reference."""
    linear_layers: bool = True
    """false: only the experts are in FP8, which hold nearly all the arithmetic of a sparse model; the linear layers of
    attention, dense and shared feed-forward layers stay in bf16."""
    first_layers_high: int = 0
    """So many layers at the beginning stay in bf16."""
    last_layers_high: int = 0
    """So many layers at the end stay in bf16."""


@dataclass
class GuardConfig:
    max_skipped: int = 5
    """Updates in a row that may be skipped because the loss or a gradient is not finite, before the run ends."""


@dataclass
class RunConfig:
    dir: str | None = None
    """Where the run is kept. An existing one is continued. null: runs/NAME-<job id, else timestamp>, in a sweep
    runs/NAME-<swept settings>-<...>."""
    name: str | None = None
    """Begins the name of the default run.dir: no / and no control characters. null: the model's name."""


@dataclass
class RuntimeConfig:
    timeout: float = 600.0
    """Seconds that a rank waits for the others before the job ends."""
    threads: int | None = None
    """CPU threads per rank. null: OMP_NUM_THREADS, else the CPUs that Slurm gave the task, else the machine's cores
    divided among its ranks."""
    verbose: bool = False
    """Print all of the start table. false: its rows on device, ranks, precision, model, data and run, and those that
    say why something faster is not used; train.log has all in any case."""
    preflight: bool = False
    """Before training, measure every rank's memory, disk, matrix products and links, and end the run naming the nodes
    that fall short."""


@dataclass
class ClusterConfig:
    """The machine that a run is for: `cluster=h100` and the like. `python -m launch.check` makes the job's nodes and
    tasks and the verdict on memory and links from it; a run says in its start table how much memory it should take."""

    name: str | None = None
    """Shown in tables. null: no particular machine."""
    ranks_per_node: int = 1
    """GPUs of a node; without GPUs, the ranks that a node is to carry."""
    gpus: bool = False
    """Whether a rank has a GPU."""
    memory_gb: float | None = None
    """Memory of a rank in 1e9 bytes: of its GPU, or its share of the node. null: not known."""
    cpus_per_rank: int | None = None
    """CPUs to ask Slurm for. null: not said."""
    link_gb_per_s: float | None = None
    """Between two ranks of a node, one way, in 1e9 bytes. null: not known."""
    network_gb_per_s: float | None = None
    """Of a rank to another node, one way, in 1e9 bytes. null: not known."""


@dataclass
class SlurmConfig:
    """A run as a Slurm job (slurm/README.md)."""

    max_requeues: int = 20
    """How many times a job may start again, for whatever reason: its time limit, preemption, a failure. After that it
    ends; submitted again with the same run.dir it goes on."""


@dataclass
class Config:
    """A training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)
    guard: GuardConfig = field(default_factory=GuardConfig)
    run: RunConfig = field(default_factory=RunConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    precision: str = "auto"
    """fp32, bf16 (fp32 master weights and gradients), fp8 (bf16 with most products in FP8; see fp8; a CPU emulates it),
    or auto: bf16 where the processor has bf16 arithmetic."""
