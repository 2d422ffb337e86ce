"""Mean cross-entropy of a language model's head without its logits: they are the largest tensor of a training step."""

import math

import torch

IGNORE = -100  # a target with this value does not count


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of x @ weight.T against targets, an eighth of the tokens at a time.

    Each part's gradient is computed while its logits are there, so that they need not be kept or computed again:
    of the (N, V) logits only an eighth ever exists, and it is passed over no more than need be.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size: int, dtype: torch.dtype, needs_grad: bool):
        valid = targets != IGNORE
        share = (valid / valid.sum().clamp(min=1))[:, None]  # of each token in the mean
        w = weight.to(dtype)
        loss = torch.zeros((), device=x.device)
        grads_x = []
        grad_w = torch.zeros_like(weight) if needs_grad else None  # summed in float32
        part = max(256, math.ceil(len(x) / 8))
        rows = torch.arange(part, device=x.device)
        buffer = torch.empty(
            part, len(w), dtype=dtype, device=x.device
        )  # new memory is dear on CPUs
        for xs, ts, vs, ss in zip(
            x.to(dtype).split(part), targets.split(part), valid.split(part), share.split(part)
        ):
            logits = torch.mm(xs, w.t(), out=buffer[: len(xs)]).float()
            logits[:, vocab_size:] = -torch.inf  # padding rows take no probability
            ts = ts.where(vs, 0)[:, None]
            target_logits = logits.gather(1, ts)
            highest = logits.amax(-1, keepdim=True)
            probs = torch.softmax(logits, -1, out=logits)
            lse = highest - probs.amax(-1, keepdim=True).log()
            loss += ((lse - target_logits) * ss).sum()
            if needs_grad:
                probs[rows[: len(ts)], ts[:, 0]] -= (
                    1  # not scatter_add_: it has no deterministic CUDA kernel
                )
                grad = probs.to(dtype)
                grads_x.append((grad @ w) * ss)
                shared_x = (xs * ss).to(dtype)
                if dtype == weight.dtype:
                    grad_w.addmm_(grad.t(), shared_x)
                else:
                    grad_w.add_(grad.t() @ shared_x)
        if needs_grad:
            ctx.save_for_backward(torch.cat(grads_x).to(x.dtype), grad_w)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_w = ctx.saved_tensors
        return grad_x.mul_(grad_loss), grad_w.mul_(grad_loss), None, None, None, None


def linear_cross_entropy(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """Mean loss in nats (scalar, float32) of hidden states x (N, C) against targets (N,) int64 under the logits
    x @ weight.T, of which only the first vocab_size columns count. Matrix products run in autocast's dtype."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    with torch.autocast(device, enabled=False):
        return LinearCrossEntropy.apply(x, weight, targets, vocab_size, dtype, needs_grad)
