"""Logs -> pictures, from one run or several side by side.

    python plot.py                                           # log/
    python plot.py log other_run --out_dir pictures          # both runs in the same axes
    python plot.py build-nanogpt/log/log.txt --size 124M     # a log.txt alone, another project's too

Each picture is drawn if the logs hold something for it.
"""

import json
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, cycle
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # drawn without pyplot, so without a display
from matplotlib.ticker import AutoLocator, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from common.console import UserError, cli, say, write_atomically

OTHER_NAMES = {
    "train": "loss",
    "acc_norm": "hella",
}  # log.txt's and hellaswag_results.jsonl's for metrics.jsonl's
OPENAI_LOSS = {"124M": 3.2924}  # of OpenAI's GPT-2 on the validation shard of FineWeb-Edu
GPT2_HELLASWAG = {"124M": 0.294463, "350M": 0.375224, "774M": 0.431986, "1558M": 0.488946}
GPT3_HELLASWAG = {"124M": 0.337, "350M": 0.436, "774M": 0.510, "1558M": 0.547}
COLORS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)  # Okabe-Ito, for all eyes


@dataclass
class Config:
    runs: tyro.conf.Positional[tuple[str, ...]] = ("log",)  # run folders, or log.txt files
    out_dir: str | None = None  # where the pictures go; None = the first run's folder
    size: Literal["124M", "350M", "774M", "1558M"] = "124M"  # of OpenAI's models to compare with


@dataclass
class Run:
    folder: Path
    name: str
    color: str
    series: dict[str, tuple[np.ndarray, np.ndarray]]  # loss, val, hella, lr, ...: steps and values
    source: str | None = None  # of its data, where config.json says so


def main(config: Config):
    runs = read_runs(config.runs)
    out_dir = Path(config.out_dir or runs[0].folder)
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
    folders = [path.parent if path.is_file() else path for path in paths]
    ends = [folder.resolve().name for folder in folders]
    labels = [end if ends.count(end) == 1 else str(path) for end, path in zip(ends, paths)]
    return list(
        map(Run, folders, labels, cycle(COLORS), map(read_series, paths), map(read_source, folders))
    )


