"""Which changes of the training recipe let GPT-2 learn from fewer tokens?

    python -m experiments.recipe_study --data_dir datasets/corpus_4096 --n_layer 4 --n_head 4 \\
        --n_embd 128 --T 128 --total_batch_size 2048 --max_steps 200 --max_lr 8e-3
    python -m experiments.recipe_study ... --rows "half batch" "lr x2"     # some rows

The architecture stays GPT-2's. Each row is a change of BASE, the best recipe so far. All rows see
the same number of tokens, in the same order; with the same seed they start from the same weights. A
row wins if its final validation loss, seed by seed, is below the base's by more than two standard
errors. The last rows are BASE with twice the tokens and AdamW with four times as many, for
comparison.

The study has its own training loop, so that only the changes that won became flags of
train_gpt2.py. Runs are not compiled, whatever --compile says.

Output: report.md and results.json in log/recipe_study/. An interrupted study resumes when the
command is repeated; further rows and seeds add runs.
"""

import math
import multiprocessing
import os
import signal
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from typing import Literal

import common.before_torch

from common.console import (
    Progress,
    UserError,
    check_at_least,
    check_known,
    parse_flags,
    run_script,
    say,
    table,
)
from experiments.flags import TrainingConfig, check_different


@dataclass(frozen=True)
class Recipe:
    """How to train. Factors refer to the flags of the study."""

    optimizer: Literal["muon", "adamw"] = "muon"
    length: float = 1.0  # tokens of the run, as a multiple of max_steps * total_batch_size
    lr: float = 1.0  # peak learning rate, as a multiple of max_lr
    embedding_lr: float = 1.0  # learning rate of the token embeddings, as a multiple of lr
    position_lr: float = 1.0  # learning rate of the position embeddings, as a multiple of lr
    bias_lr: float = 1.0  # learning rate of biases and LayerNorms, as a multiple of lr
    muon: Literal["plain", "normalized", "cautious"] = "plain"  # variant of Muon, a key of MUONS
    momentum: float = 0.95  # Muon's momentum
    first_momentum: float = 0.0  # momentum at step 0, rises for half of the run; 0 = constant
    # polynomials of Muon, a key of ROUNDS
    rounds: Literal["Jordan's", "Jordan's four", "three", "four", "five"] = "Jordan's"
    weight_decay: float = 0.1
    beta1: float = 0.9  # AdamW's decay rate for the mean of gradients
    beta2: float = 0.95  # AdamW's decay rate for the mean of squared gradients
    grad_clip: float = 1.0
    warmup: float = 0.1  # fraction of the run
    decay: Literal["cosine", "linear", "late"] = "cosine"  # late: constant, then 1 - sqrt
    final_lr: float = 0.1  # learning rate at the end, as a fraction of the peak
    batch: float = 1.0  # tokens per step, as a multiple of total_batch_size
    first_batch: float = 1.0  # first batch, as a fraction of later ones; grows for half of the run
    short_windows: int = 1  # number of parts into which windows are cut in the first third
    document_windows: bool = False  # windows begin at documents
    embedding_std: float = 0.02  # standard deviation of the initial embeddings
    unigram: bool = False  # start from the frequencies of the tokens
    zero_projections: bool = False  # c_proj starts at zero, so that blocks add nothing at first
    average: float = 0.0  # decay rate per step of an average of the weights; 0 = no average


# The best recipe so far
BASE = Recipe(
    embedding_lr=4.0,
    position_lr=4.0,
    momentum=0.9,
    rounds="four",
    beta1=0.6,
    beta2=0.99,
    grad_clip=0.0,
    warmup=0.02,
    unigram=True,
)

