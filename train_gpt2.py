"""Pretrain GPT-2 on token shards. The defaults are the full run: 124M parameters, 10B tokens.

    python train_gpt2.py                                     # one process: CUDA, else MPS, else CPU
    torchrun --standalone --nproc_per_node=8 train_gpt2.py   # eight GPUs
    python train_gpt2.py --resume                            # continue from the newest checkpoint
    python train_gpt2.py --data_dir datasets/pydoc --n_layer 4 --n_head 4 --n_embd 128 --B 8 \\
        --T 128 --total_batch_size 4096 --max_steps 200 --warmup_steps 20 --hellaswag_every 0

`step` counts the optimizer steps taken so far. The validation loss logged at step 100 is that of
the model after 100 updates; the training loss at step 100 is that of the batch used for update 101.

SIGTERM and Ctrl-C finish the current step, write a checkpoint and exit.
"""

import math
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import common.before_torch

from common.console import (
    Dtype,
    Progress,
    UserError,
    lock_folder,
    parse_flags,
    run_script,
    write_text,
)
from common.tracker import TrackerName, check_installed


@dataclass
class Config:
    data_dir: str = "datasets/edu_fineweb10B"  # folder of shards, written by fineweb.py
    log_dir: str = "log"  # run folder, for logs and checkpoints

    # ---- Batch

    # micro-batch: sequences per process and forward pass; 0 = the largest that fits into memory
    B: int = 64
    T: int = 1024  # sequence length in tokens
    total_batch_size: int = 524288  # tokens per optimizer step, over all processes

    # ---- Length of the run, in steps or in epochs

    # optimizer steps; None = 19073 (10B tokens), unless num_epochs is given. A finished run that is
    # resumed with more steps continues, at the learning rate that the longer schedule has there
    max_steps: int | None = None
    num_epochs: int | None = None  # passes over the training shards, instead of max_steps

    # ---- Optimizer

    # muon: Muon for the matrices of the blocks, AdamW for everything else
    optimizer: Literal["adamw", "muon"] = "adamw"
    muon_momentum: float = 0.95  # Muon's momentum; about 0.9 is better in short runs
    # with muon: learning rate of the token embeddings, as a multiple of the matrices' rate
    embedding_lr_scale: float = 1.0
    # with muon: the same for the position embeddings; 0.25 is better below a million tokens
    position_lr_scale: float = 1.0
    warmup_steps: int = 715  # steps of linear warmup
    max_lr: float = 6e-4  # learning rate after warmup
    # shape of the decay from max_lr to min_lr (linear, with min_lr 0: Defazio et al. 2023)
    lr_decay: Literal["cosine", "linear"] = "cosine"
    min_lr: float | None = None  # learning rate at the end of the decay; None = max_lr / 10
    weight_decay: float = 0.1  # weight decay of tensors with two or more dimensions
    beta1: float = 0.9  # AdamW's decay rate for the mean of gradients
    beta2: float = 0.95  # AdamW's decay rate for the mean of squared gradients
    eps: float = 1e-8  # AdamW's epsilon
    grad_clip: float = 1.0  # largest norm of the gradient; 0 = no clipping
    # each process keeps only its share of AdamW's states (ZeRO stage 1)
    shard_optimizer: bool = False

    # ---- Model

    n_layer: int = 12  # number of blocks
    n_head: int = 12  # attention heads per block
    n_embd: int = 768  # width of the residual stream
    block_size: int = 1024  # longest context of the model in tokens; T may be shorter
    # rows of the embedding; None = the tokenizer's size, rounded up to a multiple of 128: 50304
    padded_vocab_size: int | None = None
    # LayerNorm before each sublayer (GPT-2) or after it (the original Transformer)
    norm: Literal["pre", "post"] = "pre"
    dropout: float = 0.0  # probability of dropping an activation
    # recompute the blocks in the backward pass: less memory, slower
    activation_checkpointing: bool = False
    # start a new model from the frequencies of the tokens, which short runs would have to learn
    unigram_init: bool = False
    # weights to start from: a checkpoint, a Hugging Face folder, gpt2 ... gpt2-xl
    init_from: str | None = None

    # ---- Run

    # continue from the newest valid checkpoint in log_dir; without one, start from scratch
    resume: bool = False
    seed: int = 1337  # seed of weights, data order, dropout and samples
    device: str = "auto"  # cuda, mps or cpu; auto = the first available of these
    # dtype of the model's matrix products; auto = bfloat16 where the hardware is fast at it,
    # float16 on older NVIDIA GPUs, float32 elsewhere. Muon takes bfloat16 wherever that is fast
    dtype: Dtype = "auto"
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto = on GPUs only
    timeout: float = 600  # seconds that a process waits for another one before it gives up
    # use only deterministic CUDA kernels, so that a resumed run is exact to the bit; slower
    deterministic: bool = False

    # ---- Periodic actions

    val_every: int = 100  # steps between validation losses; 0 = off
    val_tokens: int = 10485760  # tokens of the validation shard used for the validation loss
    hellaswag_every: int = 250  # steps between evaluations on HellaSwag; 0 = off
    # hellaswag_val.jsonl; None = downloaded once to datasets/hellaswag
    hellaswag_data: str | None = None
    # steps between evaluations on CORE, with 500 examples of each of its 22 tasks; 0 = off
    core_every: int = 0
    # folder with core.yaml and eval_data; None = downloaded once to datasets/dclm_core
    core_data: str | None = None
    sample_every: int = 250  # steps between samples, which are printed; 0 = off
    sample_prompt: str = "Hello, I'm a language model,"  # prompt of the samples
    checkpoint_every: int = 5000  # steps between checkpoints that are kept; 0 = only the final one
    # steps between checkpoints to resume from, of which the two newest are kept; 0 = off
    rolling_every: int = 250
    # where else to log: Weights & Biases, Trackio or TensorBoard; each is a package to install
    tracker: TrackerName = "none"

    def __post_init__(self):
        # Ranges of single values.
        intervals = [name for name in vars(self) if name.endswith("_every")]
        for name in ("B", *intervals, "warmup_steps", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}, must not be negative")
        if self.seed >= 2**63:
            raise UserError(f"seed is {self.seed}, must be below 2**63")
        sizes = ("T", "total_batch_size", "max_steps", "num_epochs", "padded_vocab_size")
        for name in (*sizes, "val_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, must be at least 1")
        for name in ("beta1", "beta2", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, must be from 0 to below 1")
        for name in ("max_lr", "weight_decay", "eps", "grad_clip", "timeout"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}, must be finite and not negative")
        for name in ("embedding_lr_scale", "position_lr_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}, must be above 0")

        # A tenth of the peak is what GPT-3 used (Brown et al. 2020).
        if self.min_lr is None:
            self.min_lr = self.max_lr / 10
        if not 0 <= self.min_lr <= self.max_lr:
            raise UserError(f"min_lr is {self.min_lr}, must be from 0 to max_lr {self.max_lr}")

        # Flags that exclude each other, or need another one. A flag without effect would make its
        # user believe that it has one.
        if self.max_steps is not None and self.num_epochs is not None:
            raise UserError("give max_steps or num_epochs, not both")
        if self.shard_optimizer and self.optimizer != "adamw":
            raise UserError(f"shard_optimizer works with AdamW only, not with {self.optimizer}")
        for name in ("muon_momentum", "embedding_lr_scale", "position_lr_scale"):
            if self.optimizer == "adamw" and getattr(self, name) != getattr(Config, name):
                raise UserError(f"{name} needs --optimizer muon")
        if self.unigram_init and (self.norm == "post" or self.init_from):
            raise UserError("unigram_init is for new models (no init_from) with norm pre")
        check_installed(self.tracker)


if __name__ == "__main__":
    config = parse_flags(Config, __doc__)  # before the slow imports: --help answers at once

import numpy as np
import tiktoken
import torch
import torch.nn as nn

import dclm_core
import hellaswag
from common import checkpoint, cpu, memory, runtime
from common.optim import (
    Diverged,
    LossScaler,
    Optimizer,
    PendingResult,
    StepResult,
    learning_rate,
    load_optimizer_state,
    make_adamw,
    make_muon,
    optimizer_state,
    prepare_model,
    train_step,
)
from common.run_record import write_run_record
from common.runlog import RunLog
from common.runtime import Runtime, StopSignal
from common.scoring import bits_per_byte, stream_loss
from common.shards import Shards, open_shards, shards_fingerprint, shards_tokenizer
from common.tasks import Benchmark, load_on_all_ranks
from common.tokenizer import tokenizer_from_text, tokenizer_to_text
from dataloader import PretrainLoader
from model import GPT, GPTConfig

# Benchmarks that can be evaluated during training. Each needs two flags: NAME_every and NAME_data.
BENCHMARKS = (hellaswag.BENCHMARK, dclm_core.BENCHMARK)


def main(config: Config):
    rt = start(config)
    folder = Path(config.log_dir)
    resume = config.resume or runtime.restarted()
    with ExitStack() as stack:
        if rt.is_main:
            # Two runs in one folder would overwrite each other's checkpoints: lock it.
            folder.mkdir(parents=True, exist_ok=True)
            # The process that this one replaces may have died on a machine that lost its network.
            patience = config.timeout if runtime.restarted() else 0
            stack.enter_context(lock_folder(folder, patience))
            prepare_folder(folder, resume)
        # The other ranks read the folder only when it is clean.
        rt.barrier()
        pretrain(config, resume, rt)


def pretrain(config: Config, resume: bool, rt: Runtime):
    """Set up a run in its locked folder, train, and report."""
    run = set_up(config, resume, rt)
    if run.start_step >= run.max_steps:
        rt.print(f"{config.log_dir} is finished: {run.start_step} steps; nothing to do")
        return runtime.leave()

    # max_steps may be None in the flags; the records say what it came to.
    settings = asdict(config) | dict(max_steps=run.max_steps)
    name = run.folder.resolve().name
    run.log = RunLog(run.folder, run.start_step, rt, config.tracker, name, settings)
    write_run_record(run.folder, settings, run.start_step, run.fingerprint, rt)
    rt.print(run.describe())
    if config.warmup_steps >= run.max_steps:
        rt.print(f"warning: the warmup of {config.warmup_steps} steps is not over at the last step")

    began = time.perf_counter()
    with StopSignal() as stop:
        step = train(run, stop)

    seconds = time.perf_counter() - began
    # Before rank 0 draws and reports: the other ranks need not wait for that.
    runtime.leave()
    if rt.is_main and config.tracker != "none":
        run.log.finish(step, draw_pictures(run) if step == run.max_steps else [])
    if step < run.max_steps:
        rt.print(f"stopped: saved {run.last_saved}; --resume continues from there")
        # What a shell reports for a process that a signal ended. A rank that was asked to stop by
        # another one has no number of its own.
        sys.exit(128 + (stop.number or signal.SIGTERM))
    rt.print(summarize(run, seconds))


# ---------------------------------------------------------------------------------------------
# The training loop


@dataclass
class Run:
    """What the training loop works on."""

    config: Config
    rt: Runtime
    folder: Path  # log_dir
    enc: tiktoken.Encoding
    loader: PretrainLoader
    fingerprint: str  # of the shards, when they were opened
    val_tokens: np.ndarray | None  # tokens for the validation loss, (val_tokens + 1,)
    benchmarks: list[tuple[Benchmark, Any]]  # those to evaluate, each with its examples
    model: GPT
    train_model: nn.Module  # the model, possibly compiled and in DDP; all three share their weights
    eval_model: nn.Module  # the model, possibly compiled
    optimizer: Optimizer
    scaler: LossScaler  # scales the loss in float16; does nothing in other dtypes
    start_step: int  # optimizer steps that an earlier process has taken
    max_steps: int
    last_saved: Path | None  # newest checkpoint
    log: RunLog = field(init=False)
    saver: checkpoint.BackgroundSaver = field(default_factory=checkpoint.BackgroundSaver)

    def describe(self) -> str:
        config = self.config
        compiled = ", compiled" if self.eval_model is not self.model else ""
        micro_steps = self.loader.accumulation
        return (
            f"{self.model.num_params():,} parameters, {self.rt.device} x {self.rt.world_size}, "
            f"{self.rt.dtype_name}{compiled}; {self.loader.shards.num_tokens:,} training tokens; "
            f"steps of {config.total_batch_size:,} tokens = {micro_steps} (micro-steps) "
            f"x {config.B} (B) x {config.T} (T) x {self.rt.world_size} (processes)"
        )


def train(run: Run, stop: StopSignal) -> int:
    """Train until max_steps or until a signal asks to stop; return the number of steps taken.

    Each round of the loop begins with the model after `step` updates: it is saved, evaluated and
    sampled if that is due, and then updated once more.
    """
    config = run.config
    # The loader reads ahead in a thread, which ends when `batches` is closed.
    batches = run.loader.iterate(run.start_step, run.max_steps, run.rt.device)
    stop_asked = False
    update = None  # the newest update, until its result has been read
    bar = Progress(total=run.max_steps, initial=run.start_step, desc="pretraining", unit="step")
    with bar, closing(batches), run.saver:
        for step in range(run.start_step, run.max_steps + 1):
            last_step = step == run.max_steps

            # A GPU may still be computing the last update. Before anything is saved, evaluated or
            # sampled, that update must be known to be good.
            wait = not run.rt.runs_ahead or stop_asked or is_pause(run, step)
            if update and wait:
                stop_asked = finish_update(run, update, bar)
                update = None

            # Save first: if something below fails, no more than this step is lost.
            if last_step or stop_asked or (step > run.start_step and is_save_due(config, step)):
                save(run, step)
            if stop_asked and not last_step:
                break

            # Look at the model. An untrained one is not worth a sample.
            if is_due(config.val_every, step, last_step):
                validate(run, step)
            for benchmark, examples in run.benchmarks:
                if is_due(getattr(config, f"{benchmark.name}_every"), step, last_step):
                    evaluate(run, step, benchmark, examples)
            if step > 0 and is_due(config.sample_every, step, last_step):
                draw_samples(run, step)
            if last_step:
                break

            # Start the next update, and only then wait for the result of the one before. So a GPU
            # always has work: it does not wait for Python between two updates.
            next_update = start_update(run, step, next(batches), stop)
            if update:
                stop_asked = finish_update(run, update, bar)
                next_update.began = time.perf_counter()  # until now, the GPU was busy with `update`
            update = next_update
    return step


@dataclass
class Update:
    """An update that was started. A GPU may still be computing it."""

    step: int
    lr: float
    began: float  # time.perf_counter() when the device began to compute it
    result: PendingResult


def start_update(run: Run, step: int, batch: list, stop: StopSignal) -> Update:
    config = run.config
    began = time.perf_counter()
    run.rt.seed(config.seed, step)  # makes dropout a function of the step: resume is exact
    assert config.min_lr is not None  # set by Config.__post_init__
    lr = learning_rate(
        step, run.max_steps, config.warmup_steps, config.max_lr, config.min_lr, config.lr_decay
    )
    loss, grad_norm = train_step(
        run.train_model, run.optimizer, batch, lr, config.grad_clip, run.rt, scaler=run.scaler
    )
    # The ranks share their losses and "was any of them asked to stop?", so that all agree.
    result = PendingResult(loss, grad_norm, run.scaler, run.rt, stop.number)
    return Update(step, lr, began, result)


def finish_update(run: Run, update: Update, bar: Progress) -> bool:
    """Wait for the result of an update and log it; return whether any rank was asked to stop.

    Raises Diverged if the loss or the gradient is not finite.
    """
    result = update.result.read()  # waits for the device
    check_finite(run, update.step, result)
    seconds = time.perf_counter() - update.began
    log_step(run, update, result, seconds)

    # refresh=False: update() draws the bar.
    rate = run.config.total_batch_size / seconds
    bar.set_postfix_str(f"loss {result.loss:.3f}, {rate:,.0f} tok/s", refresh=False)
    bar.update()
    return result.stop_asked


def is_pause(run: Run, step: int) -> bool:
    """Whether the model after `step` updates is saved, evaluated or sampled."""
    config = run.config
    intervals = [config.val_every, config.sample_every]
    intervals += [getattr(config, f"{benchmark.name}_every") for benchmark, _ in run.benchmarks]
    if step == run.max_steps or is_save_due(config, step):
        return True
    return any(is_due(every, step, last_step=False) for every in intervals)


def is_due(every: int, step: int, last_step: bool) -> bool:
    """Whether a periodic action (every so many steps, 0 = never) happens now.

    It always happens at the last step, unless it is off.
    """
    return every > 0 and (step % every == 0 or last_step)


def is_save_due(config: Config, step: int) -> bool:
    return is_due(config.checkpoint_every, step, False) or is_due(config.rolling_every, step, False)


def save(run: Run, step: int):
    """Write the checkpoint of this step in the background."""
    last_step = step == run.max_steps
    name = "model_final.pt" if last_step else f"model_{step:05d}.pt"
    run.last_saved = run.folder / name
    optimizer_states = optimizer_state(run.optimizer)  # needs all ranks if it is sharded
    if not run.rt.is_main:
        return

    # `set_up` reads these fields. The data order and the dropout are functions of the seed and the
    # step, so no state of a random generator is among them.
    state = checkpoint.build(
        run.model,
        run.enc,
        step,
        optimizer=optimizer_states,
        scaler=run.scaler.state_dict(),
        run=resume_keys(run.config, run.fingerprint) | dict(B=run.config.B),
    )

    # Two, not one: if the newest file turns out to be damaged, there is another to resume from.
    keep = 0 if last_step else 2

    # Called when the new checkpoint is complete on disk, never before.
    def remove_old():
        checkpoint.remove_rolling(run.folder, step, run.config.checkpoint_every, keep)

    run.saver.save(run.last_saved, state, then=remove_old)


def validate(run: Run, step: int):
    loss = stream_loss(run.eval_model, run.val_tokens, run.config.B, run.config.T, run.rt)
    bits = bits_per_byte(loss, run.val_tokens, run.enc)
    run.log.write(step, val=loss, val_bits_per_byte=bits)
    perplexity = math.exp(min(loss, 99))  # an untrained model must not overflow
    run.rt.print(
        f"step {step} | val {loss:.4f} | perplexity {perplexity:.2f} | bits per byte {bits:.4f}"
    )


def evaluate(run: Run, step: int, benchmark: Benchmark, examples: Any):
    # The uncompiled model: the shapes of the batches vary, and each would be compiled.
    metrics, _ = benchmark.evaluate_headline(run.model, run.enc, examples, run.rt)
    headline = benchmark.headline(metrics)
    run.log.write(step, **{benchmark.reference.stream: headline.value})
    run.log.write_result(step, benchmark.name, benchmark.result_line(metrics))
    run.rt.print(f"step {step} | {benchmark.reference.title} {headline}")


def draw_samples(run: Run, step: int):
    """Print and log four continuations of sample_prompt. Rank 0 alone does it."""
    if not run.rt.is_main:
        return
    config = run.config
    prompt = run.enc.encode_ordinary(config.sample_prompt)
    # Within the context: a sample past its end would show the moving window, not the model.
    room = run.model.config.block_size - len(prompt)
    try:
        with run.rt.autocast():
            outputs = run.model.generate(
                [prompt] * 4,
                min(32, room),
                stop_token=run.enc.eot_token,
                top_k=50,
                # The same at every step: what differs between two samples is the model.
                seed=config.seed,
            )
    except FloatingPointError as error:
        raise checkpoint.not_finite_error(run.model) from error
    samples = [config.sample_prompt + run.enc.decode(output) for output in outputs]
    for sample in samples:
        run.rt.print(f"> {sample}")
    run.log.write(step, samples=samples)


def check_finite(run: Run, step: int, result: StepResult):
    """Raise Diverged if the loss or the gradient is not finite. Nothing is saved after that."""
    if not result.diverged:
        return
    remedy = "lower max_lr or lengthen the warmup"
    if run.scaler.is_enabled():
        remedy += ", or try --dtype float32: float16 overflowed at every loss scale"
    last_good = "no checkpoint has been saved yet"
    if run.last_saved:
        last_good = f"the last good checkpoint is {run.last_saved}"
    raise Diverged(
        f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}: the run diverged and "
        f"stops; {last_good}; {remedy}"
    )


