"""How candidates are measured: in turn, by their medians, and where needed in separate processes.

A candidate is a function without arguments that returns the seconds it took. `Stopwatch` makes one
from any function; `CandidateProcess.candidates` are run and timed in another process.
"""

import functools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from common.console import Progress, say
from common.cpu import can_pack
from common.runtime import Runtime

Candidate = Callable[[], float]  # runs once and returns the seconds it took
# How the names of candidates begin that stand for what the machine can do at best
ROOFLINE = "roofline: "
# As they appear in tables
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bf16"}


@dataclass
class Figure:
    """One line of the result."""

    row: str  # what was measured, and on which workload
    name: str  # name of the candidate
    value: float
    unit: str
    # This project as shipped compared with the candidate: how many times faster it is, or how many
    # times less memory it takes. Above 1, this project is better.
    ratio: float | None = None
    roofline_share: float | None = None  # speed divided by the best that the machine can do


class Stopwatch:
    """A candidate that calls a function in this process. `result` is its last return value."""

    def __init__(self, rt: Runtime, function: Callable, *args):
        self.rt = rt
        self.function = function
        self.args = args
        self.result: Any = None

    def __call__(self) -> float:
        # Kernels run after the call that starts them has returned: wait before and after.
        synchronize(self.rt.device)
        start = time.perf_counter()
        self.result = self.function(*self.args)
        synchronize(self.rt.device)
        return time.perf_counter() - start


def synchronize(device: torch.device):
    """Wait until a GPU has done what it was given."""
    # Kernels are queued: without this, a clock would measure the queueing.
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fastest(operations: list[Callable], device: torch.device) -> Callable:
    """The operation that takes the shortest time, of several that do the same."""

    # The shortest of three times: disturbances only make an operation slower.
    def shortest(operation: Callable) -> float:
        times = []
        for _ in range(4):  # the first one warms up
            synchronize(device)
            start = time.perf_counter()
            operation()
            synchronize(device)
            times.append(time.perf_counter() - start)
        return min(times[1:])

    return min(operations, key=shortest)


def dtypes_of(device: torch.device) -> list[torch.dtype]:
    """The dtypes in which every implementation is measured."""
    if device.type == "cuda":
        return [torch.bfloat16]
    # Processors without AVX-512 emulate bf16, ten times slower than float32: nobody would use it.
    if not can_pack(device, torch.bfloat16):
        return [torch.float32]
    return [torch.float32, torch.bfloat16]


def medians(candidates: Mapping[str, Candidate], rounds: int, title: str) -> dict[str, float]:
    """Median seconds of each candidate; of a roofline, which is a limit, the fewest.

    The candidates run in turn, round after round, so that a change in the machine's speed affects
    all of them. The first round warms up caches and compilers and does not count. A candidate that
    does not fit the GPU's memory is reported and left out.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    total = len(candidates) * (rounds + 1)
    with Progress(total=total, desc=title, unit="run", leave=False) as bar:
        for round_number in range(rounds + 1):
            # A copy of the names, because the loop may remove one.
            for name in list(seconds):
                try:
                    taken = candidates[name]()
                except torch.OutOfMemoryError:
                    say(f"{title}: {name}: out of memory")
                    del seconds[name]
                    continue

                # Round 0 is the warmup.
                if round_number > 0:
                    seconds[name].append(taken)
                bar.update()
    return {
        name: min(values) if name.startswith(ROOFLINE) else statistics.median(values)
        for name, values in seconds.items()
    }


def rates(
    row: str,
    seconds: dict[str, float],
    amount: float,
    unit: str,
    baseline: str,
    roofline: str | None = None,
) -> list[Figure]:
    """A figure per candidate: `amount` divided by its seconds.

    `baseline` names this project as shipped, `roofline` the candidate that stands for the machine:
    nothing can be faster, or what is measured as the roofline is none.
    """
    figures = []
    # Ratios of times: the amount is the same for all candidates.
    for name, taken in seconds.items():
        figure = Figure(row, name, amount / taken, unit)
        if baseline in seconds:  # it may have run out of memory
            figure.ratio = taken / seconds[baseline]
        if roofline in seconds:
            figure.roofline_share = seconds[roofline] / taken
        figures.append(figure)
    return figures


# ---------------------------------------------------------------------------------------------
# Other processes. They are spawned, not forked, so that nothing of this process slows them down:
# functions and arguments are pickled, and must come from modules other than __main__.


def run_in_new_process(function: Callable, *args) -> Any:
    """function(*args), in a process that ends afterwards."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


# What libgomp does unless common/before_torch.py tells it otherwise: for the other projects, which
# would otherwise inherit our setting.
LIBGOMP_DEFAULT = {"GOMP_SPINCOUNT": "300000"}


class CandidateProcess:
    """A process that keeps the candidates made by `make(*args)`, a function that returns a dict of
    names and functions. It lives until the `with` block ends. `env` are environment variables that
    it has beside those of this process."""

    def __init__(
        self, make: Callable[..., dict[str, Callable]], *args, env: dict[str, str] | None = None
    ):
        # One worker, so that all calls reach the process that holds the candidates.
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        # The process starts with the first task, and takes the environment of that moment.
        with patch.dict(os.environ, env or {}):
            names = self.pool.submit(make_candidates, make, *args).result()
        # Calling a candidate sends its name to the process, and returns the seconds it took.
        self.candidates: dict[str, Candidate] = {
            name: functools.partial(self.run, name) for name in names
        }

    def run(self, name: str) -> float:
        """Run a candidate in its process. Returns the seconds of its second call."""
        return self.pool.submit(time_second_call, name).result()

    def __enter__(self) -> "CandidateProcess":
        return self

    def __exit__(self, *_):
        self.pool.shutdown()


# Models and optimizers can't be pickled. They stay in the process that made them, and are called by
# their names.
candidates_of_this_process: dict[str, Callable] = {}


def make_candidates(make: Callable[..., dict[str, Callable]], *args) -> list[str]:
    """Make the candidates of this process. Returns what can be pickled: their names."""
    made = make(*args)
    candidates_of_this_process.update(made)
    return list(made)


def time_second_call(name: str) -> float:
    """Seconds of the second of two calls.

    In training, a step follows another one. A step that follows another process's step finds that
    process's data in the CPU's caches, and its time scatters by up to 40%.
    """
    function = candidates_of_this_process[name]
    for _ in range(2):
        start = time.perf_counter()
        function()
        # The first call's kernels must not run into the second one's time.
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return time.perf_counter() - start
