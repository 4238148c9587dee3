"""slurm/image_python.sh in a stand-in for an NGC image: a Python with a PyTorch of its own."""

import base64
import hashlib
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.training.helpers import ROOT

TORCH = "2.99.0a0+nv25.6"


def wheel(folder: Path, name: str, version: str, *requires: str) -> None:
    """Writes a package with a module that has its version."""
    module, info = name.replace("-", "_"), f"{name.replace('-', '_')}-{version}.dist-info"
    files = {
        f"{module}/__init__.py": f"__version__ = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        + "".join(f"Requires-Dist: {r}\n" for r in requires),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(text)}\n"
    files[f"{info}/RECORD"] = record + f"{info}/RECORD,,\n"
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


@pytest.fixture
def image(tmp_path: Path) -> dict[str, str]:
    """The environment variables of a shell in the image; `tmp_path / "index"` is what pip can download."""
    site, index = tmp_path / "image", tmp_path / "index"
    index.mkdir()
    (tmp_path / "own").mkdir()
    wheel(tmp_path / "own", "torch", TORCH)
    own = next((tmp_path / "own").iterdir())
    env = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")} | {"PIP_CONFIG_FILE": os.devnull}
    zipfile.ZipFile(own).extractall(site)  # as pip installs it
    with (ROOT / "pyproject.toml").open("rb") as file:
        needed = tomllib.load(file)["project"]["dependencies"]
    for line in needed:
        name, least = re.match(r"([a-z-]+)[>=]+([0-9.]+)", line).groups()
        if name != "torch":
            wheel(index, name, least, "torch>=2.6")
    wheel(index, "torch", "99.0")  # what pip would take if it might
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").symlink_to(f"{sys.base_prefix}/bin/python3")
    path = f"{tmp_path}/bin:{env['PATH']}"
    return env | {"PATH": path, "PYTHONPATH": str(site), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index)}


def make(env: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "slurm/image_python.sh"), str(folder)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)


def test_the_images_torch_stays(image, tmp_path):
    made = make(image, tmp_path / "python")
    assert made.returncode == 0, made.stderr
    version, last = made.stdout.splitlines()[-2:]
    assert (
        version.startswith(f"PyTorch {TORCH} {tmp_path}/image/")
        and last == f"SWITCHYARD_PYTHON={tmp_path}/python/bin/python"
    )
    code = "import torch, hydra_core, megatron_core; print(torch.__version__, hydra_core.__file__)"
    command = [tmp_path / "python/bin/python", "-c", code]
    seen = subprocess.run(command, env=image, capture_output=True, text=True, check=True).stdout
    assert seen.startswith(f"{TORCH} {tmp_path}/python/")


def test_what_needs_another_torch_fails(image, tmp_path):
    wheel(tmp_path / "index", "hydra-core", "1.3.99", "torch>=99")
    (tmp_path / "index" / "hydra_core-1.3.2-py3-none-any.whl").unlink()
    made = make(image, tmp_path / "python")
    assert made.returncode != 0 and "torch" in made.stderr + made.stdout
    assert not [*(tmp_path / "python").glob("lib/*/site-packages/torch")]
