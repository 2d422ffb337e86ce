"""Tokens and seconds to the same validation loss: this project, nanoGPT and build-nanogpt.

    # about 1.3M parameters: 4 layers of width 128, a vocabulary of 4,096
    python -m bench.time_to_loss --data_dir datasets/corpus_4096 \\
        --nanogpt ../nanoGPT --build_nanogpt ../build-nanogpt

    # about 10M parameters, GPT-2's vocabulary
    python -m bench.time_to_loss --data_dir datasets/corpus_gpt2 --n_layer 6 --n_head 5 \\
        --n_embd 160 --T 256 --B 4 --total_batch_size 1024 --out_dir log/time_to_loss_10M \\
        --nanogpt ../nanoGPT --build_nanogpt ../build-nanogpt

Four candidates train on the same shards, with the same tokens per step, warmup and learning rates
that decay to a tenth:

    adamw          train_gpt2.py with its defaults: AdamW, cosine
    fast           train_gpt2.py with runs/fast.flags, this project's fastest recipe
    nanogpt        nanoGPT's train.py as a command: random windows, no biases, as shipped
    build-nanogpt  the loop of build-nanogpt's train_gpt2.py, in a copy with other constants

nanoGPT trains in float32 on CPUs. build-nanogpt's bfloat16 is replaced by the dtype that this
project chooses for the hardware. --compile counts for all but build-nanogpt, which does not
compile. bench/timed_run.py says how each run is timed and evaluated: on one clock, by one function,
on the same tokens.

    grid     every candidate at every learning rate, with the first seed, for its most steps. If
             the best rate is the lowest or highest tried so far, half or double that rate is tried
             as well, until a worse rate lies on each side
    lengths  every candidate at its best rate, with every seed, for fractions of max_steps. Each run
             has a complete schedule: one that is cut off while its learning rate is still high
             would look worse than it is. The fast recipe, which needs less, has fractions of its
             own

The target losses are nanoGPT's mean final losses for the fractions, and AdamW's for all steps. A
candidate needs what its best length needs: where the mean curve of its seeds first crosses the
target, interpolated linearly between two evaluations.

Two runs at the same time disturb each other's clock, so there is one by default. An interrupted
study resumes when the command is repeated. Output: report.md, results.json, time_to_loss.png and
the runs' output in log/time_to_loss/.
"""

import json
import math
import pickle
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import common.before_torch

from common.console import UserError, check_at_least, check_known, parse_flags, run_script, table
from experiments.flags import SweepConfig, check_different

# The recipe that needs the fewest tokens at small scale (experiments/recipe_study.py), as flags of
# train_gpt2.py.
FAST = tuple((Path(__file__).parents[1] / "runs" / "fast.flags").read_text().split())

TITLES = {
    "adamw": "this project, AdamW",
    "fast": "this project, fast",
    "nanogpt": "nanoGPT",
    "build-nanogpt": "build-nanogpt",
}


