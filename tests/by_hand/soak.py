"""A run of 2,000 steps on two processes that something kills every 20 to 60 seconds, until it has survived 50 kills.

    python tests/by_hand/soak.py                      # some 35 minutes; --kills 5 for a short one

The victim is a worker or the launcher, with -9. Afterwards the weights, the optimizer's states and the logs must be
those of an undisturbed run, no file may be left that does not belong there, and memory must not have grown. Between two
kills the workers are stopped and continued, so that the steps last as long as the kills do.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from conftest import is_alive, worker_of  # noqa: E402
from two_hosts import log, make_data  # noqa: E402

MODEL = "--n_layer 2 --n_head 2 --n_embd 64 --block_size 64 --B 4 --T 64 --total_batch_size 512 --device cpu".split()
RUN = [
    *MODEL,
    *"--dtype float32 --warmup_steps 10 --val_every 100 --val_tokens 2000 --dropout 0.1".split(),
]
RUN += "--sample_every 0 --hellaswag_every 0 --checkpoint_every 2000 --rolling_every 7 --resume".split()
os.environ |= dict(OMP_NUM_THREADS="1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")


def launch(data: Path, folder: Path, steps: int) -> subprocess.Popen:
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "--max-restarts=1000",
    ]
    words += [str(ROOT / "train_gpt2.py"), "--data_dir", str(data), "--log_dir", str(folder), *RUN]
    with open(folder.with_suffix(".txt"), "a") as output:
        return subprocess.Popen(
            [*words, "--max_steps", str(steps)], stdout=output, stderr=subprocess.STDOUT
        )


def workers(launcher: subprocess.Popen) -> list[int]:
    found = []
    for rank in (0, 1):
        with suppress(AssertionError, OSError):  # not there yet, or not any more
            found.append(worker_of(launcher, rank))
    return found


def resident(pid: int) -> float:
    """Resident memory in MB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def step_of(folder: Path) -> int:
    lines = (
        (folder / "log.txt").read_text().splitlines()[-3:] if (folder / "log.txt").exists() else []
    )
    return max((int(line.split()[0]) for line in lines if len(line.split()) == 3), default=0)


def pace(pids: list[int], go: bool):
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT if go else signal.SIGSTOP)


def disturb(data: Path, folder: Path, steps: int, kills: int, seed: int) -> dict:
    """Kill the run again and again, then let it finish; what was seen of it."""
    rng = random.Random(seed)
    launcher, done, counts, memory = (
        launch(data, folder, steps),
        0,
        {},
        dict(worker=[], launcher=[]),
    )
    began = next_kill = time.monotonic()
    while launcher.poll() is None or launcher.returncode:
        if launcher.poll() is not None:
            launcher = launch(data, folder, steps)  # as SLURM or an init system would
        pids = workers(launcher)
        pace(pids, done >= kills or step_of(folder) < steps * 0.95 * (done + 1) / kills)
        if done < kills and time.monotonic() >= next_kill and len(pids) == 2:
            if done:
                memory["worker"].append(max(map(resident, pids)))
                memory["launcher"].append(resident(launcher.pid))
                victim = rng.choice(("rank 0", "rank 1", "launcher"))
                os.kill(
                    dict(zip(("rank 0", "rank 1"), pids)).get(victim, launcher.pid), signal.SIGKILL
                )
                counts[victim] = counts.get(victim, 0) + 1
                if victim == "launcher":
                    launcher.wait()
                    pace(pids, True)  # stopped processes could not see that it is gone
                    while any(map(is_alive, pids)):
                        time.sleep(0.1)
                print(
                    f"{time.monotonic() - began:6.0f} s, kill {done}: {victim} at step {step_of(folder)}",
                    flush=True,
                )
            done += 1
            next_kill = time.monotonic() + rng.uniform(20, 60)
        time.sleep(0.2)
    return dict(kills=counts, seconds=time.monotonic() - began, memory=memory)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=51)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="soak_"))
    data, whole, killed = make_data(work), work / "whole", work / "killed"
    assert launch(data, whole, args.steps).wait() == 0, f"see {work}"
    seen = disturb(data, killed, args.steps, args.kills, args.seed)

    a, b = (torch.load(folder / "model_final.pt", weights_only=True) for folder in (whole, killed))
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"]), (
        "other weights"
    )
    states = [
        (a["optimizer"]["state"][i], b["optimizer"]["state"][i]) for i in a["optimizer"]["state"]
    ]
    assert all(torch.equal(ours[key], theirs[key]) for theirs, ours in states for key in ours), (
        "other optimizer states"
    )
    assert log(whole) == log(killed), "other logs"
    steps = [
        json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [*range(args.steps + 1)], (
        "a step is missing in metrics.jsonl, or stands there twice"
    )
    names = sorted(path.name for path in killed.iterdir())
    assert names == ["config.json", "log.txt", "metrics.jsonl", "model_final.pt"], names
    print(
        f"{sum(seen['kills'].values())} kills {seen['kills']} in {seen['seconds']:.0f} s: same weights, same logs"
    )
    for name, values in seen["memory"].items():
        tenth = max(1, len(values) // 10)
        first, last = (statistics.median(part) for part in (values[:tenth], values[-tenth:]))
        print(f"resident memory, {name}: {first:.0f} MB in the beginning, {last:.0f} MB in the end")
        assert last < 1.1 * first
    print(f"all well; {work} can go")


if __name__ == "__main__":
    main()
