"""What a process finds when a command begins."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def shell(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("closed", ["0<&-", ">&-", "2>&-", "0<&- >&- 2>&-"])
def test_closed_standard_streams_are_no_files(tmp_path: Path, closed: str) -> None:
    (tmp_path / "script.py").write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from launch import process; process.prepare()\n"
        f"file = open({str(tmp_path / 'file')!r}, 'w')\n"
        "print('a line'); print('another', file=sys.stderr); os.write(1, b'of C\\n'); sys.stdout.flush()\n"
        "print(file.fileno() > 2, file=file)\n"
    )
    done = shell(f"{sys.executable} {tmp_path / 'script.py'} {closed}")
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == "True\n"


def test_the_limit_of_open_files() -> None:
    limit = f"{sys.executable} -c 'import resource; from launch import process; process.prepare(); "
    limit += "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])'"
    assert shell(f"ulimit -Sn 64; ulimit -Hn 1000; {limit}").stdout == "1000\n"
    done = shell(f"ulimit -n 64; {sys.executable} -m launch.check")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("switchyard: error: the limit of open files is 64") and "ulimit" in done.stderr


@pytest.mark.parametrize(
    ("output", "code", "said"), [("/dev/full", 1, "No space left on device"), (">(exit 0)", 1, "")]
)
def test_a_command_whose_output_is_lost_fails_in_one_line(output: str, code: int, said: str) -> None:
    done = shell(
        f"{sys.executable} -c 'import time; from launch.check import *; time.sleep(0.5);"
        f'command(CheckConfig, "config", main)\' > {output}'
    )
    assert done.returncode == code
    assert done.stderr == (f"switchyard: error: {said}\n" if said else "")


@pytest.mark.parametrize("options", ["--help", "--version", "--cfg job"])
def test_an_answer_that_cannot_be_printed_is_no_traceback(options: str) -> None:
    command = f"{sys.executable} -m launch.evaluate checkpoint=x {options}"
    done = shell(f"{command} > /dev/full")
    assert (done.returncode, done.stderr) == (1, "switchyard: error: No space left on device\n")
    done = shell(f"set -o pipefail; {command} | exec 0<&-")
    assert (done.returncode, done.stderr) == (1, "")
