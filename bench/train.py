"""The rows about training: time of a step, and peak memory."""

import functools
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import measure, peers
from bench.measure import (
    DTYPE_NAMES,
    LIBGOMP_DEFAULT,
    ROOFLINE,
    CandidateProcess,
    Figure,
    fastest,
)
from common import runtime
from common.console import Progress, UserError
from common.cpu import PackedLinear, can_pack
from common.runtime import Runtime
from model import GPTConfig

PRODUCTS = f"{ROOFLINE}matrix products only"
# About 30 million parameters with GPT-2's vocabulary
SMALL_MODEL: dict[str, Any] = dict(n_layer=6, n_head=6, n_embd=384)


@dataclass
class Workload:
    """A model and micro-batches of B rows of block_size tokens."""

    model: GPTConfig
    B: int

    @property
    def T(self) -> int:
        return self.model.block_size

    def __str__(self):
        return f"{self.model.n_layer} x {self.model.n_embd}, B={self.B}, T={self.T}"


# The workloads of each device. On a CPU: a model that trains in reasonable time, and GPT-2 (124M).
STEP_WORKLOADS = {
    "cpu": [
        Workload(GPTConfig(block_size=256, **SMALL_MODEL), B=4),
        Workload(GPTConfig(block_size=256), B=4),
    ],
    "cuda": [Workload(GPTConfig(block_size=1024), B) for B in (16, 32, 64)],
}
# T is 1024, so that activations and logits dominate.
MEMORY_WORKLOAD = {
    "cpu": Workload(GPTConfig(block_size=1024, **SMALL_MODEL), B=8),
    "cuda": Workload(GPTConfig(block_size=1024), B=16),
}


def train(config, rt: Runtime) -> list[Figure]:
    """Time of a training step.

    Every implementation has a process of its own, as when it is used, but they run in turn.
    """
    scripts = peers.find_scripts(config.nanogpt, config.build_nanogpt)
    figures = []
    for workload in STEP_WORKLOADS[rt.device.type]:
        row = f"train {workload}"
        # All processes live until the last round; the `with` block ends them.
        with ExitStack() as stack:
            candidates = {}
            # One process per implementation, and one for the roofline.
            for name in peers.names_of_peers(scripts):
                env = {} if name == peers.ThisProject.name else LIBGOMP_DEFAULT
                process = CandidateProcess(
                    make_steps, name, workload, scripts, config.device, env=env
                )
                candidates |= stack.enter_context(process).candidates
            process = CandidateProcess(make_matrix_products, workload, config.device)
            candidates |= stack.enter_context(process).candidates
            # This project comes first, and its first candidate is the one as shipped.
            ours_as_shipped = next(iter(candidates))
            measured = {
                name: candidate
                for name, candidate in candidates.items()
                if not any(text in name for text in config.skip)
            }
            if not measured:
                raise UserError("skip leaves out every step: give a longer part of the names")
            seconds = measure.medians(measured, config.rounds, row)

        # The machine's best: the faster of the two dtypes, also for candidates in the slower one.
        products = [name for name in seconds if name.startswith(PRODUCTS)]
        roofline = min(products, key=lambda name: seconds[name], default=None)

        tokens = workload.B * workload.T
        figures += measure.rates(row, seconds, tokens, "tokens/s", ours_as_shipped, roofline)
    return figures


def make_steps(name: str, workload: Workload, scripts: dict[str, Path], device: str) -> dict:
    """Training steps of one implementation: as shipped, and compiled with fused AdamW in every
    dtype. For a CandidateProcess."""
    # The candidates share one model and its weights.
    rt = runtime.start(device)
    peer = peers.make_peer(name, workload.model, scripts, rt)
    label = f"{name}, as shipped: {DTYPE_NAMES[peer.shipped_dtype]}"
    if peer.shipped_compiled:
        label += ", compiled"
    steps = {label: peer.make_shipped_step(workload.B)}

    # The best settings, the same for every implementation.
    optimizer = peers.fused_adamw(peer.model)
    for dtype in measure.dtypes_of(rt.device):
        label = f"{name}, best settings: {DTYPE_NAMES[dtype]}, compiled, fused AdamW"
        steps[label] = peer.make_step(optimizer, dtype, True, workload.B)
    return steps


