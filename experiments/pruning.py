"""Attention heads: how alike they are, how much they matter, and how to remove them.

    keep = [[0, 2, 3], [1], ...]                     # the heads of each layer that stay
    smaller = prune_heads(model, keep)               # narrower projections, otherwise a model like any other
    with masked_heads(model, head_masks(model, keep)):
        logits = model(idx)                          # those of the smaller model, at the old price

A head is (layer, head), both from 0; heads in one list are numbered through the layers. An order lists heads in the
sequence in which they are to be removed, and leaves one in each layer.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from common.console import Progress
from common.runtime import Runtime
from model import GPT, GPTConfig

ROWS = 128  # queries whose attention exists at a time
Head = tuple[int, int]


def prune_heads(model: GPT, keep: list[list[int]]) -> GPT:
    """A model without the heads of each layer that are not in `keep`; it shares no memory with the whole one.

    Raises ValueError if a layer would have none.
    """
    check_keep(model.config, keep)
    config, state = (
        model.config,
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
    )
    for layer, heads in enumerate(keep):
        heads = torch.tensor(sorted(heads), device=model.wte.weight.device)
        width = (
            heads[:, None] * config.head_dim + torch.arange(config.head_dim, device=heads.device)
        ).flatten()
        attn = f"h.{layer}.attn."
        for name in ("c_attn.weight", "c_attn.bias"):
            state[attn + name] = state[attn + name].unflatten(0, (3, -1))[:, width].flatten(0, 1)
        state[attn + "c_proj.weight"] = state[attn + "c_proj.weight"][:, width]
    with torch.device("meta"):  # no weights are drawn that would be overwritten
        pruned = GPT(replace(config, heads_kept=tuple(map(len, keep))))
    pruned.load_state_dict(state, assign=True)
    return pruned.train(model.training)


def check_keep(config: GPTConfig, keep: list[list[int]]):
    fits = len(keep) == config.n_layer and all(
        heads and len(set(heads)) == len(heads) and set(heads) <= set(range(count))
        for heads, count in zip(keep, config.heads)
    )
    if not fits:
        raise ValueError(
            f"each of {config.n_layer} layers keeps one of its heads at least, and only its own: {keep}"
        )


def head_masks(model: GPT, keep: list[list[int]]) -> list[torch.Tensor]:
    """For each layer a mask (1, n_head): 1 for the heads that stay, 0 for the others."""
    check_keep(model.config, keep)
    masks = [torch.zeros(1, count, device=model.wte.weight.device) for count in model.config.heads]
    for mask, heads in zip(masks, keep):
        mask[:, heads] = 1
    return masks


@contextmanager
def masked_heads(model: GPT, masks: list[torch.Tensor]) -> Iterator[None]:
    """Multiply each head's output by its place in the layer's mask (1 or B, n_head), which may require gradients."""

    def hook(mask: torch.Tensor):
        def multiply(_, inputs: tuple[torch.Tensor]):
            heads = inputs[0].unflatten(-1, (mask.size(1), -1))  # (B, T, n_head, head_dim)
            return ((heads * mask[:, None, :, None]).flatten(-2),)

        return multiply

    handles = [
        block.attn.c_proj.register_forward_pre_hook(hook(mask))
        for block, mask in zip(model.h, masks)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def all_heads(config: GPTConfig) -> list[Head]:
    return [(layer, head) for layer, count in enumerate(config.heads) for head in range(count)]


def remaining(config: GPTConfig, removed: list[Head]) -> list[list[int]]:
    """The heads of each layer that stay."""
    return [
        [head for head in range(n) if (layer, head) not in removed]
        for layer, n in enumerate(config.heads)
    ]


@torch.no_grad()
def attention_similarity(
    model: GPT, windows: torch.Tensor, rt: Runtime, shown: int
) -> tuple[np.ndarray, np.ndarray]:
    """How alike the heads look at windows (N, T) of tokens, and what at.

    Returns the cosine between the attention distributions of two heads, (heads, heads), a mean over all tokens but the
    first of each window; and the mean attention within the first `shown` tokens, (heads, shown, shown).
    """
    heads, T = sum(model.config.heads), windows.size(1)
    shown = min(shown, T)
    gram = torch.zeros(heads, heads, dtype=torch.float64)
    patterns = torch.zeros(heads, shown, shown)
    for idx in Progress(windows, desc="attention patterns", unit="text", leave=False):
        queries_keys = read_queries_keys(model, idx[None].to(rt.device))
        for start in range(0, T, ROWS):
            rows = torch.arange(start, min(start + ROWS, T), device=rt.device)
            attention = torch.cat([attend(q, k, rows) for q, k in queries_keys])  # (heads, rows, T)
            if start < shown:
                patterns[:, start : rows[-1] + 1] += attention[:, : shown - start, :shown].cpu()
            unit = attention / attention.norm(dim=-1, keepdim=True)
            unit = unit[:, rows > 0].flatten(1)
            gram += (unit @ unit.t()).double().cpu()
    return (gram / (len(windows) * (T - 1))).numpy(), (patterns / len(windows)).numpy()


def read_queries_keys(model: GPT, idx: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each layer's queries and keys (n_head, T, head_dim) of one text idx (1, T), in float32."""
    found = []

    def keep(_, __, output: torch.Tensor):
        qkv = (
            output[0].float().unflatten(-1, (3, -1, model.config.head_dim))
        )  # (T, 3, n_head, head_dim)
        found.append((qkv[:, 0].transpose(0, 1), qkv[:, 1].transpose(0, 1)))

    handles = [block.attn.c_attn.register_forward_hook(keep) for block in model.h]
    try:
        model.hidden(idx)
    finally:
        for handle in handles:
            handle.remove()
    return found


