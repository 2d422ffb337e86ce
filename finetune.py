"""Finetune a pretrained GPT-2 on texts, and compare it before and after.

    python finetune.py                                 # log/model_final.pt, the pretrained model
    python finetune.py --init_from gpt2 --lora_rank 8  # OpenAI's weights, training only adapters
    torchrun --standalone --nproc_per_node=8 finetune.py --init_from gpt2-medium
    python finetune.py --data my_texts/                # your own text: .txt, .jsonl, .csv, .parquet
    python finetune.py --resume                        # resume a run that was stopped
    python finetune.py --learning_rates 2e-4           # a single learning rate: no search

1. Set up: hold out a tenth of the texts for validation, and load the model.
2. Search the learning rate: train for search_epochs at each rate, from the same weights on the same
   batches, and choose the rate with the lowest validation loss.
3. Finetune: train for num_epochs at that rate, with checkpoints after each epoch. model_best.pt is
   the epoch with the lowest validation loss.
4. Report: compare the model before and after finetuning, in finetune_runs/report.md.

A run may be killed at any time. With --resume it repeats only the learning rate or the epoch that
was interrupted, and ends with the same weights.
"""

import json
import math
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
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
    table,
    write_text,
)
from common.tracker import TrackerName, check_installed


@dataclass
class Config:
    # a checkpoint, a Hugging Face folder, or gpt2 ... gpt2-xl
    init_from: str = "log/model_final.pt"
    # texts to train on: a file, or a folder of files. A .txt file consists of <LOC> ... </LOC>
    # blocks, as written by generate_finetune_data.py, or of documents with <|endoftext|> between
    # them. A .jsonl, .csv or .parquet file has a text per line or row, in the field or column
    # "text", or in "prompt" and "completion", which are joined and both trained on
    data: str = "datasets/finetune_data.txt"
    # names of the fields or columns to train on, if they are not text, or prompt and completion;
    # several are joined, with a line break between them
    text_column: tuple[str, ...] = ()
    # what separates the documents of .txt files, if not <|endoftext|>; "\n\n" = blank lines
    separator: str = ""
    out_dir: str = "finetune_runs"  # folder for the search, the final run and the report

    # batch
    B: int = 8  # micro-batch: sequences per process and forward pass
    T: int = 512  # sequence length in tokens
    # tokens per optimizer step, over all processes: 64 sequences of 512
    total_batch_size: int = 32768

    # search of the learning rate
    search_epochs: int = 2  # passes over the training texts at each learning rate
    # peak learning rates to try; a single one skips the search
    learning_rates: tuple[float, ...] = (1e-4, 2e-4, 5e-4, 1e-3, 3e-3, 7e-3)

    # final run
    num_epochs: int = 7  # passes over the training texts
    # stop after this many epochs without a lower validation loss; 0 = never
    patience: int = 0

    # optimizer
    weight_decay: float = 0.1  # weight decay of tensors with two or more dimensions
    # fraction of the steps with linear warmup; a cosine to a tenth of the peak follows
    warmup_fraction: float = 0.1
    grad_clip: float = 1.0  # maximum norm of the gradient; 0 = no clipping
    dropout: float = 0.1  # fraction of activations dropped in training
    # rank of LoRA adapters, which are then trained in place of the model; 0 = train the model
    lora_rank: int = 0

    # run
    resume: bool = False  # resume the run in out_dir
    seed: int = 1337  # seed of the split, data order, dropout, adapters and samples
    device: str = "auto"  # cuda, mps or cpu; auto = first available of the three
    # dtype of matrix products; auto = the fastest of bfloat16, float16 and float32 on this hardware
    dtype: Dtype = "auto"
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto = on GPUs only
    # where else to log the final run: Weights & Biases, Trackio or TensorBoard; each is a package
    # to install
    tracker: TrackerName = "none"

    # report
    num_samples: int = 50  # texts sampled from each model, before and after finetuning
    # folder of shards, to measure how much general text the model has forgotten
    general_data: str = "datasets/edu_fineweb10B"
    general_tokens: int = 100_000  # tokens of its validation shard to read

    def __post_init__(self):
        sizes = ("B", "T", "total_batch_size", "search_epochs", "num_epochs")
        for name in (*sizes, "num_samples", "general_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, must be at least 1")
        # The comparison is false for NaN, too.
        for name in ("patience", "weight_decay", "grad_clip", "lora_rank", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}, must be at least 0 and finite")
        if self.seed >= 2**64:
            raise UserError(f"seed is {self.seed}, must be below 2**64: torch's seeds have 64 bits")

        # A batch consists of whole sequences.
        if self.total_batch_size % self.T:
            raise UserError(
                f"total_batch_size {self.total_batch_size} is not divisible by T {self.T}"
            )

        if not self.learning_rates:
            raise UserError("learning_rates needs at least one value")
        for lr in self.learning_rates:
            if not 0 < lr < math.inf:
                raise UserError(f"learning_rates contains {lr}, must be above 0 and finite")
        if not 0 <= self.warmup_fraction <= 1:
            raise UserError(f"warmup_fraction is {self.warmup_fraction}, must be between 0 and 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}, must be at least 0 and below 1")

        # The tracker starts with the final run. That its package is missing should show before the
        # search.
        check_installed(self.tracker)


