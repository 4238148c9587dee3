"""Tokens per second and core of launch.prepare, beside Megatron-LM's tools/preprocess_data.py and datatrove's
DocumentTokenizer, on the same text and tokenizer.

    python -m benchmarks.tokenise [--mb N] [--corpus FILE.jsonl] [--megatron DIR] [--vocabulary N] [--cores N ...]
                                  [--only TOOL ...] [--json]

DIR is a checkout of Megatron-LM; datatrove is used where it and orjson are installed. Each tool tokenises a tenth of
the text and all of it, on one core and on all or on those of --cores, and its rate is that of the other nine tenths:
imports do not count. A rate per core is that of a second of CPU time of all its processes, which hardly depends on what
else the machine does. datatrove gets a file for each core, since it reads a file in one process. The peak is the memory
of all processes of a tool, with what they share counted once.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.sparse_vs_dense.corpus import places, select
from corpus.encoder import usable_cores
from corpus.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
EOD = "<|endoftext|>"
OURS, MEGATRON, DATATROVE = "Switchyard", "Megatron-LM", "datatrove"
_SAMPLE = 16 * 2**20
"""Bytes of text that the tokenizer is trained on."""
_DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer

def main():
    folder, output, tokenizer, eod, cores = *sys.argv[1:5], int(sys.argv[5])
    tokenise = DocumentTokenizer(output, tokenizer, eos_token=eod, shuffle_documents=False, batch_size=1000)
    how = {"tasks": cores, "workers": cores, "logging_dir": output + "/logs"}
    LocalPipelineExecutor([JsonlReader(folder), tokenise], **how).run()

if __name__ == "__main__":
    main()
"""


@dataclass(frozen=True)
class Text:
    """The text that is tokenised, and the tokenizer."""

    rows: Path
    """A .jsonl file."""
    tokenizer: Path
    """A directory with the files of a Hugging Face tokenizer."""


@dataclass(frozen=True)
class Cost:
    tokens: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int


def make_rows(path: Path, max_bytes: int) -> None:
    """Writes the text that this machine has, again and again up to a size."""
    texts = [text for _, text in select(places(), max_bytes, {})]
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while texts and written < max_bytes:
            for text in texts:
                written += file.write(json.dumps({"text": text}) + "\n")
                if written >= max_bytes:
                    break


def make_tokenizer(rows: Path, folder: Path, vocabulary: int) -> None:
    """Trains a byte-level BPE on the beginning of the text, and writes it as Transformers reads it."""
    texts, size = [], 0
    with rows.open(encoding="utf-8") as file:
        for line in file:
            texts.append(json.loads(line)["text"])
            size += len(line)
            if size > _SAMPLE:
                break
    folder.mkdir()
    Tokenizer.train(texts, vocab_size=vocabulary, eod_token=EOD).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOD, "model_max_length": 10**9}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def head(rows: Path, path: Path, share: float) -> Path:
    """The lines at the beginning of a file."""
    left = rows.stat().st_size * share
    with rows.open("rb") as source, path.open("wb") as target:
        for line in source:
            target.write(line)
            left -= len(line)
            if left <= 0:
                break
    return path


def command(tool: str, text: Text, output: Path, cores: int, megatron: Path | None) -> list[str]:
    """The command of a tool, that writes token files into `output`."""
    if tool == OURS:
        arguments = [f"input={text.rows}", f"output={output}/out", f"tokenizer={text.tokenizer}"]
        return [sys.executable, "-m", "launch.prepare", *arguments]
    if tool == DATATROVE:
        parts = output / "parts"
        parts.mkdir()
        files = [(parts / f"{number}.jsonl").open("wb") for number in range(cores)]
        with text.rows.open("rb") as source:
            for number, line in enumerate(source):
                files[number % cores].write(line)
        for file in files:
            file.close()
        where = map(str, (parts, output / "out", text.tokenizer / "tokenizer.json", EOD, cores))
        return [sys.executable, "-c", _DATATROVE, *where]
    arguments = [f"--input={text.rows}", f"--output-prefix={output}/out", f"--workers={cores}", "--append-eod"]
    arguments += ["--tokenizer-type=HuggingFaceTokenizer", f"--tokenizer-model={text.tokenizer}"]
    return [sys.executable, f"{megatron}/tools/preprocess_data.py", *arguments]


def tokens_in(output: Path) -> int:
    """Of all token files in a folder, with ids of 16 bits."""
    return sum(path.stat().st_size for pattern in ("*.bin", "out/*.ds") for path in output.glob(pattern)) // 2


