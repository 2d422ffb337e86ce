"""Soak test: a run on two processes that is killed every 20 to 60 seconds and must not notice.

    python tests/by_hand/soak.py                          # 2,000 steps, 50 kills: about 35 minutes
    python tests/by_hand/soak.py --kills 3 --steps 200    # a short one

Each kill is a SIGKILL to a worker or to the launcher. Afterwards the weights, the optimizer's
states and the logs must be those of an undisturbed run, no other files may be left in the run
folder, and memory must not have grown (checked from 20 kills on).

The run would be over long before the last kill, so it is paced: its workers are stopped (SIGSTOP)
whenever they are ahead of the kills, and continued after the next one.
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
from two_hosts import make_data, read_log  # noqa: E402

RUN = "--n_layer 2 --n_head 2 --n_embd 64 --block_size 64 --dropout 0.1".split()
RUN += "--B 4 --T 64 --total_batch_size 512 --warmup_steps 10".split()
RUN += "--val_every 100 --val_tokens 2000 --sample_every 0 --hellaswag_every 0".split()
RUN += "--checkpoint_every 2000 --rolling_every 7 --resume --device cpu --dtype float32".split()

os.environ["OMP_NUM_THREADS"] = "1"
# Without it, restarted workers try to reach the dead ones and hang.
os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"


def launch(data: Path, folder: Path, steps: int) -> subprocess.Popen:
    """Start torchrun with two workers; its output is appended to FOLDER.txt."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node=2", "--max-restarts=1000", str(ROOT / "train_gpt2.py")]
    command += ["--data_dir", str(data), "--log_dir", str(folder), "--max_steps", str(steps), *RUN]
    with open(folder.with_suffix(".txt"), "a") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)


def workers(launcher: subprocess.Popen) -> list[int]:
    """The process ids of the workers that are running, in the order of their ranks."""
    pids = []
    for rank in (0, 1):
        # The worker may not have started yet, or may have just ended.
        with suppress(AssertionError, OSError):
            pids.append(worker_of(launcher, rank))
    return pids


def resident(pid: int) -> float:
    """Resident memory in MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def last_step(folder: Path) -> int:
    """The last step in log.txt, whichever stream it is of; 0 if there is none yet."""
    return max((int(step) for step, _, _ in read_log(folder)), default=0)


def pace(pids: list[int], go: bool):
    """Let the workers run, or stop them."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT if go else signal.SIGSTOP)


def disturb(
    data: Path, folder: Path, steps: int, kills: int, seed: int
) -> tuple[list[str], dict[str, list[float]]]:
    """Kill a run again and again, then let it finish.

    Returns the victims, and for workers and launcher the resident memory in MB before each kill.
    """
    rng = random.Random(seed)
    victims: list[str] = []
    memory: dict[str, list[float]] = {"worker": [], "launcher": []}
    launcher = launch(data, folder, steps)
    began = time.monotonic()
    next_kill = began + rng.uniform(20, 60)
    while launcher.poll() is None or launcher.returncode != 0:
        # Start a dead launcher again, as SLURM or an init system would.
        if launcher.poll() is not None:
            launcher = launch(data, folder, steps)

        # The run may do its share of the steps until the next kill, and no more.
        pids = workers(launcher)
        killed = len(victims)
        allowed = steps * 0.95 * (killed + 1) / (kills + 1)
        pace(pids, go=killed == kills or last_step(folder) < allowed)

        if killed < kills and time.monotonic() >= next_kill and len(pids) == 2:
            memory["worker"].append(max(map(resident, pids)))
            memory["launcher"].append(resident(launcher.pid))
            victims.append(kill_one(launcher, pids, rng))
            seconds = time.monotonic() - began
            what = f"kill {len(victims)}: {victims[-1]} at step {last_step(folder)}"
            print(f"{seconds:6.0f} s, {what}", flush=True)
            next_kill = time.monotonic() + rng.uniform(20, 60)
        time.sleep(0.2)
    return victims, memory


def kill_one(launcher: subprocess.Popen, pids: list[int], rng: random.Random) -> str:
    """Kill a worker or the launcher; returns which."""
    victim = rng.choice(("rank 0", "rank 1", "launcher"))
    if victim != "launcher":
        os.kill(pids[int(victim[-1])], signal.SIGKILL)
        return victim
    launcher.kill()
    launcher.wait()
    # The workers end when they see that the launcher is gone, which they can't while stopped.
    pace(pids, go=True)
    while any(map(is_alive, pids)):
        time.sleep(0.1)
    return victim


def check_results(undisturbed: Path, disturbed: Path, steps: int):
    """Both runs must have ended with the same checkpoint and logs."""
    folders = (undisturbed, disturbed)
    a, b = (torch.load(folder / "model_final.pt", weights_only=True) for folder in folders)
    assert a["model"].keys() == b["model"].keys(), "different parameters"
    for name, tensor in a["model"].items():
        assert torch.equal(tensor, b["model"][name]), f"different weights: {name}"
    a_states, b_states = a["optimizer"]["state"], b["optimizer"]["state"]
    assert a_states.keys() == b_states.keys(), "different optimizer states"
    for i, state in a_states.items():
        for name, tensor in state.items():
            assert torch.equal(tensor, b_states[i][name]), f"different optimizer state: {i} {name}"

    assert read_log(undisturbed) == read_log(disturbed), "different logs"
    lines = (disturbed / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line)["step"] for line in lines]
    assert logged == [*range(steps + 1)], "a step is missing or repeated in metrics.jsonl"
    names = {path.name for path in disturbed.iterdir()} - {"lock"}
    assert names == {"config.json", "log.txt", "metrics.jsonl", "model_final.pt"}, names


def check_memory(values: list[float], process: str):
    """Compare the first and the last tenth of the measurements."""
    # With few kills, a worker that was killed while it started would decide the comparison.
    if len(values) < 20:
        return
    tenth = len(values) // 10
    first = statistics.median(values[:tenth])
    last = statistics.median(values[-tenth:])
    print(f"resident memory, {process}: {first:.0f} MB at the start, {last:.0f} MB at the end")
    assert last < 1.1 * first, "memory has grown"


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1, help="of the times and the victims")
    args = parser.parse_args()

    work = Path(tempfile.mkdtemp(prefix="soak_"))
    data = make_data(work)
    assert launch(data, work / "undisturbed", args.steps).wait() == 0, f"see {work}"
    began = time.monotonic()
    victims, memory = disturb(data, work / "disturbed", args.steps, args.kills, args.seed)
    seconds = time.monotonic() - began

    check_results(work / "undisturbed", work / "disturbed", args.steps)
    launchers = victims.count("launcher")
    print(f"{len(victims)} kills ({launchers} of the launcher) in {seconds:.0f} s")
    print("same weights, optimizer states and logs as the undisturbed run")
    for process, values in memory.items():
        check_memory(values, process)
    print(f"all well; {work} can be deleted")


if __name__ == "__main__":
    main()