if __name__ == "__main__":
    config = parse_flags(Config, __doc__)  # before the slow imports: --help answers at once

import numpy as np
import torch

from common import checkpoint, cpu, lora, runtime
from common.finetune_data import fingerprint, is_tagged, read_texts
from common.optim import (
    Diverged,
    LossScaler,
    PendingResult,
    StepResult,
    learning_rate,
    make_adamw,
    prepare_model,
    train_step,
)
from common.runlog import RunLog, finite_or_none
from common.runtime import Runtime
from common.scoring import bits_per_byte, stream_loss
from dataloader import FinetuneLoader
from fantasy.report import draw_losses, draw_search, perplexity, write_report

SEARCH = "finetune_hyperparameter_search"  # name of the search's files in out_dir
# A learning rate counts as diverged if the validation loss ends this far above its start, in nats
# per token: a perplexity that is e times higher.
DIVERGED_ABOVE = 1.0


def main(config: Config):
    """Lock out_dir, and run the stage in it."""
    rt = runtime.start(config.device, config.dtype)
    cpu.keep_freed_memory(rt.device)
    with ExitStack() as stack:
        if rt.is_main:
            Path(config.out_dir).mkdir(parents=True, exist_ok=True)
            # The process that this one replaces may have died on a machine that lost its network.
            patience = 600 if runtime.restarted() else 0
            stack.enter_context(lock_folder(config.out_dir, patience))
        # The other ranks wait until rank 0 holds the lock: only then is the folder this run's.
        rt.barrier()
        run(config, rt)


def run(config: Config, rt: Runtime):
    """The stage, in its locked folder."""
    # Set up: the folder, the data and the model. Nothing is written before all of it is valid.
    out_dir = Path(config.out_dir)
    settings = must_match_on_resume(config)
    if rt.is_main:
        check_folder(out_dir, config.resume or runtime.restarted(), settings)

    # The shell passes "\\n" as two characters.
    separator = config.separator.replace("\\n", "\n").replace("\\t", "\t")
    texts = read_texts(config.data, config.text_column, separator, rt.print)
    training, held_out = split(texts, config.seed)
    tuner = Finetuner(config, training, held_out, rt)

    # The loss to beat. A broken model shows before a file is written.
    base_val_loss = tuner.validate()
    if not math.isfinite(base_val_loss):
        raise checkpoint.not_finite_error(tuner.model)
    bits = bits_per_byte(base_val_loss, tuner.val_tokens, tuner.enc)
    rt.print(f"validation loss before finetuning: {base_val_loss:.4f} ({bits:.4f} bits per byte)")
    if rt.is_main:
        write_text(out_dir / "settings.json", json.dumps(settings, indent=1) + "\n")

    # Search the learning rate.
    if len(config.learning_rates) == 1:
        lr = config.learning_rates[0]
    else:
        lr = search(tuner, base_val_loss)

    # Finetune. The folder is named after the learning rate, in decimal notation.
    folder = out_dir / f"final_lr_{decimal(lr)}"
    history = finetune(tuner, lr, folder)
    best = min(history, key=lambda record: record["val_loss"])
    rt.print(
        f"best epoch: {best['epoch']} of {len(history)}, validation loss {best['val_loss']:.4f} "
        f"(before finetuning {base_val_loss:.4f})\nmodel: {folder}/model_best.pt"
    )
    # model_best.pt is then no better than the model that it was trained from.
    if best["val_loss"] >= base_val_loss:
        warn_of_no_gain(best["val_loss"], base_val_loss, rt)

    # Report. Rank 0 does it alone: the other ranks leave, or they would time out waiting for it.
    runtime.leave()
    if rt.is_main:
        draw_losses(folder / "finetune_losses.png", history, base_val_loss)
        if tuner.log:
            pictures = [folder / "finetune_losses.png", out_dir / f"{SEARCH}.png"]
            pictures = [path for path in pictures if path.exists()]
            tuner.log.finish(history[-1]["step"], pictures)
        alone = Runtime(rt.device, rt.dtype)
        finetuned = folder / "model_best.pt"
        write_report(config, finetuned, training, tuner.val_tokens, tuner.enc, alone)