@dataclass
class Config(SweepConfig):
    out_dir: str = "log/time_to_loss"  # folder for the report, results.json, plot and runs
    data_dir: str = "datasets/corpus_4096"  # folder of shards, written by fineweb.py
    nanogpt: str = "../nanoGPT"  # folder of a clone of nanoGPT
    build_nanogpt: str = "../build-nanogpt"  # folder of a clone of build-nanogpt
    n_layer: int = 4  # number of blocks
    n_head: int = 4  # attention heads per block
    n_embd: int = 128  # width of the residual stream
    B: int = 16  # micro-batch: sequences per forward pass
    T: int = 128  # sequence length in tokens, and the context length of the models
    total_batch_size: int = 2048  # tokens per optimizer step
    max_steps: int = 2000  # optimizer steps of the longest runs
    warmup_steps: int = 200  # steps of linear warmup; proportionally fewer in shorter runs
    # peak learning rates to begin with; each decays to a tenth
    learning_rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    candidates: tuple[str, ...] = tuple(TITLES)  # what to compare; must include adamw or nanogpt
    # training lengths as fractions of max_steps; must include 1
    step_fractions: tuple[float, ...] = (0.5, 1.0)
    # the fast recipe's --position_lr_scale; None = that of runs/fast.flags. 0.25 is better in runs
    # of less than a million tokens
    position_lr_scale: float | None = None
    # training lengths of the fast recipe
    fast_fractions: tuple[float, ...] = (0.2, 0.25, 0.5, 1.0)
    val_every: int = 100  # steps between validation losses
    val_tokens: int = 65536  # tokens of the validation shard used for the validation loss
    num_parallel: int = 1  # runs at the same time; more than 1 disturbs the measured seconds

    def __post_init__(self):
        super().__post_init__()
        check_different(self, "candidates", "step_fractions", "fast_fractions")
        check_known("candidate", self.candidates, TITLES)
        if not {"adamw", "nanogpt"} & set(self.candidates):
            raise UserError("candidates: name adamw or nanogpt, whose final losses are the targets")
        check_at_least(self, 2, "val_every")  # timed_run.py leaves out the first update
        check_at_least(self, 0, "warmup_steps")
        if self.position_lr_scale is not None and not 0 < self.position_lr_scale < math.inf:
            raise UserError(f"position_lr_scale is {self.position_lr_scale}, must be above 0")
        # The targets are final losses of whole runs, and the grid consists of them.
        fractions = (*self.step_fractions, *self.fast_fractions)
        if 1.0 not in self.step_fractions or not all(0 < part <= 1 for part in fractions):
            raise UserError(
                f"step_fractions is {self.step_fractions}, fast_fractions {self.fast_fractions}: "
                "give values above 0 and at most 1, and 1 among the step_fractions"
            )
        if min(fractions) * self.max_steps < 2:
            raise UserError(f"max_steps is {self.max_steps}: the shortest run needs two steps")
        # nanoGPT and build-nanogpt do not support padding, so every window must be full.
        for name in ("total_batch_size", "val_tokens"):
            if getattr(self, name) % (self.B * self.T):
                raise UserError(
                    f"{name} is {getattr(self, name)}, must be a multiple of B * T = "
                    f"{self.B} * {self.T}"
                )


if __name__ == "__main__":
    config = parse_flags(Config, __doc__)  # before the slow imports: --help answers at once

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.measure import LIBGOMP_DEFAULT
from bench.timed_run import Job
from common.console import checksum, write_atomically, write_text
from common.optim import Diverged
from common.runtime import Runtime
from common.shards import open_shards, shards_fingerprint, shards_tokenizer
from experiments.sweep import (
    ROOT,
    Run,
    StudyFolder,
    finish_axes,
    mean_and_deviation,
    settings_of,
    start,
)
from model import GPTConfig

COLORS = {
    "adamw": "tab:blue",
    "fast": "tab:orange",
    "nanogpt": "tab:green",
    "build-nanogpt": "tab:red",
}


class Point(NamedTuple):
    """The settings by which one run differs from the others."""

    candidate: str
    lr: float
    fraction: float  # of max_steps
    seed: int

    @property
    def name(self) -> str:
        return f"{self.candidate}_lr_{self.lr:g}_fraction_{self.fraction:g}_seed_{self.seed}"


class Target(NamedTuple):
    """A validation loss to reach: the final one of a candidate's runs of some length."""

    candidate: str
    fraction: float
    loss: float


def main(config: Config):
    rt = start(config)
    if rt.dtype == torch.float16:
        raise UserError("float16 skips updates, which this benchmark counts: --dtype float32")
    scripts = find_scripts(config)
    enc = shards_tokenizer(config.data_dir)  # fail here, rather than in the first run
    shape = config.gpt_config(block_size=config.T, vocab_size=enc.n_vocab)
    check_data(config, enc.n_vocab)
    # Results depend on all settings but these, and on the other projects' code.
    settings = settings_of(
        config,
        rt,
        may_change=[
            *("candidates", "learning_rates", "seeds", "step_fractions", "fast_fractions"),
            *("nanogpt", "build_nanogpt"),
        ],
        data=shards_fingerprint(config.data_dir),
        # Seconds are a result here, so what affects only the speed must not change, either.
        speed=[config.B, rt.device.type, config.compile, config.num_parallel],
        fast=FAST,
        scripts={name: checksum(path) for name, path in scripts.items() if not is_ours(name)},
    )
    study = StudyFolder(config.out_dir, settings)
    write_tokens(config, shape)

    # Find the best learning rate of each candidate.
    grids = {name: search_rates(config, study, rt, shape, name) for name in config.candidates}
    best = {name: best_rate(losses) for name, losses in grids.items()}
    # The candidates take turns, so that a machine that gets slower does not favor one of them.
    points = [
        Point(candidate, best[candidate], fraction, seed)
        for seed in config.seeds
        for fraction in sorted({*config.step_fractions, *config.fast_fractions})
        for candidate in best
        if fraction in fractions_of(config, candidate)
    ]
    run_points(config, study, rt, shape, points, "lengths")
    summarize(config, study, grids, best)


