#!/usr/bin/env bash
# A grid dealt to the tasks of a Slurm job array, each on one node and with a Ray of its own:
#   sbatch --array=1-10 --cpus-per-task=4 ray_configs/slurm-array.sh run paper-methods actors=4 --output runs/methods
# Submit it from the repository's root on a file system that all nodes share, and whose locks reach them all. The
# same command again goes on with what is not complete: a task out of time or killed, or a node that was lost.
# VENV names the virtual environment that sparsyfed is installed in (default .venv).
#SBATCH --job-name=sparsyfed
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=sparsyfed-%A_%a.log
# Ten minutes before the time is over: the run ends after its round, with a checkpoint.
#SBATCH --signal=B:TERM@600
set -euo pipefail

source "${VENV:-.venv}/bin/activate"
exec python -m cluster "$@" --shard "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
