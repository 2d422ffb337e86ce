"""CPU special cases: packed weights for generation, and an allocator that keeps its memory.

    model = pack_weights(model, torch.float32)    # a copy that generates faster
    keep_freed_memory(device)                     # for training

Generating a token reads every weight once, so its time is the time to read them from memory. oneDNN
reads a matrix faster if it lies in memory in oneDNN's own blocked order, and bfloat16 halves the
bytes.
"""

import copy
import ctypes
import sys

import torch
import torch.nn as nn

from model import GPT

# Rows of an input in generation: the texts at a time
EXPECTED_ROWS = 8

# Option numbers of mallopt, from glibc's malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


class PackedLinear(nn.Module):
    """nn.Linear for inference, with its weight (out, in) in oneDNN's order.

    It calls the operators that torch.compile uses for frozen weights. `rows` is the number of rows
    of an input, for which oneDNN chooses the order.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        rows: int = EXPECTED_ROWS,
    ):
        super().__init__()
        self.dtype = dtype
        # Plain tensors, not parameters: their memory order is one that only oneDNN can read.
        weight = weight.detach().to(dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        self.bias = None if bias is None else bias.detach().to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.dtype)
        # "none": no activation function after the product. The last two arguments are its
        # parameters.
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN is available and multiplies in this dtype on this processor."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


def pack_weights(model: GPT, dtype: torch.dtype) -> GPT:
    """A copy of a model on the CPU, for inference without autocast.

    Its matrix products run in `dtype`, float32 or bfloat16. Embeddings and LayerNorms are shared
    with the model.
    """
    # deepcopy takes what `memo` holds for an object instead of copying it. A parameter stands for
    # itself, so it is shared, and a linear layer is replaced by its packed form.
    memo: dict[int, nn.Module | nn.Parameter] = {id(p): p for p in model.parameters()}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            memo[id(module)] = PackedLinear(module.weight, module.bias, dtype)
    packed = copy.deepcopy(model, memo)

    # Replace the method `head`, which would multiply by the unpacked embedding. The rows that only
    # pad the vocabulary are left out.
    head = PackedLinear(model.wte.weight[: model.config.vocab_size], None, dtype)
    packed.head = head.forward  # type: ignore[method-assign]
    return packed


def keep_freed_memory(device: torch.device):
    """Let glibc keep the memory of large tensors for later ones, as PyTorch does on GPUs.

    By default it returns that memory to the kernel, and each step gets new pages, which the kernel
    must fill with zeros first.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return
    # The C library that this process has loaded already
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has none
        # Large blocks come from the heap too, not from mappings of their own, which `free` would
        # unmap.
        libc.mallopt(M_MMAP_MAX, 0)
        # The top of the heap is never returned: the threshold is the largest int, in bytes.
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
