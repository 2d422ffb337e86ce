"""AdamW against Muon: how many tokens does each need for the same validation loss?

    # GPT-2 (124M): 24 runs of up to 262M tokens each, as many at the same time as there are GPUs
    python -m experiments.optimizer_study

    # at small scale
    python -m experiments.optimizer_study --data_dir datasets/corpus_4096 --n_layer 4 --n_head 4 \\
        --n_embd 128 --B 16 --T 128 --total_batch_size 2048 --max_steps 800 --warmup_steps 80 \\
        --learning_rates 1e-3 2e-3 4e-3 8e-3 1.6e-2 --val_tokens 65536

Three rounds of train_gpt2.py, all with the same data, schedule and seeds:

    sweep     both optimizers for max_steps at every learning rate, with the first seed. The best
              rate is the one with the lowest final loss.
    target    AdamW at its best rate with every seed. The mean of the final losses is the target
              for Muon.
    fractions Muon at its best rate with every seed, for fractions of these steps. Each run has a
              complete schedule: one that is cut off while its learning rate is still high would
              look worse than it is.

The tokens that Muon needs are where its mean final loss crosses the target, interpolated linearly
over the logarithm of the tokens. Tokens/s are those of the median step. If a best rate is at the
end of the grid, a better one may lie outside: widen the grid.

An interrupted study resumes when the command is repeated. More learning rates, seeds or fractions
add runs. Output: report.md, results.json, a plot and the logs of the runs in log/optimizer_study/.
The runs' checkpoints are removed.
"""

import itertools
import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import common.before_torch

from common.console import UserError, check_at_least, parse_flags, run_script, table
from experiments.flags import SweepConfig, check_different


@dataclass
class Config(SweepConfig):
    out_dir: str = "log/optimizer_study"  # folder for the report, results.json, plot and runs
    # peak learning rates; each decays to a tenth
    learning_rates: tuple[float, ...] = (3e-4, 6e-4, 1.2e-3, 2.4e-3, 4.8e-3)
    # training lengths of Muon, as fractions of max_steps
    step_fractions: tuple[float, ...] = (0.25, 0.35, 0.45, 0.6)
    warmup_steps: int = 200  # steps of linear warmup; proportionally fewer in shorter runs
    val_every: int = 100  # steps between validation losses

    def __post_init__(self):
        super().__post_init__()
        check_different(self, "step_fractions")
        check_at_least(self, 1, "val_every")
        check_at_least(self, 0, "warmup_steps")
        if min(self.step_fractions) <= 0 or max(self.step_fractions) > 1:
            raise UserError(
                f"step_fractions is {self.step_fractions}: give values above 0 and at most 1"
            )


if __name__ == "__main__":
    config = parse_flags(Config, __doc__)  # before the slow imports: --help answers at once

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.optim import Diverged
from common.shards import shards_fingerprint, shards_tokenizer
from experiments.sweep import (
    Run,
    StudyFolder,
    finish_axes,
    mean_and_deviation,
    read_stream,
    settings_of,
    start,
    train_run,
)

# The optimizers that are compared, as they are drawn
COLORS = {"adamw": "tab:blue", "muon": "tab:orange"}


class Point(NamedTuple):
    """The settings by which one run differs from the others."""

    optimizer: str
    lr: float
    fraction: float  # of max_steps
    seed: int

    @property
    def name(self) -> str:
        return f"{self.optimizer}_lr_{self.lr:g}_fraction_{self.fraction:g}_seed_{self.seed}"


def main(config: Config):
    """Find each optimizer's best learning rate, train at it, and report."""
    rt = start(config)
    shards_tokenizer(config.data_dir)  # fail here, rather than in the first run

    # Values that may be added later are part of the runs' names, and no settings.
    settings = settings_of(
        config,
        rt,
        may_change=["learning_rates", "seeds", "step_fractions"],
        data=shards_fingerprint(config.data_dir),
    )
    study = StudyFolder(config.out_dir, settings)

    # Find the best learning rate of each optimizer.
    sweep = itertools.product(COLORS, config.learning_rates, [1.0], config.seeds[:1])
    run_points(config, study, sweep, "sweep")
    best = {optimizer: best_rate(config, study, optimizer) for optimizer in COLORS}

    # Train AdamW to the end, and Muon for fractions of the steps. The first seed of AdamW is known
    # from the sweep, and is not trained again.
    target = itertools.product(["adamw"], [best["adamw"]], [1.0], config.seeds)
    fractions = itertools.product(["muon"], [best["muon"]], config.step_fractions, config.seeds)
    run_points(config, study, [*target, *fractions], "fractions")
    summarize(config, study, best)