# Name of a row -> what it changes in the base. The first ones take back what won, one by one.
CHANGES: dict[str, dict] = {
    "embeddings x1": dict(embedding_lr=1.0, position_lr=1.0),
    "momentum 0.95": dict(momentum=0.95),
    "Jordan's rounds": dict(rounds="Jordan's"),
    "four of Jordan's rounds": dict(rounds="Jordan's four"),
    "beta1 0.9": dict(beta1=0.9),
    "beta2 0.95": dict(beta2=0.95),
    "clipping at 1": dict(grad_clip=1.0),
    "warmup 10%": dict(warmup=0.1),
    "equal frequencies": dict(unigram=False),
    # Schedules: Defazio et al. 2023 (linear), Haegele et al. 2024 (constant, then 1 - sqrt)
    "linear to 0": dict(decay="linear", final_lr=0.0),
    "linear to 0, momentum 0.95": dict(decay="linear", final_lr=0.0, momentum=0.95),
    "linear to 0, momentum 0.95, equal frequencies": dict(
        decay="linear", final_lr=0.0, momentum=0.95, unigram=False
    ),
    "late decay": dict(decay="late", final_lr=0.0),
    # Learning rates, of all or of some parameters
    "lr x0.5": dict(lr=0.5),
    "lr x2": dict(lr=2.0),
    "tokens x8": dict(embedding_lr=8.0),
    "tokens x16": dict(embedding_lr=16.0),
    "matrices x0.5": dict(lr=0.5, embedding_lr=8.0, position_lr=8.0, bias_lr=2.0),
    "matrices x2": dict(lr=2.0, embedding_lr=2.0, position_lr=2.0, bias_lr=0.5),
    "positions x1": dict(position_lr=1.0),
    "positions x0.25": dict(position_lr=0.25),
    "biases x0.25": dict(bias_lr=0.25),
    "biases x4": dict(bias_lr=4.0),
    # Details of Muon: Jordan et al. 2024 (growing momentum)
    "growing momentum": dict(first_momentum=0.8, momentum=0.95),
    "three rounds": dict(rounds="three"),
    "five rounds": dict(rounds="five"),
    "normalized": dict(muon="normalized"),
    "no weight decay": dict(weight_decay=0.0),
    "cautious weight decay": dict(muon="cautious"),
    # Batch and sequence length: Smith et al. 2018, Li et al. 2022 (short sequences first)
    "half batch": dict(batch=0.5),
    "growing batch": dict(first_batch=0.25),
    "short windows first": dict(short_windows=4),
    "windows at documents": dict(document_windows=True),
    # Weights: Zhang et al. 2019 (zero)
    "embedding std 0.005": dict(embedding_std=0.005),
    "embedding std 0.1": dict(embedding_std=0.1),
    "zero projections": dict(zero_projections=True),
    "average 0.95": dict(average=0.95),
}

# AdamW with train_gpt2.py's betas, clipping and weight decay, and a warmup of 10%, on four times as
# many tokens. Does the base reach the same loss with a quarter of them?
ADAMW = Recipe(optimizer="adamw", length=4.0)
LINEAR = replace(ADAMW, decay="linear", final_lr=0.0)
LATE = replace(ADAMW, decay="late", final_lr=0.0)

ROWS = {row: replace(BASE, **change) for row, change in CHANGES.items()} | {
    "none of these": Recipe(),
    "2x tokens": replace(BASE, length=2.0),
    "2x tokens, linear to 0": replace(BASE, length=2.0, decay="linear", final_lr=0.0),
    "AdamW, 4x tokens, cosine, lr x0.25": replace(ADAMW, lr=0.25),
    "AdamW, 4x tokens, cosine, lr x0.5": replace(ADAMW, lr=0.5),
    "AdamW, 4x tokens, linear to 0, lr x0.25": replace(LINEAR, lr=0.25),
    "AdamW, 4x tokens, linear to 0, lr x0.5": replace(LINEAR, lr=0.5),
    "AdamW, 4x tokens, late decay, lr x0.25": replace(LATE, lr=0.25),
    "AdamW, 4x tokens, late decay, lr x0.5": replace(LATE, lr=0.5),
    "AdamW, 4x tokens, late decay, no clipping, lr x0.25": replace(LATE, lr=0.25, grad_clip=0.0),
}


@dataclass
class Config(TrainingConfig):
    out_dir: str = "log/recipe_study"  # folder for the report and results.json
    rows: tuple[str, ...] = tuple(ROWS)  # changes to compare with the base
    data_dir: str = "datasets/edu_fineweb10B"  # folder of shards, written by fineweb.py
    max_lr: float = 8e-3  # peak learning rate of the base
    B: int = 32  # sequences per forward pass of the evaluation; training takes a whole batch
    T: int = 128  # sequence length in tokens
    total_batch_size: int = 2048  # tokens per optimizer step
    val_tokens: int = 65536  # tokens of the validation shard used for the validation loss

    def __post_init__(self):
        super().__post_init__()
        check_different(self, "rows")
        check_at_least(self, 1, "T", "total_batch_size", "val_tokens")
        check_known("row", self.rows, ROWS)
        if not 0 < self.max_lr < math.inf:
            raise UserError(f"max_lr is {self.max_lr}, must be above 0")
        # The rows divide both by up to four.
        if self.T % 4 or self.total_batch_size % (4 * self.T):
            raise UserError("T must be a multiple of 4, and total_batch_size one of 4 * T")


