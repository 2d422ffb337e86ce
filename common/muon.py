"""Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks").

The update of a matrix is its momentum, orthogonalized: all its singular values become about 1. So
directions with small gradients are learned as fast as those with large ones.

PyTorch has a Muon, too. This one orthogonalizes matrices of the same shape together, and in float32
where bf16 is slow, so a step takes less time. And it takes the projection of attention as three
matrices (queries, keys, values), so a model learns from fewer tokens.
"""

import math
from collections.abc import Iterator

import torch

# Coefficients (a, b, c) of the polynomial a x + b x^3 + c x^5, chosen by Jordan et al. to grow fast
# from zero. Five rounds of it bring singular values between 0.01 and 1 to between 0.7 and 1.2.
# They need not be exactly 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Matrices are orthogonalized in batches of at most this many elements, which limits the memory.
BATCH_ELEMENTS = 2**23


def orthogonalize(matrices: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """U V^T for each matrix U S V^T, approximately; (..., rows, columns), float32 or bfloat16.

    A polynomial of a matrix changes only its singular values (Newton-Schulz iteration).
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if is_tall else matrices  # x x^T is the smaller one of the two products
    # The Frobenius norm is at least the largest singular value, which must not be above 1.
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(rounds):
        gram = x @ x.mT  # (..., n, n), n = the shorter side
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay.

    Updates have a root mean square of about 0.2, like AdamW's, whatever the shape. So both can
    share a learning rate and weight decay (Liu et al. 2025, "Muon is Scalable for LLM Training").

    params: groups of matrices. In a group with `parts`=3, each is three matrices, one below the
        other, that are orthogonalized separately.
    dtype: of the orthogonalization, which takes so many rounds.
    """

    def __init__(
        self,
        params: list[dict],
        lr: float,
        weight_decay: float,
        dtype: torch.dtype,
        momentum: float = 0.95,
        rounds: int = 5,
    ):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, parts=1))
        self.dtype = dtype
        self.momentum = momentum
        self.rounds = rounds

    def orthogonalize(self, matrices: torch.Tensor) -> torch.Tensor:
        return orthogonalize(matrices, self.rounds)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameters in batches(group["params"]):
                self.update(parameters, group)

    def update(self, parameters: list[torch.nn.Parameter], group: dict):
        """Update parameters of the same shape."""
        rows, columns = parameters[0].shape
        rows //= group["parts"]

        # The direction of each parameter, before it is orthogonalized.
        directions = []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(parameter.grad, 1 - self.momentum)
            # Nesterov: where the momentum will be after another such gradient
            direction = parameter.grad.lerp(state["momentum"], self.momentum)
            directions.append(direction.view(-1, rows, columns))

        # One product for all of them: small matrices on their own would not fill the processor.
        # (parameters * parts, rows, columns)
        update = self.orthogonalize(torch.cat(directions).to(self.dtype))

        # The elements of an orthogonal matrix have a root mean square of 1 / sqrt(longer side).
        scale = 0.2 * math.sqrt(max(rows, columns))
        for parameter, direction in zip(parameters, update.split(group["parts"])):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(direction.reshape(parameter.shape), alpha=-group["lr"] * scale)


def batches(parameters: list[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """The parameters that have a gradient, in batches of the same shape and limited size."""
    by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_shape.setdefault(parameter.shape, []).append(parameter)
    for shape, same in by_shape.items():
        size = max(1, BATCH_ELEMENTS // shape.numel())
        for first in range(0, len(same), size):
            yield same[first : first + size]
