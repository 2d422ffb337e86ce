"""The scoring engine: log-likelihoods of continuations given their contexts, and the mean loss over a token stream.

    requests = [Request(context, [ending, ending, ...]), ...]    # lists of token ids
    scores = score(model, requests, rt)                          # scores[request][ending].logprob

What the continuations of a request share is computed once: a request is one row of tokens, its context, then what all
its continuations begin with, then the rest of each, which sees what came before it in its own continuation and not the
others. The last token of a continuation is only predicted, never read. Rows of similar length are computed together,
and logits only where something is predicted.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from common.console import Progress, UserError
from common.runtime import Runtime
from model import GPT, IGNORE

MAX_TOKENS = {
    "cpu": 1024,
    "mps": 8192,
    "cuda": 32768,
}  # of the rows that are computed together, padding included
MAX_LOGITS = {"cpu": 512, "mps": 1024, "cuda": 4096}  # positions whose logits exist at a time


@dataclass
class Request:
    context: list[int]  # one token at least
    continuations: list[list[int]]  # one token at least each


class Score(NamedTuple):
    logprob: float  # of the whole continuation, a sum in nats
    greedy: bool  # every token is the likeliest one
    greedy_unbarred: bool  # the same where the barred tokens can't come first


class Row:
    """A request as the model reads it: one row of tokens, each at its position, in a branch of its own or in the
    shared part (branch 0); and what is predicted: which token, at which place of the row, for which continuation."""

    def __init__(self, context: list[int], continuations: list[list[int]], scores: list[int]):
        shortest = min(map(len, continuations))
        shared = next(
            (n for n in range(shortest) if len({c[n] for c in continuations}) > 1), shortest
        )
        stem = context + continuations[0][:shared]
        tokens, positions, branches = stem, list(range(len(stem))), [0] * len(stem)
        self.targets, self.places, self.scores, self.first = [], [], [], []
        for number, continuation in enumerate(continuations):
            rest = continuation[shared:]
            own = range(len(tokens), len(tokens) + len(rest) - 1)
            tokens = tokens + rest[:-1]
            positions += range(len(stem), len(stem) + len(own))
            branches += [number + 1] * len(own)
            self.targets += continuation
            self.places += [*range(len(context) - 1, len(stem) - (not rest)), *own]
            self.scores += [scores[number]] * len(continuation)
            self.first += [True] + [False] * (len(continuation) - 1)
        if shared == max(map(len, continuations)):  # nothing comes after the shared part
            tokens, positions, branches = tokens[:-1], positions[:-1], branches[:-1]
        self.tokens, self.positions, self.branches = tokens, positions, branches

    def __len__(self):
        return len(self.tokens)


@torch.no_grad()
def score(
    model: GPT, requests: list[Request], rt: Runtime, barred: list[int] = (), desc: str = "scoring"
) -> list[list[Score]]:
    """A Score for each continuation of each request, the same on all ranks whatever their number.

    Where context and continuation pass block_size, the context is cut from the left. Raises ValueError for an empty
    context or continuation, or a continuation longer than block_size.
    """
    rows, count = [], 0
    for request in requests:
        numbers = range(count, count := count + len(request.continuations))
        rows += pack(request, list(numbers), model.config.block_size)
    rows.sort(key=len, reverse=True)  # the largest first: if memory runs out, it does so at once
    batches = group(rows, MAX_TOKENS[rt.device.type])

    results = np.zeros(
        (count, 3)
    )  # sum of log-probabilities, tokens predicted rightly, and so without the barred ones
    was_training = model.training
    model.eval()
    barred = torch.tensor(barred, dtype=torch.int64, device=rt.device)
    with Progress(total=len(rows), desc=desc, unit="example", leave=False) as bar, rt.autocast():
        for batch in batches[rt.rank :: rt.world_size]:
            place = np.concatenate([row.scores for row in batch])
            np.add.at(results, place, score_batch(model, batch, rt, barred))
            bar.update(min(len(batch) * rt.world_size, bar.total - bar.n))
    model.train(was_training)
    results = rt.sum(results).cpu().numpy()
    scores, lengths = [], [len(c) for request in requests for c in request.continuations]
    scores = iter(Score(s, g == n, u == n) for (s, g, u), n in zip(results.tolist(), lengths))
    return [[next(scores) for _ in request.continuations] for request in requests]


def pack(request: Request, numbers: list[int], block_size: int) -> list[Row]:
    """The rows of a request: one, or one a continuation where the context must be cut to fit them."""
    context, continuations = request.context, request.continuations
    if not context or not all(continuations):
        raise UserError("a context and each of its continuations must hold at least one token")
    longest = max(map(len, continuations))
    if longest > block_size:
        raise UserError(
            f"a continuation of {longest} tokens is longer than the model's context of {block_size}"
        )
    if len(context) + longest - 1 <= block_size:
        return [Row(context, continuations, numbers)]
    return [
        Row(context[len(c) - block_size - 1 :], [c], [n]) for c, n in zip(continuations, numbers)
    ]


def group(rows: list[Row], max_tokens: int) -> list[list[Row]]:
    """Consecutive rows, as many as fit the budget when padded to the longest; they come longest first."""
    batches, start = [], 0
    for n in range(1, len(rows) + 1):
        if n == len(rows) or (n + 1 - start) * len(rows[start]) > max_tokens:
            batches.append(rows[start:n])
            start = n
    return batches


def score_batch(model: GPT, batch: list[Row], rt: Runtime, barred: torch.Tensor) -> np.ndarray:
    """For each predicted token of the rows: log-probability, and whether it is the likeliest, with and without the
    barred tokens where it is the first of its continuation. float64 (predicted, 3)."""
    T = len(batch[0])

    def padded(name: str, fill: int) -> torch.Tensor:
        values = [getattr(row, name) for row in batch]
        return torch.tensor([v + [fill] * (T - len(v)) for v in values]).to(
            rt.device, non_blocking=True
        )

    idx, positions, branches = padded("tokens", 0), padded("positions", 0), padded("branches", -1)
    mask = None  # without branches it is the causal one, and padding comes last
    if (branches > 0).any():
        seen = (branches[:, None] == branches[:, :, None]) | (branches[:, None] == 0)
        mask = (seen & (positions[:, None] <= positions[:, :, None]))[:, None]
    places = np.concatenate([np.array(row.places) + n * T for n, row in enumerate(batch)])
    places, which = np.unique(
        places, return_inverse=True
    )  # several targets may be predicted at one place
    x = model.hidden(idx, positions, mask).flatten(0, 1)[torch.from_numpy(places).to(rt.device)]

    order = np.argsort(which, kind="stable")
    which, back = which[order], np.argsort(order)
    targets = torch.from_numpy(np.concatenate([row.targets for row in batch])[order]).to(rt.device)
    first = torch.from_numpy(np.concatenate([row.first for row in batch])[order]).to(rt.device)
    results = []
    step = MAX_LOGITS[rt.device.type]
    for start in range(0, len(x), step):
        logits = model.head(x[start : start + step]).float()
        low, high = np.searchsorted(which, [start, start + step])
        here, target = torch.from_numpy(which[low:high] - start).to(rt.device), targets[low:high]
        top, likeliest = logits.max(-1, keepdim=True)
        unbarred = likeliest = likeliest[here, 0]
        if len(barred):
            others = logits[here].index_fill_(1, barred, -torch.inf).argmax(-1)
            unbarred = torch.where(first[low:high], others, likeliest)
        logprob = logits[here, target] - top[here, 0] - logits.sub_(top).exp_().sum(-1).log()[here]
        results.append(torch.stack([logprob, likeliest == target, unbarred == target], 1))
    return torch.cat(results).cpu().double().numpy()[back]


@torch.no_grad()
def stream_loss(model: GPT, tokens: np.ndarray, B: int, T: int, rt: Runtime) -> float:
    """Mean loss in nats per token of a 1-D stream, read in consecutive windows of T, split among the ranks.

    Every token but the first is predicted once, each from the earlier ones of its window. All forward passes have
    the shape (B, T), so that a compiled model is compiled once; what is missing in the last one does not count.
    """
    if len(tokens) < 2:
        raise UserError("a stream of fewer than two tokens has no loss")
    predicted = len(tokens) - 1
    windows = -(-predicted // T)
    total = 0.0
    was_training = model.training
    model.eval()
    for first in range(rt.rank * B, windows, rt.world_size * B):
        chunk = torch.from_numpy(tokens[first * T : (first + B) * T + 1].astype(np.int64))
        x = torch.zeros(B * T, dtype=torch.int64)
        y = torch.full((B * T,), IGNORE)
        count = len(chunk) - 1
        x[:count], y[:count] = chunk[:-1], chunk[1:]
        with rt.autocast():
            loss = model(x.view(B, T).to(rt.device), y.view(B, T).to(rt.device))
        total += loss.double() * count if rt.device.type != "mps" else loss * count
    model.train(was_training)
    return float(rt.sum([float(total)])) / predicted
