"""Draw the logs of one run, or of several runs in the same axes.

    python plot.py                                           # log/
    python plot.py log other_run --out_dir pictures          # compare two runs
    python plot.py build-nanogpt/log/log.txt --size 124M     # a single log file of another project

Logs of other projects may be build-nanogpt's log.txt, llm.c's main.log, transformers'
trainer_state.json, or what nanoGPT, build-nanogpt and llm.c print, saved to a file.

A picture is drawn if the logs hold data for it: losses, learning rate, throughput, gradient norm,
and each benchmark that was evaluated during training. log_plot.png shows the losses and the
benchmarks side by side. Grey lines are the figures published for OpenAI's models.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, cycle
from pathlib import Path
from typing import Literal

import tyro

from common.console import UserError, parse_flags, run_script, say, write_atomically


@dataclass
class Config:
    runs: tyro.conf.Positional[tuple[str, ...]] = ("log",)  # run folders, or log files
    out_dir: str | None = None  # folder for the pictures; None = the first run's folder
    # size of OpenAI's models to compare with
    size: Literal["124M", "350M", "774M", "1558M"] = "124M"


if __name__ == "__main__":
    config = parse_flags(Config, __doc__)  # before the slow imports: --help answers at once

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot, drawing needs no display
from matplotlib.ticker import AutoLocator, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from common.logs import read_points
from common.published import PARAMETERS, REFERENCES, Reference

# The logs in a run folder: ours, llm.c's and transformers'.
LOG_FILES = ("log.txt", "metrics.jsonl", "main.log", "trainer_state.json")
# Models to compare with: OpenAI's GPT-2 and the GPT-3 closest in size.
SIZES = {
    "124M": ("gpt2", "gpt3-small"),
    "350M": ("gpt2-medium", "gpt3-medium"),
    "774M": ("gpt2-large", "gpt3-large"),
    "1558M": ("gpt2-xl", "gpt3-xl"),
}
# Okabe and Ito's palette, whose colors color-blind people can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


@dataclass
class Run:
    """The logs of one run, and how it is drawn."""

    folder: Path
    name: str
    color: str
    series: dict[str, tuple[np.ndarray, np.ndarray]]  # loss, val, lr, ... -> steps and values
    source: str | None = None  # of the training data, if config.json says so


# Draws one picture, or one panel of a picture.
Draw = Callable[[Axes, list[Run]], None]


def main(config: Config):
    """Read the logs, and draw every picture that they hold data for."""
    runs = read_runs(config.runs)
    out_dir = Path(config.out_dir or runs[0].folder)
    out_dir.mkdir(parents=True, exist_ok=True)
    benchmarks = benchmark_pictures(runs, config.size)
    # File name -> the series that the picture needs, and the function that draws it
    pictures: dict[str, tuple[str, Draw]] = {
        "training_loss": ("loss", draw_training_loss),
        "validation_loss": ("val", partial(draw_validation_loss, size=config.size)),
        "learning_rate": ("lr", draw_learning_rate),
        "throughput": ("tokens_per_sec", draw_throughput),
        "grad_norm": ("grad_norm", draw_grad_norm),
    }
    # One file per picture, and log_plot.png with the most important ones side by side.
    for name, (key, draw) in pictures.items():
        if runs_with(key, runs):
            save(out_dir / f"{name}.png", runs, draw)
    for name, draw in benchmarks.items():
        save(out_dir / f"{name}.png", runs, draw)
    losses = partial(draw_losses, size=config.size)
    save(out_dir / "log_plot.png", runs, losses, *benchmarks.values())


def benchmark_pictures(runs: list[Run], size: str) -> dict[str, Draw]:
    """A picture for each benchmark that some run has results of, by file name."""
    pictures: dict[str, Draw] = {}
    for name, reference in REFERENCES.items():
        # The validation loss has a picture of its own.
        if name != "val" and runs_with(reference.stream, runs):
            file_name = f"{name}_accuracy" if reference.as_percent else name
            pictures[file_name] = partial(draw_benchmark, reference=reference, size=size)
    return pictures


def runs_with(key: str, runs: list[Run]) -> list[Run]:
    """The runs that have logged a series."""
    return [run for run in runs if key in run.series]


# ---------------------------------------------------------------------------------------------
# Reading logs


def read_runs(names: tuple[str, ...]) -> list[Run]:
    """The runs of the command line, each with a name and a color of its own."""
    paths = list(dict.fromkeys(map(Path, names)))  # without repetitions
    # A log file alone gets its name from its folder, where its config.json may lie, too.
    folders = [path.parent if path.is_file() else path for path in paths]
    folder_names = [folder.resolve().name for folder in folders]
    runs = []
    for path, folder, name, color in zip(paths, folders, folder_names, cycle(COLORS)):
        # Folders of the same name, such as a/log and b/log, are told apart by their paths.
        if folder_names.count(name) > 1:
            name = str(path)
        runs.append(Run(folder, name, color, read_series(path), read_source(folder)))
    return runs


def read_series(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """All series of a run folder, or of a log file alone: name -> steps and values.

    In a folder, later files overwrite the same step of earlier ones: they have more digits.
    """
    files = [path]
    if not path.is_file():
        files = [path / name for name in LOG_FILES]
        if not any(file.exists() for file in files):
            raise FileNotFoundError(
                f"no log at {path}: it is neither a file nor a folder with one of "
                f"{', '.join(LOG_FILES)}"
            )
        files.append(path / "hellaswag_results.jsonl")

    points = {}  # name -> step -> value
    for file in files:
        for step, name, value in read_points(file):
            points.setdefault(name, {})[step] = value
    if "loss" not in points and "val" not in points:
        raise UserError(
            f"{path} holds no losses: it is empty, or no log of the kinds that plot.py reads; see "
            "--help"
        )

    # Arrays in the order of the steps, which may come from several files.
    series = {}
    for name, by_step in points.items():
        steps = sorted(by_step)
        series[name] = (np.array(steps), np.array([by_step[step] for step in steps]))
    return series


def read_source(folder: Path) -> str | None:
    """Where the training data is from, for example "fineweb-edu".

    None if it is not known, or if losses are not comparable, because another tokenizer was used.
    """
    try:
        data = json.loads((folder / "config.json").read_text())["data"]
        return data["source"] if data.get("tokenizer", "gpt2") == "gpt2" else None
    except (OSError, ValueError, KeyError, TypeError):  # another project's run
        return None


# ---------------------------------------------------------------------------------------------
# Pictures


def save(path: Path, runs: list[Run], *panels: Draw):
    """Write a picture of one or several panels side by side."""
    # 8 inches wide for one panel, 4 more for each further one
    figure = Figure((4 + 4 * len(panels), 5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, draw in zip(axes, panels):
        draw(ax, runs)
    with write_atomically(path) as file:
        figure.savefig(file, format="png", dpi=150)
    say(path)


def draw_training_loss(ax: Axes, runs: list[Run]):
    """The training loss of each run, with its moving average."""
    draw_curves(ax, runs, "loss", smooth=True)
    finish_losses(ax, "Training loss (faint: each step, strong: moving average)")


def draw_validation_loss(ax: Axes, runs: list[Run], size: str):
    """The validation loss of each run, next to OpenAI's if the data is the same."""
    draw_curves(ax, runs, "val", "{name}: {last:.4f} at step {step:,}")
    # The published loss is comparable only on the same data.
    if any(run.source == "fineweb-edu" for run in runs_with("val", runs)):
        draw_published(ax, REFERENCES["val"], size)
    finish_losses(ax, "Validation loss")


