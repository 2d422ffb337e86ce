"""Pre-LN against Post-LN: where does LayerNorm belong, and does Post-LN need warmup?

    python -m experiments.norm_study  # GPT-2 (124M), 48 runs of 262M tokens each, as many at a time as GPUs
    python -m experiments.norm_study --data_dir datasets/pydoc --n_layer 4 --n_head 4 --n_embd 64 --B 8 --T 64 \\
        --total_batch_size 512 --max_steps 400 --warmups 0 100 --learning_rates 5e-4 1e-3 2e-3 4e-3 \\
        --gradients_every 100 --val_tokens 20000  # in small, on the quickstart's data: 48 runs in 8 min on 2 cores

Both placements are trained (train_gpt2.py, as a command) with the same data, seeds and schedule, at several learning
rates, with and without warmup. Xiong et al. 2020 ("On Layer Normalization in the Transformer Architecture") expect that
Post-LN has much larger gradients near the output at initialization, and needs warmup therefore. How to read the answer:

    gradients    of the second matrix of a layer's MLP, which the paper's theorem 1 is about. At initialization the last
                 layer's should not depend on the depth L with Post-LN, and fall like 1 / sqrt(L) with Pre-LN. The
                 theorem assumes Xavier's initialization; GPT-2's is shown beside it, and is what the runs begin with:
                 with it Post-LN's gradients are the smaller ones, so that what follows is not the paper's reason alone.
    diverged     a loss or a gradient was not finite: train_gpt2.py stopped
    survived     no seed diverged, and each ended below the unigram loss, that of a model that knows the tokens'
                 frequencies and no context: Post-LN typically fails by getting no further
    spike        steps in a row, after the first 20, with a training loss above the median of the 20 before by more than
                 6 robust standard deviations (1.4826 times their median deviation) and 0.2 nats; its size is the
                 largest excess

Run again after a stop, it goes on where it was; with more learning rates or warmups it adds those. Results: report.md,
results.json and pictures in log/norm_study/. The runs' logs are kept, their checkpoints are not.
"""

import itertools
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from common import checkpoint, runtime
from common.console import Progress, UserError, cli, say, table, write_text
from common.runtime import Runtime
from common.shards import manifest_checksum, open_shards, shards_tokenizer
from experiments.sweep import (
    Results,
    mean_and_deviation,
    read_stream,
    read_windows,
    stop_like_ctrl_c,
    train_command,
)
from model import GPT, GPTConfig

NORMS = {"pre": "tab:blue", "post": "tab:orange"}
INITS = {"gpt2": "-", "xavier": "--"}
SPIKE_WINDOW, SPIKE_DEVIATIONS, SPIKE_NATS = 20, 6, 0.2