def read_series(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A log file stands alone. In a run folder metrics.jsonl completes log.txt, and has more digits."""
    files = (
        [path]
        if path.is_file()
        else [path / "log.txt", path / "metrics.jsonl", path / "hellaswag_results.jsonl"]
    )
    if not any(file.exists() for file in files[:2]):
        raise FileNotFoundError(
            f"no log at {path}: it is neither a file nor a folder with log.txt or metrics.jsonl"
        )
    lines = [
        line
        for file in files
        if file.exists()
        for line in file.read_text("utf-8", "replace").splitlines(True)
    ]
    points = {}
    for step, name, value in (entry for line in lines for entry in read_line(line)):
        if isinstance(value, int | float) and np.isfinite(value):
            points.setdefault(OTHER_NAMES.get(name, name), {})[step] = value
    if not {"loss", "val"} & points.keys():
        raise UserError(
            f"{path} holds no losses: it is empty, or its lines don't read 'step train value'"
        )
    return {
        key: tuple(map(np.array, zip(*sorted(by_step.items())))) for key, by_step in points.items()
    }


def read_line(line: str) -> list[tuple[int, str, object]]:
    """(step, name, value) of a line of log.txt, or of every entry of an object; nothing of other lines."""
    try:
        if line.startswith("{"):
            record = json.loads(line)
            return [(int(record["step"]), name, value) for name, value in record.items()]
        step, name, value = line.split()
        return (
            [(int(step), name, float(value))] if line.endswith("\n") else []
        )  # a crash may have cut digits off
    except (ValueError, KeyError, TypeError):
        return []


def read_source(folder: Path) -> str | None:
    try:
        data = json.loads((folder / "config.json").read_text())["data"]
        return (
            data["source"] if data.get("tokenizer", "gpt2") == "gpt2" else None
        )  # else its losses compare to nothing
    except (OSError, ValueError, KeyError, TypeError):  # another project's run
        return None


def having(runs: list[Run], key: str) -> list[Run]:
    return [run for run in runs if key in run.series]


def save(path: Path, runs: list[Run], *panels):
    figure = Figure((4 + 4 * len(panels), 5), layout="constrained")
    for ax, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        draw(ax, runs)
    with write_atomically(path) as file:
        figure.savefig(file, format="png", dpi=150)
    say(path)


def draw_training_loss(ax: Axes, runs: list[Run]):
    draw_curves(ax, runs, "loss", smooth=True)
    finish_losses(ax, "Training loss (faint: each step, strong: moving average)")


def draw_validation_loss(ax: Axes, runs: list[Run], size: str):
    draw_curves(ax, runs, "val", "{name}: {last:.4f} at step {step:,}")
    if size in OPENAI_LOSS and any(run.source == "fineweb-edu" for run in having(runs, "val")):
        ax.axhline(
            OPENAI_LOSS[size],
            color="grey",
            ls="--",
            label=f"OpenAI GPT-2 {size}: {OPENAI_LOSS[size]}",
        )
    finish_losses(ax, "Validation loss")


def draw_losses(ax: Axes, runs: list[Run], size: str):
    if not having(runs, "val"):
        return draw_training_loss(ax, runs)
    for run in having(runs, "loss"):
        label = None if "val" in run.series else run.name
        ax.plot(*run.series["loss"], color=run.color, lw=0.5, alpha=0.4, label=label)
    draw_validation_loss(ax, runs, size)
    ax.set_title("Training loss (faint) and validation loss")


def draw_hellaswag(ax: Axes, runs: list[Run], size: str):
    if not having(runs, "hella"):
        ax.text(
            0.5,
            0.5,
            "no HellaSwag results in this run",
            color="grey",
            ha="center",
            transform=ax.transAxes,
        )
        return ax.set(xticks=[], yticks=[])
    draw_curves(ax, runs, "hella", "{name}: {last:.1%} at step {step:,}")
    ax.axhline(
        GPT3_HELLASWAG[size],
        color="grey",
        ls="-.",
        label=f"OpenAI GPT-3 {size}: {GPT3_HELLASWAG[size]:.1%}",
    )
    ax.axhline(
        GPT2_HELLASWAG[size],
        color="grey",
        ls="--",
        label=f"OpenAI GPT-2 {size}: {GPT2_HELLASWAG[size]:.1%}",
    )
    ax.axhline(0.25, color="grey", ls=":", label="chance: 25%")
    finish(ax, "HellaSwag accuracy", "accuracy (acc_norm)")
    ax.yaxis.set_major_formatter("{x:.0%}")


def draw_learning_rate(ax: Axes, runs: list[Run]):
    draw_curves(ax, runs, "lr")
    ax.set_ylim(bottom=0)
    finish(ax, "Learning rate", "learning rate")


def draw_throughput(ax: Axes, runs: list[Run]):
    draw_curves(ax, runs, "tokens_per_sec", "{name}: median {median:,.0f} tokens/s", smooth=True)
    ax.set_ylim(bottom=0)
    finish(ax, "Throughput (faint: each step, strong: moving average)", "tokens/s")
    if having(
        runs, "mfu"
    ):  # then tokens/s on the left are a share of the device's peak on the right
        run = having(runs, "mfu")[0]
        share = np.median(run.series["mfu"][1]) / np.median(run.series["tokens_per_sec"][1])
        right = ax.secondary_yaxis(
            "right", functions=(lambda rate: rate * share, lambda mfu: mfu / share)
        )
        right.yaxis.set(label_text=f"MFU of run {run.name}", major_formatter=PercentFormatter(1))


def draw_grad_norm(ax: Axes, runs: list[Run]):
    draw_curves(ax, runs, "grad_norm", smooth=True)
    ax.set_yscale("log")
    finish(
        ax,
        "Gradient norm (faint: each step, strong: moving average)",
        "gradient norm before clipping",
    )


def draw_curves(ax: Axes, runs: list[Run], key: str, label: str = "{name}", smooth: bool = False):
    for run in having(runs, key):
        steps, values = run.series[key]
        text = label.format(
            name=run.name, step=steps[-1], last=values[-1], median=np.median(values)
        )
        if smooth:
            ax.plot(steps, values, color=run.color, lw=0.5, alpha=0.3)
            values = moving_average(values)
        ax.plot(
            steps,
            values,
            color=run.color,
            lw=1.5,
            label=text,
            marker="." if len(steps) < 50 else None,
        )


def moving_average(values: np.ndarray) -> np.ndarray:
    """Exponential, over some sqrt(steps) / 3 steps; its start is not drawn towards zero (as in Adam)."""
    weight = min(1, 3 / len(values) ** 0.5)
    averages = list(
        accumulate(values, lambda average, value: average + weight * (value - average), initial=0.0)
    )
    return averages[1:] / (1 - (1 - weight) ** np.arange(1, len(averages)))


def finish_losses(ax: Axes, title: str):
    """Let a long run's first steps and spikes leave the picture rather than flatten the rest, and say so."""
    curves = [np.array(line.get_ydata()) for line in ax.lines]
    low, high = min(map(np.min, curves)), max(map(np.max, curves))
    top = max(np.quantile(curve, 0.98, method="higher") for curve in curves)
    margin = max(0.05 * (top - low), 0.002 * top)
    if high > top + margin:
        ax.plot([], [], " ", label=f"(above the picture: up to {high:.2f})")
    ax.set(yscale="log", ylim=(max(low - margin, 0.9 * low), top + margin))
    finish(ax, title, "loss (nats per token)")


def finish(ax: Axes, title: str, ylabel: str):
    ax.set(title=title, xlabel="step", ylabel=ylabel)
    ax.xaxis.set(
        major_locator=MaxNLocator(steps=(1, 2, 5), integer=True, min_n_ticks=1),
        major_formatter="{x:,.10g}",
    )
    if ax.get_yscale() == "log":
        ax.yaxis.set_major_locator(
            AutoLocator() if np.ptp(np.log10(ax.get_ylim())) < 1 else LogLocator(subs=(1, 2, 5))
        )
        ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter("{x:,.10g}")  # 10,000 and 0.0006 and 3.5, not 3.5x10^0
    ax.grid(alpha=0.3)
    ax.legend(framealpha=1)


if __name__ == "__main__":
    cli(Config, main, __doc__)
