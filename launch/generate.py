"""`python -m launch.generate checkpoint=DIR prompt=TEXT`: generates text from a checkpoint. With `prompts=FILE
output=FILE.jsonl` for many prompts, in batches."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.commands import GenerateConfig, SamplingConfig
from conf.printable import visible
from corpus.paths import check_exists
from launch.cli import command
from parallel.env import World
from parallel.layout import cache_unsupported_reason
from training.load_checkpoint import LoadedModel, load_model, on_every_rank
from training.noncausal import check_can_generate
from training.prompts import ChatFormat, Prompt, read_prompts
from training.sampling import check_sampling

if TYPE_CHECKING:
    from models.cached_logits import Routed
    from training.generate import Continuation, Sampling

Write = Callable[[str], None]


def main(config: GenerateConfig) -> int:
    """Prints the prompt and the generated text, or writes them to a file. Returns the exit code 0.

    Raises:
        ValueError: no such checkpoint, a model that cannot generate text, or invalid settings.
    """
    check_settings(config)
    for name in ("samples", "batch_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be >= 1")
    if config.prompts is not None and config.prompt:
        raise ValueError("prompt and prompts are both set; leave one of them out")
    for name in ("output", "router_trace"):
        path = getattr(config, name)
        if path is not None:
            check_new_file(name, path)
    if config.output is not None and config.output == config.router_trace:
        raise ValueError(f"output and router_trace are both {config.output}; choose another name for one of them")
    prompts_of(config)
    return on_every_rank(generate_rank, config)


def check_new_file(name: str, path: str) -> None:
    """Raises ValueError if a file of this name cannot be created: before what is to be written takes its time.

    Args:
        name: the setting.
    """
    if Path(path).expanduser().exists():
        raise ValueError(f"{name}={path} exists already; remove it, or choose another name")
    check_folder(name, path)


def check_folder(name: str, path: str) -> None:
    """Raises ValueError if a file cannot be written there, whether or not one of this name exists.

    Args:
        name: the setting.
    """
    _check_no_directory(name, path)
    file = Path(path).expanduser()
    if not file.parent.is_dir():
        raise ValueError(f"{name}={path}: there is no folder {file.parent}; create it, or choose another name")


def check_given_file(name: str, path: str) -> None:
    """Raises ValueError if there is no file of this name: before a model is loaded.

    Args:
        name: the setting.
    """
    check_exists(name, path)
    _check_no_directory(name, path)


def _check_no_directory(name: str, path: str) -> None:
    if Path(path).expanduser().is_dir():
        raise ValueError(f"{name}={path} is a directory; name a file")


def check_settings(config: SamplingConfig) -> None:
    """Raises ValueError for invalid sampling settings, and for a layout without a key/value cache."""
    check_sampling(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
    if config.max_tokens < 1:
        raise ValueError(f"max_tokens={config.max_tokens} must be >= 1")
    if "" in config.stop:
        raise ValueError("stop has an empty string, which every text begins with; leave it out")
    layout = config.parallel
    if reason := cache_unsupported_reason(cp=layout.cp, sequence_parallel=layout.sequence_parallel):
        given = f"parallel.cp={layout.cp}" if layout.cp > 1 else "parallel.sequence_parallel=true"
        raise ValueError(f"{given} cannot generate text: {reason}. Use parallel.tp, pp, ep or etp instead")


def prompts_of(config: GenerateConfig) -> list[Prompt]:
    """Raises ValueError for text that cannot be read or tokenised."""
    if config.prompts is not None:
        return read_prompts(config.prompts)
    try:
        config.prompt.encode()
    except UnicodeEncodeError:
        raise ValueError("prompt is not text in UTF-8; write it to a file and give prompts=FILE") from None
    return [Prompt(config.prompt)]


def generate_rank(world: World, config: GenerateConfig) -> int:
    """`main` on one rank. All ranks generate the same text; rank 0 prints."""
    with load_model(config.checkpoint, config, world) as loaded, contextlib.ExitStack() as files:
        check_can_generate(loaded.built.config.model)
        if config.router_trace is not None and not loaded.built.config.model.sparse_layers:
            raise ValueError(f"router_trace={config.router_trace}: the model is dense, it has no router; leave it out")
        from training.generate import continue_batch

        continuations, prompts, sampling = _continuations(loaded, config)
        is_main = world.rank == 0
        write, trace = (_writer(files, path if is_main else None) for path in (config.output, config.router_trace))
        on_routed = None
        if config.router_trace is not None:
            tokenizer = loaded.tokenizer

            def on_routed(continuation: "Continuation", routed: "Routed") -> None:
                for row in _trace_rows(continuation, routed, tokenizer):
                    trace(json.dumps(row))

        printed = is_main and config.output is None
        for start in range(0, len(continuations), config.batch_size):
            batch = continuations[start : start + config.batch_size]
            if printed and len(batch) == 1:
                _start(batch[0], prompts, len(continuations) > 1)
            for _ in continue_batch(loaded.built, batch, sampling, on_routed):
                if printed and len(batch) == 1:
                    print(visible(batch[0].new_text), end="", flush=True)
            for continuation in batch:
                write(json.dumps(_row(continuation, prompts[continuation.index]), ensure_ascii=False))
                if printed and len(batch) > 1:
                    _start(continuation, prompts, True)
                    print(visible(continuation.stream.text), end="", flush=True)
                if printed:
                    print(flush=True)
    return 0


def _continuations(
    loaded: LoadedModel, config: GenerateConfig
) -> tuple[list["Continuation"], list[Prompt], "Sampling"]:
    """What is to be generated, prompt by prompt."""
    from training.generate import Continuation, Sampling, encode_prompt
    from training.text_stream import TextStream

    tokenizer = tokenizer_of(loaded)
    prompts, ends, chat = prompts_of(config), frozenset[int](), None
    if tokenizer.eod_id is not None:
        ends = frozenset({tokenizer.eod_id})
    if any(prompt.messages is not None for prompt in prompts):
        chat = ChatFormat(tokenizer, loaded.run_dir)
        ends |= chat.end_ids()
    sampling = Sampling(config.max_tokens, config.temperature, config.top_k, config.top_p, config.seed, ends)
    found = []
    for index, prompt in enumerate(prompts):
        if prompt.messages is None:
            ids = encode_prompt(tokenizer, prompt.text)
        else:
            assert chat is not None
            try:
                ids = chat.encode(prompt.messages)
            except ValueError as error:
                raise ValueError(f"{prompt.where}: {error}") from None
        streams = (TextStream(tokenizer, ids, config.stop) for _ in range(config.samples))
        found += [Continuation(ids, index, sample, stream) for sample, stream in enumerate(streams)]
    return found, prompts, sampling


def tokenizer_of(loaded: LoadedModel) -> Any:
    """Raises ValueError if the run has none."""
    if loaded.tokenizer is None:
        raise ValueError(f"{loaded.run_dir} has no tokenizer.json, so that its tokens cannot be decoded")
    return loaded.tokenizer


def _writer(files: contextlib.ExitStack, path: str | None) -> Write:
    """Writes lines to a new file; None: nowhere."""
    if path is None:
        return lambda line: None
    file = files.enter_context(Path(path).expanduser().open("x", encoding="utf-8"))

    def write(line: str) -> None:
        file.write(line + "\n")
        file.flush()

    return write


def _start(continuation: "Continuation", prompts: list[Prompt], several: bool) -> None:
    """Prints what a text begins with."""
    prompt = prompts[continuation.index]
    if several:
        print(f"--- prompt {continuation.index}, sample {continuation.sample}")
    print(visible(prompt.text if prompt.messages is None else ""), end="", flush=True)


def _row(continuation: "Continuation", prompt: Prompt) -> dict[str, Any]:
    return {
        "index": continuation.index,
        "sample": continuation.sample,
        **prompt.row(),
        "text": continuation.stream.text,
        "finish_reason": continuation.finish_reason,
        "prompt_tokens": len(continuation.prompt),
        "tokens": len(continuation.ids),
    }


def _trace_rows(continuation: "Continuation", routed: "Routed", tokenizer: Any) -> Iterator[dict[str, Any]]:
    """A row for each token that the routers have seen last."""
    seen = [*continuation.prompt, *continuation.ids]
    count = max((len(experts_SK) for experts_SK, _ in routed.values()), default=0)
    for position in range(len(seen) - count, len(seen)):
        at = position - len(seen)
        layers = {
            str(layer): {"experts": experts_SK[at], "weights": gates_SK[at]}
            for layer, (experts_SK, gates_SK) in routed.items()
        }
        where = {"index": continuation.index, "sample": continuation.sample, "position": position}
        yield {**where, "token": seen[position], "text": tokenizer.decode([seen[position]]), "layers": layers}


if __name__ == "__main__":
    command(GenerateConfig, "generate", main)
