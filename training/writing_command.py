"""The command that the summary of a run names for hearing from its model."""

from pathlib import Path

from conf.override_text import command, override
from conf.schema import Config
from training.noncausal import can_generate


def writing_command(config: Config, run_dir: Path, *, has_tokenizer: bool) -> list[tuple[str, str]]:
    """What it does, and the command: one that generates text, or that talks with a model trained on conversations. None
    for a model that writes no text."""
    if not has_tokenizer or not can_generate(config.model):
        return []
    chats = config.data.kind == "chat"
    what, module = ("chat", "launch.chat") if chats else ("write text", "launch.generate")
    given = [override("checkpoint", str(run_dir))]
    if not chats:
        given.append(override("prompt", "def "))
    if config.extensions:
        given.append(override("extensions", config.extensions))
    return [(what, command([".venv/bin/python", "-m", module], given))]