# ---------------------------------------------------------------------------------------------
# Set-up


def split(texts: list[str], seed: int) -> tuple[list[str], list[str]]:
    """Split at random into training texts and a tenth (at least one) for validation.

    Of fewer than ten texts, books for example, the last tenth of each is held out instead. Blocks
    are never cut.
    """
    if len(texts) < 10 and not is_tagged(texts):
        cuts = [start_of_last_tenth(text) for text in texts]
        training = [text[:cut] for text, cut in zip(texts, cuts)]
        held_out = [text[cut:] for text, cut in zip(texts, cuts)]
        return training, [text for text in held_out if text.strip()]

    # Shuffled first: the file may be sorted, for example by place.
    order = np.random.default_rng(seed).permutation(len(texts))
    num_held_out = max(1, round(len(texts) / 10))
    shuffled = [texts[i] for i in order]
    return shuffled[num_held_out:], shuffled[:num_held_out]


def start_of_last_tenth(text: str) -> int:
    """Position at which the last tenth of a text begins, between two words if possible."""
    position = len(text) - len(text) // 10
    # The search begins at the position. A text without white space from there on is cut at it.
    space = re.compile(r"\s").search(text, position)
    return space.start() if space else position


def must_match_on_resume(config: Config) -> dict:
    """Weights, data and settings that decide the result: a resumed run must have the same.

    B, for example, may change: it decides only how a step is computed.
    """
    batches = ("T", "total_batch_size", "search_epochs", "num_epochs")
    optimizer = ("warmup_fraction", "weight_decay", "grad_clip", "dropout", "lora_rank", "seed")
    settings = dict(
        weights=checkpoint.fingerprint(config.init_from),
        data=fingerprint(config.data),
        text_column=list(config.text_column),  # a list, as it will be read from JSON
        separator=config.separator,
    )
    for name in (*batches, *optimizer):
        settings[name] = getattr(config, name)
    return settings


def check_folder(out_dir: Path, resume: bool, settings: dict):
    """Raise UserError if the folder holds a run, unless it is resumed with equal settings."""
    path = out_dir / "settings.json"
    if path.exists():
        if not resume:
            raise UserError(
                f"{out_dir} already holds a run: --resume it, or choose another --out_dir"
            )
        recorded = read_json(path)
        for name, value in settings.items():
            # Runs of earlier versions may lack a setting.
            if recorded.get(name, value) == value:
                continue
            if name == "weights":
                raise UserError(
                    f"the model of --init_from has changed since the run in {out_dir} began: "
                    "choose another --out_dir"
                )
            raise UserError(
                f"{out_dir} holds a run with {name}={recorded[name]}, not {value}: "
                "choose another --out_dir"
            )


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises UserError if it is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(
            f"{path} is not valid JSON ({error}): remove it or choose another --out_dir"
        ) from error


