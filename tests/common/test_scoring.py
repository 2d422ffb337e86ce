"""The scoring engine against a forward pass for every continuation, one row at a time."""

import random

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from common import scoring
from common.console import UserError
from common.runtime import Runtime
from common.scoring import Request, score, stream_loss
from model import GPT, GPTConfig

CPU = Runtime(torch.device("cpu"), torch.float32)


def make_model(block_size: int, **shape) -> GPT:
    torch.manual_seed(0)
    return GPT(
        GPTConfig(block_size=block_size, vocab_size=100, n_layer=2, n_head=2, n_embd=32, **shape)
    )


def make_requests(longest: int) -> list[Request]:
    """Contexts and continuations of all lengths; some continuations begin alike, some are the same."""
    rng = random.Random(0)

    def tokens(shortest: int) -> list[int]:
        return rng.choices(range(100), k=rng.randrange(shortest, longest))

    requests = [
        Request(tokens(1), [tokens(1) for _ in range(rng.choice([1, 4, 10]))]) for _ in range(30)
    ]
    for request in requests[::3]:
        beginning = tokens(1)
        request.continuations = [beginning + c for c in request.continuations] + [beginning]
    requests[1].continuations *= 2
    return requests


@torch.no_grad()
def plain(
    model: GPT, context: list[int], continuation: list[int], barred=()
) -> tuple[float, bool, bool]:
    whole = torch.tensor((context + continuation)[-model.config.block_size - 1 :])
    logits = model(whole[None, :-1])[0].double()[-len(continuation) :]
    targets = whole[-len(continuation) :]
    logprob = logits.log_softmax(-1)[torch.arange(len(targets)), targets].sum().item()
    greedy = (logits.argmax(-1) == targets).all().item()
    logits[0, list(barred)] = -torch.inf
    return logprob, greedy, (logits.argmax(-1) == targets).all().item()


def agree(model: GPT, requests: list[Request], scores, barred=()):
    assert [len(s) for s in scores] == [len(r.continuations) for r in requests]
    for request, given in zip(requests, scores):
        for continuation, one in zip(request.continuations, given):
            logprob, greedy, unbarred = plain(model, request.context, continuation, barred)
            assert one.logprob == pytest.approx(logprob, abs=1e-4)
            assert (one.greedy, one.greedy_unbarred) == (greedy, unbarred)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("budget", [1, 100, 100_000])
def test_scores_are_those_of_a_row_at_a_time(monkeypatch, budget, norm):
    monkeypatch.setitem(scoring.MAX_TOKENS, "cpu", budget)
    monkeypatch.setitem(scoring.MAX_LOGITS, "cpu", 7)
    model, requests = make_model(64, norm=norm), make_requests(20)
    agree(model, requests, score(model, requests, CPU))
    assert model.training, "the model's mode is left as it was"


def test_long_contexts_are_cut_from_the_left():
    model, requests = make_model(16), make_requests(16)
    for request in requests:
        request.continuations = [c[:16] for c in request.continuations]
    agree(model, requests, score(model, requests, CPU))


def test_greedy_matches_and_barred_tokens():
    """Continuations that the model itself prefers, with and without the tokens that it may not begin with."""
    model, requests = make_model(64), make_requests(20)
    barred = list(range(0, 100, 3))
    for n, request in enumerate(requests):
        with torch.no_grad():
            logits = model(torch.tensor([request.context]))[0, -1]
        if n % 2:
            logits[barred] = -torch.inf
        first = int(logits.argmax())
        request.continuations = [
            [first, *model.generate([request.context + [first]], 3, temperature=0)[0]],
            [first],
            [5],
        ]
    scores = score(model, requests, CPU, barred)
    agree(model, requests, scores, barred)
    flat = [one for many in scores for one in many]
    assert {(s.greedy, s.greedy_unbarred) for s in flat} == {
        (a, b) for a in (False, True) for b in (False, True)
    }


def test_ranks_share_the_work_of_scoring(monkeypatch):
    model, requests = make_model(64), make_requests(20)
    monkeypatch.setitem(scoring.MAX_TOKENS, "cpu", 100)
    whole = score(model, requests, CPU)
    parts = []
    monkeypatch.setattr(
        Runtime, "sum", lambda self, values: parts.append(values) or torch.from_numpy(values)
    )
    for rank in range(3):
        score(model, requests, Runtime(CPU.device, CPU.dtype, rank, rank, 3))
    assert all((part[:, 0] != 0).any() for part in parts)
    sums = sum(parts)[:, 0]
    assert sums.tolist() == [one.logprob for many in whole for one in many], "the same to the bit"


def test_nothing_is_computed_twice():
    """A request costs its context and the endings once, less their last tokens; what is shared counts once."""
    (row,) = scoring.pack(Request([1, 2, 3], [[4, 5, 6], [4, 7], [4, 8, 9, 10]]), [0, 1, 2], 64)
    assert row.tokens == [1, 2, 3, 4, 5, 8, 9]
    assert row.positions == [0, 1, 2, 3, 4, 4, 5]
    (row,) = scoring.pack(Request([1, 2, 3], [[4, 5, 6]]), [0], 64)
    assert row.tokens == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "request_, message",
    [
        (Request([], [[1]]), "at least one"),
        (Request([1], [[]]), "at least one"),
        (Request([1], [[1] * 17]), "longer than"),
    ],
)
def test_what_can_not_be_scored_is_said(request_, message):
    with pytest.raises(UserError, match=message):
        score(make_model(16), [request_], CPU)


@pytest.mark.parametrize("length", [2, 17, 33, 100, 321])
@pytest.mark.parametrize("B", [1, 3])
def test_stream_loss_is_the_mean_over_all_tokens_but_the_first(length, B):
    model = make_model(16)
    tokens = np.random.default_rng(0).integers(0, 100, length).astype(np.uint16)
    total = 0.0
    with torch.no_grad():
        for first in range(0, length - 1, 16):
            window = torch.from_numpy(tokens[first : first + 17].astype(np.int64))
            logits = model(window[None, :-1])[0].double()
            total += F.cross_entropy(logits, window[1:], reduction="sum").item()
    assert stream_loss(model, tokens, B, 16, CPU) == pytest.approx(total / (length - 1), abs=1e-6)
    assert model.training, "the model's mode is left as it was"


def test_ranks_share_the_work_and_the_answer(monkeypatch):
    """Each rank's part of the sum, taken alone, adds up to the whole."""
    model = make_model(16)
    tokens = np.random.default_rng(0).integers(0, 100, 500).astype(np.uint16)
    whole = stream_loss(model, tokens, 2, 16, CPU)
    monkeypatch.setattr(Runtime, "sum", lambda self, values: torch.tensor(values[0]))
    parts = [
        stream_loss(model, tokens, 2, 16, Runtime(CPU.device, CPU.dtype, rank, rank, 3))
        for rank in range(3)
    ]
    assert sum(parts) == pytest.approx(whole, abs=1e-6)
    assert min(parts) > 0
