"""Fixtures and helpers of the tests. No test needs a network.

Some tests use larger data if ../shared/data (or $TEST_DATA) exists, and are skipped otherwise.
"""

import argparse
import inspect
import logging
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import typing
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED_DATA = Path(os.environ.get("TEST_DATA", ROOT.parent / "shared" / "data"))
if (SHARED_DATA / "tiktoken").exists():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED_DATA / "tiktoken"))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # the models are tiny: more threads would only wait

# Text to train on. Our own files would do, but results would then change with every edit.
TEXTS = [inspect.getsource(module) for module in (argparse, inspect, logging, typing)]

SMALL_MODEL = "--n_layer 2 --n_head 2 --n_embd 32 --block_size 64".split()
SMALL_BATCH = "--B 4 --T 32 --total_batch_size 512".split()
SMALL_RUN = [
    *SMALL_MODEL,
    *SMALL_BATCH,
    *"--warmup_steps 4 --max_lr 1e-3 --min_lr 1e-4 --device cpu --dtype float32".split(),
    *"--val_every 10 --val_tokens 1000 --sample_every 0 --hellaswag_every 0".split(),
]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED_DATA.exists():
        pytest.skip("no test data next to the repository")
    return SHARED_DATA


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Shards with a vocabulary of 384 tokens: several for training, one for validation."""
    folder = tmp_path_factory.mktemp("data")
    text = folder / "text.txt"
    text.write_text("\n".join(TEXTS))
    out = folder / "shards"
    flags = "--shard_size 9000 --train_tokenizer 384 --num_workers 1".split()
    ok(command("fineweb.py", "--source", "text", "--data_files", text, "--out_dir", out, *flags))
    return out


@pytest.fixture(scope="session")
def reference_folder(tmp_path_factory) -> Path:
    """A random model of transformers in Hugging Face's layout."""
    from reference import random_reference  # torch must be imported after OMP_NUM_THREADS is set

    folder = tmp_path_factory.mktemp("transformers")
    random_reference().save_pretrained(folder)
    return folder


@pytest.fixture
def pair(reference_folder):
    """The same weights twice: transformers' model and ours."""
    from reference import random_reference

    from common.huggingface import load_pretrained

    return random_reference(), load_pretrained(reference_folder).eval()


# Importing torch takes seconds. The fork server does it once per test worker, before it has any
# threads; a command then starts as a fork of it.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["preload"])


def command(*words, **kwargs) -> subprocess.CompletedProcess:
    """Run a script from the repository's root, as a user would: `command("sample.py", "--help")`.

    With arguments of subprocess.run (env, input, ...) it starts as a new Python instead of a fork.
    """
    argv = [str(word) for word in words]
    if kwargs or argv[0] == "-m" and argv[1].startswith("torch."):
        new_python = [sys.executable, *argv]
        options = dict(cwd=ROOT, capture_output=True, text=True, timeout=300)
        return subprocess.run(new_python, **options | kwargs)
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = FORKS.Process(target=run_script, args=(argv, dict(os.environ), out, err))
        process.start()
        process.join(300)
        if process.is_alive():
            process.kill()
            raise AssertionError(f"{argv} takes more than 300 s")
        return subprocess.CompletedProcess(argv, process.exitcode, out.read_text(), err.read_text())


def run_script(argv: list[str], environment: dict, out: Path, err: Path):
    """What a fork of the fork server does in the place of `python ARGV`."""
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    for stream, path in ((sys.stdout, out), (sys.stderr, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, stream.fileno())
    sys.argv = argv
    sys.path.insert(0, str(ROOT))
    if argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(ROOT / argv[0]), run_name="__main__")


def ok(result: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def one_line(result: subprocess.CompletedProcess) -> str:
    """The error of a command that must fail: non-zero exit, one line of error, no traceback."""
    assert result.returncode not in (0, None), result.stdout
    assert "Traceback" not in result.stdout + result.stderr, result.stderr
    errors = [line for line in result.stderr.splitlines() if "error: " in line]
    assert len(errors) == 1, result.stderr
    return errors[0]


def worker_of(launcher: subprocess.Popen, rank: int) -> int:
    """The process id of a rank that torchrun has started."""
    pgrep = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True)
    for pid in pgrep.stdout.split():
        if f"\0RANK={rank}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
            return int(pid)
    raise AssertionError(f"no worker of rank {rank}")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter if it ends between open and read
        return False
