"""Optimization: torch.compile and DDP, AdamW and Muon, loss scaling, schedule, a training step."""

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from common.console import UserError
from common.muon import Muon
from common.runtime import Runtime, has_fast_bf16
from model import GPT


class Diverged(UserError):
    """A loss or a gradient is not finite.

    The process ends with this exit code, by which the studies recognize a diverged run.
    """

    exit_code = 3


def prepare_model(model: GPT, rt: Runtime, compile: str) -> tuple[nn.Module, nn.Module]:
    """The model to train and the model to evaluate; both share their weights with `model`.

    `compile` is "on", "off", or "auto": torch.compile on GPUs only. With several ranks, the model
    to train averages its gradients over them (DistributedDataParallel).
    """
    if compile == "on" or (compile == "auto" and rt.device.type == "cuda"):
        eval_model = compile_model(model)
    else:
        eval_model = model
    # Evaluation needs no gradients, and ranks may evaluate different numbers of batches: outside
    # of DDP.
    if rt.world_size == 1:
        return eval_model, eval_model
    device_ids = [rt.device] if rt.device.type == "cuda" else None
    # Gradients live in DDP's communication buffers, which saves a copy of them. torch.compile sees
    # that it works inside DDP, and cuts the graph where a bucket of gradients is full: the ranks
    # exchange it while the rest of the backward pass is computed.
    train_model = DistributedDataParallel(
        eval_model, device_ids=device_ids, gradient_as_bucket_view=True
    )
    return train_model, eval_model


def compile_model(model: GPT) -> nn.Module:
    """The model under torch.compile.

    On CPUs the loss is not compiled: it works in place, and compiled code would copy its buffers.
    """
    if model.wte.weight.device.type == "cpu":
        model.loss = torch.compiler.disable(model.loss)
    return torch.compile(model)


# ---------------------------------------------------------------------------------------------
# Optimizers


class Optimizers:
    """Several optimizers, each with its own parameters, used as one."""

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


Optimizer: TypeAlias = torch.optim.Optimizer | Optimizers