def log_step(run: Run, update: Update, result: StepResult, seconds: float):
    rate = run.config.total_batch_size / seconds
    # Model FLOPs utilization (Chowdhery et al. 2022, "PaLM"): FLOP/s of the model, as a share of
    # what the GPUs can do.
    peak_flops = run.rt.peak_flops()
    mfu = None
    if peak_flops:
        flops = run.model.flops_per_token(run.config.T)
        mfu = flops * rate / (peak_flops * run.rt.world_size)
    run.log.write(
        update.step,
        **result.record(),
        lr=update.lr,
        ms=1000 * seconds,
        tokens_per_sec=rate,
        mfu=mfu,
        memory=run.rt.peak_memory(),
    )


def draw_pictures(run: Run) -> list[Path]:
    """The pictures that plot.py draws of the logs."""
    script = Path(__file__).with_name("plot.py")
    done = subprocess.run([sys.executable, script, run.folder], capture_output=True, text=True)
    if done.returncode:
        run.rt.print(f"warning: no plots: {done.stderr.strip()}")
        return []
    return [Path(line) for line in done.stdout.splitlines()]


def summarize(run: Run, seconds: float) -> str:
    """The last lines on the screen: what was done, how fast, how well, where the results are."""
    config = run.config
    new_tokens = (run.max_steps - run.start_step) * config.total_batch_size
    text = (
        f"done: {run.max_steps:,} steps, {run.max_steps * config.total_batch_size:,} tokens; "
        f"this run {new_tokens:,} in {seconds:,.0f} s, {new_tokens / seconds:,.0f} tokens/s"
    )
    val_losses = run.log.values("val")
    if val_losses:
        text += f"; validation loss {val_losses[-1]:.4f}, best {min(val_losses):.4f}"
    return (
        f"{text}\nmodel: {run.last_saved}   logs: {run.folder}/log.txt, {run.folder}/metrics.jsonl"
        f"   plots: python plot.py {run.folder}"
    )


