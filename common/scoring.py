"""The scoring engine: log-likelihoods of continuations given a context, and the loss of a stream.

    requests = [Request(context, [ending, ending, ...]), ...]    # lists of token ids
    scores = score(model, requests, rt)                          # scores[request][ending].logprob

A naive loop would run the model once per ending, on the context and the ending. Here each request
is packed into one row, and whatever its endings share is computed once. For the context `a b c` and
the endings `x y p q` and `x y r`, the row is:

    column       0    1    2    3    4    5
    token        a    b    c    x    y    p
    position     0    1    2    3    4    5
    branch       0    0    0    0    0    1
    predicts               x    y   p,r   q

`token`, `position` and `branch` are what the model reads. Branch 0 is the context and what all
endings begin with; branch n is the rest of ending n. A token sees branch 0 and its own branch, up
to its own position. The last token of an ending, here q and r, is predicted but never read.

    ending 1     x from column 2, y from 3, p from 4, q from 5
    ending 2     x from column 2, y from 3, r from 4

A third ending `x y s t` would add its s as column 6, at position 5 like p, in branch 3, and its t
would be predicted from there. Because s sees `a b c x y s` but not p, each prediction is the one
that the naive loop makes.

Two special cases follow. An ending that is only the shared part, `x y`, adds no columns. And if
there is nothing but the shared part (a single ending, or several equal ones), its last token is not
read either.

A request may ask for the scores of an ending's last tokens only. If the first two of ending 1 are
unscored, the row is the same, but ending 1 then has nothing but p from column 4 and q from 5. So
texts that begin alike, differ in the middle and are compared by their ends are one request, too.

Rows of similar length form a batch, and logits are computed only at columns that predict something.

A model that computes NaN or infinity has no scores and no loss: NotFinite is raised.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import numpy as np
import tiktoken
import torch

from common.checkpoint import not_finite_error
from common.console import Progress, UserError
from common.cpu import for_scoring
from common.runtime import Runtime
from model import GPT, IGNORE

# Tokens per batch, padding included, by type of device.
MAX_TOKENS = {"cpu": 1024, "mps": 8192, "cuda": 32768}
# Columns whose logits exist at the same time. One column has 50,257 logits under GPT-2's tokenizer.
MAX_LOGITS = {"cpu": 512, "mps": 1024, "cuda": 4096}

# choose(logits (n, vocab_size), is_first (n,) bool) -> token ids (n,): what the model is taken to
# predict, where that is not simply the most likely token. `is_first` marks the first token of a
# continuation. The logits are a copy and may be changed.
Choose = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Request:
    context: list[int]  # at least one token
    continuations: list[list[int]]  # at least one token each
    # for each continuation, how many of its first tokens are read but not scored; [] = none of them
    unscored: list[int] = field(default_factory=list)

    def parts(self) -> list[tuple[list[int], int]]:
        """Each continuation, and how many of its first tokens are not scored."""
        return list(zip(self.continuations, self.unscored or [0] * len(self.continuations)))


class Score(NamedTuple):
    logprob: float  # log-probability of the scored tokens of the continuation, in nats
    num_tokens: int  # tokens that it is the sum of: at most block_size
    greedy: bool  # whether each of its tokens is the most likely one
    chosen: bool  # whether each of its tokens is the one that `choose` returns


@dataclass
class Row:
    """A request as the model reads it, and what is predicted from it. See the drawing above."""

    # the tokens that are read, T of them
    tokens: list[int]
    positions: list[int]
    branches: list[int]
    # the tokens that are predicted, P of them, continuation by continuation
    targets: list[int]  # token id
    columns: list[int]  # where in the row its logits are
    score_index: list[int]  # number of its continuation, counted over all requests
    is_first: list[bool]  # whether it is the first token of its continuation

    def __len__(self):
        return len(self.tokens)


# ---------------------------------------------------------------------------------------------
# Requests to rows, rows to batches


def make_rows(request: Request, first_index: int, block_size: int) -> list[Row]:
    """The rows of a request, whose continuations are numbered from `first_index` on.

    This is one row, or one per continuation if the text must be cut from the left to fit into
    block_size: then each continuation keeps as much context as it can. A continuation that does not
    fit by itself keeps its last block_size tokens, and the token before them as context, as in
    lm-evaluation-harness.
    """
    context = request.context
    lengths = [len(continuation) for continuation in request.continuations]
    # The engine needs a token to predict from, and one to predict.
    if not context or not all(lengths):
        raise UserError("a context and each of its continuations must hold at least one token")
    # The last token of a continuation is predicted but not read, hence the 1.
    num_kept = block_size + 1
    # The usual case: the whole request fits into one row.
    if len(context) + max(lengths) <= num_kept:
        return [make_row(request, first_index)]

    # Too long: one row per continuation, so that each loses as little context as it has to. At
    # least one token stays in front of the scored ones; unscored tokens become context.
    rows = []
    for number, (continuation, unscored) in enumerate(request.parts()):
        kept = (context + continuation)[-num_kept:]
        start = len(kept) - min(len(continuation) - unscored, block_size)
        rows.append(make_row(Request(kept[:start], [kept[start:]]), first_index + number))
    return rows


def make_row(request: Request, first_index: int) -> Row:
    """Pack a context and its continuations into one row."""
    # What the continuations share follows the context in branch 0. In the drawing: x and y.
    context = request.context
    continuations = request.continuations
    shared = shared_length(continuations)
    stem = context + continuations[0][:shared]
    row = Row(
        tokens=list(stem),
        positions=list(range(len(stem))),
        branches=[0] * len(stem),
        targets=[],
        columns=[],
        score_index=[],
        is_first=[],
    )

    # Each continuation adds a branch of its own, and its predictions.
    for number, (continuation, unscored) in enumerate(request.parts()):
        # The rest of this continuation, less its last token, is appended as a branch.
        branch = continuation[shared:-1]
        branch_columns = range(len(row), len(row) + len(branch))
        row.tokens += branch
        row.positions += range(len(stem), len(stem) + len(branch))
        row.branches += [number + 1] * len(branch)

        # Each token is predicted from the one before it, the first from the end of the context.
        columns = [*range(len(context) - 1, len(stem)), *branch_columns]
        num_scored = len(continuation) - unscored
        row.targets += continuation[unscored:]
        row.columns += columns[unscored : len(continuation)]
        row.score_index += [first_index + number] * num_scored
        row.is_first += [True] + [False] * (num_scored - 1)

    # If nothing follows the shared part, nothing is predicted from its last token.
    if all(len(continuation) == shared for continuation in continuations):
        row.tokens.pop()
        row.positions.pop()
        row.branches.pop()
    return row


def shared_length(continuations: list[list[int]]) -> int:
    """How many tokens all continuations begin with."""
    length = 0
    for tokens in zip(*continuations):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length


def make_batches(rows: list[Row], max_tokens: int) -> list[list[Row]]:
    """Group rows, which come longest first: as many as fit into max_tokens, padded to the first."""
    # All rows of a batch are padded to its first, the longest, so one more row costs that length.
    batches = []
    batch = []
    for row in rows:
        if batch and (len(batch) + 1) * len(batch[0]) > max_tokens:
            batches.append(batch)
            batch = []
        batch.append(row)
    if batch:
        batches.append(batch)
    return batches


# ---------------------------------------------------------------------------------------------
# Scores


@torch.no_grad()
def score(
    model: GPT,
    requests: list[Request],
    rt: Runtime,
    choose: Choose | None = None,
    desc: str = "scoring",
) -> list[list[Score]]:
    """A Score for each continuation of each request. All ranks return the same, for any world size.

    If context and continuation are longer than block_size, they are cut from the left; see
    make_rows. Without `choose`, Score.chosen equals Score.greedy. Raises NotFinite if the model
    computes NaN or infinity, UserError for an empty context or continuation.
    """
    block_size = model.config.block_size
    # Pack the requests. Continuations are numbered over all requests, in order.
    rows = []
    lengths = []  # scored tokens of each continuation
    for request in requests:
        rows += make_rows(request, len(lengths), block_size)
        lengths += [len(continuation) - unscored for continuation, unscored in request.parts()]

    # Continuations that were cut have other scores than whole ones: say so.
    num_cut = sum(length > block_size for length in lengths)
    if num_cut:
        report_once(
            f"{desc}: {num_cut} of {len(lengths)} continuations are longer than the context of "
            f"{model.source}, and only their last {block_size} tokens count",
            rt,
        )

    # The largest batch comes first: if memory runs out, it does so at once.
    rows.sort(key=len, reverse=True)
    max_tokens = MAX_TOKENS[rt.device.type]
    batches = make_batches(rows, max_tokens)

    # Each rank adds up its share of the batches: per continuation, the log-probabilities of its
    # tokens, and how many of them are the most likely and the chosen one.
    sums = np.zeros((len(lengths), 3))
    was_training = model.training
    model.eval()
    replica = for_scoring(model, rt, max_tokens)
    with Progress(total=len(rows), desc=desc, unit="example", leave=False) as bar, rt.autocast():
        for batch in batches[rt.rank :: rt.world_size]:
            score_index = np.concatenate([row.score_index for row in batch])  # (P,)
            np.add.at(sums, score_index, score_batch(replica, batch, rt, choose))
            # Only rank 0 shows a bar. All ranks do a similar share, so its batch counts for all of
            # them.
            bar.update(min(len(batch) * rt.world_size, bar.total - bar.n))
    model.train(was_training)

    # Any NaN or infinity in a forward pass reaches the log-probabilities, on all ranks.
    totals = rt.sum(sums).cpu()
    if not totals.isfinite().all():
        raise not_finite_error(model)

    # `greedy` and `chosen` hold if they do for each scored token, which the sums have counted.
    flat = []
    for (logprob, greedy, chosen), length in zip(totals.tolist(), lengths):
        num_tokens = min(length, block_size)
        flat.append(Score(logprob, num_tokens, greedy == num_tokens, chosen == num_tokens))

    # Group the scores by request again.
    in_order = iter(flat)
    return [[next(in_order) for _ in request.continuations] for request in requests]


# The messages that this process has printed
reported: set[str] = set()


def report_once(message: str, rt: Runtime):
    """Print a message that training would otherwise repeat in every evaluation."""
    if message not in reported:
        reported.add(message)
        rt.print(message)


def score_batch(model: GPT, batch: list[Row], rt: Runtime, choose: Choose | None) -> np.ndarray:
    """For each of the P predicted tokens of the rows: its log-probability, whether it is the most
    likely token, and whether it is the chosen one. float64 (P, 3), in the order of the rows."""
    # The R rows, padded on the right to the longest, T. Padding is a branch that no token sees.
    T = max(map(len, batch))
    idx = pad([row.tokens for row in batch], T, 0, rt)  # (R, T)
    positions = pad([row.positions for row in batch], T, 0, rt)  # (R, T)
    branches = pad([row.branches for row in batch], T, -1, rt)  # (R, T)
    x = model.hidden(idx, positions, branch_mask(branches, positions))  # (R, T, n_embd)

    # Keep only the C columns that predict something. If one predicts several tokens, as column 4 in
    # the drawing does, its logits are still computed once.
    flat_columns = np.concatenate([np.array(row.columns) + n * T for n, row in enumerate(batch)])
    columns, column_of = np.unique(flat_columns, return_inverse=True)  # (C,) and (P,)
    x = x.flatten(0, 1)[torch.from_numpy(columns).to(rt.device)]  # (C, n_embd)

    # Sort the predictions by column, so that those of a chunk of columns are a slice.
    order = np.argsort(column_of, kind="stable")
    column_of = column_of[order]
    target_ids = np.concatenate([row.targets for row in batch])[order]
    targets = torch.from_numpy(target_ids).to(rt.device)  # (P,)
    first_flags = np.concatenate([row.is_first for row in batch])[order]
    is_first = torch.from_numpy(first_flags).to(rt.device)  # (P,)

    # A few columns at a time: the logits of a whole batch can take gigabytes.
    parts = []
    step = MAX_LOGITS[rt.device.type]
    for start in range(0, len(x), step):
        logits = model.head(x[start : start + step]).float()  # (step, vocab_size)
        # The predictions from these columns are the slice low:high, as they are sorted by column.
        low, high = np.searchsorted(column_of, [start, start + step])
        column = torch.from_numpy(column_of[low:high] - start).to(rt.device)  # (high - low,)
        parts.append(score_tokens(logits, column, targets[low:high], is_first[low:high], choose))
    results = torch.cat(parts).cpu().double().numpy()  # (P, 3)
    return results[np.argsort(order)]  # undo the sorting


def pad(lists: list[list[int]], length: int, fill: int, rt: Runtime) -> torch.Tensor:
    """Lists of numbers as one int64 tensor (len(lists), length)."""
    padded = torch.tensor([row + [fill] * (length - len(row)) for row in lists])
    return padded.to(rt.device, non_blocking=True)


def branch_mask(branches: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | None:
    """Which tokens (last dimension) each token (third dimension) sees: bool (R, 1, T, T).

    Those of branch 0 and of the token's own branch, up to its position. None if no row has
    branches: then it is the causal mask, which is faster, and padding comes last anyway.
    """
    if not (branches > 0).any():
        return None
    # [:, None] is the token that is seen, [:, :, None] the token that looks.
    same_branch = branches[:, None] == branches[:, :, None]  # (R, T, T)
    shared = branches[:, None] == 0  # (R, 1, T)
    earlier = positions[:, None] <= positions[:, :, None]  # (R, T, T)
    return ((same_branch | shared) & earlier)[:, None]


def score_tokens(
    logits: torch.Tensor,
    column: torch.Tensor,
    targets: torch.Tensor,
    is_first: torch.Tensor,
    choose: Choose | None,
) -> torch.Tensor:
    """The three results of n predicted tokens, float32 (n, 3).

    `column` (n,) says which of the `logits` (columns, vocab_size) predict each of the `targets`
    (n,). The logits are overwritten.
    """
    # The most likely token, and the one that `choose` prefers. Indexing copies the logits, so that
    # `choose` may change them.
    highest, most_likely = logits.max(-1, keepdim=True)  # (columns, 1)
    most_likely = most_likely[column, 0]  # (n,)
    chosen = most_likely
    if choose is not None:
        chosen = choose(logits[column], is_first)

    # log softmax of the targets. Its sum is computed in place: the logits are large, and
    # allocations of that size are expensive on CPUs.
    target_logits = logits[column, targets] - highest[column, 0]  # (n,)
    log_sums = logits.sub_(highest).exp_().sum(-1).log()  # (columns,)
    logprobs = target_logits - log_sums[column]
    return torch.stack([logprobs, most_likely == targets, chosen == targets], 1)


# ---------------------------------------------------------------------------------------------
# Loss of a stream


@torch.no_grad()
def stream_loss(model: GPT, tokens: np.ndarray, B: int, T: int, rt: Runtime) -> float:
    """Mean loss in nats per token of a 1-D stream, read in consecutive windows of T tokens.

    Every token but the first is predicted once, from the earlier tokens of its window. The ranks
    share the windows, and all return the same. Raises NotFinite if the loss is NaN or infinite,
    UserError for fewer than two tokens.
    """
    # The first token has nothing before it, so it is not predicted.
    if len(tokens) < 2:
        raise UserError("a stream of fewer than two tokens has no loss")
    predicted = len(tokens) - 1
    windows = -(-predicted // T)  # rounded up
    # The sum of the losses of all predicted tokens of this rank's windows, B windows at a time
    total = 0.0
    was_training = model.training
    model.eval()
    for first in range(rt.rank * B, windows, rt.world_size * B):
        # One token more than B windows hold: the target of the last one.
        chunk = torch.from_numpy(tokens[first * T : (first + B) * T + 1].astype(np.int64))
        count = len(chunk) - 1
        # The last chunk may be short. It is padded, and the padding does not count: if all forward
        # passes have the same shape, a compiled model is compiled once.
        x = torch.zeros(B * T, dtype=torch.int64)
        y = torch.full((B * T,), IGNORE)
        x[:count] = chunk[:-1]
        y[:count] = chunk[1:]
        with rt.autocast():
            loss = model(x.view(B, T).to(rt.device), y.view(B, T).to(rt.device))
        if rt.device.type != "mps":  # which has no float64
            loss = loss.double()
        # The model returns a mean over the tokens that count, hence the factor.
        total += loss * count
    model.train(was_training)

    # Divide by the tokens of all ranks. NaN and infinity survive the sum.
    mean = float(rt.sum([float(total)])) / predicted
    if not math.isfinite(mean):
        raise not_finite_error(model)
    return mean


def bits_per_byte(loss: float, tokens: np.ndarray, enc: tiktoken.Encoding) -> float:
    """The loss of a stream, from stream_loss in nats per token, in bits per byte of its text.

    It compares models of different vocabularies. The end-of-text token is predicted, but is no
    text. Infinite for a stream without text.
    """
    # The first token is not predicted, so its bytes don't count.
    num_bytes = int(token_lengths(enc)[tokens[1:]].sum())
    bits = loss * (len(tokens) - 1) / math.log(2)
    return bits / num_bytes if num_bytes else math.inf


@cache
def token_lengths(enc: tiktoken.Encoding) -> np.ndarray:
    """The length of each token in bytes, int64 (n_vocab,); 0 for special tokens."""
    # Special tokens stand for no text, and keep a length of 0.
    lengths = np.zeros(enc.n_vocab, np.int64)
    special = {enc.encode_single_token(text) for text in enc.special_tokens_set}
    for token in range(enc.n_vocab):
        # Some vocabularies of other projects have numbers without a token.
        with suppress(KeyError):
            if token not in special:
                lengths[token] = len(enc.decode_single_token_bytes(token))
    return lengths
