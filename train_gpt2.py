"""Shards -> a pretrained GPT-2. The defaults are the full run: 124M parameters, 19,073 steps of 524,288 tokens.

    python train_gpt2.py                                            # one GPU, or whatever there is
    torchrun --standalone --nproc_per_node=8 train_gpt2.py          # eight GPUs
    python train_gpt2.py --resume                                   # go on from the newest checkpoint of log/
    python train_gpt2.py --data_dir datasets/pydoc --n_layer 4 --n_head 4 --n_embd 128 --B 8 --T 128 \\
        --total_batch_size 4096 --max_steps 200 --warmup_steps 20 --hellaswag_every 0   # a small one

"step" counts the optimizer steps taken so far: the validation loss of step 100 is that of the model after 100 steps,
the training loss of step 100 that of the batch from which the 101st is made. SIGTERM and Ctrl-C finish the step, write
a checkpoint and exit.
"""

import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import which
from typing import Literal

import torch

import hellaswag
from common import checkpoint, cpu, runtime, tasks
from common.console import Progress, UserError, cli, write_text
from common.optim import (
    Diverged,
    learning_rate,
    make_optimizer,
    optimizer_state,
    prepare_model,
    train_step,
)
from common.runlog import RunLog
from common.runtime import Runtime, StopSignal
from common.scoring import stream_loss
from common.shards import manifest_checksum, open_shards, read_manifest, shards_tokenizer
from common.tokenizer import tokenizer_from_text, tokenizer_to_text
from dataloader import PretrainLoader
from model import GPT, GPTConfig


@dataclass
class Config:
    data_dir: str = "datasets/edu_fineweb10B"  # folder of shards that fineweb.py wrote
    log_dir: str = "log"  # run folder: logs and checkpoints
    # batch
    B: int = (
        64  # micro-batch: sequences per process and forward pass; lower it when memory runs out
    )
    T: int = 1024  # sequence length in tokens
    total_batch_size: int = 524288  # tokens per optimizer step, over all processes and micro-steps
    # length: by steps or by epochs
    max_steps: int | None = (
        None  # optimizer steps; None = 19073, which is 10B tokens, unless num_epochs is given
    )
    num_epochs: int | None = None  # passes over the training shards, instead of max_steps
    # optimizer
    optimizer: Literal["adamw", "muon"] = (
        "adamw"  # muon: Muon for the blocks' matrices, AdamW for all else
    )
    warmup_steps: int = 715  # of linear warmup
    max_lr: float = 6e-4  # learning rate after warmup
    min_lr: float = 6e-5  # learning rate at the last step, down a cosine
    weight_decay: float = 0.1  # of tensors of two dimensions and more
    beta1: float = 0.9  # AdamW's decay of the gradient's mean
    beta2: float = 0.95  # AdamW's decay of its square
    eps: float = 1e-8  # AdamW's epsilon
    grad_clip: float = 1.0  # largest norm of the gradient; 0 = no clipping
    shard_optimizer: bool = (
        False  # each process keeps only its share of AdamW's states (ZeRO stage 1)
    )
    # model
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads per block
    n_embd: int = 768  # width
    block_size: int = 1024  # longest context that the model can read; T may be shorter
    padded_vocab_size: int | None = (
        None  # rows of the embedding; None = the tokenizer's, padded to a multiple of 128: 50304
    )
    norm: Literal["pre", "post"] = (
        "pre"  # LayerNorm before the sublayers (GPT-2), or after (the first Transformer)
    )
    dropout: float = 0.0  # share of activations dropped
    activation_checkpointing: bool = (
        False  # compute the blocks again in the backward pass: less memory, slower
    )
    init_from: str | None = (
        None  # weights to start from: a checkpoint, a Hugging Face folder, gpt2 ... gpt2-xl
    )
    # run
    resume: bool = False  # go on from the newest good checkpoint in log_dir, or start afresh where there is none
    seed: int = 1337  # of weights, data order and samples
    device: str = "auto"  # cuda, mps or cpu; auto takes the first there is
    dtype: runtime.Dtype = (
        "auto"  # of matrix products; auto = bfloat16 where the hardware is fast at it
    )
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto = on GPUs
    timeout: float = 600  # seconds that a process waits for another one before it gives up
    deterministic: bool = (
        False  # only deterministic CUDA kernels, so that a resumed run is exact to the bit; slower
    )
    # now and then, in steps; 0 = never
    val_every: int = 100  # validation loss
    val_tokens: int = 10485760  # tokens of the validation shard to take it on
    hellaswag_every: int = 250  # accuracy on HellaSwag
    hellaswag_data: str | None = (
        None  # hellaswag_val.jsonl; None = downloaded once to datasets/hellaswag
    )
    sample_every: int = 250  # print samples
    sample_prompt: str = "Hello, I'm a language model,"  # how they begin
    checkpoint_every: int = 5000  # checkpoints that are kept; 0 = none but the final one
    rolling_every: int = 250  # checkpoints in between, to resume from: the last two are kept
    wandb: bool = False  # log to Weights & Biases, too

    def __post_init__(self):
        if self.max_steps is not None and self.num_epochs is not None:
            raise UserError("give max_steps or num_epochs, not both")
        if self.shard_optimizer and self.optimizer != "adamw":
            raise UserError(
                f"shard_optimizer shards AdamW's states, not {self.optimizer}'s: leave one of them out"
            )
        intervals = (
            "val_every",
            "hellaswag_every",
            "sample_every",
            "checkpoint_every",
            "rolling_every",
        )
        for name in (*intervals, "warmup_steps", "grad_clip"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}, must not be negative")
        for name in ("B", "T", "total_batch_size", "max_steps", "num_epochs", "val_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, must be at least 1")