def decimal(lr: float) -> str:
    """2e-4 as 0.0002."""
    # trim="-" drops the trailing zeros: 0.001, and 3 instead of 3.0.
    return np.format_float_positional(lr, trim="-")


# ---------------------------------------------------------------------------------------------
# Training


@dataclass
class Update:
    """An update that was started. A GPU may still be computing it."""

    step: int
    lr: float
    num_tokens: int  # targets in the batch, on all ranks
    began: float  # time.perf_counter() when the device began to compute it
    result: PendingResult


def in_background(updates: Iterator[Update], rt: Runtime) -> Iterator[Update]:
    """On a GPU, yield each update only after the next one was started."""
    previous = None
    for update in updates:
        if previous:
            # The caller may now wait for the result: the device has the next update to compute.
            yield previous
            update.began = time.perf_counter()  # until now, the GPU was busy with `previous`
        previous = update
        if not rt.runs_ahead:
            yield previous
            previous = None
    if previous:
        yield previous


class Finetuner:
    """The model, its data and its initial weights, from which it is trained several times."""

    def __init__(self, config: Config, training: list[str], held_out: list[str], rt: Runtime):
        self.config = config
        self.rt = rt
        self.log: RunLog | None = None  # that of the final run, once it begins

        # The model, and a copy of the weights that every training starts from.
        self.model, self.enc = checkpoint.load_model(config.init_from, config.dropout)
        block_size = self.model.config.block_size
        if block_size < config.T:
            raise UserError(f"T {config.T} is above the model's block_size {block_size}")
        if config.lora_rank:
            # All ranks, and a resumed search, start from the same adapters.
            torch.manual_seed(config.seed)
            lora.add_adapters(self.model, config.lora_rank)
        # state_dict refers to the weights that training will change, hence the copies. They stay on
        # the CPU, where they take no GPU memory.
        self.initial_state = {name: t.clone() for name, t in self.model.state_dict().items()}
        self.model.to(rt.device)
        self.train_model, self.eval_model = prepare_model(self.model, rt, config.compile)

        # The data. Texts were split before they are joined: none is in both streams.
        tokens = self.encode(training)
        self.val_tokens = self.encode(held_out)
        sequences = config.total_batch_size // config.T
        self.loader = FinetuneLoader(
            tokens, config.B, config.T, sequences, config.seed, rt.rank, rt.world_size
        )

        # With adapters, most parameters are frozen.
        num_params = sum(p.numel() for p in self.model.parameters())
        num_trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        rt.print(
            f"{len(training)} texts ({len(tokens):,} tokens) to train on, {len(held_out)} "
            f"({len(self.val_tokens):,} tokens) held out; "
            f"{num_trained:,} of {num_params:,} parameters are trained"
        )

    def encode(self, texts: list[str]) -> np.ndarray:
        """One stream of token ids, (tokens,) int64: end-of-text before each text and at the end."""
        ids = []
        for text in texts:
            # encode_ordinary takes <|endoftext|> inside a text for ordinary text.
            ids.append(self.enc.eot_token)
            ids += self.enc.encode_ordinary(text)
        ids.append(self.enc.eot_token)
        return np.array(ids)

    def validate(self) -> float:
        """Mean loss on the held-out texts, in nats per token; infinite if it is not finite."""
        config = self.config
        try:
            return stream_loss(self.eval_model, self.val_tokens, config.B, config.T, self.rt)
        except checkpoint.NotFinite:  # the caller decides: the search tries another learning rate
            return math.inf

    def reset(self, loaded: dict | None = None) -> torch.optim.Optimizer:
        """Load the initial weights and return a new optimizer, or load both from a checkpoint.

        The scale of the loss, which only float16 uses, starts anew or is loaded as well.
        """
        state = self.initial_state
        if loaded:
            # With adapters, the checkpoint's `model` has them merged, so they are stored apart.
            state = state | (loaded["lora"] or loaded["model"])
        self.model.load_state_dict(state)
        # The learning rate given here has no effect: every step sets its own.
        optimizer = make_adamw(self.model, 1.0, self.config.weight_decay, (0.9, 0.95), 1e-8)
        self.scaler = LossScaler(self.rt)
        if loaded:
            optimizer.load_state_dict(loaded["optimizer"])
            self.scaler.load_state_dict(loaded.get("scaler"))
        return optimizer

    def train(
        self,
        optimizer: torch.optim.Optimizer,
        lr: float,
        num_epochs: int,
        epochs_done: int = 0,
        log: RunLog | None = None,
    ) -> Iterator[dict]:
        """Train at a peak learning rate of lr until num_epochs are done; yield a record per epoch.

        A record holds epoch (1 for the first), step (optimizer steps taken so far), and train_loss
        and val_loss in nats per token. If a loss or a gradient is not finite, training ends, and
        both losses in that epoch's record are infinite. The exception are steps that float16
        skips: they are left out of train_loss, which is NaN if an epoch has no others.
        """
        # The schedule covers all epochs. After a resume, it continues at the step where the run
        # stopped.
        steps_per_epoch = self.loader.steps_per_epoch
        num_steps = num_epochs * steps_per_epoch
        warmup_steps = round(self.config.warmup_fraction * num_steps)
        step = epochs_done * steps_per_epoch
        with Progress(total=num_steps, initial=step, desc=f"lr {decimal(lr)}", unit="step") as bar:
            for epoch in range(epochs_done + 1, num_epochs + 1):
                loss_sum = 0.0  # of the losses of all tokens
                tokens_seen = 0
                # A GPU computes an update while Python starts the next one.
                steps = range(step, step + steps_per_epoch)
                lrs = [learning_rate(n, num_steps, warmup_steps, lr, lr / 10) for n in steps]
                updates = (self.start_update(optimizer, *item) for item in zip(steps, lrs))
                for update in in_background(updates, self.rt):
                    result = self.finish_update(update, log)
                    # `step` counts the finished updates, of which update 0 is the first.
                    step = update.step + 1
                    bar.update()
                    # Weights did not change, and the loss may not be finite: it would spoil the
                    # mean.
                    if result.skipped:
                        continue
                    if result.diverged:
                        yield dict(epoch=epoch, step=step, train_loss=math.inf, val_loss=math.inf)
                        return
                    # The last step of an epoch has fewer tokens than the others.
                    loss = result.loss
                    loss_sum += loss * update.num_tokens
                    tokens_seen += update.num_tokens
                    bar.set_postfix_str(f"epoch {epoch}, loss {loss:.3f}", refresh=False)

                # The epoch is done: measure it on the held-out texts.
                train_loss = loss_sum / tokens_seen if tokens_seen else math.nan
                val_loss = self.validate()
                if log:
                    bits = bits_per_byte(val_loss, self.val_tokens, self.enc)
                    log.write(step, val=val_loss, val_bits_per_byte=bits)
                yield dict(epoch=epoch, step=step, train_loss=train_loss, val_loss=val_loss)

    def start_update(self, optimizer: torch.optim.Optimizer, step: int, lr: float) -> Update:
        """Start to train on one global batch."""
        rt = self.rt
        began = time.perf_counter()
        # Dropout is a function of the step, so that a resumed run drops the same activations.
        rt.seed(self.config.seed, step)
        batch, micro_batch_weights, num_tokens = self.loader.batch(step, rt.device)
        loss, grad_norm = train_step(
            self.train_model,
            optimizer,
            batch,
            lr,
            self.config.grad_clip,
            rt,
            micro_batch_weights,
            self.scaler,
        )
        # The mean over the ranks. All of them learn of a divergence, and stop together.
        result = PendingResult(loss, grad_norm, self.scaler, rt)
        return Update(step, lr, num_tokens, began, result)

    def finish_update(self, update: Update, log: RunLog | None) -> StepResult:
        """Wait for the result of an update, and log it unless the run has diverged."""
        result = update.result.read()
        if result.diverged:
            return result
        # The search has no log: only its results are kept.
        if log:
            seconds = time.perf_counter() - update.began
            log.write(
                update.step,
                **result.record(),
                lr=update.lr,
                ms=1000 * seconds,
                tokens_per_sec=update.num_tokens / seconds,
                mfu=None,
                memory=self.rt.peak_memory(),
            )
        return result


