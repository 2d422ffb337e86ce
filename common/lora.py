"""LoRA: train small matrices next to the frozen ones (Hu et al. 2021, "LoRA: Low-Rank Adaptation of
Large Language Models").

    add_adapters(model, rank=8)   # from now on only the adapters are trained
    adapter_state(model)          # their tensors: GPT-2's parameter names followed by .A and .B
    merged_state(model)           # an ordinary state dict, with the adapters added to the matrices

Beside each linear layer W of a block, an adapter computes a second, narrow path:

            x (B, T, in)
        ________|________
       |                 |
    W (out, in)      A (rank, in)        A starts random
     frozen              |  (B, T, rank)
       |             B (out, rank)       B starts at zero
       |                 |  times SCALE
       |________+________|
                |
            y (B, T, out)                y = x W^T + SCALE * (x A^T) B^T

With B at zero, the adapted model starts as exactly the pretrained one. A may not be zero as well:
the gradient of each of the two is proportional to the other, so neither would ever move.

After training, W + SCALE * B A replaces W, and the model is an ordinary GPT-2 again.
"""

import math

import torch
import torch.nn as nn

from model import GPT

ADAPTED = ("c_attn", "c_proj", "c_fc")  # names of the linear layers in attention and MLP

# The factor alpha / rank of the paper, with alpha = 2 * rank. It is not a flag, because with Adam,
# changing it is much like changing the learning rate, which finetune.py searches.
SCALE = 2.0


class Adapted(nn.Module):
    """A frozen linear layer with an adapter of the given rank."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        # The adapter belongs on the layer's device: the model may have been moved already.
        device = base.weight.device
        self.base = base
        self.A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        # The initialization of nn.Linear: uniform within 1 / sqrt(in).
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        narrow = nn.functional.linear(x, self.A)  # (B, T, rank)
        return self.base(x) + SCALE * nn.functional.linear(narrow, self.B)  # (B, T, out)


def add_adapters(model: GPT, rank: int):
    """Freeze the model and add an adapter to each linear layer of its blocks."""
    if rank < 1:
        raise ValueError(f"lora_rank is {rank}, must be at least 1")
    # Freeze first: the adapters are created afterwards, and stay trainable.
    model.requires_grad_(False)
    for block in model.h:
        for part in (block.attn, block.mlp):
            # Attention has no c_fc, the MLP no c_attn: skip what a part lacks.
            for name in ADAPTED:
                layer = getattr(part, name, None)
                if isinstance(layer, nn.Linear):
                    setattr(part, name, Adapted(layer, rank))


def adapter_state(model: GPT) -> dict[str, torch.Tensor]:
    """The adapters' tensors by name; empty if the model has none."""
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if name.endswith((".A", ".B"))}


@torch.no_grad()
def merged_state(model: GPT) -> dict[str, torch.Tensor]:
    """The state dict of an ordinary model that computes the same. `model` itself is not changed."""
    # Adapted renames `c_fc.weight` to `c_fc.base.weight`; undo that.
    state = {name.replace(".base.", "."): tensor for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            A = state.pop(f"{name}.A")  # (rank, in)
            B = state.pop(f"{name}.B")  # (out, rank)
            # Not in place: the tensors of the state dict are the model's own.
            state[f"{name}.weight"] = state[f"{name}.weight"] + SCALE * (B @ A)
    return state
