"""What the studies share: a folder whose results outlive a stop, and stages run in it as a person would run them."""

import fcntl
import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from console import Progress, say
from files import write_text, write_whole
from shards import Shards

ROOT = Path(__file__).parent


class Results(dict):
    """What a study knows so far, kept in results.json; `settings` says what it depends on.

    Raises ValueError if the folder holds a study with other settings, or one that is still at work.
    """

    def __init__(self, folder: str | Path, settings: dict):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / "lock", "w")  # noqa: SIM115 - held as long as this process and its stages live
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{folder} is in use by a study that still runs, or by a run that it started") from error
        settings = json.loads(json.dumps(settings))  # tuples become lists, as they are when read
        self.path = self.folder / "results.json"
        super().__init__(settings=settings)
        if self.path.exists():
            try:
                self |= json.loads(self.path.read_text())
                found = self["settings"].items()
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"{self.path} is damaged ({error}): move it away") from error
            for key, was in found:
                if was != settings.get(key):
                    raise ValueError(
                        f"{folder} holds a study with {key}={was}, not {settings.get(key)}: choose another --out_dir"
                    )

    def save(self):
        write_text(self.path, json.dumps(self, indent=1) + "\n")

    def save_picture(self, name: str, figure: Figure):
        with write_whole(self.folder / name) as file:
            figure.savefig(file, format="png", dpi=150)

    def run_all(self, jobs: dict[str, Callable], num_parallel: int, desc: str):
        """Do the jobs whose names are no keys yet, several at a time; each is called with `run_stage` for its slot and
        returns what is kept under its name. If one fails or we are stopped, the others are stopped, too."""
        slots = choose_slots(num_parallel)
        free, running = queue.Queue(), set()
        for slot in slots:
            free.put(slot)

        def work(job: Callable):
            slot = free.get()
            try:
                return job(lambda words, log: run_stage(words, log, slot, running, self.lock.fileno()))
            finally:
                free.put(slot)

        missing = {name: job for name, job in jobs.items() if name not in self}
        pool = ThreadPoolExecutor(len(slots))
        futures = {pool.submit(work, job): name for name, job in missing.items()}
        try:
            with Progress(total=len(jobs), initial=len(jobs) - len(missing), desc=desc, unit="run") as bar:
                for future in as_completed(futures):
                    self[futures[future]] = future.result()
                    self.save()
                    say(f"{futures[future]}: done")
                    bar.update()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            told = set()
            while not all(future.done() for future in futures):
                for process in running - told:
                    process.terminate()  # training writes a checkpoint first
                    told.add(process)
                time.sleep(0.1)


def choose_slots(num_parallel: int) -> list[dict]:
    """What tells the processes that run at a time from each other: a GPU each, or a share of the CPU's cores."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
        return [dict(CUDA_VISIBLE_DEVICES=gpus[n % count]) for n in range(num_parallel or count)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = num_parallel or cores
    return [dict(OMP_NUM_THREADS=str(max(1, cores // count)))] * count


def run_stage(words: list, log: Path, slot: dict, running: set, lock: int) -> str:
    """Run `python WORDS...` in this repository, its output added to the file `log`; return what it wrote to stderr.

    Raises ValueError with the command's own error line if it fails.
    """
    command = [sys.executable, str(ROOT / words[0]), *map(str, words[1:])]
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        start = file.tell()
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=os.environ | slot,
            pass_fds=[lock], start_new_session=True,
        )  # fmt: skip
    running.add(process)
    code = process.wait()
    running.discard(process)
    output = log.read_text("utf-8", "replace")[start:]
    if code:
        errors = [line for line in output.splitlines() if "error: " in line] or [f"exit code {code}"]
        raise StageFailed(f"{words[0]} failed ({errors[-1].removeprefix('error: ')}): {log} says how")
    return output


class StageFailed(ValueError):
    pass


def stop_like_ctrl_c():
    """SIGTERM ends a study as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def read_stream(folder: Path, stream: str) -> tuple[list[int], list[float]]:
    """Steps and values of a stream of a run's log.txt."""
    path = folder / "log.txt"
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    points = [(int(step), float(value)) for step, name, value in lines if name == stream]
    return [step for step, _ in points], [value for _, value in points]


def read_windows(shards: Shards, count: int, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens x (count, T) int64, evenly spaced over the split's first shard, and y, one token ahead."""
    last = shards.lengths[0] - T - 1
    if last < 0:
        raise ValueError(f"{shards.paths[0]} holds {shards.lengths[0]} tokens, fewer than T + 1 = {T + 1}: lower T")
    starts = np.linspace(0, last, count).astype(int)
    tokens = torch.from_numpy(np.stack([shards.read(0, n, n + T + 1) for n in starts]).astype(np.int64))
    return tokens[:, :-1], tokens[:, 1:]
