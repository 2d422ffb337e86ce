"""AdamW against Muon: how many tokens does each need for the same validation loss?

    python -m experiments.optimizer_study  # GPT-2 (124M), 24 runs of up to 262M tokens, as many at a time as GPUs
    python -m experiments.optimizer_study --data_dir datasets/corpus_4096 --n_layer 4 --n_head 4 --n_embd 128 \\
        --B 16 --T 128 --total_batch_size 2048 --max_steps 800 --warmup_steps 80 --learning_rates 1e-3 2e-3 4e-3 8e-3 1.6e-2 \\
        --val_tokens 65536                       # in small

Three rounds of train_gpt2.py, all with the same data, schedule and seeds:

    sweep   both optimizers for max_steps at every learning rate, with the first seed; the lowest final loss is best
    goal    AdamW at its best rate with every seed: the mean of the final losses is what Muon has to reach
    shares  Muon at its best rate with every seed, for shares of these steps. Each run has a whole schedule of its own:
            one that is cut off before its learning rate has fallen would look worse than it is

What Muon needs is where its mean final loss crosses the goal, interpolated over the logarithm of the tokens. Tokens/s
are those of the median step. A best rate at the end of the grid may not be the best: widen the grid then.

Run again after a stop, it goes on where it was; with more learning rates, seeds or shares it adds those. Results:
report.md, results.json and a picture in log/optimizer_study/. The runs' logs are kept, their checkpoints are not.
"""

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.figure import Figure

from common import runtime
from common.console import UserError, cli, say, table, write_text
from common.shards import manifest_checksum, shards_tokenizer
from experiments.sweep import (
    Results,
    mean_and_deviation,
    read_stream,
    stop_like_ctrl_c,
    train_command,
)

COLORS = {"adamw": "tab:blue", "muon": "tab:orange"}
Point = tuple[str, float, float, int]  # optimizer, learning rate, share of max_steps, seed


