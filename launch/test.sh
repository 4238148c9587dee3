#!/usr/bin/env bash
# Runs the tests that this machine supports: bash launch/test.sh [pytest arguments]. Sets up .venv first if needed.
set -euo pipefail
cd -- "$(dirname -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")")"
bash launch/setup.sh --check || bash launch/setup.sh
exec .venv/bin/python -m pytest "$@"
