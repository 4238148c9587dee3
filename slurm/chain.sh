#!/usr/bin/env bash
# For a cluster that does not requeue: N jobs of one run, each waiting for the one before. When one reaches the run's
# last step, those after it are cancelled. On the login node:
#   bash slurm/chain.sh N RUN_DIR [sbatch options] launch/train.sh [overrides]
set -euo pipefail
jobs=${1-} run_dir=${2-}
fail() {
    echo "chain.sh: $*; for example: bash slurm/chain.sh 3 runs/mine launch/train.sh train.steps=1000" >&2
    exit 2
}
[[ $jobs =~ ^[1-9][0-9]{0,3}$ ]] || fail "the number of jobs must be 1 to 9999, not '$jobs'"
[ -n "$run_dir" ] || fail "which run directory?"
[ $# -gt 2 ] || fail "what is to be submitted?"
shift 2
for word in "$@"; do
    [[ $word != --dependency* && $word != -d* ]] || fail "$word: what each job waits for is what a chain is"
done
# In quotes, for Hydra: a path may hold spaces, commas and the rest. Of the backslashes only those count that stand
# before a quote, or at the end.
quoted=$(printf '%s' "$run_dir" | sed -E "s/(\\\\*)('|\$)/\1\1\\\\\2/g; s/\\\\$//")
before=()
for ((number = 1; number <= jobs; number++)); do
    # A job that stops at its time limit ends with 75, which is "not ok"; one that is done ends with 0. Every earlier one
    # must be "not ok": so is a job that was cancelled because the one before it was done.
    after=()
    [ "$number" = 1 ] || after=(--dependency="afternotok:$(IFS=: && echo "${before[*]}")")
    job=$(sbatch --parsable --no-requeue --kill-on-invalid-dep=yes "${after[@]}" "$@" \
        "run.dir='$quoted'" slurm.max_requeues=0) || {
        echo "chain.sh: job $number of $jobs was refused" >&2
        exit 1
    }
    echo "$job"
    before+=("${job%%;*}")
done
