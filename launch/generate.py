"""`python -m launch.generate checkpoint=DIR prompt=TEXT`: generates text from a checkpoint."""

import functools

from conf.commands import GenerateConfig
from conf.printable import visible
from launch.cli import command
from parallel.env import World
from training.load_checkpoint import load_model, on_every_rank
from training.noncausal import check_can_generate
from training.sampling import check_sampling


def main(config: GenerateConfig) -> int:
    """Prints the prompt and the generated text. Returns the exit code 0.

    Raises:
        ValueError: no such checkpoint, a model that cannot generate text, or invalid sampling settings.
    """
    check_sampling(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
    if config.max_tokens < 1:
        raise ValueError(f"max_tokens={config.max_tokens} must be >= 1")
    return on_every_rank(generate_rank, config)


def generate_rank(world: World, config: GenerateConfig) -> int:
    """`main` on one rank. All ranks generate the same text; rank 0 prints."""
    write = functools.partial(print, end="", flush=True) if world.rank == 0 else lambda text: None
    with load_model(config.checkpoint, config, world) as loaded:
        check_can_generate(loaded.built.config.model)
        from training.generate import encode_prompt, generate

        tokenizer = loaded.tokenizer
        if tokenizer is None:
            raise ValueError(f"{loaded.run_dir} has no tokenizer.json, so that its tokens cannot be decoded")
        tokens = generate(
            loaded.built,
            encode_prompt(tokenizer, config.prompt),
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=config.seed,
            eod_id=tokenizer.eod_id,
        )
        write(visible(config.prompt))
        ids: list[int] = []
        shown = 0
        for token in tokens:
            ids.append(token)
            text = tokenizer.decode(ids)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # otherwise the token ends within a character
                write(visible(text[shown:]))
                shown = len(text)
        write("\n")
    return 0


if __name__ == "__main__":
    command(GenerateConfig, "generate", main)
