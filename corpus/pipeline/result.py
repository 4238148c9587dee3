"""The result of a preparation: a folder of shards with a manifest, and the summary of what every step removed."""

import json
import os
import shutil
from dataclasses import asdict
from typing import Any

from corpus.integrity import sha256
from corpus.pipeline.account import Account, write_json
from corpus.pipeline.plan import Plan, Refused
from corpus.shards import FORMAT, MANIFEST, SUMMARY, TOKENIZER
from corpus.tokenizer import Tokenizer

_NAMED_NOTES = 20
_PRINTED_TEXT = 100


def finish(plan: Plan) -> None:
    """Moves the shards of all tasks to the output, with the tokenizer, manifest and summary.

    Raises:
        Refused: no document is left.
        ValueError: the output exists.
    """
    tasks = len(plan.tasks)
    shards = [json.loads((plan.folder / "shards" / f"{rank:05d}.json").read_text()) for rank in range(tasks)]
    summary = summarise(plan)
    if not any(shard["num_documents"] for shard in shards):
        raise Refused("no document is left:\n" + "\n".join(summary_lines(summary)))
    if os.path.exists(plan.output):
        raise ValueError(f"{plan.output} exists already; remove it or choose another output")
    folder = plan.folder / "output"
    folder.mkdir(exist_ok=True)
    listed = []
    for rank, shard in enumerate(shards):
        if shard["num_documents"]:
            name = f"shard_{rank:05d}"
            listed.append({"name": name, **shard})
            for suffix in (".bin", ".idx"):
                source, target = plan.folder / "shards" / f"{rank:05d}{suffix}", folder / f"{name}{suffix}"
                if not target.exists():  # an interrupted call may have moved it
                    os.rename(source, target)
    shutil.copyfile(plan.folder / "tokenizer.json", folder / TOKENIZER)
    write_json(folder / SUMMARY, summary)
    write_json(folder / MANIFEST, _manifest(plan, listed))
    os.rename(folder, plan.output)


def _manifest(plan: Plan, shards: list[dict[str, Any]]) -> dict[str, Any]:
    path = str(plan.folder / "tokenizer.json")
    tokenizer = Tokenizer.load(path, plan.eod_token)
    return {
        "format": FORMAT,
        "tokenizer": {
            "file": TOKENIZER,
            "sha256": sha256(path),
            "vocab_size": tokenizer.vocab_size,
            "eod_token": plan.eod_token,
            "eod_id": tokenizer.eod_id,
        },
        **{key: sum(shard[key] for shard in shards) for key in ("num_documents", "num_tokens", "text_bytes")},
        "num_bytes": sum(shard[suffix]["bytes"] for shard in shards for suffix in ("bin", "idx")),
        "steps": plan.steps,
        "shards": shards,
    }


def summarise(plan: Plan) -> list[dict[str, Any]]:
    """What each step did in all tasks, in order."""
    folders = [plan.account_folder("read"), *map(plan.account_folder, range(len(plan.steps)))]
    folders.append(plan.account_folder("tokenise"))
    return [asdict(Account.of_tasks(folder, len(plan.tasks))) for folder in folders]


def summary_lines(summary: list[dict[str, Any]]) -> list[str]:
    """The summary for printing: a line for each step, with the reasons, and a sample of each reason."""
    width = max(len(account["step"]) for account in summary)
    lines = []
    for account in summary:
        name, seen, removed, changed = (account[key] for key in ("step", "seen", "removed", "changed"))
        line = f"{name:<{width}}  {seen:>11,} documents {_size(account['seen_bytes']):>10}"
        if name not in ("read", "tokenise"):
            line += f"  removed {removed:,} ({removed / max(seen, 1):.1%})"
            line += f", changed {changed:,}" if changed else ""
            line += f", {_size(account['removed_bytes'])} of text" if removed or changed else ""
        lines.append(line.rstrip())
        samples = {sample[2]: sample for sample in reversed(account["samples"])}
        for reason, count in sorted(account["reasons"].items(), key=lambda item: -item[1]):
            text = "" if reason not in samples else f": {_quoted(samples[reason][3])} ({samples[reason][1]})"
            lines.append(f"    {reason} {count:,}{text}")
        lines += [f"    {note}" for note in account["notes"][:_NAMED_NOTES]]
        if len(account["notes"]) > _NAMED_NOTES:
            lines.append(f"    and {len(account['notes']) - _NAMED_NOTES} more messages, in {SUMMARY}")
    return lines


def _quoted(text: str) -> str:
    line = " ".join(text.split())
    return json.dumps(line if len(line) <= _PRINTED_TEXT else f"{line[: _PRINTED_TEXT - 1]}…", ensure_ascii=False)


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
