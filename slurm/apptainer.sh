#!/usr/bin/env bash
# Trains in an Apptainer container: IMAGE=/path/to/image.sif sbatch slurm/apptainer.sh [overrides]
# The image must have the dependencies of pyproject.toml; .venv is not used.
#SBATCH --job-name=switchyard --time=1-0
#SBATCH --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=14
#SBATCH --signal=B:USR1@120 --requeue --open-mode=append
: "${IMAGE:?which image?}"
export SWITCHYARD_PYTHON="apptainer exec --nv --bind ${SLURM_SUBMIT_DIR@Q} --pwd ${SLURM_SUBMIT_DIR@Q} \
${IMAGE@Q} python3"
exec bash "$SLURM_SUBMIT_DIR/launch/train.sh" "$@"
