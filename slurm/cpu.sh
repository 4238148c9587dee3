#!/usr/bin/env bash
# Two nodes without GPUs, a task per socket: sbatch slurm/cpu.sh [overrides]
#SBATCH --job-name=switchyard --time=1-0
#SBATCH --nodes=2 --ntasks-per-node=2 --cpus-per-task=32
#SBATCH --signal=B:USR1@120 --requeue --open-mode=append
exec bash "$SLURM_SUBMIT_DIR/launch/train.sh" cluster=cpu "$@"
