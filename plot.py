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

OTHER_NAMES = {"train": "loss", "acc_norm": "hella"}  # log.txt's and hellaswag_results.jsonl's for metrics.jsonl's
OPENAI_LOSS = {"124M": 3.2924}  # of OpenAI's GPT-2 on the validation shard of FineWeb-Edu
HELLASWAG = {
    "GPT-2": {"124M": 0.294463, "350M": 0.375224, "774M": 0.431986, "1558M": 0.488946},
    "GPT-3": {"124M": 0.337, "350M": 0.436, "774M": 0.510, "1558M": 0.547},
}
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
    hellaswag = partial(draw_hellaswag, size=config.size)
    pictures = {
        "training_loss": ("loss", draw_training_loss),
        "validation_loss": ("val", partial(draw_validation_loss, size=config.size)),
        "learning_rate": ("lr", draw_learning_rate),
        "throughput": ("tokens_per_sec", draw_throughput),
        "grad_norm": ("grad_norm", draw_grad_norm),
        "hellaswag_accuracy": ("hella", hellaswag),
    }
    for name, (key, draw) in pictures.items():
        if having(runs, key):
            save(out_dir / f"{name}.png", runs, draw)
    save(out_dir / "log_plot.png", runs, partial(draw_losses, size=config.size), hellaswag)


def read_runs(names: tuple[str, ...]) -> list[Run]:
    paths = list(dict.fromkeys(map(Path, names)))
    series = [read_series(path) for path in paths]
    folders = [folder_of(path).resolve().name for path in paths]
    labels = [folder if folders.count(folder) == 1 else str(path) for folder, path in zip(folders, paths)]
    colors = [COLORS[i % len(COLORS)] for i in range(len(paths))]
    return list(map(Run, labels, colors, series, map(read_source, paths)))


def read_series(path: Path) -> dict[str, dict[int, float]]:
    """A log file stands alone. In a run folder metrics.jsonl completes log.txt, and has more digits."""
    if not path.exists():
        raise FileNotFoundError(f"no run folder or log file {path}")
    files = [path] if path.is_file() else [path / "log.txt", path / "metrics.jsonl", path / "hellaswag_results.jsonl"]
    if not any(file.exists() for file in files[:2]):
        raise FileNotFoundError(f"{path} is not a run folder: it has neither log.txt nor metrics.jsonl")
    series = {}
    for step, name, value in (row for file in files if file.exists() for row in read_rows(file)):
        if isinstance(value, int | float) and math.isfinite(value):
            series.setdefault(OTHER_NAMES.get(name, name), {})[step] = value
    if not {"loss", "val"} & series.keys():
        raise ValueError(f"{path} holds no losses: it is empty, or no line reads 'step train value' or 'step val value'")
    return series


def read_rows(path: Path) -> Iterator[tuple[int, str, object]]:
    """(step, name, value) of each line, or of each entry in the objects of a jsonl file."""
    for line in path.read_text("utf-8", "replace").splitlines(keepends=True):
        try:
            if path.suffix == ".jsonl":
                record = json.loads(line)
                step = int(record["step"])
                yield from ((step, name, value) for name, value in record.items())
            elif line.endswith("\n"):  # else a crash may have cut digits off
                step, name, value = line.split()
                yield int(step), name, float(value)
        except (ValueError, KeyError, TypeError):  # cut off, or about something else than a step
            continue


def read_source(path: Path) -> str | None:
    try:
        return json.loads((folder_of(path) / "config.json").read_text())["data"]["source"]
    except (OSError, ValueError, KeyError, TypeError):  # another project's run
        return None


def folder_of(path: Path) -> Path:
    return path.parent if path.is_file() else path


def having(runs: list[Run], key: str) -> list[Run]:
    return [run for run in runs if key in run.series]


def save(path: Path, runs: list[Run], *panels):
    figure = Figure((4 + 4 * len(panels), 5), layout="constrained")
    for ax, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        draw(ax, runs)
    with write_whole(path) as file:
        figure.savefig(file, format="png", dpi=150)
    say(path)


def draw_training_loss(ax: Axes, runs: list[Run]):
    draw_curves(ax, runs, "loss", smooth=True)
    finish_losses(ax, "Training loss (faint: each step, strong: moving average)")


def draw_validation_loss(ax: Axes, runs: list[Run], size: str):
    draw_curves(ax, runs, "val", "{name}: {last:.4f} at step {step:,}")
    if size in OPENAI_LOSS and any(run.source == "fineweb-edu" for run in having(runs, "val")):
        draw_reference(ax, OPENAI_LOSS[size], "--", f"OpenAI GPT-2 {size}: {OPENAI_LOSS[size]}")
    finish_losses(ax, "Validation loss")


