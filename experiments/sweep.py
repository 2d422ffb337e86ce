"""Code shared by the studies: a folder whose results survive a stop, and runs in parallel.

A study declares its runs, has them run, reads their output files and reports:

    rt = start(config)
    study = StudyFolder(config.out_dir, settings_of(config, rt, may_change=["learning_rates"]))
    runs = [train_run(config, f"lr_{lr:g}", ..., max_lr=lr) for lr in config.learning_rates]
    study.run_all(runs, read_run, config.device, config.num_parallel, "training")
    study.report("## Final losses", table(...))

Each run is a script of this repository, started as a command, as a user would. A run whose result
is in results.json is skipped, so an interrupted study resumes when its command is repeated.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common import checkpoint, runtime
from common.console import (
    Progress,
    UserError,
    lock_folder,
    say,
    write_atomically,
    write_text,
)
from common.machine import num_cores
from common.optim import Diverged
from common.runtime import Runtime
from common.shards import Shards
from experiments.flags import StudyConfig, TrainingConfig

ROOT = Path(__file__).parent.parent  # the scripts are here

# Flags that may change when a study is resumed: paths, and what affects only speed and memory.
MAY_CHANGE = ("data_dir", "out_dir", "B", "device", "compile", "num_parallel")


def start(config: StudyConfig) -> Runtime:
    """Set up the device. SIGTERM then stops the study in the same way as Ctrl-C."""
    # A scheduler sends SIGTERM before it kills a job.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return runtime.start(config.device, config.dtype)


def settings_of(config: StudyConfig, rt: Runtime, may_change: Iterable[str] = (), **more) -> dict:
    """The values that a study's results depend on. A resumed study must have the same ones.

    These are all flags except MAY_CHANGE and the study's own `may_change`: the grids of values
    that are part of a run's name, so that a larger grid only adds runs.
    """
    settings = asdict(config) | dict(dtype=str(rt.dtype)) | more
    ignored = {*MAY_CHANGE, *may_change}
    return {key: value for key, value in settings.items() if key not in ignored}


# ---------------------------------------------------------------------------------------------
# Runs


@dataclass
class Run:
    """A command of a study."""

    name: str  # the key of its result in results.json
    argv: list  # a script of this repository and its flags
    log: Path  # file that its output is appended to
    env: dict[str, str] = field(default_factory=dict)  # further environment variables

    @property
    def folder(self) -> Path:
        return self.log.parent


def train_run(
    config: TrainingConfig,
    name: str,
    data_dir: str | Path,
    T: int,
    total_batch_size: int,
    max_lr: float,
    seed: int,
    **flags,
) -> Run:
    """A run of train_gpt2.py in OUT_DIR/runs/NAME, with the model of the study's flags.

    The learning rate decays to a tenth of max_lr. `flags` are further flags of train_gpt2.py.
    """
    # A folder per run. Spaces in it would have to be quoted in a shell.
    folder = Path(config.out_dir) / "runs" / name.replace(" ", "_")
    common_flags = dict(
        data_dir=data_dir,
        log_dir=folder,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        block_size=T,
        T=T,
        B=config.B,
        total_batch_size=total_batch_size,
        max_steps=config.max_steps,
        max_lr=max_lr,
        min_lr=max_lr / 10,
        seed=seed,
        # Samples and benchmarks during training would only take time.
        sample_every=0,
        hellaswag_every=0,
        # Which GPU is decided by CUDA_VISIBLE_DEVICES, so the device is "cuda", not "cuda:1".
        device=config.device.split(":")[0],
        dtype=config.dtype,
        compile=config.compile,
    )
    # With --resume, a run that was stopped continues, and one that is complete ends at once.
    argv = ["train_gpt2.py", "--resume"]
    for flag, value in (common_flags | flags).items():
        argv += [f"--{flag}", value]
    return Run(name, argv, folder / "output.txt")


class StudyFolder:
    """The output folder of a study. It keeps the finished results, and locks itself while in use.

    results   dict: name of a run or of another result -> JSON values; stored in results.json
    settings  the entry of `results` with the values that the others depend on

    Raises UserError if the folder holds a study with other settings, or is in use.
    """

    def __init__(self, folder: str | Path, settings: dict):
        self.path = Path(folder)
        self.path.mkdir(parents=True, exist_ok=True)
        # Held until this process ends. Runs of train_gpt2.py lock their own folders, too: if the
        # study is killed, those that are still training keep another study from repeating them.
        self.lock = ExitStack()
        self.lock.enter_context(lock_folder(self.path))
        self.file = self.path / "results.json"
        # Through JSON and back: tuples become lists, as in a file that has been read.
        settings = json.loads(json.dumps(settings))
        self.results: dict[str, Any] = dict(settings=settings)
        if self.file.exists():
            self.read_results(settings)
        else:
            # Saved before the study writes any other file, so that no file lacks its settings.
            self.save()

    def read_results(self, settings: dict):
        """Read results.json, and compare its settings with those of this study."""
        try:
            self.results |= json.loads(self.file.read_text())
            found = dict(self.results["settings"])
        except (ValueError, TypeError) as error:
            raise UserError(f"{self.file} is damaged ({error}): move it away") from error
        # Results under different settings must not end up in the same table.
        # Settings that the file lacks do not count: the flag may be newer than the file.
        for key, value in found.items():
            if value != settings.get(key):
                raise UserError(
                    f"{self.path} holds a study with {key}={value}, not {settings.get(key)}: "
                    f"choose another --out_dir"
                )

    def save(self):
        """Write all results to results.json."""
        write_text(self.file, json.dumps(self.results, indent=1) + "\n")

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """The result of this name, which is computed and saved if it is not known yet."""
        if name not in self.results:
            self.results[name] = compute()
            self.save()
        return self.results[name]

    def save_plot(self, name: str, figure: Figure):
        """Write a plot to the folder, as PNG."""
        with write_atomically(self.path / name) as file:
            figure.savefig(file, format="png", dpi=150)

    def report(self, *paragraphs: str):
        """Write the paragraphs to report.md, and print them."""
        text = "\n\n".join(paragraphs)
        write_text(self.path / "report.md", text + "\n")
        say(f"{text}\n\nreport.md, results.json and plots are in {self.path}")

    def run_all(
        self,
        runs: list[Run],
        read: Callable[[Run, Diverged | None], dict],
        device: str,
        num_parallel: int,
        desc: str,
    ):
        """Run the commands that have no result yet, several at a time, and save the results.

        Pool threads start the commands. Only the main thread reads output and saves results:

            pool thread 1   | run a, on GPU 0      | run c, on GPU 0 ...
            pool thread 2   | run b, on GPU 1               | run d, on GPU 1 ...
            main thread                            | read(a), save, remove a's checkpoints
                                                            | read(b), save, ...

        `read` turns the output files of a run into its result. Its second argument is the error
        of a training run that diverged, otherwise None. A run that fails in any other way, an
        error in `read` and Ctrl-C end the study: the commands that are still running get SIGTERM,
        on which training saves a checkpoint. The next call resumes them from it.
        """
        missing = [run for run in runs if run.name not in self.results]
        # A study that was killed between saving and removing left checkpoints of finished runs.
        for run in runs:
            if run not in missing:
                remove_checkpoints(run.folder)

        # Results are saved one by one as the runs end, in whatever order that happens.
        bar = Progress(total=len(runs), initial=len(runs) - len(missing), desc=desc, unit="run")
        with bar, CommandPool(device_envs(num_parallel, device)) as pool:
            futures = {pool.submit(run): run for run in missing}
            for future in as_completed(futures):
                run = futures[future]
                diverged = None
                try:
                    # Raises the run's error. Any other than Diverged leaves this function.
                    future.result()
                except Diverged as error:
                    diverged = error
                self.results[run.name] = read(run, diverged)
                self.save()
                remove_checkpoints(run.folder)
                say(f"{run.name}: done")
                bar.update()


class CommandPool:
    """Runs commands in parallel, one per entry of `envs`. On exit, stops those still running."""

    def __init__(self, envs: list[dict]):
        # Processes that __exit__ has to stop, and the futures that tell when all are done
        self.running: set[subprocess.Popen] = set()
        self.futures: list[Future] = []
        self.threads = ThreadPoolExecutor(len(envs))
        self.free_envs: queue.Queue[dict] = queue.Queue()
        # The environments circulate: a thread takes one for a run, and puts it back.
        for env in envs:
            self.free_envs.put(env)

    def __enter__(self) -> "CommandPool":
        return self

    def __exit__(self, *_):
        # Runs that wait for a thread never start.
        self.threads.shutdown(wait=False, cancel_futures=True)
        terminated = set()
        # Look again until all are done: a thread may have been just about to start its process.
        while not all(future.done() for future in self.futures):
            for process in self.running - terminated:
                process.terminate()
                terminated.add(process)
            time.sleep(0.1)

    def submit(self, run: Run) -> Future:
        """Start the command when a thread is free. The future raises what `execute` raises."""
        future = self.threads.submit(self.execute, run)
        self.futures.append(future)
        return future

    def execute(self, run: Run):
        """Run the command to its end, in a pool thread.

        Raises Diverged if training diverged, and UserError if the command failed otherwise.
        """
        # There are as many environments as threads, so one is always free.
        env = self.free_envs.get()
        try:
            code, output = self.run_process(run, env)
        finally:
            # Also after an error: the next run of this thread needs it.
            self.free_envs.put(env)
        if code == 0:
            return
        # Every script reports what is wrong in a line "error: ..." (common/console.py).
        errors = [line for line in output.splitlines() if "error: " in line]
        reason = errors[-1].removeprefix("error: ") if errors else f"exit code {code}"
        message = f"{run.argv[0]} failed: {reason}; its output is in {run.log}"
        raise Diverged(message) if code == Diverged.exit_code else UserError(message)

    def run_process(self, run: Run, env: dict) -> tuple[int, str]:
        """Exit code and output of the command. The output is also appended to the log file."""
        argv = [sys.executable, str(ROOT / run.argv[0]), *map(str, run.argv[1:])]
        run.folder.mkdir(parents=True, exist_ok=True)
        with open(run.log, "a") as file:
            # The command comes first, so that a user can repeat it by hand. Flushed, because the
            # process writes to the same file.
            file.write(f"$ {' '.join(argv)}\n")
            file.flush()
            output_start = file.tell()
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | env | run.env,
                # In its own session it does not receive the terminal's Ctrl-C: only we stop it.
                start_new_session=True,
            )
        # The file is closed by now, but the process still writes through its own handle.
        self.running.add(process)
        code = process.wait()
        self.running.discard(process)
        # The file also holds the output of earlier attempts, which is skipped.
        return code, run.log.read_bytes()[output_start:].decode("utf-8", "replace")


def device_envs(num_parallel: int, device: str) -> list[dict]:
    """Environment variables for each of the runs at the same time: a GPU, or a share of the cores.

    With 2 GPUs and num_parallel 3, the third run shares GPU 0 with the first one.
    """
    if device.startswith(("auto", "cuda")) and torch.cuda.is_available():
        # The study itself may have been given only some of the GPUs. "cuda:1" is the second of
        # those that it can see.
        all_gpus = ",".join(map(str, range(torch.cuda.device_count())))
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", all_gpus).split(",")
        if ":" in device:
            gpus = [gpus[int(device.split(":")[1])]]
        count = num_parallel or len(gpus)
        return [dict(CUDA_VISIBLE_DEVICES=gpus[n % len(gpus)]) for n in range(count)]
    # PyTorch would start as many threads as there are cores in each of the processes.
    count = num_parallel or num_cores()
    return [dict(OMP_NUM_THREADS=str(max(1, num_cores() // count)))] * count


def remove_checkpoints(folder: Path):
    """Remove the checkpoints of a run, which take far more space than its logs."""
    for path in checkpoint.candidates(folder):
        path.unlink()


# ---------------------------------------------------------------------------------------------
# Reading and reporting


def read_stream(folder: Path, stream: str) -> tuple[list[int], list[float]]:
    """Steps and values of one stream (train, val or hella) in the log.txt of a run."""
    path = folder / "log.txt"
    steps, values = [], []
    for line in path.read_text().splitlines() if path.exists() else []:
        fields = line.split()
        # A run that was killed may have left half a line.
        if len(fields) == 3 and fields[1] == stream:
            steps.append(int(fields[0]))
            values.append(float(fields[2]))
    return steps, values


def read_windows(shards: Shards, count: int, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs x and targets y, int64 (count, T), from windows spread evenly over all shards."""
    # Shards too short for a window are left out. Of several, each gets about its share of windows.
    usable = [n for n, length in enumerate(shards.lengths) if length > T]
    if not usable:
        raise UserError(
            f"{shards.paths[0]} holds {shards.lengths[0]} tokens, fewer than T + 1 = {T + 1}: "
            f"lower T"
        )
    # Positions at which a window can start, those of all shards one after the other.
    counts = np.array([shards.lengths[n] - T for n in usable])
    ends = np.cumsum(counts)
    begins = ends - counts
    windows = np.empty((count, T + 1), dtype=np.int64)
    # The windows overlap if the shards are short.
    for row, position in enumerate(np.linspace(0, ends[-1] - 1, count).astype(int)):
        # The first shard whose positions end behind this one, as in dataloader.py.
        place = int(np.searchsorted(ends, position, side="right"))
        start = int(position - begins[place])  # in the shard
        windows[row] = shards.read(usable[place], start, start + T + 1)
    tokens = torch.from_numpy(windows)  # (count, T + 1)
    return tokens[:, :-1], tokens[:, 1:]


def mean_and_deviation(values: list[float], digits: int = 3) -> str:
    """Mean ± sample standard deviation, which is 0 for a single value."""
    # ddof=1 for the sample deviation; a single value would then divide by 0
    deviation = np.std(values, ddof=min(1, len(values) - 1))
    return f"{np.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def finish_axes(*axes: Axes):
    """Add a grid and a legend."""
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small")