# ---------------------------------------------------------------------------------------------
# Setting up


def start(config: Config) -> Runtime:
    """Choose device and dtype, and join the other ranks."""
    if config.deterministic:
        # cuBLAS is deterministic only with a workspace of fixed size.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if config.shard_optimizer:
        # Before the ranks are joined, for the reason that runtime.join gives. It takes a second.
        from torch.distributed.optim import ZeroRedundancyOptimizer  # noqa: F401
    rt = runtime.start(config.device, config.dtype, config.timeout)
    # Activation checkpointing says that memory matters more than time.
    if not config.activation_checkpointing:
        cpu.keep_freed_memory(rt.device)
    return rt


def prepare_folder(folder: Path, resume: bool):
    """Clean the run folder. Raises UserError if it holds a run that is not to be resumed."""
    for path in sorted(folder.iterdir()):
        of_a_run = path.name in ("log.txt", "config.json") or path.match("model_*.pt")
        if of_a_run and not resume:
            raise UserError(
                f"{folder} already holds a run ({path.name}): --resume it, or choose another "
                "--log_dir"
            )
        if path.suffix == ".tmp":  # an interrupted write
            path.unlink()

    # A folder that is not writable should fail now, not at the first checkpoint.
    write_text(folder / "config.json.probe", "")
    (folder / "config.json.probe").unlink()


