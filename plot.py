"""Logs -> pictures, from one run or several side by side.

python plot.py                                           # log/
python plot.py log other_run --out_dir pictures          # both runs in the same axes
python plot.py build-nanogpt/log/log.txt --size 124M     # a log.txt alone, another project's too
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # drawn without pyplot, so without a display
from matplotlib.ticker import AutoLocator, LogLocator, MaxNLocator, NullLocator, PercentFormatter, StrMethodFormatter

from console import cli, say
from files import write_whole

SERIES = ("loss", "val", "hella", "lr", "tokens_per_sec", "mfu", "grad_norm")  # what is drawn, as in metrics.jsonl
OTHER_NAMES = {"train": "loss", "acc_norm": "hella"}  # in log.txt and hellaswag_results.jsonl
OPENAI_LOSS = {"124M": 3.2924}  # of OpenAI's GPT-2 on the validation shard of FineWeb-Edu
GPT2_HELLASWAG = {"124M": 0.294463, "350M": 0.375224, "774M": 0.431986, "1558M": 0.488946}
GPT3_HELLASWAG = {"124M": 0.337, "350M": 0.436, "774M": 0.510, "1558M": 0.547}
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe-Ito, for all eyes


@dataclass
class Config:
    runs: tyro.conf.Positional[tuple[str, ...]] = ("log",)  # run folders, or log.txt files
    out_dir: str | None = None  # where the pictures go; None = the first run's folder
    size: Literal["124M", "350M", "774M", "1558M"] = "124M"  # of OpenAI's models to compare with


@dataclass
class Run:
    name: str
    color: str
    series: dict[str, dict[int, float]]  # loss, val, ...: step -> value
    source: str | None = None  # of its data, where config.json says so

    def curve(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        steps, values = zip(*sorted(self.series[key].items()))
        return np.array(steps), np.array(values)


def main(config: Config):
    runs = read_runs(config.runs)
    out_dir = Path(config.out_dir or folder_of(Path(config.runs[0])))
    out_dir.mkdir(parents=True, exist_ok=True)
    pictures = {
        "training_loss": ("loss", draw_training_loss),
        "validation_loss": ("val", partial(draw_validation_loss, size=config.size)),
        "learning_rate": ("lr", draw_learning_rate),
        "throughput": ("tokens_per_sec", draw_throughput),
        "grad_norm": ("grad_norm", draw_grad_norm),
        "hellaswag_accuracy": ("hella", partial(draw_hellaswag, size=config.size)),
    }
    for name, (key, draw) in pictures.items():
        if having(runs, key):
            figure = Figure((8, 5), layout="constrained")
            draw(figure.subplots(), runs)
            save(figure, out_dir / f"{name}.png")
    figure = Figure((12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_losses(left, runs, config.size)
    draw_hellaswag(right, runs, config.size)
    save(figure, out_dir / "log_plot.png")


def read_runs(names: tuple[str, ...]) -> list[Run]:
    paths = list(dict.fromkeys(map(Path, names)))
    if not paths:
        raise ValueError("name at least one run folder or log.txt")
    return [
        Run(short_name(path, paths), COLORS[i % len(COLORS)], read_series(path), read_source(folder_of(path)))
        for i, path in enumerate(paths)
    ]


def read_series(path: Path) -> dict[str, dict[int, float]]:
    """A log file stands alone. In a run folder metrics.jsonl completes log.txt, and has more digits."""
    if not path.exists():
        raise FileNotFoundError(f"no run folder or log file {path}")
    if path.is_file():
        rows = list(read_log(path))
    elif (path / "log.txt").exists() or (path / "metrics.jsonl").exists():
        rows = [*read_log(path / "log.txt"), *read_jsonl(path / "metrics.jsonl")]
        rows += read_jsonl(path / "hellaswag_results.jsonl")
    else:
        raise FileNotFoundError(f"{path} is not a run folder: it has neither log.txt nor metrics.jsonl")
    series = {}
    for step, name, value in rows:
        key = OTHER_NAMES.get(name, name)
        if key in SERIES and isinstance(value, int | float) and math.isfinite(value):
            series.setdefault(key, {})[step] = value
    if not {"loss", "val", "hella"} & series.keys():
        raise ValueError(f"{path} is empty, or no log: no line reads 'step train|val|hella value'")
    return series


def read_log(path: Path) -> Iterator[tuple[int, str, float]]:
    for line in lines_of(path):
        try:
            step, stream, value = line.split()
            if line.endswith("\n"):  # else a crash may have cut digits off
                yield int(step), stream, float(value)
        except ValueError:  # another project's other lines
            continue


def read_jsonl(path: Path) -> Iterator[tuple[int, str, object]]:
    """What the objects that have a step say about it."""
    for line in lines_of(path):
        try:
            record = json.loads(line)
            step = int(record.pop("step"))
        except (ValueError, KeyError, TypeError, AttributeError):  # cut off by a crash, or of no training run
            continue
        yield from ((step, name, value) for name, value in record.items())


def lines_of(path: Path) -> list[str]:
    return path.read_text("utf-8", "replace").splitlines(keepends=True) if path.exists() else []


def read_source(folder: Path) -> str | None:
    try:
        return json.loads((folder / "config.json").read_text())["data"]["source"]
    except (OSError, ValueError, KeyError, TypeError):  # another project's run
        return None


def folder_of(path: Path) -> Path:
    return path.parent if path.is_file() else path


def short_name(path: Path, paths: list[Path]) -> str:
    """The end of its folder's path, as long as it takes to tell it from the other runs."""
    folder = folder_of(path).resolve().parts
    others = [folder_of(other).resolve().parts for other in paths if other != path]
    ends = (folder[-n:] for n in range(1, len(folder)))
    return next(("/".join(end) for end in ends if end not in [other[-len(end) :] for other in others]), str(path))