def make_adamw(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    sharded: bool = False,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), fused into one kernel over all tensors.

    Weight decay applies to tensors with two or more dimensions, which are matrices and embeddings,
    and not to biases and LayerNorms.

    sharded: each rank keeps the states of its share of the parameters, updates those, and sends
        them to the other ranks (Rajbhandari et al. 2020, "ZeRO", stage 1).
    """
    # Finetuning with LoRA trains only some of the parameters.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        dict(params=[p for p in trained if p.dim() >= 2], weight_decay=weight_decay),
        dict(params=[p for p in trained if p.dim() < 2], weight_decay=0.0),
    ]
    options = dict(lr=lr, betas=betas, eps=eps, fused=True)
    if sharded:
        # It takes a second. runtime.join says why scripts import it before the ranks are joined.
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **options)
    return torch.optim.AdamW(groups, **options)


def make_muon(
    model: GPT,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    momentum: float = 0.95,
    embedding_lr_scale: float = 1.0,
    position_lr_scale: float = 1.0,
) -> Optimizers:
    """Muon (common/muon.py) for the matrices of the blocks, AdamW for everything else.

    betas, eps: AdamW's. Learning rate and weight decay are the same for both, without weight decay
        for biases and LayerNorms.
    momentum: Muon's.
    embedding_lr_scale, position_lr_scale: learning rates of the token and of the position
        embeddings, as multiples of lr.
    """
    attention = []  # the projections to queries, keys and values
    matrices = []
    for name, parameter in model.h.named_parameters():
        if name.endswith("c_attn.weight"):
            attention.append(parameter)
        elif parameter.dim() == 2:
            matrices.append(parameter)
    # Three matrices, one below the other: each is orthogonalized on its own.
    muon_groups: list[dict] = [dict(params=attention, parts=3), dict(params=matrices)]
    dtype = torch.bfloat16 if has_fast_bf16(model.wte.weight.device) else torch.float32
    muon = Muon(muon_groups, lr, weight_decay, dtype, momentum)

    # train_step sets the learning rate of each step: lr * lr_scale of the group.
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [
        dict(params=[model.wte.weight], weight_decay=weight_decay, lr_scale=embedding_lr_scale),
        dict(params=[model.wpe.weight], weight_decay=weight_decay, lr_scale=position_lr_scale),
        dict(params=vectors, weight_decay=0.0),
    ]
    adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    return Optimizers(muon, adamw)


def load_optimizer_state(optimizer: Optimizer, state: Any):
    """Restore moments and step counts. Weight decay, betas and the like stay those of this run."""
    # load_state_dict replaces the settings of the groups, too: put this run's back.
    settings = []
    for group in optimizer.param_groups:
        settings.append({key: value for key, value in group.items() if key != "params"})
    try:
        optimizer.load_state_dict(state)
    except ValueError as error:
        raise UserError(
            f"the checkpoint's optimizer has other groups of parameters ({error}): it was written "
            "by another version; --init_from FILE starts a new run from its weights"
        ) from error
    for group, kept in zip(optimizer.param_groups, settings, strict=True):
        group.update(kept)


def optimizer_state(optimizer: Optimizer) -> dict | list | None:
    """The complete state dict on rank 0, sharded or not; all ranks must call this.

    The other ranks of a sharded optimizer get None.
    """
    if hasattr(optimizer, "consolidate_state_dict"):  # a ZeroRedundancyOptimizer
        optimizer.consolidate_state_dict(to=0)
        return optimizer.state_dict() if dist.get_rank() == 0 else None
    return optimizer.state_dict()


# ---------------------------------------------------------------------------------------------
# Loss scaling


class LossScaler(GradScaler):
    """Scales the loss in float16, so that small gradients are not rounded to zero (Micikevicius et
    al. 2018, "Mixed Precision Training"). In other dtypes it does nothing, and its state is empty.

    A gradient that overflows halves the scale, and the update is skipped; 2,000 steps without an
    overflow double it.
    """

    # PyTorch's default. Too large a scale costs a few skipped updates at the start; with too small
    # a one, small gradients silently become zero.
    INIT_SCALE = 65536.0
    # At a lower scale, the gradient itself overflows, not the scaled one.
    MIN_SCALE = 1.0

    def __init__(self, rt: Runtime):
        enabled = rt.dtype == torch.float16
        super().__init__(rt.device.type, init_scale=self.INIT_SCALE, enabled=enabled)

    def load_state_dict(self, state: dict | None):
        """Restore the scale. Checkpoints of other dtypes and of earlier versions have none."""
        if state:
            super().load_state_dict(state)


# ---------------------------------------------------------------------------------------------
# A training step


def learning_rate(
    step: int,
    max_steps: int,
    warmup_steps: int,
    max_lr: float,
    min_lr: float,
    decay: Literal["cosine", "linear"] = "cosine",
) -> float:
    """The learning rate of update `step` (0, 1, ...). recipe_study.py also tries a late decay.

    max_lr |     __
           |   /    `.            linear warmup from max_lr / warmup_steps,
    min_lr |  /        `-._       then a cosine, or a straight line, from max_lr to min_lr
           +--|---|--------|
              0  warmup   max_steps
    """
    # step + 1: a learning rate of 0 would waste the first batch.
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    height = 1 - progress if decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return min_lr + height * (max_lr - min_lr)


def train_step(
    model: nn.Module,
    optimizer: Optimizer,
    batch: list[tuple[torch.Tensor, torch.Tensor]],
    lr: float,
    grad_clip: float,
    rt: Runtime,
    micro_batch_weights: list[float] | None = None,
    scaler: LossScaler | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One update on a global batch.

    `batch` is this rank's list of micro-batches (x, y), each (B, T) int64. They count equally, or
    by `micro_batch_weights`, which add up to 1 on average over the ranks. grad_clip 0 means no
    clipping. float16 needs a scaler.

    Returns this rank's mean loss in nats and the norm of the global gradient before clipping, both
    scalars on the device. If float16 overflows on any rank, no rank changes its weights, and the
    norm is not finite.
    """
    # A scaler that does nothing, for callers that compute in other dtypes.
    if scaler is None:
        assert rt.dtype != torch.float16, "float16 needs a scaler, which lives as long as the run"
        scaler = LossScaler(rt)
    weights = micro_batch_weights or [1 / len(batch)] * len(batch)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)

    # Accumulate gradients. The ranks average them once, during the last backward pass.
    loss_sum = torch.zeros((), device=rt.device)
    for n, ((x, y), weight) in enumerate(zip(batch, weights)):
        if isinstance(model, DistributedDataParallel):
            # What DDP's no_sync() sets, without a context around the loop's body.
            model.require_backward_grad_sync = n == len(batch) - 1
        with rt.autocast():
            loss = model(x, y) * weight
        scaler.scale(loss).backward()
        loss_sum += loss.detach()

    # The scale is removed before clipping. An overflow leaves an infinity or NaN in the averaged
    # gradient, which every rank sees: `step` then changes nothing, and `update` lowers the scale.
    scaler.unscale_(optimizer)
    # Without clipping, the norm is still worth its time: it shows a run that becomes unstable.
    parameters = [p for p in model.parameters() if p.grad is not None]
    grad_norm = nn.utils.get_total_norm([p.grad for p in parameters])
    if grad_clip:
        nn.utils.clip_grads_with_norm_(parameters, grad_clip, grad_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss_sum, grad_norm


@dataclass
class StepResult:
    """What an update reports, the same on all ranks."""

    loss: float  # mean over the batch, in nats
    grad_norm: float  # norm of the gradient before clipping
    loss_scale: float | None  # in float16, the scale after the update
    stop_asked: bool  # whether a rank was asked to stop

    @property
    def skipped(self) -> bool:
        """Whether float16 overflowed, so that there was no update, and training can go on.

        False at a scale below MIN_SCALE: such a run has diverged, and its step does not count as
        skipped. From INIT_SCALE, that takes log2(INIT_SCALE) + 1 overflows in a row.
        """
        if self.loss_scale is None or math.isfinite(self.grad_norm):
            return False
        return self.loss_scale >= LossScaler.MIN_SCALE

    @property
    def diverged(self) -> bool:
        """Whether the loss or the gradient is not finite, and the step was not skipped."""
        is_finite = math.isfinite(self.loss) and math.isfinite(self.grad_norm)
        return not is_finite and not self.skipped

    def record(self) -> dict:
        """Values for the log. `skipped` and `loss_scale` exist in float16 only."""
        values: dict[str, Any] = dict(loss=self.loss, grad_norm=self.grad_norm)
        if self.loss_scale is not None:
            values |= dict(skipped=self.skipped, loss_scale=self.loss_scale)
        return values


class PendingResult:
    """The result of an update that the device may still be computing.

    Python starts the kernels of a GPU ahead of time. A loop that reads each result only after it
    has started the next update never lets the GPU wait:

        Python    start 1   start 2   read 1   start 3   read 2   start 4   ...
        GPU           1 1 1 1 1 1 1 1 1 2 2 2 2 2 2 2 2 2 3 3 3 3 3 3 3 3 3 4 4 ...

    All ranks must create it at the same time.
    """

    def __init__(
        self,
        loss: torch.Tensor,
        grad_norm: torch.Tensor,
        scaler: LossScaler,
        rt: Runtime,
        stop_number: int = 0,
    ):
        """loss and grad_norm are what train_step returned. stop_number is not 0 if this rank was
        asked to stop."""
        self.is_float16 = scaler.is_enabled()

        # All numbers in one tensor: one reduction over the ranks, one copy to the CPU.
        # A copy, because the next update changes the scale; 1 in other dtypes. `get_scale` and
        # `tensor` would wait for the device, `scale` and `full` do not.
        loss_scale = scaler.scale(torch.ones_like(loss))
        stop = torch.full_like(loss, stop_number)
        mean = rt.sum(torch.stack([loss, grad_norm, loss_scale, stop])) / rt.world_size

        # The copy must begin now: later, it would queue behind the kernels of the next update.
        self.numbers = mean.to("cpu", non_blocking=rt.runs_ahead)
        self.arrived = None
        if mean.is_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> StepResult:
        """Wait for the device."""
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, grad_norm, loss_scale, stop = self.numbers.tolist()
        return StepResult(loss, grad_norm, loss_scale if self.is_float16 else None, stop > 0)
