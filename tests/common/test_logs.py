"""Logs of other projects, each in the format that the source code of its project prints."""

import json
from pathlib import Path

import pytest

import plot
from common.logs import read_points

LLM_C_MAIN_LOG = """\
s:0 tel:11.0099
s:0 trl:11.0091 lr:0.000001 norm:15.40
s:1 trl:10.9000 lr:0.000002 norm:14.10
s:250 tel:6.5000
s:250 eval:0.2671
"""
LLM_C_TERMINAL = """\
| max_sequence_length T | 1024 |
val loss 11.009900
step    1/251 | loss 11.009100 (+nanz)| norm 15.4000 (+nanz)| lr 1.00e-06 \
| 9.50 ms | 51.5% bf16 MFU | 1234567 tok/s
evaluating HellaSwag: 0/80\revaluating HellaSwag: 10/80\rval loss 6.500000
HellaSwag: 2682/10042 = 0.267078
generating:
---
"""
NANOGPT = """\
number of parameters: 10.65M
step 0: train loss 4.2874, val loss 4.2823
iter 0: loss 4.2664, time 31012.45ms, mfu -100.00%
iter 10: loss 3.1421, time 25.34ms, mfu 14.70%
step 250: train loss 1.9655, val loss 2.0655
saving checkpoint to out
"""
BUILD_NANOGPT = """\
=> calculated gradient accumulation steps: 1
validation loss: 10.9505
HellaSwag accuracy: 2463/10042=0.2453
rank 0 sample 0: Hello, I'm a language model, with a loss 3 of
step     0 | loss: 10.955029 | lr 8.3916e-07 | norm: 15.3661 | dt: 25743.43ms | tok/sec: 20366.17
step     1 | loss: 10.610803 | lr 1.6783e-06 | norm: nan | dt: 1500.00ms | tok/sec: 1,349,525.00
validation loss: 5.9113
"""
OURS = """\
step 0 | val 10.9000 | perplexity 54176.36
step 0 | HellaSwag 24.53% (2463/10042)
step 0 | loss 10.9000 | lr 6.00e-04 | norm 1.500 | 100 ms | 4,000 tok/s | mfu 40.0% | 1.00 GB
"""


def series_of(path: Path) -> dict:
    """All points of a log: name -> [(step, value), ...]."""
    series = {}
    for step, name, value in read_points(path):
        series.setdefault(name, []).append((step, value))
    return series


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            LLM_C_MAIN_LOG,
            dict(
                val=[(0, 11.0099), (250, 6.5)],
                loss=[(0, 11.0091), (1, 10.9)],
                lr=[(0, 1e-6), (1, 2e-6)],
                grad_norm=[(0, 15.4), (1, 14.1)],
                hella=[(250, 0.2671)],
            ),
        ),
        (
            LLM_C_TERMINAL,
            dict(
                val=[(0, 11.0099), (1, 6.5)],
                loss=[(0, 11.0091)],
                grad_norm=[(0, 15.4)],
                lr=[(0, 1e-6)],
                mfu=[(0, 0.515)],
                tokens_per_sec=[(0, 1234567)],
                hella=[(1, 0.267078)],
            ),
        ),
        (
            NANOGPT,
            dict(
                loss=[(0, 4.2874), (0, 4.2664), (10, 3.1421), (250, 1.9655)],
                val=[(0, 4.2823), (250, 2.0655)],
                mfu=[(10, pytest.approx(0.147))],
            ),
        ),
        (
            BUILD_NANOGPT,
            dict(
                val=[(0, 10.9505), (2, 5.9113)],
                hella=[(0, 0.2453)],
                loss=[(0, 10.955029), (1, 10.610803)],
                lr=[(0, 8.3916e-07), (1, 1.6783e-06)],
                grad_norm=[(0, 15.3661)],
                tokens_per_sec=[(0, 20366.17), (1, 1349525.0)],
            ),
        ),
        (
            OURS,
            dict(
                val=[(0, 10.9)],
                hella=[(0, pytest.approx(0.2453))],
                loss=[(0, 10.9)],
                lr=[(0, 6e-4)],
                grad_norm=[(0, 1.5)],
                tokens_per_sec=[(0, 4000)],
                mfu=[(0, 0.4)],
            ),
        ),
    ],
)
@pytest.mark.parametrize(
    "encoding, end", [("utf-8", "\n"), ("utf-8-sig", "\r\n"), ("utf-16", "\r\n")]
)
def test_values_of_other_logs(tmp_path, text, expected, encoding, end):
    """PowerShell writes UTF-16 with a byte-order mark."""
    path = tmp_path / "output.txt"
    path.write_bytes(text.replace("\n", end).encode(encoding))
    series = series_of(path)
    for name, points in expected.items():
        assert series.pop(name) == points
    assert not series
    assert "loss" in plot.read_series(path)


def test_only_hellaswags_own_file_calls_it_acc_norm(tmp_path):
    """Other benchmarks have an acc_norm, too."""
    line = '{"step": 5, "loss": 4.5, "acc_norm": 0.31}\n'
    for name, expected in (("hellaswag_results.jsonl", "hella"), ("metrics.jsonl", "acc_norm")):
        (tmp_path / name).write_text(line)
        assert series_of(tmp_path / name) == {"loss": [(5, 4.5)], expected: [(5, 0.31)]}


def test_the_progress_of_another_project_is_cut_off_by_a_crash(tmp_path):
    path = tmp_path / "output.txt"
    path.write_text(NANOGPT + "iter 260: loss 2")  # was going to be 2.0312
    assert series_of(path)["loss"][-1] == (250, 1.9655)


def test_bytes_of_another_encoding_do_not_hide_the_rest(tmp_path):
    path = tmp_path / "output.txt"
    path.write_bytes(b"rank 0 sample 0: caf\xe9\n" + BUILD_NANOGPT.encode())
    assert len(series_of(path)["loss"]) == 2


@pytest.mark.parametrize("indent", [None, 2])
def test_trainer_state_of_transformers(tmp_path, indent):
    history = [
        dict(epoch=0.5, grad_norm=1.5, learning_rate=5e-5, loss=2.5, step=10),
        dict(epoch=0.5, eval_loss=2.25, eval_runtime=1.5, step=10),
        dict(epoch=1.0, grad_norm=float("nan"), learning_rate=0.0, loss=2.0, step=20),
        dict(epoch=1.0, total_flos=1e15, train_loss=2.25, train_runtime=3.5, step=20),
    ]
    state = dict(best_metric=None, global_step=20, log_history=history, is_world_process_zero=True)
    (tmp_path / "trainer_state.json").write_text(json.dumps(state, indent=indent))
    # The folder of a checkpoint has the configuration of the model, too.
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="gpt2")))
    series = plot.read_series(tmp_path)
    values = {name: dict(zip(*(array.tolist() for array in series[name]))) for name in series}
    assert values["loss"] == {10: 2.5, 20: 2.0}
    assert values["val"] == {10: 2.25}
    assert values["lr"] == {10: 5e-5, 20: 0.0}
    assert values["grad_norm"] == {10: 1.5}
    plot.main(plot.Config(runs=(str(tmp_path),)))
    assert (tmp_path / "log_plot.png").exists()


def test_a_folder_of_llm_c_is_a_run(tmp_path):
    (tmp_path / "main.log").write_text(LLM_C_MAIN_LOG)
    plot.main(plot.Config(runs=(str(tmp_path),)))
    names = {path.stem for path in tmp_path.glob("*.png")}
    assert {"log_plot", "hellaswag_accuracy", "grad_norm", "learning_rate"} <= names