def measure(tool: str, text: Text, cores: int, megatron: Path | None) -> Cost:
    """Runs a tool on the first `cores` cores that this process may use.

    Raises:
        RuntimeError: it fails.
    """
    with tempfile.TemporaryDirectory(dir=text.rows.parent) as folder:
        output = Path(folder)
        arguments = command(tool, text, output, cores, megatron)
        paths = [str(megatron)] if tool == MEGATRON else []
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, str(ROOT), os.environ.get("PYTHONPATH", "")])}
        if tool == DATATROVE:
            env["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core
        usable = sorted(os.sched_getaffinity(0))[:cores]
        with (output / "log").open("wb") as log:
            started = time.monotonic()
            process = subprocess.Popen(
                arguments,
                cwd=ROOT,
                env=env,
                stdout=log,
                stderr=log,
                preexec_fn=lambda: os.sched_setaffinity(0, usable),
            )
            seen = _watch(process.pid)
            _, status, used = os.wait4(process.pid, 0)
            seconds = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            ending = (output / "log").read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{tool} ended with exit code {process.returncode}:\n{ending}")
        # The system counts the children that the process has waited for; those that it killed are seen while they ran.
        cpu_seconds = max(used.ru_utime + used.ru_stime, sum(seen.cpu_seconds.values()))
        return Cost(tokens_in(output), seconds, cpu_seconds, seen.peak_bytes)


@dataclass
class _Seen:
    """What a process and its children have used so far."""

    peak_bytes: int = 0
    cpu_seconds: dict[int, float] = field(default_factory=dict)
    """Of each process."""


def _watch(pid: int) -> _Seen:
    """Is updated until the process ends."""
    seen = _Seen()

    def look() -> None:
        try:
            process = psutil.Process(pid)
            while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                total = 0
                for one in (process, *process.children(recursive=True)):
                    try:
                        total += one.memory_full_info().pss
                        times = one.cpu_times()
                    except psutil.Error:
                        continue
                    seen.cpu_seconds[one.pid] = times.user + times.system
                seen.peak_bytes = max(seen.peak_bytes, total)
                time.sleep(0.25)
        except psutil.Error:
            return

    threading.Thread(target=look, daemon=True).start()
    return seen


def rate_of(tool: str, texts: list[Text], cores: int, megatron: Path | None) -> dict[str, float]:
    """Rates on the part of the longer text that the shorter one does not have."""
    short, long = (measure(tool, text, cores, megatron) for text in texts)
    tokens = long.tokens - short.tokens
    return {
        "tokens_per_second": tokens / (long.seconds - short.seconds),
        "tokens_per_cpu_second": tokens / (long.cpu_seconds - short.cpu_seconds),
        "peak_mib": long.peak_bytes / 2**20,
        "peak_mib_of_a_tenth": short.peak_bytes / 2**20,
        "tokens": long.tokens,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=100.0, help="size of the text, in MB")
    parser.add_argument("--corpus", type=Path, help="a .jsonl file with a field text, instead of this machine's text")
    parser.add_argument("--megatron", type=Path, help="a checkout of Megatron-LM")
    parser.add_argument("--vocabulary", type=int, default=32_000, help="of the tokenizer that is trained, up to 65,499")
    parser.add_argument("--cores", type=int, nargs="+", help="numbers of cores; without it one, and all")
    parser.add_argument("--only", nargs="*", choices=(OURS, MEGATRON, DATATROVE), help="tools to run")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    missing = [package for package in ("datatrove", "orjson") if not importlib.util.find_spec(package)]
    absent = {
        MEGATRON: None if args.megatron else "give its checkout: --megatron DIR",
        DATATROVE: f"not installed: {', '.join(missing)}" if missing else None,
    }
    wanted = args.only or [OURS, MEGATRON, DATATROVE]
    tools = [tool for tool in wanted if not absent.get(tool)]
    most = usable_cores()
    if wrong := [number for number in args.cores or () if not 1 <= number <= most]:
        parser.error(f"--cores takes 1 to {most} on this machine; it has {wrong[0]}")
    results: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        rows = args.corpus or Path(folder) / "text.jsonl"
        if args.corpus is None:
            make_rows(rows, int(args.mb * 1e6))
        tokenizer = Path(folder) / "tokenizer"
        make_tokenizer(rows, tokenizer, args.vocabulary)
        tenth = head(rows, Path(folder) / "tenth.jsonl", 0.1)
        texts = [Text(tenth, tokenizer), Text(rows.absolute(), tokenizer)]
        for number in dict.fromkeys(args.cores or (1, most)):
            for tool in tools:
                results.setdefault(tool, {})[str(number)] = rate_of(tool, texts, number, args.megatron)
        if not args.json:
            print(f"{rows.stat().st_size / 1e6:.0f} MB of text in .jsonl, a vocabulary of {args.vocabulary:,}")
    if args.json:
        print(json.dumps({"results": results, "absent": {t: why for t, why in absent.items() if why and t in wanted}}))
        return
    print(f"{'':12}{'cores':>6}{'tokens/s':>12}{'tokens/s of CPU':>18}{'peak MiB':>10}{'of a tenth':>12}")
    for tool, by_cores in results.items():
        for number, found in by_cores.items():
            print(
                f"{tool:12}{number:>6}{found['tokens_per_second']:>12,.0f}{found['tokens_per_cpu_second']:>18,.0f}"
                f"{found['peak_mib']:>10,.0f}{found['peak_mib_of_a_tenth']:>12,.0f}"
            )
    for tool, why in absent.items():
        if why and tool in wanted:
            print(f"{tool}: {why}")


if __name__ == "__main__":
    main()
