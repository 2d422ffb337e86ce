"""Generation on a CPU: a token needs every weight once, so that its time is that of reading them from memory.

    model = pack_weights(model, torch.float32)

oneDNN's kernels read a matrix quicker when it lies in memory in their own order, and bfloat16 halves what is read.
"""

import copy
import ctypes
import sys

import torch
import torch.nn as nn

from model import GPT

M_TRIM_THRESHOLD = -1  # option numbers of mallopt, from glibc's malloc.h
M_MMAP_MAX = -4

ROWS = 8  # of activations that the order in memory is chosen for


class PackedLinear(nn.Module):
    """nn.Linear without gradients, its weight (out, in) in oneDNN's order, by the operators that torch.compile uses."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype), ROWS)
        self.bias = None if bias is None else bias.detach().to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(
            x.to(self.dtype), self.weight, self.bias, "none", [], ""
        )


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN is there and multiplies in this dtype on this processor."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pack_weights(model: GPT, dtype: torch.dtype) -> GPT:
    """A copy of a model on a CPU to generate with, its matrix products in `dtype` (float32 or bfloat16) without
    autocast. Embeddings and LayerNorms are shared with the model."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    replaced = {id(linear): PackedLinear(linear.weight, linear.bias, dtype) for linear in linears}
    shared = {id(parameter): parameter for parameter in model.parameters()}
    replica = copy.deepcopy(model, replaced | shared)
    head = PackedLinear(model.wte.weight[: model.config.vocab_size], None, dtype)
    replica.head = lambda x: head(x)  # in place of the method
    return replica


def keep_freed_memory(device: torch.device):
    """Let glibc keep the memory of large tensors for the next ones, as PyTorch does on GPUs.

    Otherwise each step gets it from the kernel anew, as pages that must first be zeroed.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has none
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
