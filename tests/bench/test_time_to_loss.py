"""Tokens and seconds to a loss: the crossing by hand, and what a timed run counts and replaces."""

import json
import math
import sys
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, command, ok

import train_gpt2
from bench import time_to_loss
from bench.time_to_loss import (
    Point,
    first_crossing,
    make_job,
    make_run,
    nanogpt_flags,
    write_tokens,
)
from bench.timed_run import Job, Meter, adapt
from common.console import UserError, parse_flags
from common.runtime import Runtime
from common.shards import open_shards, shards_tokenizer
from model import GPT, GPTConfig

CPU = Runtime(torch.device("cpu"), torch.float32)

# A script like build-nanogpt's: constants, a model, a loop, and an evaluation that must not run.
PEER = """
import torch
from hellaswag import iterate_examples

class GPT(torch.nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.wte = torch.nn.Embedding(vocab_size, 4)

    def forward(self, x, y):
        logits = self.wte(x) @ self.wte.weight.t()
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())

torch.manual_seed(1337)
model = GPT(50304)
max_steps = 19073
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(max_steps):
    last_step = step == max_steps - 1
    if step % 250 == 0 or last_step:
        raise SystemExit("an evaluation")
    optimizer.zero_grad()
    x = torch.randint(384, (2, 8))
    model(x, x)[1].backward()
    optimizer.step()
"""


def small_config(data_dir, tmp_path, **more) -> time_to_loss.Config:
    flags = dict(n_layer=1, n_head=2, n_embd=8, B=2, T=8, total_batch_size=64, val_tokens=64)
    flags |= dict(data_dir=str(data_dir), out_dir=str(tmp_path), device="cpu")
    return time_to_loss.Config(**flags | more)


def test_first_crossing_by_hand():
    assert first_crossing([10, 20, 30], [4.0, 3.0, 2.0], 2.5) == 25
    assert first_crossing([10, 20, 30], [4.0, 3.0, 2.0], 3.0) == 20
    assert first_crossing([10, 20, 30], [4.0, 3.0, 2.0], 5.0) == 10
    assert first_crossing([10, 20, 30], [4.0, 3.0, 2.0], 1.0) is None


def test_the_grid_grows_until_the_best_learning_rate_is_inside(data_dir, tmp_path, monkeypatch):
    """Best is 1e-3, below the first grid; 16e-3 and above diverge."""

    def run_points(config, study, rt, shape, points, desc):
        for point in points:
            tried.append(point.lr)
            distance = abs(math.log2(point.lr / 1e-3))
            study.results[point.name] = dict(val=None if point.lr > 15e-3 else 5 + distance)

    monkeypatch.setattr(time_to_loss, "run_points", run_points)
    study = SimpleNamespace(results={})
    tried: list[float] = []
    config = small_config(data_dir, tmp_path, learning_rates=(4e-3, 8e-3))
    losses = time_to_loss.search_rates(config, study, CPU, None, "nanogpt")
    assert tried == [4e-3, 8e-3, 2e-3, 1e-3, 5e-4]
    assert time_to_loss.best_rate(losses) == 1e-3

    config = small_config(data_dir, tmp_path, learning_rates=(16e-3, 32e-3))
    with pytest.raises(UserError, match="diverged at all learning_rates"):
        time_to_loss.search_rates(config, study, CPU, None, "nanogpt")


