"""GPT-2 by several hands behind one face, for bench: ours, transformers', nanoGPT's and build-nanogpt's.

The two scripts are read from folders of the user's; what stands between their classes and functions is not run.
"""

import ast
import io
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn

from common.console import UserError
from common.optim import compile_model, make_optimizer, train_step
from common.runtime import Runtime
from model import GPT, GPTConfig

LR, WEIGHT_DECAY, BETAS, EPS = 6e-4, 0.1, (0.9, 0.95), 1e-8
OURS, TRANSFORMERS, NANOGPT, BUILD_NANOGPT = (
    "this project",
    "transformers",
    "nanoGPT",
    "build-nanogpt",
)


@dataclass
class Implementation:
    model: nn.Module
    loss: Callable  # loss(model, x, y) with x, y (B, T) int64
    optimizer: Callable[[], torch.optim.Optimizer]  # as it is shipped
    shipped: tuple[torch.dtype, bool]  # dtype and whether it is compiled, as it is shipped


def find_scripts(folders: dict[str, str | None]) -> dict[str, Path]:
    """The scripts of nanoGPT and build-nanogpt in the folders that are given. Raises ValueError if one is not there."""
    files = {NANOGPT: "model.py", BUILD_NANOGPT: "train_gpt2.py"}
    scripts = {name: Path(folder) / files[name] for name, folder in folders.items() if folder}
    for path in scripts.values():
        if not path.is_file():
            raise UserError(f"no file {path}: name the folder that holds it")
    return scripts


def build(name: str, shape: GPTConfig, scripts: dict[str, Path], rt: Runtime) -> Implementation:
    """One of the four with new weights on the device."""
    makers = {
        OURS: ours,
        TRANSFORMERS: transformers,
        NANOGPT: nanogpt,
        BUILD_NANOGPT: build_nanogpt,
    }
    with redirect_stdout(io.StringIO()):
        return makers[name](shape, scripts.get(name), rt)


def ours(shape: GPTConfig, script: None, rt: Runtime) -> Implementation:
    model = GPT(shape).to(rt.device)
    optimizer = lambda: make_optimizer(model, LR, WEIGHT_DECAY, BETAS, EPS)  # noqa: E731
    return Implementation(
        model, lambda model, x, y: model(x, y), optimizer, (rt.dtype, rt.device.type == "cuda")
    )


def transformers(shape: GPTConfig, script: None, rt: Runtime) -> Implementation:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=shape.padded_vocab_size, n_positions=shape.block_size,
        n_layer=shape.n_layer, n_head=shape.n_head, n_embd=shape.n_embd,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).to(rt.device)
    optimizer = lambda: torch.optim.AdamW(model.parameters(), LR, BETAS, EPS, WEIGHT_DECAY)  # noqa: E731
    # labels are the inputs: the model itself shifts them
    return Implementation(
        model, lambda model, x, y: model(x, labels=x).loss, optimizer, (torch.float32, False)
    )


def nanogpt(shape: GPTConfig, script: Path, rt: Runtime) -> Implementation:
    names = definitions(script)
    model = names["GPT"](names["GPTConfig"](dropout=0.0, bias=False, **sizes(shape))).to(rt.device)
    optimizer = lambda: model.configure_optimizers(WEIGHT_DECAY, LR, BETAS, rt.device.type)  # noqa: E731
    return Implementation(
        model, lambda model, x, y: model(x, y)[1], optimizer, (torch.bfloat16, True)
    )


def build_nanogpt(shape: GPTConfig, script: Path, rt: Runtime) -> Implementation:
    names = definitions(script, master_process=False)
    model = names["GPT"](names["GPTConfig"](**sizes(shape))).to(rt.device)
    optimizer = lambda: model.configure_optimizers(WEIGHT_DECAY, LR, rt.device.type)  # noqa: E731
    return Implementation(
        model, lambda model, x, y: model(x, y)[1], optimizer, (torch.bfloat16, False)
    )


def sizes(shape: GPTConfig) -> dict:
    return dict(
        block_size=shape.block_size, vocab_size=shape.padded_vocab_size,
        n_layer=shape.n_layer, n_head=shape.n_head, n_embd=shape.n_embd,
    )  # fmt: skip


def definitions(path: Path, **names) -> dict:
    """The classes and functions of a script, and what it imports where that can be had."""
    tree = ast.parse(path.read_text("utf-8"))
    namespace = dict(names, __name__=path.stem)
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.ClassDef | ast.FunctionDef):
            with suppress(
                ImportError
            ):  # build-nanogpt's hellaswag.py, which its model does not need
                exec(compile(ast.Module([node], []), str(path), "exec"), namespace)
    return namespace


def fused_adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The fastest AdamW that PyTorch has, given to all; what decays does not matter for the time."""
    return torch.optim.AdamW(model.parameters(), LR, BETAS, EPS, WEIGHT_DECAY, fused=True)


def training_step(
    its: Implementation,
    optimizer: torch.optim.Optimizer,
    dtype: torch.dtype,
    compiled: bool,
    x,
    y,
    rt: Runtime,
) -> Callable[[], None]:
    """A whole step on one micro-batch: forward, backward, clip, AdamW. Ours is that of train_gpt2.py."""
    if isinstance(its.model, GPT):
        model, rt = compile_model(its.model) if compiled else its.model, Runtime(rt.device, dtype)
        return lambda: train_step(model, optimizer, [(x, y)], LR, 1.0, rt)
    model = torch.compile(its.model) if compiled else its.model

    def step():
        with torch.autocast(rt.device.type, dtype) if dtype != torch.float32 else nullcontext():
            loss = its.loss(model, x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
