"""lambada.py against a plain loop over transformers' GPT-2, and as a command."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ok, one_line
from small_benchmarks import CPU, PASSAGES, load_both, plain_logprobs, run, write_model_and_data

import lambada
from common.console import UserError
from common.published import REFERENCES


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model_and_data(tmp_path_factory.mktemp("benchmarks"))


def test_equals_a_plain_loop_over_transformers(folder):
    model, enc, hf = load_both(folder)
    metrics, lines = lambada.evaluate(model, enc, lambada.load(folder / "lambada.jsonl"), CPU)
    excluded = lambada.stop_tokens(enc)
    assert "and" in enc.decode(excluded).split()
    sums = []
    right = 0
    for passage, line in zip(PASSAGES, lines):
        context = enc.encode_ordinary(passage.rsplit(" ", 1)[0])
        word = enc.encode_ordinary(passage)[len(context) :]
        sums.append(plain_logprobs(hf, context, word).sum())
        with torch.no_grad():
            logits = hf(torch.tensor([context + word])).logits[0, len(context) - 1 : -1]
        right += logits.argmax(-1).tolist() == word
        logits[0, excluded] = -torch.inf
        assert line["right_no_stop_words"] == (logits.argmax(-1).tolist() == word)
        assert line["word"] == passage.rsplit(" ", 1)[1]
    values = {metric.name: metric for metric in metrics}
    assert values["perplexity"].value == pytest.approx(math.exp(-np.mean(sums)), rel=1e-4)
    assert (values["accuracy"].correct, values["accuracy"].total) == (right, 25)
    assert REFERENCES["lambada"].published("accuracy, no stop words", "gpt2") == 0.4599


def test_stop_words_are_excluded_from_the_first_position_only():
    choose = lambada.exclude_first_tokens([0, 3], torch.device("cpu"))
    logits = torch.tensor([[9.0, 1.0, 2.0, 3.0]] * 2)
    assert choose(logits, torch.tensor([True, False])).tolist() == [2, 0]


@pytest.mark.parametrize(
    "spoil, expected",
    [
        (
            lambda text: text + '{"text": "word"}\n',
            "line 26: the text must have at least two words",
        ),
        (lambda text: "[1]\n" + text, "line 1: "),
        (lambda text: '{"body": 1}\n', "line 1, has no field 'text'"),
    ],
)
def test_wrong_data_is_an_error_that_names_the_line(folder, tmp_path, spoil, expected):
    path = tmp_path / "lambada.jsonl"
    path.write_text(spoil((folder / "lambada.jsonl").read_text()))
    with pytest.raises(UserError, match="lambada.jsonl") as raised:
        lambada.load(str(path))
    assert expected in str(raised.value)


@pytest.mark.parametrize("end", ["\n", "\r\n", " ", " \n\n"])
def test_a_line_end_after_the_last_word_is_not_part_of_it(folder, tmp_path, end):
    path = tmp_path / "lambada.jsonl"
    lines = [json.dumps(dict(text=passage + end)) + "\n" for passage in PASSAGES]
    path.write_text("".join(lines))
    assert lambada.load(str(path)) == lambada.load(str(folder / "lambada.jsonl"))


def test_command_prints_counts_and_published_figures(folder):
    out = ok(run(folder, "lambada.py", "--data", folder / "lambada.jsonl", "--limit", 7)).stdout
    assert "/7)" in out
    assert "45.99%" in out


def test_a_missing_model_is_one_line(folder, tmp_path):
    words = ["--data", folder / "lambada.jsonl"]
    assert "no checkpoint" in one_line(run(tmp_path, "lambada.py", *words))
