#!/usr/bin/env bash
# One node of eight GPUs: sbatch slurm/one_node.sh [overrides]
#SBATCH --job-name=switchyard --time=1-0
#SBATCH --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=14
#SBATCH --signal=B:USR1@120 --requeue --open-mode=append
exec bash "$SLURM_SUBMIT_DIR/launch/train.sh" cluster=h100 "$@"
