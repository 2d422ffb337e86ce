"""Implementations of GPT-2 behind one interface: this one, transformers, nanoGPT, build-nanogpt.

The last two are scripts in folders that the user names. Only their classes and functions are
loaded; the rest of build-nanogpt's script, which would start to train, does not run.
"""

import ast
import functools
import io
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from common.console import UserError
from common.cpu import keep_freed_memory
from common.optim import make_adamw, prepare_model, train_step
from common.runtime import Runtime
from model import GPT, GPTConfig

# GPT-3's optimizer settings, for every implementation. They don't influence the time of a step.
LR = 6e-4
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
EPS = 1e-8
GRAD_CLIP = 1.0


class Peer:
    """An implementation of GPT-2 with random weights, on a device.

    Subclasses create the model and say how their project trains it ("as shipped"): dtype,
    torch.compile, optimizer.
    """

    # As in the tables; the other two are the settings of the project's training script.
    name: str
    shipped_dtype = torch.float32
    shipped_compiled = False

    def __init__(self, config: GPTConfig, rt: Runtime, script: Path | None = None):
        """`script` contains the model of nanoGPT or build-nanogpt; the others don't need it."""
        self.block_size = config.block_size
        self.rt = rt
        self.model: Any = self.make_model(config, script).to(rt.device)

    @staticmethod
    def prepare_process(rt: Runtime):
        """Settings of the whole process, made before the model."""

    def make_model(self, config: GPTConfig, script: Path | None) -> nn.Module:
        """The model. `__init__` moves it to the device."""
        raise NotImplementedError

    def shipped_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that the project's training script makes."""
        raise NotImplementedError

    def loss(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of tokens x and targets y, both (B, T) int64."""
        raise NotImplementedError

    def compile(self) -> nn.Module:
        """The model as the project compiles it."""
        return torch.compile(self.model)

    def train_step(self, model, optimizer, dtype: torch.dtype, x: torch.Tensor, y: torch.Tensor):
        """One whole step on one micro-batch: forward, backward, clipping, optimizer."""
        # Mixed precision: the weights stay float32, autocast chooses the dtype of each product.
        autocast = nullcontext()
        if dtype != torch.float32:
            autocast = torch.autocast(self.rt.device.type, dtype)
        with autocast:
            loss = self.loss(model, x, y)
        # Without a gradient scaler: bf16 has the range of float32.
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def make_step(
        self, optimizer: torch.optim.Optimizer, dtype: torch.dtype, compiled: bool, B: int
    ) -> Callable[[], None]:
        """A function that trains for one step on a batch of B rows of random tokens."""
        # The same batch in every step. Its content does not influence the time.
        x, y = torch.randint(50257, (2, B, self.block_size), device=self.rt.device)  # (B, T) each

        # The compiled model shares its weights with self.model, which the optimizer updates.
        model = self.compile() if compiled else self.model
        return functools.partial(self.train_step, model, optimizer, dtype, x, y)

    def make_shipped_step(self, B: int) -> Callable[[], None]:
        """The step that the project's own training script would run."""
        # nanoGPT prints how many tensors decay.
        with redirect_stdout(io.StringIO()):
            optimizer = self.shipped_optimizer()
        return self.make_step(optimizer, self.shipped_dtype, self.shipped_compiled, B)


class ThisProject(Peer):
    """This project, as train_gpt2.py trains by default on this hardware."""

    name = "this project"

    def __init__(self, config: GPTConfig, rt: Runtime, script: Path | None = None):
        super().__init__(config, rt, script)
        # train_gpt2.py's defaults depend on the hardware: --dtype auto and --compile auto.
        self.shipped_dtype = rt.dtype
        self.shipped_compiled = rt.device.type == "cuda"

    @staticmethod
    def prepare_process(rt: Runtime):
        # train_gpt2.py does this too; the other projects leave the allocator alone.
        keep_freed_memory(rt.device)

    def make_model(self, config: GPTConfig, script: Path | None) -> nn.Module:
        return GPT(config)

    def shipped_optimizer(self) -> torch.optim.Optimizer:
        return make_adamw(self.model, LR, WEIGHT_DECAY, BETAS, EPS)

    def compile(self) -> nn.Module:
        train_model, _ = prepare_model(self.model, self.rt, compile="on")
        return train_model

    def train_step(self, model, optimizer, dtype: torch.dtype, x: torch.Tensor, y: torch.Tensor):
        """The step of train_gpt2.py."""
        # One micro-batch, no gradient accumulation.
        train_step(model, optimizer, [(x, y)], LR, GRAD_CLIP, Runtime(self.rt.device, dtype))


class ThisProjectCheckpointed(ThisProject):
    """This project, as train_gpt2.py trains if memory is short."""

    name = "this project, --activation_checkpointing"

    @staticmethod
    def prepare_process(rt: Runtime):
        # With activation checkpointing, train_gpt2.py gives freed memory back to the system.
        pass

    def make_model(self, config: GPTConfig, script: Path | None) -> nn.Module:
        model = GPT(config)
        model.activation_checkpointing = True
        return model


class Transformers(Peer):
    """GPT2LMHeadModel of transformers in float32, uncompiled, with PyTorch's default AdamW."""

    name = "transformers"

    def make_model(self, config: GPTConfig, script: Path | None) -> nn.Module:
        # Imported here, because it takes seconds and only this class needs it.
        from transformers import GPT2Config, GPT2LMHeadModel

        # No dropout, like the others.
        their_config = GPT2Config(
            vocab_size=config.padded_vocab_size,
            n_positions=config.block_size,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        return GPT2LMHeadModel(their_config)

    def shipped_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), LR, BETAS, EPS, WEIGHT_DECAY)

    def loss(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        # The model shifts the labels itself, so its labels are x.
        return model(x, labels=x).loss


class NanoGPT(Peer):
    """nanoGPT, as its train.py trains by default."""

    name = "nanoGPT"
    file_name = "model.py"
    # The defaults of its train.py on GPUs that have bfloat16
    shipped_dtype = torch.bfloat16
    shipped_compiled = True

    def make_model(self, config: GPTConfig, script: Path | None) -> nn.Module:
        assert script is not None
        # No dropout and no biases, as in nanoGPT's train.py.
        defined = load_definitions(script)
        their_config = defined["GPTConfig"](dropout=0.0, bias=False, **script_config(config))
        return defined["GPT"](their_config)

    def shipped_optimizer(self) -> torch.optim.Optimizer:
        # The project's own choice of parameters to decay, and of a fused AdamW
        return self.model.configure_optimizers(WEIGHT_DECAY, LR, BETAS, self.rt.device.type)

    def loss(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        _, loss = model(x, y)
        return loss


class BuildNanoGPT(Peer):
    """build-nanogpt, as its train_gpt2.py trains."""

    name = "build-nanogpt"
    file_name = "train_gpt2.py"
    # Its script sets use_compile = False.
    shipped_dtype = torch.bfloat16

    def make_model(self, config: GPTConfig, script: Path | None) -> nn.Module:
        assert script is not None
        # configure_optimizers prints if the script's global `master_process` is true.
        defined = load_definitions(script, master_process=False)
        return defined["GPT"](defined["GPTConfig"](**script_config(config)))

    def shipped_optimizer(self) -> torch.optim.Optimizer:
        # As for nanoGPT; the betas are in the function.
        return self.model.configure_optimizers(WEIGHT_DECAY, LR, self.rt.device.type)

    def loss(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        _, loss = model(x, y)
        return loss


# Other processes receive the name of a peer, and find its class in this table.
PEERS: dict[str, type[Peer]] = {
    peer.name: peer
    for peer in (ThisProject, ThisProjectCheckpointed, Transformers, NanoGPT, BuildNanoGPT)
}


def find_scripts(nanogpt: str | None, build_nanogpt: str | None) -> dict[str, Path]:
    """The script of each peer that is one, by the peer's name; None leaves a peer out.

    Raises UserError if a folder does not hold its script.
    """
    # Scripts are only looked for: they are loaded in the process that needs them.
    scripts = {}
    if nanogpt:
        scripts[NanoGPT.name] = Path(nanogpt) / NanoGPT.file_name
    if build_nanogpt:
        scripts[BuildNanoGPT.name] = Path(build_nanogpt) / BuildNanoGPT.file_name
    for path in scripts.values():
        if not path.is_file():
            raise UserError(f"no file {path}: give the folder that contains it")
    return scripts


def names_of_peers(scripts: dict[str, Path]) -> list[str]:
    """The peers to compare: this project, transformers, and those whose scripts are there."""
    return [ThisProject.name, Transformers.name, *scripts]


def make_peer(name: str, config: GPTConfig, scripts: dict[str, Path], rt: Runtime) -> Peer:
    """The implementation of that name, ready to train in this process."""
    peer_class = PEERS[name]
    # Before the model, because it concerns memory that the model allocates.
    peer_class.prepare_process(rt)
    # nanoGPT prints its number of parameters.
    with redirect_stdout(io.StringIO()):
        return peer_class(config, rt, scripts.get(name))


def fused_adamw(model: nn.Module) -> torch.optim.Optimizer:
    """PyTorch's fastest AdamW. It decays all tensors, which does not influence the time."""
    return torch.optim.AdamW(model.parameters(), LR, BETAS, EPS, WEIGHT_DECAY, fused=True)


def script_config(config: GPTConfig) -> dict:
    """The fields of GPTConfig that nanoGPT and build-nanogpt share, with their names."""
    # The padded size, so that all implementations compute the same number of logits.
    return dict(
        block_size=config.block_size,
        vocab_size=config.padded_vocab_size,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
    )


def load_definitions(path: Path, **namespace) -> dict:
    """The classes, functions and imports of a script. `namespace` holds globals that they need."""
    # Classes take their __module__ from this name, and @dataclass needs one.
    namespace["__name__"] = path.stem

    # Run the top-level statements that define something, one by one, and skip all others.
    tree = ast.parse(path.read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.ClassDef | ast.FunctionDef):
            code = compile(ast.Module([node], []), str(path), "exec")
            # build-nanogpt imports its hellaswag.py, which the model does not need.
            with suppress(ImportError):
                exec(code, namespace)
    return namespace
