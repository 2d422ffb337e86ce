"""plot.py: pictures show the values of the logs, and each is drawn if the logs have data for it."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

import plot
from common.console import UserError
from common.published import REFERENCES

ROOT = Path(plot.__file__).parent
LOSSES = {"training_loss.png", "validation_loss.png", "log_plot.png"}
EVERY_STEP = {"learning_rate.png", "throughput.png", "grad_norm.png"}
BUILD_NANOGPT = (
    "0 val 10.9505\n0 hella 0.2463\n0 train 10.955029\n1 train 10.610803\n\n250 val 5.9113\n2 tra"
)


def write_run(
    folder: Path, steps: int = 30, mfu: float | None = None, source: str = "pydoc", val: bool = True
) -> Path:
    """A run folder like those of train_gpt2.py.

    The loss is 5 - step / 100; every ten steps, the validation loss is 0.1 higher.
    """
    folder.mkdir(parents=True)
    log, metrics = "", ""
    for step in range(steps):
        record = dict(
            step=step, loss=5 - step / 100, lr=step * 1e-5, grad_norm=0.5, ms=100.0, memory=1e9
        )
        record |= dict(tokens_per_sec=4000.0 + step, mfu=mfu, samples=["text"])
        if val and step % 10 == 0:
            record["val"] = record["loss"] + 0.1
            log += f"{step} val {record['val']:.6f}\n"
        log += f"{step} train {record['loss']:.6f}\n"
        metrics += json.dumps(record) + "\n"
    (folder / "log.txt").write_text(log)
    (folder / "metrics.jsonl").write_text(metrics)
    (folder / "config.json").write_text(json.dumps(dict(constants={}, data=dict(source=source))))
    return folder


def pictures(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.png")}


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG in pixels."""
    return struct.unpack(">II", path.read_bytes()[16:24])


def drawn(draw, *paths: Path, **options):
    """The axes of one picture."""
    ax = Figure().subplots()
    draw(ax, plot.read_runs(tuple(map(str, paths))), **options)
    return ax


def legend(ax) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def levels(ax) -> list[float]:
    """The heights of the reference lines."""
    return sorted(float(line.get_ydata()[0]) for line in ax.lines if line.get_color() == "grey")


def points(series: tuple[np.ndarray, np.ndarray]) -> list[tuple]:
    return list(zip(*(array.tolist() for array in series)))


def shell(*args, cwd=ROOT) -> subprocess.CompletedProcess:
    env = {key: value for key, value in os.environ.items() if key != "TRACEBACK"}
    return subprocess.run(
        [sys.executable, ROOT / "plot.py", *args], cwd=cwd, env=env, capture_output=True, text=True
    )


# Which pictures


