"""hellaswag.py against a plain loop over transformers' GPT-2, as a command, and during training."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SMALL_RUN, command, ok, one_line
from small_benchmarks import CPU, EXAMPLES, load_both, plain_logprobs, run, write_model_and_data

import hellaswag
import train_gpt2
from common.console import UserError
from model import GPT, GPTConfig

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model_and_data(tmp_path_factory.mktemp("benchmarks"))


def test_equals_a_plain_loop_over_transformers(folder):
    model, enc, hf = load_both(folder)
    metrics, lines = hellaswag.evaluate(model, enc, hellaswag.load(folder / "hellaswag.jsonl"), CPU)
    right = {metric.name: 0 for metric in metrics}
    for example, line in zip(EXAMPLES, lines):
        context = enc.encode_ordinary(example["ctx"])
        endings = [enc.encode_ordinary(" " + ending) for ending in example["endings"]]
        logprobs = [plain_logprobs(hf, context, ending) for ending in endings]
        assert line["sums"] == pytest.approx([x.sum() for x in logprobs], abs=1e-4)
        assert line["pred"] == np.argmax([x.sum() for x in logprobs])
        assert line["pred_norm"] == np.argmax([x.mean() for x in logprobs])

        context = enc.encode_ordinary("Cooking: A man cuts bread. He")
        endings = []
        for ending in example["endings"]:
            endings.append(ending.replace("[title] sings  of", " sings of").replace("  ", " "))
        sums = [plain_logprobs(hf, context, enc.encode_ordinary(" " + e)).sum() for e in endings]
        assert line["harness_sums"] == pytest.approx(sums, abs=1e-4)
        assert line["harness_pred_norm"] == np.argmax([s / len(e) for s, e in zip(sums, endings)])
        for name, key in (
            ("completion acc", "pred"),
            ("completion acc_norm", "pred_norm"),
            ("harness acc", "harness_pred"),
            ("harness acc_norm", "harness_pred_norm"),
        ):
            right[name] += line[key] == example["label"]
    assert {metric.name: metric.correct for metric in metrics} == right
    assert {metric.total for metric in metrics} == {12}


def test_the_headline_takes_only_one_rendering(folder):
    model, enc, _ = load_both(folder)
    examples = hellaswag.load(folder / "hellaswag.jsonl")
    every, _ = hellaswag.evaluate(model, enc, examples, CPU)
    some, _ = hellaswag.BENCHMARK.evaluate_headline(model, enc, examples, CPU)
    assert some == every[:2]
    assert hellaswag.BENCHMARK.headline(some) == every[1]
    line = hellaswag.BENCHMARK.result_line(some)
    assert line.keys() == {"acc", "correct", "acc_norm", "correct_norm", "total"}


@pytest.mark.parametrize(
    "spoil, expected",
    [
        (lambda text: text.replace('"label"', "label", 1), "line 1, is not JSON"),
        (lambda text: text.replace('"ctx_b"', '"x"', 1), "line 1, has no field 'ctx_b'"),
        (lambda text: text.replace('"label": 2', '"label": 4', 1), "line 3: the label is 4"),
        (lambda text: text.replace(', "reads 1"', "", 1), "line 2: endings must be four"),
        (lambda text: text.replace('"reads 1"', "1", 1), "line 2: endings must be four"),
        (lambda text: "\n", "holds no examples"),
        (lambda text: text.replace('"label": 2', '"label": ""', 1), "line 3: the label is ''"),
        (lambda text: text.replace('"label": 2', '"label": true', 1), "line 3: the label is True"),
        (lambda text: text.replace('"ind": 2', '"ind": ' + "1" * 5000, 1), "line 3, is not JSON"),
    ],
)
def test_wrong_data_is_an_error_that_names_the_line(folder, tmp_path, spoil, expected):
    path = tmp_path / "hellaswag.jsonl"
    path.write_text(spoil((folder / "hellaswag.jsonl").read_text()))
    with pytest.raises(UserError, match="hellaswag.jsonl") as raised:
        hellaswag.load(str(path))
    assert expected in str(raised.value)


def test_labels_may_be_texts(folder, tmp_path):
    path = tmp_path / "hellaswag.jsonl"
    text = (folder / "hellaswag.jsonl").read_text()
    for label in range(4):
        text = text.replace(f'"label": {label}', f'"label": "{label}"')
    path.write_text(text)
    assert hellaswag.load(path) == hellaswag.load(folder / "hellaswag.jsonl")


def test_the_mean_of_a_truncated_ending_is_over_the_tokens_that_are_scored(folder):
    _, enc, _ = load_both(folder)
    model = GPT(GPTConfig(vocab_size=500, n_layer=1, n_head=1, n_embd=8, block_size=4))
    model.requires_grad_(False)
    model.wte.weight.zero_()  # every token has the same probability
    examples = hellaswag.load(folder / "hellaswag.jsonl", 3)
    _, lines = hellaswag.evaluate(model, enc, examples, CPU, styles=("completion",))
    for line, example in zip(lines, examples):
        lengths = [len(enc.encode_ordinary(" " + ending)) for ending in example["endings"]]
        scored = np.minimum(lengths, 4)
        assert line["sums"] == pytest.approx(-np.log(500) * scored, rel=1e-5)
        means = np.array(line["sums"]) / scored
        assert line["pred_norm"] == means.argmax()


# As a command


def test_command_prints_a_table_and_adds_a_line_of_results(folder, tmp_path):
    results = tmp_path / "log" / "results.jsonl"
    predictions = tmp_path / "predictions.jsonl"
    words = ["--data", folder / "hellaswag.jsonl", "--results", results]
    words += ["--save_predictions", predictions, "--dtype", "float32"]
    out = ok(run(folder, "hellaswag.py", *words)).stdout
    assert "HellaSwag (chance 25%), float32" in out
    assert "/12)" in out
    assert "29.55%" in out
    assert "31.14%" in out

    ok(run(folder, "hellaswag.py", *words, model="hf"))
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["total"] for line in lines] == [12, 12]
    assert lines[0]["acc"] == lines[0]["correct"] / 12
    assert lines[0] | {"model": ""} == lines[1] | {"model": ""}, "a checkpoint and its export agree"

    lines = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert [line["ind"] for line in lines] == list(range(12))
    assert {"label", "pred", "pred_norm", "sums"} <= lines[0].keys()


@pytest.mark.slow
def test_two_processes_score_as_one(folder, tmp_path):
    words = ["--model", folder / "model.pt", "--data", folder / "hellaswag.jsonl"]
    words += ["--device", "cpu", "--results", tmp_path / "results.jsonl"]
    for name, launcher in (("one", []), ("two", TORCHRUN)):
        predictions = ["--save_predictions", tmp_path / name]
        ok(command(*launcher, "hellaswag.py", *words, *predictions))
    assert (tmp_path / "one").read_text() == (tmp_path / "two").read_text()
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert lines[0] == lines[1]


def test_missing_data_is_one_line(folder, tmp_path, monkeypatch):
    missing = tmp_path / "none.jsonl"
    assert "no file" in one_line(run(folder, "hellaswag.py", "--data", missing))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nothing answers there
    if not (ROOT / hellaswag.PATH).exists():
        assert "put the file there yourself" in one_line(run(folder, "hellaswag.py"))


# During training


def train(
    data_dir: Path,
    folder: Path,
    log_dir: Path,
    *words,
    launcher=(),
    data: str = "hellaswag.jsonl",
):
    flags = ["--data_dir", data_dir, "--log_dir", log_dir]
    flags += ["--hellaswag_data", folder / data, "--hellaswag_every", 4]
    return command(*launcher, "train_gpt2.py", *SMALL_RUN, *flags, *words)


def stream(log_dir: Path, name: str) -> list[tuple[int, float]]:
    lines = [line.split() for line in (log_dir / "log.txt").read_text().splitlines()]
    return [(int(step), float(value)) for step, stream, value in lines if stream == name]


def read_results(log_dir: Path) -> list[dict]:
    lines = (log_dir / "hellaswag_results.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_training_logs_the_same_for_any_number_of_processes(data_dir, folder, tmp_path):
    one = tmp_path / "one"
    two = tmp_path / "two"
    ok(train(data_dir, folder, one, "--max_steps", 6))
    ok(train(data_dir, folder, two, "--max_steps", 6, launcher=TORCHRUN))
    assert [step for step, _ in stream(one, "hella")] == [0, 4, 6]
    assert stream(one, "hella") == stream(two, "hella")
    results = read_results(one)
    logged = [(step, pytest.approx(value, abs=1e-6)) for step, value in stream(one, "hella")]
    assert [(result["step"], result["acc_norm"]) for result in results] == logged

    words = ["--data", folder / "hellaswag.jsonl", "--results", tmp_path / "after.jsonl"]
    ok(run(one, "hellaswag.py", *words, model="model_final.pt"))
    after = json.loads((tmp_path / "after.jsonl").read_text())
    assert after["correct_norm"] == results[-1]["correct_norm"]


@pytest.mark.slow
def test_a_resumed_run_has_every_result_once(data_dir, folder, tmp_path):
    ok(train(data_dir, folder, tmp_path, "--max_steps", 4))
    ok(train(data_dir, folder, tmp_path, "--max_steps", 10, "--resume"))
    steps = [result["step"] for result in read_results(tmp_path)]
    assert steps == [0, 4, 8, 10] == [step for step, _ in stream(tmp_path, "hella")]


def test_training_goes_on_without_a_download_but_not_without_a_file_of_the_user(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(hellaswag, "URL", "http://127.0.0.1:9/gone")
    monkeypatch.setattr(hellaswag, "PATH", tmp_path / "hellaswag.jsonl")
    assert train_gpt2.load_benchmarks(train_gpt2.Config(), CPU) == []
    assert "warning: training without HellaSwag" in capsys.readouterr().out
    with pytest.raises(OSError, match="no file none.jsonl"):
        train_gpt2.load_benchmarks(train_gpt2.Config(hellaswag_data="none.jsonl"), CPU)


@pytest.mark.slow
def test_training_evaluates_under_compile(data_dir, folder, tmp_path):
    ok(train(data_dir, folder, tmp_path / "eager", "--max_steps", 2))
    ok(train(data_dir, folder, tmp_path / "compiled", "--max_steps", 2, "--compile", "on"))
    assert stream(tmp_path / "eager", "hella") == stream(tmp_path / "compiled", "hella")