def main(config: Config):
    if config.deterministic:
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # without it cuBLAS is not deterministic
        torch.use_deterministic_algorithms(True)
    rt = runtime.start(config.device, config.dtype, config.timeout)
    if not config.activation_checkpointing:  # where memory matters more than time
        cpu.keep_freed_memory(rt.device)
    log_dir, resume = Path(config.log_dir), config.resume or runtime.restarted()
    if rt.is_main:
        prepare_folder(log_dir, resume)
    rt.barrier()

    # data
    train_shards = open_shards(config.data_dir, "train")
    val_shards = open_shards(config.data_dir, "val") if config.val_every else None
    loader = PretrainLoader(
        train_shards,
        config.B,
        config.T,
        config.total_batch_size,
        config.seed,
        rt.rank,
        rt.world_size,
    )
    max_steps = (
        loader.steps_in(config.num_epochs) if config.num_epochs else config.max_steps or 19073
    )
    enc = shards_tokenizer(config.data_dir)
    examples = hellaswag_examples(config, rt)

    # model, optimizer, and where an earlier run left them
    resumed, path = checkpoint.load_newest(log_dir, rt.print) if resume else (None, None)
    fixed = fixed_settings(config)
    if resumed:
        check_agreement(resumed, fixed, path)
    torch.manual_seed(config.seed)
    raw_model = make_model(config, enc, resumed, path).to(rt.device)
    raw_model.activation_checkpointing = config.activation_checkpointing
    betas, sharded = (config.beta1, config.beta2), config.shard_optimizer and rt.world_size > 1
    muon = config.optimizer == "muon"
    optimizer = make_optimizer(
        raw_model, config.max_lr, config.weight_decay, betas, config.eps, sharded, muon
    )
    start_step = 0
    if resumed:
        optimizer.load_state_dict(resumed["optimizer"])
        start_step = resumed["step"]
        rt.print(f"resuming from {path}, step {start_step}")
        del resumed
    train_model, model = prepare_model(raw_model, rt, config.compile)

    if start_step >= max_steps:
        rt.print(f"{log_dir} is finished: {start_step} steps; nothing to do")
        return runtime.leave()

    log = RunLog(log_dir, start_step, rt, config.wandb)
    if rt.is_main:
        write_config(config, max_steps, rt)
    rt.print(
        f"{raw_model.num_params():,} parameters, {rt.device} x {rt.world_size}, {str(rt.dtype)[6:]}"
        f"{', compiled' if model is not raw_model else ''}; {train_shards.num_tokens:,} training tokens; steps of "
        f"{loader.accumulation} x {config.B} x {config.T} x {rt.world_size} tokens"
    )

    def evaluate(step: int):
        if is_due(step, config.val_every, max_steps):
            tokens = val_shards.read(0, 0, min(config.val_tokens + 1, val_shards.lengths[0]))
            loss = stream_loss(model, tokens, config.B, config.T, rt)
            log.write(step, val=loss)
            rt.print(f"step {step} | val {loss:.4f} | perplexity {math.exp(min(loss, 99)):.2f}")
        if examples and is_due(step, config.hellaswag_every, max_steps):
            metrics, _ = hellaswag.evaluate(raw_model, enc, examples, rt, styles=("completion",))
            log.write_hellaswag(step, hellaswag.result_line(metrics))
            rt.print(f"step {step} | HellaSwag {metrics[1]}")
        if step and is_due(step, config.sample_every, max_steps) and rt.is_main:
            log.write(step, samples=draw_samples(raw_model, enc, config, rt))

    saver = checkpoint.BackgroundSaver()  # used on rank 0

    def save(name: str, step: int) -> Path:
        path, optimizer_states = log_dir / name, optimizer_state(optimizer)
        if rt.is_main:
            state = checkpoint.build(raw_model, enc, step, optimizer=optimizer_states, run=fixed)
            keep = 0 if step == max_steps else 2
            saver.save(
                path,
                state,
                then=lambda: checkpoint.remove_rolling(log_dir, config.checkpoint_every, keep),
            )
        return path

    flops = raw_model.flops_per_token(config.T)
    peak_flops = rt.peak_flops()
    step, last_good, began = start_step, path, time.perf_counter()
    with (
        StopSignal() as stop,
        Progress(total=max_steps, initial=step, desc="pretraining", unit="step") as bar,
    ):
        evaluate(step)
        for batch in loader.iterate(start_step, max_steps, rt.device):
            t0 = time.perf_counter()
            rt.seed(
                config.seed, step
            )  # dropout is a function of the step, so that a resumed run draws the same
            lr = learning_rate(step, max_steps, config.warmup_steps, config.max_lr, config.min_lr)
            loss, grad_norm = train_step(train_model, optimizer, batch, lr, config.grad_clip, rt)
            # One reduction for both: the mean loss, and whether any rank was asked to stop.
            loss, stop_asked = rt.sum(torch.stack([loss, loss.new_tensor(stop.number)])).tolist()
            loss, grad_norm = loss / rt.world_size, float(grad_norm)
            if not math.isfinite(loss) or not math.isfinite(grad_norm):
                saver.wait()
                raise Diverged(
                    f"step {step}: loss {loss}, gradient norm {grad_norm}: the run diverged and stops; the last good "
                    f"checkpoint is {last_good}; lower max_lr or lengthen the warmup"
                )
            seconds = time.perf_counter() - t0
            rate = config.total_batch_size / seconds
            log.write(
                step, loss=loss, lr=lr, grad_norm=grad_norm, ms=1000 * seconds, tokens_per_sec=rate,
                mfu=flops * rate / (peak_flops * rt.world_size) if peak_flops else None, memory=rt.peak_memory(),
            )  # fmt: skip
            step += 1
            bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tok/s", refresh=False)
            bar.update()
            if step == max_steps or stop_asked:
                break
            if config.checkpoint_every and (
                is_due(step, config.checkpoint_every) or is_due(step, config.rolling_every)
            ):
                last_good = save(f"model_{step:05d}.pt", step)
            evaluate(step)
        if step == max_steps:
            evaluate(step)

    if step < max_steps:
        path = save(f"model_{step:05d}.pt", step)
        saver.wait()
        rt.print(f"stopped: saved {path}; --resume goes on from there")
        runtime.leave()
        sys.exit(128 + (stop.number or signal.SIGTERM))
    final = save("model_final.pt", step)
    saver.wait()
    seconds = time.perf_counter() - began
    tokens = (step - start_step) * config.total_batch_size
    vals = log.values("val")
    rt.print(
        f"done: {step:,} steps, {step * config.total_batch_size:,} tokens; this run {tokens:,} in {seconds:,.0f} s, "
        f"{tokens / seconds:,.0f} tokens/s"
        + (f"; validation loss {vals[-1]:.4f}, best {min(vals):.4f}" if vals else "")
        + f"\nmodel: {final}   logs: {log_dir}/log.txt, {log_dir}/metrics.jsonl   pictures: python plot.py {log_dir}"
    )
    runtime.leave()