def draw_losses(ax: Axes, runs: list[Run], size: str):
    """Both losses in one picture. Without a validation loss, the training loss alone."""
    if not runs_with("val", runs):
        draw_training_loss(ax, runs)
        return
    # The training loss is too noisy for a label, if the run also has a validation loss.
    for run in runs_with("loss", runs):
        label = None if "val" in run.series else run.name
        ax.plot(*run.series["loss"], color=run.color, lw=0.5, alpha=0.4, label=label)
    draw_validation_loss(ax, runs, size)
    ax.set_title("Training loss (faint) and validation loss")


def draw_benchmark(ax: Axes, runs: list[Run], reference: Reference, size: str):
    """The headline metric of a benchmark over the steps."""
    # draw_curves fills in name, last and step, hence the doubled braces.
    last = "{last:.1%}" if reference.as_percent else "{last:.4f}"
    draw_curves(ax, runs, reference.stream, f"{{name}}: {last} at step {{step:,}}")
    draw_published(ax, reference, size)

    if reference.chance is not None:
        label = f"chance: {reference.chance:.0%}"
        ax.axhline(reference.chance, color="grey", ls=":", label=label)

    title = f"{reference.title} accuracy" if reference.as_percent else reference.title
    finish(ax, title, reference.headline)
    if reference.as_percent:
        ax.yaxis.set_major_formatter("{x:.0%}")


def draw_published(ax: Axes, reference: Reference, size: str):
    """Horizontal lines at the published figures of OpenAI's models of this size."""
    gpt2, gpt3 = SIZES[size]
    for model, family, style in ((gpt3, "GPT-3", "-."), (gpt2, "GPT-2", "--")):
        # Not every model has a published figure for every benchmark.
        figure = reference.published(reference.headline, model)
        if figure is not None:
            text = f"{figure:.1%}" if reference.as_percent else f"{figure:.4f}"
            label = f"OpenAI {family} {PARAMETERS[model] / 1e6:.0f}M: {text}"
            ax.axhline(figure, color="grey", ls=style, label=label)


def draw_learning_rate(ax: Axes, runs: list[Run]):
    """The learning rate of each run."""
    draw_curves(ax, runs, "lr")
    ax.set_ylim(bottom=0)
    finish(ax, "Learning rate", "learning rate")