# ---------------------------------------------------------------------------------------------
# The search


def search(tuner: Finetuner, base_val_loss: float) -> float:
    """Return the learning rate with the lowest validation loss after search_epochs.

    Results are saved after each rate, and a resumed search repeats only those that are missing.
    Raises UserError if every rate diverged.
    """
    config = tuner.config
    rt = tuner.rt
    path = Path(config.out_dir) / f"{SEARCH}.json"
    results = read_results(path)
    rt.barrier()  # all ranks have read the file before rank 0 replaces it

    for lr in config.learning_rates:
        if lr not in results:
            results[lr] = try_learning_rate(tuner, lr)
        val_loss = results[lr]["val_loss"]
        diverged = not math.isfinite(val_loss) or val_loss > base_val_loss + DIVERGED_ABOVE
        results[lr]["status"] = "diverged" if diverged else "trained"
        if rt.is_main:
            records = [finite_or_none(results[lr]) for lr in sorted(results)]
            write_text(path, json.dumps(records, indent=1) + "\n")

    # Compare the rates asked for; an earlier search may have tried others.
    tried = [results[lr] for lr in sorted(config.learning_rates)]
    usable = [result for result in tried if result["status"] == "trained"]
    best = min(usable, key=lambda result: result["val_loss"], default=None)
    text = search_table(tried, best)
    rt.print(f"{text}\n{path.with_suffix('.txt')}, .png")
    if rt.is_main:
        write_text(path.with_suffix(".txt"), text + "\n")
        draw_search(path.with_suffix(".png"), tried, base_val_loss)

    # Without a rate to continue with, the run ends. The results stay: a resumed search skips these
    # rates.
    if best is None:
        raise UserError(
            "training diverged at every learning rate: --resume with lower --learning_rates"
        )
    if best["val_loss"] >= base_val_loss:
        warn_of_no_gain(best["val_loss"], base_val_loss, rt)
    return best["lr"]


