"""A pretrained model -> one that writes descriptions: search the learning rate, finetune, report what it brought.

    python finetune.py                                     # log/model_final.pt on datasets/finetune_data.txt
    python finetune.py --init_from gpt2 --lora_rank 8      # OpenAI's weights, adapters only
    torchrun --standalone --nproc_per_node=8 finetune.py --init_from gpt2-medium
    python finetune.py --resume                            # go on where it was stopped
    python finetune.py --learning_rates 2e-4               # only one: no search

Phase 1 trains a little at each of the learning rates, from the same weights on the same batches, and takes the one with
the lowest validation loss. Phase 2 trains num_epochs at that rate, with a checkpoint after each epoch; model_best.pt is
the one of the lowest validation loss. Then base and finetuned model are compared: finetune_runs/report.md.

A tenth of the descriptions is held out for validation, before they are packed into sequences.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from common import checkpoint, cpu, lora, runtime
from common.console import Progress, UserError, checksum, cli, table, write_text
from common.optim import Diverged, learning_rate, make_optimizer, prepare_model, train_step
from common.runlog import RunLog
from common.runtime import Runtime
from common.scoring import stream_loss
from dataloader import FinetuneLoader
from fantasy.descriptions import read_descriptions
from fantasy.report import draw_losses, draw_search, report

SEARCH = "finetune_hyperparameter_search"


@dataclass
class Config:
    init_from: str = (
        "log/model_final.pt"  # a checkpoint, a Hugging Face folder, or gpt2 ... gpt2-xl
    )
    data: str = "datasets/finetune_data.txt"  # <LOC> ... </LOC> blocks, which generate_finetune_data.py wrote
    out_dir: str = "finetune_runs"  # folder of the search, the final run and the report
    # batch
    B: int = 8  # micro-batch: sequences per process and forward pass
    T: int = 512  # sequence length in tokens
    total_batch_size: int = (
        32768  # tokens per optimizer step, over all processes: 64 sequences of 512
    )
    # phase 1: the search
    learning_rates: tuple[float, ...] = (
        1e-4,
        2e-4,
        5e-4,
        1e-3,
        3e-3,
        7e-3,
    )  # to try; only one = no search
    search_epochs: int = 2  # of each try
    # phase 2: the final training
    num_epochs: int = 7  # passes over the descriptions
    patience: int = 0  # stop after so many epochs without a better validation loss; 0 = never
    # optimizer
    warmup: float = 0.1  # share of the steps in which the learning rate rises; then a cosine down to a tenth of it
    weight_decay: float = 0.1  # of tensors of two dimensions and more
    grad_clip: float = 1.0  # largest norm of the gradient; 0 = no clipping
    dropout: float = 0.1  # share of activations dropped
    lora_rank: int = (
        0  # rank of LoRA's adapters, which are trained instead of the model; 0 = train the model
    )
    # run
    resume: bool = False  # go on with what out_dir holds
    seed: int = 1337  # of split, order, dropout, adapters and samples
    device: str = "auto"  # cuda, mps or cpu; auto takes the first there is
    dtype: runtime.Dtype = (
        "auto"  # of matrix products; auto = bfloat16 where the hardware is fast at it
    )
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto = on GPUs
    # report
    num_samples: int = 50  # descriptions that base and finetuned model each write for it
    general_data: str = (
        "datasets/edu_fineweb10B"  # folder of shards: what was forgotten of general text
    )
    general_tokens: int = 100_000  # of its validation shard

    def __post_init__(self):
        for name in (
            "B",
            "T",
            "total_batch_size",
            "search_epochs",
            "num_epochs",
            "num_samples",
            "general_tokens",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, must be at least 1")
        if self.total_batch_size % self.T:
            raise UserError(
                f"total_batch_size {self.total_batch_size} is not divisible by T {self.T}"
            )
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise UserError("learning_rates must hold at least one, and each be above 0")
        if not 0 <= self.warmup <= 1 or min(self.patience, self.lora_rank, self.grad_clip) < 0:
            raise UserError(
                "warmup must be between 0 and 1; patience, lora_rank and grad_clip not negative"
            )


def main(config: Config):
    rt = runtime.start(config.device, config.dtype)
    cpu.keep_freed_memory(rt.device)
    out_dir = Path(config.out_dir)
    training, held_out = split(read_descriptions(config.data), config.seed)
    tuner = Finetuner(config, training, held_out, rt)
    if rt.is_main:
        prepare_folder(out_dir, config.resume or runtime.restarted(), tuner.settings)
    rt.barrier()
    lr = config.learning_rates[0] if len(config.learning_rates) == 1 else search(config, tuner, rt)
    folder = out_dir / f"final_lr_{decimal(lr)}"
    history = finetune(config, tuner, lr, folder, rt)
    best = min(history, key=lambda epoch: epoch["val_loss"])
    rt.print(
        f"best epoch: {best['epoch']} of {len(history)}, validation loss {best['val_loss']:.4f} "
        f"(before finetuning {tuner.base_val_loss:.4f})\nmodel: {folder}/model_best.pt"
    )
    if rt.is_main:
        draw_losses(folder / "finetune_losses.png", history, tuner.base_val_loss)
        local = Runtime(rt.device, rt.dtype)  # the other ranks have nothing left to do
        report(config, folder / "model_best.pt", training, tuner.val_tokens, local)
    runtime.leave()


def split(descriptions: list[str], seed: int) -> tuple[list[str], list[str]]:
    """Nine tenths for training and a tenth for validation, at random."""
    order = np.random.default_rng(seed).permutation(len(descriptions))
    held_out = max(1, round(len(descriptions) / 10))
    return [descriptions[i] for i in order[held_out:]], [descriptions[i] for i in order[:held_out]]


def prepare_folder(out_dir: Path, resume: bool, settings: dict):
    """Make the folder. Raises ValueError if it holds a run that is not to be resumed, or one with other settings."""
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / "settings.json"
    if path.exists() and not resume:
        raise UserError(f"{out_dir} already holds a run: --resume it, or choose another --out_dir")
    if path.exists():
        for key, was in json.loads(path.read_text()).items():
            if was != settings[key]:
                raise UserError(
                    f"{out_dir} holds a run with {key}={was}, not {settings[key]}: choose another --out_dir"
                )
    write_text(path, json.dumps(settings, indent=1) + "\n")


def decimal(lr: float) -> str:
    """2e-4 as 0.0002."""
    return np.format_float_positional(lr, trim="-")


class Finetuner:
    """A model and its data, to be trained several times from the same weights."""

    def __init__(self, config: Config, training: list[str], held_out: list[str], rt: Runtime):
        self.config, self.rt = config, rt
        self.model, self.enc = checkpoint.load_model(config.init_from, config.dropout)
        if self.model.config.block_size < config.T:
            raise UserError(
                f"T {config.T} is above the model's block_size {self.model.config.block_size}"
            )
        if config.lora_rank:
            torch.manual_seed(config.seed)
            lora.add_adapters(self.model, config.lora_rank)
        self.initial = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.model.to(rt.device)
        self.train_model, self.eval_model = prepare_model(self.model, rt, config.compile)

        per_step = config.total_batch_size // config.T
        tokens = self.encode(training)
        self.loader = FinetuneLoader(
            tokens, config.B, config.T, per_step, config.seed, rt.rank, rt.world_size
        )
        self.val_tokens = self.encode(held_out)
        self.base_val_loss = self.validate()
        fixed = (
            "T",
            "total_batch_size",
            "search_epochs",
            "num_epochs",
            "warmup",
            "weight_decay",
            "grad_clip",
        )
        self.settings = dict(
            weights=checkpoint.fingerprint(config.init_from), data=checksum(config.data)
        )
        self.settings |= {
            key: getattr(config, key) for key in (*fixed, "dropout", "lora_rank", "seed")
        }
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        rt.print(
            f"{len(training)} descriptions ({len(tokens):,} tokens) to train on, {len(held_out)} held out; "
            f"{trained:,} of {sum(p.numel() for p in self.model.parameters()):,} parameters are trained; "
            f"validation loss before: {self.base_val_loss:.4f}"
        )

    def encode(self, descriptions: list[str]) -> np.ndarray:
        """One stream, end-of-text before each description and after the last."""
        ids = [
            token
            for text in descriptions
            for token in (self.enc.eot_token, *self.enc.encode_ordinary(text))
        ]
        return np.array([*ids, self.enc.eot_token])

    def validate(self) -> float:
        return stream_loss(self.eval_model, self.val_tokens, self.config.B, self.config.T, self.rt)

    def reset(self, state: dict | None = None):
        """Put back the initial weights, or those of a checkpoint of an earlier run; return a new optimizer."""
        self.model.load_state_dict(
            self.initial | (state["lora"] or state["model"]) if state else self.initial
        )
        optimizer = make_optimizer(self.model, 1.0, self.config.weight_decay, (0.9, 0.95), 1e-8)
        if state:
            optimizer.load_state_dict(state["optimizer"])
        return optimizer

    def train(
        self, optimizer, lr: float, epochs: int, done: int = 0, log: RunLog | None = None
    ) -> Iterator[dict]:
        """Train from epoch `done` on; after each epoch, yield its number, training and validation loss. A loss that is
        not finite ends it: the epoch's validation loss is infinite then."""
        config, rt, per_epoch = self.config, self.rt, self.loader.steps_per_epoch
        steps = epochs * per_epoch
        warmup_steps = round(config.warmup * steps)
        with Progress(
            total=steps, initial=done * per_epoch, desc=f"lr {decimal(lr)}", unit="step"
        ) as bar:
            for epoch in range(done, epochs):
                losses, weights = [], []
                for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
                    began = time.perf_counter()
                    rt.seed(
                        config.seed, step
                    )  # dropout is a function of the step, as in pretraining
                    batch, shares, tokens = self.loader.batch(step, rt.device)
                    now = learning_rate(step, steps, warmup_steps, lr, lr / 10)
                    loss, norm = train_step(
                        self.train_model, optimizer, batch, now, config.grad_clip, rt, shares
                    )
                    loss, norm = float(rt.sum([loss]) / rt.world_size), float(norm)
                    if not math.isfinite(loss) or not math.isfinite(norm):
                        yield dict(
                            epoch=epoch + 1, step=step + 1, train_loss=math.inf, val_loss=math.inf
                        )
                        return
                    losses.append(loss)
                    weights.append(tokens)
                    if log:
                        seconds = time.perf_counter() - began
                        log.write(
                            step, loss=loss, lr=now, grad_norm=norm, ms=1000 * seconds, tokens_per_sec=tokens / seconds,
                            mfu=None, memory=rt.peak_memory(),
                        )  # fmt: skip
                    bar.set_postfix_str(f"epoch {epoch + 1}, loss {loss:.3f}", refresh=False)
                    bar.update()
                train_loss, val_loss = float(np.average(losses, weights=weights)), self.validate()
                if log:
                    log.write(step + 1, val=val_loss)
                yield dict(epoch=epoch + 1, step=step + 1, train_loss=train_loss, val_loss=val_loss)