def set_up(config: Config, resume: bool, rt: Runtime) -> Run:
    """Data, model and optimizer: from the newest checkpoint, from init_from, or new."""
    free = memory.free_memory(rt)  # measured before this process takes any of it

    # Data. Everything that can be wrong with it is found before the model is made.
    shards = open_shards(config.data_dir, "train")
    # Computed here, because fineweb.py may add shards to the folder during the run.
    fingerprint = shards_fingerprint(config.data_dir)
    enc = shards_tokenizer(config.data_dir)
    val_tokens = read_val_tokens(config)
    benchmarks = load_benchmarks(config, rt)

    # Model
    folder = Path(config.log_dir)
    loaded, loaded_from = None, None
    if resume:
        loaded, loaded_from = find_checkpoint(folder, rt)
    if loaded and loaded_from:
        check_agreement(config, fingerprint, loaded, loaded_from)
    model = set_up_model(config, enc, shards, loaded, loaded_from, free, rt)
    model.to(rt.device)
    model.activation_checkpointing = config.activation_checkpointing

    # Batches and length of the run. The memory check above may have chosen B.
    loader = PretrainLoader(
        shards, config.B, config.T, config.total_batch_size, config.seed, rt.rank, rt.world_size
    )
    if config.num_epochs:
        max_steps = loader.steps_in(config.num_epochs)
    else:
        max_steps = config.max_steps or 19073

    # Optimizer. It is made after the model has moved: its states live where the weights are.
    optimizer = set_up_optimizer(config, model, rt)
    scaler = LossScaler(rt)
    start_step = 0
    if loaded:
        load_optimizer_state(optimizer, loaded["optimizer"])
        scaler.load_state_dict(loaded.get("scaler"))
        start_step = loaded["step"]
        rt.print(f"resuming from {loaded_from}, step {start_step}")

    # Compiling and DDP come last: they need the weights in their final place.
    train_model, eval_model = prepare_model(model, rt, config.compile)
    return Run(
        config=config,
        rt=rt,
        folder=folder,
        enc=enc,
        loader=loader,
        fingerprint=fingerprint,
        val_tokens=val_tokens,
        benchmarks=benchmarks,
        model=model,
        train_model=train_model,
        eval_model=eval_model,
        optimizer=optimizer,
        scaler=scaler,
        start_step=start_step,
        max_steps=max_steps,
        last_saved=loaded_from,
    )


