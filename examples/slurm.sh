#!/bin/bash
# Trains with Slurm for as long as it takes: when the time of the job runs out, the run saves itself,
# and the job is put into the queue again and goes on from there.
#
#   sbatch examples/slurm.sh runs/a edm-imagenet64-adm data.path=/data/imagenet-64.zip
#
# Change the lines below to what your cluster has; one task for each GPU.
#SBATCH --job-name=tessera
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=tessera-%j.log
# Ten minutes before the end, every process of the run gets SIGUSR1: it finishes its step, saves and
# ends with 128 + 10. Give it longer than a preview and the writing of a checkpoint take.
#SBATCH --signal=USR1@600

set -u
run=$1
shift

if [[ -f $run/recipe.yaml ]]; then
    # Slurm starts a job again only when nothing of it runs any more, so that the lock of a node that
    # was lost holds nothing.
    if ((${SLURM_RESTART_COUNT:-0} > 0)); then rm -f "$run/run.lock"; fi
    arguments=(--resume "$run")
else
    arguments=("$@" "run.dir=$run")
fi

code=0
srun --kill-on-bad-exit=0 tessera train "${arguments[@]}" || code=$?
if ((code == 138)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
