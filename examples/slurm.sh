#!/bin/bash
#SBATCH --job-name=pdfast
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
# sbatch examples/slurm.sh RUN_FOLDER [flags of pdfast.distill]
#
# One torchrun a node, one process a GPU. Two minutes before its time is up the job saves and ends; submitted again, or requeued
# after a failed node, it goes on from there. RUN_FOLDER and the data must be on a file system that all nodes see.
set -eu

run=$1
shift
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

exec srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$host:29500" \
    -m pdfast.distill --run-dir "$run" "$@"