def run_points(config: Config, study: StudyFolder, points: Iterable[tuple], desc: str):
    """Train the runs of these points that have no result yet."""
    runs = [make_run(config, Point(*values)) for values in points]
    study.run_all(runs, read_run, config.device, config.num_parallel, desc)


def make_run(config: Config, point: Point) -> Run:
    """The training run of a point."""
    return train_run(
        config,
        point.name,
        config.data_dir,
        T=config.T,
        total_batch_size=config.total_batch_size,
        max_lr=point.lr,
        seed=point.seed,
        optimizer=point.optimizer,
        # A shorter run has the whole schedule: it is warmup and decay that shrink.
        max_steps=round(point.fraction * config.max_steps),
        warmup_steps=round(point.fraction * config.warmup_steps),
        val_every=config.val_every,
        val_tokens=config.val_tokens,
        # Only logs are read. (A run that is stopped still saves a checkpoint to resume from.)
        checkpoint_every=0,
        rolling_every=0,
    )


def read_run(run: Run, diverged: Diverged | None) -> dict:
    """The result of a run.

    val    final validation loss; None if the run diverged
    steps  the steps at which the validation loss was measured
    vals   the validation loss at each
    ms     milliseconds of the median step; None if the first one diverged
    """
    # metrics.jsonl has an object per training step, and others for evaluations.
    steps, vals = read_stream(run.folder, "val")
    metrics = (run.folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in metrics]
    step_times = [record["ms"] for record in records if "ms" in record]
    return dict(
        val=None if diverged else vals[-1],
        steps=steps,
        vals=vals,
        ms=statistics.median(step_times) if step_times else None,
    )


def final_loss(study: StudyFolder, point: Point) -> float:
    """Final validation loss of a run; infinite if it diverged, so that it is never the best."""
    loss = study.results[point.name]["val"]
    return math.inf if loss is None else loss


def sweep_losses(config: Config, study: StudyFolder, optimizer: str) -> dict[float, float]:
    """Final loss of the first seed at each learning rate, in increasing order."""
    return {
        lr: final_loss(study, Point(optimizer, lr, 1.0, config.seeds[0]))
        for lr in sorted(config.learning_rates)
    }


def best_rate(config: Config, study: StudyFolder, optimizer: str) -> float:
    """The learning rate with the lowest final loss. Raises UserError if all of them diverged."""
    losses = sweep_losses(config, study, optimizer)
    best = min(losses, key=lambda lr: losses[lr])
    if losses[best] == math.inf:
        raise UserError(f"{optimizer} diverged at every learning rate: give smaller ones")
    return best


def final_losses(
    config: Config, study: StudyFolder, optimizer: str, lr: float, fraction: float
) -> list[float]:
    """The final loss of each seed."""
    points = [Point(optimizer, lr, fraction, seed) for seed in config.seeds]
    return [final_loss(study, point) for point in points]


def needed_fraction(fractions: list[float], losses: list[float], target: float) -> str:
    """The fraction of the tokens at which the loss falls to the target.

    Between two measured fractions, the loss is a straight line over the fraction's logarithm.
    """
    # Find the first fraction whose loss is low enough.
    for n, (fraction, loss) in enumerate(zip(fractions, losses)):
        if loss > target:
            continue
        if n == 0:
            return f"at most {fraction:.2f}"
        # Between this fraction and the one before, the target is reached.
        before = fractions[n - 1]
        # On a straight line, half of the way in loss is half of the way in the logarithm.
        way = (losses[n - 1] - target) / (losses[n - 1] - loss)  # 0 at `before`, 1 at `fraction`
        return f"{before * (fraction / before) ** way:.2f}"
    # Even the longest run did not reach the target.
    return f"more than {fractions[-1]:.2f}"


def tokens_per_second(config: Config, study: StudyFolder, optimizer: str) -> float:
    """Of the median run's median step."""
    # All runs of the optimizer, also those at other rates: a step costs the same.
    runs = [result for name, result in study.results.items() if name.startswith(f"{optimizer}_lr_")]
    step_times = [run["ms"] for run in runs if run["ms"] is not None]
    return config.total_batch_size / statistics.median(step_times) * 1000


# ---------------------------------------------------------------------------------------------
# Report


