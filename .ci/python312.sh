#!/usr/bin/env bash
# Tests engine, layouts and checkpoints with the Megatron-Core that constraints.txt pins for Python 3.12, on the first
# 3.12 in ~/.pyenv/versions or PATH that has PyTorch. Downloads the small packages only: never a PyTorch, which may take
# gigabytes. Where there is no such interpreter, says so and tests nothing.
set -euo pipefail
cd -- "$(dirname -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")")"
shopt -s nullglob
found="" without=""
for python in ~/.pyenv/versions/3.12*/bin/python python3.12; do
    "$python" -c 'import sys; assert sys.version_info[:2] == (3, 12)' 2>/dev/null || continue
    if "$python" -c 'import torch' 2>/dev/null; then
        found=$python
        break
    fi
    without+="${without:+, }$python"
done
if [ -z "$found" ]; then
    why=${without:+"no PyTorch in $without"}
    echo "ci: SKIPPED on Python 3.12, and with it the newer Megatron-Core: ${why:-no 3.12 in ~/.pyenv/versions or PATH}"
    exit 0
fi

venv=$(mktemp -d)
trap 'rm -rf -- "$venv"' EXIT
"$found" -m venv --system-site-packages "$venv"
grep -v '^torch==' constraints.txt >"$venv/constraints.txt" # the PyTorch that is there stays
"$venv/bin/python" - >"$venv/requirements.txt" <<'PYTHON'
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
print(*(line for line in wanted if not line.startswith(("torch", "ruff", "shellcheck"))), sep="\n")
PYTHON
"$venv/bin/python" -m pip install --quiet --no-input --only-binary megatron-core \
    -c "$venv/constraints.txt" -r "$venv/requirements.txt"
versions='from importlib.metadata import version as v; print("Megatron-Core", v("megatron-core"), "torch", v("torch"))'
echo "ci: $found, $("$venv/bin/python" -c "$versions")"
"$venv/bin/python" -m pytest tests/parallel/test_megatron_compat.py tests/parallel/test_engine.py \
    tests/ops/test_registry.py tests/parallel/test_parity.py tests/parallel/test_expert_layouts.py \
    tests/parallel/test_block_adamw.py tests/parallel/test_checkpoint.py tests/parallel/test_checkpoint_format.py \
    tests/parallel/test_optimizer_state.py
