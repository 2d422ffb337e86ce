"""CPU special cases: faster products without gradients, and an allocator that keeps its memory.

    model = for_generation(model, torch.float32, num_texts=8)    # a copy that generates faster
    model = for_scoring(model, rt, num_tokens=1024)              # a copy that scores faster
    keep_freed_memory(device)                                    # for training

Generating a token reads every weight once, so its time is the time to read them from memory.
nn.Linear does not reach the memory's speed. PackedLinear comes nearer, and on processors without
fast bfloat16 SplitLinear for one text. bfloat16 halves the bytes, where the processor has it.

Scoring multiplies by the same weights again and again. nn.Linear brings them into the order that
the kernel wants each time, and autocast rounds them to bfloat16 each time; PackedLinear once. In
float32, nn.Linear uses MKL, which on AMD's processors can be half as fast as oneDNN.
"""

import copy
import ctypes
import math
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn as nn
from torch.nn import functional as F

from common.runtime import Runtime, has_fast_bf16
from model import GPT, MLP

# Rows of the input for which oneDNN chooses its order. It hardly differs from 2 to 16 rows.
EXPECTED_ROWS = 8
# Rows of the weight in a part of SplitLinear. All widths of GPT-2 are multiples of it.
PART_ROWS = 64

# Option numbers of mallopt, from glibc's malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


class PackedLinear(nn.Module):
    """nn.Linear for inference, with its weight (out, in) in oneDNN's order.

    It calls the operators that torch.compile uses for frozen weights. `rows` is the number of rows
    of an input, for which oneDNN chooses the order. With `gelu`, the argument `approximate` of
    nn.GELU, the result goes through GELU, before it is rounded and written to memory.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        rows: int = EXPECTED_ROWS,
        gelu: str | None = None,
    ):
        super().__init__()
        self.dtype = dtype
        # Plain tensors, not parameters: their memory order is one that only oneDNN can read.
        weight = weight.detach().to(dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        self.bias = None if bias is None else bias.detach().to(dtype)
        # The activation function after the product, its numbers (none here) and its variant
        self.activation = ("none", [], "") if gelu is None else ("gelu", [], gelu)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.dtype)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *self.activation)


class SplitLinear(nn.Module):
    """nn.Linear for inference, fast for an input of one row: a vector.

    MKL's product of a matrix and a vector keeps several cores less busy than its batched product of
    small ones, so the weight (out, in) is cut into parts of PART_ROWS rows, without being copied.
    `gelu` as in PackedLinear.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, gelu: str | None = None):
        super().__init__()
        self.gelu = gelu
        self.weight = weight.detach()
        self.bias = None if bias is None else bias.detach()
        n_out, n_in = weight.shape
        rows = math.gcd(n_out, PART_ROWS)
        self.parts = self.weight.view(-1, rows, n_in).transpose(1, 2)  # (parts, in, rows)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.product(x)
        return y if self.gelu is None else F.gelu(y, approximate=self.gelu)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        n_in = x.size(-1)
        if x.numel() > n_in:  # more than one row: a prompt
            return F.linear(x, self.weight, self.bias)
        # The same vector for each part. `expand` copies nothing.
        x_parts = x.view(1, 1, n_in).expand(len(self.parts), 1, n_in)
        y = torch.bmm(x_parts, self.parts).view(*x.shape[:-1], -1)
        return y if self.bias is None else y.add_(self.bias)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN is available and multiplies in this dtype on this processor."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


def for_generation(model: GPT, dtype: torch.dtype, num_texts: int) -> GPT:
    """A copy of a model on the CPU that generates faster, to be used without autocast.

    Its matrix products run in `dtype`, float32 or bfloat16, and are fastest for num_texts texts at
    a time.
    """
    # Where bf16 is fast, oneDNN reads packed float32 weights faster than MKL reads the parts, too.
    onednn_is_best = has_fast_bf16(model.wte.weight.device) or not torch.backends.mkl.is_available()
    if num_texts == 1 and dtype == torch.float32 and not onednn_is_best:
        return with_products(model, SplitLinear)
    return with_products(model, partial(PackedLinear, dtype=dtype))


def for_scoring(model: GPT, rt: Runtime, num_tokens: int) -> GPT:
    """A copy of the model that scores num_tokens tokens at a time faster.

    The model itself on GPUs, and on CPUs where it would be no faster: an AMD EPYC with AVX2 gains
    nothing, one with AVX512_BF16 scores twice as fast in float32 and 1.1 times as fast in bf16
    (bench/README.md). With AMX, only the copy was measured.
    """
    if rt.device.type != "cpu" or not has_fast_bf16(rt.device) or not can_pack(rt.device, rt.dtype):
        return model
    return with_products(model, partial(PackedLinear, dtype=rt.dtype, rows=num_tokens))


def with_products(model: GPT, product: Callable[..., nn.Module]) -> GPT:
    """A copy of a model with the modules product(weight, bias, gelu=...) as its linear layers.

    `gelu` as in PackedLinear: GELU becomes part of the layer before it. Embeddings and LayerNorms
    are shared with the model.
    """
    # deepcopy takes what `memo` holds for an object instead of copying it. A parameter stands for
    # itself, so it is shared, and a linear layer is replaced.
    memo: dict[int, nn.Module | nn.Parameter] = {id(p): p for p in model.parameters()}
    gelu_after = {}  # the linear layers that GELU follows: its variant
    for module in model.modules():  # an MLP comes before its layers
        if isinstance(module, MLP):
            gelu_after[module.c_fc] = module.gelu.approximate
            memo[id(module.gelu)] = nn.Identity()
        elif isinstance(module, nn.Linear):
            gelu = gelu_after.get(module)
            memo[id(module)] = product(module.weight, module.bias, gelu=gelu)
    replica = copy.deepcopy(model, memo)

    # Replace the method `head`, which would multiply by nn.Embedding's weight. The rows that only
    # pad the vocabulary are multiplied, too, because they make its size a multiple of PART_ROWS.
    head = product(model.wte.weight, None)
    vocab_size = model.config.vocab_size
    replica.head = lambda x: head(x)[..., :vocab_size]  # type: ignore[method-assign]
    return replica


def keep_freed_memory(device: torch.device):
    """Let glibc keep the memory of large tensors for later ones, as PyTorch does on GPUs.

    By default it returns that memory to the kernel, and each step gets new pages, which the kernel
    must fill with zeros first.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return
    # The C library that this process has loaded already
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl lacks it
        # Large blocks come from the heap too, not from mappings of their own, which `free` would
        # unmap.
        libc.mallopt(M_MMAP_MAX, 0)
        # -1: the free memory at the top of the heap is never returned (mallopt(3)).
        libc.mallopt(M_TRIM_THRESHOLD, -1)