def is_due(step: int, every: int, last_step: int | None = None) -> bool:
    """Whether something that happens every so many steps (0 = never) happens at this one; at the last one it does."""
    return bool(every) and (step % every == 0 or step == last_step)


def prepare_folder(log_dir: Path, resume: bool):
    """Make the run folder. Raises ValueError if it holds a run that is not to be resumed."""
    log_dir.mkdir(parents=True, exist_ok=True)
    held = [
        p.name
        for p in sorted(log_dir.iterdir())
        if p.name in ("log.txt", "config.json") or p.match("model_*.pt")
    ]
    if held and not resume:
        raise UserError(
            f"{log_dir} already holds a run ({held[0]}): --resume it, or choose another --log_dir"
        )
    for leftover in log_dir.glob("*.tmp"):
        leftover.unlink()
    write_text(
        log_dir / "config.json.probe", ""
    )  # not writable? better now than at the first checkpoint
    (log_dir / "config.json.probe").unlink()


def hellaswag_examples(config: Config, rt: Runtime) -> list[dict]:
    """The examples to evaluate while training; none if they are not wanted, or can't be had."""
    if not config.hellaswag_every:
        return []
    try:
        return tasks.load_on_all_ranks(lambda: hellaswag.load(config.hellaswag_data), rt)
    except (OSError, UserError) as error:
        rt.print(f"warning: training without HellaSwag: {error}")
        return []


