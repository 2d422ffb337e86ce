"""Checkpoints: built, written atomically, found again, and loaded.

A checkpoint is one file of tensors and plain values, readable with
torch.load(..., weights_only=True). Every checkpoint has

    model       state dict with GPT-2's parameter names, float32
    config      the fields of GPTConfig
    tokenizer   "gpt2", the text of a vocab.tiktoken file, or JSON (ForeignEncoding)
    step        optimizer steps taken

Those that training can resume from also have

    optimizer   state dict of the optimizer
    scaler      state of the float16 loss scaler; empty in other dtypes
    run         settings that a resumed run must share (train_gpt2.py: seed, T, batch, data, ...)
    lora        the adapters' tensors (finetune.py)
    history     losses of the epochs so far (finetune.py)
"""

import math
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tiktoken
import torch

from common.console import UserError, cannot_write, checksum, write_atomically
from common.convert import is_llmc, load_pickle, read_llmc, read_nanogpt
from common.huggingface import find_weights, load_model_tokenizer, load_pretrained
from common.tokenizer import load_gpt2, tokenizer_from_text, tokenizer_to_text
from model import GPT, GPTConfig

# The keys that distinguish this project's checkpoints from other files of torch.save
REQUIRED_KEYS = {"model", "config", "tokenizer", "step"}
# The file of a finished run, whatever its last step
FINAL = "model_final.pt"
# Matches model_00500.pt, model_123456.pt and model_final.pt. Steps have at least five digits.
FILE_NAME = re.compile(r"model_(\d{5,}|final)\.pt")


def build(model: GPT, enc: tiktoken.Encoding, step: int, **more) -> dict:
    """The checkpoint of a model after `step` optimizer steps, for `save`.

    `more` are the fields that a stage adds, such as the optimizer's state dict, which it needs to
    resume. The tensors are not copied.
    """
    return dict(
        model=model.state_dict(),
        config=asdict(model.config),
        tokenizer=tokenizer_to_text(enc),
        step=step,
        **more,
    )


# ---------------------------------------------------------------------------------------------
# Writing


def save(path: str | Path, checkpoint: dict):
    """Write a checkpoint atomically. Raises OSError if that fails; an older file then remains."""
    try:
        with write_atomically(path) as file:
            torch.save(checkpoint, file)
    except RuntimeError as error:
        # torch's writer hides the OSError of a full disk behind a RuntimeError.
        raise OSError(cannot_write(path, error.__context__ or error)) from error


class BackgroundSaver:
    """Writes checkpoints in a thread while training continues.

    `save` waits for the previous checkpoint, copies the new state to host memory and returns. That
    memory is reused, because allocating it takes longer than the copy. If writing fails, the next
    call of `save` or `wait` raises the error. As a context manager it waits at the end, also after
    an exception.
    """

    def __init__(self):
        # The last copy in host memory; the next one overwrites its tensors.
        self.copy: dict | None = None
        # The write in progress, or a finished one whose error nobody has seen yet
        self.writing: Future | None = None
        # One thread, so that checkpoints reach the disk in order.
        self.pool = ThreadPoolExecutor(1)

    def save(self, path: str | Path, checkpoint: dict, then: Callable[[], None] = lambda: None):
        """Write the checkpoint in its present state, then call `then`."""
        # The previous write reads the memory that the next copy overwrites, so it must end first.
        self.wait()
        self.copy = copy_into(self.copy, checkpoint)
        self.writing = self.pool.submit(self._write, path, self.copy, then)

    def _write(self, path: str | Path, checkpoint: dict, then: Callable[[], None]):
        save(path, checkpoint)
        # Reached only if the file is complete: `then` may remove older checkpoints.
        then()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.wait()

    def wait(self):
        """Return when the last checkpoint is on the disk."""
        if self.writing:
            # Forget the write before its error is raised: a second call must not raise it again.
            writing = self.writing
            self.writing = None
            writing.result()


