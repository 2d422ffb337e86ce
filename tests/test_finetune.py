"""Finetuning as a user runs it: batches, search, final run, resuming, and wrong input."""

import itertools
import json
import math
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, command, ok, one_line
from torch.nn import functional as F

import finetune
from common import checkpoint
from common.console import UserError, lock_folder
from common.finetune_data import read_texts
from common.optim import Diverged, make_adamw, train_step
from common.runtime import Runtime
from common.tokenizer import train_tokenizer
from dataloader import FinetuneLoader
from experiments.pruning import prune_heads
from model import GPT, IGNORE, GPTConfig

CPU = Runtime(torch.device("cpu"), torch.float32)
RNG = random.Random(0)
WORDS = [
    RNG.choices("tower harbor grove market bridge cavern garden mist salt ember".split(), k=20)
    for _ in range(60)
]
BLOCKS = [f"<LOC>\nThe {' '.join(words)}.\n</LOC>" for words in WORDS]
SETTINGS = dict(
    device="cpu", dtype="float32", T=32, B=4, total_batch_size=512, num_epochs=3, search_epochs=1,
    learning_rates=(1e-3, 1e-2), num_samples=3, general_data="none",
)  # fmt: skip

SHORT = dict(learning_rates=(1e-3,), num_epochs=1)  # no search


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a small model as a checkpoint, and descriptions."""
    folder = tmp_path_factory.mktemp("finetune")
    torch.manual_seed(0)
    save_model(folder / "model.pt", vocab_size=290)
    (folder / "data.txt").write_text("\n\n".join(BLOCKS) + "\n")
    return folder


def save_model(path: Path, vocab_size: int):
    enc, _ = train_tokenizer(BLOCKS, vocab_size)
    shape = dict(n_layer=2, n_head=2, n_embd=32, block_size=128)
    model = GPT(GPTConfig(vocab_size=vocab_size, **shape))
    checkpoint.save(path, checkpoint.build(model, enc, 0))


def settings(folder: Path, out: Path, **changes) -> dict:
    files = dict(init_from=folder / "model.pt", data=folder / "data.txt", out_dir=out)
    return {name: str(path) for name, path in files.items()} | SETTINGS | changes


def run(folder: Path, out: Path, **changes):
    """Run the stage in this process."""
    finetune.main(finetune.Config(**settings(folder, out, **changes)))


def train_with(outcome, folder: Path, out: Path, monkeypatch) -> list[dict]:
    """The records of a training in float16; outcome(step) is what train_step returns."""
    config = finetune.Config(**settings(folder, out, num_epochs=2, dropout=0.0))
    training, held_out = finetune.split(BLOCKS, 1)
    tuner = finetune.Finetuner(config, training, held_out, Runtime(CPU.device, torch.float16))
    steps = itertools.count()
    monkeypatch.setattr(finetune, "train_step", lambda *_: map(torch.tensor, outcome(next(steps))))
    return list(tuner.train(tuner.reset(), 1e-3, config.num_epochs))


def command_line(folder: Path, out: Path, **changes) -> list[str]:
    words = ["finetune.py"]
    for name, value in settings(folder, out, **changes).items():
        words.append(f"--{name}")
        if value is not True:
            words += map(str, value if isinstance(value, tuple) else [value])
    return words


def history(folder: Path) -> list[dict]:
    return checkpoint.load(checkpoint.candidates(folder)[0])["history"]


def logged_steps(folder: Path, stream: str) -> list[int]:
    lines = [line.split() for line in (folder / "log.txt").read_text().splitlines()]
    return [int(step) for step, name, _ in lines if name == stream]


# ---------------------------------------------------------------------------------------------
# Data and batches


def test_texts_are_split_at_random_before_they_are_joined(folder):
    blocks = read_texts(folder / "data.txt")
    assert blocks == BLOCKS
    training, held_out = finetune.split(blocks, seed=1)
    assert (len(training), len(held_out)) == (54, 6)
    assert sorted(training + held_out) == sorted(blocks)
    assert finetune.split(blocks, seed=1) == (training, held_out)
    assert finetune.split(blocks, seed=2)[1] != held_out


def test_of_a_few_long_texts_the_last_tenth_is_held_out():
    training, held_out = finetune.split(["one two three four five six seven 8", "x" * 20, "y"], 1)
    assert training == ["one two three four five six seven", "x" * 18, "y"]
    assert held_out == [" 8", "xx"]
    # Blocks are not cut, and of ten texts one is held out.
    assert finetune.split(BLOCKS[:5], 1)[1][0] in BLOCKS
    texts = [f"text number {n}" for n in range(10)]
    assert finetune.split(texts, 1)[1][0] in texts


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("B", [2, 5])
def test_every_token_is_trained_on_once_per_epoch(world_size, B):
    tokens = np.arange(1000, 1000 + 333)
    loaders = [FinetuneLoader(tokens, B, 16, 8, 0, rank, world_size) for rank in range(world_size)]
    assert loaders[0].steps_per_epoch == 3  # 21 sequences: 8, 8 and 5
    orders = []
    for epoch in range(2):
        seen = []
        for step in range(3 * epoch, 3 * epoch + 3):
            each = [loader.batch(step, CPU.device) for loader in loaders]
            assert len({len(batch) for batch, _, _ in each}) == 1, (
                "all ranks have the same number of micro-batches"
            )
            assert sum(sum(weights) for _, weights, _ in each) / world_size == pytest.approx(1)
            rows = [(x, y) for batch, _, _ in each for micro in batch for x, y in zip(*micro)]
            assert {len(x) for x, _ in rows} == {16}
            pairs = [
                pair for x, y in rows for pair in zip(x.tolist(), y.tolist()) if pair[1] != IGNORE
            ]
            assert {count for _, _, count in each} == {len(pairs)}
            assert all(y == x + 1 for x, y in pairs)
            seen += [y for _, y in pairs]
        orders.append(seen)
        assert sorted(seen) == list(range(1001, 1333))
    assert orders[0] != orders[1], "each epoch has a different order"


def test_a_short_step_is_averaged_over_its_tokens():
    """Loss and gradient of an epoch's last step equal those of one pass over all its tokens."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50, n_layer=1, n_head=2, n_embd=16, block_size=16))
    tokens = np.random.default_rng(0).integers(0, 50, 300)
    loader = FinetuneLoader(tokens, 3, 16, 8, 0)
    rows = np.random.default_rng((0, 0)).permutation(19)[16:]
    x, y = torch.from_numpy(loader.x[rows]), torch.from_numpy(loader.y[rows])
    expected = F.cross_entropy(model(x).flatten(0, 1).double(), y.flatten(), ignore_index=IGNORE)
    expected.backward()
    norm = math.sqrt(sum(p.grad.double().square().sum() for p in model.parameters()))
    model.zero_grad()
    batch, weights, count = loader.batch(2, CPU.device)
    assert count == (y != IGNORE).sum()
    optimizer = make_adamw(model, 0.0, 0.0, (0.9, 0.95), 1e-8)
    loss, grad_norm = train_step(model, optimizer, batch, 0.0, 0.0, CPU, weights)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert grad_norm.item() == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("loss", [5.0, math.nan])
