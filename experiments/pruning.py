"""Attention heads: how similar they are, how much they matter, and how to remove them.

    keep = [[0, 2, 3], [1], ...]                     # the heads of each layer that stay
    smaller = prune_heads(model, keep)               # a GPT with narrower projections
    with masked_heads(model, head_masks(model, keep)):
        logits = model(idx)                          # what `smaller` computes, at the old cost

A head is (layer, head), both counted from 0. Where heads have one number, it counts them layer by
layer. An order lists heads in the sequence in which to remove them, without the last of each layer.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch.utils.hooks import RemovableHandle

from common.console import Progress
from common.runtime import Runtime
from model import GPT, GPTConfig

QUERIES = 128  # queries whose attention is in memory at the same time
Head = tuple[int, int]


# ---------------------------------------------------------------------------------------------
# Removing heads


def prune_heads(model: GPT, keep: list[list[int]]) -> GPT:
    """A copy of the model with only the heads in `keep`, one list of head numbers per layer.

    Queries, keys and values of all heads are the rows of one matrix, c_attn. Each head is a block
    of head_dim rows in each of the three parts, and the same block of columns in c_proj. Here for
    3 heads, keeping 0 and 2:

        c_attn (3 * 3 * head_dim, n_embd)      c_proj (n_embd, 3 * head_dim)
        q  head 0   keep                       head 0   head 1   head 2
           head 1                               keep              keep
           head 2   keep
        k  head 0   keep
           ...
        v  ...

    Raises ValueError if a layer would have no heads left.
    """
    check_keep(model.config, keep)

    # Select the rows and columns of the heads that stay.
    head_dim = model.config.head_dim
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for layer, heads in enumerate(keep):
        heads = torch.tensor(sorted(heads), device=model.wte.weight.device)
        offsets = torch.arange(head_dim, device=heads.device)
        kept = (heads[:, None] * head_dim + offsets).flatten()  # (len(heads) * head_dim,)
        attn = f"h.{layer}.attn."
        for name in ("c_attn.weight", "c_attn.bias"):
            # Select the same rows in the three parts, and join these again.
            q_k_v = state[attn + name].unflatten(0, (3, -1))  # (3, n_head * head_dim, ...)
            state[attn + name] = q_k_v[:, kept].flatten(0, 1)
        state[attn + "c_proj.weight"] = state[attn + "c_proj.weight"][:, kept]

    # On the meta device, no time goes into random weights that are replaced at once.
    with torch.device("meta"):
        pruned = GPT(replace(model.config, heads_kept=tuple(map(len, keep))))
    pruned.load_state_dict(state, assign=True)
    return pruned.train(model.training)


def check_keep(config: GPTConfig, keep: list[list[int]]):
    """Raise ValueError unless `keep` lists heads of every layer."""
    # Each list must be nonempty, without duplicates, and name heads that exist.
    valid = len(keep) == config.n_layer
    for heads, count in zip(keep, config.heads):
        valid = valid and 0 < len(set(heads)) == len(heads) and set(heads) <= set(range(count))
    if not valid:
        raise ValueError(
            f"keep must list one or more of the heads of each of {config.n_layer} layers: {keep}"
        )


def remaining(config: GPTConfig, removed: list[Head]) -> list[list[int]]:
    """The heads of each layer that stay."""
    # A layer that loses no heads is in `keep` as well.
    keep = [[] for _ in range(config.n_layer)]
    for layer, head in all_heads(config):
        if (layer, head) not in removed:
            keep[layer].append(head)
    return keep


def all_heads(config: GPTConfig) -> list[Head]:
    """All heads, layer by layer. The place in this list is the number of a head."""
    return [(layer, head) for layer, count in enumerate(config.heads) for head in range(count)]


# ---------------------------------------------------------------------------------------------
# Masking heads


def head_masks(model: GPT, keep: list[list[int]]) -> list[torch.Tensor]:
    """A mask (1, n_head) for each layer: 1 for the heads that stay, 0 for the others."""
    check_keep(model.config, keep)
    masks = []
    for heads, count in zip(keep, model.config.heads):
        mask = torch.zeros(1, count, device=model.wte.weight.device)
        mask[:, heads] = 1
        masks.append(mask)
    return masks


@contextmanager
def masked_heads(model: GPT, masks: list[torch.Tensor]) -> Iterator[None]:
    """Multiply each head's output by its mask. A layer's mask is (1, n_head) or (B, n_head).

    Gradients flow into the masks.
    """

    def multiply_by(mask: torch.Tensor):
        def hook(_, inputs: tuple[torch.Tensor]):
            heads = inputs[0].unflatten(-1, (mask.size(1), -1))  # (B, T, n_head, head_dim)
            return ((heads * mask[:, None, :, None]).flatten(-2),)  # (B, T, n_head * head_dim)

        return hook

    # The input of c_proj is the concatenated output of the heads.
    with removed_on_exit(
        block.attn.c_proj.register_forward_pre_hook(multiply_by(mask))
        for block, mask in zip(model.h, masks)
    ):
        yield


@contextmanager
def removed_on_exit(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Keep the hooks of these handles for the duration of a with statement."""
    registered = list(handles)  # a generator registers the hooks only when it is consumed
    try:
        yield
    finally:
        for handle in registered:
            handle.remove()


