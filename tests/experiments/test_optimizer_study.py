"""AdamW against Muon: the interpolation by hand, and the study end to end."""

import json

import pytest
from study_helpers import PNG, TINY_MODEL, run_main

from common.console import UserError
from experiments import optimizer_study
from experiments.optimizer_study import needed_fraction


def test_needed_fraction_by_hand():
    fractions = [0.25, 0.5, 1.0]
    # Halfway between 1/4 and 1/2 on a logarithmic scale: 0.25 * 2 ** 0.5
    assert needed_fraction(fractions, [3.0, 2.0, 1.0], 2.5) == "0.35"
    assert needed_fraction(fractions, [3.0, 2.0, 1.0], 2.0) == "0.50"
    assert needed_fraction(fractions, [3.0, 2.0, 1.0], 3.5) == "at most 0.25"
    assert needed_fraction(fractions, [3.0, 2.0, 1.0], 0.5) == "more than 1.00"


def test_fractions_above_1_are_refused():
    with pytest.raises(UserError, match="step_fractions is .* at most 1"):
        optimizer_study.Config(step_fractions=(0.5, 1.5))


@pytest.mark.slow
def test_optimizer_study(data_dir, tmp_path, capsys):
    flags = ["--data_dir", data_dir, "--out_dir", tmp_path, *TINY_MODEL]
    flags += "--learning_rates 1e-3 --seeds 1 --step_fractions 0.5 --B 4 --T 32".split()
    flags += "--total_batch_size 128 --max_steps 12 --warmup_steps 4 --val_every 6".split()
    flags += "--val_tokens 1000 --num_parallel 2".split()
    run_main(optimizer_study, *flags)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["adamw_lr_0.001_fraction_1_seed_1"]["steps"] == [0, 6, 12]
    name = "muon_lr_0.001_fraction_0.5_seed_1"
    assert results[name]["steps"] == [0, 6]
    assert results[name]["val"] == results[name]["vals"][-1]
    constants = json.loads((tmp_path / "runs" / name / "config.json").read_text())["constants"]
    assert constants["optimizer"] == "muon"
    assert constants["max_steps"] == 6
    assert constants["warmup_steps"] == 2
    report = (tmp_path / "report.md").read_text()
    assert report in capsys.readouterr().out
    assert "muon's best learning rate is at the end of the grid: widen it" in report
    assert (tmp_path / "optimizers.png").read_bytes()[:4] == PNG
    assert not list(tmp_path.rglob("*.pt"))
