#!/usr/bin/env bash
# Trains: bash launch/train.sh [overrides]. Sets up .venv first where there is none. Paths in overrides are relative to
# the repository root, which is where everything runs.
#
# On a cluster: sbatch [options] launch/train.sh [overrides], one task per GPU; see slurm/README.md. Two minutes
# before its time limit the job is signalled, writes a checkpoint and is requeued. Options of sbatch override these:
#SBATCH --job-name=switchyard
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
root=$(dirname -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")")
# sbatch runs a copy of this file from its spool directory.
[ -f "$root/launch/setup.sh" ] || root=${SLURM_SUBMIT_DIR:-$root}
if ! cd -- "$root" 2>/dev/null || [ ! -f launch/setup.sh ]; then
    echo "switchyard: error: $root is not the repository: submit from there, cd REPOSITORY; sbatch launch/train.sh" >&2
    exit 2
fi
# Splits a string into words at spaces that are not quoted, into the array `words`.
split_words() {
    local split
    if ! split=$(printf '%s' "$1" | xargs -r printf '%s\n'); then
        echo "switchyard: error: cannot split $1 into words" >&2
        exit 2
    fi
    words=()
    [ -z "$split" ] || mapfile -t words < <(printf '%s\n' "$split")
}
# SWITCHYARD_PYTHON: the command that starts Python instead of .venv's, in a container (slurm/README.md).
split_words "${SWITCHYARD_PYTHON-}"
python=("${words[@]:-.venv/bin/python}")
if [ -z "${SWITCHYARD_PYTHON-}" ] && ! bash launch/setup.sh --check; then
    if [ -n "${SLURM_JOB_ID:-}" ]; then # compute nodes often have no network
        echo "switchyard: error: no ready .venv in $root: run bash launch/setup.sh on a login node first" >&2
        exit 2
    fi
    bash launch/setup.sh
fi
# Whether this is a task of an outer srun. SLURM_STEP_ID is not sufficient: a job that is submitted inside a step, as
# from `srun --pty bash`, inherits the variables of that step. The slurmstepd process above this one shows the job.
in_step() {
    local interactive_step=4294967290 # salloc's shell on a compute node: a step without tasks
    [ "${SLURM_STEP_ID:-$interactive_step}" != "$interactive_step" ] || return 1
    local pid=$$ title
    while [ "${pid:-0}" -gt 1 ]; do
        title=$(tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline") || return 0
        case $title in
        "slurmstepd: [$SLURM_JOB_ID.batch]"*) return 1 ;;
        "slurmstepd: [$SLURM_JOB_ID."* | "slurmstepd: [$SLURM_JOB_ID+"*) return 0 ;;
        "slurmstepd: ["*) return 1 ;; # of another job, around salloc
        esac
        pid=$(sed -n 's/^PPid:[[:space:]]*//p' "/proc/$pid/status" 2>/dev/null) || return 0
    done
    return 0
}

if [ -z "${SLURM_JOB_ID-}" ] || in_step; then # without Slurm, or as a rank
    exec "${python[@]}" -m launch.train "$@"
fi
. launch/job.sh
