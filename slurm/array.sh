#!/usr/bin/env bash
# A sweep: a run, with a run directory, for each word after `--`; what comes before `--` is common to all. A word may
# hold several overrides. Then: python -m launch.compare runs/NAME-JOB_*
#   sbatch --array=0-1 slurm/array.sh train.steps=500 -- optim.lr=1e-3 'optim.lr=3e-3 optim.warmup_steps=60'
#SBATCH --job-name=switchyard-sweep --time=4:00:00
#SBATCH --nodes=1
#SBATCH --signal=B:USR1@120 --requeue --open-mode=append
common=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    common+=("$1")
    shift
done
shift || true
if [ "${SLURM_ARRAY_TASK_ID:-$#}" -ge $# ]; then
    echo "switchyard: error: $# words after --, so --array=0-$(($# - 1));" \
        "but this is element ${SLURM_ARRAY_TASK_ID-none}" >&2
    exit 2
fi
shift "$SLURM_ARRAY_TASK_ID"
read -ra own <<<"$1"
exec bash "$SLURM_SUBMIT_DIR/launch/train.sh" "${common[@]}" "${own[@]}"