def having(runs: list[Run], key: str) -> list[Run]:
    return [run for run in runs if key in run.series]


def draw_training_loss(ax: Axes, runs: list[Run]):
    for run in having(runs, "loss"):
        draw_smoothed(ax, run, "loss", run.name)
    show_bulk(ax)
    finish(ax, "Training loss (faint: each step, strong: moving average)", "loss (nats per token)")


def draw_validation_loss(ax: Axes, runs: list[Run], size: str):
    draw_validation(ax, runs, size)
    show_bulk(ax)
    use_log_scale(ax)
    finish(ax, "Validation loss", "loss (nats per token)")


def draw_losses(ax: Axes, runs: list[Run], size: str):
    """Training and validation loss in the same axes."""
    for run in having(runs, "loss"):
        name = None if "val" in run.series else run.name
        ax.plot(*run.curve("loss"), color=run.color, lw=0.5, alpha=0.4, label=name)
    draw_validation(ax, runs, size)
    if not ax.lines:
        return leave_empty(ax, "no losses in this run")
    show_bulk(ax)
    finish(ax, "Training loss (faint) and validation loss", "loss (nats per token)")


def draw_validation(ax: Axes, runs: list[Run], size: str):
    for run in having(runs, "val"):
        steps, values = run.curve("val")
        draw_line(ax, steps, values, run.color, f"{run.name}: {values[-1]:.4f} at step {steps[-1]:,}")
    if size in OPENAI_LOSS and any(run.source == "fineweb-edu" for run in having(runs, "val")):
        draw_reference(ax, OPENAI_LOSS[size], f"OpenAI GPT-2 {size}: {OPENAI_LOSS[size]}")


def draw_hellaswag(ax: Axes, runs: list[Run], size: str):
    for run in having(runs, "hella"):
        steps, values = run.curve("hella")
        draw_line(ax, steps, values, run.color, f"{run.name}: {values[-1]:.1%} at step {steps[-1]:,}")
    if not ax.lines:
        return leave_empty(ax, "no HellaSwag results in this run")
    draw_reference(ax, 0.25, "chance: 25%")
    draw_reference(ax, GPT2_HELLASWAG[size], f"OpenAI GPT-2 {size}: {GPT2_HELLASWAG[size]:.1%}")
    draw_reference(ax, GPT3_HELLASWAG[size], f"OpenAI GPT-3 {size}: {GPT3_HELLASWAG[size]:.1%}")
    ax.margins(y=0.1)
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    finish(ax, "HellaSwag accuracy", "accuracy (acc_norm)", legend="lower right")