def find_checkpoint(folder: Path, rt: Runtime) -> tuple[dict | None, Path | None]:
    """The checkpoint to resume from and its path; (None, None) if the folder has none.

    Raises UserError if all checkpoints are damaged: a new run would overwrite what may be saved.
    """
    loaded, path = checkpoint.load_newest(folder, rt.print)
    if not loaded and checkpoint.candidates(folder):
        raise UserError(f"no checkpoint in {folder} is valid: remove them to start from scratch")
    if not loaded:
        rt.print(f"no checkpoint in {folder}: starting from scratch")
    return loaded, path


def set_up_optimizer(config: Config, model: GPT, rt: Runtime) -> Optimizer:
    betas = (config.beta1, config.beta2)
    shared = (model, config.max_lr, config.weight_decay, betas, config.eps)
    if config.optimizer == "adamw":
        return make_adamw(*shared, sharded=config.shard_optimizer and rt.world_size > 1)
    return make_muon(
        *shared,
        momentum=config.muon_momentum,
        embedding_lr_scale=config.embedding_lr_scale,
        position_lr_scale=config.position_lr_scale,
    )


def fit_into_memory(config: Config, model: GPT, loaded: dict | None, free: int, rt: Runtime):
    """Choose B if it is 0, and raise UserError if the run needs more memory than is free.

    The numbers of one B differ from those of another in the last digits. A run with --B 0 therefore
    resumes with the B of its checkpoint, if that still fits.
    """
    # If a step is not a whole number of sequences, the loader says so.
    sequences, rest = divmod(config.total_batch_size, config.T * rt.world_size)
    if rest:
        config.B = max(1, config.B)
        return
    estimate = memory.TrainingMemory(
        model,
        config.T,
        sequences,
        rt,
        muon=config.optimizer == "muon",
        sharded=config.shard_optimizer,
        activation_checkpointing=config.activation_checkpointing,
        saves_during_training=config.checkpoint_every > 0 or config.rolling_every > 0,
    )
    # Checkpoints of older versions have no B.
    earlier = loaded.get("run", {}).get("B", 0) if loaded else 0
    if config.B == 0 and earlier and sequences % earlier == 0 and estimate.need(earlier) <= free:
        config.B = earlier
    config.B = memory.choose_B(config.B, free, estimate)
    need = estimate.need(config.B)
    rt.print(
        f"memory: B {config.B} needs about {memory.gb(need)} per process, "
        f"{memory.gb(free)} are free"
    )


