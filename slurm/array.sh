#!/usr/bin/env bash
# A sweep: one run, with its own run directory, per word after `--`; overrides before `--` are common to all runs. A
# word may have several overrides. Compare the runs with: python -m launch.compare runs/NAME-JOB_*
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
    wanted="--array=0-$(($# - 1))"
    [ $# -gt 0 ] || wanted="no run is given (COMMON -- A B C)"
    echo "switchyard: error: $# words after --, so $wanted;" \
        "but this is element ${SLURM_ARRAY_TASK_ID-none}" >&2
    exit 2
fi
shift "$SLURM_ARRAY_TASK_ID"
# Each override begins with a key and an equals sign; other spaces belong to a value.
mapfile -t own < <(printf '%s' "$1" | sed -E 's/^\s+|\s+$//g; s/\s+([+~]*[A-Za-z_][A-Za-z0-9_.@/]*=)/\n\1/g')
exec bash "$SLURM_SUBMIT_DIR/launch/train.sh" "${common[@]}" "${own[@]}"
