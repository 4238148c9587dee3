#!/usr/bin/env bash
# Fetches what a machine with PyTorch and Triton lacks for tests/gpu/day.py into a folder: bash tests/gpu/wheels.sh
# [FOLDER, default .whl] [PYTHON VERSION, default 3.12]. Megatron-Core, Hydra and zstandard, no torch, no triton.
set -euo pipefail
cd -- "$(dirname -- "$(dirname -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")")")"
folder=${1:-.whl} version=${2:-3.12}
mkdir -p -- "$folder"
# Megatron-Core is pinned twice, for Python before 3.12 and from it on.
if [ "${version#3.}" -lt 12 ]; then range='< "3.12"'; else range='>= "3.12"'; fi
pinned() { grep -E "^$1==[^ ]+( ; python_version $range)?$" constraints.txt | cut -d ' ' -f 1; }
python3 -m pip download -q --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 -d "$folder" \
    "$(pinned megatron-core)" "$(pinned hydra-core)" "$(pinned omegaconf)" "$(pinned zstandard)"
python3 -m pip wheel -q --no-deps -w "$folder" "$(pinned antlr4-python3-runtime)" # it has no wheel of its own
du -sh -- "$folder"