def is_ours(candidate: str) -> bool:
    return candidate in ("adamw", "fast")


def fractions_of(config: Config, candidate: str) -> list[float]:
    """The lengths of a candidate's runs, in increasing order."""
    return sorted(config.fast_fractions if candidate == "fast" else config.step_fractions)


def find_scripts(config: Config) -> dict[str, Path]:
    """The training script of each candidate. Raises UserError if one does not exist."""
    paths = {
        "adamw": ROOT / "train_gpt2.py",
        "fast": ROOT / "train_gpt2.py",
        "nanogpt": Path(config.nanogpt).resolve() / "train.py",
        "build-nanogpt": Path(config.build_nanogpt).resolve() / "train_gpt2.py",
    }
    scripts = {name: paths[name] for name in config.candidates}
    for path in scripts.values():
        if not path.is_file():
            raise UserError(f"no file {path}: give the folder that contains it")
    return scripts


def check_data(config: Config, vocab_size: int):
    """Raise UserError if nanoGPT's files can't hold the tokens, or if windows would not be full."""
    if vocab_size > 2**16:
        raise UserError(
            f"{config.data_dir} has a vocabulary of {vocab_size:,} tokens: nanoGPT's files hold "
            "numbers below 65,536"
        )
    found = len(open_shards(config.data_dir, "val").read_first(config.val_tokens + 1))
    if found <= config.val_tokens:
        raise UserError(
            f"{config.data_dir} has {found} validation tokens, val_tokens + 1 = "
            f"{config.val_tokens + 1} are needed: lower val_tokens"
        )


# ---------------------------------------------------------------------------------------------
# Runs


