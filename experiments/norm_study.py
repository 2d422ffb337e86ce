"""Pre-LN against Post-LN: where does LayerNorm belong, and does Post-LN need warmup?

    # GPT-2 (124M): 48 runs of 262M tokens each, as many at the same time as there are GPUs
    python -m experiments.norm_study

    # at small scale, on the quickstart's data: 48 runs in 8 min on 2 cores
    python -m experiments.norm_study --data_dir datasets/pydoc --n_layer 4 --n_head 4 \\
        --n_embd 64 --B 8 --T 64 --total_batch_size 512 --max_steps 400 \\
        --warmup_steps_grid 0 100 --learning_rates 5e-4 1e-3 2e-3 4e-3 \\
        --gradients_every 100 --val_tokens 20000

train_gpt2.py trains both placements on the same data, with the same seeds and schedule, at several
learning rates, with and without warmup. Xiong et al. 2020 ("On Layer Normalization in the
Transformer Architecture") predict that with Post-LN the gradients near the output are much larger
at initialization, and that this is why it needs warmup. How to read the results:

    gradients    norms for the second matrix of each layer's MLP, the subject of the paper's
                 theorem 1. At initialization, the last layer's should not depend on the depth L
                 with Post-LN, and fall as 1 / sqrt(L) with Pre-LN. The theorem assumes Xavier's
                 initialization. The runs start from GPT-2's, where Post-LN has the *smaller*
                 gradients: a need for warmup then has other reasons than the paper's.
    diverged     a loss or a gradient was not finite, and train_gpt2.py stopped
    survived     no seed diverged, and each ended below the unigram loss, which is the loss of a
                 model that knows the frequency of each token and ignores the context. Post-LN
                 typically fails by never getting below it.
    spike        consecutive steps, after the first 20, whose training loss exceeds the median of
                 the 20 steps before by more than 6 robust standard deviations (1.4826 times the
                 median absolute deviation) and by more than 0.2 nats. Its size is the largest
                 excess.

An interrupted study resumes when the command is repeated. More learning rates or warmups add runs.
Output: report.md, results.json, plots and the logs of the runs in log/norm_study/. The runs'
checkpoints are removed once their gradients are measured.
"""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import common.before_torch

from common.console import Progress, check_at_least, parse_flags, run_script, table
from experiments.flags import SweepConfig, check_different


@dataclass
class Config(SweepConfig):
    out_dir: str = "log/norm_study"  # folder for the report, results.json, plots and runs
    warmup_steps_grid: tuple[int, ...] = (0, 200)  # steps of linear warmup to compare
    # layers of the untrained models whose gradients are measured
    depths: tuple[int, ...] = (2, 4, 8, 16, 32)
    gradients_every: int = 500  # steps between measurements of the gradients in training

    def __post_init__(self):
        super().__post_init__()
        check_different(self, "warmup_steps_grid", "depths")
        check_at_least(self, 1, "depths", "gradients_every")
        check_at_least(self, 0, "warmup_steps_grid")


if __name__ == "__main__":
    config = parse_flags(Config, __doc__)  # before the slow imports: --help answers at once

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from common import checkpoint
from common.optim import Diverged
from common.runtime import Runtime
from common.shards import open_shards, shards_fingerprint, shards_tokenizer
from experiments.sweep import (
    Run,
    StudyFolder,
    finish_axes,
    mean_and_deviation,
    read_stream,
    read_windows,
    settings_of,
    start,
    train_run,
)
from model import GPT, GPTConfig

# The placements and initializations that are compared, as they are drawn
PLACEMENT_COLORS = {"pre": "tab:blue", "post": "tab:orange"}
INIT_STYLES = {"gpt2": "-", "xavier": "--"}
# What counts as a spike: see the module's docstring.
SPIKE_WINDOW = 20  # steps
SPIKE_DEVIATIONS = 6
SPIKE_NATS = 0.2
GRADIENT_WINDOWS = 8  # sequences of validation tokens that gradients are measured on


class Point(NamedTuple):
    """The settings by which one run differs from the others."""

    placement: str  # of LayerNorm: pre or post
    lr: float
    warmup_steps: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.placement}_lr_{self.lr:g}_warmup_{self.warmup_steps}_seed_{self.seed}"