def test_a_step_that_float16_skips_is_left_out_of_the_training_loss(
    folder, tmp_path, monkeypatch, loss
):
    def outcome(step: int) -> tuple[float, float]:
        return (loss, math.inf) if step == 2 else (2.0, 1.0)

    first, second = train_with(outcome, folder, tmp_path, monkeypatch)
    assert first["train_loss"] == second["train_loss"] == 2.0
    assert math.isfinite(second["val_loss"])


def test_a_loss_that_is_not_finite_ends_training_if_nothing_overflowed(
    folder, tmp_path, monkeypatch
):
    (record,) = train_with(lambda step: (math.nan, 1.0), folder, tmp_path, monkeypatch)
    assert record == dict(epoch=1, step=1, train_loss=math.inf, val_loss=math.inf)


# ---------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> Path:
    """A complete run that was never interrupted."""
    out = tmp_path_factory.mktemp("whole") / "runs"
    result = ok(command(*command_line(folder, out, tracker="tensorboard")))
    assert "best epoch: 3 of 3" in result.stdout
    return out


def test_a_run_writes_search_checkpoints_log_and_report(whole):
    table = (whole / "finetune_hyperparameter_search.txt").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["0.001", "0.01"]
    assert table.count("best") == 1
    assert "best" in table.splitlines()[3]

    final = whole / "final_lr_0.01"
    names = {path.name for path in final.iterdir()}
    models = {f"model_{name}.pt" for name in ("epoch_1", "epoch_2", "epoch_3", "best", "00021")}
    (events,) = [path.name for path in final.glob("events.out.tfevents.*")]
    assert names == models | {"log.txt", "metrics.jsonl", "finetune_losses.png", events}
    assert logged_steps(final, "train") == list(range(21))
    assert logged_steps(final, "val") == [7, 14, 21]
    losses = [record["val_loss"] for record in history(final)]
    assert losses == sorted(losses, reverse=True)

    report = json.loads((whole / "report.json").read_text())
    assert report["finetuned"]["held-out perplexity"] < 0.7 * report["base"]["held-out perplexity"]
    assert report["base"]["general perplexity"] is None
    assert (whole / "final_gens_after_finetune.txt").read_text().count("<LOC>") >= 3
    for picture in (whole / "finetune_hyperparameter_search.png", final / "finetune_losses.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_tracker_has_the_final_run_and_the_pictures(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    final = whole / "final_lr_0.01"
    events = EventAccumulator(str(final), size_guidance=dict(scalars=0, images=0))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(21))
    losses = [record["val_loss"] for record in history(final)]
    assert [event.value for event in events.Scalars("val")] == pytest.approx(losses)
    pictures = {"finetune_losses", "finetune_hyperparameter_search"}
    assert set(events.Tags()["images"]) == pictures


