"""Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks").

The update of a matrix is its momentum, orthogonalized: all its singular values become about 1. So
directions with small gradients are learned as fast as those with large ones.

PyTorch has a Muon, too. This one orthogonalizes matrices of the same shape together, and in float32
where bf16 is slow, so a step takes less time. And it takes the projection of attention as three
matrices (queries, keys, values), so a model learns from fewer tokens.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import TypeAlias

import torch

# Coefficients (a, b, c) of a polynomial a x + b x^3 + c x^5 for each round
Rounds: TypeAlias = tuple[tuple[float, float, float], ...]
# Each polynomial is the best one for singular values that have passed the rounds before it (Amsel
# et al. 2025, "The Polar Express"). Together they bring singular values between 0.001 and 1 to
# between 0.4 and 1.6. A fifth round brings them nearer to 1, but does not lower the loss
# (experiments/README.md).
POLAR_EXPRESS: Rounds = (
    (7.9966, -21.1868, 14.3816),
    (4.0429, -2.8089, 0.5000),
    (3.8917, -2.7725, 0.5061),
    (3.2858, -2.3681, 0.4645),
)
# Matrices are orthogonalized in batches of at most this many elements, which limits the memory.
BATCH_ELEMENTS = 2**23


def orthogonalize(matrices: torch.Tensor, rounds: Rounds = POLAR_EXPRESS) -> torch.Tensor:
    """U V^T for each matrix U S V^T, approximately; (..., rows, columns), float32 or bfloat16.

    A polynomial of a matrix changes only its singular values (Newton-Schulz iteration). `rows`
    should not exceed `columns`, because each round computes products of size (rows, rows).
    """
    # The Frobenius norm is at least the largest singular value, which must not be above 1.
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for a, b, c in rounds:
        gram = x @ x.mT  # (..., rows, rows)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay.

    Updates have a root mean square of about 0.2, like AdamW's, whatever the shape. So both can
    share a learning rate and weight decay (Liu et al. 2025, "Muon is Scalable for LLM Training").

    params: groups of matrices. In a group with `parts`=3, each is three matrices, one below the
        other, that are orthogonalized separately.
    dtype: dtype of the orthogonalization, float32 or bfloat16.
    """

    def __init__(
        self,
        params: list[dict],
        lr: float,
        weight_decay: float,
        dtype: torch.dtype,
        momentum: float = 0.95,
        rounds: Rounds = POLAR_EXPRESS,
    ):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, parts=1))
        self.dtype = dtype
        self.momentum = momentum
        self.rounds = rounds

    def orthogonalize(self, matrices: torch.Tensor) -> torch.Tensor:
        """Orthogonalize a batch (n, rows, columns). The variants in experiments/ override this."""
        return orthogonalize(matrices, self.rounds)

    @torch.no_grad()
    def step(self):
        for batch in self.batches():
            self.update(batch)

    def batches(self) -> Iterator[list[tuple[torch.nn.Parameter, dict]]]:
        """The parameters that have a gradient, each with its group, in batches of limited size.

        The matrices of a batch have the same shape, some of them after a transposition.
        """
        by_shape = defaultdict(list)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _, *shape = wide_matrices(parameter, group["parts"]).shape
                    by_shape[tuple(shape)].append((parameter, group))
        for pairs in by_shape.values():
            size = max(1, BATCH_ELEMENTS // max(parameter.numel() for parameter, _ in pairs))
            for first in range(0, len(pairs), size):
                yield pairs[first : first + size]

    def update(self, batch: list[tuple[torch.nn.Parameter, dict]]):
        """Update the parameters of a batch, each given with its group."""
        # The direction of each parameter, before it is orthogonalized
        directions = []
        for parameter, group in batch:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(parameter.grad, 1 - self.momentum)
            # Nesterov: where the momentum will be after another such gradient
            direction = parameter.grad.lerp(state["momentum"], self.momentum)
            directions.append(wide_matrices(direction, group["parts"]))

        # One product for all of them: small matrices on their own would not fill the processor.
        update = self.orthogonalize(torch.cat(directions).to(self.dtype))  # (n, rows, columns)

        # The elements of an orthogonal matrix have a root mean square of 1 / sqrt(longer side).
        scale = 0.2 * math.sqrt(update.size(-1))
        updates = update.split([group["parts"] for _, group in batch])
        for (parameter, group), matrices in zip(batch, updates):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            wide_matrices(parameter, group["parts"]).add_(matrices, alpha=-group["lr"] * scale)


def wide_matrices(parameter: torch.Tensor, parts: int) -> torch.Tensor:
    """The matrices of a parameter, (parts, rows, columns), with at most as many rows as columns.

    They are transposed if they have more rows. A view: what is added to it is added to the
    parameter.
    """
    matrices = parameter.view(parts, -1, parameter.size(1))
    return matrices.mT if matrices.size(1) > matrices.size(2) else matrices