def search(config: Config, tuner: Finetuner, rt: Runtime) -> float:
    """Phase 1: the learning rate with the lowest validation loss after search_epochs. Rates tried before are kept."""
    out_dir = Path(config.out_dir)
    path = out_dir / f"{SEARCH}.json"
    tried = (
        {result["lr"]: result for result in json.loads(path.read_text())} if path.exists() else {}
    )
    rt.barrier()
    for lr in config.learning_rates:
        if lr in tried:
            continue
        epochs = list(tuner.train(tuner.reset(), lr, config.search_epochs))
        last = epochs[-1]
        status = "trained"
        if not math.isfinite(last["val_loss"]) or last["val_loss"] > tuner.base_val_loss:
            status = "diverged"  # worse than before training, or not a number
        tried[lr] = last | dict(
            lr=lr, status=status, val_losses=[epoch["val_loss"] for epoch in epochs]
        )
        if rt.is_main:
            write_text(path, json.dumps([tried[lr] for lr in sorted(tried)], indent=1) + "\n")
    results = [tried[lr] for lr in sorted(config.learning_rates)]
    good = [result for result in results if result["status"] == "trained"]
    best = min(good, key=lambda result: result["val_loss"], default=None)
    rows = []
    for r in results:
        figures = (r["train_loss"], r["val_loss"], math.exp(min(99, r["val_loss"])))
        rows.append(
            (decimal(r["lr"]), *(f"{x:.4f}" for x in figures), "best" if r is best else r["status"])
        )
    text = table(("learning rate", "training loss", "validation loss", "perplexity", ""), rows)
    rt.print(f"{text}\n{out_dir}/{SEARCH}.txt, .png")
    if rt.is_main:
        write_text(out_dir / f"{SEARCH}.txt", text + "\n")
        draw_search(out_dir / f"{SEARCH}.png", results, tuner.base_val_loss)
    if best is None:
        raise UserError(
            "training diverged at every learning rate: give lower ones with --learning_rates"
        )
    return best["lr"]


