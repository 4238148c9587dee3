"""`python -m benchmarks.conversion`: peak memory and time of launch.import_hf and launch.export_hf for a synthetic
Mixtral of a given size, without the comparison, which needs memory for a whole model.

The weights of the source are zeros in sparse files. The run and the export take as much disk space as --gb says,
each. They are removed at the end.
"""

import argparse
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from models.hf.configuration import config_of, model_of
from models.hf.families import FAMILIES
from models.hf.files import INDEX

SHARD_BYTES = 5 * 10**9
ROOT = Path(__file__).parents[1]


def write_source(folder: Path, gigabytes: float) -> int:
    """A Mixtral in bf16 of about that size, with Mixtral-8x7B's layers where they fit. Returns the bytes of its largest
    tensor."""
    hidden, ffn, vocabulary = (4096, 14336, 32000) if gigabytes >= 4 else (64, 224, 512)
    layers = max(1, round(gigabytes * 1e9 / (8 * 3 * hidden * ffn * 2)))
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "vocab_size": vocabulary, "num_hidden_layers": layers}
    _, model = model_of({"model_type": "mixtral", **sizes}, Path("config.json"))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_of(FAMILIES["mixtral"], model, {})))
    shapes = {f"{name}.weight": (vocabulary, hidden) for name in ("model.embed_tokens", "lm_head")}
    shapes["model.norm.weight"] = (hidden,)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}{part}_layernorm.weight": (hidden,) for part in ("input", "post_attention")}
        widths = {"q": hidden, "k": model.key_width, "v": model.key_width, "o": hidden}
        shapes |= {f"{prefix}self_attn.{part}_proj.weight": (n, hidden) for part, n in widths.items()}
        shapes[f"{prefix}block_sparse_moe.gate.weight"] = (8, hidden)
        for expert in range(8):
            name = f"{prefix}block_sparse_moe.experts.{expert}."
            shapes |= {f"{name}w1.weight": (ffn, hidden), f"{name}w3.weight": (ffn, hidden)}
            shapes[f"{name}w2.weight"] = (hidden, ffn)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if sum(2 * math.prod(s) for s in shards[-1].values()) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    index = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_zeros(folder / file, shard)
        index |= dict.fromkeys(shard, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    return max(2 * math.prod(shape) for shape in shapes.values())


def _write_zeros(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + end)


def measure(words: list[str], threads: int) -> tuple[float, int]:
    """(seconds, largest resident set in bytes) of a command that must succeed."""
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", *words], cwd=ROOT, env=os.environ | {"NPROC": str(threads)}, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(words)} failed with {os.waitstatus_to_exitcode(status)}")
    return time.monotonic() - began, usage.ru_maxrss * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=20.0, help="size of the model in 10^9 bytes")
    parser.add_argument("--nproc", type=int, nargs="+", default=[1], help="values of NPROC to compare")
    parser.add_argument("--folder", type=Path, help="where to write; default: the directory of temporary files")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        source, run, exported = (Path(temporary) / name for name in ("source", "run", "exported"))
        largest = write_source(source, arguments.gb)
        total = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        print(f"{total / 1e9:.4g} GB in bf16, largest tensor {largest / 2**20:,.0f} MiB")
        commands = {
            "import": ["launch.import_hf", f"source={source}", f"output={run}", "verify=false"],
            "export": ["launch.export_hf", f"checkpoint={run}", f"output={exported}", "verify=false"],
        }
        for threads in arguments.nproc:
            for name, words in commands.items():
                seconds, peak = measure(words, threads)
                print(
                    f"{name}, NPROC={threads}: {seconds:,.1f} s, at most {peak / 2**20:,.0f} MiB resident", flush=True
                )
            shutil.rmtree(run)
            shutil.rmtree(exported)
    return 0


if __name__ == "__main__":
    sys.exit(main())