def main(config: Config):
    """Measure the gradients at initialization, train all runs, and report."""
    rt = start(config)
    enc = shards_tokenizer(config.data_dir)

    # All gradients, at initialization and in training, are measured on the same tokens.
    val = open_shards(config.data_dir, "val")
    x, y = read_windows(val, GRADIENT_WINDOWS, config.T)
    x, y = x.to(rt.device), y.to(rt.device)

    # Larger grids only add runs. With other data or a changed flag, the results would not compare.
    settings = settings_of(
        config,
        rt,
        may_change=["learning_rates", "warmup_steps_grid"],
        data=shards_fingerprint(config.data_dir),
    )
    study = StudyFolder(config.out_dir, settings)

    # Measure what needs no training.
    study.once("unigram_loss", lambda: unigram_loss(config, enc.n_vocab))
    shape = config.gpt_config(block_size=config.T, vocab_size=enc.n_vocab)
    study.once("gradients_at_init", lambda: gradients_at_init(config, shape, x, y, rt))

    # Train every combination of the compared values.
    def read(run: Run, diverged: Diverged | None) -> dict:
        return read_run(run.folder, diverged is not None, x, y, rt)

    grid = itertools.product(
        PLACEMENT_COLORS, config.learning_rates, config.warmup_steps_grid, config.seeds
    )
    runs = [make_run(config, Point(*values)) for values in grid]
    study.run_all(runs, read, config.device, config.num_parallel, "training")
    summarize(config, study)


# ---------------------------------------------------------------------------------------------
# Measurements


def unigram_loss(config: Config, vocab_size: int) -> float:
    """Validation loss, in nats, of a model that predicts the frequencies of the training tokens."""
    train = open_shards(config.data_dir, "train")
    val = open_shards(config.data_dir, "val")
    # Start from one of each token, so that no frequency is 0.
    counts = np.ones(vocab_size)
    bar = Progress(train.lengths, desc="counting tokens", unit="shard", leave=False)
    for number, length in enumerate(bar):
        counts += np.bincount(train.read(number, 0, length), minlength=vocab_size)
    # The loss of a token depends on nothing but the token.
    losses = -np.log(counts / counts.sum())  # (vocab_size,)
    return float(losses[val.read_first(config.val_tokens)].mean())


def gradients_at_init(
    config: Config, shape: GPTConfig, x: torch.Tensor, y: torch.Tensor, rt: Runtime
) -> dict[str, list[float]]:
    """Gradient norms of untrained models, "placement init depth" -> one per layer.

    Each is the mean over the seeds, on tokens x with targets y (N, T).
    """
    # The depth of the runs is included, because their plots begin with these gradients.
    depths = sorted({*config.depths, config.n_layer})
    cases = list(itertools.product(PLACEMENT_COLORS, INIT_STYLES, depths))
    gradients = {}
    bar = Progress(cases, desc="gradients at initialization", unit="model", leave=False)
    for placement, init, depth in bar:
        by_seed = []
        for seed in config.seeds:
            torch.manual_seed(seed)
            # GPT draws GPT-2's initialization.
            model = GPT(replace(shape, norm=placement, n_layer=depth))
            if init == "xavier":
                init_xavier(model)
            by_seed.append(layer_gradients(model.to(rt.device), x, y, rt))
        gradients[f"{placement} {init} {depth}"] = np.mean(by_seed, axis=0).tolist()
    torch.cuda.empty_cache()  # leave the memory to the runs on the same GPU
    return gradients


def init_xavier(model: GPT):
    """Draw the blocks' matrices from N(0, 2 / (inputs + outputs)), as Glorot & Bengio 2010 do."""
    for parameter in model.h.parameters():
        if parameter.dim() == 2:
            torch.nn.init.xavier_normal_(parameter)


def layer_gradients(model: GPT, x: torch.Tensor, y: torch.Tensor, rt: Runtime) -> list[float]:
    """Gradient norm of the second MLP matrix of each layer, for the mean loss of x, y (B, T)."""
    with rt.autocast():
        loss = model(x, y)
    # Only these gradients are computed: backward() would compute and store all of them.
    weights = [block.mlp.c_proj.weight for block in model.h]
    return [float(gradient.norm()) for gradient in torch.autograd.grad(loss, weights)]