def finetune(config: Config, tuner: Finetuner, lr: float, folder: Path, rt: Runtime) -> list[dict]:
    """Phase 2: num_epochs at the best rate; the history of its epochs. Goes on from the newest checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    state, path = checkpoint.load_newest(folder, rt.print)
    rt.barrier()
    history = state["history"] if state else []
    optimizer = tuner.reset(state)
    if state:
        rt.print(f"resuming from {path}, after epoch {len(history)}")
    log = RunLog(folder, state["step"] if state else 0, rt, use_wandb=False)
    if is_over(history, config):
        return history
    for epoch in tuner.train(optimizer, lr, config.num_epochs, done=len(history), log=log):
        if not math.isfinite(epoch["val_loss"]):
            raise Diverged(
                f"epoch {epoch['epoch']}: the loss is not finite, the run diverged and stops; its checkpoints are in "
                f"{folder}; lower the learning rate"
            )
        history.append(epoch)
        best = min(e["val_loss"] for e in history)
        rt.print(
            f"epoch {epoch['epoch']} | train {epoch['train_loss']:.4f} | val {epoch['val_loss']:.4f}"
        )
        if rt.is_main:
            saved = checkpoint.build(tuner.model, tuner.enc, epoch["step"])
            saved["model"] = lora.merged_state(tuner.model)
            checkpoint.save(folder / f"model_epoch_{epoch['epoch']}.pt", saved)
            if epoch["val_loss"] == best:
                checkpoint.save(folder / "model_best.pt", saved)
            saved |= dict(
                lora=lora.adapter_state(tuner.model),
                optimizer=optimizer.state_dict(),
                history=history,
            )
            checkpoint.save(folder / f"model_{epoch['step']:05d}.pt", saved)  # to resume from
            checkpoint.remove_rolling(folder, 0, keep=1)
        if is_over(history, config):
            break
    log.flush()
    return history


def is_over(history: list[dict], config: Config) -> bool:
    """Whether all epochs are done, or the last `patience` of them brought no better validation loss."""
    losses = [epoch["val_loss"] for epoch in history]
    patience = config.patience or config.num_epochs
    return len(losses) >= config.num_epochs or (
        len(losses) > patience and min(losses[:-patience]) <= min(losses[-patience:])
    )


if __name__ == "__main__":
    cli(Config, main, __doc__)