if __name__ == "__main__":
    config = parse_flags(Config, __doc__)  # before the slow imports: --help answers at once

import numpy as np
import torch

from common.checkpoint import NotFinite
from common.cpu import keep_freed_memory
from common.muon import POLAR_EXPRESS, Muon, Rounds
from common.optim import make_adamw, make_muon
from common.runtime import start as start_runtime
from common.scoring import stream_loss
from common.shards import Shards, open_shards, shards_fingerprint, shards_tokenizer
from dataloader import PretrainLoader, WindowOrder, Windows
from experiments.sweep import StudyFolder, device_envs, mean_and_deviation, settings_of, start
from model import GPT
from train_gpt2 import count_tokens


def main(config: Config):
    rt = start(config)
    if rt.dtype == torch.float16:
        raise UserError("the study does not scale the loss, which float16 needs: --dtype float32")
    shards_tokenizer(config.data_dir)  # fail here, rather than in the first run
    settings = settings_of(
        config,
        rt,
        may_change=["rows", "seeds"],
        data=shards_fingerprint(config.data_dir),
        base=asdict(BASE),
    )
    study = StudyFolder(config.out_dir, settings)
    recipes = {"base": BASE} | {row: ROWS[row] for row in config.rows}

    # Seed by seed, so that a study that is stopped early has compared all rows.
    jobs = [
        (f"{row}, seed {seed}", (config, recipe, seed))
        for seed in config.seeds
        for row, recipe in recipes.items()
    ]
    missing = {name: job for name, job in jobs if name not in study.results}
    bar = Progress(total=len(jobs), initial=len(jobs) - len(missing), desc="training", unit="run")
    # Small models use two cores better as two processes. A process takes its GPU, or its number of
    # threads, from its environment: the threads when it starts, the GPU at its first use.
    envs = device_envs(config.num_parallel, config.device)
    os.environ["OMP_NUM_THREADS"] = envs[0].get("OMP_NUM_THREADS", "1")
    spawn = multiprocessing.get_context("spawn")
    free_envs = spawn.SimpleQueue()
    for env in envs:
        free_envs.put(env)
    with bar, ProcessPoolExecutor(len(envs), spawn, start_worker, (free_envs,)) as pool:
        futures = {pool.submit(final_loss, *job): name for name, job in missing.items()}
        try:
            for future in as_completed(futures):
                study.results[futures[future]] = future.result()
                study.save()
                bar.update()
        except BaseException:
            # Without this, leaving the `with` block would wait for all runs.
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    summarize(config, study, list(recipes))


def start_worker(free_envs):
    """In a new worker process: take an environment, and leave Ctrl-C to the study."""
    os.environ.update(free_envs.get())
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# ---------------------------------------------------------------------------------------------
# Training


class NormalizedMuon(Muon):
    """NorMuon (Li et al. 2025), without the average over steps: rows of the same size.

    The rows of the matrix as it is orthogonalized, so for c_fc the columns.
    """

    def orthogonalize(self, matrices: torch.Tensor) -> torch.Tensor:
        update = super().orthogonalize(matrices)  # (..., rows, columns)
        size = update.norm(dim=(-2, -1), keepdim=True)
        update = update / update.norm(dim=-1, keepdim=True).clamp(min=1e-7)
        return update * (size / update.norm(dim=(-2, -1), keepdim=True))


class CautiousMuon(Muon):
    """Weights decay only where the update makes them smaller, too (Chen et al. 2025)."""

    def update(self, batch: list[tuple[torch.nn.Parameter, dict]]):
        before = [parameter.clone() for parameter, _ in batch]
        super().update([(parameter, group | dict(weight_decay=0.0)) for parameter, group in batch])
        for (parameter, group), old in zip(batch, before):
            shrinks = (old - parameter) * old > 0
            parameter.sub_(group["lr"] * group["weight_decay"] * old * shrinks)