def read_val_tokens(config: Config) -> np.ndarray | None:
    """The first val_tokens + 1 tokens of the validation shards; None if not needed."""
    if not config.val_every:
        return None
    shards = open_shards(config.data_dir, "val")
    return shards.read_first(config.val_tokens + 1)


def load_benchmarks(config: Config, rt: Runtime) -> list[tuple[Benchmark, Any]]:
    """The benchmarks to evaluate during training, with their examples.

    One whose data can't be downloaded is left out, with a warning. A file that does not exist is an
    error.
    """
    benchmarks = []
    for benchmark in BENCHMARKS:
        if not getattr(config, f"{benchmark.name}_every"):
            continue
        data = getattr(config, f"{benchmark.name}_data")
        try:
            examples = load_on_all_ranks(partial(benchmark.load, data, None), rt)
            benchmarks.append((benchmark, examples))
        except (OSError, UserError) as error:
            if data is not None:
                raise
            rt.print(f"warning: training without {benchmark.reference.title}: {error}")
    return benchmarks


def resume_keys(config: Config, fingerprint: str) -> dict:
    """Settings that a resumed run must share with its checkpoint: which tokens come when, and the
    optimizer."""
    keys = ("seed", "T", "total_batch_size", "optimizer")
    settings = {key: getattr(config, key) for key in keys}
    return settings | dict(shards=fingerprint)