# ---------------------------------------------------------------------------------------------
# Similarity and importance


@torch.no_grad()
def attention_similarity(
    model: GPT, texts: torch.Tensor, rt: Runtime, shown: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens the heads attend to, on texts (N, T) of token ids.

    Returns
        similarity  (heads, heads): for each pair of heads the cosine between their attention
                    distributions, averaged over the queries
        patterns    (heads, shown, shown): mean attention within the first `shown` tokens

    Query 0 attends only to itself, whatever the head: its cosine is always 1, and is left out.

    One matrix product gives the sum of the cosines for all pairs. A row of `unit` has, for each
    query, a head's attention to the keys as a vector of length 1. For T = 4:

                   query 1        query 2        query 3
        head 0   [.6 .8  0  0]  [ 0 .6 .8  0]  [ 1  0  0  0]
        head 1   [.8 .6  0  0]  [ 0 .6 .8  0]  [ 0  0  0  1]
        cosine       .96      +      1       +      0         = (unit @ unit.T)[0, 1]
    """
    num_heads = sum(model.config.heads)
    T = texts.size(1)
    shown = min(shown, T)
    cosine_sums = torch.zeros(num_heads, num_heads, dtype=torch.float64)
    patterns = torch.zeros(num_heads, shown, shown)
    for idx in Progress(texts, desc="attention patterns", unit="text", leave=False):
        queries_keys = read_queries_keys(model, idx[None].to(rt.device))
        # The attention of all heads between all tokens would not fit in memory: take some queries.
        for start in range(0, T, QUERIES):
            rows = torch.arange(start, min(start + QUERIES, T), device=rt.device)
            attention = torch.cat([attend(q, k, rows) for q, k in queries_keys])  # (heads, rows, T)
            # Add up the corner of the first tokens, which may span several of these blocks.
            if start < shown:
                patterns[:, start : rows[-1] + 1] += attention[:, : shown - start, :shown].cpu()
            # Scaled to length 1, the product of two rows is their cosine.
            unit = attention / attention.norm(dim=-1, keepdim=True)
            unit = unit[:, rows > 0].flatten(1)  # (heads, rows * T)
            # In float64, because it is a long sum
            cosine_sums += (unit @ unit.t()).double().cpu()
    similarity = cosine_sums / (len(texts) * (T - 1))
    return similarity.numpy(), (patterns / len(texts)).numpy()


def read_queries_keys(model: GPT, idx: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Queries and keys of each layer, float32 (n_head, T, head_dim), for one text idx (1, T)."""
    queries_keys = []

    # The fused attention kernel does not return its weights, so they are recomputed from these.
    def keep(_, __, output: torch.Tensor):
        qkv = output[0].float().unflatten(-1, (3, -1, model.config.head_dim))
        q, k, _ = qkv.permute(1, 2, 0, 3)  # each (n_head, T, head_dim)
        queries_keys.append((q, k))

    with removed_on_exit(block.attn.c_attn.register_forward_hook(keep) for block in model.h):
        model.hidden(idx)
    return queries_keys


def attend(q: torch.Tensor, k: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Attention distributions (n_head, rows, T) of the queries at positions `rows`."""
    scores = q[:, rows] @ k.transpose(1, 2) / math.sqrt(q.size(-1))  # (n_head, rows, T)
    is_later = torch.arange(k.size(1), device=k.device) > rows[:, None]  # (rows, T)
    return scores.masked_fill(is_later, -torch.inf).softmax(-1)


def head_importance(
    model: GPT, x: torch.Tensor, y: torch.Tensor, B: int, rt: Runtime
) -> np.ndarray:
    """The importance (heads,) of each head, from Michel et al. 2019.

    ("Are Sixteen Heads Really Better than One?") The head's output is multiplied by a mask of 1.
    Importance is the absolute gradient of a text's loss in this mask, averaged over the texts x
    with targets y (N, T), and scaled so that the scores of a layer have norm 1.
    """
    totals = [torch.zeros(count) for count in model.config.heads]
    batches = list(zip(x.split(B), y.split(B)))
    for xs, ys in Progress(batches, desc="importance of heads", unit="batch", leave=False):
        # One mask per text, because the absolute value is taken text by text.
        masks = [
            torch.ones(len(xs), count, device=rt.device, requires_grad=True)
            for count in model.config.heads
        ]
        with masked_heads(model, masks), rt.autocast():
            mean_loss = model(xs.to(rt.device), ys.to(rt.device))
            loss = mean_loss * len(xs)  # the sum of the texts' losses: each has its own gradient
        # One gradient (B, n_head) per layer
        for total, gradient in zip(totals, torch.autograd.grad(loss, masks)):
            total += gradient.abs().sum(0).float().cpu()
    # Clamped, because a layer without any effect has only zeros
    return torch.cat([total / total.norm().clamp(min=1e-30) for total in totals]).numpy()


# ---------------------------------------------------------------------------------------------
# Orders of removal


def order_by_importance(config: GPTConfig, importance: np.ndarray) -> list[Head]:
    """The least important first; importance (heads,)."""
    heads = all_heads(config)
    return leave_one([heads[i] for i in np.argsort(importance, kind="stable")])


def order_at_random(config: GPTConfig, seed: int) -> list[Head]:
    """A random order, the same for the same seed."""
    heads = all_heads(config)
    shuffled = np.random.default_rng(seed).permutation(len(heads))
    return leave_one([heads[i] for i in shuffled])


def leave_one(order: list[Head]) -> list[Head]:
    """The order without the last head of each layer."""
    # Later entries of a layer overwrite earlier ones.
    last = {layer: (layer, head) for layer, head in order}
    return [head for head in order if head not in last.values()]


def order_by_redundancy(config: GPTConfig, similarity: np.ndarray) -> list[Head]:
    """Repeatedly take the most similar pair within a layer, and remove one of its two heads.

    It is the one that is on average more similar to the layer's other remaining heads.
    similarity (heads, heads).
    """
    heads = all_heads(config)
    # Going through the sorted pairs once is enough: without a removed head, the most similar pair
    # that is left is the next one in the list. It ends with one head per layer, which has no pair.
    removed = {}  # head number -> True, in the order of removal
    for i, j in similar_pairs(config, similarity):
        if i in removed or j in removed:
            continue
        layer = heads[i][0]
        rest = [n for n in range(len(heads)) if heads[n][0] == layer and n not in removed]
        # Both means contain the pair's own cosine and a 1, so only the others decide. In a tie,
        # max takes its first argument: the head with the higher number.
        removed[max(j, i, key=lambda n: similarity[n, rest].mean())] = True
    return [heads[n] for n in removed]


def similar_pairs(config: GPTConfig, similarity: np.ndarray) -> list[tuple[int, int]]:
    """The pairs of heads (i, j), i < j, of the same layer, the most similar first."""
    heads = all_heads(config)
    pairs = []
    for i in range(len(heads)):
        for j in range(i + 1, len(heads)):
            if heads[i][0] == heads[j][0]:
                pairs.append((i, j))
    return sorted(pairs, key=lambda pair: -similarity[pair])