MUONS = dict(plain=Muon, normalized=NormalizedMuon, cautious=CautiousMuon)
# Muon's polynomials: that of Jordan et al. 2024, and those of common/muon.py
JORDAN = (3.4445, -4.7750, 2.0315)
ROUNDS: dict[str, Rounds] = {
    "Jordan's": (JORDAN,) * 5,
    "Jordan's four": (JORDAN,) * 4,
    "three": POLAR_EXPRESS[:3],
    "four": POLAR_EXPRESS,
    "five": (*POLAR_EXPRESS, (2.3465, -1.7098, 0.4232)),
}


class DocumentWindows(Windows):
    """Each document is cut into windows from its end-of-text token on.

    The last window of a document continues into the next one, whose first tokens are read twice.
    """

    def __init__(self, shards: Shards, T: int, end_of_text: int):
        self.starts = []  # of each shard: where its windows begin
        for shard, length in enumerate(shards.lengths):
            documents = np.flatnonzero(shards.read(shard, 0, length) == end_of_text)
            if not len(documents):
                raise UserError(
                    f"{shards.paths[shard]} has no end-of-text token (id {end_of_text})"
                )
            ends = np.append(documents[1:], length)
            cuts = [np.arange(start, end, T) for start, end in zip(documents, ends)]
            starts = np.concatenate(cuts)
            self.starts.append(starts[starts + T < length])
        self.counts = np.array([len(starts) for starts in self.starts])

    def first_token(self, shard: int, window: int) -> int:
        return int(self.starts[shard][window])


