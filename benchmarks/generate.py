"""`python -m benchmarks.generate [--json]`: tokens per second of greedy text generation, ours and Transformers', with
the same weights in fp32 on the same processor.

Each runs in its own process and they alternate; the first round is a warm-up, and the figures are medians. Transformers
runs with its default implementation of the experts and with `eager`; the faster one counts. Both have to write the same
tokens.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measurement import quietly, version
from benchmarks.workers import AS_OURS, Measurements, alternate, start_workers, timed

ROOT = Path(__file__).parents[1]
OURS, EAGER, DEFAULT = "Switchyard", "Transformers, eager", "Transformers, default"
PROMPT = 32
SIZES = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 8192}
SIZES |= {"max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
LATENT = {"kv_lora_rank": 128, "q_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": (
        "Mixtral",
        {"num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 1024},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_key_value_heads": 2, "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 256}
        | {"head_dim": 64, "norm_topk_prob": True},
    ),
    "olmoe": (
        "Olmoe",
        {"num_key_value_heads": 8, "num_experts": 32, "num_experts_per_tok": 4, "intermediate_size": 256},
    ),
    "gpt_oss": (
        "GptOss",
        {"num_key_value_heads": 2, "num_local_experts": 32, "num_experts_per_tok": 4, "intermediate_size": 256}
        | {"head_dim": 64, "sliding_window": 32},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {**LATENT, "num_key_value_heads": 8, "n_routed_experts": 32, "num_experts_per_tok": 4, "n_shared_experts": 1}
        | {"moe_intermediate_size": 256, "intermediate_size": 1024, "first_k_dense_replace": 1, "n_group": 4}
        | {"topk_group": 2, "num_mtp_layers": 0},
    ),
}


def write_model(family: str, folder: Path) -> None:
    """Random weights, large enough for tokens to differ."""
    import torch
    import transformers

    kind, settings = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SIZES, **settings))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.normal_(std=0.05)
    model.save_pretrained(folder)


def prompts(batch: int) -> list[list[int]]:
    import torch

    return torch.randint(SIZES["vocab_size"], (batch, PROMPT), generator=torch.Generator().manual_seed(1)).tolist()


def build_ours(run: Path, tokens: int, batches: list[int], threads: int) -> Measurements:
    from conf.commands import InferenceConfig
    from training.load_checkpoint import load_model

    here = InferenceConfig(precision="fp32")
    here.runtime.threads = threads
    stack = contextlib.ExitStack()
    loaded = stack.enter_context(load_model(str(run), here))
    from training.generate import Continuation, Sampling, continue_batch

    def generate(batch: int) -> list[list[int]]:
        continuations = [Continuation(prompt, index) for index, prompt in enumerate(prompts(batch))]
        for _ in continue_batch(loaded.built, continuations, Sampling(tokens)):
            pass
        return [continuation.ids for continuation in continuations]

    return _measurements(generate, batches, stack)


def build_transformers(
    source: Path, experts: str | None, tokens: int, batches: list[int], threads: int
) -> Measurements:
    import torch
    import transformers

    torch.set_num_threads(threads)
    options = {} if experts is None else {"experts_implementation": experts}
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options).eval()

    def generate(batch: int) -> list[list[int]]:
        ids = torch.tensor(prompts(batch))
        how = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": 0}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **how)[:, PROMPT:].tolist()

    return _measurements(generate, batches, model)


def _cpu_timed(step: Any) -> Any:
    def run() -> float:
        start = time.process_time()
        step()
        return time.process_time() - start

    return run


def _measurements(generate: Any, batches: list[int], kept: object) -> Measurements:
    """kept: lives as long as the measurements."""
    found: dict[str, Any] = {"kept": lambda: kept is not None}
    for batch in batches:
        found[f"seconds {batch}"] = timed(partial(generate, batch))
        found[f"CPU seconds {batch}"] = _cpu_timed(partial(generate, batch))
        found[f"tokens {batch}"] = partial(generate, batch)
    return found


def measure(family: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second by batch size and implementation."""
    with tempfile.TemporaryDirectory() as temporary:
        source, run = Path(temporary) / "source", Path(temporary) / "run"
        with quietly():
            write_model(family, source)
        words = ["launch.import_hf", f"source={source}", f"output={run}", "verify=false", "sequence_length=512"]
        subprocess.run([sys.executable, "-m", *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        how = arguments.tokens, arguments.batch, arguments.threads
        builds = {
            OURS: partial(build_ours, run, *how),
            DEFAULT: partial(build_transformers, source, None, *how),
            EAGER: partial(build_transformers, source, "eager", *how),
        }
        found, unit = {}, "CPU seconds" if arguments.cpu_time else "seconds"
        with start_workers(builds, (OURS,), peers_as_ours=arguments.peers_as_ours) as workers:
            for batch in arguments.batch:
                written = {name: worker.measure(f"tokens {batch}") for name, worker in workers.items()}
                seconds = alternate(workers, f"{unit} {batch}", arguments.repetitions)
                rates = {name: batch * arguments.tokens / s for name, s in seconds.items()}
                ratio = rates[OURS] / max(rates[DEFAULT], rates[EAGER])
                same = written[OURS] == written[DEFAULT] == written[EAGER]
                found[batch] = {"tokens_per_second": rates, "ratio": ratio, "same_tokens": same}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=[*FAMILIES])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=64, help="generated after a prompt of 32")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="tokens per second of CPU time: other load counts less")
    parser.add_argument("--peers-as-ours", action="store_true", help=AS_OURS)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    arguments = parser.parse_args()
    found = {family: measure(family, arguments) for family in arguments.family}
    if arguments.json:
        print(json.dumps({"transformers": version("transformers"), "families": found}))
        return 0
    for family, batches in found.items():
        for batch, result in batches.items():
            print(f"{family}, batch {batch}: ours / the faster Transformers {result['ratio']:.2f}", end="")
            print("" if result["same_tokens"] else "; THE TOKENS DIFFER")
            for name, rate in result["tokens_per_second"].items():
                print(f"  {name:24} {rate:8.1f} tokens/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
