"""The benchmark on tiny models: that every row runs what it names. No times are tested."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from bench import __main__ as bench
from bench import commands, measure, train
from bench.measure import Figure
from bench.peers import (
    NanoGPT,
    ThisProject,
    ThisProjectCheckpointed,
    Transformers,
    load_definitions,
)
from common.console import UserError
from model import GPTConfig

# A script like nanoGPT's model.py, with a line that must not run and an import that must not fail.
SCRIPT = """
import math
from no_such_module import something
from dataclasses import dataclass
import torch
import torch.nn as nn

raise SystemExit("a script that starts to train")

@dataclass
class GPTConfig:
    block_size: int; vocab_size: int; n_layer: int; n_head: int; n_embd: int
    dropout: float; bias: bool

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)

    def forward(self, x, y):
        logits = self.wte(x) @ self.wte.weight.t()
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a script like nanoGPT's; the workloads are tiny, and nothing is compiled."""
    (tmp_path / "model.py").write_text(SCRIPT)
    tiny = train.Workload(GPTConfig(block_size=8, n_layer=1, n_head=2, n_embd=8), B=2)
    monkeypatch.setitem(train.STEP_WORKLOADS, "cpu", [tiny])
    monkeypatch.setitem(train.MEMORY_WORKLOAD, "cpu", tiny)
    # Processes that are spawned read the variable, this one has read it already.
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    monkeypatch.setattr(torch, "compile", lambda model: model)
    return tmp_path


def measure_rows(folder, *rows, **flags) -> dict[str, dict]:
    """Run the benchmark, and return the figures that it wrote by the names of the candidates."""
    out = folder / "new" / "bench.json"
    config = bench.Config(
        rows=rows, nanogpt=str(folder), rounds=1, device="cpu", out=str(out), **flags
    )
    bench.main(config)
    result = json.loads(out.read_text())
    assert result["torch"] == torch.__version__
    return {figure["name"]: figure for figure in result["figures"]}


def check_training_figures(figures: dict[str, dict]):
    """Every implementation as shipped and in every dtype, with the right ratios."""
    dtypes = len(measure.dtypes_of(torch.device("cpu")))
    for name in (ThisProject.name, Transformers.name, NanoGPT.name):
        shipped = [label for label in figures if label.startswith(f"{name}, as shipped")]
        best = [label for label in figures if label.startswith(f"{name}, best settings")]
        assert (len(shipped), len(best)) == (1, dtypes)
    ours = next(iter(figures.values()))
    assert ours["name"].startswith(f"{ThisProject.name}, as shipped")
    assert ours["ratio"] == 1
    rooflines = [label for label in figures if label.startswith(measure.ROOFLINE)]
    assert len(rooflines) == dtypes
    highest = max(figures[label]["value"] for label in rooflines)
    for figure in figures.values():
        assert figure["ratio"] == pytest.approx(ours["value"] / figure["value"])
        assert figure["roofline_share"] == pytest.approx(figure["value"] / highest)


def test_training_measures_every_implementation_in_every_dtype(folder, monkeypatch, capsys):
    pytest.importorskip("transformers")
    # Threads instead of processes, which take seconds to start.
    monkeypatch.setattr(
        measure, "ProcessPoolExecutor", lambda workers, _: ThreadPoolExecutor(workers)
    )
    check_training_figures(measure_rows(folder, "train"))
    output = capsys.readouterr().out
    assert "1 x 8, B=2, T=8" in output
    assert "share of the roofline" in output

    fewer = measure_rows(folder, "train", skip=("as shipped", "bf16"))
    assert fewer
    assert not any("as shipped" in name or "bf16" in name for name in fewer)
    with pytest.raises(UserError, match="skip leaves out every step"):
        measure_rows(folder, "train", skip=("",))


@pytest.mark.slow
def test_training_and_memory_in_processes_of_their_own(folder):
    pytest.importorskip("transformers")
    figures = measure_rows(folder, "train", "memory")
    memory = {name: figures.pop(name) for name in list(figures) if figures[name]["unit"] == "MB"}
    check_training_figures(figures)
    assert list(memory) == [
        ThisProject.name,
        Transformers.name,
        NanoGPT.name,
        ThisProjectCheckpointed.name,
    ]
    # Bytes, not kilobytes: importing torch alone takes more than 100 MB.
    assert all(100 < figure["value"] < 10_000 for figure in memory.values())
    assert memory[ThisProject.name]["ratio"] == 1


def spin_count() -> dict:
    """A candidate with the number of rounds that its process waits as its name."""
    return {os.environ["GOMP_SPINCOUNT"]: float}


@pytest.mark.slow
def test_the_process_of_another_project_has_libgomps_default():
    with measure.CandidateProcess(spin_count, env=measure.LIBGOMP_DEFAULT) as process:
        assert list(process.candidates) == ["300000"]
    with measure.CandidateProcess(spin_count) as process:
        assert list(process.candidates) != ["300000"]


def test_a_script_is_loaded_without_running_it(folder):
    defined = load_definitions(folder / "model.py", extra=1)
    model = defined["GPT"](defined["GPTConfig"](8, 10, 1, 1, 4, 0.0, False))
    assert model.wte.weight.shape == (10, 4)
    assert defined["extra"] == 1


def test_a_folder_without_the_script_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no file .*model.py: give the folder that contains it"):
        bench.main(bench.Config(nanogpt=str(tmp_path), device="cpu"))


def test_every_row_has_a_name():
    assert tuple(bench.ROWS) == bench.ROW_NAMES


def test_an_unknown_row_is_an_error():
    with pytest.raises(UserError, match="no row 'speed': choose from train, memory"):
        bench.Config(rows=("speed",))


def test_medians_leave_out_warmup_and_candidates_without_memory(capsys):
    taken = iter([100.0, 1.0, 2.0, 9.0])  # seconds of the warmup and of three rounds

    def too_large():
        raise torch.OutOfMemoryError

    candidates = {"too large": too_large, "good": lambda: next(taken)}
    assert measure.medians(candidates, rounds=3, title="row") == {"good": 2.0}
    assert "row: too large: out of memory" in capsys.readouterr().out


def test_a_roofline_is_the_fastest_round():
    seconds = {name: iter([9.0, 1.0, 2.0, 6.0]) for name in ("step", "roofline: products")}
    candidates = {name: values.__next__ for name, values in seconds.items()}
    assert measure.medians(candidates, 3, "title") == {"step": 2.0, "roofline: products": 1.0}


def test_rates_without_a_baseline_have_no_ratio():
    figures = measure.rates("row", {"other": 2.0}, 10, "tokens/s", baseline="ours")
    assert figures == [Figure("row", "other", 5.0, "tokens/s")]


def test_a_run_has_trained_when_its_log_has_a_training_loss(tmp_path):
    assert not commands.has_trained(tmp_path)
    log = tmp_path / "log.txt"
    log.write_text("0 val 10.9\n")
    assert not commands.has_trained(tmp_path)
    log.write_text("0 val 10.9\n0 train 10.9\n")
    assert commands.has_trained(tmp_path)


def test_nothing_may_be_faster_than_the_roofline():
    def figure(share):
        return measure.Figure("generate", "ours", 9.0, "tokens/s", roofline_share=share)

    bench.check_rooflines([figure(0.9), figure(1.0), figure(None)])
    with pytest.raises(AssertionError, match="generate: ours has 147%"):
        bench.check_rooflines([figure(0.9), figure(1.47)])
