#!/usr/bin/env bash
# runs/slurm.sh under a real SLURM: three nodes, all of them this machine. As root, on Debian:
#
#     bash tests/by_hand/slurm.sh      # 6 to 8 minutes; KEEP=1 leaves the folder with all logs behind
#
# A run of one node and one of two are each stopped by a time limit of a minute, requeue themselves until they are
# done, and must have the losses of an undisturbed run. One that is wrong, one that diverges and one that is cancelled
# must not come back; one that crashes goes on within its job. The third node has two GPUs on paper: one process each.
set -euo pipefail
cd "$(dirname "$0")/../.."

SECONDS_OF_WORK=75 # of the undisturbed run: more than the 45 s after which the warning has come for sure
PATH="$PWD/.venv/bin:/usr/sbin:$PATH"
[ "$(id -u)" = 0 ] || { echo "error: slurmd and munged are started as root" >&2; exit 1; }
if ! type slurmctld slurmd munged sbatch &>/dev/null; then
    apt-get update -q
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends slurm-wlm munge
fi

dir=$(mktemp -d) host=$(hostname -s)
chmod 755 "$dir" # munged wants its socket where everybody can reach it
export SLURM_CONF=$dir/slurm.conf OMP_NUM_THREADS=1

clean_up() {
    local status=$? pids
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
# a requeued job waits for the credential of its last start to expire
AuthInfo=socket=$dir/munge.socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdSpoolDir=$dir/%n
SlurmdPidFile=$dir/%n.pid
SlurmdLogFile=$dir/%n.log
# no cgroups: containers often have none to give
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MailProg=/bin/true
JobRequeue=1
MinJobAge=3600
# it looks for jobs to start often
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
# "disabled" came after Debian 12's SLURM; its cgroup/v1 does nothing unless it is used.
dpkg --compare-versions "$(slurmd -V | cut -d' ' -f2)" ge 24 && plugin=disabled || plugin=cgroup/v1
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

echo "== data, and how long a step takes"
cat ./*.py >"$dir/text.txt"
python fineweb.py --source text --data_files "$dir/text.txt" --out_dir "$dir/shards" --shard_size 9000 \
    --train_tokenizer 384 --num_workers 1
flags=(--data_dir "$dir/shards" --n_layer 2 --n_head 2 --n_embd 32 --block_size 64 --B 64 --T 32
    --total_batch_size 65536 --warmup_steps 4 --max_lr 3e-3 --min_lr 3e-4 --val_every 10 --val_tokens 1000
    --sample_every 0 --hellaswag_every 0 --device cpu --dtype float32)
python train_gpt2.py "${flags[@]}" --max_steps 10 --log_dir "$dir/short" >/dev/null
steps=$(python -c "
import json, sys
times = sorted(json.loads(line).get('ms', 0) for line in open(sys.argv[1]))
print(round($SECONDS_OF_WORK * 1000 / times[len(times) // 2]))" "$dir/short/metrics.jsonl")
flags+=(--max_steps "$steps")

submit() { # NAME, flags of sbatch --, flags of train_gpt2.py: the job's number
    local name=$1 options=()
    shift
    while [ "$1" != -- ]; do options+=("$1"); shift; done
    shift
    sbatch --parsable --job-name="$name" --output="$dir/job-$name.out" "${options[@]}" \
        runs/slurm.sh "${flags[@]}" --log_dir "$dir/$name" "$@"
}
field() { scontrol -o show job "$1" | grep -o " $2=[^ ]*" | cut -d= -f2; }
wait_for() { # JOB, until it is over for good; its states are shown as they change
    local last='' now
    for _ in {1..900}; do
        now="$(field "$1" JobState), $(field "$1" Restarts) restarts"
        [ "$now" = "$last" ] || echo "$(date +%T) job $1: $now, exit code $(field "$1" ExitCode)"
        last=$now
        [[ $now =~ ^(PENDING|RUNNING|COMPLETING|REQUEUED|CONFIGURING) ]] || return 0
        sleep 1
    done
    echo "error: job $1 does not end" >&2
    return 1
}
expect() { # JOB STATE EXIT_CODE
    [ "$(field "$1" JobState) $(field "$1" ExitCode)" = "$2 $3" ] || { echo "error: not $2 $3" >&2; return 1; }
}
never_requeued() { [ "$(field "$1" Restarts)" = 0 ] || { echo "error: job $1 was requeued" >&2; return 1; }; }
requeued() {
    [ "$(field "$1" Restarts)" -gt 0 ] || { echo "error: no time limit struck: raise SECONDS_OF_WORK" >&2; return 1; }
}
compare() { # NAME TOLERANCE: the run's losses with those of the reference
    python - "$dir/reference/log.txt" "$dir/$1/log.txt" "$2" <<'END'
import sys

def losses(path):
    rows = [line.split() for line in open(path)]
    found = {(stream, int(step)): float(value) for step, stream, value in rows}
    assert len(found) == len(rows), f"{path}: a step stands there twice"
    return found

expected, got = losses(sys.argv[1]), losses(sys.argv[2])
assert expected.keys() == got.keys(), expected.keys() ^ got.keys()
furthest = max(abs(expected[key] - got[key]) for key in expected)
print(f"{len(got)} losses, every step once; they differ by at most {furthest:.6f}")
sys.exit(furthest > float(sys.argv[3]))
END
}
limit=(--time=1 --signal=B:USR1@15) # SLURM looks every 30 s: the warning comes 15 to 45 s after the start

echo "== one node: $steps steps against the time limit, and beside it an undisturbed run"
one=$(submit one "${limit[@]}" --nodelist=n1 --)
python train_gpt2.py "${flags[@]}" --log_dir "$dir/reference" | tail -n 2
wait_for "$one"
expect "$one" COMPLETED 0:0
requeued "$one"
compare one 0

echo "== two nodes" # in smaller micro-batches, which changes nothing but the speed
two=$(submit two "${limit[@]}" --nodelist=n1,n2 --nodes=2 -- --B 16)
wait_for "$two"
expect "$two" COMPLETED 0:0
requeued "$two"
grep -q "cpu x 2" "$dir/job-two.out"
compare two 1e-4

echo "== a wrong flag, a run that diverges, two GPUs on paper"
wrong=$(submit wrong --nodelist=n1,n2 --nodes=2 -- --no_such_flag 1)
diverged=$(submit diverged --nodelist=n1 -- --max_lr 1e30 --grad_clip 0)
gpus=$(submit gpus --nodelist=g1 -- --max_steps 5)
for job in "$gpus" "$wrong" "$diverged"; do wait_for "$job"; never_requeued "$job"; done
expect "$wrong" FAILED 1:0
grep -q "error: .*no_such_flag" "$dir/job-wrong.out"
expect "$diverged" FAILED 1:0
grep -q "the run diverged" "$dir/job-diverged.out"
expect "$gpus" COMPLETED 0:0
grep -q "cpu x 2" "$dir/job-gpus.out"

echo "== a process is killed, then the job cancelled"
cancelled=$(submit cancelled --nodelist=n1,n2 --nodes=2 -- --rolling_every 1)
wait_for_step() { # JOB'S NAME, STEP
    for _ in {1..120}; do grep -q "^$2 train" "$dir/$1/log.txt" 2>/dev/null && return; sleep 1; done
    echo "error: no step $2" >&2
    return 1
}
wait_for_step cancelled 3
kill -KILL "$(pgrep -n -f "train_gpt2.py .*$dir/cancelled")" # the newest is no torchrun
for _ in {1..60}; do grep "resuming from" "$dir/job-cancelled.out" && break; sleep 1; done
wait_for_step cancelled 10
scancel "$cancelled"
wait_for "$cancelled"
never_requeued "$cancelled"
[ "$(field "$cancelled" JobState)" = CANCELLED ]
grep "stopped: saved" "$dir/job-cancelled.out"

echo "== all of it worked, in $SECONDS s"