def draw_losses(ax: Axes, runs: list[Run], size: str):
    for run in having(runs, "loss"):
        ax.plot(*run.curve("loss"), color=run.color, lw=0.5, alpha=0.4, label=None if "val" in run.series else run.name)
    draw_validation_loss(ax, runs, size)
    ax.set_title("Training loss (faint) and validation loss")


def draw_hellaswag(ax: Axes, runs: list[Run], size: str):
    if not having(runs, "hella"):
        ax.text(0.5, 0.5, "no HellaSwag results in this run", color="grey", ha="center", transform=ax.transAxes)
        return ax.set(xticks=[], yticks=[])
    draw_curves(ax, runs, "hella", "{name}: {last:.1%} at step {step:,}")
    for model, linestyle in (("GPT-3", "-."), ("GPT-2", "--")):
        draw_reference(ax, HELLASWAG[model][size], linestyle, f"OpenAI {model} {size}: {HELLASWAG[model][size]:.1%}")
    draw_reference(ax, 0.25, ":", "chance: 25%")
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    finish(ax, "HellaSwag accuracy", "accuracy (acc_norm)")


def draw_learning_rate(ax: Axes, runs: list[Run]):
    draw_curves(ax, runs, "lr")
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    finish(ax, "Learning rate", "learning rate")


def draw_throughput(ax: Axes, runs: list[Run]):
    """tokens/s, and on the right what share of the device's peak that is for the first run that knows it."""
    draw_curves(ax, runs, "tokens_per_sec", "{name}: median {median:,.0f} tokens/s", smooth=True)
    for run in having(runs, "mfu")[:1]:
        share = np.median(run.curve("mfu")[1]) / np.median(run.curve("tokens_per_sec")[1])
        right = ax.secondary_yaxis("right", functions=(lambda rate: rate * share, lambda mfu: mfu / share))
        right.set_ylabel(f"MFU of {run.name}")
        right.yaxis.set_major_formatter(PercentFormatter(1))
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    finish(ax, "Throughput (faint: each step, strong: moving average)", "tokens/s")


def draw_grad_norm(ax: Axes, runs: list[Run]):
    draw_curves(ax, runs, "grad_norm", smooth=True)
    use_log_scale(ax)
    finish(ax, "Gradient norm (faint: each step, strong: moving average)", "gradient norm before clipping")


def draw_curves(ax: Axes, runs: list[Run], key: str, label: str = "{name}", smooth: bool = False):
    for run in having(runs, key):
        steps, values = run.curve(key)
        text = label.format(name=run.name, step=steps[-1], last=values[-1], median=np.median(values))
        if smooth:
            ax.plot(steps, values, color=run.color, lw=0.5, alpha=0.3)
            values = moving_average(values)
        ax.plot(steps, values, color=run.color, lw=1.5, label=text, marker="." if len(steps) < 50 else None)


def draw_reference(ax: Axes, value: float, linestyle: str, label: str):
    ax.axhline(value, color="grey", lw=1, ls=linestyle, label=label)


def moving_average(values: np.ndarray) -> np.ndarray:
    """Exponential, over 1/400 of the run; its start is not drawn towards zero (as in Adam)."""
    weight = 1 / max(4, len(values) / 400)
    sums = np.zeros(len(values) + 1)
    for i, value in enumerate(values):
        sums[i + 1] = (1 - weight) * sums[i] + weight * value
    return sums[1:] / (1 - (1 - weight) ** np.arange(1, len(sums)))


def finish_losses(ax: Axes, title: str):
    """Let a long run's first steps and spikes leave the picture rather than flatten the rest, and say so."""
    curves = [np.array(line.get_ydata()) for line in ax.lines]
    low, high = min(map(np.min, curves)), max(map(np.max, curves))
    top = max(np.quantile(curve, 0.98, method="higher") for curve in curves)
    margin = 0.05 * (top - low) or 0.1
    ax.set_ylim(max(low - margin, 0.9 * low), top + margin)
    if high > top + margin:
        ax.plot([], [], " ", label=f"(above the picture: up to {high:.2f})")
    use_log_scale(ax)
    finish(ax, title, "loss (nats per token)")


def use_log_scale(ax: Axes):
    """Ticks at 3.2, 3.4, ... within a decade, at 1, 2, 5, 10, ... over several; none at 3x10^0."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(AutoLocator() if high < 10 * low else LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def finish(ax: Axes, title: str, ylabel: str):
    ax.set(title=title, xlabel="step", ylabel=ylabel)
    ax.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10], integer=True))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.grid(alpha=0.3)
    ax.legend(framealpha=1)


if __name__ == "__main__":
    cli(Config, main, __doc__)
