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

from common import checkpoint
from common.console import Progress, UserError, say, write_atomically, write_text
from common.runtime import num_cores
from common.shards import Shards

ROOT = Path(__file__).parent.parent


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
            raise UserError(
                f"{folder} is in use by a study that still runs, or by a run that it started"
            ) from error
        settings = json.loads(json.dumps(settings))  # tuples become lists, as they are when read
        self.path = self.folder / "results.json"
        super().__init__(settings=settings)
        if not self.path.exists():
            self.save()  # before any other file of the study
        else:
            try:
                self |= json.loads(self.path.read_text())
                found = self["settings"].items()
            except (ValueError, TypeError, AttributeError) as error:
                raise UserError(f"{self.path} is damaged ({error}): move it away") from error
            for key, was in found:
                if was != settings.get(key):
                    raise UserError(
                        f"{folder} holds a study with {key}={was}, not {settings.get(key)}: choose another --out_dir"
                    )

    def save(self):
        write_text(self.path, json.dumps(self, indent=1) + "\n")

    def save_picture(self, name: str, figure: Figure):
        with write_atomically(self.folder / name) as file:
            figure.savefig(file, format="png", dpi=150)

    def run_all(
        self,
        commands: dict[str, tuple[list, Path]],
        read: Callable[[str, str | None], dict],
        device: str,
        num_parallel: int,
        desc: str,
    ):
        """Run those of the commands (words, log file) whose names are no keys yet, several at a time, and keep what
        `read(name, error)` makes of each; `error` is what the command ended with, None if it went well.

        Checkpoints in the log file's folder are removed when what they show is kept. If `read` raises an error, or we
        are stopped, the commands that still run are stopped, too.
        """
        slots = choose_slots(num_parallel, device)
        free, running = queue.Queue(), set()
        for slot in slots:
            free.put(slot)

        def run(words: list, log: Path) -> str | None:
            slot = free.get()
            try:
                return run_stage(words, log, slot, running, self.lock.fileno())
            finally:
                free.put(slot)

        pool = ThreadPoolExecutor(len(slots))
        futures = {
            pool.submit(run, *command): name
            for name, command in commands.items()
            if name not in self
        }
        try:
            with Progress(
                total=len(commands), initial=len(commands) - len(futures), desc=desc, unit="run"
            ) as bar:
                for name in commands.keys() & self.keys():
                    remove_checkpoints(commands[name][1].parent)
                for future in as_completed(futures):
                    name = futures[future]
                    self[name] = read(name, future.result())
                    self.save()
                    remove_checkpoints(commands[name][1].parent)
                    say(f"{name}: done")
                    bar.update()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            told = set()
            while not all(future.done() for future in futures):
                for process in running - told:
                    process.terminate()  # training writes a checkpoint first
                    told.add(process)
                time.sleep(0.1)


def remove_checkpoints(folder: Path):
    for path in checkpoint.candidates(folder):
        path.unlink()


def choose_slots(num_parallel: int, device: str) -> list[dict]:
    """What tells the processes that run at a time from each other: a GPU each, or a share of the CPU's cores."""
    if device.startswith(("auto", "cuda")) and torch.cuda.is_available():
        gpus = os.environ.get(
            "CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))
        ).split(",")
        if ":" in device:
            gpus = [gpus[int(device.split(":")[1])]]
        return [
            dict(CUDA_VISIBLE_DEVICES=gpus[n % len(gpus)]) for n in range(num_parallel or len(gpus))
        ]
    count = num_parallel or num_cores()
    return [dict(OMP_NUM_THREADS=str(max(1, num_cores() // count)))] * count


def run_stage(words: list, log: Path, slot: dict, running: set, lock: int) -> str | None:
    """Run `python WORDS...` with a script of this repository, its output added to the file `log`; return the error that
    it ended with, if it did."""
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
    if not code:
        return None
    output = log.read_bytes()[start:].decode("utf-8", "replace")
    errors = [line for line in output.splitlines() if "error: " in line] or [f"exit code {code}"]
    return f"{words[0]} failed ({errors[-1].removeprefix('error: ')}): {log} says how"


def stop_like_ctrl_c():
    """SIGTERM ends a study as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def train_command(config, log_dir: Path, data_dir: str | Path, **constants) -> tuple[list, Path]:
    """The words of the command that trains a model with these constants and a study's device, dtype and compile, and
    the file for its output."""
    constants |= dict(
        device=config.device.split(":")[0], dtype=config.dtype, compile=config.compile
    )
    words = ["train_gpt2.py", "--resume", "--log_dir", log_dir, "--data_dir", data_dir]
    return [
        *words,
        *(word for key, value in constants.items() for word in (f"--{key}", value)),
    ], log_dir / "output.txt"


def mean_and_deviation(values: list[float], digits: int = 3) -> str:
    """Mean ± standard deviation, of the seeds for instance."""
    deviation = np.std(values, ddof=min(1, len(values) - 1))
    return f"{np.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def read_stream(folder: Path, stream: str) -> tuple[list[int], list[float]]:
    """Steps and values of a stream of a run's log.txt."""
    path = folder / "log.txt"
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    points = [
        (int(line[0]), float(line[2])) for line in lines if len(line) == 3 and line[1] == stream
    ]
    return [step for step, _ in points], [value for _, value in points]


def read_windows(shards: Shards, count: int, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens x (count, T) int64, evenly spaced over the split's first shard, and y, one token ahead."""
    last = shards.lengths[0] - T - 1
    if last < 0:
        raise UserError(
            f"{shards.paths[0]} holds {shards.lengths[0]} tokens, fewer than T + 1 = {T + 1}: lower T"
        )
    starts = np.linspace(0, last, count).astype(int)
    tokens = torch.from_numpy(
        np.stack([shards.read(0, n, n + T + 1) for n in starts]).astype(np.int64)
    )
    return tokens[:, :-1], tokens[:, 1:]
