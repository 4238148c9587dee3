#!/usr/bin/env bash
# In an image with a PyTorch of its own (NGC's), once: bash slurm/image_python.sh FOLDER [pip's options]
# Makes FOLDER, a virtual environment that sees the packages of the image, and adds what this project needs besides.
# Nothing of the image is replaced: its versions are constraints, and pip fails where something needs others.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
folder=${1:?a folder for the virtual environment}
shift
python3 -m venv --system-site-packages "$folder"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
unset PIP_CONSTRAINT # of NGC images; the same versions, and some of packages that are not installed
python3 -m pip freeze --all | sed -nE 's/^([A-Za-z0-9_.-]+)==.*/&/p; s/^([A-Za-z0-9_.-]+) @ .*/\1/p' >"$scratch/listed"
# A package that was installed from a file is listed with its place; its version is in its metadata.
python3 - "$scratch/listed" >"$scratch/image" <<'PYTHON'
import sys
from importlib.metadata import version

names = {line.split("==")[0].strip() for line in open(sys.argv[1])}
print(*(f"{name}=={version(name)}" for name in sorted(names)), sep="\n")
PYTHON
python3 - >"$scratch/needed" <<'PYTHON'
import tomllib

with open("pyproject.toml", "rb") as file:
    needed = tomllib.load(file)["project"]["dependencies"]
print(*(line for line in needed if not line.startswith("torch")), sep="\n")
PYTHON
"$folder/bin/python" -m pip install --constraint "$scratch/image" --requirement "$scratch/needed" "$@"
"$folder/bin/python" - <<'PYTHON'
import importlib.util
from importlib.metadata import version

print("PyTorch", version("torch"), importlib.util.find_spec("torch").origin)
PYTHON
echo "SWITCHYARD_PYTHON=$folder/bin/python"
