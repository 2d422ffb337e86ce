"""Pre-LN against Post-LN: definitions by hand, the paper's theorem, and the study end to end."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, command, ok
from study_helpers import CPU, PNG, TINY_MODEL, run_main

from common.console import UserError
from experiments import norm_study
from experiments.norm_study import Point
from experiments.sweep import StudyFolder
from model import GPT, GPTConfig


def last_gradients(placement: str, depths: list[int]) -> list[float]:
    """Gradient norm of the last layer with Xavier's initialization, by depth.

    Each is the mean over eight models and texts.
    """
    by_depth = []
    for depth in depths:
        grad_norms = []
        for seed in range(8):
            torch.manual_seed(seed)
            config = GPTConfig(32, vocab_size=500, n_layer=depth, n_head=2, n_embd=64)
            config.norm = placement
            model = GPT(config)
            norm_study.init_xavier(model)
            idx = torch.randint(500, (4, 33))
            grad_norms.append(norm_study.layer_gradients(model, idx[:, :-1], idx[:, 1:], CPU)[-1])
        by_depth.append(np.mean(grad_norms))
    return by_depth


def test_gradients_at_initialization_are_those_of_xiong_et_al():
    """Theorem 1: near the output they are independent of the depth with Post-LN, and fall as the
    root of the depth with Pre-LN."""
    depths = [2, 8, 32]
    post = last_gradients("post", depths)
    pre = last_gradients("pre", depths)
    assert max(post) / min(post) < 1.2
    assert -0.75 < np.polyfit(np.log(depths), np.log(pre), 1)[0] < -0.4
    assert post[-1] > 2.5 * pre[-1]


def test_layer_gradients_are_those_of_backward():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=3, n_head=2, n_embd=32))
    idx = torch.randint(50, (2, 17))
    x, y = idx[:, :-1], idx[:, 1:]
    measured = norm_study.layer_gradients(model, x, y, CPU)
    torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    expected = [float(block.mlp.c_proj.weight.grad.norm()) for block in model.h]
    assert measured == pytest.approx(expected, rel=1e-4)


def test_spikes_by_hand():
    calm = [3.0 + 0.01 * (n % 3) for n in range(60)]
    assert norm_study.find_spikes(calm) == []
    two = calm.copy()
    two[30:33] = [4.0, 5.0, 3.5]  # one spike of three steps; the median before it is 3.01
    two[50] = 3.4
    assert norm_study.find_spikes(two) == pytest.approx([1.99, 0.39], abs=0.02)
    small = calm.copy()
    small[40] = 3.19  # many deviations, but below 0.2 nats
    assert norm_study.find_spikes(small) == []
    assert norm_study.find_spikes([10.0 - 0.1 * n for n in range(60)]) == []


def test_survival_by_hand():
    good, stuck, diverged = dict(val=6.5), dict(val=6.65), dict(val=None)
    assert norm_study.survived([good, good], unigram=6.6)
    assert not norm_study.survived([good, stuck], unigram=6.6)
    assert not norm_study.survived([good, diverged], unigram=6.6)


def test_unigram_loss_by_hand(tmp_path):
    np.save(tmp_path / "x_train_0.npy", np.array([0, 0, 0, 1, 2], dtype=np.uint16))
    np.save(tmp_path / "x_val_0.npy", np.array([0, 2, 3, 3], dtype=np.uint16))
    config = norm_study.Config(data_dir=str(tmp_path), val_tokens=3)
    # One count is added to each of the four tokens, which makes nine.
    expected = -(math.log(4 / 9) + math.log(2 / 9) + math.log(1 / 9)) / 3
    assert norm_study.unigram_loss(config, vocab_size=4) == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------
# The study

STUDY_FLAGS = [
    *TINY_MODEL,
    *"--B 4 --T 32 --total_batch_size 128 --max_steps 12 --gradients_every 6".split(),
    *"--val_tokens 1000 --warmup_steps_grid 4 --depths 2 4 --seeds 1 --num_parallel 2".split(),
]


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """Folder, flags and output of a study in which one learning rate learns and one diverges."""
    out = tmp_path_factory.mktemp("norm") / "study"
    flags = ["--data_dir", data_dir, "--out_dir", out, *STUDY_FLAGS]
    rates = ["--learning_rates", "1e-3", "1e30"]
    return out, flags, ok(command("-m", "experiments.norm_study", *flags, *rates)).stdout


@pytest.mark.slow
def test_report_curves_gradients_and_divergence(finished):
    out, _, output = finished
    results = json.loads((out / "results.json").read_text())
    fine = results["pre_lr_0.001_warmup_4_seed_1"]
    broken = results["pre_lr_1e+30_warmup_4_seed_1"]
    assert fine["diverged"] is None
    log = (out / "runs" / "pre_lr_0.001_warmup_4_seed_1" / "log.txt").read_text()
    assert fine["val"] == pytest.approx(float(log.split()[-1]))
    assert [step for step, _ in fine["gradients"]] == [6, 12]
    assert all(len(grad_norms) == 2 for _, grad_norms in fine["gradients"])
    assert broken["diverged"] >= 1
    assert broken["val"] is None
    report = (out / "report.md").read_text()
    assert "| pre, warmup 4  | 1e+30         | none finite     | 1 of 1   |" in report
    assert report in output
    for name in ("loss_curves", "learning_rates", "gradients_at_init", "gradients_in_training"):
        assert (out / f"{name}.png").read_bytes()[:4] == PNG
    assert not list(out.rglob("*.pt"))
    assert not list(out.rglob("*.tmp"))


@pytest.mark.slow
def test_plots_of_any_number_of_measurements(finished, tmp_path):
    """The shades of grey go from light to black, and rounding must not push them below zero."""
    out, _, _ = finished
    config = norm_study.Config(
        learning_rates=(1e-3,), warmup_steps_grid=(4,), seeds=(1,), n_layer=2, n_head=2, T=32
    )
    study = StudyFolder(tmp_path, {})
    study.results = json.loads((out / "results.json").read_text())
    study.save_plot = lambda name, figure: None
    for count in (1, 3, 6, 12, 48):
        for placement in ("pre", "post"):
            measurements = [(step, [1.0, 2.0]) for step in range(1, count + 1)]
            study.results[Point(placement, 1e-3, 4, 1).name]["gradients"] = measurements
        norm_study.draw_gradients(config, study)


@pytest.mark.slow
def test_other_settings_are_refused(finished):
    _, flags, _ = finished
    with pytest.raises(UserError, match="max_steps=12, not 13: choose another --out_dir"):
        run_main(norm_study, *flags, "--max_steps", 13)


@pytest.mark.slow
def test_a_failing_run_ends_the_study(data_dir, tmp_path):
    flags = ["--data_dir", data_dir, "--out_dir", tmp_path, *STUDY_FLAGS]
    message = "total_batch_size 100 is not divisible by .*output.txt"
    with pytest.raises(UserError, match=message):
        run_main(norm_study, *flags, "--total_batch_size", 100)


@pytest.mark.slow
def test_a_larger_grid_adds_runs_to_a_finished_study(finished):
    out, flags, _ = finished
    before = {path: path.stat().st_mtime for path in out.rglob("log.txt")}
    run_main(norm_study, *flags, "--learning_rates", "1e-3", "2e-3", "1e30")
    assert all(path.stat().st_mtime == mtime for path, mtime in before.items())
    assert len(list(out.rglob("log.txt"))) == len(before) + 2


@pytest.mark.slow
def test_a_run_that_finished_without_its_study_is_not_repeated(finished):
    """The study reads it, because train_gpt2.py --resume finds nothing left to do."""
    out, flags, _ = finished
    name = "post_lr_0.001_warmup_4_seed_1"
    results = json.loads((out / "results.json").read_text())
    del results[name]
    (out / "results.json").write_text(json.dumps(results))

    # Repeat its training by hand, with the command of the other placement.
    shutil.rmtree(out / "runs" / name)
    other = (out / "runs" / "pre_lr_0.001_warmup_4_seed_1" / "output.txt").read_text()
    line = other.splitlines()[0].removeprefix("$ ")
    line = line.replace("--norm pre", "--norm post").replace("/pre_lr", "/post_lr")
    ok(command(*line.split()[1:]))

    log = out / "runs" / name / "log.txt"
    before = log.stat().st_mtime
    run_main(norm_study, *flags, "--learning_rates", "1e-3")
    assert log.stat().st_mtime == before
    again = json.loads((out / "results.json").read_text())[name]
    assert [step for step, _ in again["gradients"]] == [6, 12]
    assert not list(out.rglob("*.pt"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_stopped_study_stops_its_runs_which_save_checkpoints(data_dir, tmp_path, number):
    flags = ["--data_dir", data_dir, "--out_dir", tmp_path, *STUDY_FLAGS]
    flags += ["--learning_rates", "1e-3", "--max_steps", "100000"]
    flags += ["--gradients_every", "100000"]  # the only checkpoint is the one at the stop
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.norm_study", *map(str, flags)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        # A process in the background of a shell ignores SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 60
        while sum("train" in log.read_text() for log in tmp_path.rglob("log.txt")) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        with pytest.raises(UserError, match="is in use by process"):
            StudyFolder(tmp_path, {})
        process.send_signal(number)
        assert "error: interrupted" in process.communicate(timeout=60)[1]
        assert process.returncode == 130
    finally:
        # Its runs, if the study left any behind
        subprocess.run(["pkill", "-KILL", "-f", str(tmp_path)])
    run_folders = list((tmp_path / "runs").iterdir())
    assert len(run_folders) == 2
    assert all(list(folder.glob("model_*.pt")) for folder in run_folders)