def test_the_best_model_is_an_ordinary_checkpoint_with_the_lowest_loss(whole):
    """Its loss on the held-out descriptions, from the file alone and in float64."""
    best = whole / "final_lr_0.01" / "model_best.pt"
    model, enc = checkpoint.load_model(best)
    held_out = finetune.split(BLOCKS, 1337)[1]
    tokens = []
    for text in held_out:
        tokens += [enc.eot_token, *enc.encode_ordinary(text)]
    tokens.append(enc.eot_token)
    total = 0.0
    for first in range(0, len(tokens) - 1, 32):
        window = torch.tensor(tokens[first : first + 33])
        with torch.no_grad():
            logits = model.double().eval()(window[None, :-1])[0]
        total += F.cross_entropy(logits, window[1:], reduction="sum").item()
    lowest = min(record["val_loss"] for record in history(best.parent))
    assert lowest == pytest.approx(total / (len(tokens) - 1), abs=1e-4)
    ok(command("sample.py", "--model", best, "--prompt", "<LOC>", "--num_samples", 1))


def test_an_existing_run_is_not_overwritten(folder, whole, tmp_path):
    with pytest.raises(UserError, match="already holds a run: --resume it"):
        run(folder, whole)
    with pytest.raises(UserError, match="dropout=0.1, not 0.2"):
        run(folder, whole, resume=True, dropout=0.2)
    save_model(tmp_path / "other.pt", vocab_size=280)
    with pytest.raises(UserError, match="the model of --init_from has changed"):
        run(folder, whole, resume=True, init_from=str(tmp_path / "other.pt"))


def test_resuming_a_finished_run_trains_nothing(folder, whole):
    final = whole / "final_lr_0.01"
    names = ("model_00021.pt", "log.txt", "metrics.jsonl")
    before = [(final / name).read_bytes() for name in names]
    run(folder, whole, resume=True)
    assert [(final / name).read_bytes() for name in names] == before


