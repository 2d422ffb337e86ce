"""The study of training recipes: its batches, schedules and verdicts, and rows on a tiny model."""

import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from queue import SimpleQueue

import numpy as np
import pytest
import torch
from conftest import ROOT

import train_gpt2
from common.console import UserError, parse_flags
from common.shards import open_shards
from experiments import recipe_study
from experiments.recipe_study import (
    BASE,
    MUONS,
    Config,
    DocumentWindows,
    batch_sizes,
    learning_rate_factor,
    verdict,
)

TINY = dict(n_layer=1, n_head=2, n_embd=16, T=16, total_batch_size=128, max_steps=4, B=4)


def test_the_flags_of_the_fast_recipe_are_those_of_the_study(monkeypatch):
    """runs/fast.flags is what the study's BASE means for train_gpt2.py."""
    words = (ROOT / "runs" / "fast.flags").read_text().split()
    monkeypatch.setattr(sys, "argv", ["train_gpt2.py", *words])
    flags = parse_flags(train_gpt2.Config, train_gpt2.__doc__)
    assert flags.optimizer == "muon"
    assert flags.muon_momentum == BASE.momentum
    assert flags.embedding_lr_scale == BASE.embedding_lr
    assert flags.position_lr_scale == BASE.position_lr
    assert (flags.beta1, flags.beta2) == (BASE.beta1, BASE.beta2)
    assert flags.weight_decay == BASE.weight_decay
    assert flags.grad_clip == BASE.grad_clip
    assert flags.unigram_init == BASE.unigram
    assert flags.min_lr == pytest.approx(flags.max_lr * BASE.final_lr)


def test_all_recipes_see_the_same_number_of_windows():
    config = Config(**TINY)
    assert list(batch_sizes(config, BASE, 32)) == [8] * 4
    assert list(batch_sizes(config, replace(BASE, batch=0.5), 32)) == [4] * 8
    growing = list(batch_sizes(config, replace(BASE, first_batch=0.25), 32))
    assert growing == sorted(growing)
    assert (growing[0], growing[-2], sum(growing)) == (2, 8, 32)


def test_schedules():
    assert learning_rate_factor(BASE, 0.01) == 0.5
    assert learning_rate_factor(replace(BASE, warmup=0.1), 0.55) == pytest.approx(
        0.55
    )  # halfway from 1 to 0.1
    assert (
        learning_rate_factor(replace(BASE, decay="linear", final_lr=0.0, warmup=0.1), 0.775) == 0.25
    )
    late = replace(BASE, decay="late", final_lr=0.0, warmup=0.0)
    assert learning_rate_factor(late, 0.6) == 1
    assert learning_rate_factor(late, 0.7) == 0.5  # 1 - sqrt(1/4)
    assert learning_rate_factor(late, 1.0) == 0


def test_document_windows_begin_at_documents(tmp_path):
    """Two documents of 10 and 7 tokens; each begins with the end-of-text token 0."""
    tokens = np.array([0, *range(1, 10), 0, *range(21, 27)], dtype=np.uint16)
    np.save(tmp_path / "x_train_000000.npy", tokens)
    windows = DocumentWindows(open_shards(tmp_path, "train"), T=4, end_of_text=0)
    # The window at 14 would need a token after the last one.
    assert [windows.first_token(0, n) for n in range(windows.counts[0])] == [0, 4, 8, 10]


def test_cautious_weight_decay_acts_only_where_the_update_shrinks_the_weight():
    weight = torch.nn.Parameter(torch.tensor([[2.0, -2.0], [2.0, 2.0]]))
    plain = weight.detach().clone()
    optimizer = make_muon("cautious", weight)
    weight.grad = torch.tensor([[1.0, 0.5], [-0.5, 1.0]])
    optimizer.step()
    # The gradient's columns are orthogonal, so the update has its signs. It shrinks the weights at
    # (0, 0) and (1, 1): only these are decayed, by lr * weight_decay of their size.
    reference = torch.nn.Parameter(plain.clone())
    undecayed = make_muon("plain", reference, weight_decay=0.0)
    reference.grad = weight.grad
    undecayed.step()
    decay = torch.tensor([[0.1 * 0.5 * 2, 0.0], [0.0, 0.1 * 0.5 * 2]])
    torch.testing.assert_close(weight.detach(), reference.detach() - decay)


def make_muon(kind, *parameters, weight_decay=0.5):
    groups = [dict(params=parameters or [torch.nn.Parameter(torch.zeros(2, 2))])]
    return MUONS[kind](groups, 0.1, weight_decay, torch.float32)


def test_verdicts():
    # mean -0.2, standard deviation 0.1, so two standard errors are 2 * 0.1 / sqrt(3)
    assert verdict([-0.1, -0.2, -0.3]) == ("-0.2000 ± 0.1155", "wins")
    assert verdict([0.1, 0.2, 0.3])[1] == "loses"
    assert verdict([-0.1, 0.1])[1] == "no difference"
    assert verdict([-0.1]) == ("-0.1000", "one seed")


def test_rows_are_trained_and_compared(data_dir, tmp_path, monkeypatch, capsys):
    # Threads instead of processes, which take seconds to start.
    monkeypatch.setattr(
        recipe_study, "ProcessPoolExecutor", lambda workers, *_: ThreadPoolExecutor(1)
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = dict(**TINY, data_dir=str(data_dir), out_dir=str(tmp_path), device="cpu")
    settings |= dict(seeds=(1, 2), val_tokens=500)
    rows = ("none of these", "normalized", "average 0.95", "short windows first")
    rows += ("growing momentum", "positions x1")
    rows += ("AdamW, 4x tokens, linear to 0, lr x0.5",)
    recipe_study.main(Config(rows=rows, **settings))
    report = (tmp_path / "report.md").read_text()
    assert "| base" in report
    assert all(f"| {row}" in report for row in rows)

    # Another row adds runs; the others are not repeated.
    monkeypatch.setattr(recipe_study, "final_loss", lambda config, recipe, seed: None)
    recipe_study.main(Config(rows=("lr x2", *rows), **settings))
    report = (tmp_path / "report.md").read_text()
    assert "lr x2" in report
    assert report.count("diverged") == 1

    # Without the base there is nothing to compare with.
    settings |= dict(out_dir=str(tmp_path / "diverged"))
    with pytest.raises(UserError, match="the base diverged"):
        recipe_study.main(Config(rows=rows[:1], **settings))


def test_each_worker_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    envs = SimpleQueue()
    for gpu in ("0", "1"):
        envs.put(dict(CUDA_VISIBLE_DEVICES=gpu))
    seen = []
    for _ in range(2):
        recipe_study.start_worker(envs)
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert seen == ["0", "1"]


def test_a_run_that_diverges_in_its_last_update_is_no_error(data_dir):
    config = Config(**TINY | dict(max_steps=1, max_lr=1e30), data_dir=str(data_dir), device="cpu")
    assert recipe_study.final_loss(config, BASE, 1) is None


def test_wrong_settings_are_refused():
    with pytest.raises(UserError, match="no row 'magic': choose from embeddings x1, "):
        Config(rows=("magic",))
    with pytest.raises(UserError, match="multiple of 4, and"):
        Config(T=128, total_batch_size=1280)
