#!/usr/bin/env bash
# Pretraining as a SLURM job on one node or many, for as long as it takes: ahead of the time limit the run writes a
# checkpoint, and the job goes back into the queue and on from there.
#
#     sbatch runs/slurm.sh                      # one node: all its GPUs, or its CPUs where there are none
#     sbatch --nodes=4 runs/slurm.sh --B 16     # four; what follows the script are flags of train_gpt2.py
#     scancel --batch --signal=USR1 JOB    # checkpoint, and into the queue again
#     scancel JOB                          # checkpoint, if 30 s (SLURM's KillWait) are enough, and the end
#
# Submit it from the repository's folder, which all nodes must share. Flags of sbatch win over these lines; --time must
# be well above --signal's seconds, or the run gets nowhere.
#
#SBATCH --job-name=gpt2
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
set -euo pipefail

MAX_RESTARTS=3  # how often the processes start anew after a crash, from the newest checkpoint
PORT=29500      # where the nodes meet, on the first of them
SAVE_SECONDS=90 # for the step under way and the checkpoint, then the processes are killed: less than --signal's 120

# SLURM runs a copy of this script from elsewhere, but in the folder where it was submitted.
[ -f train_gpt2.py ] || { echo "error: no train_gpt2.py in $PWD: submit from the repository's folder" >&2; exit 1; }
PATH="$PWD/.venv/bin:$PATH"

# A process per GPU. Without GPUs one per node, which has all its CPUs.
gpus=${SLURM_GPUS_ON_NODE:-0}
processes=$((gpus ? gpus : 1))
export OMP_NUM_THREADS=$((SLURM_CPUS_ON_NODE > processes ? SLURM_CPUS_ON_NODE / processes : 1))
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$SAVE_SECONDS # torchrun's own is 30
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # or restarted processes find the addresses of the dead ones, and hang

say() { echo "$(date '+%F %T') job $SLURM_JOB_ID: $*"; }
say "start $((${SLURM_RESTART_COUNT:-0} + 1)), $SLURM_JOB_NUM_NODES x $processes processes on $SLURM_JOB_NODELIST"

# The SIGTERM is for the step's processes: srun itself would have them killed at once. torchrun forwards it, and ends
# with a traceback when the checkpoint is written.
stopped=
trap 'stopped=yes; scancel --signal=TERM "$SLURM_JOB_ID.0" || true' USR1

# In an exclusive job the step has no GPUs unless it asks.
srun ${SLURM_GPUS_ON_NODE:+--gpus-per-node="$gpus"} \
    torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$processes" --max-restarts=$MAX_RESTARTS \
    --rdzv-backend=c10d --rdzv-endpoint="$(hostname):$PORT" --rdzv-id="$SLURM_JOB_ID" \
    train_gpt2.py --resume "$@" &
step=$! status=0
wait $step || status=$?

if [ "$stopped" ]; then # the signal cut the wait short
    say "warned of the time limit: checkpoint, then requeue"
    status=0
    wait $step || status=$?
    [ $status = 0 ] || scontrol requeue "$SLURM_JOB_ID" # 0: it was at the end anyway
fi
exit $status