def copy_into(copy: Any, state: Any) -> Any:
    """Copy nested dicts and lists of tensors and plain values to host memory.

    `copy` is an earlier copy, whose tensors are overwritten where shape and dtype fit; or None.
    """
    # A tensor: allocate memory only if the old copy doesn't fit. Pinned memory lets the GPU copy
    # straight into it.
    if isinstance(state, torch.Tensor):
        fits = isinstance(copy, torch.Tensor) and copy.shape == state.shape
        if not fits or copy.dtype != state.dtype:
            copy = torch.empty_like(state, device="cpu", pin_memory=state.is_cuda)
        return copy.copy_(state)

    # Containers: each entry goes into the old copy of the same key or place.
    if isinstance(state, dict):
        if not isinstance(copy, dict):
            copy = {}
        return {key: copy_into(copy.get(key), value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        if not isinstance(copy, list | tuple) or len(copy) != len(state):
            copy = [None] * len(state)
        return type(state)(copy_into(old, value) for old, value in zip(copy, state))

    # Plain values can't be changed in place, so they need no copy.
    return state


def remove_rolling(folder: str | Path, step: int, checkpoint_every: int, keep: int):
    """Remove the rolling checkpoints up to `step`, all but the newest `keep`.

    A checkpoint is rolling if its step is not a multiple of checkpoint_every (0: all are). The
    final one is not.
    """
    rolling = []
    for path in candidates(folder):
        if path.name == FINAL or step_of(path) > step:
            continue
        if not checkpoint_every or step_of(path) % checkpoint_every:
            rolling.append(path)

    # The newest come first, so the files after the first `keep` are the oldest.
    for path in rolling[keep:]:
        path.unlink()


# ---------------------------------------------------------------------------------------------
# Reading


def candidates(folder: str | Path) -> list[Path]:
    """The checkpoint files of a run folder, highest step first."""
    paths = [path for path in Path(folder).glob("model_*.pt") if FILE_NAME.fullmatch(path.name)]
    return sorted(paths, key=step_of, reverse=True)


def step_of(path: Path) -> float:
    """The step of a checkpoint, from its name; from its content for the final one.

    A run can be extended after its end, so the final checkpoint need not be the newest. Infinity
    if it is damaged: load_newest then tries it first, and reports it.
    """
    # The name is enough for most files, and reading it is cheap.
    name = FILE_NAME.fullmatch(path.name)
    if name and name[1] != "final":
        return int(name[1])

    # The final one has to be opened. It is mapped into memory, so its tensors are not read.
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"]
    except Exception:  # torch.load raises many types for a damaged file
        return math.inf


def load_newest(folder: str | Path, warn=print) -> tuple[dict | None, Path | None]:
    """The newest valid checkpoint of a run folder and its path, or (None, None).

    `warn` is called with a message for each damaged file that is skipped.
    """
    for path in candidates(folder):
        try:
            return load(path), path
        except UserError as error:
            warn(f"skipped: {error}")
    return None, None


def load(path: str | Path) -> dict:
    """Read a checkpoint into host memory.

    Raises UserError if it is damaged, was not written by this project, or contains code.
    """
    checkpoint = load_pickle(path)
    if not is_ours(checkpoint):
        raise UserError(
            f"{path} was not written by this project: it lacks model, config, tokenizer or step"
        )
    return checkpoint


def is_ours(content: Any) -> bool:
    """Whether the content of a file is a checkpoint of this project."""
    return isinstance(content, dict) and content.keys() >= REQUIRED_KEYS


def build_model(checkpoint: dict, path: str | Path, dropout: float = 0.0) -> GPT:
    """The model of a loaded checkpoint. Raises UserError if tensors and config disagree."""
    try:
        # Dropout is a choice of the caller: it is not part of the weights.
        model = GPT(GPTConfig(**checkpoint["config"] | {"dropout": dropout}))
        model.load_state_dict(checkpoint["model"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} was not written by this project: {error}") from error
    return model


def load_model(name_or_path: str | Path, dropout: float = 0.0) -> tuple[GPT, tiktoken.Encoding]:
    """A model and its tokenizer: from a checkpoint, a Hugging Face folder, or `gpt2` ... `gpt2-xl`.

    A checkpoint is ours, or one of nanoGPT, build-nanogpt or llm.c. Raises UserError or OSError.
    """
    path = Path(name_or_path)
    # A folder in Hugging Face's layout, or the name of a model on the hub
    if not is_checkpoint(path):
        model = load_pretrained(name_or_path, dropout)
        model.source = str(name_or_path)
        enc = load_model_tokenizer(name_or_path, model.config.vocab_size)
        # Embeddings without a token are padding: the model must not choose them.
        model.config.vocab_size = enc.n_vocab
        return model, enc

    # A file: its first bytes, then its keys, tell which program wrote it.
    if not path.is_file():
        raise no_checkpoint(path)
    if path.suffix == ".safetensors":
        raise UserError(f"{path} holds weights only: name its folder, which also has config.json")
    # llm.c, nanoGPT and build-nanogpt store no tokenizer: it is always GPT-2's.
    if is_llmc(path):
        return read_llmc(path, dropout), load_gpt2()
    content = load_pickle(path)
    if not is_ours(content):
        return read_nanogpt(content, path, dropout), load_gpt2()

    model = build_model(content, path, dropout)
    model.source = str(path)
    return model, tokenizer_from_text(content["tokenizer"])


def no_checkpoint(path: Path) -> FileNotFoundError:
    """The error for a checkpoint that does not exist. It names those of finished runs."""
    others = ", ".join(sorted(map(str, Path("log").glob("*/model_final.pt"))))
    return FileNotFoundError(f"no checkpoint {path}" + (f"; there is {others}" if others else ""))


def is_checkpoint(path: Path) -> bool:
    """Whether a model's name means a file, and not a folder or a hub name."""
    return path.suffix in (".pt", ".bin") or path.is_file()


def fingerprint(name: str) -> str:
    """Identifies a model's weights: the checksums of its files, or the name of a hub model."""
    path = Path(name)
    if is_checkpoint(path):
        if not path.is_file():
            raise no_checkpoint(path)
        return checksum(path)

    # A folder may hold several files of weights. A hub model has no local folder, so its name has
    # to do.
    return " ".join(map(checksum, find_weights(path))) or name


class NotFinite(UserError):
    """A model computes NaN or infinity, so it has no results.

    During training this means that the run diverged: the exit code is that of optim.Diverged.
    """

    exit_code = 3


def not_finite_error(model: GPT) -> NotFinite:
    """The error to raise when a model computes NaN or infinity; names the broken weight, if any."""
    # Look for a damaged weight first. If all weights are finite, the computation overflowed.
    for name, tensor in model.state_dict().items():
        name = name.removeprefix("_orig_mod.")  # torch.compile adds it
        if not tensor.isfinite().all():
            return NotFinite(f"{model.source} is broken: its tensor {name} is not finite")
    return NotFinite(
        f"{model.source} computes values that are not finite, although its weights are: try "
        "--dtype float32"
    )
