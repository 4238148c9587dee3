#!/usr/bin/env bash
# Four nodes of eight GPUs, each looked at before training starts: sbatch --nodes=N slurm/many_nodes.sh [overrides]
#SBATCH --job-name=switchyard --time=1-0
#SBATCH --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=14
#SBATCH --exclusive
#SBATCH --signal=B:USR1@300 --requeue --open-mode=append
# The interface through which NCCL finds the other nodes, where it takes the wrong one (`ip addr` shows what there is):
# export NCCL_SOCKET_IFNAME=ib0
exec bash "$SLURM_SUBMIT_DIR/launch/train.sh" cluster=h100 runtime.preflight=true "$@"
