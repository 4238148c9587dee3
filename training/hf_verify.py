"""Compares a model with its Transformers counterpart: logits and losses on the same tokens.

Legend: S sequence, V vocabulary, D hidden, L layers.
"""

import contextlib
import importlib.util
import re
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from conf.commands import InferenceConfig
from corpus.tokenizer import Tokenizer
from models.hf.configuration import CONFIG, read_json
from models.hf.families import family_named
from models.hf.family import Family
from models.hf.quantization import block_of
from models.hf.sequence_classification import SUFFIX
from parallel.env import World
from training.load_checkpoint import LoadedModel, load_model, on_every_rank
from training.output_redirect import redirect_output
from training.run_dir import load_config

BOUNDS = {"fp32": (1e-4, 1e-4), "bf16": (1e-1, 2e-2)}
"""Tolerances: of the logits, relative to the largest logit, and of the loss in nats per token. In bf16 the two
implementations round at different places, and a token near a tie may be routed to another expert."""
TOKENS = 256
LOGITS, LAYER, IDS = "logits", "layer.", "ids"


class Different(Exception):
    """The two models do not compute the same."""


@dataclass
class Comparison:
    """The arguments of a comparison, for every rank."""

    here: InferenceConfig
    checkpoint: str
    """A step's directory of ours."""
    reference: str
    """The file that `write_reference` wrote."""
    bounds: tuple[float, float]
    """Of BOUNDS."""
    text: str
    """What the tokens are, in words."""
    rounded: bool = False
    """Whether ours is compared with its weights rounded to bf16, as the other's are."""


def check_available(precision: str, *, adapter: bool = False) -> None:
    """Raises ValueError if the models cannot be compared here.

    Args:
        adapter: whether peft is needed, too.
    """
    if adapter and importlib.util.find_spec("peft") is None:
        raise ValueError(
            "verify=true loads the adapters with peft, which is not installed: `bash launch/setup.sh` installs it (the "
            "extra dev of pyproject.toml), or verify=false converts without verification"
        )
    if precision not in BOUNDS:
        raise ValueError(f"precision={precision}: both models are compared in {' or '.join(BOUNDS)}; nearest: fp32")
    if importlib.util.find_spec("transformers") is None:
        raise ValueError(
            "verify=true compares with Transformers, which is not installed: `bash launch/setup.sh` installs it (the "
            "extra dev of pyproject.toml), or verify=false converts without verification"
        )


def tokens_for(tokenizer: Tokenizer | None, vocab_size: int, length: int) -> tuple[list[int], str]:
    """(token ids, description): of a module of Python's standard library, or random ids without a tokenizer."""
    import torch

    length = min(length, TOKENS)
    if tokenizer is not None:
        ids = [i for i in tokenizer.encode(Path(textwrap.__file__).read_text()[: 16 * length]) if i < vocab_size]
        if len(ids) >= min(length, 16):
            return ids[:length], "Python's textwrap.py"
    drawn = torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    return drawn.tolist(), "random ids, since there is no tokenizer"


