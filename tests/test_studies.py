"""The studies as a person runs them, in miniature; their definitions by hand; what they claim against the papers."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL_RUN, command, ok, one_line

import checkpoint
import norm_study
import tokenizer_study
from files import write_text
from model import GPT, GPTConfig
from runtime import Runtime
from shards import open_shards, shards_tokenizer
from tokenizer import load_tokenizer, train_tokenizer

CPU = Runtime(torch.device("cpu"), torch.float32)
TINY = "--n_layer 2 --n_head 2 --n_embd 32 --device cpu --dtype float32".split()


# Pre-LN against Post-LN


def last_gradients(norm: str, depths: list[int]) -> list[float]:
    """Gradient norm of the last layer at Xavier's initialization, by depth: means over eight models and texts."""
    norms = []
    for depth in depths:
        found = []
        for seed in range(8):
            torch.manual_seed(seed)
            model = GPT(GPTConfig(block_size=32, vocab_size=500, n_layer=depth, n_head=2, n_embd=64, norm=norm))
            norm_study.init_xavier(model)
            idx = torch.randint(500, (4, 33))
            found.append(norm_study.layer_gradients(model, idx[:, :-1], idx[:, 1:], CPU)[-1])
        norms.append(np.mean(found))
    return norms


def test_gradients_at_initialization_are_those_of_xiong_et_al():
    """Theorem 1: near the output they do not depend on the depth with Post-LN, and fall as its root with Pre-LN."""
    depths = [2, 8, 32]
    post, pre = last_gradients("post", depths), last_gradients("pre", depths)
    assert max(post) / min(post) < 1.2
    slope = np.polyfit(np.log(depths), np.log(pre), 1)[0]
    assert -0.75 < slope < -0.4
    assert post[-1] > 2.5 * pre[-1]


def test_layer_gradients_are_those_of_backward():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=3, n_head=2, n_embd=32))
    idx = torch.randint(50, (2, 17))
    found = norm_study.layer_gradients(model, idx[:, :-1], idx[:, 1:], CPU)
    torch.nn.functional.cross_entropy(model(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten()).backward()
    expected = [float(block.mlp.c_proj.weight.grad.norm()) for block in model.h]
    assert found == pytest.approx(expected, rel=1e-4)


def test_spikes_by_hand():
    calm = [3.0 + 0.01 * (n % 3) for n in range(60)]
    assert norm_study.find_spikes(calm) == []
    one = calm.copy()
    one[30:33] = [4.0, 5.0, 3.5]  # one spike of three steps, the median before it is 3.01
    one[50] = 3.4
    assert norm_study.find_spikes(one) == pytest.approx([1.99, 0.39], abs=0.02)
    small = calm.copy()
    small[40] = 3.19  # many deviations, but below 0.2 nats
    assert norm_study.find_spikes(small) == []
    assert norm_study.find_spikes([10.0 - 0.1 * n for n in range(60)]) == []


def test_survival_by_hand():
    good, stuck, diverged = dict(val=5.0), dict(val=6.55), dict(val=None)
    assert norm_study.survived([good, good], unigram=6.6)
    assert not norm_study.survived([good, stuck], unigram=6.6)
    assert not norm_study.survived([good, diverged], unigram=6.6)


def test_unigram_loss_by_hand(tmp_path):
    np.save(tmp_path / "x_train_0.npy", np.array([0, 0, 0, 1, 2], dtype=np.uint16))
    np.save(tmp_path / "x_val_0.npy", np.array([0, 2, 3, 3], dtype=np.uint16))
    config = norm_study.Config(data_dir=str(tmp_path), val_tokens=3)
    expected = -(math.log(4 / 9) + math.log(2 / 9) + math.log(1 / 9)) / 3  # of nine counts, one added to each of four
    assert norm_study.unigram_loss(config, vocab_size=4) == pytest.approx(expected)


NORM_RUN = [*TINY, *"--B 4 --T 32 --total_batch_size 128 --max_steps 12 --gradients_every 6 --val_tokens 1000".split()]
NORM_RUN += "--warmups 0 4 --depths 2 4 --seeds 1 --num_parallel 2".split()


@pytest.fixture(scope="module")
def norm_folder(data_dir, tmp_path_factory):
    """A study in which one learning rate learns and one destroys."""
    out = tmp_path_factory.mktemp("norm") / "study"
    words = ["norm_study.py", "--data_dir", data_dir, "--out_dir", out, *NORM_RUN]
    return out, words, ok(command(*words, "--learning_rates", "1e-3", "1e30"))


def test_norm_study_reports_curves_gradients_and_divergence(norm_folder):
    out, _, result = norm_folder
    results = json.loads((out / "results.json").read_text())
    fine, broken = results["pre_lr_0.001_warmup_0_seed_1"], results["pre_lr_1e+30_warmup_0_seed_1"]
    assert fine["diverged"] is None
    assert fine["val"] == pytest.approx(
        float((out / "runs/pre_lr_0.001_warmup_0_seed_1/log.txt").read_text().split()[-1])
    )
    assert [step for step, _ in fine["gradients"]] == [6, 12]
    assert all(len(norms) == 2 for _, norms in fine["gradients"])
    assert broken["diverged"] >= 1
    assert broken["val"] is None
    report = (out / "report.md").read_text()
    assert "| pre, warmup 0  | 1e+30         | none finite     | 1 of 1   |" in report
    assert report in result.stdout
    for name in ("loss_curves", "learning_rates", "gradients_at_init", "gradients_in_training"):
        assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(out.rglob("*.pt"))
    assert not list(out.rglob("*.tmp"))


def test_a_finished_study_is_not_done_again_and_a_larger_grid_goes_on(norm_folder):
    out, words, _ = norm_folder
    before = {path: path.stat().st_mtime for path in out.rglob("log.txt")}
    ok(command(*words, "--learning_rates", "1e-3", "2e-3", "1e30"))
    assert all(path.stat().st_mtime == time for path, time in before.items())
    assert len(list(out.rglob("log.txt"))) == len(before) + 4


def test_other_settings_are_refused(norm_folder):
    _, words, _ = norm_folder
    error = one_line(command(*words, "--max_steps", 13))
    assert "holds a study with max_steps=12, not 13: choose another --out_dir" in error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_study_takes_its_runs_along_and_goes_on(data_dir, tmp_path, number):
    words = ["norm_study.py", "--data_dir", data_dir, "--out_dir", tmp_path, *NORM_RUN, "--learning_rates", "1e-3"]
    words += ["--max_steps", "100000", "--warmups", "0"]
    study = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.rglob("log.txt"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert "is in use by a study" in one_line(command(*words))
    study.send_signal(number)
    assert "error: interrupted" in study.communicate(timeout=60)[1]
    assert study.returncode == 130
    outputs = [path.read_text() for path in tmp_path.rglob("output.txt")]
    assert len(outputs) == 2
    assert all("stopped: saved" in output for output in outputs)


def test_a_failing_run_ends_the_study_with_its_own_error(data_dir, tmp_path):
    words = ["norm_study.py", "--data_dir", data_dir, "--out_dir", tmp_path, *NORM_RUN, "--total_batch_size", 100]
    error = one_line(command(*words))
    assert "total_batch_size 100 is not divisible by" in error
    assert "output.txt" in error