def final_loss(config: Config, recipe: Recipe, seed: int) -> float | None:
    """Train a model, and return its validation loss in nats; None if it diverged."""
    # The environment shows a worker only its own GPU, as the first one.
    rt = start_runtime(config.device.split(":")[0], config.dtype)
    keep_freed_memory(rt.device)
    enc = shards_tokenizer(config.data_dir)
    shards = open_shards(config.data_dir, "train")

    # The model and its optimizers. Rows that don't change the weights start from the same ones.
    torch.manual_seed(seed)
    model = GPT(config.gpt_config(block_size=config.T, vocab_size=enc.n_vocab)).to(rt.device)
    change_weights(model, recipe)
    if recipe.unigram:
        model.start_from_frequencies(count_tokens(shards, model.config.padded_vocab_size))
    optimizers = make_optimizers(model, recipe)
    averages = [p.detach().clone() for p in model.parameters()] if recipe.average else []

    # A window is a "batch" here: the recipes cut the same order of windows into other batches.
    loader = PretrainLoader(shards, 1, config.T, config.T, seed)
    if recipe.document_windows:
        loader.windows = DocumentWindows(shards, config.T, enc.eot_token)
        loader.order = WindowOrder(loader.windows.counts, seed)
    num_windows = round(recipe.length * config.max_steps * config.total_batch_size / config.T)

    done = 0  # windows
    for batch in batch_sizes(config, recipe, num_windows):
        # Forward and backward pass. Short windows: the same tokens, in more rows.
        windows = [loader.micro_batch(done + n, 0) for n in range(batch)]
        x, y = (torch.cat(parts).to(rt.device) for parts in zip(*windows))  # (batch, T)
        if done < num_windows / 3:
            x, y = (t.reshape(-1, config.T // recipe.short_windows) for t in (x, y))
        with rt.autocast():
            loss = model(x, y)
        if not math.isfinite(loss.item()):
            return None
        loss.backward()
        if recipe.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)

        # Update. The learning rate is that of the middle of the batch, so that recipes with other
        # batches follow the same schedule.
        factor = learning_rate_factor(recipe, (done + batch / 2) / num_windows)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.max_lr * recipe.lr * factor * group.get("lr_scale", 1.0)
            if recipe.first_momentum and isinstance(optimizer, Muon):
                fraction = min(1.0, 2 * done / num_windows)  # of the way to the last momentum
                growth = recipe.momentum - recipe.first_momentum
                optimizer.momentum = recipe.first_momentum + fraction * growth
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        for average, parameter in zip(averages, model.parameters()):
            average.lerp_(parameter.detach(), 1 - recipe.average)
        done += batch

    # Evaluate the averaged weights, if there are any.
    for average, parameter in zip(averages, model.parameters()):
        parameter.data.copy_(average)
    val_tokens = open_shards(config.data_dir, "val").read_first(config.val_tokens + 1)
    try:
        return stream_loss(model, val_tokens, config.B, config.T, rt)
    except NotFinite:  # the last update diverged
        return None


def change_weights(model: GPT, recipe: Recipe):
    """Apply the recipe's changes of the initial weights."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in ("wte.weight", "wpe.weight"):
                parameter.mul_(recipe.embedding_std / 0.02)
            elif recipe.zero_projections and name.endswith("c_proj.weight"):
                parameter.zero_()


def make_optimizers(model: GPT, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW alone, or Muon for the matrices of the blocks and AdamW for the rest."""
    shared = (model, 1.0, recipe.weight_decay, (recipe.beta1, recipe.beta2), 1e-8)
    if recipe.optimizer == "adamw":
        return [make_adamw(*shared)]
    optimizers = make_muon(
        *shared, embedding_lr_scale=recipe.embedding_lr, position_lr_scale=recipe.position_lr
    )
    muon, adamw = optimizers.optimizers

    adamw.param_groups[-1]["lr_scale"] = recipe.bias_lr
    # make_muon's Muon has the rounds of common/muon.py: replace it by one with the recipe's.
    muon = MUONS[recipe.muon](
        muon.param_groups,
        1.0,
        recipe.weight_decay,
        muon.dtype,
        recipe.momentum,
        ROUNDS[recipe.rounds],
    )
    return [muon, adamw]


def batch_sizes(config: Config, recipe: Recipe, num_windows: int) -> Iterator[int]:
    """The windows of each step, num_windows in all."""
    full = config.total_batch_size // config.T * recipe.batch
    done = 0
    while done < num_windows:
        # From first_batch to 1 in the first half of the run, by the same factor in each step
        size = full * recipe.first_batch ** max(0.0, 1 - 2 * done / num_windows)
        batch = min(max(1, round(size)), num_windows - done)
        yield batch
        done += batch


def learning_rate_factor(recipe: Recipe, progress: float) -> float:
    """The learning rate as a fraction of its peak; progress is from 0 to 1."""
    if progress < recipe.warmup:
        return progress / recipe.warmup
    after = (progress - recipe.warmup) / (1 - recipe.warmup)
    if recipe.decay == "cosine":
        height = 0.5 * (1 + math.cos(math.pi * after))
    elif recipe.decay == "linear":
        height = 1 - after
    else:
        # Constant for 60%
        height = 1 - math.sqrt(max(0.0, (after - 0.6) / 0.4))
    return recipe.final_lr + (1 - recipe.final_lr) * height


# ---------------------------------------------------------------------------------------------
# Report


def summarize(config: Config, study: StudyFolder, rows: list[str]):
    base = [study.results[f"base, seed {seed}"] for seed in config.seeds]
    if None in base:
        raise UserError("the base diverged, so no row can be compared with it: lower max_lr")
    lines = []
    for row in rows:
        losses = [study.results[f"{row}, seed {seed}"] for seed in config.seeds]
        # A recipe that diverges with any seed counts as diverged.
        if None in losses:
            lines.append((row, "diverged", "", "loses"))
            continue
        # Differences seed by seed: what a seed makes easy or hard is the same for both.
        differences = [loss - reference for loss, reference in zip(losses, base)]
        lines.append((row, mean_and_deviation(losses, 4), *verdict(differences)))
    study.report(
        f"{config.n_layer} layers of width {config.n_embd}, "
        f"{config.max_steps * config.total_batch_size / 1e6:.2f}M tokens; validation loss in nats, "
        f"mean and standard deviation of {len(config.seeds)} seeds; difference to the base, seed "
        "by seed, with two standard errors",
        table(("row", "final loss", "difference", "verdict"), lines),
    )
    say(f"base: {BASE}")


def verdict(differences: list[float]) -> tuple[str, str]:
    """The mean difference with two standard errors, and whether it is below or above zero."""
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return f"{mean:+.4f}", "one seed"
    error = 2 * statistics.stdev(differences) / math.sqrt(len(differences))
    word = "wins" if mean < -error else "loses" if mean > error else "no difference"
    return f"{mean:+.4f} ± {error:.4f}", word


if __name__ == "__main__":
    run_script(main, config)
