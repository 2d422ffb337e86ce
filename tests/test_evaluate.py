"""evaluate.py: its table, which results it reuses, and the validation loss."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command, one_line
from small_benchmarks import CPU, TEXT, write_model_and_data

import evaluate
from common import checkpoint
from common.console import UserError
from common.published import REFERENCES
from common.tasks import Metric
from common.tokenizer import load_tokenizer, train_tokenizer
from model import GPT, GPTConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model_and_data(tmp_path_factory.mktemp("benchmarks"))


def test_every_benchmark_has_a_name():
    assert [*[benchmark.name for benchmark in evaluate.BENCHMARKS], "val"] == list(REFERENCES)


@pytest.mark.slow
def test_one_table_and_nothing_is_computed_twice(data_dir, folder, tmp_path):
    out_dir = tmp_path / "out"
    words = ["evaluate.py", "--device", "cpu", "--out_dir", out_dir]
    words += ["--hellaswag_data", folder / "hellaswag.jsonl"]
    words += ["--lambada_data", tmp_path / "none.jsonl"]
    words += ["--cbt_data", folder, "--core_data", folder / "eval_bundle"]
    words += ["--val_data", data_dir, "--val_tokens", 500]
    words += ["--models", folder / "model.pt", tmp_path / "none.pt", folder / "hf"]

    def run(*more) -> str:
        """The output. Of the 15 results, the data of one benchmark and one model are missing."""
        result = command(*words, *more)
        assert "7 of 15 results are missing" in one_line(result)
        return result.stdout

    out = run()

    # The table.
    table = (out_dir / "evaluation.md").read_text()
    assert table in out
    cells = {}
    for line in table.splitlines()[2:]:
        model, title, metric, figure, *_ = [cell.strip() for cell in line.strip("|").split("|")]
        cells[model.rsplit("/")[-1], title, metric] = figure
    for title, metric in (("hellaswag", "completion acc_norm"), ("val", "bits per byte")):
        assert cells["model.pt", title, metric] == cells["hf", title, metric]
    assert "no file" in cells["hf", "lambada", "not available"]
    assert "no checkpoint" in cells["none.pt", "cbt", "not available"]
    assert "29.55%" in table
    assert cells["hf", "core", "CORE"] == cells["model.pt", "core", "CORE"]
    accuracy = cells["hf", "hellaswag", "completion acc"]
    assert re.fullmatch(r"[\d.]+% ± [\d.]+% \(\d+/12\)", accuracy)
    assert (out_dir / "evaluation.png").read_bytes().startswith(b"\x89PNG")

    # The second time, nothing is computed.
    results = json.loads((out_dir / "evaluation.json").read_text())
    assert len(results) == 8
    again = run()
    assert again.count("computed before") == 8
    assert json.loads((out_dir / "evaluation.json").read_text()) == results

    # Only the validation loss does not depend on limit. A result of other code is computed again,
    # and replaced.
    outdated = [result for result in results if result["benchmark"] == "val"][0]
    outdated["code"] = "of an older version"
    (out_dir / "evaluation.json").write_text(json.dumps(results))
    changed = run("--limit", 4)
    assert changed.count("computed before") == 1
    renewed = json.loads((out_dir / "evaluation.json").read_text())
    assert [result["benchmark"] for result in renewed].count("val") == 2
    assert all(result["code"] != "of an older version" for result in renewed)

    (out_dir / "evaluation.json").write_text("[")
    assert "evaluation.json is damaged" in one_line(command(*words))


def test_an_unknown_benchmark_is_rejected():
    message = "benchmarks is 'hella', must be one of hellaswag, lambada, cbt, core, val"
    with pytest.raises(UserError, match=message):
        evaluate.Config(benchmarks=("hellaswag", "hella"))


@pytest.mark.parametrize("name", ["limit", "val_tokens", "B"])
@pytest.mark.parametrize("value", [0, -1])
def test_flags_below_their_range_are_rejected(name, value):
    with pytest.raises(UserError, match=f"{name} is {value}, must be at least 1"):
        evaluate.Config(**{name: value})


def test_a_model_with_nan_has_no_results(folder, data_dir, tmp_path, capsys, monkeypatch):
    broken = torch.load(folder / "model.pt")
    broken["model"]["h.1.attn.c_proj.weight"][3, 4] = torch.nan
    torch.save(broken, tmp_path / "broken.pt")
    # An older version stored this result.
    stored = dict(model="old.pt", benchmark="lambada", metrics=[vars(Metric("accuracy", math.nan))])
    (tmp_path / "evaluation.json").write_text(json.dumps([stored]))
    config = evaluate.Config(
        models=(str(tmp_path / "broken.pt"),),
        hellaswag_data=str(folder / "hellaswag.jsonl"),
        lambada_data=str(folder / "lambada.jsonl"),
        cbt_data=str(folder),
        core_data=str(folder / "eval_bundle"),
        val_data=str(data_dir),
        val_tokens=500,
        limit=4,
        out_dir=str(tmp_path),
        device="cpu",
    )
    read = []

    def fingerprint(name):
        read.append(name)
        return f"fingerprint of {name}"

    monkeypatch.setattr(checkpoint, "fingerprint", fingerprint)
    with pytest.raises(UserError, match="5 of 5 results are missing"):
        evaluate.main(config)
    assert read == [f"{tmp_path}/broken.pt"], "once, not once for each benchmark"
    reason = f"{tmp_path}/broken.pt is broken: its tensor h.1.attn.c_proj.weight is not finite"
    assert capsys.readouterr().out.count(reason) == len(REFERENCES)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == []
    assert (tmp_path / "evaluation.md").read_text().count("not available") == len(REFERENCES)


def test_every_benchmark_has_a_flag_for_its_data():
    config = evaluate.Config()
    for name in REFERENCES:
        assert hasattr(config, f"{name}_data")


def test_published_losses_only_stand_beside_fineweb_edu(tmp_path, data_dir):
    config = evaluate.Config(val_data=str(data_dir))
    assert not evaluate.validation_benchmark(config).reference.figures
    manifest = json.loads((data_dir / "manifest.json").read_text())
    manifest |= dict(source="fineweb-edu", tokenizer="gpt2")
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    benchmark = evaluate.validation_benchmark(evaluate.Config(val_data=str(tmp_path)))
    assert benchmark.reference == REFERENCES["val"]
    result = dict(model="m", benchmark="val", metrics=[vars(Metric("loss", 3.3))])
    table = evaluate.results_table([result], dict(val=benchmark))
    assert "gpt2, published" in table
    assert "3.2924" in table


def test_the_validation_loss_is_on_all_shards_of_the_split(tmp_path, monkeypatch):
    # Shards without a manifest have GPT-2's vocabulary, which would be downloaded.
    monkeypatch.setattr(evaluate, "shards_tokenizer", lambda folder: None)
    for n, split in enumerate(("val", "train", "val")):
        np.save(tmp_path / f"text_{split}_{n}.npy", np.full(10, n, np.uint16))
    text = evaluate.load_validation(str(tmp_path), 14)
    assert text.tokens.tolist() == [0] * 10 + [2] * 5
    fingerprint = evaluate.validation_fingerprint(str(tmp_path))
    np.save(tmp_path / "text_val_2.npy", np.full(10, 3, np.uint16))
    assert evaluate.validation_fingerprint(str(tmp_path)) != fingerprint


def test_validation_tokens_without_text_are_an_error(data_dir):
    text = evaluate.load_validation(str(data_dir), 399)
    text.tokens = np.full(5, text.enc.eot_token)
    model = GPT(GPTConfig(vocab_size=384, n_layer=1, n_head=1, n_embd=8, block_size=32))
    with pytest.raises(UserError, match="hold no text"):
        evaluate.evaluate_validation(model, text.enc, text, CPU, B=8)


def test_bits_per_byte_by_hand_with_either_tokenizer(data_dir):
    """If all tokens have the same probability, each one costs log2(vocab_size) bits."""
    text = evaluate.load_validation(str(data_dir), 399)
    assert len(text.tokens) == 400
    ids = [token for token in text.tokens.tolist() if token != text.enc.eot_token]
    string = text.enc.decode(ids)
    shards_enc = load_tokenizer(data_dir / "vocab.tiktoken")
    other_enc, _ = train_tokenizer([TEXT], 300)
    for enc, count in (
        (shards_enc, 400),
        (other_enc, len(other_enc.encode_ordinary(string)) + 1),
    ):
        model = GPT(GPTConfig(vocab_size=enc.n_vocab, n_layer=1, n_head=1, n_embd=8, block_size=32))
        torch.nn.init.zeros_(model.wte.weight)
        (loss, _, bits), _ = evaluate.evaluate_validation(model, enc, text, CPU, B=8)
        assert loss.value == pytest.approx(math.log(enc.n_vocab), abs=1e-5)
        expected = (count - 1) * math.log2(enc.n_vocab) / len(string.encode())
        assert bits.value == pytest.approx(expected, rel=1e-5)


def test_the_picture_has_a_bar_for_each_model_and_a_line_for_each_published_figure():
    metrics = [vars(Metric("completion acc_norm", 0.3, 3, 10, 0.15))]
    results = [dict(model=name, benchmark="hellaswag", metrics=metrics) for name in ("a", "b")]
    ax = evaluate.Figure().subplots()
    benchmark = next(one for one in evaluate.BENCHMARKS if one.name == "hellaswag")
    evaluate.draw_benchmark(ax, benchmark, ["a", "b"], results)
    assert [bar.get_height() for bar in ax.patches] == [0.3, 0.3]
    levels = {line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == "--"}
    assert levels == {0.2955, 0.375224, 0.431986, 0.4893}