def draw_learning_rate(ax: Axes, runs: list[Run]):
    for run in having(runs, "lr"):
        draw_line(ax, *run.curve("lr"), run.color, run.name)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    finish(ax, "Learning rate", "learning rate")


def draw_throughput(ax: Axes, runs: list[Run]):
    """tokens/s, and on a second axis their share of the device's peak where that is known."""
    for run in having(runs, "tokens_per_sec"):
        label = f"{run.name}: median {np.median(run.curve('tokens_per_sec')[1]):,.0f} tokens/s"
        draw_smoothed(ax, run, "tokens_per_sec", label)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if having(runs, "mfu"):
        right = ax.twinx()
        for run in having(runs, "mfu"):
            steps, values = run.curve("mfu")
            right.plot(steps, values, "--", color=run.color, lw=1)
            ax.plot([], [], "--", color=run.color, lw=1, label=f"{run.name}: median MFU {np.median(values):.1%}")
        right.set(ylim=(0, 1), ylabel="MFU (dashed)")
        right.yaxis.set_major_formatter(PercentFormatter(1))
    finish(ax, "Throughput", "tokens/s", legend="lower right")


def draw_grad_norm(ax: Axes, runs: list[Run]):
    for run in having(runs, "grad_norm"):
        draw_smoothed(ax, run, "grad_norm", run.name)
    use_log_scale(ax)
    finish(ax, "Gradient norm (faint: each step, strong: moving average)", "gradient norm before clipping")


def draw_smoothed(ax: Axes, run: Run, key: str, label: str):
    steps, values = run.curve(key)
    ax.plot(steps, values, color=run.color, lw=0.5, alpha=0.3)
    draw_line(ax, steps, moving_average(values), run.color, label)


def draw_line(ax: Axes, steps: np.ndarray, values: np.ndarray, color: str, label: str):
    ax.plot(steps, values, color=color, lw=1.5, label=label, marker="." if len(steps) < 50 else None)


def draw_reference(ax: Axes, value: float, text: str):
    ax.axhline(value, color="grey", lw=1, ls="--")
    ax.annotate(text, (0.01, value), (0, 3), ax.get_yaxis_transform(), "offset points", color="dimgrey", fontsize=9)


def moving_average(values: np.ndarray) -> np.ndarray:
    """Exponential, over 0.5% of the run; its start is not drawn towards zero (as in Adam)."""
    beta = 1 - 1 / max(4, len(values) / 200)
    average, averages = 0.0, []
    for n, value in enumerate(values, start=1):
        average = beta * average + (1 - beta) * value
        averages.append(average / (1 - beta**n))
    return np.array(averages)


def show_bulk(ax: Axes):
    """Let a long run's first steps and spikes leave the picture rather than flatten the rest, and say so."""
    curves = [np.array(line.get_ydata()) for line in ax.lines]
    low, high = min(map(np.min, curves)), max(map(np.max, curves))
    top = max(np.quantile(curve, 0.98, method="higher") for curve in curves)
    margin = 0.05 * (top - low) or 0.1
    ax.set_ylim(max(low - margin, 0.9 * low), top + margin)
    if high > top + margin:
        note = f"values up to {high:.2f} lie above the picture"
        ax.text(0.01, 0.98, note, color="dimgrey", fontsize=9, va="top", transform=ax.transAxes)


def use_log_scale(ax: Axes):
    """Ticks at 3.2, 3.4, ... within a decade, at 1, 2, 5, 10, ... over several; none at 3x10^0."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(AutoLocator() if high < 10 * low else LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def leave_empty(ax: Axes, text: str):
    ax.text(0.5, 0.5, text, color="grey", ha="center", transform=ax.transAxes)
    ax.set_axis_off()


def finish(ax: Axes, title: str, ylabel: str, legend: str = "upper right"):
    ax.set(title=title, xlabel="step", ylabel=ylabel)
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.grid(alpha=0.3)
    ax.legend(loc=legend)


def save(figure: Figure, path: Path):
    with write_whole(path) as file:
        figure.savefig(file, format="png", dpi=150)
    say(path)


if __name__ == "__main__":
    cli(Config, main, __doc__)
