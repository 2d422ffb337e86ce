#!/usr/bin/env bash
# Pretraining as a SLURM job on one or more nodes. The job may take longer than its time limit:
# shortly before the limit, the run writes a checkpoint, and the job requeues itself and resumes.
#
#     sbatch runs/slurm.sh                      # one node: all its GPUs, or its CPUs if it has none
#     sbatch --nodes=4 runs/slurm.sh --B 16     # four nodes; flags are passed to train_gpt2.py
#     scancel --batch --signal=USR1 JOB         # write a checkpoint and requeue now
#     scancel JOB                               # end the job; it writes a checkpoint first if that
#                                               # takes less than SLURM's KillWait (30 s)
#
# Submit it from the root of the repository, on a file system that all nodes share. Flags of sbatch
# override the #SBATCH lines below. --time must be much longer than the seconds in --signal,
# otherwise the run makes no progress.
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

MAX_RESTARTS=3  # restarts of the processes after a crash, from the newest checkpoint
PORT=29500      # rendezvous port on the first node
SAVE_SECONDS=90 # time to finish a step and write a checkpoint; must be less than --signal's 120

# SLURM runs a copy of this script from its spool folder, but in the folder of submission.
[ -f train_gpt2.py ] || {
    echo "error: no train_gpt2.py in $PWD: submit from the root of the repository" >&2
    exit 1
}
PATH="$PWD/.venv/bin:$PATH"

# One process per GPU, or a single process with all CPUs on nodes without GPUs.
gpus=${SLURM_GPUS_ON_NODE:-0}
processes=$((gpus ? gpus : 1))
export OMP_NUM_THREADS=$((SLURM_CPUS_ON_NODE > processes ? SLURM_CPUS_ON_NODE / processes : 1))

# torchrun kills its processes this long after SIGTERM; its default of 30 s may be too short.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$SAVE_SECONDS
# Without it, restarted processes try to reach the dead ones and hang.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

say() { echo "$(date '+%F %T') job $SLURM_JOB_ID: $*"; }
say "start $((${SLURM_RESTART_COUNT:-0} + 1))," \
    "$SLURM_JOB_NUM_NODES x $processes processes on $SLURM_JOB_NODELIST"

# On the warning, send SIGTERM to the processes of the job step, which write a checkpoint. srun must
# not get the signal: it would have them killed at once. torchrun forwards SIGTERM, and once the
# checkpoint is written it ends with a traceback, which is harmless.
stopped=
trap 'stopped=yes; scancel --signal=TERM "$SLURM_JOB_ID.0" || true' USR1

# In an exclusive job, a step gets GPUs only if it asks for them.
srun ${SLURM_GPUS_ON_NODE:+--gpus-per-node="$gpus"} \
    torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$processes" \
    --max-restarts=$MAX_RESTARTS --rdzv-backend=c10d --rdzv-endpoint="$(hostname):$PORT" \
    --rdzv-id="$SLURM_JOB_ID" train_gpt2.py --resume "$@" &
step=$!
status=0
wait $step || status=$?

# The signal interrupts `wait`, so wait again for the checkpoint.
if [ "$stopped" ]; then
    say "warned of the time limit: checkpoint, then requeue"
    status=0
    wait $step || status=$?
    # Status 0 means that the run has just finished.
    [ $status = 0 ] || scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
