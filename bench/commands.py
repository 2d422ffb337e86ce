"""The rows about commands: fineweb.py on a whole corpus, train_gpt2.py until its first step."""

import multiprocessing
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tiktoken

from bench import measure, peers
from bench.measure import Figure, Stopwatch
from common import machine
from common.console import UserError
from common.runtime import Runtime
from common.shards import SOURCE_START
from common.text import open_source

ROOT = Path(__file__).parent.parent


# ---------------------------------------------------------------------------------------------
# Tokenizing


def tokenize(config, rt: Runtime) -> list[Figure]:
    """MB of text per second: fineweb.py as a command (start-up, reading and writing included),
    compared with tiktoken on texts that are in memory. Both use one process per core."""
    kind = "parquet" if config.data_files else "pydoc"
    # fineweb.py reads the same source itself.
    flags = ["--source", kind]
    if config.data_files:
        flags += ["--data_files", *config.data_files]
    texts = read_texts(kind, config.data_files)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    num_processes = machine.num_cores()
    row = f"tokenize {megabytes:,.0f} MB, {num_processes} processes"

    # Forked, not spawned: the processes inherit the texts instead of receiving copies.
    fork = multiprocessing.get_context("fork")
    with (
        tempfile.TemporaryDirectory() as folder,
        fork.Pool(num_processes, keep_texts, (texts,)) as pool,
    ):
        # Small parts, so that no process waits for another one at the end.
        parts = [slice(first, first + 64) for first in range(0, len(texts), 64)]
        watches = {
            peers.ThisProject.name: Stopwatch(rt, write_shards, flags, Path(folder)),
            "tiktoken alone, texts in memory": Stopwatch(rt, pool.map, count_tokens, parts),
        }
        seconds = measure.medians(watches, config.rounds, row)
    return measure.rates(row, seconds, megabytes, "MB/s", peers.ThisProject.name)


def read_texts(kind: str, data_files: tuple[str, ...]) -> list[str]:
    """All texts of the source, in memory."""
    source = open_source(kind, data_files=data_files)
    return [text for batch in source.batches(SOURCE_START) for text in batch.texts.to_pylist()]


def write_shards(flags: list[str], folder: Path):
    """Run fineweb.py into a new folder, so that it has nothing to resume."""
    out_dir = Path(tempfile.mkdtemp(dir=folder))
    command: list = [sys.executable, ROOT / "fineweb.py", *flags, "--out_dir", out_dir]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise UserError(f"fineweb.py failed: {result.stderr.strip().splitlines()[-1]}")


# Set by the pool's initializer in each of its processes.
texts_of_this_process: list[str] = []


def keep_texts(texts: list[str]):
    """Initialize a process of the pool with all texts."""
    # In place: a plain assignment would make a local name.
    texts_of_this_process[:] = texts


def count_tokens(part: slice) -> int:
    """Tokenize a part of the texts that this process holds."""
    # tiktoken keeps the encoding, so only the first call of a process builds it.
    enc = tiktoken.get_encoding("gpt2")
    return sum(len(enc.encode_ordinary(text)) for text in texts_of_this_process[part])


# ---------------------------------------------------------------------------------------------
# Start


def start(config, rt: Runtime) -> list[Figure]:
    """Seconds until train_gpt2.py has finished its first step, with GPT-2 (124M)."""
    row = "start, GPT-2 (124M), to the end of the first step"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data_dir = folder / "data"
        write_random_shards(data_dir)
        # The first, uncounted round fills the compiler's cache.
        watches = {
            "compiled, from the cache": Stopwatch(rt, train_one_step, data_dir, folder, rt, "on"),
            "not compiled": Stopwatch(rt, train_one_step, data_dir, folder, rt, "off"),
        }
        seconds = measure.medians(watches, config.rounds, row)
    return [Figure(row, name, taken, "s") for name, taken in seconds.items()]


def write_random_shards(folder: Path):
    """One small shard for training and one for validation."""
    folder.mkdir()
    # What the tokens are does not influence the time. Shards without a manifest count as GPT-2's.
    tokens = np.random.default_rng(0).integers(50257, size=100_000, dtype=np.uint16)
    for split in ("train", "val"):
        np.save(folder / f"random_{split}_0.npy", tokens)


def train_one_step(data_dir: Path, folder: Path, rt: Runtime, compile: str):
    """Run train_gpt2.py in a new folder, and stop it when it has logged its first step."""
    # Nothing but training: a validation, HellaSwag or a sample would come before the first step.
    log_dir = Path(tempfile.mkdtemp(dir=folder))
    # A small batch, so that the step itself takes little of the time
    flags: list = "--B 4 --T 256 --total_batch_size 1024".split()
    flags += "--val_every 0 --hellaswag_every 0 --sample_every 0".split()
    flags += ["--data_dir", data_dir, "--log_dir", log_dir]
    flags += ["--device", rt.device.type, "--compile", compile]
    command: list = [sys.executable, ROOT / "train_gpt2.py", *flags]
    # Errors go to a file. A pipe that nobody reads would stop the process once it is full.
    with open(log_dir / "errors.txt", "w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
    try:
        # The first training loss in log.txt means that the first step is done.
        while process.poll() is None and not has_trained(log_dir):
            time.sleep(0.01)
        if process.poll() is not None:
            # Training does not end that early by itself, so it has failed.
            raise UserError(
                f"train_gpt2.py ended before its first step: {(log_dir / 'errors.txt').read_text()}"
            )
    finally:
        # Left alone, it would go on training.
        process.kill()
        process.wait()


def has_trained(log_dir: Path) -> bool:
    """Whether log.txt, whose lines are `step stream value`, contains a training loss."""
    path = log_dir / "log.txt"
    return path.exists() and " train " in path.read_text()