def test_the_report_of_two_candidates_by_hand(data_dir, tmp_path, monkeypatch):
    """AdamW falls to 5.0 in 100 steps and 100 s; the fast recipe in 20 steps, of 2 s each."""

    def run_points(config, study, rt, shape, points, desc):
        for point in points:
            if point.lr != 2e-3:
                study.results[point.name] = dict(val=9.0)
            elif point.candidate == "adamw":
                study.results[point.name] = dict(
                    val=5.0, steps=[50, 100], vals=[5.5, 5.0], seconds=[50, 100]
                )
            else:
                study.results[point.name] = dict(
                    val=4.75, steps=[15, 25], vals=[5.25, 4.75], seconds=[30, 50]
                )

    monkeypatch.setattr(time_to_loss, "run_points", run_points)
    flags = dict(max_steps=100, step_fractions=(1.0,), fast_fractions=(0.25,), seeds=(1, 2))
    flags |= dict(candidates=("adamw", "fast"), learning_rates=(1e-3, 2e-3))
    config = small_config(data_dir, tmp_path, **flags)
    time_to_loss.main(config)
    report = [line.split("|")[1:-1] for line in (tmp_path / "report.md").read_text().splitlines()]
    cells = [[cell.strip() for cell in line] for line in report if line]
    target = "5.0000 (this project, AdamW, 1 of the steps)"
    # 64 tokens per step
    assert [target, "this project, AdamW", "0.0064", "1.00", "100", "1.00"] in cells
    assert [target, "this project, fast", "0.00128", "0.20", "40", "0.40"] in cells
    assert "nanoGPT" not in (tmp_path / "report.md").read_text()
    assert (tmp_path / "time_to_loss.png").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(val_tokens=100), "val_tokens is 100, must be a multiple of B"),
        (dict(candidates=("adam",)), "there is no candidate 'adam': choose from adamw, fast"),
        (dict(position_lr_scale=0.0), "position_lr_scale is 0.0, must be above 0"),
        (dict(candidates=("fast",)), "name adamw or nanogpt, whose final losses are the targets"),
        (dict(step_fractions=(0.5,)), "and 1 among the step_fractions"),
        (dict(max_steps=4), "the shortest run needs two steps"),
    ],
)
def test_wrong_flags_are_refused(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        small_config(tmp_path, tmp_path, **flags)


def test_a_folder_without_the_script_is_an_error(data_dir, tmp_path):
    config = small_config(data_dir, tmp_path, nanogpt=str(tmp_path))
    with pytest.raises(UserError, match="no file .*train.py: give the folder that contains it"):
        time_to_loss.find_scripts(config)


def test_the_other_projects_get_the_same_tokens(data_dir, tmp_path):
    config = small_config(data_dir, tmp_path)
    enc = shards_tokenizer(data_dir)
    write_tokens(config, config.gpt_config(block_size=8, vocab_size=enc.n_vocab))
    expected = open_shards(data_dir, "train").read_first(10**9)
    written = np.fromfile(tmp_path / "tokens" / "nanogpt" / "train.bin", np.uint16)
    assert np.array_equal(written, expected)
    parts = sorted((tmp_path / "tokens" / "build-nanogpt").glob("train_*.npy"))
    assert np.array_equal(np.concatenate([np.load(part) for part in parts]), expected)


def test_nanogpt_makes_as_many_updates_as_the_others(data_dir, tmp_path):
    # Its loop ends after the iteration numbered max_iters, and the first one is 0.
    job = Job("train.py", [], "", "work", "", "", "cpu", 1, 50, 10, 64, 2, 8)
    config = small_config(data_dir, tmp_path)
    flags = nanogpt_flags(config, CPU, job, Point("nanogpt", 1e-3, 1.0, 1), 5, tmp_path)
    assert "--max_iters=49" in flags
    assert "--gradient_accumulation_steps=4" in flags
    assert "--compile=False" in flags


def test_other_projects_run_with_libgomps_default(data_dir, tmp_path, monkeypatch):
    config = small_config(data_dir, tmp_path)
    shape = config.gpt_config(block_size=8, vocab_size=shards_tokenizer(data_dir).n_vocab)
    scripts = {name: tmp_path / f"{name}.py" for name in ("fast", "nanogpt")}
    monkeypatch.setattr(time_to_loss, "find_scripts", lambda config: scripts)
    env = {name: make_run(config, CPU, shape, Point(name, 1e-3, 1.0, 1)).env for name in scripts}
    assert env == {"fast": {}, "nanogpt": {"GOMP_SPINCOUNT": "300000"}}


def test_a_script_without_a_constant_is_another_version(tmp_path):
    script = tmp_path / "train_gpt2.py"
    script.write_text(PEER)
    with pytest.raises(UserError, match="has no warmup_steps: it is another version"):
        adapt(script, 1, dict(warmup_steps="5"), None)


def test_evaluations_are_in_float32_whatever_the_script_trains_in(data_dir, tmp_path):
    curve = str(tmp_path / "curve.json")
    job = Job("train_gpt2.py", [], "", "", curve, str(data_dir), "cpu", 1, 9, 4, 64, 2, 8)
    job.is_ours = True
    meter = Meter(job)
    torch.manual_seed(1)
    meter.model = GPT(GPTConfig(block_size=8, vocab_size=384, n_layer=1, n_head=2, n_embd=32))
    meter.step = 4
    meter.evaluate()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        meter.evaluate()
    assert meter.points[0]["loss"] == meter.points[1]["loss"]


def run_job(job: Job, path):
    path.write_text(json.dumps(asdict(job)))
    ok(command("bench/timed_run.py", path))


@pytest.mark.slow
def test_a_timed_run_of_another_project(data_dir, tmp_path):
    script = tmp_path / "train_gpt2.py"
    script.write_text(PEER)
    work = str(tmp_path / "work")
    curve = tmp_path / "curve.json"
    job = Job(str(script), [], work, work, str(curve), str(data_dir), "cpu", 5, 6, 4, 64, 2, 8)
    job.constants = dict(model="GPT(384)", max_steps="6")
    run_job(job, tmp_path / "job.json")
    points = json.loads(curve.read_text())
    assert [point["step"] for point in points] == [4, 6]
    assert 0 < points[0]["seconds"] < points[1]["seconds"]
    # The same training by hand, and the mean loss over the windows of the validation tokens
    namespace = dict(__name__="peer")
    exec(PEER.split("torch.manual_seed")[0].replace("from hellaswag", "# "), namespace)
    torch.manual_seed(5)
    model = namespace["GPT"](384)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(6):
        optimizer.zero_grad()
        x = torch.randint(384, (2, 8))
        model(x, x)[1].backward()
        optimizer.step()
    tokens = torch.tensor(open_shards(data_dir, "val").read_first(65).astype("int64"))
    loss = model(tokens[:-1].view(8, 8), tokens[1:].view(8, 8))[1].item()
    assert points[-1]["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
def test_a_timed_run_of_this_project(data_dir, tmp_path):
    flags = dict(max_steps=6, val_every=4, step_fractions=(1.0,), fast_fractions=(1.0,))
    flags |= dict(position_lr_scale=0.25)
    config = small_config(data_dir, tmp_path, **flags)
    shape = config.gpt_config(block_size=8, vocab_size=shards_tokenizer(data_dir).n_vocab)
    # The other projects' folders are not needed.
    scripts = {"fast": ROOT / "train_gpt2.py"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time_to_loss, "find_scripts", lambda config: scripts)
        job = make_job(config, CPU, shape, Point("fast", 1e-3, 1.0, 1), tmp_path)
    # The recipe's own rate of the position embeddings comes first, and the study's counts.
    recipe = [*time_to_loss.FAST, "--position_lr_scale", "0.25"]
    assert job.flags[-len(recipe) :] == recipe
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_gpt2.py", *job.flags])
        assert parse_flags(train_gpt2.Config, train_gpt2.__doc__).position_lr_scale == 0.25
    run_job(job, tmp_path / "job.json")
    points = json.loads((tmp_path / "curve.json").read_text())
    # Muon's recipe has two optimizers, which count as one update.
    assert [point["step"] for point in points] == [4, 6]
    assert not (tmp_path / "work").exists()
