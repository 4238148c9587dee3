#!/usr/bin/env bash
# Creates .venv at the repository root and installs the versions in constraints.txt. Does nothing if it is up to date.
#
#   bash launch/setup.sh [EXTRA ...]   EXTRA: optional dependencies of pyproject.toml (kernels, te, wandb, mlflow, data, docs, plots, lint)
#   bash launch/setup.sh --check       installs nothing; exit code 0 when .venv is ready, 1 when it is not
#
#   PYTHON      the interpreter to build .venv with; default: the first suitable one in PATH
#   TORCH_SPEC  pip arguments that choose a PyTorch build, e.g. "torch==2.13.0 --index-url URL"
# Both and the extras are saved in .venv for later calls. pip's settings (PIP_INDEX_URL, pip.conf, ...) apply as usual.
set -euo pipefail
root=$(dirname -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")")
cd -- "$root"

# Four lines: a hash of the two files read below ("unfinished" while pip is running), PYTHON, TORCH_SPEC, the extras.
stamp=.venv/setup.stamp
log=.venv/setup.log
lock=.venv/setup.lock

# Fails if .venv was moved to another machine, or its interpreter or pip is missing.
check_python='import pip, sys; assert (3, 11) <= sys.version_info < (3, 14)'

say() { printf 'setup: %s\n' "$*" >&2; }

fail() {
    say "$@"
    exit 1
}

# Sets `previous`, the lines of the stamp, and the requested configuration: files, python, torch_spec, extras.
read_request() {
    previous=("" "" "" "")
    [ ! -f "$stamp" ] || mapfile -t previous <"$stamp"
    files=$(cat pyproject.toml constraints.txt | sha256sum | cut -d ' ' -f 1)
    python=${PYTHON-${previous[1]-}}
    torch_spec=${TORCH_SPEC-${previous[2]-}}
    extras=${*:-${previous[3]-}}
}

write_stamp() { printf '%s\n' "$1" "$python" "$torch_spec" "$extras" >"$stamp"; }

ready() {
    local requested=("$files" "$python" "$torch_spec" "$extras")
    [ -x .venv/bin/python ] && [ "${previous[*]@Q}" = "${requested[*]@Q}" ]
}

# Runs a command with its output in the log, whose end is shown on failure.
run() {
    local code=0
    "$@" >>"$log" 2>&1 || code=$?
    [ "$code" != 0 ] || return 0
    tail -n 20 "$log" >&2
    # A failure of pip leaves complete packages, which the next call keeps; a signal may leave incomplete ones.
    if [ "$code" -lt 128 ] && [ "$1" = .venv/bin/python ]; then write_stamp failed; fi
    fail "this failed: $* (the end of $root/$log is above)." \
        "Look at the network, pip's settings (pip config list), TORCH_SPEC and the free disk space, then run it again."
}

# Sets interpreter and version. Megatron-Core 0.16 has wheels for 3.10 too, which is too old for this project.
find_python() {
    local candidates=(python3 python3.13 python3.12 python3.11 python) found=""
    [ -z "$python" ] || candidates=("$python")
    for interpreter in "${candidates[@]}"; do
        version=$("$interpreter" -c 'import platform; print(platform.python_version())' 2>/dev/null) || continue
        case $version in
        3.11.* | 3.12.* | 3.13.*) return ;;
        esac
        found+="$interpreter is $version, "
    done
    fail "no usable Python. Megatron-Core has wheels for Python 3.11, 3.12 and 3.13; found here: ${found:-none, }" \
        "so install one of the three or name it: PYTHON=/path/to/python3.12 bash launch/setup.sh"
}

create_venv() {
    find_python
    say "creating .venv with Python $version ($(command -v "$interpreter"))"
    # .venv itself may be a link to another disk, and another set-up may be waiting for the lock.
    find .venv/ -mindepth 1 ! -path ".venv/${lock##*/}" -delete
    write_stamp unfinished
    run "$interpreter" -m venv .venv
}

# Prints the requirements in pyproject.toml: those of the given extras, or the common ones without arguments.
requirements() {
    .venv/bin/python - "$@" <<'PYTHON'
import sys, tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
optional = project["optional-dependencies"]
print(*sum([optional[name] for name in sys.argv[1:]] or [project["dependencies"], optional["dev"]], []), sep="\n")
PYTHON
}

install() {
    local pip=(.venv/bin/python -m pip install --disable-pip-version-check --no-input --only-binary megatron-core)
    requirements >.venv/requirements.txt
    if [ -n "$torch_spec" ]; then
        say "installing $torch_spec"
        # shellcheck disable=SC2086  # several words, as in requirements below
        run "${pip[@]}" $torch_spec
    elif ! command -v nvidia-smi >/dev/null && ! .venv/bin/python -m pip show --quiet torch 2>/dev/null; then
        say "no NVIDIA GPU found. If pip's index has the CUDA build of PyTorch (gigabytes), install the CPU build" \
            "with TORCH_SPEC='torch==2.13.0 --index-url URL', URL being PyTorch's own index of CPU builds"
    fi
    say "installing PyTorch, Megatron-Core and the rest; this takes a few minutes (details: $log)"
    cp constraints.txt .venv/constraints.txt
    if [ -n "$torch_spec" ]; then # keep the requested PyTorch instead of the tested one
        sed -i '/^torch==/d' .venv/constraints.txt
        .venv/bin/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' \
            >>.venv/constraints.txt
    fi
    run "${pip[@]}" -c .venv/constraints.txt -r .venv/requirements.txt
    if [ -n "$extras" ]; then
        # shellcheck disable=SC2086
        requirements $extras >.venv/extras.txt
        say "installing $extras"
        # These are built against the PyTorch in .venv, which an isolated build would not have.
        run "${pip[@]}" -c .venv/constraints.txt --no-build-isolation -r .venv/extras.txt
    fi
}

if [ "${1-}" = --check ]; then
    read_request
    if ready; then exit 0; else exit 1; fi
fi

case "$(uname -s) $(uname -m)" in
"Linux x86_64" | "Linux aarch64") ;;
*) fail "Megatron-Core has wheels for Linux on x86_64 and aarch64, none for $(uname -s) on $(uname -m)." \
    "Use a Linux machine, a Linux container or WSL 2." ;;
esac

mkdir -p .venv
exec 9>"$lock"
flock --nonblock --conflict-exit-code 75 9 || case $? in
75) say "another set-up of this .venv is running: waiting for it" && flock 9 ;;
*) say "this file system has no locks: make sure that no other set-up runs here" ;;
esac
read_request "$@"
if ready; then
    say ".venv is up to date"
    exit 0
fi

for extra in $extras; do
    grep -q "^$extra = \[" pyproject.toml ||
        fail "there is no extra $extra; pyproject.toml has kernels, te, wandb, mlflow, data, docs, plots, lint and dev"
done
# pip treats Ctrl-C as an ordinary failure; this keeps the stamp at "unfinished".
trap 'exit 130' INT
if [ "${previous[0]}" = unfinished ]; then
    say "the last set-up was interrupted: starting again"
    create_venv
elif [ -f "$stamp" ] && [ "$python $torch_spec" != "${previous[1]} ${previous[2]}" ]; then
    create_venv # pip does not distinguish builds of a PyTorch version
elif ! .venv/bin/python -c "$check_python" 2>/dev/null; then
    create_venv
fi
write_stamp unfinished
install
write_stamp "$files"
say "done in $SECONDS s"