def make_run(config: Config, point: Point) -> Run:
    """The training run of a point, with checkpoints at which its gradients are measured."""
    return train_run(
        config,
        point.name,
        config.data_dir,
        T=config.T,
        total_batch_size=config.total_batch_size,
        max_lr=point.lr,
        seed=point.seed,
        norm=point.placement,
        warmup_steps=point.warmup_steps,
        # The validation loss is needed only at the end.
        val_every=config.max_steps,
        val_tokens=config.val_tokens,
        # Gradients are measured on the checkpoints.
        checkpoint_every=config.gradients_every,
        rolling_every=0,
    )


def read_run(folder: Path, diverged: bool, x: torch.Tensor, y: torch.Tensor, rt: Runtime) -> dict:
    """The result of a run.

    diverged   number of steps before it diverged; None if it did not
    val        final validation loss; None if it diverged
    spikes     sizes of the loss spikes
    gradients  [step, gradient norm of each layer] for each checkpoint, measured on x, y
    """
    # Oldest first: candidates are sorted from the newest. A run that diverged has only the
    # checkpoints from before.
    gradients = []
    for path in reversed(checkpoint.candidates(folder)):
        saved = checkpoint.load(path)
        model = checkpoint.build_model(saved, path).to(rt.device)
        gradients.append((saved["step"], layer_gradients(model, x, y, rt)))
    torch.cuda.empty_cache()  # leave the memory to the runs on the same GPU

    # The log holds every training loss, but of the validation only the last.
    _, losses = read_stream(folder, "train")
    _, vals = read_stream(folder, "val")
    return dict(
        diverged=len(losses) if diverged else None,
        val=None if diverged else vals[-1],
        spikes=find_spikes(losses),
        gradients=gradients,
    )


def find_spikes(losses: list[float]) -> list[float]:
    """Sizes in nats of the spikes in a loss curve, as the module's docstring defines them."""
    sizes = []
    in_spike = False
    for step in range(SPIKE_WINDOW, len(losses)):
        # The median and its deviation are hardly affected by a few high losses in the window.
        before = np.array(losses[step - SPIKE_WINDOW : step])
        median = float(np.median(before))
        deviation = 1.4826 * float(np.median(np.abs(before - median)))
        # The limit in nats matters on smooth curves, where the deviation is almost 0.
        excess = losses[step] - median
        is_high = excess > max(SPIKE_DEVIATIONS * deviation, SPIKE_NATS)
        if is_high and in_spike:
            sizes[-1] = max(sizes[-1], excess)
        elif is_high:
            sizes.append(excess)
        in_spike = is_high
    return sizes


# ---------------------------------------------------------------------------------------------
# Report


def results_of_seeds(
    config: Config, study: StudyFolder, placement: str, lr: float, warmup_steps: int
) -> list[dict]:
    """The results of one setting, one per seed."""
    points = [Point(placement, lr, warmup_steps, seed) for seed in config.seeds]
    return [study.results[point.name] for point in points]


def survived(results: list[dict], unigram: float) -> bool:
    """Whether no seed diverged, and all ended below the unigram loss."""
    return all(result["val"] is not None and result["val"] < unigram for result in results)


def summarize(config: Config, study: StudyFolder):
    """Write the report and the plots."""
    unigram = study.results["unigram_loss"]
    # A row per setting, and per placement and warmup the largest rate that survived
    rows, largest_rates = [], []
    for placement, warmup in itertools.product(PLACEMENT_COLORS, config.warmup_steps_grid):
        label = f"{placement}, warmup {warmup}"
        # Rates come in increasing order, so the last one that survived is the largest.
        largest = "none"
        for lr in sorted(config.learning_rates):
            results = results_of_seeds(config, study, placement, lr, warmup)
            rows.append((label, f"{lr:g}", *result_cells(results, unigram)))
            if survived(results, unigram):
                largest = f"{lr:g}"
        largest_rates.append((label, largest))
    study.report(
        f"{config.n_layer} layers of width {config.n_embd}, {config.max_steps} steps of "
        f"{config.total_batch_size} tokens; mean and standard deviation of {len(config.seeds)} "
        f"seeds; unigram loss {unigram:.3f}",
        table(
            (
                "placement",
                "learning rate",
                "validation loss",
                "diverged",
                "spikes, largest (nats)",
                "survived",
            ),
            rows,
        ),
        table(("placement", "largest learning rate survived"), largest_rates),
        "The last layer's gradient at initialization is proportional to the depth to the power:",
        slopes_table(study),
    )
    draw_init(config, study)
    draw_curves(config, study)
    draw_learning_rates(config, study)
    draw_gradients(config, study)


