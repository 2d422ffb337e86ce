"""The report: figures of samples counted by hand, and the files that it writes."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import checkpoint
from common.console import UserError
from common.runtime import Runtime
from common.scoring import stream_loss
from common.shards import shards_tokenizer
from common.tokenizer import train_tokenizer
from fantasy import report
from model import GPT, GPTConfig

CPU = Runtime(torch.device("cpu"), torch.float32)


def test_figures_of_samples_match_a_count_by_hand():
    training = ["<LOC>\nThe old tower stands in the salt mist of the harbor.\n</LOC>"]
    samples = [
        "<LOC>\nThe old tower stands in the rain. The old tower stands.\n</LOC>",
        "<LOC>\nOne two three four one two three four one two three four",
    ]
    figures = report.measure_samples(samples, training)
    assert figures["delimited, share of samples"] == 0.5
    assert figures["distinct-1"] == pytest.approx((6 + 4) / (11 + 12))
    assert figures["distinct-2"] == pytest.approx((7 + 4) / (10 + 11))
    assert figures["repeated 4-grams, share"] == pytest.approx((1 / 8 + 5 / 9) / 2)
    assert (figures["copied run, most words"], figures["copied run, mean words"]) == (6, 3.0)
    assert figures["copied run > 12 words, share of samples"] == 0.0


@pytest.mark.parametrize(
    "sample, longest",
    [
        ("", 0),
        ("salt", 0),
        ("an old salt", 2),
        ("tower an old", 2),
        ("the tower an old tower", 2),  # "tower an" would span two texts
        ("old the old the old tower the", 3),
        ("the old tower the old tower", 3),
    ],
)
def test_the_longest_copied_run_stays_within_one_text(sample, longest):
    index = report.WordIndex([["the", "old", "tower"], [], ["an", "old"]])
    assert index.longest_copied_run(sample.split()) == longest


def test_the_longest_copied_run_equals_a_search_of_all_runs():
    rng = np.random.default_rng(0)
    for _ in range(100):
        texts = [list(rng.choice(list("abc"), rng.integers(0, 12))) for _ in range(3)]
        sample = list(rng.choice(list("abcd"), 10))
        joined = [f" {' '.join(text)} " for text in texts]
        runs = [sample[i:j] for i in range(10) for j in range(i + 1, 11)]
        copied = [run for run in runs if any(f" {' '.join(run)} " in text for text in joined)]
        expected = max(map(len, copied), default=0)
        assert report.WordIndex(texts).longest_copied_run(sample) == expected


@pytest.mark.parametrize(
    "sample, delimited",
    [
        ("<LOC>\na\n</LOC>", True),
        ("<LOC>\na", False),
        ("<LOC>\na\n</LOC></LOC>", False),
        ("<LOC><LOC>\na\n</LOC>", False),
        ("a <LOC> b </LOC>", False),
    ],
)
def test_a_sample_is_delimited_if_it_opens_once_and_closes_once(sample, delimited):
    assert report.is_delimited(sample) == delimited


def test_the_report_compares_two_models_and_explains_its_figures(data_dir, tmp_path, capsys):
    enc = shards_tokenizer(data_dir)
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        shape = GPTConfig(vocab_size=enc.n_vocab, n_layer=1, n_head=1, n_embd=8, block_size=32)
        models.append(GPT(shape))
        checkpoint.save(tmp_path / f"{seed}.pt", checkpoint.build(models[-1], enc, 0))
    config = SimpleNamespace(
        init_from=str(tmp_path / "0.pt"), data="data.txt", out_dir=str(tmp_path), B=2, T=16, seed=1,
        num_samples=2, general_data=str(data_dir), general_tokens=100,
    )  # fmt: skip
    val_tokens = np.arange(40)
    training = ["<LOC> old tower </LOC>"]
    report.write_report(config, tmp_path / "1.pt", training, val_tokens, enc, CPU)

    figures = json.loads((tmp_path / "report.json").read_text())
    assert list(figures) == ["base", "finetuned"]
    general = report.read_general_text(str(data_dir), 100, enc)
    assert general.shape == (101,)
    for model, column in zip(models, figures.values()):
        assert list(column) == [name for name, _, _ in report.FIGURES]
        held_out = math.exp(stream_loss(model, val_tokens, 2, 16, CPU))
        assert column["held-out perplexity"] == pytest.approx(held_out)
        forgotten = math.exp(stream_loss(model, general, 2, 32, CPU))
        assert column["general perplexity"] == pytest.approx(forgotten)

    text = (tmp_path / "report.md").read_text()
    assert "before finetuning | after finetuning" in text
    for name in figures["base"]:
        assert f"\n| {name}" in text
        assert f"\n- **{name}**: " in text
    assert (tmp_path / report.SAMPLES).read_text().count("-" * 80) == 2


def test_a_model_that_is_not_finite_has_no_figures(data_dir, tmp_path):
    enc = shards_tokenizer(data_dir)
    model = GPT(GPTConfig(vocab_size=enc.n_vocab, n_layer=1, n_head=1, n_embd=8, block_size=32))
    model.ln_f.bias.data[0] = math.nan
    path = tmp_path / "broken.pt"
    checkpoint.save(path, checkpoint.build(model, enc, 0))
    config = SimpleNamespace(B=2, T=16, seed=1, num_samples=2)
    with pytest.raises(UserError, match="broken.pt is broken: its tensor ln_f.bias is not finite"):
        report.measure_model(config, path, ["a"], np.arange(40), None, CPU)


def test_infinity_is_null_in_json():
    record = dict(a=math.inf, b=math.nan, c=1.5, d=None, e=2, f="x")
    assert report.finite_or_none(record) == dict(a=None, b=None, c=1.5, d=None, e=2, f="x")


def test_samples_of_plain_text_start_from_the_end_of_text(data_dir, tmp_path):
    enc = shards_tokenizer(data_dir)
    model = GPT(GPTConfig(vocab_size=enc.n_vocab, n_layer=1, n_head=1, n_embd=8, block_size=32))
    path = tmp_path / "model.pt"
    checkpoint.save(path, checkpoint.build(model, enc, 0))
    config = SimpleNamespace(B=2, T=16, seed=1, num_samples=2)
    blocks = ["<LOC> old tower </LOC>"]
    for training, is_block in ((["old tower"], False), (blocks, True)):
        figures, samples = report.measure_model(config, path, training, np.arange(40), None, CPU)
        assert (report.DELIMITED in figures) == is_block
        assert [sample.startswith("<LOC>") for sample in samples] == [is_block] * 2
        assert not any("<|endoftext|>" in sample for sample in samples)


def test_general_text_is_optional(data_dir, tmp_path, capsys):
    enc, _ = train_tokenizer(["other text"], 260)
    assert report.read_general_text(str(tmp_path), 100, enc) is None
    assert report.read_general_text(str(data_dir), 100, enc) is None
    assert "was made with another tokenizer" in capsys.readouterr().out


def test_a_missing_figure_is_shown_as_not_available():
    assert report.show(None, ".2f") == "not available"
    assert report.show(0.25, ".1%") == "25.0%"
    assert report.perplexity(math.inf) == math.inf
    assert report.perplexity(1.0) == math.e