def read_results(path: Path) -> dict[float, dict]:
    """The results of an earlier search by learning rate; none if there is no file."""
    results = {}
    if path.exists():
        for result in read_json(path):
            # JSON has no infinity: null is the loss of a training that was not finite.
            for name in ("train_loss", "val_loss"):
                if result[name] is None:
                    result[name] = math.inf
            results[result["lr"]] = result
    return results


def try_learning_rate(tuner: Finetuner, lr: float) -> dict:
    """Train for search_epochs from the initial weights.

    Returns the last epoch's record, with the learning rate and the validation losses of all epochs.
    """
    records = list(tuner.train(tuner.reset(), lr, tuner.config.search_epochs))
    # The result is written as JSON, which has no infinity.
    val_losses = [finite_or_none(record)["val_loss"] for record in records]
    return records[-1] | dict(lr=lr, val_losses=val_losses)


def warn_of_no_gain(val_loss: float, base_val_loss: float, rt: Runtime):
    """Print that finetuning did not lower the validation loss."""
    rt.print(
        f"warning: the lowest validation loss, {val_loss:.4f}, is not below {base_val_loss:.4f}, "
        "that before finetuning: the data taught the model nothing new"
    )


def search_table(tried: list[dict], best: dict | None) -> str:
    """The results of the search as a table: losses, perplexity, and which rate is the best."""
    rows = []
    for result in tried:
        losses = (result["train_loss"], result["val_loss"], perplexity(result["val_loss"]))
        note = "best" if result is best else result["status"]
        rows.append((decimal(result["lr"]), *(f"{loss:.4f}" for loss in losses), note))
    return table(("learning rate", "training loss", "validation loss", "perplexity", ""), rows)


# ---------------------------------------------------------------------------------------------
# The final run