def make_matrix_products(workload: Workload, device: str) -> dict:
    """A step's matrix products and nothing else, in every dtype. For a CandidateProcess."""
    rt = runtime.start(device)
    steps = {}
    for dtype in measure.dtypes_of(rt.device):
        label = f"{PRODUCTS}, {DTYPE_NAMES[dtype]}"
        # One set of buffers per kind of layer, used once for each layer of that kind
        products = [
            (MatrixProduct(workload.B * workload.T, n_in, n_out, dtype, rt.device), count)
            for n_in, n_out, count in linear_layers(workload.model)
        ]
        steps[label] = functools.partial(run_products, products)
    return steps


def linear_layers(config: GPTConfig) -> list[tuple[int, int, int]]:
    """Input width, output width and number of the model's linear layers of each kind."""
    # Without the products inside attention, which depend on T
    C = config.n_embd
    return [
        (C, 3 * C, config.n_layer),  # attention: queries, keys, values
        (C, C, config.n_layer),  # attention: output projection
        (C, 4 * C, config.n_layer),  # MLP
        (4 * C, C, config.n_layer),  # MLP: back to the residual stream
        (C, config.padded_vocab_size, 1),  # logits
    ]


class MatrixProduct:
    """A linear layer on N tokens: the product of the forward pass and the two of the backward pass.

    Each is computed by the fastest of several methods. All results have buffers where PyTorch
    accepts them, because allocations are no part of the roofline.
    """

    def __init__(self, N: int, n_in: int, n_out: int, dtype: torch.dtype, device: torch.device):
        # The values do not influence the time.
        options = dict(dtype=dtype, device=device)
        x = torch.randn(N, n_in, **options)
        weight = torch.randn(n_out, n_in, **options)
        y = torch.empty(N, n_out, **options)
        x_grad = torch.empty_like(x)
        weight_grad = torch.empty_like(weight)

        # In the backward pass, y stands for its own gradient.
        forward = [lambda: torch.mm(x, weight.t(), out=y)]
        backward_x = [lambda: torch.mm(y, weight, out=x_grad)]
        backward_weight = [
            lambda: torch.mm(y.t(), x, out=weight_grad),
            lambda: torch.mm(x.t(), y, out=weight_grad.view(n_in, n_out)),  # the transposed one
        ]
        # oneDNN is faster than PyTorch's own choice for some shapes on some processors. Its packed
        # weights change with each step, so packing counts.
        if can_pack(device, dtype):
            forward.append(lambda: PackedLinear(weight, None, dtype, N)(x))
            backward_x.append(lambda: PackedLinear(weight.t().contiguous(), None, dtype, N)(y))
        products = (forward, backward_x, backward_weight)
        self.products = [fastest(methods, device) for methods in products]

    def run(self):
        for product in self.products:
            product()


def run_products(products: list[tuple[MatrixProduct, int]]):
    """Run each product as often as the model has layers of its kind."""
    for product, count in products:
        for _ in range(count):
            product.run()


def memory(config, rt: Runtime) -> list[Figure]:
    """Peak memory of three training steps, each implementation as shipped."""
    scripts = peers.find_scripts(config.nanogpt, config.build_nanogpt)
    workload = MEMORY_WORKLOAD[rt.device.type]
    row = f"memory {workload}"
    names = [*peers.names_of_peers(scripts), peers.ThisProjectCheckpointed.name]
    peaks = {}
    for name in Progress(names, desc=row, unit="process", leave=False):
        # The peak of a process never falls, so each candidate needs a new process.
        peaks[name] = measure.run_in_new_process(
            peak_memory, name, workload, scripts, config.device
        )

    return [
        # Divided by this project's peak: above 1, this project needs less.
        Figure(row, name, peak / 1e6, "MB", peak / peaks[peers.ThisProject.name])
        for name, peak in peaks.items()
    ]


def peak_memory(name: str, workload: Workload, scripts: dict[str, Path], device: str) -> int:
    """Peak memory of this process in bytes, after three steps."""
    rt = runtime.start(device)
    peer = peers.make_peer(name, workload.model, scripts, rt)
    step = peer.make_shipped_step(workload.B)
    # AdamW allocates its state at the end of the first step, so the peak comes later.
    for _ in range(3):
        step()
    return rt.peak_memory()