def result_cells(results: list[dict], unigram: float) -> tuple[str, ...]:
    """The cells of a row about the seeds of one setting: loss, diverged, spikes, survived."""
    # The mean is over the seeds that did not diverge; their number is in the next cell.
    vals = [result["val"] for result in results if result["val"] is not None]
    spikes = [size for result in results for size in result["spikes"]]
    return (
        mean_and_deviation(vals) if vals else "none finite",
        f"{len(results) - len(vals)} of {len(results)}",
        f"{len(spikes)}, {max(spikes):.2f}" if spikes else "0",
        "yes" if survived(results, unigram) else "no",
    )


def last_layer(study: StudyFolder, placement: str, init: str) -> tuple[list[int], list[float]]:
    """Depths, and the gradient norm of the last layer at each."""
    # The keys are "placement init depth", such as "pre xavier 16".
    by_depth = {}
    for case, grad_norms in study.results["gradients_at_init"].items():
        case_placement, case_init, depth = case.split()
        if (case_placement, case_init) == (placement, init):
            by_depth[int(depth)] = grad_norms[-1]
    depths = sorted(by_depth)
    return depths, [by_depth[depth] for depth in depths]


def slopes_table(study: StudyFolder) -> str:
    """How the last layer's gradient grows with the depth: measured, and as predicted."""
    rows = []
    for placement, predicted in (("pre", "-0.50"), ("post", "0.00")):
        # One slope per initialization, next to the paper's prediction for Xavier's
        measured = [slope(*last_layer(study, placement, init)) for init in INIT_STYLES]
        rows.append((placement, *measured, predicted))
    return table(
        ("placement", "GPT-2's initialization", "Xavier's", "Xiong et al., for Xavier's"), rows
    )


def slope(depths: list[int], grad_norms: list[float]) -> str:
    """The exponent of the depth: the slope of a straight line fitted to the logarithms."""
    if len(depths) < 2:
        return "one depth only"
    return f"{np.polyfit(np.log(depths), np.log(grad_norms), 1)[0]:+.2f}"


# ---------------------------------------------------------------------------------------------
# Plots


