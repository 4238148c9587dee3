#!/usr/bin/env bash
# Trains: bash launch/train.sh [overrides]. Sets up .venv first where there is none. Paths in overrides are relative to
# the repository root, which is where everything runs.
#
# On a cluster: sbatch [options] launch/train.sh [overrides], one task per GPU; slurm/README.md tells more. Two minutes
# before its time is up the job is told, writes a checkpoint and is requeued. Options given to sbatch replace these:
#SBATCH --job-name=switchyard
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
root=$(dirname -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")")
# sbatch runs a copy of this file from its spool folder.
[ -f "$root/launch/setup.sh" ] || root=${SLURM_SUBMIT_DIR:-$root}
if ! cd -- "$root" 2>/dev/null || [ ! -f launch/setup.sh ]; then
    echo "switchyard: error: $root is not the repository: submit from there, cd REPOSITORY; sbatch launch/train.sh" >&2
    exit 2
fi
# SWITCHYARD_PYTHON: the command that starts Python, where it is not .venv's: in a container (slurm/README.md).
read -ra python <<<"${SWITCHYARD_PYTHON:-.venv/bin/python}"
if [ -z "${SWITCHYARD_PYTHON-}" ] && ! bash launch/setup.sh --check; then
    if [ -n "${SLURM_JOB_ID:-}" ]; then # compute nodes often have no network
        echo "switchyard: error: no ready .venv in $root: run bash launch/setup.sh on a login node first" >&2
        exit 2
    fi
    bash launch/setup.sh
fi
# Outside of Slurm, or as a task that somebody else's srun has started.
interactive_step=4294967290 # salloc's shell on a compute node: a step by name, but tasks are still to be started
if [ -z "${SLURM_JOB_ID-}" ] || [ "${SLURM_STEP_ID-$interactive_step}" != "$interactive_step" ]; then
    exec "${python[@]}" -m launch.train "$@"
fi
. launch/job.sh
