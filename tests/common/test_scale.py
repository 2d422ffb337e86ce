"""Processes that die, optimizers that are shared out, checkpoints written in the background."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, is_alive, worker_of
from reference import random_model, random_tokens
from test_train import (
    TORCHRUN,
    arguments,
    assert_same_bits,
    launch,
    losses,
    train_here,
    wait_for_step,
)

from common import checkpoint, runtime
from common.console import UserError


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, out + err
    return out


@pytest.fixture(scope="module")
def two_processes(data_dir, tmp_path_factory):
    """An undisturbed run of two processes."""
    log_dir = tmp_path_factory.mktemp("two") / "log"
    finish(launch(arguments(data_dir, log_dir), TORCHRUN))
    return log_dir


@pytest.mark.slow
def test_a_sharded_optimizer_draws_the_same_curve_and_writes_the_same_checkpoint(
    data_dir, tmp_path, two_processes
):
    finish(
        launch(
            arguments(data_dir, tmp_path / "log", "--shard_optimizer", "--checkpoint_every", 10),
            TORCHRUN,
        )
    )
    assert losses(tmp_path / "log") == losses(two_processes)
    assert_same_bits(tmp_path / "log" / "model_final.pt", two_processes / "model_final.pt")
    # one process goes on from it, its optimizer whole
    for name in ("model_final.pt", "model_00020.pt"):
        (tmp_path / "log" / name).unlink()
    train_here(data_dir, tmp_path / "log", "--resume")
    assert losses(tmp_path / "log") == pytest.approx(losses(two_processes), abs=1e-4)


# Trains, and prints the names of gloo's threads that are left at exit. A thread that has been
# joined may stay in /proc for a moment, and vanish while it is read.
GLOO_THREADS = """
import atexit
import sys
import time
from pathlib import Path

import tyro


def gloo_threads():
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        try:
            names.append(path.read_text().strip())
        except (FileNotFoundError, ProcessLookupError):
            pass
    return [name for name in names if "gloo" in name]


@atexit.register  # before the imports below, hence called after their functions
def report():
    deadline = time.monotonic() + 5
    while gloo_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    sys.stdout.write(f"threads left: {gloo_threads()}\\n")


import train_gpt2

train_gpt2.main(tyro.cli(train_gpt2.Config))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("flags", [[], ["--shard_optimizer"], ["--optimizer", "muon"]])
def test_gloos_threads_end_before_the_interpreter(data_dir, tmp_path, monkeypatch, flags):
    """Otherwise a rank whose run is complete may abort while Python shuts down."""
    script = tmp_path / "train.py"
    script.write_text(GLOO_THREADS)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    words = [script, *arguments(data_dir, tmp_path / "log", *flags)[1:]]
    out = finish(launch(words, TORCHRUN))
    assert out.count("threads left: []\n") == 2, out


@pytest.mark.slow
def test_torchrun_restarts_a_run_whose_worker_was_killed(
    data_dir, tmp_path, two_processes, monkeypatch
):
    words = arguments(
        data_dir, tmp_path / "log", "--rolling_every", 1
    )  # without --resume: the restart implies it
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    process = launch(words, [*TORCHRUN, "--max-restarts=3"])
    wait_for_step(tmp_path / "log", 8, process)
    os.kill(worker_of(process, rank=1), signal.SIGKILL)
    assert "resuming from" in finish(process)
    assert losses(tmp_path / "log") == losses(two_processes)
    assert_same_bits(tmp_path / "log" / "model_final.pt", two_processes / "model_final.pt")


def test_restarts_that_cannot_work_are_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")  # as torchrun sets it
    monkeypatch.delenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", raising=False)
    with pytest.raises(
        UserError, match="--max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
    ):
        runtime.check_launcher()
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    runtime.check_launcher()


@pytest.mark.slow
def test_workers_end_with_their_launcher(data_dir, tmp_path):
    process = launch(arguments(data_dir, tmp_path / "log", "--max_steps", 100000), TORCHRUN)
    wait_for_step(tmp_path / "log", 2, process)
    workers = [worker_of(process, rank) for rank in (0, 1)]
    process.kill()
    deadline = time.monotonic() + 20
    while any(is_alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "the workers train on without a launcher"
        time.sleep(0.1)


def test_activation_checkpointing_changes_memory_only():
    x, y = random_tokens(2, 128), random_tokens(2, 128, seed=2)
    kept, gradients = {}, {}
    for checkpointing in (False, True):
        model = random_model(dropout=0.1).train()
        model.activation_checkpointing = checkpointing
        sizes = []
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=sizes: (s.append(t.nbytes), t)[1], lambda t: t
        ):
            loss = model(x, y)
        kept[checkpointing] = sum(sizes)
        loss.backward()
        gradients[checkpointing] = [p.grad for p in model.parameters()]
    assert kept[True] < kept[False] / 4
    for ours, theirs in zip(gradients[True], gradients[False]):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_background_checkpoint_is_that_of_the_moment_of_saving(tmp_path):
    saver, events = checkpoint.BackgroundSaver(), []
    state = dict(
        model=dict(a=torch.arange(4.0)),
        optimizer=dict(groups=[dict(lr=0.1)], betas=(0.9, 0.95)),
        step=1,
    )
    for step in (1, 2):
        state["model"]["a"] += 1
        state["step"] = step
        saver.save(tmp_path / f"{step}.pt", state, then=lambda step=step: events.append(step))
        state["model"]["a"] += 100  # training goes on
    saver.wait()
    first, second = (torch.load(tmp_path / f"{step}.pt", weights_only=True) for step in (1, 2))
    assert first["model"]["a"].tolist() == [1, 2, 3, 4]
    assert second["model"]["a"].tolist() == [102, 103, 104, 105]
    assert (first["step"], second["step"]) == (1, 2)
    assert second["optimizer"] == dict(groups=[dict(lr=0.1)], betas=(0.9, 0.95))
    assert events == [1, 2]


def test_what_goes_wrong_in_the_background_is_raised(tmp_path):
    saver = checkpoint.BackgroundSaver()
    saver.save(tmp_path / "no folder" / "1.pt", dict(step=1))
    with pytest.raises(OSError, match="can't be written"):
        saver.save(tmp_path / "2.pt", dict(step=2))
    saver.wait()
    assert not (tmp_path / "2.pt").exists()