@dataclass
class Config:
    data_dir: str = "datasets/edu_fineweb10B"  # folder of shards that fineweb.py wrote
    out_dir: str = "log/optimizer_study"  # report, numbers, picture and the runs' logs
    # what is compared
    learning_rates: tuple[float, ...] = (
        3e-4,
        6e-4,
        1.2e-3,
        2.4e-3,
        4.8e-3,
    )  # highest ones; each falls to a tenth
    seeds: tuple[int, ...] = (1, 2, 3)  # of weights and data order
    shares: tuple[float, ...] = (0.25, 0.35, 0.45, 0.6)  # of max_steps that Muon is given
    # each run
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads per block
    n_embd: int = 768  # width
    B: int = 32  # micro-batch: sequences per process and forward pass
    T: int = 1024  # sequence length in tokens, and the models' context
    total_batch_size: int = 131072  # tokens per optimizer step
    max_steps: int = 2000  # optimizer steps
    warmup_steps: int = 200  # of linear warmup, fewer in shorter runs
    val_every: int = 100  # steps between two validation losses
    val_tokens: int = 1048576  # tokens of the validation shard
    device: str = "auto"  # cuda, mps or cpu; auto takes the first there is
    dtype: runtime.Dtype = (
        "auto"  # of matrix products; auto = bfloat16 where the hardware is fast at it
    )
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto = on GPUs
    num_parallel: int = 0  # runs at a time; 0 = one per GPU, or per CPU core

    def __post_init__(self):
        for name in ("learning_rates", "seeds", "shares"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UserError(f"{name} is {values}: give different values")
        if min(self.learning_rates) <= 0 or min(self.shares) <= 0 or max(self.shares) > 1:
            raise UserError("learning_rates must be above 0, shares above 0 and at most 1")
        for name in ("B", "T", "total_batch_size", "max_steps", "val_every", "val_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, must be at least 1")
        if self.warmup_steps < 0 or self.num_parallel < 0:
            raise UserError("warmup_steps and num_parallel must not be negative")


def main(config: Config):
    stop_like_ctrl_c()
    rt = runtime.start(config.device, config.dtype)
    settings = asdict(config) | dict(data=manifest_checksum(config.data_dir), dtype=str(rt.dtype))
    for key in (
        "data_dir",
        "out_dir",
        "learning_rates",
        "seeds",
        "shares",
        "B",
        "device",
        "compile",
        "num_parallel",
    ):
        del settings[key]  # a folder moved, a grid made larger, other hardware: what is known holds
    shards_tokenizer(config.data_dir)  # an error here, rather than in the first run
    results = Results(config.out_dir, settings)

    sweep = [(name, lr, 1.0, config.seeds[0]) for lr in config.learning_rates for name in COLORS]
    run(config, results, sweep, "sweep")
    best = {name: best_rate(config, results, name) for name in COLORS}
    goal = [("adamw", best["adamw"], 1.0, seed) for seed in config.seeds]
    shares = [
        ("muon", best["muon"], share, seed) for share in config.shares for seed in config.seeds
    ]
    run(config, results, goal + shares, "shares")
    summarize(config, results, best)


def run(config: Config, results: Results, points: list[Point], desc: str):
    """Train those that are not yet known."""
    commands = {run_name(point): run_command(config, results.folder, point) for point in points}

    def read(name: str, error: str | None) -> dict:
        return read_run(results.folder / "runs" / name, error)

    results.run_all(commands, read, config.device, config.num_parallel, desc)


def run_name(point: Point) -> str:
    optimizer, lr, share, seed = point
    return f"{optimizer}_lr_{lr:g}_share_{share:g}_seed_{seed}"


def run_command(config: Config, folder: Path, point: Point) -> tuple[list, Path]:
    """The words of one run's command, and the file for its output."""
    optimizer, lr, share, seed = point
    constants = dict(optimizer=optimizer, max_lr=lr, min_lr=lr / 10, seed=seed, block_size=config.T)
    constants |= dict(
        max_steps=round(share * config.max_steps), warmup_steps=round(share * config.warmup_steps)
    )
    for key in (
        "n_layer",
        "n_head",
        "n_embd",
        "B",
        "T",
        "total_batch_size",
        "val_every",
        "val_tokens",
    ):
        constants[key] = getattr(config, key)
    constants |= dict(checkpoint_every=0, rolling_every=0, sample_every=0, hellaswag_every=0)
    return train_command(config, folder / "runs" / run_name(point), config.data_dir, **constants)


def read_run(folder: Path, error: str | None) -> dict:
    """Final loss (infinite if the run diverged), its curve, and milliseconds of the median step. Raises ValueError if
    the run failed otherwise than by diverging."""
    if error and "the run diverged" not in error:
        raise UserError(error)
    steps, vals = read_stream(folder, "val")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    milliseconds = statistics.median(record["ms"] for record in records if "ms" in record)
    return dict(val=float("inf") if error else vals[-1], steps=steps, vals=vals, ms=milliseconds)


def best_rate(config: Config, results: Results, optimizer: str) -> float:
    finals = {
        lr: results[run_name((optimizer, lr, 1.0, config.seeds[0]))]["val"]
        for lr in config.learning_rates
    }
    best = min(finals, key=finals.get)
    if finals[best] == float("inf"):
        raise UserError(f"{optimizer} diverged at every learning rate: give smaller ones")
    return best


def final_losses(
    config: Config, results: Results, optimizer: str, lr: float, share: float
) -> list[float]:
    """Of all seeds."""
    return [results[run_name((optimizer, lr, share, seed))]["val"] for seed in config.seeds]


def needed_share(shares: list[float], losses: list[float], goal: float) -> str:
    """Of the tokens, where the losses fall to the goal: straight lines between them over the shares' logarithm."""
    for n, (share, loss) in enumerate(zip(shares, losses)):
        if loss <= goal:
            if n == 0:
                return f"at most {share:.2f}"
            part = (losses[n - 1] - goal) / (losses[n - 1] - loss)
            return f"{shares[n - 1] * (share / shares[n - 1]) ** part:.2f}"
    return f"more than {shares[-1]:.2f}"


def summarize(config: Config, results: Results, best: dict[str, float]):
    rates = sorted(config.learning_rates)
    sweep = [
        (
            f"{lr:g}",
            *(
                f"{results[run_name((name, lr, 1.0, config.seeds[0]))]['val']:.4f}"
                for name in COLORS
            ),
        )
        for lr in rates
    ]
    edges = [name for name in COLORS if best[name] in (rates[0], rates[-1])]
    goals = final_losses(config, results, "adamw", best["adamw"], 1.0)
    goal, shares = float(np.mean(goals)), sorted(config.shares)
    finals = {share: final_losses(config, results, "muon", best["muon"], share) for share in shares}
    rows = [("adamw", "1.00", mean_and_deviation(goals, 4))]
    rows += [
        ("muon", f"{share:.2f}", mean_and_deviation(losses, 4)) for share, losses in finals.items()
    ]
    needed = needed_share(shares, [float(np.mean(finals[share])) for share in shares], goal)
    by_optimizer = {
        name: [each["ms"] for key, each in results.items() if key.startswith(name)]
        for name in COLORS
    }
    speed = {
        name: config.total_batch_size / statistics.median(ms) * 1000
        for name, ms in by_optimizer.items()
    }
    text = "\n\n".join(
        (
            f"{config.n_layer} layers of width {config.n_embd}, {config.max_steps} steps of {config.total_batch_size} "
            f"tokens; validation loss in nats",
            table(("learning rate", *COLORS), sweep),
            *[f"{name}'s best learning rate is at the end of the grid: widen it" for name in edges],
            f"At the best rates, mean and standard deviation of {len(config.seeds)} seeds:",
            table(("optimizer", "share of the tokens", "final loss"), rows),
            f"Muon needs {needed} of the tokens of AdamW for its loss of {goal:.4f}, at "
            f"{speed['muon'] / speed['adamw']:.3f} of its tokens/s ({speed['muon']:,.0f} and {speed['adamw']:,.0f})",
        )
    )
    write_text(results.folder / "report.md", text + "\n")
    draw(config, results, best, goal)
    say(
        f"{text}\n\n{results.folder}/report.md, {results.folder}/results.json, {results.folder}/optimizers.png"
    )


def draw(config: Config, results: Results, best: dict[str, float], goal: float):
    figure = Figure((16, 5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    rates, shares = sorted(config.learning_rates), sorted(config.shares)
    for name, color in COLORS.items():
        finals = [results[run_name((name, lr, 1.0, config.seeds[0]))]["val"] for lr in rates]
        left.plot(rates, finals, marker="o", color=color, label=name)
        for share in [1.0] if name == "adamw" else shares:
            for seed in config.seeds:
                found = results[run_name((name, best[name], share, seed))]
                tokens = np.array(found["steps"]) * config.total_batch_size / 1e6
                label = (
                    name
                    if (share, seed) in ((1.0, config.seeds[0]), (shares[-1], config.seeds[0]))
                    else None
                )
                middle.plot(tokens, found["vals"], color=color, lw=0.8, alpha=0.8, label=label)
    for seed in config.seeds:
        finals = [results[run_name(("muon", best["muon"], share, seed))]["val"] for share in shares]
        right.plot(
            shares, finals, marker="o", color=COLORS["muon"], lw=0.8, label=f"muon, seed {seed}"
        )
    left.set(xscale="log", xlabel="highest learning rate", title="Sweep: all tokens, one seed")
    middle.set(xlabel="million tokens", title="Best rates, all seeds; Muon with shorter schedules")
    right.set(xlabel="share of AdamW's tokens", title="What Muon needs")
    low = min(min(each["vals"]) for key, each in results.items() if key.startswith(tuple(COLORS)))
    for ax in (left, middle, right):
        ax.axhline(goal, color="grey", ls=":", label="AdamW's final loss, mean")
        ax.set_ylabel("validation loss (nats)")
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small")
    middle.set_ylim(low - 0.05, low + 1.5)
    results.save_picture("optimizers.png", figure)


if __name__ == "__main__":
    cli(Config, main, __doc__)
