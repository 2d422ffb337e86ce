"""The hot path of training: torch.compile, parameter groups, AdamW and Muon, the schedule, and one step on a batch."""

import math

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from common.console import UserError
from common.runtime import Runtime
from model import GPT


class Diverged(UserError):
    """A loss or a gradient was not finite. The exit code tells the studies, which go on with it."""

    exit_code = 3


def prepare_model(model: GPT, rt: Runtime, compile: str) -> tuple[nn.Module, nn.Module]:
    """The model to train and the one to evaluate, which share their weights with `model`.

    compile is "on", "off" or "auto": torch.compile on GPUs only. With several ranks, the model to
    train averages gradients over them (DistributedDataParallel).
    """
    if compile == "on" or (compile == "auto" and rt.device.type == "cuda"):
        eval_model = compile_model(model)
    else:
        eval_model = model
    if rt.world_size == 1:
        return eval_model, eval_model
    device_ids = [rt.device] if rt.device.type == "cuda" else None
    train_model = DistributedDataParallel(
        eval_model, device_ids=device_ids, gradient_as_bucket_view=True
    )
    return train_model, eval_model


def compile_model(model: GPT) -> nn.Module:
    """The model under torch.compile.

    On CPUs the loss is left out: it works in place, and compiled code would copy its buffers.
    """
    if model.wte.weight.device.type == "cpu":
        model.loss = torch.compiler.disable(model.loss)
    return torch.compile(model)


class Optimizers:
    """Several optimizers, each of its own parameters, as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> list[dict]:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[dict]):
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def make_optimizer(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    sharded: bool = False,
    muon: bool = False,
) -> torch.optim.Optimizer | Optimizers:
    """AdamW (Loshchilov & Hutter 2019) that decays tensors of two dimensions and more: matrices and embeddings,
    not biases and LayerNorms. Fused into one kernel over all tensors.

    sharded: each rank keeps the states of its share of the parameters, updates these and sends them to the others
    (Rajbhandari et al. 2020, "ZeRO", stage 1).
    muon: the blocks' matrices are left to Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural
    networks"), with updates as large as AdamW's, so that both take the same learning rate and weight decay (Liu et al.
    2025, "Muon is Scalable for LLM Training").
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hidden = {
        name: p for name, p in trained.items() if muon and name.startswith("h.") and p.dim() == 2
    }
    others = [p for name, p in trained.items() if name not in hidden]
    groups = [
        dict(params=[p for p in others if p.dim() >= 2], weight_decay=weight_decay),
        dict(params=[p for p in others if p.dim() < 2], weight_decay=0.0),
    ]
    options = dict(lr=lr, betas=betas, eps=eps, fused=True)
    if muon:
        like_adamw = dict(lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        return Optimizers(
            torch.optim.Muon(hidden.values(), **like_adamw), torch.optim.AdamW(groups, **options)
        )
    if sharded:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # late: it takes a second

        return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **options)
    return torch.optim.AdamW(groups, **options)


def optimizer_state(optimizer: torch.optim.Optimizer | Optimizers) -> dict | list | None:
    """The whole state dict, the same whether it was sharded or not; on rank 0, None on the others. For all ranks."""
    if hasattr(optimizer, "consolidate_state_dict"):  # a ZeroRedundancyOptimizer
        optimizer.consolidate_state_dict(to=0)
        return optimizer.state_dict() if dist.get_rank() == 0 else None
    return optimizer.state_dict()


def learning_rate(
    step: int, max_steps: int, warmup_steps: int, max_lr: float, min_lr: float
) -> float:
    """Linear warmup from max_lr / warmup_steps, then a cosine from max_lr down to min_lr at max_steps."""
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (max_lr - min_lr)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Optimizers,
    batch: list[tuple],
    lr: float,
    grad_clip: float,
    rt: Runtime,
    micro_batch_weights: list[float] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step on a global batch, of which `batch` lists this rank's micro-batches (x, y).

    Returns this rank's mean loss in nats and the norm of the whole batch's gradient before clipping, both still on
    the device. Gradients are averaged over the ranks once, on the last micro-step. grad_clip 0 clips nothing.
    Micro-batches count alike, or by `micro_batch_weights`, whose mean over the ranks must add up to 1.
    """
    weights = micro_batch_weights or [1 / len(batch)] * len(batch)
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss_sum = torch.zeros((), device=rt.device)
    for n, ((x, y), weight) in enumerate(zip(batch, weights)):
        if rt.world_size > 1:
            model.require_backward_grad_sync = n == len(batch) - 1
        with rt.autocast():
            loss = model(x, y) * weight
        loss.backward()
        loss_sum += loss.detach()
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss_sum, grad_norm
