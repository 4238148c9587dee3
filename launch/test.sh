#!/usr/bin/env bash
# Runs the tests that this machine supports: bash launch/test.sh [pytest arguments]. Sets up .venv first if needed.
#
#   TEST_PROCESSES  how many processes run them; default: one per CPU core and 6 GiB of memory, at most 4, and one more
#                   where a Slurm is installed, whose tests mostly wait. With 1, or with -n, --pdb or the name of a single
#                   test (FILE::TEST) among the arguments, pytest itself runs them.
set -euo pipefail
cd -- "$(dirname -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")")"
bash launch/setup.sh --check || bash launch/setup.sh

default_processes() {
    local cores memory_gib processes
    cores=$(nproc)
    ! PATH=$PATH:/usr/sbin type slurmctld >/dev/null 2>&1 || cores=$((cores + 1))
    memory_gib=$(awk '/^MemAvailable/ { print int($2 / 1048576) }' /proc/meminfo)
    processes=$((memory_gib / 6 < cores ? memory_gib / 6 : cores))
    processes=$((processes > 4 ? 4 : processes))
    echo $((processes < 1 ? 1 : processes))
}

processes=${TEST_PROCESSES:-$(default_processes)}
case " $*" in *" -n"* | *" --pdb"* | *::*) processes=1 ;; esac
distribute=()
# tests/conftest.py says which tests stay together.
[ "$processes" = 1 ] || distribute=(-n "$processes")
exec .venv/bin/python -m pytest "${distribute[@]}" "$@"
