"""Checkpoints: saved whole or not at all, found again, loaded as a model alone or as a whole run.

One file of tensors and plain values, readable with torch.load(..., weights_only=True):

    model       state dict with GPT-2's parameter names, float32
    config      the fields of GPTConfig
    tokenizer   "gpt2", or the text of the vocab.tiktoken file
    step        optimizer steps taken
    optimizer   its state dict
    run         what a resumed run must agree with (seed, batch, data)
"""

import pickle
import re
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import tiktoken
import torch

from common.console import UserError, checksum, write_atomically
from common.huggingface import load_pretrained
from common.tokenizer import load_tokenizer, tokenizer_from_text, tokenizer_to_text
from model import GPT, GPTConfig

NAME = re.compile(r"model_(\d{5,}|final)\.pt")


def build(model: GPT, enc: tiktoken.Encoding, step: int, **resume) -> dict:
    """The checkpoint of a model after `step` optimizer steps, to be given to `save`.

    `resume` holds whatever an exact resume needs besides: the optimizer's state dict and the like.
    """
    return dict(
        model=model.state_dict(),
        config=asdict(model.config),
        tokenizer=tokenizer_to_text(enc),
        step=step,
        **resume,
    )


def save(path: str | Path, checkpoint: dict):
    """Write a checkpoint whole or not at all. Raises OSError if it can't be written; the old file stays then."""
    try:
        with write_atomically(path) as file:
            torch.save(checkpoint, file)
    except RuntimeError as error:  # torch's own writer hides the OSError of a full disk behind this
        raise OSError(
            f"{path} can't be written ({error.__context__ or error}): make room, then run again"
        ) from error


class BackgroundSaver:
    """Saves checkpoints while training goes on: `save` only waits for the one before and copies the state to host
    memory, which it keeps for the next. What goes wrong is raised by the call that follows.
    """

    def __init__(self):
        self.copy, self.writing = None, None
        self.pool = ThreadPoolExecutor(1)

    def save(self, path: str | Path, checkpoint: dict, then: Callable[[], None] = lambda: None):
        """Write the checkpoint as it is now, then call `then`."""
        self.wait()
        self.copy = copy_into(self.copy, checkpoint)
        self.writing = self.pool.submit(lambda: (save(path, self.copy), then()))

    def wait(self):
        """Until what was handed over is on the disk."""
        writing, self.writing = self.writing, None
        if writing:
            writing.result()


def copy_into(copy, state):
    """A copy of nested dicts and lists of tensors and plain values in host memory, into that of an earlier copy."""
    if isinstance(state, torch.Tensor):
        if not isinstance(copy, torch.Tensor) or (copy.shape, copy.dtype) != (
            state.shape,
            state.dtype,
        ):
            copy = torch.empty_like(state, device="cpu", pin_memory=state.is_cuda)
        return copy.copy_(state)
    if isinstance(state, dict):
        copy = copy if isinstance(copy, dict) else {}
        return {key: copy_into(copy.get(key), value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        copy = (
            copy
            if isinstance(copy, list | tuple) and len(copy) == len(state)
            else [None] * len(state)
        )
        return type(state)(copy_into(old, value) for old, value in zip(copy, state))
    return state


def load(path: str | Path) -> dict:
    """Read a checkpoint on the CPU. Raises ValueError if it is damaged, foreign, or wants to run code."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        if (
            zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip()
        ):  # torch itself does not compare checksums
            raise ValueError("wrong checksum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is no checkpoint of ours: it holds more than tensors and plain values, and loading it could run "
            "code"
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is truncated, corrupt or no checkpoint") from error
    if (
        not isinstance(checkpoint, dict)
        or not {"model", "config", "tokenizer", "step"} <= checkpoint.keys()
    ):
        raise UserError(
            f"{path} is no checkpoint of ours: it lacks model, config, tokenizer or step"
        )
    return checkpoint


def candidates(folder: str | Path) -> list[Path]:
    """The checkpoints of a run folder, newest first."""

    def step(path: Path) -> float:
        name = NAME.fullmatch(path.name)[1]
        return float("inf") if name == "final" else int(name)

    return sorted(
        (p for p in Path(folder).glob("model_*.pt") if NAME.fullmatch(p.name)),
        key=step,
        reverse=True,
    )


def load_newest(folder: str | Path, warn=print) -> tuple[dict | None, Path | None]:
    """The newest good checkpoint of a run folder and its path; None where there is none. Names the bad ones."""
    for path in candidates(folder):
        try:
            return load(path), path
        except UserError as error:
            warn(f"skipped: {error}")
    return None, None


def build_model(checkpoint: dict, path: str | Path, dropout: float = 0.0) -> GPT:
    """The model of a loaded checkpoint. Raises ValueError if its tensors do not fit its configuration."""
    try:
        model = GPT(GPTConfig(**checkpoint["config"] | {"dropout": dropout}))
        model.load_state_dict(checkpoint["model"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is no checkpoint of ours: {error}") from error
    return model


def load_model(name_or_path: str | Path, dropout: float = 0.0) -> tuple[GPT, tiktoken.Encoding]:
    """A model and its tokenizer from a checkpoint, a folder in Hugging Face's layout, or `gpt2` ... `gpt2-xl`.

    Raises ValueError or OSError with one clear line.
    """
    path = Path(name_or_path)
    if path.suffix == ".pt" or path.is_file():
        checkpoint = load(path)
        return build_model(checkpoint, path, dropout), tokenizer_from_text(checkpoint["tokenizer"])
    model = load_pretrained(name_or_path, dropout)
    own_vocabulary = path / "vocab.tiktoken"
    enc = load_tokenizer(own_vocabulary if own_vocabulary.exists() else "gpt2")
    if enc.n_vocab != model.config.vocab_size:
        raise UserError(
            f"{name_or_path} has a vocabulary of {model.config.vocab_size} tokens, its tokenizer {enc.n_vocab}"
        )
    return model, enc


def fingerprint(name: str) -> str:
    """What tells a model's weights from others: checksums of its files, or the name of a hub model."""
    path = Path(name)
    if path.suffix == ".pt" or path.is_file():
        return checksum(path)
    return " ".join(map(checksum, sorted(path.glob("model*.safetensors")))) or name


def remove_rolling(folder: str | Path, checkpoint_every: int, keep: int):
    """Remove all but the newest `keep` of the checkpoints that are no milestones."""
    steps = [
        (int(m[1]), p) for p in candidates(folder) if (m := NAME.fullmatch(p.name))[1] != "final"
    ]
    rolling = [path for step, path in steps if not checkpoint_every or step % checkpoint_every]
    for path in rolling[keep:]:
        path.unlink()
