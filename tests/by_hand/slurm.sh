#!/usr/bin/env bash
# Tests runs/slurm.sh with a real SLURM: three nodes, all of them on this machine. Needs root, and
# installs SLURM with apt-get if it is missing (Debian). From the root of the repository:
#
#     bash tests/by_hand/slurm.sh             # 6 to 8 minutes
#     KEEP=1 bash tests/by_hand/slurm.sh      # keeps the folder with all logs
#
# A run on one node and a run on two are each stopped several times by a time limit of one minute.
# They must requeue themselves until they are done, with the losses of an undisturbed run. Jobs with
# a wrong flag, jobs that diverge and jobs that are cancelled must not be requeued. After a crash, a
# job must resume without being requeued. The third node has two pretended GPUs: one process each.
set -euo pipefail
cd "$(dirname "$0")/../.."

SECONDS_OF_WORK=75 # duration of the undisturbed run; the warning comes after at most 45 s
PATH="$PWD/.venv/bin:/usr/sbin:$PATH"
[ "$(id -u)" = 0 ] || { echo "error: run it as root: it starts slurmd and munged" >&2; exit 1; }
if ! type slurmctld slurmd munged sbatch &>/dev/null; then
    apt-get update -q
    DEBIAN_FRONTEND=noninteractive \
        apt-get install -q -y --no-install-recommends slurm-wlm munge
fi

dir=$(mktemp -d)
host=$(hostname -s)
chmod 755 "$dir" # munged requires that everybody can reach its socket
export SLURM_CONF=$dir/slurm.conf
export OMP_NUM_THREADS=1

