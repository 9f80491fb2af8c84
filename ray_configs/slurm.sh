#!/usr/bin/env bash
# One Ray cluster on the nodes of a Slurm job, one experiment on it:
#   sbatch --nodes=4 --gpus-per-node=2 ray_configs/slurm.sh run paper-cifar10 gpus_per_actor=0.5
# Submit it from the repository's root on a file system that all nodes share; results go to runs/ there.
# VENV names the virtual environment that sparsyfed is installed in (default .venv).
#SBATCH --job-name=sparsyfed
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=sparsyfed-%j.log
set -euo pipefail

if [[ $# -eq 0 ]]; then
    set -- run
fi
source "${VENV:-.venv}/bin/activate"

# Every job has a token of its own, in a file that only its owner reads.
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="$PWD/.ray-token-$SLURM_JOB_ID"
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT
(umask 077 && python -c 'import secrets; print(secrets.token_hex(32))' > "$RAY_AUTH_TOKEN_PATH")

# Nodes of a busy machine are slow to start; Ray's own limit is 30 s.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300
read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((20000 + SLURM_JOB_ID % 10000))

# The same command on every node: the one whose address it is becomes the head and runs what follows `--`.
# The nodes are ours alone (--exclusive), for at its end symmetric-run stops every Ray on them.
srun --kill-on-bad-exit=1 ray symmetric-run \
    --address "$head:$port" \
    --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus="$SLURM_CPUS_ON_NODE" \
    --num-gpus="${SLURM_GPUS_ON_NODE:-0}" \
    --dashboard-host=127.0.0.1 \
    -- python -m cluster "$@" address=auto
