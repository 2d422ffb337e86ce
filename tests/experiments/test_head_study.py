"""The study of redundant heads, end to end on a tiny model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from study_helpers import PNG, run_main

import evaluate
from common import checkpoint
from common.console import UserError
from common.shards import shards_tokenizer
from experiments import head_study
from model import GPT, GPTConfig

STUDY_FLAGS = "--B 4 --num_sequences 4 --prune_fractions 0.25 0.5 --random_orders 2".split()
STUDY_FLAGS += "--val_tokens 1500 --device cpu".split()


@pytest.fixture(scope="module")
def model_file(data_dir, tmp_path_factory) -> Path:
    """A random model with the tokenizer of the shards. Its attention is far from uniform."""
    enc = shards_tokenizer(data_dir)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=enc.n_vocab, n_layer=2, n_head=4, n_embd=32))
    with torch.no_grad():
        for block in model.h:
            block.attn.c_attn.weight *= 10
    path = tmp_path_factory.mktemp("model") / "model_final.pt"
    checkpoint.save(path, checkpoint.build(model, enc, step=0))
    return path


@pytest.fixture
def hellaswag_file(tmp_path) -> Path:
    path = tmp_path / "hellaswag.jsonl"
    with open(path, "w") as file:
        for n in range(6):
            example = dict(
                ind=n,
                activity_label="Reading",
                ctx_a="A file is",
                ctx_b="read",
                ctx=f"A file is read {n}",
                label=n % 4,
                endings=["line by line.", "at once.", "never.", "and then closed."],
            )
            file.write(json.dumps(example) + "\n")
    return path


def validation_loss(model_file: Path, data_dir: Path, folder: Path) -> float:
    """As evaluate.py measures it."""
    flags = ["--models", model_file, "--benchmarks", "val", "--val_data", data_dir]
    flags += ["--val_tokens", 1500, "--out_dir", folder, "--device", "cpu"]
    run_main(evaluate, *flags)
    return json.loads((folder / "evaluation.json").read_text())[0]["metrics"][0]["value"]


def test_head_study(data_dir, model_file, hellaswag_file, tmp_path, capsys):
    out = tmp_path / "study"
    flags = ["--model", model_file, "--data_dir", data_dir, "--out_dir", out, *STUDY_FLAGS]
    flags += ["--hellaswag_data", hellaswag_file]
    run_main(head_study, *flags)
    output = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    similarity = np.load(out / "similarity.npy")
    assert np.diag(similarity) == pytest.approx([1] * 8, abs=1e-5)
    # settings, importance, speed; the complete model; two fractions of each of four orders
    assert len(results) == 3 + 1 + 2 * 4
    whole, half = results["whole model"], results["importance 0.5"]
    assert whole["loss"] == pytest.approx(
        validation_loss(model_file, data_dir, tmp_path / "evaluation"), abs=1e-6
    )
    assert sum(half["heads"]) == 4
    assert whole["parameters"] - half["parameters"] == 4 * (3 * (32 * 8 + 8) + 8 * 32)
    assert 0 <= half["hellaswag"] <= 1
    assert "largest fraction that costs less than 5% of perplexity" in output
    for name in ("patterns", "similarity_by_layer", "similarity", "pruning"):
        assert (out / f"{name}.png").read_bytes()[:4] == PNG

    # The pruned model is the one of the report.
    assert "model_pruned.pt: 50% of the heads removed by" in output
    pruned, _ = checkpoint.load_model(out / "model_pruned.pt")
    order = output.split("of the heads removed by ")[1].split()[0]
    assert list(pruned.config.heads) == results[f"{order} 0.5"]["heads"]

    # Only what is missing is measured again.
    results["random 1 0.5"]["loss"] = "known"
    del results["redundancy 0.25"]
    (out / "results.json").write_text(json.dumps(results))
    run_main(head_study, *flags)
    again = json.loads((out / "results.json").read_text())
    assert again["random 1 0.5"]["loss"] == "known"
    assert again["redundancy 0.25"]["perplexity"] > 1


def test_wrong_inputs_are_refused(data_dir, model_file, tmp_path):
    flags = ["--data_dir", data_dir, "--out_dir", tmp_path / "study", *STUDY_FLAGS]
    flags += ["--hellaswag_limit", 0]
    with pytest.raises(OSError, match="no checkpoint"):
        run_main(head_study, *flags, "--model", tmp_path / "model.pt")
    flags += ["--model", model_file]
    with pytest.raises(UserError, match="leaves layers of .* without a head"):
        run_main(head_study, *flags, "--prune_fractions", 0.9)
    with pytest.raises(UserError, match="rounds to zero heads of 8"):
        run_main(head_study, *flags, "--prune_fractions", 0.01)
    short = make_shards(np.zeros(50), tmp_path / "short", like=data_dir)
    with pytest.raises(UserError, match="lower T"):
        run_main(head_study, *flags, "--data_dir", short)
    with pytest.raises(UserError, match="prune_fractions is"):
        head_study.Config(prune_fractions=(1.5,))


def make_shards(tokens: np.ndarray, folder: Path, like: Path) -> Path:
    """Shards with the same tokens for both splits, and the tokenizer of the folder `like`."""
    folder.mkdir()
    names = ["x_train_0.npy", "x_val_0.npy"]
    for name in names:
        np.save(folder / name, tokens.astype(np.uint16))
    manifest = json.loads((like / "manifest.json").read_text())
    manifest["shards"] = [dict(name=name, tokens=len(tokens)) for name in names]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / manifest["tokenizer"]).write_text((like / manifest["tokenizer"]).read_text())
    return folder