def write_tokens(config: Config, shape: GPTConfig):
    """Write the shards' tokens in the formats of the other projects, to OUT_DIR/tokens.

    nanogpt        train.bin and val.bin, uint16 without a header, and the size of the vocabulary
    build-nanogpt  the shards as .npy files, in the same order
    """
    folder = Path(config.out_dir) / "tokens"
    for name in ("nanogpt", "build-nanogpt"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with write_atomically(folder / "nanogpt" / "meta.pkl") as file:
        pickle.dump(dict(vocab_size=shape.padded_vocab_size), file)
    for split in ("train", "val"):
        shards = open_shards(config.data_dir, split)
        with write_atomically(folder / "nanogpt" / f"{split}.bin") as file:
            for shard, length in enumerate(shards.lengths):
                tokens = shards.read(shard, 0, length).astype(np.uint16)
                file.write(tokens.tobytes())
                with write_atomically(
                    folder / "build-nanogpt" / f"{split}_{shard:06d}.npy"
                ) as shard_file:
                    np.save(shard_file, tokens)


def search_rates(
    config: Config, study: StudyFolder, rt: Runtime, shape: GPTConfig, candidate: str
) -> dict[float, float]:
    """Final loss of a candidate at each learning rate; infinite where it diverged.

    The learning rates are those of the config and, where the best one is at an end, more.
    """
    longest = fractions_of(config, candidate)[-1]
    losses: dict[float, float] = {}
    rates = list(config.learning_rates)  # to try in this round
    while rates:
        points = [Point(candidate, lr, longest, config.seeds[0]) for lr in rates]
        run_points(config, study, rt, shape, points, f"grid of {candidate}")
        for point in points:
            loss = study.results[point.name]["val"]
            losses[point.lr] = math.inf if loss is None else loss

        # Another round if the best rate has no worse one on one side
        best = best_rate(losses)
        if losses[best] == math.inf:
            raise UserError(f"{TITLES[candidate]} diverged at all learning_rates: lower them")
        if best == min(losses):
            rates = [best / 2]
        elif best == max(losses):
            rates = [best * 2]
        else:
            rates = []
    return losses


def best_rate(losses: dict[float, float]) -> float:
    """The learning rate with the lowest loss; of equal ones, the lowest."""
    return min(sorted(losses), key=lambda lr: losses[lr])


def run_points(
    config: Config,
    study: StudyFolder,
    rt: Runtime,
    shape: GPTConfig,
    points: list[Point],
    desc: str,
):
    runs = [make_run(config, rt, shape, point) for point in points]
    study.run_all(runs, read_run, config.device, config.num_parallel, desc)


def make_run(config: Config, rt: Runtime, shape: GPTConfig, point: Point) -> Run:
    """A run of bench/timed_run.py in OUT_DIR/runs/NAME."""
    # The run reads its settings from a file: build-nanogpt has no flags to put them into.
    folder = Path(config.out_dir).resolve() / "runs" / point.name
    folder.mkdir(parents=True, exist_ok=True)
    job = make_job(config, rt, shape, point, folder)
    write_text(folder / "job.json", json.dumps(asdict(job), indent=1) + "\n")
    env = {} if job.is_ours else LIBGOMP_DEFAULT
    return Run(point.name, ["bench/timed_run.py", folder / "job.json"], folder / "output.txt", env)


def make_job(config: Config, rt: Runtime, shape: GPTConfig, point: Point, folder: Path) -> Job:
    script = find_scripts(config)[point.candidate]
    job = Job(
        script=str(script),
        flags=[],
        cwd=str(folder / "work"),
        work=str(folder / "work"),
        curve=str(folder / "curve.json"),
        data_dir=str(Path(config.data_dir).resolve()),
        device=rt.device.type,
        seed=point.seed,
        # A shorter run has the whole schedule: it is warmup and decay that shrink.
        steps=round(point.fraction * config.max_steps),
        val_every=config.val_every,
        val_tokens=config.val_tokens,
        B=config.B,
        T=config.T,
        is_ours=is_ours(point.candidate),
    )
    warmup_steps = round(point.fraction * config.warmup_steps)
    tokens = Path(config.out_dir).resolve() / "tokens" / point.candidate
    if job.is_ours:
        job.flags = our_flags(config, job, point, warmup_steps)
    elif point.candidate == "nanogpt":
        # Its script reads a file next to it by a relative path.
        job.cwd = str(script.parent)
        job.flags = nanogpt_flags(config, rt, job, point, warmup_steps, tokens)
    else:
        job.constants = build_nanogpt_constants(config, shape, job, point, warmup_steps)
        job.autocast = str(rt.dtype).removeprefix("torch.")
        job.links = dict(edu_fineweb10B=str(tokens))  # where its script looks for shards
    return job


def our_flags(config: Config, job: Job, point: Point, warmup_steps: int) -> list[str]:
    flags = dict(
        data_dir=job.data_dir,
        log_dir=job.work,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        block_size=config.T,
        T=config.T,
        B=config.B,
        total_batch_size=config.total_batch_size,
        max_steps=job.steps,
        warmup_steps=warmup_steps,
        max_lr=point.lr,
        min_lr=point.lr / 10,
        seed=point.seed,
        # Only training, with the device's clock running.
        val_every=0,
        sample_every=0,
        hellaswag_every=0,
        checkpoint_every=0,
        rolling_every=0,
        device=job.device,
        dtype=config.dtype,
        compile=config.compile,
    )
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [*words, *(fast_flags(config) if point.candidate == "fast" else ())]


def fast_flags(config: Config) -> list[str]:
    """The recipe as flags of train_gpt2.py, where the last of two values for a flag counts."""
    if config.position_lr_scale is None:
        return [*FAST]
    return [*FAST, "--position_lr_scale", str(config.position_lr_scale)]


def nanogpt_flags(
    config: Config, rt: Runtime, job: Job, point: Point, warmup_steps: int, tokens: Path
) -> list[str]:
    compiled = config.compile == "on" or config.compile == "auto" and job.device == "cuda"
    flags = dict(
        out_dir=job.work,
        dataset=tokens,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        block_size=config.T,
        batch_size=config.B,
        gradient_accumulation_steps=config.total_batch_size // (config.B * config.T),
        # It makes one update more than max_iters.
        max_iters=job.steps - 1,
        lr_decay_iters=job.steps,
        warmup_iters=warmup_steps,
        learning_rate=point.lr,
        min_lr=point.lr / 10,
        # Its own evaluation, on random windows, then happens only before the first update.
        eval_interval=10**9,
        eval_iters=1,
        device=job.device,
        dtype=str(rt.dtype).removeprefix("torch."),
        compile=compiled,
    )
    return [f"--{name}={value}" for name, value in flags.items()]


def build_nanogpt_constants(
    config: Config, shape: GPTConfig, job: Job, point: Point, warmup_steps: int
) -> dict[str, str]:
    """Names in its script, and the expressions that they become."""
    their_shape = (
        f"block_size={config.T}, vocab_size={shape.padded_vocab_size}, n_layer={config.n_layer}, "
        f"n_head={config.n_head}, n_embd={config.n_embd}"
    )
    return dict(
        enc="None",  # only samples need it
        total_batch_size=str(config.total_batch_size),
        B=str(config.B),
        T=str(config.T),
        model=f"GPT(GPTConfig({their_shape}))",
        # Its min_lr is a tenth of it.
        max_lr=repr(point.lr),
        warmup_steps=str(warmup_steps),
        max_steps=str(job.steps),
    )


def read_run(run: Run, diverged: Diverged | None) -> dict:
    """The result of a run.

    val      final validation loss; None if the run diverged
    steps    the steps at which the validation loss was measured
    vals     the validation loss at each
    seconds  the seconds of training until each
    """
    path = run.folder / "curve.json"
    points = json.loads(path.read_text()) if path.exists() else []
    vals = [point["loss"] for point in points]
    return dict(
        val=None if diverged else vals[-1],
        steps=[point["step"] for point in points],
        vals=vals,
        seconds=[point["seconds"] for point in points],
    )


# ---------------------------------------------------------------------------------------------
# Results


def results_of(
    config: Config, study: StudyFolder, candidate: str, lr: float, fraction: float
) -> list[dict]:
    """The results of all seeds; none if any of them diverged."""
    points = [Point(candidate, lr, fraction, seed) for seed in config.seeds]
    results = [study.results[point.name] for point in points]
    return results if all(result["val"] is not None for result in results) else []


def mean_curve(results: list[dict], key: str) -> np.ndarray:
    """Mean over the seeds at each evaluation, (number of evaluations,)."""
    return np.mean([result[key] for result in results], axis=0)


def first_crossing(x: Iterable[float], losses: Iterable[float], target: float) -> float | None:
    """Where losses first fall to the target, linear in between; None if they never do."""
    before: tuple[float, float] | None = None
    for place, loss in zip(x, losses):
        if loss <= target:
            if before is None:
                return float(place)
            fraction = (before[1] - target) / (before[1] - loss)  # 0 at `before`, 1 at `place`
            return float(before[0] + (place - before[0]) * fraction)
        before = (place, loss)
    return None


def needed(
    config: Config, study: StudyFolder, candidate: str, lr: float, target: float
) -> tuple[float | None, float | None]:
    """Steps and seconds that a candidate needs to the target, each at the length that is best."""
    # The best length may differ for the two: seconds per step vary from run to run.
    steps, seconds = [], []
    for fraction in fractions_of(config, candidate):
        results = results_of(config, study, candidate, lr, fraction)
        if results:
            losses = mean_curve(results, "vals")
            steps.append(first_crossing(mean_curve(results, "steps"), losses, target))
            seconds.append(first_crossing(mean_curve(results, "seconds"), losses, target))
    best_steps = min((value for value in steps if value is not None), default=None)
    best_seconds = min((value for value in seconds if value is not None), default=None)
    return best_steps, best_seconds


def find_targets(config: Config, study: StudyFolder, best: dict[str, float]) -> list[Target]:
    """nanoGPT's mean final loss for each length, and AdamW's for all steps."""
    wanted = [("nanogpt", fraction) for fraction in sorted(config.step_fractions)]
    targets = []
    for candidate, fraction in [*wanted, ("adamw", 1.0)]:
        if candidate not in best:
            continue
        results = results_of(config, study, candidate, best[candidate], fraction)
        if results:
            loss = float(mean_curve(results, "vals")[-1])
            targets.append(Target(candidate, fraction, loss))
    return targets


# ---------------------------------------------------------------------------------------------
# Report


def summarize(
    config: Config,
    study: StudyFolder,
    grids: dict[str, dict[float, float]],
    best: dict[str, float],
):
    targets = find_targets(config, study, best)
    study.report(
        f"{config.n_layer} layers of width {config.n_embd}, up to {config.max_steps} steps of "
        f"{config.total_batch_size} tokens; validation loss in nats on {config.val_tokens} tokens; "
        "seconds without start-up and evaluation",
        f"fast: `{' '.join(fast_flags(config))}`",
        grid_table(grids),
        f"At the best rates, mean and standard deviation of {len(config.seeds)} seeds:",
        lengths_table(config, study, best),
        'To the target losses ("share" is that of the tokens and seconds of the candidate that set '
        "the target):",
        targets_table(config, study, best, targets),
    )
    draw(config, study, best, targets)


def grid_table(grids: dict[str, dict[float, float]]) -> str:
    rows = []
    for lr in sorted({lr for losses in grids.values() for lr in losses}):
        losses = [losses.get(lr) for losses in grids.values()]
        cells = ["" if loss is None else f"{loss:.4f}" for loss in losses]
        rows.append((f"{lr:g}", *cells))
    return table(("learning rate", *(TITLES[candidate] for candidate in grids)), rows)


def lengths_table(config: Config, study: StudyFolder, best: dict[str, float]) -> str:
    rows = []
    for candidate, lr in best.items():
        for fraction in fractions_of(config, candidate):
            results = results_of(config, study, candidate, lr, fraction)
            loss, seconds = "diverged", ""
            if results:
                loss = mean_and_deviation([result["val"] for result in results], 4)
                seconds = mean_and_deviation([result["seconds"][-1] for result in results], 1)
            rows.append((TITLES[candidate], f"{lr:g}", f"{fraction:g}", loss, seconds))
    head = ("candidate", "learning rate", "fraction of the steps", "final loss", "seconds")
    return table(head, rows)


def targets_table(
    config: Config, study: StudyFolder, best: dict[str, float], targets: list[Target]
) -> str:
    rows = []
    for target in targets:
        owner = needed(config, study, target.candidate, best[target.candidate], target.loss)
        name = f"{target.loss:.4f} ({TITLES[target.candidate]}, {target.fraction:g} of the steps)"
        for candidate, lr in best.items():
            steps, seconds = needed(config, study, candidate, lr, target.loss)
            tokens = None if steps is None else steps * config.total_batch_size / 1e6
            rows.append(
                (
                    name,
                    TITLES[candidate],
                    *(number(tokens), share(steps, owner[0])),
                    *(number(seconds), share(seconds, owner[1])),
                )
            )
    return table(("target", "candidate", "M tokens", "share", "seconds", "share"), rows)


def number(value: float | None) -> str:
    return "not reached" if value is None else f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def share(value: float | None, whole: float | None) -> str:
    return "" if value is None or not whole else f"{value / whole:.2f}"


def draw(config: Config, study: StudyFolder, best: dict[str, float], targets: list[Target]):
    # The same losses twice: over the tokens, and over the seconds that these took.
    figure = Figure((13, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    tokens = config.total_batch_size / 1e6  # millions per step
    draw_curves(left, config, study, best, "steps", tokens)
    draw_curves(right, config, study, best, "seconds", 1.0)
    for ax in (left, right):
        for target in targets:
            ax.axhline(target.loss, color=COLORS[target.candidate], ls=":", lw=0.8)
    # Cut off the first steps, whose high loss would flatten the differences at the end.
    left.set(xlabel="million tokens", ylabel="validation loss (nats)")
    if targets:
        left.set_ylim(top=max(target.loss for target in targets) + 1)
    right.set(xlabel="seconds of training")
    finish_axes(left, right)
    study.save_plot("time_to_loss.png", figure)


def draw_curves(
    ax: Axes, config: Config, study: StudyFolder, best: dict[str, float], key: str, scale: float
):
    """The mean curve of each candidate and length; shorter lengths are drawn thin."""
    for candidate, lr in best.items():
        fractions = fractions_of(config, candidate)
        for fraction in fractions:
            results = results_of(config, study, candidate, lr, fraction)
            if not results:
                continue
            is_longest = fraction == fractions[-1]
            ax.plot(
                mean_curve(results, key) * scale,
                mean_curve(results, "vals"),
                color=COLORS[candidate],
                lw=1.8 if is_longest else 0.7,
                label=TITLES[candidate] if is_longest else None,
            )


if __name__ == "__main__":
    run_script(main, config)
