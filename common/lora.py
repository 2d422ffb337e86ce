"""LoRA (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"): finetune small matrices beside the
frozen ones.

    add_adapters(model, rank=8)          # only the adapters are trained now
    adapter_state(model)                 # their tensors, by GPT-2's names with .A and .B behind
    merged_state(model)                  # an ordinary state dict, the adapters added into the matrices
"""

import math

import torch
import torch.nn as nn

from model import GPT

ADAPTED = ("c_attn", "c_proj", "c_fc")  # the projections of attention and MLP
SCALE = 2.0  # of the adapters' output: alpha / rank


class Adapted(nn.Module):
    """A frozen linear layer plus B @ A, which begins at zero."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base = base
        self.A = nn.Parameter(torch.empty(rank, base.in_features, device=base.weight.device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + SCALE * nn.functional.linear(nn.functional.linear(x, self.A), self.B)


def add_adapters(model: GPT, rank: int):
    """Freeze the model and put an adapter beside each projection. Raises ValueError for a rank below 1."""
    if rank < 1:
        raise ValueError(f"lora_rank is {rank}, must be at least 1")
    model.requires_grad_(False)
    for block in model.h:
        for part in (block.attn, block.mlp):
            for name in ADAPTED:
                if isinstance(base := getattr(part, name, None), nn.Linear):
                    setattr(part, name, Adapted(base, rank))


def adapter_state(model: GPT) -> dict[str, torch.Tensor]:
    return {
        name: tensor for name, tensor in model.state_dict().items() if name.endswith((".A", ".B"))
    }


@torch.no_grad()
def merged_state(model: GPT) -> dict[str, torch.Tensor]:
    """The state dict of the model without adapters that computes the same; the model stays as it is."""
    state = {name.replace(".base.", "."): tensor for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            a, b = state.pop(f"{name}.A"), state.pop(f"{name}.B")
            state[f"{name}.weight"] = state[f"{name}.weight"] + SCALE * (b @ a)
    return state