# Show the logs of a failure, cancel all jobs, stop the daemons and delete the folder.
clean_up() {
    local status=$?
    local pids
    trap - EXIT INT TERM
    if [ $status != 0 ]; then
        tail -n 30 "$dir"/job-*.out "$dir"/*.log || true
        echo "FAILED" >&2
    fi
    scancel --partition=main 2>/dev/null || true
    for _ in {1..40}; do [ -n "$(squeue -h 2>/dev/null)" ] || break; sleep 1; done
    pids=$(cat "$dir"/*.pid 2>/dev/null || true)
    for pid in $pids; do kill "$pid" || true; done
    for pid in $pids; do while kill -0 "$pid" 2>/dev/null; do sleep 0.2; done; done
    if [ "${KEEP:-}" ]; then echo "kept: $dir"; else rm -rf "$dir"; fi
    exit $status
}
trap clean_up EXIT
trap 'exit 130' INT TERM

echo "== a cluster in $dir"
cat >"$SLURM_CONF" <<END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until the credential of its last start has expired.
AuthInfo=socket=$dir/munge.socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdSpoolDir=$dir/%n
SlurmdPidFile=$dir/%n.pid
SlurmdLogFile=$dir/%n.log
# No cgroups: containers often do not have them.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MailProg=/bin/true
JobRequeue=1
MinJobAge=3600
# Look for jobs to start every 5 s.
SchedulerParameters=sched_interval=5,bf_interval=5
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=16821 CPUs=1 RealMemory=1000
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=16822 CPUs=1 RealMemory=1000
NodeName=g1 NodeHostname=$host NodeAddr=127.0.0.1 Port=16823 CPUs=2 CoresPerSocket=2 RealMemory=1000 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE
END
printf 'NodeName=g1 Name=gpu File=%s\n' /dev/null /dev/zero >"$dir/gres.conf"
# Debian 12's SLURM does not know the plugin "disabled" yet; its cgroup/v1 does nothing unless used.
plugin=cgroup/v1
if dpkg --compare-versions "$(slurmd -V | cut -d' ' -f2)" ge 24; then plugin=disabled; fi
echo "CgroupPlugin=$plugin" >"$dir/cgroup.conf"
mkdir "$dir/state"
(umask 077 && head -c 1024 /dev/urandom >"$dir/munge.key")
munged --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
    --log-file="$dir/munged.log" --seed-file="$dir/munge.seed"
slurmctld
for node in n1 n2 g1; do slurmd -N $node; done
for _ in {1..30}; do [ "$(sinfo -h -N -t idle | wc -l)" = 3 ] && break; sleep 1; done
sinfo -N
[ "$(sinfo -h -N -t idle | wc -l)" = 3 ]

echo "== data and the duration of a step"
cat ./*.py >"$dir/text.txt"
python fineweb.py --source text --data_files "$dir/text.txt" --out_dir "$dir/shards" \
    --shard_size 9000 --train_tokenizer 384 --num_workers 1
flags=(--data_dir "$dir/shards" --n_layer 2 --n_head 2 --n_embd 32 --block_size 64 --B 64 --T 32
    --total_batch_size 65536 --warmup_steps 4 --max_lr 3e-3 --min_lr 3e-4
    --val_every 10 --val_tokens 1000 --sample_every 0 --hellaswag_every 0 --device cpu --dtype float32)
python train_gpt2.py "${flags[@]}" --max_steps 10 --log_dir "$dir/short" >/dev/null
steps=$(python -c "
import json, sys
times = sorted(json.loads(line).get('ms', 0) for line in open(sys.argv[1]))
print(round($SECONDS_OF_WORK * 1000 / times[len(times) // 2]))" "$dir/short/metrics.jsonl")
flags+=(--max_steps "$steps")

# submit NAME [FLAGS OF sbatch] -- [FLAGS OF train_gpt2.py]: prints the number of the job
submit() {
    local name=$1
    local options=()
    shift
    while [ "$1" != -- ]; do options+=("$1"); shift; done
    shift
    sbatch --parsable --job-name="$name" --output="$dir/job-$name.out" "${options[@]}" \
        runs/slurm.sh "${flags[@]}" --log_dir "$dir/$name" "$@"
}

# field JOB NAME: prints a field of `scontrol show job`
field() { scontrol -o show job "$1" | grep -o " $2=[^ ]*" | cut -d= -f2; }

# wait_for JOB: waits until it has ended and will not be requeued; shows its states as they change
wait_for() {
    local state
    local last_state=''
    for _ in {1..900}; do
        state="$(field "$1" JobState), $(field "$1" Restarts) restarts"
        [ "$state" = "$last_state" ] ||
            echo "$(date +%T) job $1: $state, exit code $(field "$1" ExitCode)"
        last_state=$state
        [[ $state =~ ^(PENDING|RUNNING|COMPLETING|REQUEUED|CONFIGURING) ]] || return 0
        sleep 1
    done
    fail "job $1 does not end"
}

fail() { echo "error: $*" >&2; return 1; }

# expect JOB STATE EXIT_CODE
expect() {
    [ "$(field "$1" JobState) $(field "$1" ExitCode)" = "$2 $3" ] || fail "job $1 is not $2 $3"
}

never_requeued() { [ "$(field "$1" Restarts)" = 0 ] || fail "job $1 was requeued"; }

requeued() {
    [ "$(field "$1" Restarts)" -gt 0 ] || fail "no time limit was reached: raise SECONDS_OF_WORK"
}

# compare NAME TOLERANCE: the losses of a run with those of the undisturbed one
compare() {
    python - "$dir/reference/log.txt" "$dir/$1/log.txt" "$2" <<'END'
import sys

def losses(path):
    rows = [line.split() for line in open(path)]
    values = {(stream, int(step)): float(value) for step, stream, value in rows}
    assert len(values) == len(rows), f"{path}: a step is repeated"
    return values

expected = losses(sys.argv[1])
actual = losses(sys.argv[2])
assert expected.keys() == actual.keys(), expected.keys() ^ actual.keys()
difference = max(abs(expected[key] - actual[key]) for key in expected)
print(f"{len(actual)} losses, every step once; they differ by at most {difference:.6f}")
sys.exit(difference > float(sys.argv[3]))
END
}

# SLURM checks the limits every 30 s, so the warning comes 15 to 45 s after the start.
limit=(--time=1 --signal=B:USR1@15)

echo "== one node: $steps steps with the time limit, next to an undisturbed run"
one=$(submit one "${limit[@]}" --nodelist=n1 --)
python train_gpt2.py "${flags[@]}" --log_dir "$dir/reference" | tail -n 2
wait_for "$one"
expect "$one" COMPLETED 0:0
requeued "$one"
compare one 0

echo "== two nodes"
# The smaller micro-batches change only the speed.
two=$(submit two "${limit[@]}" --nodelist=n1,n2 --nodes=2 -- --B 16)
wait_for "$two"
expect "$two" COMPLETED 0:0
requeued "$two"
grep -q "cpu x 2" "$dir/job-two.out"
compare two 1e-4

echo "== a wrong flag, a run that diverges, two pretended GPUs"
wrong=$(submit wrong --nodelist=n1,n2 --nodes=2 -- --no_such_flag 1)
diverged=$(submit diverged --nodelist=n1 -- --max_lr 1e30 --grad_clip 0)
gpus=$(submit gpus --nodelist=g1 -- --max_steps 5)
for job in "$gpus" "$wrong" "$diverged"; do wait_for "$job"; never_requeued "$job"; done
expect "$wrong" FAILED 1:0
grep -q "error: .*no_such_flag" "$dir/job-wrong.out"
expect "$diverged" FAILED 1:0
grep -q "diverged" "$dir/job-diverged.out"
expect "$gpus" COMPLETED 0:0
grep -q "cpu x 2" "$dir/job-gpus.out"

echo "== a process is killed, then the job is cancelled"
cancelled=$(submit cancelled --nodelist=n1,n2 --nodes=2 -- --rolling_every 1)
# wait_for_step NAME STEP
wait_for_step() {
    for _ in {1..120}; do grep -q "^$2 train" "$dir/$1/log.txt" 2>/dev/null && return; sleep 1; done
    fail "no step $2"
}
wait_for_step cancelled 3
# The newest process of that command line is a worker; its launcher is older.
kill -KILL "$(pgrep -n -f "train_gpt2.py .*$dir/cancelled")"
for _ in {1..60}; do grep "resuming from" "$dir/job-cancelled.out" && break; sleep 1; done
wait_for_step cancelled 10
scancel "$cancelled"
wait_for "$cancelled"
never_requeued "$cancelled"
[ "$(field "$cancelled" JobState)" = CANCELLED ]
grep "stopped: saved" "$dir/job-cancelled.out"

echo "== all passed, in $SECONDS s"