def fixed_settings(config: Config) -> dict:
    """What a resumed run must share with the run that it goes on from: which tokens come when, and the optimizer."""
    keys = ("seed", "T", "total_batch_size", "optimizer")
    return {key: getattr(config, key) for key in keys} | dict(
        data=manifest_checksum(config.data_dir)
    )


def check_agreement(resumed: dict, fixed: dict, path: Path):
    for key, value in fixed.items():
        was = resumed.get("run", {}).get(key, value)
        if was != value:
            raise UserError(
                f"{path} is from a run with {key}={was}, not {value}: resume with the same, or start anew"
            )


def make_model(config: Config, enc, resumed: dict | None, path: Path | None) -> GPT:
    """The resumed run's model, or that of init_from, or a new one."""
    rows = config.padded_vocab_size or 0
    if resumed:
        model, its_enc = (
            checkpoint.build_model(resumed, path, config.dropout),
            tokenizer_from_text(resumed["tokenizer"]),
        )
    elif config.init_from:
        path = config.init_from
        model, its_enc = checkpoint.load_model(path, config.dropout)
    elif rows and rows < enc.n_vocab:
        raise UserError(f"padded_vocab_size {rows} is below the tokenizer's {enc.n_vocab}")
    else:
        shape = {
            key: getattr(config, key)
            for key in ("block_size", "n_layer", "n_head", "n_embd", "norm", "dropout")
        }
        try:
            shape = GPTConfig(vocab_size=enc.n_vocab, padded_vocab_size=rows, **shape)
        except ValueError as error:
            raise UserError(str(error)) from error
        model, its_enc = GPT(shape), enc
    if tokenizer_to_text(its_enc) != tokenizer_to_text(enc):
        raise UserError(
            f"the shards in {config.data_dir} were made with another tokenizer than {path}"
        )
    if model.config.block_size < config.T:
        raise UserError(f"T {config.T} is above the model's block_size {model.config.block_size}")
    return model


def draw_samples(model: GPT, enc, config: Config, rt: Runtime) -> list[str]:
    prompt = enc.encode_ordinary(config.sample_prompt)
    room = model.config.block_size - len(prompt)
    if room < 1:
        raise UserError(
            f"sample_prompt has {len(prompt)} tokens, the context {model.config.block_size}"
        )
    with rt.autocast():
        outputs = model.generate(
            [prompt] * 4, min(32, room), stop_token=enc.eot_token, top_k=50, seed=config.seed
        )
    samples = [config.sample_prompt + enc.decode(output) for output in outputs]
    for sample in samples:
        rt.print(f"> {sample}")
    return samples


def write_config(config: Config, max_steps: int, rt: Runtime):
    """Everything that one needs to know of a run, in its config.json."""
    manifest = read_manifest(config.data_dir) or {}
    described = dict(
        constants=asdict(config) | dict(max_steps=max_steps),
        command=[sys.executable, *sys.argv],
        commit=commit(),
        versions=dict(python=platform.python_version(), torch=torch.__version__),
        device=torch.cuda.get_device_name()
        if rt.device.type == "cuda"
        else platform.processor() or "cpu",
        world_size=rt.world_size,
        dtype=str(rt.dtype),
        data=dict(
            source=manifest.get("source"),
            tokenizer=manifest.get("tokenizer"),
            manifest_sha256=manifest_checksum(config.data_dir),
        ),
    )
    write_text(Path(config.log_dir) / "config.json", json.dumps(described, indent=2) + "\n")


def commit() -> str | None:
    """The commit of this folder, None without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return (
        subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
        if which("git")
        else None
    )


if __name__ == "__main__":
    cli(Config, main, __doc__)