def test_command_draws_what_the_run_folder_has_data_for(tmp_path):
    run = write_run(tmp_path / "log")
    done = shell("--size", "350M", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert pictures(run) == LOSSES | EVERY_STEP
    assert set(done.stdout.split()) == {f"log/{name}" for name in LOSSES | EVERY_STEP}
    assert image_size(run / "training_loss.png") == (1200, 750)
    assert image_size(run / "log_plot.png") == (1200, 750), "one panel: there are no benchmarks"


def test_out_dir(tmp_path):
    (tmp_path / "log.txt").write_text(BUILD_NANOGPT)
    plot.main(plot.Config(runs=(str(tmp_path),), out_dir=str(tmp_path / "new" / "pictures")))
    assert pictures(tmp_path / "new" / "pictures") == LOSSES | {"hellaswag_accuracy.png"}
    assert pictures(tmp_path) == set()


def test_log_txt_of_another_project(tmp_path):
    folder = tmp_path / "build-nanogpt" / "log"
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text(BUILD_NANOGPT)
    plot.main(plot.Config(runs=(str(folder / "log.txt"),)))
    assert pictures(folder) == LOSSES | {"hellaswag_accuracy.png"}


def test_run_without_validation_still_has_a_log_plot(tmp_path):
    run = write_run(tmp_path / "log", val=False)
    assert drawn(plot.draw_losses, run, size="124M").get_title().startswith("Training loss")
    assert len(drawn(plot.draw_losses, run, size="124M").lines) == 2


# Which values


def test_values_of_a_log_txt(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text(BUILD_NANOGPT)
    (tmp_path / "metrics.jsonl").write_text('{"step": 7, "loss": 1.0}\n')  # not asked for
    series = plot.read_series(path)
    assert points(series["loss"]) == [(0, 10.955029), (1, 10.610803)]
    assert points(series["val"]) == [(0, 10.9505), (250, 5.9113)]
    assert points(series["hella"]) == [(0, 0.2463)]
    assert len(series) == 3


def test_a_last_line_cut_off_by_a_crash_is_ignored(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("0 train 10.9\n1 train 1")  # was going to be 10.6
    assert points(plot.read_series(path)["loss"]) == [(0, 10.9)]


def test_values_of_a_run_folder(tmp_path):
    (tmp_path / "log.txt").write_text(
        "0 train 3.123457\n0 val 3.2\n5 train 3.000000\n5 hella 0.2600\n"
    )
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "loss": 3.12345678, "lr": 1e-4, "mfu": null, "samples": ["a"]}\n'
        '{"step": 1, "loss": NaN, "lr": 2e-4}\n'
        '{"step": 2, "loss": 3.05, "val": 3.1, "hella": 0.25}\n'
        '{"step": 3, "lo'
    )
    (tmp_path / "hellaswag_results.jsonl").write_text(
        '{"step": 5, "acc": 0.2, "acc_norm": 0.26041}\n{"model": "gpt2", "acc_norm": 0.2945}\n[1]\n'
    )
    series = plot.read_series(tmp_path)
    assert points(series["loss"]) == [(0, 3.12345678), (2, 3.05), (5, 3.0)]
    assert points(series["val"]) == [(0, 3.2), (2, 3.1)]
    assert points(series["lr"]) == [(0, 1e-4), (1, 2e-4)]
    assert points(series["hella"]) == [(2, 0.25), (5, 0.26041)]
    assert "mfu" not in series


def test_the_curves_show_the_values(tmp_path):
    run = write_run(tmp_path / "log")
    steps, losses = np.arange(30), 5 - np.arange(30) / 100
    raw, smooth = drawn(plot.draw_training_loss, run).lines[:2]
    np.testing.assert_allclose(raw.get_xydata(), np.stack([steps, losses], 1))
    assert np.abs(smooth.get_ydata() - losses).max() < 0.06
    assert smooth.get_ydata()[0] == pytest.approx(5)
    (val,) = drawn(plot.draw_validation_loss, run, size="124M").lines
    np.testing.assert_allclose(val.get_xydata(), [[0, 5.1], [10, 5.0], [20, 4.9]])
    np.testing.assert_allclose(
        drawn(plot.draw_learning_rate, run).lines[0].get_ydata(), steps * 1e-5
    )
    np.testing.assert_allclose(drawn(plot.draw_throughput, run).lines[0].get_ydata(), 4000 + steps)
    np.testing.assert_allclose(drawn(plot.draw_grad_norm, run).lines[0].get_ydata(), 0.5)


def test_moving_average_by_hand():
    values = np.array([1.0, 3.0, 5.0] + [5.0] * 33)  # 36 of them: a weight of 1 / 2
    average = plot.moving_average(values)
    assert average[:3].tolist() == pytest.approx([1, (1 + 2 * 3) / 3, (1 + 2 * 3 + 4 * 5) / 7])
    assert average[-1] == pytest.approx(5, abs=1e-6)


# How they look


def test_openai_loss_only_where_the_data_is_fineweb_edu(tmp_path):
    edu = write_run(tmp_path / "edu", source="fineweb-edu")
    plain = write_run(tmp_path / "plain", source="fineweb")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "log.txt").write_text(BUILD_NANOGPT)
    for draw in (plot.draw_validation_loss, plot.draw_losses):
        assert levels(drawn(draw, edu, size="124M")) == [3.2924]
        assert levels(drawn(draw, plain, edu, size="124M")) == [3.2924]
        assert levels(drawn(draw, edu, size="350M")) == []
        assert levels(drawn(draw, plain, size="124M")) == []
        assert levels(drawn(draw, tmp_path / "bare", size="124M")) == []


