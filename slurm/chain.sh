#!/usr/bin/env bash
# A chain of N jobs of one run, for clusters without requeueing: each job waits for the previous ones. When one reaches
# the last step of the run, the remaining ones are cancelled. On the login node:
#   bash slurm/chain.sh N RUN_DIR [sbatch options] launch/train.sh [overrides]
set -euo pipefail
jobs=${1-} run_dir=${2-}
fail() {
    echo "chain.sh: $*; for example: bash slurm/chain.sh 3 runs/mine launch/train.sh train.steps=1000" >&2
    exit 2
}
[[ $jobs =~ ^[1-9][0-9]{0,3}$ ]] || fail "the number of jobs must be 1 to 9999, not '$jobs'"
[ -n "$run_dir" ] || fail "no run directory is given"
[ $# -gt 2 ] || fail "no command to submit is given"
shift 2
for word in "$@"; do
    [[ $word != --dependency* && $word != -d* ]] || fail "$word: the chain sets the dependencies itself"
done
# Quoted for Hydra, since a path may have spaces, commas and so on. Only backslashes before a quote, or at the end, are
# special.
quoted=$(printf '%s' "$run_dir" | sed -E "s/(\\\\*)('|\$)/\1\1\\\\\2/g; s/\\\\$//")
before=()
for ((number = 1; number <= jobs; number++)); do
    # A job that stops at its time limit ends with 75, which is "not ok"; a finished run ends with 0. All earlier jobs
    # must be "not ok": so is a job that was cancelled because the previous one finished the run.
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
