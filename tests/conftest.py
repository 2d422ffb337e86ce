"""What several tests stand on. Nothing here needs a network; what lies in ../shared/data is used when it is there."""

import argparse
import inspect
import logging
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED_DATA = Path(os.environ.get("TEST_DATA", ROOT.parent / "shared" / "data"))
if (SHARED_DATA / "tiktoken").exists():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED_DATA / "tiktoken"))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # the models are tiny: threads would only wait for each other
TEXTS = [
    inspect.getsource(module) for module in (argparse, inspect, logging, typing)
]  # stable, unlike our own files
SMALL_MODEL = "--n_layer 2 --n_head 2 --n_embd 32 --block_size 64".split()
SMALL_RUN = [
    *SMALL_MODEL,
    *"--B 4 --T 32 --total_batch_size 512 --warmup_steps 4 --max_lr 1e-3 --min_lr 1e-4".split(),
]
SMALL_RUN += "--val_every 10 --val_tokens 1000 --sample_every 0 --hellaswag_every 0".split()
SMALL_RUN += "--device cpu --dtype float32".split()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED_DATA.exists():
        pytest.skip("no test data beside the repository")
    return SHARED_DATA


def command(*words, **kwargs) -> subprocess.CompletedProcess:
    """Run one of the scripts as a person would, from the repository's root."""
    words = [sys.executable, *map(str, words)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, **kwargs)


def ok(result: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def one_line(result: subprocess.CompletedProcess) -> str:
    """The error line of a command that had to fail: exit code not zero, no traceback, exactly one line of error."""
    assert result.returncode not in (0, None), result.stdout
    assert "Traceback" not in result.stdout + result.stderr, result.stderr
    errors = [line for line in result.stderr.splitlines() if "error: " in line]
    assert len(errors) == 1, result.stderr
    return errors[0]


def worker_of(launcher: subprocess.Popen, rank: int) -> int:
    """The process of a rank that torchrun has started."""
    children = subprocess.run(
        ["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True
    ).stdout.split()
    for pid in children:
        if f"\0RANK={rank}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
            return int(pid)
    raise AssertionError(f"no worker of rank {rank}")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Shards of a little text, under a vocabulary of 384 tokens: several for training, one for validation."""
    folder = tmp_path_factory.mktemp("data")
    text = "\n".join(TEXTS)
    (folder / "text.txt").write_text(text)
    out = folder / "shards"
    sizes = ["--shard_size", "9000", "--train_tokenizer", "384", "--num_workers", "1"]
    ok(
        command(
            "fineweb.py",
            "--source",
            "text",
            "--data_files",
            folder / "text.txt",
            "--out_dir",
            out,
            *sizes,
        )
    )
    return out