def check_agreement(config: Config, fingerprint: str, loaded: dict, path: Path):
    """Raise UserError if the checkpoint in `path` was trained with other resume_keys."""
    for key, value in resume_keys(config, fingerprint).items():
        earlier = loaded.get("run", {}).get(key, value)
        if earlier != value and key == "shards":
            raise UserError(
                f"{path} was trained on other shards than those in {config.data_dir} now: use the "
                "same, or start a new run from its weights with --init_from and another --log_dir"
            )
        if earlier != value:
            raise UserError(
                f"{path} is from a run with {key}={earlier}, not {value}: use the same value, or "
                "choose another --log_dir"
            )


def make_model(
    config: Config, enc: tiktoken.Encoding, loaded: dict | None, path: Path | None
) -> GPT:
    """The model of the loaded checkpoint, else that of init_from, else a new one."""
    if loaded and path:
        model = checkpoint.build_model(loaded, path, config.dropout)
        check_tokenizer(config, enc, tokenizer_from_text(loaded["tokenizer"]), path)
    elif config.init_from:
        model, model_enc = checkpoint.load_model(config.init_from, config.dropout)
        check_tokenizer(config, enc, model_enc, config.init_from)
    else:
        model = GPT(new_shape(config, enc))
    check_lengths(config, enc, model)
    return model