def finetune(tuner: Finetuner, lr: float, folder: Path) -> list[dict]:
    """Train for num_epochs with checkpoints in `folder`, from the newest of them if there is one.

    Returns the records of all epochs. Raises Diverged if a loss or a gradient is not finite.
    """
    config = tuner.config
    rt = tuner.rt
    folder.mkdir(parents=True, exist_ok=True)

    # Resume from the newest checkpoint. Every finished epoch is a record in its history.
    loaded, path = checkpoint.load_newest(folder, rt.print)
    rt.barrier()  # all ranks have read it before rank 0 replaces it
    history = loaded["history"] if loaded else []
    if loaded:
        rt.print(f"resuming from {path}, after epoch {len(history)}")
    if is_over(history, config):
        return history

    # The weights, the optimizer and the log of that checkpoint, or new ones.
    optimizer = tuner.reset(loaded)
    start_step = loaded["step"] if loaded else 0
    name = Path(config.out_dir).resolve().name
    log = RunLog(folder, start_step, rt, config.tracker, name, asdict(config) | dict(lr=lr))
    tuner.log = log
    if loaded:
        # The log was cut at this step. The steps after it are repeated, its validation is not.
        val_loss = history[-1]["val_loss"]
        bits = bits_per_byte(val_loss, tuner.val_tokens, tuner.enc)
        log.write(loaded["step"], val=val_loss, val_bits_per_byte=bits)

    # Train.
    for record in tuner.train(optimizer, lr, config.num_epochs, len(history), log):
        # The checkpoints are those of finished epochs: the broken weights are not saved.
        if not math.isfinite(record["val_loss"]):
            raise Diverged(
                f"epoch {record['epoch']}, step {record['step'] - 1}: loss or gradient is not "
                "finite: the run diverged and stops; checkpoints of earlier epochs are in "
                f"{folder}; --resume with a lower learning rate in --learning_rates"
            )
        history.append(record)
        bits = bits_per_byte(record["val_loss"], tuner.val_tokens, tuner.enc)
        rt.print(
            f"epoch {record['epoch']} | train {record['train_loss']:.4f} "
            f"| val {record['val_loss']:.4f} | bits per byte {bits:.4f}"
        )
        if rt.is_main:
            save_epoch(folder, tuner, optimizer, history)
        # Patience can end the run before num_epochs.
        if is_over(history, config):
            break
    # The last record has a validation loss only; a training loss would have completed it.
    log.flush()
    return history


def save_epoch(
    folder: Path, tuner: Finetuner, optimizer: torch.optim.Optimizer, history: list[dict]
):
    """Write the checkpoints of the epoch that was completed last.

    model_epoch_N.pt   the model after epoch N
    model_best.pt      the same, if its validation loss is the lowest so far
    model_NNNNN.pt     what resuming needs besides; only the newest of these is kept
    """
    # The files to use later need no optimizer state, which is larger than the weights.
    record = history[-1]
    state = checkpoint.build(tuner.model, tuner.enc, record["step"])
    state["model"] = lora.merged_state(tuner.model)  # an ordinary model, also with adapters
    checkpoint.save(folder / f"model_epoch_{record['epoch']}.pt", state)
    # Of equal losses, the earlier epoch is the best one, as in the report.
    earlier = [epoch["val_loss"] for epoch in history[:-1]]
    if not earlier or record["val_loss"] < min(earlier):
        checkpoint.save(folder / "model_best.pt", state)

    # Last, because it is what marks the epoch as done.
    state["lora"] = lora.adapter_state(tuner.model)
    state["optimizer"] = optimizer.state_dict()
    state["scaler"] = tuner.scaler.state_dict()
    state["history"] = history
    checkpoint.save(folder / f"model_{record['step']:05d}.pt", state)
    checkpoint.remove_rolling(folder, record["step"], checkpoint_every=0, keep=1)


def is_over(history: list[dict], config: Config) -> bool:
    """Whether all epochs are done, or the last `patience` of them brought no lower loss."""
    losses = [record["val_loss"] for record in history]
    if len(losses) >= config.num_epochs:
        return True
    # The last `patience` epochs need an earlier one to compare with.
    if not config.patience or len(losses) <= config.patience:
        return False

    # The lowest loss before those epochs, against the lowest loss in them.
    return min(losses[: -config.patience]) <= min(losses[-config.patience :])


if __name__ == "__main__":
    run_script(main, config)