def write_reference(directory: Path, ids: list[int], precision: str, path: Path, adapter: Path | None = None) -> None:
    """Writes the logits and the output of each layer of Transformers' model in `directory` to a safetensors file.

    Args:
        adapter: a directory with adapters that peft adds to the model; None: none.

    Raises:
        ValueError: Transformers cannot load it, or its weights do not match its model.
    """
    import torch
    from safetensors.torch import save_file
    from transformers.utils import logging

    logging.disable_progress_bar()
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    options = {"dtype": dtype, "local_files_only": True, "output_loading_info": True}
    try:
        if block_of(read_json(directory / CONFIG)):
            model, loading = _dequantised(directory, **options)
        else:
            model, loading = _model_class(directory, options).from_pretrained(directory, **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"Transformers cannot load {directory}: {error}") from None
    # Layers for multi-token prediction, after the last one: Transformers has none.
    family, layers = family_named(read_json(directory / CONFIG)["model_type"], CONFIG), model.config.num_hidden_layers
    found = loading.get("unexpected_keys", ())
    loading["unexpected_keys"] = [name for name in found if not is_of_mtp_layer(name, family, layers)]
    if wrong := {what: names for what, names in loading.items() if names}:
        raise ValueError(f"the weights in {directory} do not match the model of Transformers: {wrong}")
    if adapter is not None:
        _add_adapters(model, adapter)
    kept: dict[str, torch.Tensor] = {}

    def keep(_module: object, _inputs: object, output: Any, name: str) -> None:
        kept[name] = (output[0] if isinstance(output, tuple) else output)[0].float().contiguous()

    rewards = type(model).__name__.endswith(SUFFIX)
    decoder = model.model if rewards else model.get_decoder()
    for index, layer in enumerate(getattr(decoder, "model", decoder).layers):  # Llama4ForCausalLM gives itself
        layer.register_forward_hook(partial(keep, name=f"{LAYER}{index}"))
    with torch.no_grad():
        model.eval()
        if rewards:  # of every token, not of the last alone
            logits = model.score(decoder(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state)
        else:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        kept[LOGITS] = logits[0].float().contiguous()
    save_file({**kept, IDS: torch.tensor(ids)}, path)


def _add_adapters(model: Any, adapter: Path) -> None:
    """Raises ValueError if peft does not find a layer for each adapter, or an adapter for each layer."""
    from peft import PeftModel
    from safetensors import safe_open

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrapped = PeftModel.from_pretrained(model, str(adapter))  # changes the model itself
    if lost := [str(w.message) for w in caught if "missing" in str(w.message) or "unexpected" in str(w.message)]:
        raise ValueError(f"peft does not load {adapter}: {lost[0][:500]}")
    with safe_open(adapter / "adapter_model.safetensors", "pt") as stored:
        wanted = len([*stored.keys()])
    kinds = (".lora_A.", ".lora_B.", ".lora_magnitude_vector.")
    found = [name for name, _ in wrapped.named_parameters() if any(kind in name for kind in kinds)]
    if len(found) != wanted:
        raise ValueError(f"peft has {len(found)} tensors of adapters, {adapter} has {wanted}")


def is_of_mtp_layer(name: str, family: Family, num_layers: int) -> bool:
    """Whether a tensor belongs to a layer for multi-token prediction."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return family.mtp_tensor is not None and layer is not None and int(layer[1]) >= num_layers


def _model_class(directory: Path, options: dict[str, Any]) -> Any:
    """AutoModelForCausalLM; or, for a model type that Transformers does not have, the class of the same architecture,
    whose configuration is then added to the options."""
    import transformers

    found = read_json(directory / CONFIG)["model_type"]
    family = family_named(found, CONFIG)
    if found == family.name:
        if any(name.endswith(SUFFIX) for name in read_json(directory / CONFIG).get("architectures") or ()):
            return transformers.AutoModelForSequenceClassification
        return transformers.AutoModelForCausalLM
    kind = getattr(transformers, family.architecture)
    options["config"] = kind.config_class.from_pretrained(directory, local_files_only=True)
    options["config"].model_type = family.name
    return kind


def _dequantised(directory: Path, dtype: Any, **options: Any) -> Any:
    """As from_pretrained, for FP8 weights, dequantised here: Transformers itself would need another package, and
    refuses weights whose last block is not whole."""
    import transformers

    from models.hf.files import Source

    found = read_json(directory / CONFIG)
    family = family_named(found["model_type"], CONFIG)
    kind = getattr(transformers, family.architecture)
    config = kind.config_class.from_pretrained(directory, local_files_only=True)
    config.model_type = family.name
    del config.quantization_config
    with Source(directory, family, block_of(found)) as source:
        weights = {name: source.read(name).to(dtype) for name in source.entries}
    return kind.from_pretrained(None, config=config, state_dict=weights, dtype=dtype, **options)


def check_same(
    config: InferenceConfig,
    theirs: Path,
    ours: Path,
    tokenizer: Tokenizer | None,
    folder: Path,
    *,
    rounded: bool = False,
    adapter: Path | None = None,
) -> None:
    """Compares the model in the directory `theirs` with the checkpoint `ours` and prints what is apart.

    Args:
        config: the precision and the layout to compute in.
        folder: for a file that is removed again.
        rounded: whether those of `theirs` are ours rounded to bf16.
        adapter: of adapters for peft, to be added to `theirs`.

    Raises:
        Different: more than the bounds is.
        ValueError: one of them cannot be loaded.
    """
    run = load_config(ours.parent.parent)
    ids, text = tokens_for(tokenizer, run.model.vocab_size, run.train.sequence_length)
    reference = folder / "reference.safetensors"
    redirection = redirect_output(0)
    try:
        write_reference(theirs, ids, config.precision, reference, adapter)
    finally:
        redirection.undo()
    code = compare(Comparison(config, str(ours), str(reference), BOUNDS[config.precision], text, rounded))
    reference.unlink()
    if code:
        raise Different("the models do not compute the same")


def compare(comparison: Comparison) -> int:
    """Runs our model on all ranks and prints the differences. Returns the exit code: 1 if they exceed the
    tolerances."""
    return on_every_rank(_compare_rank, comparison)


def _compare_rank(world: World, comparison: Comparison) -> int:
    from safetensors.torch import load_file

    with load_model(comparison.checkpoint, comparison.here, world) as loaded:
        if comparison.rounded:
            _round_weights(loaded)
        theirs = load_file(comparison.reference)
        ids = theirs[IDS].tolist()
        ours_SV, theirs_SV = our_logits(loaded, ids), theirs[LOGITS]
        largest = theirs_SV.abs().max().item()
        apart = (ours_SV - theirs_SV).abs().max().item() / largest
        losses = [_loss(logits_SV, ids) for logits_SV in (ours_SV, theirs_SV)]
        bounds = comparison.bounds
        same = apart <= bounds[0] and abs(losses[0] - losses[1]) <= bounds[1]  # false for a NaN too
        by_layer = None if same else _layers_apart(loaded, ids, theirs)
        if world.rank == 0:
            print(
                f"{'verified' if same else 'NOT THE SAME'} on {len(ids)} tokens ({comparison.text}), "
                f"{loaded.built.precision}: logits differ by {apart:.1e} of the largest, {largest:.3g} (bound "
                f"{bounds[0]:.0e}); losses {losses[0]:.6f} and {losses[1]:.6f} nats (bound {bounds[1]:.0e})"
            )
            for line in [] if same else _table(by_layer, bounds[0]):
                print(line)
    return 0 if same else 1


def our_logits(loaded: LoadedModel, ids: list[int]) -> Any:
    """fp32 logits [S, V] on the CPU, the same on every rank."""
    from models.logits import sequence_logits

    return sequence_logits(loaded.built.engine, loaded.built.config.model.output_size, ids)


def _round_weights(loaded: LoadedModel) -> None:
    import torch

    with torch.no_grad():
        for module in loaded.built.engine.modules:
            for parameter in module.parameters():
                parameter.copy_(parameter.bfloat16())


def _loss(logits_SV: Any, ids: list[int]) -> float:
    import torch

    if logits_SV.shape[1] == 1:  # rewards
        return 0.0
    return torch.nn.functional.cross_entropy(logits_SV[:-1].double(), torch.tensor(ids[1:])).item()


@contextlib.contextmanager
def outputs_kept(loaded: LoadedModel) -> Iterator[dict[int, Any]]:
    """The output of every layer of this rank, while this is entered."""
    kept: dict[int, Any] = {}

    def keep(_module: object, _inputs: object, output_SBD: Any, layer: int) -> None:
        kept.setdefault(layer, output_SBD[:, 0].float().cpu())

    blocks = [(int(i), block) for module in loaded.built.engine.modules for i, block in module.layers.items()]
    handles = [block.register_forward_hook(partial(keep, layer=i)) for i, block in blocks]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def _layers_apart(loaded: LoadedModel, ids: list[int], theirs: dict[str, Any]) -> dict[int, float] | None:
    """Layer -> largest difference of its output, relative to the largest value; None if the sequence is sharded."""
    import torch.distributed as dist

    layout = loaded.built.runtime.layout
    if layout.sequence_parallel or layout.cp > 1:
        return None
    with outputs_kept(loaded) as kept:
        our_logits(loaded, ids)
    mine = {}
    for layer, output_SD in kept.items():
        other_SD = theirs[f"{LAYER}{layer}"]
        mine[layer] = ((output_SD[: len(ids)] - other_SD).abs().max() / other_SD.abs().max()).item()
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, mine)
    return {layer: apart for part in of_ranks for layer, apart in part.items()}


def _table(by_layer: dict[int, float] | None, bound: float) -> Iterator[str]:
    if by_layer is None:
        yield "  which layer differs first is found without sequence_parallel and cp"
        return
    for layer, apart in sorted(by_layer.items()):
        yield f"  output of layer {layer}: differs by {apart:.1e} of the largest value"
    first = next((layer for layer, apart in sorted(by_layer.items()) if not apart <= bound), None)  # a NaN too
    where = "no layer, so the final norm or the output layer" if first is None else f"layer {first}"
    yield f"  the first to differ by more than {bound:.0e}: {where}"