def draw_init(config: Config, study: StudyFolder):
    """Gradients at initialization: the last layer's by depth, and all layers' of one depth."""
    figure = Figure((12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for placement, init in itertools.product(PLACEMENT_COLORS, INIT_STYLES):
        style = dict(
            color=PLACEMENT_COLORS[placement],
            ls=INIT_STYLES[init],
            marker="o",
            label=f"{placement}, {init}",
        )
        depths, grad_norms = last_layer(study, placement, init)
        left.plot(depths, grad_norms, **style)
        # The right panel has all layers of the models that are trained.
        layers = study.results["gradients_at_init"][f"{placement} {init} {config.n_layer}"]
        right.plot(range(1, len(layers) + 1), layers, **style)
        # The paper's prediction, through the first measured point
        if (placement, init) == ("pre", "xavier"):
            predicted = grad_norms[0] * (np.array(depths) / depths[0]) ** -0.5
            left.plot(depths, predicted, color="grey", ls=":", label="1 / sqrt(depth)")
    # Ticks at the measured depths, rather than at powers of ten
    left.set(xscale="log", title="Last layer, by depth", xlabel="layers")
    left.set_xticks(depths, depths)
    left.minorticks_off()
    right.set(title=f"Each of {config.n_layer} layers", xlabel="layer")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    for ax in (left, right):
        ax.set(yscale="log", ylabel="gradient norm at initialization")
    finish_axes(left, right)
    study.save_plot("gradients_at_init.png", figure)


def grid_of_panels(config: Config, rows: list) -> tuple[Figure, dict[tuple, Axes]]:
    """A figure with a panel for each (row, learning rate)."""
    columns = sorted(config.learning_rates)
    figure = Figure((3.5 * len(columns), 3 * len(rows)), layout="constrained")
    # Shared axes, so that panels can be compared at a glance
    axes = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey=True)
    # axes.flat goes through the grid row by row, as product does.
    panels = dict(zip(itertools.product(rows, columns), axes.flat))
    return figure, panels


def draw_curves(config: Config, study: StudyFolder):
    """Training loss of every run."""
    figure, panels = grid_of_panels(config, list(config.warmup_steps_grid))
    unigram = study.results["unigram_loss"]
    for (warmup, lr), ax in panels.items():
        for placement, seed in itertools.product(PLACEMENT_COLORS, config.seeds):
            name = Point(placement, lr, warmup, seed).name
            steps, losses = read_stream(study.path / "runs" / name, "train")
            # One entry in the legend for all seeds
            label = placement if seed == config.seeds[0] else None
            color = PLACEMENT_COLORS[placement]
            ax.plot(steps, losses, color=color, lw=0.6, alpha=0.7, label=label)
        ax.axhline(unigram, color="grey", ls=":", label="unigram")
        # Cut off high spikes, which would flatten everything else.
        ax.set_ylim(top=min(ax.get_ylim()[1], 2 * unigram))
        ax.set_title(f"learning rate {lr:g}, warmup {warmup}")
        ax.set(xlabel="step", ylabel="training loss (nats)")
    finish_axes(*panels.values())
    study.save_plot("loss_curves.png", figure)


def draw_learning_rates(config: Config, study: StudyFolder):
    """Final validation loss by learning rate, without the rates at which a seed diverged."""
    figure = Figure((8, 5), layout="constrained")
    ax = figure.subplots()
    # A line style per warmup. After four of them, the styles repeat.
    styles = dict(zip(config.warmup_steps_grid, itertools.cycle(("--", "-", "-.", ":"))))
    for placement, warmup in itertools.product(PLACEMENT_COLORS, config.warmup_steps_grid):
        # Error bars are distances below and above the mean.
        lrs, lows, means, highs = [], [], [], []
        for lr in sorted(config.learning_rates):
            results = results_of_seeds(config, study, placement, lr, warmup)
            vals = [result["val"] for result in results]
            # A mean over the other seeds would hide the divergence.
            if None not in vals:
                lrs.append(lr)
                lows.append(np.mean(vals) - min(vals))
                means.append(np.mean(vals))
                highs.append(max(vals) - np.mean(vals))
        if lrs:
            ax.errorbar(
                lrs,
                means,
                (lows, highs),
                color=PLACEMENT_COLORS[placement],
                ls=styles[warmup],
                marker="o",
                capsize=4,
                label=f"{placement}, {warmup}",
            )
    ax.axhline(study.results["unigram_loss"], color="grey", ls=":", label="unigram loss")
    ax.set(xscale="log", xlabel="peak learning rate", ylabel="validation loss (nats)")
    ax.set_title(f"Mean, lowest and highest of {len(config.seeds)} seeds; placement, warmup steps")
    finish_axes(ax)
    study.save_plot("learning_rates.png", figure)


def draw_gradients(config: Config, study: StudyFolder):
    """Gradient norms by layer, from light grey at initialization to black at the end."""
    rows = list(itertools.product(PLACEMENT_COLORS, config.warmup_steps_grid))
    figure, panels = grid_of_panels(config, rows)
    for ((placement, warmup), lr), ax in panels.items():
        # The runs start from GPT-2's initialization, so their step 0 has been measured already.
        at_init = study.results["gradients_at_init"][f"{placement} gpt2 {config.n_layer}"]
        by_step = {0: [at_init]}  # step -> one list of norms per seed
        for result in results_of_seeds(config, study, placement, lr, warmup):
            for step, grad_norms in result["gradients"]:
                by_step.setdefault(step, []).append(grad_norms)

        layers = range(1, len(at_init) + 1)
        last = max(1, len(by_step) - 1)
        for n, step in enumerate(sorted(by_step)):
            # matplotlib takes grey levels as strings, from "0" (black) to "1" (white).
            shade = str(0.8 * (1 - n / last))
            # Runs that diverged have fewer checkpoints: a late mean may be over fewer seeds.
            mean = np.mean(by_step[step], axis=0)
            ax.plot(layers, mean, color=shade, marker=".", label=f"step {step}")
        ax.set_title(f"{placement}, learning rate {lr:g}, warmup {warmup}")
        ax.set(yscale="log", xlabel="layer", ylabel="gradient norm")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    finish_axes(*panels.values())
    study.save_plot("gradients_in_training.png", figure)


if __name__ == "__main__":
    run_script(main, config)
