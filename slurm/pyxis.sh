#!/usr/bin/env bash
# In a container through NVIDIA's pyxis and enroot: IMAGE=nvcr.io#nvidia/pytorch:TAG sbatch slurm/pyxis.sh [overrides]
# The image needs what pyproject.toml lists; .venv is not used.
#SBATCH --job-name=switchyard --time=1-0
#SBATCH --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=14
#SBATCH --signal=B:USR1@120 --requeue --open-mode=append
: "${IMAGE:?which image?}"
mounts=$SLURM_SUBMIT_DIR:$SLURM_SUBMIT_DIR
export SWITCHYARD_PYTHON=${SWITCHYARD_PYTHON:-python3}
export SWITCHYARD_SRUN="--container-image=${IMAGE@Q} --no-container-mount-home \
--container-mounts=${mounts@Q} --container-workdir=${SLURM_SUBMIT_DIR@Q}"
# The home directory of the container is not kept, so neither would the token files in it be.
exec bash "$SLURM_SUBMIT_DIR/launch/train.sh" data.cache_dir=runs/cache "$@"