@dataclass
class Config:
    data_dir: str = "datasets/edu_fineweb10B"  # folder of shards that fineweb.py wrote
    out_dir: str = "log/norm_study"  # report, numbers, pictures and the runs' logs
    # what is compared
    learning_rates: tuple[float, ...] = (
        3e-4,
        6e-4,
        1.2e-3,
        2.4e-3,
    )  # highest ones; each falls to a tenth
    warmups: tuple[int, ...] = (0, 200)  # steps of linear warmup
    seeds: tuple[int, ...] = (1, 2, 3)  # of weights and data order
    depths: tuple[int, ...] = (
        2,
        4,
        8,
        16,
        32,
    )  # layers of the models whose gradients are taken at initialization
    gradients_every: int = 500  # steps between two measurements of the gradients in training
    # each run
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads per block
    n_embd: int = 768  # width
    B: int = 32  # micro-batch: sequences per process and forward pass
    T: int = 1024  # sequence length in tokens, and the models' context
    total_batch_size: int = 131072  # tokens per optimizer step
    max_steps: int = 2000  # optimizer steps
    val_tokens: int = 1048576  # tokens of the validation shard
    device: str = "auto"  # cuda, mps or cpu; auto takes the first there is
    dtype: runtime.Dtype = (
        "auto"  # of matrix products; auto = bfloat16 where the hardware is fast at it
    )
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto = on GPUs
    num_parallel: int = 0  # runs at a time; 0 = one per GPU, or per CPU core

    def __post_init__(self):
        for name in ("learning_rates", "warmups", "seeds", "depths"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UserError(f"{name} is {values}: give different values")
        for name in ("gradients_every", "B", "T", "total_batch_size", "max_steps", "val_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, must be at least 1")
        if min(self.learning_rates) <= 0 or min(self.depths) <= 0:
            raise UserError("learning_rates and depths must be above 0")
        if min(self.warmups) < 0 or min(self.seeds) < 0 or self.num_parallel < 0:
            raise UserError("warmups, seeds and num_parallel must not be negative")


def main(config: Config):
    stop_like_ctrl_c()
    rt = runtime.start(config.device, config.dtype)
    settings = asdict(config) | dict(data=manifest_checksum(config.data_dir), dtype=str(rt.dtype))
    for key in (
        "data_dir",
        "out_dir",
        "learning_rates",
        "warmups",
        "B",
        "device",
        "compile",
        "num_parallel",
    ):
        del settings[key]  # a folder moved, a grid made larger, other hardware: what is known holds
    enc = shards_tokenizer(config.data_dir)
    shape = GPTConfig(
        block_size=config.T,
        vocab_size=enc.n_vocab,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
    )
    x, y = (
        part.to(rt.device)
        for part in read_windows(open_shards(config.data_dir, "val"), 8, config.T)
    )
    results = Results(config.out_dir, settings)

    if "unigram_loss" not in results:
        results["unigram_loss"] = unigram_loss(config, enc.n_vocab)
    if "gradients_at_init" not in results:
        results["gradients_at_init"] = gradients_at_init(config, shape, x, y, rt)
        results.save()
    grid = list(itertools.product(NORMS, config.learning_rates, config.warmups, config.seeds))
    commands = {run_name(*point): run_command(config, results.folder, *point) for point in grid}

    def read(name: str, error: str | None) -> dict:
        return read_run(results.folder / "runs" / name, error, x, y, rt)

    results.run_all(commands, read, config.device, config.num_parallel, "training")
    summarize(config, results)


def run_name(norm: str, lr: float, warmup: int, seed: int) -> str:
    return f"{norm}_lr_{lr:g}_warmup_{warmup}_seed_{seed}"


def unigram_loss(config: Config, vocab_size: int) -> float:
    """Mean loss in nats on the validation tokens of a model that predicts the training tokens' frequencies."""
    train, val = open_shards(config.data_dir, "train"), open_shards(config.data_dir, "val")
    counts = np.ones(vocab_size)
    for number, length in enumerate(
        Progress(train.lengths, desc="counting tokens", unit="shard", leave=False)
    ):
        counts += np.bincount(train.read(number, 0, length), minlength=vocab_size)
    return float(
        -np.log(counts / counts.sum())[
            val.read(0, 0, min(config.val_tokens, val.lengths[0]))
        ].mean()
    )


def gradients_at_init(
    config: Config, shape: GPTConfig, x: torch.Tensor, y: torch.Tensor, rt: Runtime
) -> dict:
    """Gradient norms by layer of untrained models: "norm init depth" -> means over the seeds, layer by layer."""
    cases = list(itertools.product(NORMS, INITS, sorted({*config.depths, config.n_layer})))
    gradients = {}
    for norm, init, depth in Progress(
        cases, desc="gradients at initialization", unit="model", leave=False
    ):
        norms = []
        for seed in config.seeds:
            torch.manual_seed(seed)
            model = GPT(replace(shape, norm=norm, n_layer=depth))
            if init == "xavier":
                init_xavier(model)
            norms.append(layer_gradients(model.to(rt.device), x, y, rt))
        gradients[f"{norm} {init} {depth}"] = np.mean(norms, 0).tolist()
    torch.cuda.empty_cache()  # for the runs on the same GPU
    return gradients


def init_xavier(model: GPT):
    """Glorot & Bengio 2010: the matrices of the blocks from N(0, 2 / (inputs + outputs))."""
    for parameter in model.h.parameters():
        if parameter.dim() == 2:
            torch.nn.init.xavier_normal_(parameter)


def layer_gradients(model: GPT, x: torch.Tensor, y: torch.Tensor, rt: Runtime) -> list[float]:
    """For each layer the norm of the gradient of the second matrix of its MLP, for the mean loss of x, y (B, T)."""
    with rt.autocast():
        loss = model(x, y)
    weights = [block.mlp.c_proj.weight for block in model.h]
    return [float(gradient.norm()) for gradient in torch.autograd.grad(loss, weights)]


def run_command(
    config: Config, folder: Path, norm: str, lr: float, warmup: int, seed: int
) -> tuple[list, Path]:
    """The words of one run's command, and the file for its output."""
    constants = dict(
        norm=norm, max_lr=lr, min_lr=lr / 10, warmup_steps=warmup, seed=seed, block_size=config.T
    )
    for key in (
        "n_layer",
        "n_head",
        "n_embd",
        "B",
        "T",
        "total_batch_size",
        "max_steps",
        "val_tokens",
    ):
        constants[key] = getattr(config, key)
    constants |= dict(val_every=config.max_steps, checkpoint_every=config.gradients_every)
    constants |= dict(rolling_every=0, sample_every=0, hellaswag_every=0)
    return train_command(
        config, folder / "runs" / run_name(norm, lr, warmup, seed), config.data_dir, **constants
    )


def read_run(
    folder: Path, error: str | None, x: torch.Tensor, y: torch.Tensor, rt: Runtime
) -> dict:
    """What a run shows. Raises ValueError if it failed otherwise than by diverging."""
    diverged = error is not None and "the run diverged" in error
    if error and not diverged:
        raise UserError(error)
    gradients = []
    for path in checkpoint.candidates(folder)[::-1]:
        saved = checkpoint.load(path)
        model = checkpoint.build_model(saved, path).to(rt.device)
        gradients.append((saved["step"], layer_gradients(model, x, y, rt)))
    torch.cuda.empty_cache()  # for the runs on the same GPU
    losses, vals = read_stream(folder, "train")[1], read_stream(folder, "val")[1]
    return dict(
        diverged=len(losses) if diverged else None, val=None if diverged else vals[-1], spikes=find_spikes(losses),
        gradients=gradients,
    )  # fmt: skip


def find_spikes(losses: list[float]) -> list[float]:
    """The sizes in nats of the spikes of a loss curve, as defined above."""
    sizes, inside = [], False
    for step in range(SPIKE_WINDOW, len(losses)):
        before = losses[step - SPIKE_WINDOW : step]
        median = float(np.median(before))
        deviation = 1.4826 * float(np.median(np.abs(np.array(before) - median)))
        excess = losses[step] - median
        if excess > max(SPIKE_DEVIATIONS * deviation, SPIKE_NATS):
            sizes = [*sizes[:-1], max(sizes[-1], excess)] if inside else [*sizes, excess]
            inside = True
        else:
            inside = False
    return sizes


def survived(runs: list[dict], unigram: float) -> bool:
    return all(run["val"] is not None and run["val"] < unigram for run in runs)


def summarize(config: Config, results: Results):
    unigram, rows, survivals = results["unigram_loss"], [], []
    for norm, warmup in itertools.product(NORMS, config.warmups):
        largest = None
        for lr in sorted(config.learning_rates):
            runs = [results[run_name(norm, lr, warmup, seed)] for seed in config.seeds]
            vals = [run["val"] for run in runs if run["val"] is not None]
            spikes = [size for run in runs for size in run["spikes"]]
            alive = survived(runs, unigram)
            largest = lr if alive else largest
            rows.append((
                f"{norm}, warmup {warmup}", f"{lr:g}", mean_and_deviation(vals) if vals else "none finite",
                f"{len(runs) - len(vals)} of {len(runs)}", f"{len(spikes)}, {max(spikes):.2f}" if spikes else "0",
                "yes" if alive else "no",
            ))  # fmt: skip
        survivals.append(
            (f"{norm}, warmup {warmup}", "none" if largest is None else f"{largest:g}")
        )
    head = (
        "placement",
        "learning rate",
        "validation loss",
        "diverged",
        "spikes, largest (nats)",
        "survived",
    )
    text = "\n\n".join(
        (
            f"{config.n_layer} layers of width {config.n_embd}, {config.max_steps} steps of {config.total_batch_size} "
            f"tokens; mean and standard deviation of {len(config.seeds)} seeds; unigram loss {unigram:.3f}",
            table(head, rows),
            table(("placement", "largest learning rate survived"), survivals),
            f"Gradient of the last layer at initialization, falling as depth to the power:\n\n{slopes(results)}",
        )
    )
    write_text(results.folder / "report.md", text + "\n")
    draw_init(config, results)
    draw_curves(config, results)
    draw_learning_rates(config, results)
    draw_gradients(config, results)
    say(
        f"{text}\n\n{results.folder}/report.md, {results.folder}/results.json and pictures beside them"
    )


def last_layer(results: Results, norm: str, init: str) -> tuple[list[int], list[float]]:
    """Depths, and the gradient norm of the last layer at each."""
    cases = [key.split() for key in results["gradients_at_init"]]
    depths = sorted(int(depth) for n, i, depth in cases if (n, i) == (norm, init))
    return depths, [results["gradients_at_init"][f"{norm} {init} {depth}"][-1] for depth in depths]


def slopes(results: Results) -> str:
    """The exponent of the depth in the last layer's gradient, a straight line fitted in logarithms."""
    rows = [
        (norm, *(slope(*last_layer(results, norm, init)) for init in INITS), paper)
        for norm, paper in (("pre", "-0.50"), ("post", "0.00"))
    ]
    return table(
        ("placement", "GPT-2's initialization", "Xavier's", "Xiong et al., for Xavier's"), rows
    )


def slope(depths: list[int], norms: list[float]) -> str:
    return (
        f"{np.polyfit(np.log(depths), np.log(norms), 1)[0]:+.2f}"
        if len(depths) > 1
        else "one depth only"
    )


def draw_init(config: Config, results: Results):
    figure = Figure((12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (norm, color), (init, style) in itertools.product(NORMS.items(), INITS.items()):
        label = f"{norm}, {init}"
        depths, norms = last_layer(results, norm, init)
        left.plot(depths, norms, color=color, ls=style, marker="o", label=label)
        layers = results["gradients_at_init"][f"{norm} {init} {config.n_layer}"]
        right.plot(
            range(1, len(layers) + 1), layers, color=color, ls=style, marker="o", label=label
        )
        if (norm, init) == ("pre", "xavier"):
            law = norms[0] * (np.array(depths) / depths[0]) ** -0.5
            left.plot(depths, law, color="grey", ls=":", label="1 / sqrt(depth)")
    left.set(xscale="log", title="Last layer, by depth", xlabel="layers")
    left.set_xticks(depths, depths)
    left.minorticks_off()
    right.set(title=f"Each of {config.n_layer} layers", xlabel="layer")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    for ax in (left, right):
        ax.set(yscale="log", ylabel="gradient norm at initialization")
        finish(ax)
    results.save_picture("gradients_at_init.png", figure)


def grid_of_panels(config: Config, rows: list) -> tuple[Figure, dict]:
    """A panel for each row and learning rate."""
    columns = sorted(config.learning_rates)
    figure = Figure((3.5 * len(columns), 3 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey=True)
    return figure, {
        (row, lr): axes[i, j] for i, row in enumerate(rows) for j, lr in enumerate(columns)
    }


def draw_curves(config: Config, results: Results):
    figure, panels = grid_of_panels(config, list(config.warmups))
    for (warmup, lr), ax in panels.items():
        for (norm, color), seed in itertools.product(NORMS.items(), config.seeds):
            steps, losses = read_stream(
                results.folder / "runs" / run_name(norm, lr, warmup, seed), "train"
            )
            ax.plot(
                steps,
                losses,
                color=color,
                lw=0.6,
                alpha=0.7,
                label=norm if seed == config.seeds[0] else None,
            )
        ax.axhline(results["unigram_loss"], color="grey", ls=":", label="unigram")
        ax.set_ylim(
            top=min(ax.get_ylim()[1], 2 * results["unigram_loss"])
        )  # a spike must not flatten the rest
        ax.set(
            title=f"learning rate {lr:g}, warmup {warmup}",
            xlabel="step",
            ylabel="training loss (nats)",
        )
        finish(ax)
    results.save_picture("loss_curves.png", figure)


def draw_learning_rates(config: Config, results: Results):
    figure = Figure((8, 5), layout="constrained")
    ax = figure.subplots()
    for (norm, color), (style, warmup) in itertools.product(
        NORMS.items(), zip(itertools.cycle(("--", "-", "-.", ":")), config.warmups)
    ):
        points = []
        for lr in sorted(config.learning_rates):
            vals = [results[run_name(norm, lr, warmup, seed)]["val"] for seed in config.seeds]
            if None not in vals:
                points.append(
                    (lr, np.mean(vals), np.mean(vals) - min(vals), max(vals) - np.mean(vals))
                )
        if points:
            lrs, means, *spread = zip(*points)
            ax.errorbar(
                lrs,
                means,
                spread,
                color=color,
                ls=style,
                marker="o",
                capsize=4,
                label=f"{norm}, {warmup}",
            )
    ax.axhline(results["unigram_loss"], color="grey", ls=":", label="unigram loss")
    ax.set(xscale="log", xlabel="highest learning rate", ylabel="validation loss (nats)")
    ax.set_title(f"Mean, lowest and highest of {len(config.seeds)} seeds; placement, warmup steps")
    finish(ax)
    results.save_picture("learning_rates.png", figure)


def draw_gradients(config: Config, results: Results):
    figure, panels = grid_of_panels(config, list(itertools.product(NORMS, config.warmups)))
    for ((norm, warmup), lr), ax in panels.items():
        by_step = {}
        for seed in config.seeds:
            for step, norms in results[run_name(norm, lr, warmup, seed)]["gradients"]:
                by_step.setdefault(step, []).append(norms)
        start = results["gradients_at_init"][f"{norm} gpt2 {config.n_layer}"]
        for n, (step, norms) in enumerate([(0, [start]), *sorted(by_step.items())]):
            ax.plot(range(1, len(start) + 1), np.mean(norms, 0), color=str(0.8 * (1 - n / max(1, len(by_step)))),
                    marker=".", label=f"step {step}")  # fmt: skip
        ax.set(title=f"{norm}, learning rate {lr:g}, warmup {warmup}", yscale="log", xlabel="layer")
        ax.set_ylabel("gradient norm")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        finish(ax)
    results.save_picture("gradients_in_training.png", figure)


def finish(ax: Axes):
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")


if __name__ == "__main__":
    cli(Config, main, __doc__)