def summarize(config: Config, study: StudyFolder, best: dict[str, float]):
    """Write the report and the plot."""
    # The sweep: a row per learning rate
    sweep = {optimizer: sweep_losses(config, study, optimizer) for optimizer in COLORS}
    rates = sorted(config.learning_rates)
    sweep_rows = []
    for lr in rates:
        cells = [f"{sweep[optimizer][lr]:.4f}" for optimizer in COLORS]
        sweep_rows.append((f"{lr:g}", *cells))
    # If the first or the last rate of the grid is the best, a better one may lie outside.
    at_edge = [optimizer for optimizer in COLORS if best[optimizer] in (rates[0], rates[-1])]

    # The best rates: AdamW's final loss, and Muon's for each fraction
    adamw_losses = final_losses(config, study, "adamw", best["adamw"], 1.0)
    target = float(np.mean(adamw_losses))
    rows = [("adamw", "1.00", mean_and_deviation(adamw_losses, 4))]
    fractions = sorted(config.step_fractions)
    muon_means = []
    for fraction in fractions:
        losses = final_losses(config, study, "muon", best["muon"], fraction)
        rows.append(("muon", f"{fraction:.2f}", mean_and_deviation(losses, 4)))
        muon_means.append(float(np.mean(losses)))
    needed = needed_fraction(fractions, muon_means, target)
    speed = {optimizer: tokens_per_second(config, study, optimizer) for optimizer in COLORS}

    study.report(
        f"{config.n_layer} layers of width {config.n_embd}, {config.max_steps} steps of "
        f"{config.total_batch_size} tokens; validation loss in nats",
        table(("learning rate", *COLORS), sweep_rows),
        *[f"{name}'s best learning rate is at the end of the grid: widen it" for name in at_edge],
        f"At the best rates, mean and standard deviation of {len(config.seeds)} seeds:",
        table(("optimizer", "fraction of the tokens", "final loss"), rows),
        f"Muon needs {needed} of AdamW's tokens to reach its loss of {target:.4f}. It trains at "
        f"{speed['muon'] / speed['adamw']:.3f} of AdamW's tokens/s "
        f"({speed['muon']:,.0f} and {speed['adamw']:,.0f}).",
    )
    draw(config, study, best, target)


def draw(config: Config, study: StudyFolder, best: dict[str, float], target: float):
    """The sweep, the curves at the best rates, and Muon's loss by training length."""
    figure = Figure((16, 5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    draw_sweep(left, config, study)
    draw_curves(middle, config, study, best)
    draw_fractions(right, config, study, best)
    for ax in (left, middle, right):
        # Where Muon's curves cross this line, it has reached AdamW.
        ax.axhline(target, color="grey", ls=":", label="AdamW's final loss, mean")
        ax.set_ylabel("validation loss (nats)")
    finish_axes(left, middle, right)
    study.save_plot("optimizers.png", figure)


def draw_sweep(ax: Axes, config: Config, study: StudyFolder):
    """Final loss of each optimizer by learning rate."""
    for optimizer, color in COLORS.items():
        # Rates that diverged have an infinite loss, which is not drawn.
        losses = sweep_losses(config, study, optimizer)
        ax.plot(losses.keys(), losses.values(), marker="o", color=color, label=optimizer)
    ax.set(xscale="log", xlabel="peak learning rate", title="Sweep: all tokens, one seed")


def draw_curves(ax: Axes, config: Config, study: StudyFolder, best: dict[str, float]):
    """Validation loss during training: AdamW's full runs, and Muon's shorter ones."""
    lowest = math.inf
    for optimizer, color in COLORS.items():
        # The lengths that were trained with every seed
        fractions = [1.0] if optimizer == "adamw" else sorted(config.step_fractions)
        # All curves of an optimizer share one entry in the legend.
        label: str | None = optimizer
        for fraction, seed in itertools.product(fractions, config.seeds):
            result = study.results[Point(optimizer, best[optimizer], fraction, seed).name]
            # Over tokens, curves of different lengths can share an axis.
            tokens = np.array(result["steps"]) * config.total_batch_size / 1e6
            ax.plot(tokens, result["vals"], color=color, lw=0.8, alpha=0.8, label=label)
            lowest = min(lowest, *result["vals"])
            label = None
    ax.set(xlabel="million tokens", title="Best rates, all seeds; Muon with shorter schedules")
    # Cut off the first steps, whose high loss would flatten the differences at the end.
    ax.set_ylim(lowest - 0.05, lowest + 1.5)


def draw_fractions(ax: Axes, config: Config, study: StudyFolder, best: dict[str, float]):
    """Muon's final loss by training length, a line per seed."""
    fractions = sorted(config.step_fractions)
    # One line per seed shows how much the crossing depends on the seed.
    for seed in config.seeds:
        points = [Point("muon", best["muon"], fraction, seed) for fraction in fractions]
        losses = [final_loss(study, point) for point in points]
        label = f"muon, seed {seed}"
        ax.plot(fractions, losses, marker="o", color=COLORS["muon"], lw=0.8, label=label)
    ax.set(xlabel="fraction of AdamW's tokens", title="What Muon needs")


if __name__ == "__main__":
    run_script(main, config)