def draw_throughput(ax: Axes, runs: list[Run]):
    """Tokens/s of each run, and the MFU on an axis at the right."""
    draw_curves(ax, runs, "tokens_per_sec", "{name}: median {median:,.0f} tokens/s", smooth=True)
    ax.set_ylim(bottom=0)
    finish(ax, "Throughput (faint: each step, strong: moving average)", "tokens/s")
    # A second axis on the right shows the same throughput as a share of the device's peak, if both
    # are known and not zero.
    for run in runs_with("mfu", runs_with("tokens_per_sec", runs)):
        mfu = np.median(run.series["mfu"][1])
        rate = np.median(run.series["tokens_per_sec"][1])
        if mfu > 0 and rate > 0:
            break
    else:
        return

    # The two are proportional, so one factor converts an axis into the other.
    mfu_per_rate = mfu / rate
    functions = (lambda rate: rate * mfu_per_rate, lambda mfu: mfu / mfu_per_rate)  # and back
    right = ax.secondary_yaxis("right", functions=functions)
    right.yaxis.set(label_text=f"MFU of run {run.name}", major_formatter=PercentFormatter(1))


def draw_grad_norm(ax: Axes, runs: list[Run]):
    """The gradient norm of each run, on a logarithmic axis if possible."""
    draw_curves(ax, runs, "grad_norm", smooth=True)
    # An axis of zeros alone cannot be logarithmic.
    if any((run.series["grad_norm"][1] > 0).any() for run in runs_with("grad_norm", runs)):
        ax.set_yscale("log")
    title = "Gradient norm (faint: each step, strong: moving average)"
    finish(ax, title, "gradient norm before clipping")


# ---------------------------------------------------------------------------------------------
# Parts of pictures


def draw_curves(ax: Axes, runs: list[Run], key: str, label: str = "{name}", smooth: bool = False):
    """The series `key` of each run that has it. `label` may use name, step, last and median."""
    for run in runs_with(key, runs):
        steps, values = run.series[key]
        text = label.format(
            name=run.name, step=steps[-1], last=values[-1], median=np.median(values)
        )
        if smooth:
            ax.plot(steps, values, color=run.color, lw=0.5, alpha=0.3)
            values = moving_average(values)
        # A few points, or a single one, would hardly be visible as a line.
        marker = "." if len(steps) < 50 else None
        ax.plot(steps, values, color=run.color, lw=1.5, label=text, marker=marker)


def moving_average(values: np.ndarray) -> np.ndarray:
    """Exponential moving average over about sqrt(len(values)) / 3 steps.

    It starts from 0, and is divided by the sum of the weights so far to undo that, as in Adam.
    """
    # The weight of the newest value. Longer runs are smoothed over more steps.
    weight = min(1, 3 / len(values) ** 0.5)
    averages = list(
        accumulate(values, lambda average, value: average + weight * (value - average), initial=0.0)
    )
    return averages[1:] / (1 - (1 - weight) ** np.arange(1, len(averages)))


def finish_losses(ax: Axes, title: str):
    """Cut off the first steps and the spikes of a long run, which would flatten the rest.

    The legend says how high they reach.
    """
    # Each curve shows at least 98% of its points.
    curves = [np.array(line.get_ydata()) for line in ax.lines]
    low = min(map(np.min, curves))
    high = max(map(np.max, curves))
    top = max(np.quantile(curve, 0.98, method="higher") for curve in curves)

    # Room above and below the curves: 5% of their range, or a little if they are flat.
    margin = max(0.05 * (top - low), 0.002 * abs(top)) or 0.1
    if high > top + margin:
        ax.plot([], [], " ", label=f"(above the picture: up to {high:.2f})")
    if low > 0:
        ax.set(yscale="log", ylim=(max(low - margin, 0.9 * low), top + margin))
    else:  # which a logarithmic axis cannot show
        ax.set_ylim(low - margin, top + margin)
    finish(ax, title, "loss (nats per token)")


def finish(ax: Axes, title: str, ylabel: str):
    """Title, labels, ticks, grid and legend."""
    ax.set(title=title, xlabel="step", ylabel=ylabel)
    # Steps are integers: 10,000 and not 1e4.
    ax.xaxis.set(
        major_locator=MaxNLocator(steps=(1, 2, 5), integer=True, min_n_ticks=1),
        major_formatter="{x:,.10g}",
    )
    if ax.get_yscale() == "log":
        # Ticks at powers of ten would be too few: within a decade, place them as on a linear axis.
        decades = np.ptp(np.log10(ax.get_ylim()))
        ax.yaxis.set_major_locator(AutoLocator() if decades < 1 else LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter("{x:,.10g}")  # 10,000 and 0.0006 and 3.5, not 3.5x10^0
    ax.grid(alpha=0.3)
    ax.legend(framealpha=1)


if __name__ == "__main__":
    run_script(main, config)
