"""bench in miniature: that it runs what it names, and nothing else; no times are tested."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from bench import __main__ as bench
from bench.peers import NANOGPT, definitions
from common.console import UserError
from model import GPTConfig

SCRIPT = """
import math
from no_such_module import something
from dataclasses import dataclass
import torch
import torch.nn as nn

raise SystemExit("a script that trains when it is read")

@dataclass
class GPTConfig:
    block_size: int; vocab_size: int; n_layer: int; n_head: int; n_embd: int; dropout: float; bias: bool

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)

    def forward(self, x, y):
        logits = self.wte(x) @ self.wte.weight.t()
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a script that looks like nanoGPT's, and shapes that take no time."""
    (tmp_path / "model.py").write_text(SCRIPT)
    monkeypatch.setitem(bench.SHAPES, "cpu", [((1, 2, 8), (2,), 8)])
    monkeypatch.setattr(torch, "compile", lambda model: model)
    monkeypatch.setattr(
        bench, "ProcessPoolExecutor", lambda workers, _: ThreadPoolExecutor(workers)
    )
    monkeypatch.setattr(bench, "shape_of", lambda sizes, T: GPTConfig(T, 50257, 0, *sizes))
    return tmp_path


def test_a_script_is_read_and_not_run(folder):
    names = definitions(folder / "model.py", extra=1)
    assert names["GPT"](names["GPTConfig"](8, 10, 1, 1, 4, 0.0, False)).wte.weight.shape == (10, 4)
    assert names["extra"] == 1


def test_training_is_measured_for_everyone_in_every_dtype(folder, capsys):
    pytest.importorskip("transformers")
    out = folder / "bench.json"
    bench.main(
        bench.Config(rows=("train",), nanogpt=str(folder), rounds=1, device="cpu", out=str(out))
    )
    result = json.loads(out.read_text())
    assert result["torch"] == torch.__version__
    figures = {figure["name"]: figure for figure in result["figures"]}
    for name in (bench.OURS, bench.TRANSFORMERS, NANOGPT):
        shipped = [
            figure for label, figure in figures.items() if label.startswith(f"{name}, as shipped")
        ]
        best = [figure for label, figure in figures.items() if label.startswith(f"{name}, best")]
        assert (len(shipped), len(best)) == (1, 2)
    ours = next(figure for figure in figures.values() if figure["name"].startswith(bench.OURS))
    assert ours["ratio"] == 1
    for figure in figures.values():  # ratios and limits are those of the rates
        assert figure["ratio"] == pytest.approx(ours["value"] / figure["value"])
    limit = max(
        figure["value"] for figure in figures.values() if figure["name"].startswith("limit")
    )
    assert ours["of_limit"] == pytest.approx(ours["value"] / limit)
    assert "1 x 8, B=2, T=8" in capsys.readouterr().out


def test_a_folder_that_does_not_hold_it_is_named(tmp_path):
    with pytest.raises(UserError, match="no file .*model.py: name the folder that holds it"):
        bench.main(bench.Config(nanogpt=str(tmp_path), device="cpu"))