def set_up_model(
    config: Config,
    enc: tiktoken.Encoding,
    shards: Shards,
    loaded: dict | None,
    loaded_from: Path | None,
    free: int,
    rt: Runtime,
) -> GPT:
    """The model to train, on the CPU. It fits into `free` bytes with the micro-batch config.B."""
    is_new = not loaded and not config.init_from
    if is_new:
        # On the "meta" device a model has shapes and no memory: one that is too large for this
        # machine is not even made.
        with torch.device("meta"):
            fit_into_memory(config, GPT(new_shape(config, enc)), None, free, rt)
    torch.manual_seed(config.seed)
    model = make_model(config, enc, loaded, loaded_from)
    if is_new and config.unigram_init:
        model.start_from_frequencies(count_tokens(shards, model.config.padded_vocab_size))
    for line in adopt_shape(config, model):
        rt.print(line)
    if not is_new:
        fit_into_memory(config, model, loaded, free, rt)
    return model


def count_tokens(shards: Shards, num_rows: int) -> torch.Tensor:
    """How often each token occurs at the start of the first shard; (num_rows,) int64."""
    # Enough for the frequencies, and quick to read
    ids = shards.read(0, 0, min(shards.lengths[0], 10_000_000))
    return torch.from_numpy(np.bincount(ids, minlength=num_rows))


def new_shape(config: Config, enc: tiktoken.Encoding) -> GPTConfig:
    """The shape of a new model. Raises UserError if it is impossible."""
    rows = config.padded_vocab_size or 0  # 0: GPTConfig rounds up
    if 0 < rows < enc.n_vocab:
        raise UserError(f"padded_vocab_size {rows} is below the tokenizer's {enc.n_vocab}")
    try:
        return GPTConfig(
            block_size=config.block_size,
            vocab_size=enc.n_vocab,
            padded_vocab_size=rows,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            norm=config.norm,
            dropout=config.dropout,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def adopt_shape(config: Config, model: GPT) -> list[str]:
    """Set the shape in `config` to that of a loaded model; return messages about ignored flags."""
    messages = []
    for name in ("n_layer", "n_head", "n_embd", "block_size", "padded_vocab_size", "norm"):
        asked, actual = getattr(config, name), getattr(model.config, name)
        is_given = asked != Config.__dataclass_fields__[name].default
        if is_given and asked != actual:
            messages.append(f"{name} {asked} is ignored: the loaded model has {actual}")
        # config.json records the shape of the model that was trained.
        setattr(config, name, actual)
    return messages


def check_tokenizer(
    config: Config, shards_enc: tiktoken.Encoding, model_enc: tiktoken.Encoding, model_name
):
    """Raise UserError if shards and model have different tokenizers: ids would mean other text."""
    if tokenizer_to_text(model_enc) != tokenizer_to_text(shards_enc):
        raise UserError(
            f"the shards in {config.data_dir} were made with another tokenizer than {model_name}"
        )


def check_lengths(config: Config, enc: tiktoken.Encoding, model: GPT):
    """Raise UserError if sequences or the prompt of samples don't fit into the model's context."""
    block_size = model.config.block_size
    if block_size < config.T:
        raise UserError(f"T {config.T} is above the model's block_size {block_size}")
    prompt_length = len(enc.encode_ordinary(config.sample_prompt))
    if config.sample_every and prompt_length == 0:
        raise UserError("sample_prompt is empty: give some text, or --sample_every 0")
    if config.sample_every and prompt_length >= block_size:
        raise UserError(f"sample_prompt has {prompt_length} tokens, the context {block_size}")


if __name__ == "__main__":
    run_script(main, config)
