"""Finetuning as a person runs it, its batches and adapters against arithmetic by hand, and what can go wrong."""

import json
import math
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, command, ok, one_line
from torch.nn import functional as F

import finetune
from common import checkpoint, lora
from common.optim import make_optimizer, train_step
from common.runtime import Runtime
from common.tokenizer import tokenizer_to_text, train_tokenizer
from dataloader import FinetuneLoader
from experiments.pruning import prune_heads
from fantasy import report
from fantasy.descriptions import read_descriptions
from model import GPT, IGNORE, GPTConfig

CPU = Runtime(torch.device("cpu"), torch.float32)
RNG = random.Random(0)
WORDS = [
    RNG.choices("tower harbor grove market bridge cavern garden mist salt ember".split(), k=20)
    for _ in range(60)
]
BLOCKS = [f"<LOC>\nThe {' '.join(words)}.\n</LOC>" for words in WORDS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small model as a checkpoint, and descriptions."""
    folder = tmp_path_factory.mktemp("finetune")
    enc, _ = train_tokenizer(BLOCKS, 290)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=290, n_layer=2, n_head=2, n_embd=32, block_size=128))
    state = dict(
        model=model.state_dict(),
        config=model.config_dict(),
        tokenizer=tokenizer_to_text(enc),
        step=0,
    )
    checkpoint.save(folder / "model.pt", state)
    (folder / "data.txt").write_text("\n\n".join(BLOCKS) + "\n")
    return folder


def run(folder: Path, out: Path, *words, start=("finetune.py",), **kwargs):
    return command(*start, *flags(folder, out), *words, **kwargs)


def flags(folder: Path, out: Path) -> list:
    flags = [
        "--init_from",
        folder / "model.pt",
        "--data",
        folder / "data.txt",
        "--out_dir",
        out,
        "--device",
        "cpu",
    ]
    flags += "--dtype float32 --T 32 --B 4 --total_batch_size 512 --num_epochs 3 --search_epochs 1".split()
    return [*flags, *"--num_samples 3 --general_data none --learning_rates 1e-3 1e-2".split()]


# data and batches


def test_descriptions_are_split_before_they_are_packed(folder):
    blocks = read_descriptions(folder / "data.txt")
    assert blocks == BLOCKS
    training, held_out = finetune.split(blocks, seed=1)
    assert (len(training), len(held_out)) == (54, 6)
    assert sorted(training + held_out) == sorted(blocks)
    assert finetune.split(blocks, seed=1) == (training, held_out)
    assert finetune.split(blocks, seed=2)[1] != held_out


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("B", [2, 5])
def test_every_token_is_trained_on_once_an_epoch(world_size, B):
    tokens = np.arange(1000, 1000 + 333)
    loaders = [FinetuneLoader(tokens, B, 16, 8, 0, rank, world_size) for rank in range(world_size)]
    assert loaders[0].steps_per_epoch == 3  # 21 sequences: 8, 8 and 5
    orders = []
    for epoch in range(2):
        seen = []
        for step in range(3 * epoch, 3 * epoch + 3):
            each = [loader.batch(step, CPU.device) for loader in loaders]
            assert len({len(batch) for batch, _, _ in each}) == 1, (
                "every rank takes as many micro-steps"
            )
            assert sum(sum(shares) for _, shares, _ in each) / world_size == pytest.approx(1)
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
    assert orders[0] != orders[1], "each epoch has an order of its own"


def test_a_short_step_is_averaged_over_its_tokens():
    """The loss and the gradient of the last step equal those of one pass over all its tokens, micro-batches or not."""
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
    batch, shares, count = loader.batch(2, CPU.device)
    assert count == (y != IGNORE).sum()
    optimizer = make_optimizer(model, 0.0, 0.0, (0.9, 0.95), 1e-8)
    loss, grad_norm = train_step(model, optimizer, batch, 0.0, 0.0, CPU, shares)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert grad_norm.item() == pytest.approx(norm, rel=1e-4)


# adapters


def test_merged_adapters_compute_the_same_after_training():
    torch.manual_seed(0)
    shape = dict(vocab_size=50, n_layer=2, n_head=2, n_embd=32, block_size=16)
    model = GPT(GPTConfig(**shape))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lora.add_adapters(model, rank=4)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 2 * 4 * (32 + 96 + 32 + 32 + 32 + 128 + 128 + 32)
    x = torch.randint(50, (4, 16))
    plain = GPT(GPTConfig(**shape))
    plain.load_state_dict(before)
    assert torch.equal(model(x), plain(x)), "adapters begin as nothing"
    optimizer = make_optimizer(model, 1e-2, 0.0, (0.9, 0.95), 1e-8)
    for _ in range(25):
        train_step(model, optimizer, [(x, x.roll(-1, 1))], 1e-2, 1.0, CPU)
    plain.load_state_dict(lora.merged_state(model))
    assert (model(x) - plain(x)).abs().max() < 1e-4
    assert (plain(x) - GPT(GPTConfig(**shape))(x)).abs().max() > 0.1
    frozen = {
        name.replace(".base.", "."): t
        for name, t in model.state_dict().items()
        if not name.endswith((".A", ".B"))
    }
    assert all(torch.equal(frozen[name], before[name]) for name in before)


# runs


def history(folder: Path) -> list[dict]:
    return checkpoint.load(checkpoint.candidates(folder)[0])["history"]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> Path:
    """A whole run, undisturbed."""
    out = tmp_path_factory.mktemp("whole") / "runs"
    result = ok(run(folder, out))
    assert "best epoch: 3 of 3" in result.stdout
    return out


def test_search_final_run_and_report(folder, whole):
    table = (whole / "finetune_hyperparameter_search.txt").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["0.001", "0.01"]
    assert table.count("best") == 1
    final = whole / "final_lr_0.01"
    assert "best" in table.splitlines()[3]
    names = {path.name for path in final.iterdir()}
    epochs = {f"model_epoch_{n}.pt" for n in (1, 2, 3)}
    assert names == epochs | {
        "model_best.pt",
        "model_00021.pt",
        "log.txt",
        "metrics.jsonl",
        "finetune_losses.png",
    }
    lines = [line.split() for line in (final / "log.txt").read_text().splitlines()]
    assert [int(step) for step, name, _ in lines if name == "train"] == list(range(21))
    assert [int(step) for step, name, _ in lines if name == "val"] == [7, 14, 21]
    losses = [epoch["val_loss"] for epoch in history(final)]
    assert losses == sorted(losses, reverse=True)
    report = json.loads((whole / "report.json").read_text())
    assert report["finetuned"]["held-out perplexity"] < 0.7 * report["base"]["held-out perplexity"]
    assert report["base"]["general perplexity"] is None
    assert (whole / "final_gens_after_finetune.txt").read_text().count("<LOC>") >= 3
    for picture in (whole / "finetune_hyperparameter_search.png", final / "finetune_losses.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    ok(
        command(
            "sample.py", "--model", final / "model_best.pt", "--prompt", "<LOC>", "--num_samples", 1
        )
    )


def test_validation_loss_is_that_of_the_held_out_descriptions(folder, whole):
    """From the checkpoint and the file alone, in float64."""
    model, enc = checkpoint.load_model(whole / "final_lr_0.01" / "model_best.pt")
    held_out = finetune.split(BLOCKS, 1337)[1]
    tokens = [t for text in held_out for t in (enc.eot_token, *enc.encode_ordinary(text))] + [
        enc.eot_token
    ]
    total = 0.0
    for first in range(0, len(tokens) - 1, 32):
        window = torch.tensor(tokens[first : first + 33])
        with torch.no_grad():
            logits = model.double().eval()(window[None, :-1])[0]
        total += F.cross_entropy(logits, window[1:], reduction="sum").item()
    assert history(whole / "final_lr_0.01")[-1]["val_loss"] == pytest.approx(
        total / (len(tokens) - 1), abs=1e-4
    )


def test_an_existing_run_is_refused_and_resuming_a_finished_one_repeats_nothing(folder, whole):
    assert "--resume" in one_line(run(folder, whole))
    before = (whole / "final_lr_0.01" / "model_00021.pt").stat().st_mtime_ns
    ok(run(folder, whole, "--resume"))
    assert (whole / "final_lr_0.01" / "model_00021.pt").stat().st_mtime_ns == before
    assert "dropout=0.1" in one_line(run(folder, whole, "--resume", "--dropout", 0.2))


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--lora_rank", 4)], ids=["all", "lora"])
def test_killed_again_and_again_it_ends_with_the_same_weights(folder, whole, tmp_path, more):
    if more:
        whole = tmp_path / "whole"
        ok(run(folder, whole, *more))
    out = tmp_path / "killed"
    words = [
        sys.executable,
        "finetune.py",
        *map(str, flags(folder, out)),
        "--resume",
        *map(str, more),
    ]
    search, final = out / "finetune_hyperparameter_search.json", out / "final_lr_0.01"
    for sign in (search, final / "model_epoch_1.pt", final / "model_epoch_2.pt"):
        process = subprocess.Popen(
            words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while not sign.exists() and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        process.wait()
    ok(command(*words[1:]))
    weights = [
        checkpoint.load(path / "final_lr_0.01" / "model_epoch_3.pt")["model"]
        for path in (whole, out)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    searches = [
        json.loads((path / "finetune_hyperparameter_search.json").read_text())
        for path in (whole, out)
    ]
    assert searches[0] == searches[1]
    steps = [
        line.split()[0] for line in (final / "log.txt").read_text().splitlines() if "train" in line
    ]
    assert steps == [str(step) for step in range(21)], "the log holds every step once"


@pytest.mark.slow
def test_two_processes_train_as_one(folder, whole, tmp_path):
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "finetune.py"]
    ok(run(folder, tmp_path, "--dropout", 0, start=two))
    ok(run(folder, tmp_path / "one", "--dropout", 0))
    for name in ("train_loss", "val_loss"):
        losses = [
            [epoch[name] for epoch in history(path / "final_lr_0.01")]
            for path in (tmp_path, tmp_path / "one")
        ]
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_a_rate_that_diverges_is_recorded_and_patience_stops_early(folder, tmp_path):
    words = [
        "--learning_rates",
        "1e-2",
        "1e6",
        "--num_epochs",
        30,
        "--patience",
        1,
        "--grad_clip",
        0,
    ]
    out = ok(run(folder, tmp_path, *words)).stdout
    table = (tmp_path / "finetune_hyperparameter_search.txt").read_text()
    assert "diverged" in table.splitlines()[3]
    done = history(tmp_path / "final_lr_0.01")
    losses = [epoch["val_loss"] for epoch in done]
    assert len(done) < 30
    assert losses[-1] >= min(losses[:-1])
    assert f"best epoch: {losses.index(min(losses)) + 1} of {len(done)}" in out


# the report's figures, by hand


def test_a_pruned_model_is_finetuned_as_it_is(folder, tmp_path):
    whole = checkpoint.load(folder / "model.pt")
    pruned = prune_heads(checkpoint.build_model(whole, "model.pt"), [[0], [1]])
    path = tmp_path / "pruned.pt"
    checkpoint.save(path, whole | dict(model=pruned.state_dict(), config=pruned.config_dict()))
    ok(
        run(
            folder,
            tmp_path / "out",
            "--init_from",
            path,
            "--learning_rates",
            "1e-3",
            "--num_epochs",
            1,
        )
    )
    best = checkpoint.load(tmp_path / "out" / "final_lr_0.001" / "model_best.pt")
    assert best["config"]["heads_kept"] == (1, 1)
    assert not torch.equal(best["model"]["h.0.attn.c_proj.weight"], pruned.h[0].attn.c_proj.weight)


def test_figures_of_samples_by_hand():
    training = ["<LOC>\nThe old tower stands in the salt mist of the harbor.\n</LOC>"]
    samples = [
        "<LOC>\nThe old tower stands in the rain. The old tower stands.\n</LOC>",
        "<LOC>\nOne two three four one two three four one two three four",
    ]
    figures = report.measure(samples, training)
    assert figures["delimited, share of samples"] == 0.5
    assert figures["distinct-1"] == pytest.approx((6 + 4) / (11 + 12))
    assert figures["distinct-2"] == pytest.approx((7 + 4) / (10 + 11))
    assert figures["repeated 4-grams, share"] == pytest.approx((1 / 8 + 5 / 9) / 2)
    assert (figures["copied run, most words"], figures["copied run, mean words"]) == (6, 3.0)
    assert figures["copied run > 12 words, share of samples"] == 0.0


# what can go wrong

WRONG = {
    "no file": (None, {}, "generate_finetune_data.py"),
    "no delimiters": ("only text", {}, "holds 0 descriptions"),
    "one description": (BLOCKS[0], {}, "holds 1 descriptions"),
    "not closed": ("\n".join(BLOCKS[:3]) + "\n<LOC> more", {}, "the last <LOC> is not closed"),
    "opened twice": (
        BLOCKS[0] + "\n<LOC> a <LOC> b </LOC>",
        {},
        "line 4: <LOC> where </LOC> was expected",
    ),
    "not opened": (BLOCKS[0] + "\n</LOC>", {}, "line 4: </LOC> where <LOC> was expected"),
    "too few": ("\n".join(BLOCKS[:6]), {}, "fewer than one batch of 16 sequences"),
    "too long": ("\n".join(BLOCKS), dict(T=256), "above the model's block_size 128"),
    "does not divide": ("\n".join(BLOCKS), dict(T=33), "not divisible by T 33"),
    "no checkpoint": ("\n".join(BLOCKS), dict(init_from="none.pt"), "none.pt"),
    "out_dir is a file": ("\n".join(BLOCKS), dict(out_dir=str(ROOT / "README.md")), "README.md"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs_are_said(folder, tmp_path, name):
    text, more, expected = WRONG[name]
    if text is not None:
        (tmp_path / "data.txt").write_text(text)
    files = dict(
        init_from=str(folder / "model.pt"),
        data=str(tmp_path / "data.txt"),
        out_dir=str(tmp_path / "out"),
    )
    options = files | dict(T=32, B=4, total_batch_size=512, device="cpu") | more
    with pytest.raises((ValueError, OSError), match=re.escape(expected)):
        finetune.main(finetune.Config(**options))


def test_an_error_is_one_line(folder, tmp_path):
    (tmp_path / "data.txt").write_text("only text")
    assert "holds 0 descriptions" in one_line(
        run(folder, tmp_path / "out", "--data", tmp_path / "data.txt")
    )


def test_a_checkpoint_of_another_vocabulary_is_refused_on_resuming(folder, whole, tmp_path):
    enc, _ = train_tokenizer(BLOCKS, 280)
    model = GPT(GPTConfig(vocab_size=280, n_layer=2, n_head=2, n_embd=32, block_size=128))
    state = dict(
        model=model.state_dict(),
        config=model.config_dict(),
        tokenizer=tokenizer_to_text(enc),
        step=0,
    )
    checkpoint.save(tmp_path / "other.pt", state)
    assert "holds a run with weights=" in one_line(
        run(folder, whole, "--resume", "--init_from", tmp_path / "other.pt")
    )
