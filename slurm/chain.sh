#!/usr/bin/env bash
# For a cluster that does not requeue: N jobs of one run, each waiting for the one before. When one reaches the run's
# last step, those after it are cancelled. On the login node:
#   bash slurm/chain.sh N RUN_DIR [sbatch options] launch/train.sh [overrides]
set -euo pipefail
jobs=${1:?how many jobs?} run_dir=${2:?which run directory?}
shift 2
[ $# -gt 0 ] || { echo "chain.sh: what is to be submitted? For example launch/train.sh train.steps=1000" >&2; exit 2; }
after=()
for _ in $(seq "$jobs"); do
    # A job that stops at its time limit ends with 75, which is "not ok"; one that is done ends with 0.
    job=$(sbatch --parsable --no-requeue --kill-on-invalid-dep=yes "${after[@]}" "$@" \
        "run.dir=$run_dir" slurm.max_requeues=0)
    echo "$job"
    after=(--dependency="afternotok:${job%%;*}")
done
