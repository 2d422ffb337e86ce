"""cbt.py against a plain loop over transformers' GPT-2, its file format, and as a command."""

from pathlib import Path

import pytest
from conftest import ok, one_line
from small_benchmarks import CPU, load_both, plain_logprobs, run, write_model_and_data

import cbt
from common.console import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model_and_data(tmp_path_factory.mktemp("benchmarks"))


def test_equals_a_plain_loop_over_transformers(folder):
    model, enc, hf = load_both(folder)
    questions = cbt.load(str(folder))
    assert [question.kind for question in questions] == ["NE"] * 6 + ["V"] * 2
    metrics, lines = cbt.evaluate(model, enc, questions, CPU)
    sentences = [f"\"It isn't {n} o'clock,\" said Mr. Brown's dog." for n in range(1, 21)]
    context = " ".join(sentences) + ' "Oh,'
    context_ids = enc.encode_ordinary(context)
    for question, line in list(zip(questions, lines))[5:7]:
        for candidate, given in zip(question.candidates, line["paper_scores"]):
            blank = "" if candidate == "'s" else " "
            whole = enc.encode_ordinary(f"{context}{blank}{candidate}!\" (said the boys' aunt).")
            rest = whole[len(context_ids) :]
            both = (context_ids + rest)[-257:]
            plain = plain_logprobs(hf, both[: -len(rest)], rest).sum()
            assert given == pytest.approx(plain, abs=1e-4)

        raw = f"{question.context} {question.query}"
        sequences = []
        for candidate in question.candidates:
            sequences.append(enc.encode_ordinary(raw.replace("XXXXX", candidate)))
        longest = max(map(len, sequences))
        for ids, given in zip(sequences, line["sequence_scores"]):
            ids = ids[longest - 256 :]
            assert given == pytest.approx(plain_logprobs(hf, ids[:1], ids[1:]).mean(), abs=1e-4)
    assert {metric.name: metric.total for metric in metrics} == {
        "paper NE": 6,
        "paper V": 2,
        "paper all": 8,
        "sequence NE": 6,
        "sequence V": 2,
        "sequence all": 8,
    }


def test_the_headline_takes_only_one_protocol(folder):
    model, enc, _ = load_both(folder)
    metrics, _ = cbt.BENCHMARK.evaluate_headline(model, enc, cbt.load(str(folder), 1), CPU)
    assert [metric.name for metric in metrics] == ["paper NE", "paper V", "paper all"]
    assert cbt.BENCHMARK.headline(metrics) == metrics[2]


@pytest.mark.parametrize(
    "tokenized, text",
    [
        ("`` Oh , no ! '' cried he ; `` it is n't ! ''", '"Oh, no!" cried he; "it isn\'t!"'),
        (
            "they 'll -LRB- I 'm sure -RRB- see Mr. Brown 's hat .",
            "they'll (I'm sure) see Mr. Brown's hat.",
        ),
        ("the boys ' coats -- ` what ? '", "the boys' coats -- 'what?'"),
        ("it cost $ 5 , or 10 % : o'clock", "it cost $5, or 10%: o'clock"),
    ],
)
def test_detokenization(tokenized, text):
    assert cbt.detokenize(tokenized) == text


@pytest.mark.parametrize(
    "spoil, expected",
    [
        (lambda text: text.replace("Mary|John", "Marie|John", 1), "line 21: the answer 'Mary'"),
        (lambda text: text.replace("XXXXX", "it", 1), "line 21: the query must have one XXXXX"),
        (lambda text: text.replace("\n7 ", "\n8 ", 1), "line 7: it must begin with 7"),
        (lambda text: text[:700], "the file ends after"),
        (lambda text: text.replace("\n21", "\n\n21", 1), "line 21: the question ends after 20"),
    ],
)
def test_wrong_data_is_an_error_that_names_the_line(folder, tmp_path, spoil, expected):
    path = tmp_path / "cbtest_NE_test.txt"
    path.write_text(spoil((folder / "cbtest_NE_test.txt").read_text()))
    with pytest.raises(UserError, match="cbtest_NE_test.txt") as raised:
        cbt.load(str(path))
    assert expected in str(raised.value)


def test_command_prints_published_figures(folder):
    out = ok(run(folder, "cbt.py", "--data", folder / "cbtest_NE_test.txt")).stdout
    assert "83.40%" in out
    assert "83.40%" in out


@pytest.mark.slow
def test_missing_data_is_one_line(folder, tmp_path):
    assert "no file" in one_line(run(folder, "cbt.py", "--data", tmp_path / "none_*.txt"))
    assert "check the network" in one_line(run(folder, "cbt.py"))