@pytest.mark.parametrize(
    "size, gpt2, gpt3, labels",
    [
        ("124M", 0.2955, 0.337, ("GPT-3 125M: 33.7%", "GPT-2 124M: 29.5%")),
        ("350M", 0.375224, 0.436, ("GPT-3 350M: 43.6%", "GPT-2 355M: 37.5%")),
        ("774M", 0.431986, 0.510, ("GPT-3 760M: 51.0%", "GPT-2 774M: 43.2%")),
        ("1558M", 0.4893, 0.547, ("GPT-3 1300M: 54.7%", "GPT-2 1558M: 48.9%")),
    ],
)
def test_hellaswag_baselines_by_size(tmp_path, size, gpt2, gpt3, labels):
    (tmp_path / "log.txt").write_text("0 train 5.0\n0 hella 0.25\n250 hella 0.2664\n")
    ax = drawn(plot.draw_benchmark, tmp_path, reference=REFERENCES["hellaswag"], size=size)
    assert levels(ax) == [0.25, gpt2, gpt3]
    assert legend(ax)[0] == f"{tmp_path.name}: 26.6% at step 250"
    assert legend(ax)[1:] == [*(f"OpenAI {label}" for label in labels), "chance: 25%"]


def test_every_benchmark_in_the_log_has_a_picture_and_a_panel(tmp_path):
    (tmp_path / "log.txt").write_text("0 train 5.0\n0 hella 0.25\n0 core 0.0123\n")
    plot.main(plot.Config(runs=(str(tmp_path),)))
    names = {"training_loss.png", "hellaswag_accuracy.png", "core.png", "log_plot.png"}
    assert pictures(tmp_path) == names
    assert image_size(tmp_path / "log_plot.png") == (2400, 750), "three panels"
    ax = drawn(plot.draw_benchmark, tmp_path, reference=REFERENCES["core"], size="1558M")
    assert levels(ax) == [0, 0.256525]
    assert legend(ax)[:2] == [f"{tmp_path.name}: 0.0123 at step 0", "OpenAI GPT-2 1558M: 0.2565"]


def test_runs_side_by_side_are_named_by_their_folders(tmp_path):
    first, second = write_run(tmp_path / "first"), write_run(tmp_path / "second", mfu=0.4)
    ax = drawn(plot.draw_training_loss, first, second / "log.txt", first)
    assert legend(ax) == ["first", "second"]
    assert len({line.get_color() for line in ax.lines}) == 2
    assert (
        drawn(plot.draw_throughput, first, second).lines[2].get_color() == ax.lines[2].get_color()
    )


