"""dclm_core.py, compared with handwritten prompts and a plain loop over transformers' model."""

import json
import math
import random
import stat
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SMALL_RUN, command, ok, one_line
from small_benchmarks import CORE_TASKS, CPU, load_both, run, write_bundle, write_model_and_data

import dclm_core
from common.console import UserError
from common.tasks import accuracy
from dclm_core import Task

EXAMPLE = dict(
    multiple_choice=dict(query="Q ", choices=["one ", "two"], gold=1, ind=0),
    schema=dict(context_options=["A ", "B"], continuation="end ", gold=0, ind=0),
    language_modeling=dict(context=" c \n", continuation="d ", ind=0),
)
SHOT = dict(
    multiple_choice=dict(query="P", choices=["no", " yes "], gold=1, ind=1),
    schema=dict(context_options=["X", "Y "], continuation="z", gold=1, ind=1),
    language_modeling=dict(context="\n a  ", continuation=" b ", ind=1),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model_and_data(tmp_path_factory.mktemp("benchmarks"))


# ---------------------------------------------------------------------------------------------
# Prompts


@pytest.mark.parametrize(
    "kind, shots, delimiter, expected",
    [
        ("multiple_choice", 0, " ", ["Q  one ", "Q  two"]),
        ("multiple_choice", 1, "|", ["P| yes \n\nQ |one ", "P| yes \n\nQ |two"]),
        ("schema", 0, " ", ["A  end ", "B end "]),
        ("schema", 1, " ", ["Y  z\n\nA  end ", "Y  z\n\nB end "]),
        ("language_modeling", 0, " ", ["c", "c d "]),
        ("language_modeling", 1, "\nA: ", ["a\nA:  b \n\nc\nA:", "a\nA:  b \n\nc\nA: d "]),
    ],
)
def test_prompts_by_hand(kind, shots, delimiter, expected):
    task = Task("t", kind, shots, delimiter, 0.0, [EXAMPLE[kind], SHOT[kind]])
    assert dclm_core.render(task, 0) == expected


def test_shots_are_drawn_as_in_the_reference():
    examples = [dict(ind=n) for n in range(9)]
    task = Task("t", "schema", 4, " ", 0.0, examples)
    shots = [shot["ind"] for shot in dclm_core.draw_shots(task, 5)]
    assert shots == random.Random(1239).sample([0, 1, 2, 3, 4, 6, 7, 8], 4)


def test_a_limit_takes_the_first_examples_of_the_shuffled_order(folder):
    whole = dclm_core.load(folder / "eval_bundle")
    part = dclm_core.load(folder / "eval_bundle", 4)
    for task, start in zip(whole, part):
        order = list(range(len(task.examples)))
        random.Random(1337).shuffle(order)
        assert [example["ind"] for example in task.examples] == order
        assert [example["ind"] for example in start.examples] == order[:4]


# ---------------------------------------------------------------------------------------------
# Predictions


@torch.no_grad()
def predict_plainly(hf, enc, kind, texts) -> tuple[int | bool, list[float]]:
    """The prediction and the losses of an example: each text is tokenized and read by itself."""
    rows = [[enc.eot_token, *enc.encode_ordinary(text)] for text in texts]
    if kind == "multiple_choice":
        starts = [len(same_start(rows))] * len(rows)
    elif kind == "schema":
        end = len(same_start([row[::-1] for row in rows]))
        starts = [len(row) - end for row in rows]
    else:
        starts = [len(rows[0])]
        rows = rows[1:]
    losses = []
    for row, start in zip(rows, starts):
        idx = torch.tensor(row[-hf.config.n_positions :])
        start -= len(row) - len(idx)
        logits = hf.double()(idx[None]).logits[0]
        if kind == "language_modeling":
            return bool((logits[start - 1 : -1].argmax(-1) == idx[start:]).all()), []
        logprobs = logits[:-1].log_softmax(-1)[torch.arange(len(idx) - 1), idx[1:]]
        scored = logprobs[max(start - 1, 0) :]
        losses.append(float(-scored.mean()) if start < len(idx) else math.nan)
    return losses.index(min(losses)), losses


def same_start(rows: list[list[int]]) -> list[int]:
    length = min(map(len, rows))
    while any(row[:length] != rows[0][:length] for row in rows):
        length -= 1
    return rows[0][:length]


def test_equals_a_plain_loop_over_transformers(folder):
    model, enc, hf = load_both(folder)
    results = dclm_core.evaluate_tasks(model, enc, dclm_core.load(folder / "eval_bundle"), CPU)
    for result in results:
        kind = result.task.kind
        assert len(result.lines) == len(CORE_TASKS[kind][2])
        for index, line in enumerate(result.lines):
            texts = dclm_core.render(result.task, index)
            prediction, losses = predict_plainly(hf, enc, kind, texts)
            if kind == "language_modeling":
                assert line["right"] == prediction
                continue
            assert line["pred"] == prediction
            assert line["right"] == (prediction == result.task.examples[index]["gold"])
            for ours, theirs in zip(line["losses"], losses):
                assert (
                    math.isnan(theirs) if ours is None else ours == pytest.approx(theirs, abs=1e-4)
                )
    assert any(result.num_cut for result in results)


def test_a_greedy_continuation_is_right(folder):
    """A continuation that the model itself generates, and one that differs in its last token."""
    model, enc, _ = load_both(folder)
    context = "The model"
    prompt = [enc.eot_token, *enc.encode_ordinary(context)]
    (generated,) = model.generate([prompt], 1, temperature=0)
    text = enc.decode(generated)
    other = enc.decode([(generated[0] + 1) % 300])
    examples = [dict(context=context, continuation=end, ind=0) for end in (text, other)]
    task = Task("t", "language_modeling", 0, "", 0.0, examples)
    if [*prompt, *generated] != [enc.eot_token, *enc.encode_ordinary(context + text)]:
        pytest.skip("the generated token joins the context")
    result = dclm_core.evaluate_task(model, enc, task, range(2), CPU, "")
    assert result.hits == [True, False]


def test_what_texts_share_is_read_once(folder):
    model, enc, _ = load_both(folder)
    task = replace(dclm_core.load(folder / "eval_bundle")[0], shots=0)
    index = [example["ind"] for example in task.examples].index(0)
    result = dclm_core.evaluate_task(model, enc, task, range(index, index + 1), CPU, "")
    rows = [[enc.eot_token, *enc.encode_ordinary(text)] for text in dclm_core.render(task, index)]
    shared = len(same_start(rows))
    assert result.reference_tokens == sum(map(len, rows))
    assert result.tokens == shared + sum(len(row) - shared - 1 for row in rows)


def test_core_by_hand(folder):
    tasks = dclm_core.load(folder / "eval_bundle")
    results = [
        dclm_core.Result(tasks[0], hits=[True, True, False, False]),  # chance 0.25
        dclm_core.Result(tasks[1], hits=[True, False, False, False]),  # chance 0.5
    ]
    core = dclm_core.core_metric(results)
    assert core.value == pytest.approx(((0.5 - 0.25) / 0.75 + (0.25 - 0.5) / 0.5) / 2)
    errors = (math.sqrt(0.25 / 3) / 0.75, math.sqrt(0.1875 / 3) / 0.5)
    assert core.stderr == pytest.approx(math.hypot(*errors) / 2)


def test_the_standard_error_is_that_of_the_mean():
    hits = [True] * 3 + [False] * 7
    values = torch.tensor(hits, dtype=torch.float64)
    assert accuracy("a", hits).stderr == pytest.approx(float(values.std() / math.sqrt(10)))
    assert str(accuracy("a", hits)) == "30.00% ± 15.28% (3/10)"
    assert str(accuracy("a", [True])) == "100.00% (1/1)"


# ---------------------------------------------------------------------------------------------
# Data


def spoil(folder: Path, name: str, old: str, new: str):
    path = folder / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


@pytest.mark.parametrize(
    "name, old, new, expected",
    [
        ("eval_data/small/schema.jsonl", '"gold": 1', '"gold": 2', "schema.jsonl, line 2: gold is"),
        ("eval_data/small/schema.jsonl", '"gold"', '"golden"', "line 1, has no field 'gold'"),
        ("eval_data/small/schema.jsonl", "{", "[", "schema.jsonl, line 1, is not JSON"),
        (
            "core.yaml",
            "small/schema",
            "../../secret",
            "../../secret.jsonl is outside of the bundle",
        ),
        ("core.yaml", "small/schema", "small/none", "task my_schema has no file"),
        ("core.yaml", '"icl_task_type": "schema"', '"icl_task_type": "x"', "is 'x', not one of"),
        ("core.yaml", "icl_tasks", "tasks", "core.yaml is damaged: 'icl_tasks'"),
        ("core.yaml", "{", "{[", "core.yaml is damaged"),
        ("eval_meta_data.csv", "my_schema", "other", "no random baseline for task my_schema"),
        ("eval_meta_data.csv", "50.0", "half", "eval_meta_data.csv is damaged"),
        ("core.yaml", "[1]", "[7]", "task my_schema shows 7 other examples"),
    ],
)
def test_a_damaged_bundle_is_an_error_that_names_the_place(tmp_path, name, old, new, expected):
    folder = write_bundle(tmp_path / "bundle")
    spoil(folder, name, old, new)
    with pytest.raises(UserError) as raised:
        dclm_core.load(folder)
    assert expected in str(raised.value)


def test_an_archive_is_unpacked_inside_of_its_folder(tmp_path):
    bundle = write_bundle(tmp_path / "eval_bundle")
    archive = tmp_path / "bundle.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in bundle.rglob("*"):
            file.write(path, path.relative_to(tmp_path))
        link = zipfile.ZipInfo("eval_bundle/link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(link, "/etc/passwd")
    dclm_core.unpack(archive, tmp_path / "out")
    assert dclm_core.load(tmp_path / "out") == dclm_core.load(bundle)
    assert not (tmp_path / "out" / "link").is_symlink()
    assert (tmp_path / "out" / "link").read_text() == "/etc/passwd"


@pytest.mark.parametrize(
    "name", ["../outside", "eval_bundle/../../outside", "/outside", "..\\outside"]
)
def test_an_archive_that_leaves_its_folder_is_rejected(tmp_path, name):
    archive = tmp_path / "bundle.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("eval_bundle/core.yaml", "")
        file.writestr(name, "")
    with pytest.raises(UserError, match="leaves the folder"):
        dclm_core.unpack(archive, tmp_path / "a" / "b" / "out")
    assert not list(tmp_path.rglob("outside*"))
    assert not (tmp_path / "a" / "b" / "out").exists()


def test_a_damaged_archive_is_an_error(tmp_path):
    (tmp_path / "bundle.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="bundle.zip is damaged"):
        dclm_core.unpack(tmp_path / "bundle.zip", tmp_path / "out")


# ---------------------------------------------------------------------------------------------
# The command, and training


def test_command_prints_a_table_and_draws_it(folder, tmp_path):
    words = ["--data", folder / "eval_bundle", "--plot", tmp_path / "core.png"]
    words += ["--save_predictions", tmp_path / "predictions.jsonl"]
    out = ok(run(folder, "dclm_core.py", *words)).stdout
    assert (tmp_path / "core.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").open()]
    right = sum(line["right"] for line in lines if line["task"] == "my_schema")
    row = next(line for line in out.splitlines() if "my_schema" in line)
    assert f"({right}/7)" in row
    for text in ("0.2565", "0.1139", "0.2690", "tokens read: ", "lost their beginning: "):
        assert text in out


@pytest.mark.slow
def test_two_processes_predict_as_one(folder, tmp_path):
    words = ["dclm_core.py", "--model", folder / "model.pt", "--device", "cpu"]
    words += ["--data", folder / "eval_bundle", "--plot", tmp_path / "core.png"]
    tables = []
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]):
        path = tmp_path / f"{len(tables)}.jsonl"
        out = ok(command(*launcher, *words, "--save_predictions", path)).stdout
        tables.append([line for line in out.splitlines() if line.startswith("|")])
    assert tables[0] == tables[1]
    assert (tmp_path / "0.jsonl").read_text() == (tmp_path / "1.jsonl").read_text()


def test_missing_data_is_one_line(folder, tmp_path):
    error = one_line(run(folder, "dclm_core.py", "--data", tmp_path / "none"))
    assert f"{tmp_path}/none/eval_meta_data.csv" in error


@pytest.mark.slow
def test_training_logs_core(data_dir, folder, tmp_path):
    log_dir = tmp_path / "log"
    words = ["--data_dir", data_dir, "--log_dir", log_dir, *SMALL_RUN, "--max_steps", 4]
    words += ["--core_every", 3, "--core_data", folder / "eval_bundle"]
    out = ok(command("train_gpt2.py", *words)).stdout
    lines = [json.loads(x) for x in (log_dir / "core_results.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 3, 4]
    assert f"step 3 | DCLM CORE {lines[1]['CORE']:.4f} ± " in out
    assert f"3 core {lines[1]['CORE']:.6f}" in (log_dir / "log.txt").read_text()
    assert "bits per byte" in out
