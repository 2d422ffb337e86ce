"""How much memory training needs, and how much is free: a run that cannot fit says so first.

    free = free_memory(rt)                    # before the model is made
    estimate = TrainingMemory(model, T, sequences, rt)
    B = choose_B(B, free, estimate)           # or UserError; B = 0 chooses

The need is computed, not measured, from the shapes of all large tensors at the peak of a training
step. On CPUs, an allowance for the allocator is added. docs/log.md compares both with measured
peaks. torch.compile recomputes cheap activations instead of storing them, so a compiled model needs
less.
"""

import math
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from common.console import UserError
from common.muon import BATCH_ELEMENTS, wide_matrices
from common.runtime import Runtime, has_fast_bf16
from model import CACHED_LOGITS, GPT, SHORT_CONTEXT

FLOAT = 4  # bytes of a float32

# A process on a CPU has more resident memory than its tensors need: gaps in the heap between freed
# tensors, buffers of the matrix products, modules that are imported late. From measured peaks.
CPU_HEAP = 1.5  # for tensors that are allocated anew in each step
CPU_OTHER = 300_000_000  # bytes


# ---------------------------------------------------------------------------------------------
# Need


@dataclass
class TrainingMemory:
    """What training a model needs in one process, as a function of the micro-batch B.

    In the formulas, N = B * T tokens, C = n_embd, V = rows of the embedding, L = n_layer,
    H = n_head, and half = bytes of a number in the dtype of matrix products (4 or 2).
    """

    model: GPT  # only its shape counts: it can be on the device "meta"
    T: int  # sequence length in tokens
    sequences: int  # sequences per optimizer step in this process
    rt: Runtime
    muon: bool = False
    sharded: bool = False  # optimizer states shared among the ranks
    activation_checkpointing: bool = False
    # are there checkpoints before the last step? If so, their copy of weights and optimizer states
    # stays in host memory; the final checkpoint makes one after the last step
    saves_during_training: bool = False

    def __post_init__(self):
        self.config = self.model.config
        self.half = FLOAT if self.rt.dtype == torch.float32 else 2
        is_cpu = self.rt.device.type == "cpu"
        # `attention` in model.py then keeps the softmax of the scores, (T, T) for each head.
        is_short = self.T <= SHORT_CONTEXT
        self.stores_softmax = is_cpu and self.rt.dtype == torch.bfloat16 and is_short
        # PyTorch's CPU kernel for attention has no dropout: it then stores the (T, T) matrices.
        has_dropout = self.config.dropout > 0
        self.stores_attention = is_cpu and has_dropout and not self.stores_softmax

    def need(self, B: int) -> int:
        """Bytes that a training step needs, with the allowance on CPUs."""
        step = self.step(B)
        if self.rt.device.type == "cpu":
            # On a GPU, the copy for saving lies in host memory.
            final_copy = 0 if self.saves_during_training else self.weights() + self.moments()
            step = max(step * CPU_HEAP, final_copy) + CPU_OTHER
        return int(self.permanent() + step + self.tokens())

    def step(self, B: int) -> float:
        """Bytes of the tensors that a training step allocates, at its peak."""
        accumulates = self.sequences > B or self.rt.world_size > 1  # DDP's buckets always exist
        gradients = FLOAT * self.num_params(trained=True)
        kept = gradients if accumulates else 0
        embedding = FLOAT * self.model.wte.weight.numel()
        activations = self.activations(B)
        return max(
            # 1. At the end of the forward pass, in the loss.
            kept + activations + self.loss(B),
            # 2. In the backward pass of the last block, when nearly all activations still exist.
            kept + activations + embedding + self.backward(B),
            # 3. At the end of the backward pass: the embedding has one gradient as the head and
            #    another as the input, and if gradients accumulate also their sum so far.
            gradients + embedding + (embedding if accumulates else 0),
            # 4. In the optimizer.
            gradients + self.update(),
        )

    def num_params(self, trained: bool) -> int:
        params = self.model.parameters()
        # A frozen parameter has no gradient and no optimizer states.
        return sum(p.numel() for p in params if p.requires_grad or not trained)

    def num_block_matrices(self) -> int:
        """Numbers in the matrices of the blocks."""
        return sum(p.numel() for p in self.model.h.parameters() if p.dim() == 2)

    def weights(self) -> int:
        """All weights, in float32."""
        return FLOAT * self.num_params(trained=False)

    def moments(self) -> int:
        """The optimizer's states: two numbers per parameter for AdamW, one for Muon."""
        size = 2 * FLOAT * self.num_params(trained=True)
        return size - FLOAT * self.num_block_matrices() if self.muon else size

    def permanent(self) -> float:
        """Bytes allocated for the whole run: weights, optimizer states, a copy of both to save."""
        states = self.moments() / self.rt.world_size if self.sharded else self.moments()
        # Only rank 0 has the copy, with the states of all ranks.
        is_copied = self.saves_during_training and self.rt.device.type != "cuda"
        return self.weights() + states + (self.weights() + self.moments() if is_copied else 0)

    def block(self, B: int) -> int:
        """What the backward pass of one block needs of its forward pass.

            tensor                        numbers per token    bytes of each
            inputs of the LayerNorms      2 C                  4
            outputs of the LayerNorms     2 C                  half
            queries, keys, values         3 C                  half
            output of attention           C                    half
            before and after the GELU     8 C                  half
            logsumexp of attention        H                    4
            mean and deviation of the LayerNorms               4 numbers of 4 bytes

        With dropout: its two masks (C each), and on CPUs three (T, T) matrices per head, with
        queries, keys and values in float32. For short contexts in bf16 on CPUs: one (T, T) matrix
        per head instead of the logsumexp, three with dropout, all in bf16.
        """
        N = B * self.T
        C = self.config.n_embd
        H = self.config.n_head
        half = self.half
        size = N * (C * (2 * FLOAT + 14 * half) + FLOAT * (H + 4))
        if self.config.dropout:
            is_gpu = self.rt.device.type == "cuda"
            size += N * 2 * C * (1 if is_gpu else half)  # a mask is bool on GPUs
        if self.stores_attention:
            size += N * (3 * FLOAT * H * self.T + 3 * C * (FLOAT - half))
        if self.stores_softmax:
            matrices = 3 if self.config.dropout else 1
            size += N * H * (matrices * half * self.T - FLOAT)
        return size

    def activations(self, B: int) -> int:
        """What exists at the end of the forward pass, besides weights and gradients."""
        hidden = FLOAT * B * self.T * self.config.n_embd  # (N, C)
        if self.activation_checkpointing:
            blocks = self.config.n_layer * hidden  # only the input of each block
        else:
            blocks = self.config.n_layer * self.block(B)
        if self.config.dropout:
            blocks += hidden  # the mask of the input's dropout
        # Autocast keeps the weights that it has converted until the end of the backward pass.
        converted = self.half * self.num_block_matrices() if self.half < FLOAT else 0
        return blocks + converted + hidden  # the last one is the input of ln_f

    def loss(self, B: int) -> int:
        """LinearCrossEntropy in model.py, with its inputs."""
        N = B * self.T
        C = self.config.n_embd
        V = self.config.padded_vocab_size
        half = self.half
        # LinearCrossEntropy takes an eighth of the tokens at a time, but at least 1,024.
        part = min(N, max(1024, math.ceil(N / 8)))
        # In float32, everything happens in the buffer of a part's logits. Otherwise the softmax is
        # computed in float32 beside it: on CPUs for a few rows at a time, else for all of them.
        logits = part * V * half
        if half < FLOAT:
            is_cpu = self.rt.device.type == "cpu"
            logits += FLOAT * (min(part * V, CACHED_LOGITS) if is_cpu else part * V)
        # The input, its gradient in parts, and put together; the gradient of the embedding.
        size = logits + 3 * FLOAT * N * C + FLOAT * V * C
        if half < FLOAT:
            size += half * (N * C + 2 * V * C)  # input and embedding converted, a product
        return size

    def backward(self, B: int) -> int:
        """Gradients inside the last block and ln_f, at their peak: before that of c_fc's input."""
        N = B * self.T
        C = self.config.n_embd
        # Of the output of the model and of the block (float32), and of GELU's output and input.
        size = N * C * (3 * FLOAT + 4 * self.half)
        if self.half < FLOAT:
            size += N * C * self.half  # of the block's output, in the dtype of the products
        if self.stores_softmax:
            # In attention: the gradients of the softmax and of the scores. What the backward pass
            # of the MLP needed is free by then.
            scores = 2 * self.half * N * self.config.n_head * self.T
            size = max(size, scores + N * C * (2 * FLOAT - 6 * self.half))
        if self.activation_checkpointing:
            size += self.block(B)  # computed again
        return size

    def update(self) -> int:
        """Muon's copies of a batch of matrices: the update, and what orthogonalizes it."""
        if not self.muon:
            return 0
        size = 2 if has_fast_bf16(self.rt.device) else FLOAT
        by_shape = defaultdict(list)  # (rows, columns) of the matrices: numbers in each parameter
        for name, parameter in self.model.h.named_parameters():
            if parameter.dim() == 2:
                parts = 3 if name.endswith("c_attn.weight") else 1
                _, *shape = wide_matrices(parameter, parts).shape
                by_shape[tuple(shape)].append(parameter.numel())
        needs = []
        for (rows, columns), numbers in by_shape.items():
            n = min(sum(numbers), max(BATCH_ELEMENTS, *numbers))  # numbers in a batch
            # The directions in float32. In the dtype of the rounds, three copies of the matrices
            # (input, current, next) and two of their products with their own transpose.
            needs.append(n * (FLOAT + 3 * size) + 2 * (n * rows // columns) * size)
        return max(needs)

    def tokens(self) -> int:
        """Batches that the loader has read ahead: up to 4, with inputs and targets in one int64."""
        return 4 * 8 * self.sequences * (self.T + 1)


# ---------------------------------------------------------------------------------------------
# Free


def free_memory(rt: Runtime) -> int:
    """Bytes that this process can still allocate on its device; all ranks get the smallest value.

    On a CPU, the processes of a machine share its memory equally.
    """
    if rt.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(rt.device)
        # Blocks that torch holds but does not use are free, too.
        free += torch.cuda.memory_reserved(rt.device) - torch.cuda.memory_allocated(rt.device)
    else:
        free = min(psutil.virtual_memory().available, container_memory())
        # torchrun sets LOCAL_WORLD_SIZE, the number of its processes on this machine.
        free //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return int(rt.min(free))


def container_memory(proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> float:
    """Bytes that the control groups of this process leave free; infinite without a limit.

    Containers and schedulers limit memory by control groups (cgroups), of which Linux has two
    versions. A process belongs to a group of a tree, and each group above it can have a limit.
    """
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return float("inf")
    smallest = float("inf")
    for line in lines:
        _, controllers, path = line.split(":", 2)  # 4:memory:/docker/7f3a, or 0::/user.slice
        # Version 2 has one tree for everything. In version 1, memory has a tree of its own, and
        # `total_` marks the figures that include the groups below.
        if controllers == "":
            root = sys / "fs/cgroup"
            names = ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            root = sys / "fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        # In a container, the path can be that outside of it. Its own group is then the root.
        group = root / path.lstrip("/")
        # The tightest limit on the way up to the root counts.
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                smallest = min(smallest, group_memory(folder, *names))
    return smallest


def group_memory(folder: Path, limit_name: str, usage_name: str, prefix: str) -> float:
    """Bytes that one control group leaves free; infinite without a limit."""
    try:
        limit = (folder / limit_name).read_text().strip()
        usage = int((folder / usage_name).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return float("inf")
    # Version 1 has no such word: without a limit, it gives a number larger than any memory.
    if limit == "max":
        return float("inf")
    # The kernel gives up cached files, the shards for example, before it runs out of memory.
    cache = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    return max(0, int(limit) - usage + cache)


# ---------------------------------------------------------------------------------------------
# Choice


def choose_B(B: int, free: int, estimate: TrainingMemory) -> int:
    """B if it fits into `free` bytes; for B = 0 the largest micro-batch that does.

    All ranks must pass the same `free`, so that they choose the same. Raises UserError if B, or
    even a single sequence, does not fit.
    """
    # A micro-batch must divide the sequences of a step.
    sequences = estimate.sequences
    candidates = [n for n in range(1, sequences + 1) if sequences % n == 0]
    fitting = [n for n in candidates if estimate.need(n) <= free]

    # Either choose the largest, or accept the one that was given.
    if B == 0 and fitting:
        return max(fitting)
    if B > 0 and estimate.need(B) <= free:
        return B

    # B does not fit. The message says which B does, or what else to lower.
    where = "GPU memory" if estimate.rt.device.type == "cuda" else "memory"
    problem = f"B {max(B, 1)} needs about {gb(estimate.need(max(B, 1)))} of {where} per process"
    if fitting:
        remedy = f"the largest B that fits is {max(fitting)} (--B 0 chooses it)"
    else:
        remedy = "not even B 1 fits: lower T, n_layer or n_embd, or free memory"
        if not estimate.activation_checkpointing:
            remedy += ", or try --activation_checkpointing"
    raise UserError(f"{problem}, and {gb(free)} are free: {remedy}")


def gb(size: float) -> str:
    """A number of bytes in GB, for messages."""
    return f"{size / 1e9:.1f} GB"