def test_pictures_of_several_runs_are_in_the_folder_of_the_first(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.txt").write_text("0 train 10.9\n5 train 9\n")
    plot.main(plot.Config(runs=(str(tmp_path / "first"), str(tmp_path / "second" / "log.txt"))))
    assert pictures(tmp_path / "first") == {"training_loss.png", "log_plot.png"}
    assert not pictures(tmp_path / "second")


def test_folders_of_the_same_name_have_their_path_as_name(tmp_path, monkeypatch):
    for name in ("a/log", "b/log", "c"):
        write_run(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert [run.name for run in plot.read_runs(("a/log", "b/log/log.txt", "c"))] == [
        "a/log",
        "b/log/log.txt",
        "c",
    ]


def test_mfu_is_on_the_right_axis_if_it_is_known(tmp_path):
    known = drawn(plot.draw_throughput, write_run(tmp_path / "gpu", mfu=0.4))
    known.figure.draw_without_rendering()
    (right,) = known.child_axes
    mfu_per_rate = 0.4 / 4014.5  # medians
    assert right.get_ylim()[1] / known.get_ylim()[1] == pytest.approx(mfu_per_rate)
    assert "gpu" in right.get_ylabel() and legend(known) == ["gpu: median 4,014 tokens/s"]
    assert not drawn(plot.draw_throughput, write_run(tmp_path / "cpu")).child_axes


def test_the_start_of_a_long_run_does_not_flatten_the_rest(tmp_path):
    lines = [f"{step} train {3 + 8 / (1 + step / 20):.4f}\n" for step in range(5000)]
    (tmp_path / "log.txt").write_text("".join(lines))
    ax = drawn(plot.draw_training_loss, tmp_path)
    bottom, top = ax.get_ylim()
    assert 2.5 < bottom < 3.03 and 4 < top < 5
    assert legend(ax) == [tmp_path.name, "(above the picture: up to 11.00)"]
    short = drawn(plot.draw_training_loss, write_run(tmp_path / "short"))
    assert short.get_ylim()[1] > 5 and legend(short) == ["short"]


@pytest.mark.parametrize("last, ticks", [(4.2, {"4.2", "5"}), (0.02, {"0.02", "0.1", "1", "5"})])
def test_log_scale_has_readable_ticks(tmp_path, last, ticks):
    losses = np.geomspace(5.2, last, 40)
    (tmp_path / "log.txt").write_text(
        "".join(f"{1000 * i} val {loss:.4f}\n" for i, loss in enumerate(losses))
    )
    ax = drawn(plot.draw_validation_loss, tmp_path, size="124M")
    assert ax.get_yscale() == "log"
    assert ticks <= {label.get_text() for label in ax.get_yticklabels()}
    assert "20,000" in {label.get_text() for label in ax.get_xticklabels()}


# Wrong inputs


@pytest.mark.filterwarnings("error")
def test_values_that_no_axis_can_show(tmp_path):
    huge = "1" + "0" * 400
    lines = [f'{{"step": {n}, "loss": 4.5, "lr": 0, "grad_norm": 0.5}}\n' for n in range(3)]
    lines += [f'{{"step": 3, "loss": {value}}}\n' for value in ("Infinity", "NaN", huge, "1e200")]
    lines += [f'{{"step": {step}, "loss": 1}}\n' for step in ("Infinity", "NaN", huge, -1, "null")]
    lines += ['{"step": 4, "loss": true}\n', f'{{"step": 4, "loss": {"1" * 5000}}}\n']
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    (tmp_path / "log.txt").write_text(f"5 train inf\n6 train nan\n{huge} train 1\n7 train {huge}\n")
    assert points(plot.read_series(tmp_path)["loss"]) == [(0, 4.5), (1, 4.5), (2, 4.5)]
    plot.main(plot.Config(runs=(str(tmp_path),)))


@pytest.mark.filterwarnings("error")
def test_zeros_do_not_break_an_axis(tmp_path):
    zeros = dict(loss=0.0, val=0.0, lr=0.0, grad_norm=0.0, tokens_per_sec=0.0, mfu=0.0, hella=0.0)
    lines = [json.dumps(dict(step=step) | zeros) + "\n" for step in range(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    plot.main(plot.Config(runs=(str(tmp_path),)))
    assert pictures(tmp_path) == LOSSES | EVERY_STEP | {"hellaswag_accuracy.png"}
    # MFU without throughput, as in nanoGPT's output, beside a run with throughput.
    other = tmp_path / "nanogpt.txt"
    other.write_text("iter 0: loss 4.5, time 9.00ms, mfu 3.00%\n")
    run = write_run(tmp_path / "log")
    assert not drawn(plot.draw_throughput, other, run).child_axes
    # A loss that becomes 0 is on a linear axis.
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "log.txt").write_text("0 train 1.5\n1 train 0.0000\n")
    assert drawn(plot.draw_training_loss, tmp_path).get_yscale() == "linear"


@pytest.mark.filterwarnings("error")
def test_a_run_with_a_single_step(tmp_path):
    (tmp_path / "log.txt").write_text("0 train 10.9\n")
    plot.main(plot.Config(runs=(str(tmp_path),)))
    assert pictures(tmp_path) == {"training_loss.png", "log_plot.png"}


def test_inputs_that_cannot_be_drawn(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        plot.read_runs((str(tmp_path / "missing"),))
    with pytest.raises(FileNotFoundError, match="one of log.txt, metrics.jsonl, main.log"):
        plot.read_runs((str(tmp_path),))
    for name, content in dict(
        empty=b"", foreign=b"Dear diary,\n1 train two\n", binary=bytes(range(256)) * 9
    ).items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} holds no losses"):
            plot.read_runs((str(tmp_path / name),))


@pytest.mark.parametrize(
    "args, word",
    [
        (["missing"], "missing"),
        (["empty.txt"], "empty.txt"),
        (["log", "--out_dir", "empty.txt"], "empty.txt"),
        (["log", "--out_dir", "taken"], "training_loss.png"),
    ],
)
def test_errors_are_one_line(tmp_path, args, word):
    write_run(tmp_path / "log")
    (tmp_path / "empty.txt").touch()
    # A folder can't be replaced by a file, not even by root.
    (tmp_path / "taken" / "training_loss.png").mkdir(parents=True)
    done = shell(*args, cwd=tmp_path)
    assert done.returncode == 1
    assert (
        done.stderr.startswith("error: ") and word in done.stderr and done.stderr.count("\n") == 1
    )
    assert "Traceback" not in done.stderr + done.stdout
