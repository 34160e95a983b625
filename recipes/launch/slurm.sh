#!/usr/bin/env bash
# One recipe on several machines with eight GPUs, under Slurm:
#
#     sbatch recipes/launch/slurm.sh
#     RECIPE=recipes/cifar10-resnet18.yaml OUT=runs/cifar10 GPUS=4 \
#         sbatch --nodes=1 --gpus-per-node=4 recipes/launch/slurm.sh
#
# Two minutes before the time limit the run is told to stop: it writes its checkpoint, and the job queues again and goes
# on from there. So it does after preemption (PreemptMode=REQUEUE; with PreemptParameters=send_user_signal, or a
# GraceTime, it is warned of that too) and after a machine was lost. The checkpoint must be on a disk that all machines
# see. What a lost process takes with it is at most what was done since the last checkpoint.
#SBATCH --job-name=robustcompress
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail

: "${RECIPE:=recipes/imagenet-resnet50.yaml}" "${OUT:=runs/imagenet-resnet50}" "${GPUS:=8}"

# What torchrun gives the processes to write their checkpoint in, before it kills them.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=90
export OMP_NUM_THREADS=1

read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")  # where the processes of all machines meet

# Once only: the second signal would have the processes stop without a checkpoint.
step='' stopped=''
trap 'stopped=yes; trap "" TERM; [[ -z $step ]] || kill -TERM "$step"' TERM

srun --kill-on-bad-exit=0 torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc-per-node="$GPUS" \
    --max-restarts=3 \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$first:29500" \
    --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    -m robustcompress run "$RECIPE" --out "$OUT" --checkpoint "$OUT.checkpoint" &
step=$!

# A trap ends `wait` early; what counts is how the step itself ends.
status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do
    status=0
    wait "$step" || status=$?
done

if [[ -n $stopped && ! -e $OUT ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