def test_damaged_settings_are_named(folder, tmp_path):
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(UserError, match="settings.json is not valid JSON"):
        run(folder, tmp_path, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_run_that_is_killed_repeatedly_ends_with_the_same_weights(
    folder, whole, tmp_path, lora_rank
):
    if lora_rank:
        whole = tmp_path / "whole"
        ok(command(*command_line(folder, whole, lora_rank=lora_rank)))
    out = tmp_path / "killed"
    words = command_line(folder, out, lora_rank=lora_rank, resume=True)
    search = "finetune_hyperparameter_search.json"
    final = out / "final_lr_0.01"
    for sign in (out / search, final / "model_epoch_1.pt", final / "model_epoch_2.pt"):
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not sign.exists() and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        process.wait()
    ok(command(*words))
    expected, resumed = [
        checkpoint.load(path / "final_lr_0.01" / "model_epoch_3.pt")["model"]
        for path in (whole, out)
    ]
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert json.loads((out / search).read_text()) == json.loads((whole / search).read_text())
    log = (whole / "final_lr_0.01" / "log.txt").read_text()
    assert (final / "log.txt").read_text() == log, "every step and epoch is logged once"


@pytest.mark.slow
def test_two_processes_train_like_one(folder, tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    two, one = tmp_path / "two", tmp_path / "one"
    ok(command(*launch, *command_line(folder, two, dropout=0)))
    run(folder, one, dropout=0)
    assert (two / "report.md").exists()
    for name in ("train_loss", "val_loss"):
        losses = [[record[name] for record in history(out / "final_lr_0.01")] for out in (two, one)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_the_search_records_divergence_and_patience_stops_early(folder, tmp_path, capsys):
    changes = dict(learning_rates=(1e-2, 1e6), num_epochs=30, patience=1, grad_clip=0)
    run(folder, tmp_path, **changes)
    table = (tmp_path / "finetune_hyperparameter_search.txt").read_text()
    assert "diverged" in table.splitlines()[3]
    done = history(tmp_path / "final_lr_0.01")
    losses = [record["val_loss"] for record in done]
    assert len(done) < 30
    assert losses[-1] >= min(losses[:-1])
    best = losses.index(min(losses)) + 1
    assert f"best epoch: {best} of {len(done)}" in capsys.readouterr().out


def test_divergence_ends_the_run(folder, tmp_path):
    with pytest.raises(UserError, match="diverged at every learning rate: --resume with lower"):
        run(folder, tmp_path / "search", learning_rates=(1e6, 1e7), grad_clip=0)
    # The advice works, and every file that programs read is valid JSON.
    run(folder, tmp_path / "search", learning_rates=(1e6, 1e-2), grad_clip=0, resume=True)
    results = strict_json(tmp_path / "search" / "finetune_hyperparameter_search.json")
    assert [result["status"] for result in results] == ["trained", "diverged", "diverged"]
    assert results[1]["val_loss"] is None
    with pytest.raises(Diverged, match="epoch 1, step .* lower learning rate"):
        run(folder, tmp_path / "final", learning_rates=(1e6,), grad_clip=0)


def test_data_that_teaches_nothing_is_a_warning(folder, tmp_path, capsys, monkeypatch):
    """A loss slightly above the start is no divergence: the best rate is taken."""
    losses = itertools.count(5.0, 0.001)  # before finetuning, and after each training
    monkeypatch.setattr(finetune.Finetuner, "validate", lambda self: next(losses))
    run(folder, tmp_path / "out", learning_rates=(1e-4, 1e-3), num_epochs=1)
    results = strict_json(tmp_path / "out" / "finetune_hyperparameter_search.json")
    assert {result["status"] for result in results} == {"trained"}
    out = capsys.readouterr().out
    assert out.count("the data taught the model nothing new") == 2, "of the search and the run"
    assert "final_lr_0.0001/model_best.pt" in out


def test_a_learning_rate_far_above_the_start_has_diverged(folder, tmp_path, monkeypatch):
    losses = iter([6.0, math.nan, 7.1, 6.9])
    tuner = SimpleNamespace(
        rt=CPU, reset=lambda: None, config=finetune.Config(**settings(folder, tmp_path))
    )
    tuner.train = lambda *_: [dict(epoch=1, step=9, train_loss=5.0, val_loss=next(losses))]
    tuner.config.learning_rates = (1e-4, 1e-3, 1e-2, 1e-1)
    assert finetune.search(tuner, 6.0) == 1e-4
    path = tmp_path / "finetune_hyperparameter_search.json"
    expected = ["trained", "diverged", "diverged", "trained"]
    assert [result["status"] for result in strict_json(path)] == expected
    # A resumed search reads the results, and judges them by the same rule.
    assert finetune.search(tuner, 5.95) == 1e-4
    assert [result["status"] for result in strict_json(path)] == expected


def strict_json(path: Path):
    """The content of a JSON file without Infinity and NaN, which are not part of JSON."""

    def reject(name: str):
        raise AssertionError(f"{path} contains {name}")

    return json.loads(path.read_text(), parse_constant=reject)


def test_prompts_and_completions_are_finetuned_on(folder, tmp_path):
    lines = [json.dumps(dict(prompt="The", completion=" ".join(words))) for words in WORDS]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    run(folder, tmp_path / "out", data=str(tmp_path / "data.jsonl"), **SHORT)
    report = strict_json(tmp_path / "out" / "report.json")
    assert "delimited, share of samples" not in report["base"]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "finetuned on 54 texts" in text
    assert "samples that start with the end-of-text token" in text
    assert "<LOC>" not in text


def test_a_single_long_text_is_finetuned_on(folder, tmp_path, capsys):
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "book.txt").write_text("\n".join(" ".join(words) for words in WORDS))
    run(folder, tmp_path / "out", data=str(tmp_path / "books"), **SHORT)
    assert re.search(r"1 texts \([\d,]+ tokens\) to train on, 1 \(", capsys.readouterr().out)
    with pytest.raises(UserError, match="holds a run with separator=, not "):
        changes = dict(data=str(tmp_path / "books"), separator="\\n", resume=True)
        run(folder, tmp_path / "out", **changes, **SHORT)


def test_a_separator_may_be_written_with_backslashes(folder, tmp_path, capsys):
    (tmp_path / "data.txt").write_text("\n".join(" ".join(words) for words in WORDS))
    run(folder, tmp_path / "out", data=str(tmp_path / "data.txt"), separator="\\n", **SHORT)
    assert "54 texts (" in capsys.readouterr().out


def test_a_model_that_is_not_finite_is_rejected(folder, tmp_path):
    broken = checkpoint.load(folder / "model.pt")
    broken["model"]["h.1.mlp.c_fc.bias"][3] = math.nan
    path = tmp_path / "broken.pt"
    checkpoint.save(path, broken)
    for changes in ({}, dict(lora_rank=2)):
        with pytest.raises(
            UserError, match=r"broken.pt is broken: its tensor h.1.mlp.c_fc.\S*bias"
        ):
            run(folder, tmp_path / "out", init_from=str(path), **changes)
    # Nothing was written that stands in the way of a run with another model.
    run(folder, tmp_path / "out", **SHORT)


def test_a_second_run_in_the_same_folder_is_rejected(folder, tmp_path):
    with lock_folder(tmp_path), pytest.raises(UserError, match="in use by process .* on "):
        run(folder, tmp_path)
    run(folder, tmp_path, **SHORT)


def test_a_pruned_model_keeps_its_shape(folder, tmp_path):
    whole = checkpoint.load(folder / "model.pt")
    pruned = prune_heads(checkpoint.build_model(whole, "model.pt"), [[0], [1]])
    _, enc = checkpoint.load_model(folder / "model.pt")
    path, out = tmp_path / "pruned.pt", tmp_path / "out"
    checkpoint.save(path, checkpoint.build(pruned, enc, 0))
    run(folder, out, init_from=str(path), learning_rates=(1e-3,), num_epochs=1)
    assert not list(out.glob("finetune_hyperparameter_search*")), "one rate needs no search"
    best = checkpoint.load(out / "final_lr_0.001" / "model_best.pt")
    assert best["config"]["heads_kept"] == (1, 1)
    assert not torch.equal(best["model"]["h.0.attn.c_proj.weight"], pruned.h[0].attn.c_proj.weight)


# ---------------------------------------------------------------------------------------------
# Wrong input

ALL = "\n".join(BLOCKS)
# name: text of the data file (None = no file), changed settings, part of the message
WRONG = {
    "no file": (None, {}, "generate_finetune_data.py"),
    "too short": ("only text", {}, "fewer than one batch of 16 sequences"),
    "one block": (BLOCKS[0], {}, "holds 1 texts"),
    "outside the blocks": (BLOCKS[0] + "\nafter", {}, "data.txt, line 4: text outside"),
    "lower case": (ALL.lower(), {}, "data.txt, line 1: <loc> where <LOC> was expected"),
    "not closed": ("\n".join(BLOCKS[:3]) + "\n<LOC> more", {}, "the last <LOC> is not closed"),
    "opened twice": (BLOCKS[0] + "\n<LOC> a <LOC> b </LOC>", {}, "line 4: <LOC> "),
    "not opened": (BLOCKS[0] + "\n</LOC>", {}, "line 4: </LOC> "),
    "too few": ("\n".join(BLOCKS[:6]), {}, "fewer than one batch of 16 sequences"),
    "too long": (ALL, dict(T=256), "above the model's block_size 128"),
    "does not divide": (ALL, dict(T=33), "not divisible by T 33"),
    "no checkpoint": (ALL, dict(init_from="none.pt"), "none.pt"),
    "out_dir is a file": (ALL, dict(out_dir=str(ROOT / "README.md")), "README.md"),
    "no samples": (ALL, dict(num_samples=0), "num_samples is 0, must be at least 1"),
    "no learning rate": (ALL, dict(learning_rates=()), "learning_rates needs at least one"),
    "learning rate of zero": (ALL, dict(learning_rates=(0.0,)), "must be above 0"),
    "learning rate of nan": (ALL, dict(learning_rates=(math.nan,)), "learning_rates contains nan"),
    "warmup too long": (ALL, dict(warmup_fraction=2.0), "warmup_fraction is 2.0"),
    "negative seed": (ALL, dict(seed=-1), "seed is -1, must be at least 0"),
    "huge seed": (ALL, dict(seed=2**64), "must be below 2**64"),
    "decay of nan": (ALL, dict(weight_decay=math.nan), "weight_decay is nan, must be at least 0"),
    "infinite clip": (ALL, dict(grad_clip=math.inf), "grad_clip is inf, must be at least 0"),
    "negative decay": (ALL, dict(weight_decay=-0.1), "weight_decay is -0.1"),
    "all dropped": (ALL, dict(dropout=1.0), "dropout is 1.0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_named(folder, tmp_path, name):
    text, changes, expected = WRONG[name]
    if text is not None:
        (tmp_path / "data.txt").write_text(text)
    changes = dict(data=str(tmp_path / "data.txt")) | changes
    with pytest.raises((UserError, OSError), match=re.escape(expected)):
        run(folder, tmp_path / "out", **changes)
    # Corrected, the command can be run again: nothing was written that stands in its way.
    assert not (tmp_path / "out" / "settings.json").exists()


def test_an_error_is_one_line(folder, tmp_path):
    (tmp_path / "data.txt").write_text("<LOC>\nonly text")
    words = command_line(folder, tmp_path / "out", data=tmp_path / "data.txt")
    assert "line 1: the last <LOC> is not closed" in one_line(command(*words))