def attend(q: torch.Tensor, k: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Attention distributions (n_head, rows, T) of the queries at `rows`."""
    logits = q[:, rows] @ k.transpose(1, 2) / math.sqrt(q.size(-1))
    later = torch.arange(k.size(1), device=k.device) > rows[:, None]
    return logits.masked_fill(later, -torch.inf).softmax(-1)


def head_importance(
    model: GPT, x: torch.Tensor, y: torch.Tensor, B: int, rt: Runtime
) -> np.ndarray:
    """Michel et al. 2019 ("Are Sixteen Heads Really Better than One?"): for each head the mean, over texts x with
    targets y (N, T), of the loss's absolute gradient in a mask on its output; each layer's scores have norm 1."""
    total = [torch.zeros(count) for count in model.config.heads]
    parts = list(zip(x.split(B), y.split(B)))
    for xs, ys in Progress(parts, desc="importance of heads", unit="batch", leave=False):
        masks = [
            torch.ones(len(xs), count, device=rt.device, requires_grad=True)
            for count in model.config.heads
        ]
        with masked_heads(model, masks), rt.autocast():
            loss = model(xs.to(rt.device), ys.to(rt.device)) * len(
                xs
            )  # the sum of the texts' own losses
        for scores, gradient in zip(total, torch.autograd.grad(loss, masks)):
            scores += gradient.abs().sum(0).float().cpu()
    return torch.cat([scores / scores.norm().clamp(min=1e-30) for scores in total]).numpy()


def order_by_importance(config: GPTConfig, importance: np.ndarray) -> list[Head]:
    """The least important first; importance (heads,)."""
    heads = all_heads(config)
    return leave_one(config, [heads[i] for i in np.argsort(importance, kind="stable")])


def order_at_random(config: GPTConfig, seed: int) -> list[Head]:
    heads = all_heads(config)
    return leave_one(
        config, [heads[i] for i in np.random.default_rng(seed).permutation(len(heads))]
    )


def leave_one(config: GPTConfig, order: list[Head]) -> list[Head]:
    """The order without the last head of each layer."""
    last = {layer: (layer, head) for layer, head in order}
    return [head for head in order if head != last[head[0]]]


def order_by_redundancy(config: GPTConfig, similarity: np.ndarray) -> list[Head]:
    """Of the two heads of a layer that are most alike, the one that is more like the others; again and again.
    similarity (heads, heads)."""
    heads, removed = all_heads(config), {}
    for i, j in similar_pairs(config, similarity):
        if i in removed or j in removed:
            continue
        others = [
            n for n, (layer, _) in enumerate(heads) if layer == heads[i][0] and n not in removed
        ]
        removed[max(j, i, key=lambda n: similarity[n, others].mean())] = True
    return [heads[n] for n in removed]


def similar_pairs(config: GPTConfig, similarity: np.ndarray) -> list[tuple[int, int]]:
    """The pairs of heads of the same layer, the most alike first."""
    heads = all_heads(config)
    pairs = [
        (i, j)
        for i in range(len(heads))
        for j in range(i + 1, len(heads))
        if heads[i][0] == heads[j][0]
    ]
    return sorted(pairs, key=lambda pair: -similarity[pair])
