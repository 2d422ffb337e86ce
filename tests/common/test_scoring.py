"""The scoring engine against one forward pass per continuation."""

import math
import random

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from common import scoring
from common.checkpoint import NotFinite
from common.console import UserError
from common.optim import Diverged
from common.runtime import Runtime
from common.scoring import Request, score, stream_loss
from common.tokenizer import train_tokenizer
from model import GPT, GPTConfig

CPU = Runtime(torch.device("cpu"), torch.float32)


def make_model(block_size: int, **shape) -> GPT:
    torch.manual_seed(0)
    return GPT(
        GPTConfig(block_size=block_size, vocab_size=100, n_layer=2, n_head=2, n_embd=32, **shape)
    )


def make_requests(longest: int) -> list[Request]:
    """Contexts and continuations of all lengths; some share a beginning, some are equal."""
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
def score_plainly(
    model: GPT, context: list[int], continuation: list[int], excluded=()
) -> tuple[float, bool, bool]:
    """The Score of a continuation by a forward pass of its own, in float64.

    It is chosen if its tokens are the most likely ones once `excluded` cannot be the first.
    """
    block_size = model.config.block_size
    whole = torch.tensor((context + continuation)[-block_size - 1 :])
    num_predicted = min(len(continuation), block_size)
    logits = model(whole[None, :-1])[0].double()[-num_predicted:]
    targets = whole[-num_predicted:]
    logprob = logits.log_softmax(-1)[torch.arange(len(targets)), targets].sum().item()
    greedy = (logits.argmax(-1) == targets).all().item()
    logits[0, list(excluded)] = -torch.inf
    chosen = (logits.argmax(-1) == targets).all().item()
    return logprob, greedy, chosen


def assert_plain(model: GPT, requests: list[Request], scores, excluded=()):
    """All scores equal those of score_plainly."""
    assert [len(s) for s in scores] == [len(r.continuations) for r in requests]
    for request, given in zip(requests, scores):
        for continuation, one in zip(request.continuations, given):
            expected = score_plainly(model, request.context, continuation, excluded)
            assert one.logprob == pytest.approx(expected[0], abs=1e-4)
            assert (one.greedy, one.chosen) == expected[1:]


def choose_without(excluded: list[int]):
    """A `choose` that excludes tokens from the first position of a continuation."""

    def choose(logits: torch.Tensor, is_first: torch.Tensor) -> torch.Tensor:
        first = is_first.nonzero()
        logits[first, torch.tensor(excluded)] = -torch.inf
        return logits.argmax(-1)

    return choose


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("budget", [1, 100, 100_000])
def test_scores_equal_those_of_single_forward_passes(monkeypatch, budget, norm):
    monkeypatch.setitem(scoring.MAX_TOKENS, "cpu", budget)
    monkeypatch.setitem(scoring.MAX_LOGITS, "cpu", 7)
    model, requests = make_model(64, norm=norm), make_requests(20)
    assert_plain(model, requests, score(model, requests, CPU))
    assert model.training, "the model's mode is left as it was"


def test_long_contexts_are_cut_from_the_left():
    model, requests = make_model(16), make_requests(16)
    for request in requests:
        request.continuations = [c[:16] for c in request.continuations]
    assert_plain(model, requests, score(model, requests, CPU))


def test_long_continuations_are_cut_from_the_left_and_reported_once(capsys):
    model = make_model(16)
    requests = [Request([1, 2], [[3] * 15, [4] * 16, [5] * 17, list(range(40))])]
    for _ in range(2):
        scores = score(model, requests, CPU, desc="long")
        assert_plain(model, requests, scores)
    assert [one.num_tokens for one in scores[0]] == [15, 16, 16, 16]
    assert capsys.readouterr().out == (
        "long: 2 of 4 continuations are longer than the context of the model, and only their last "
        "16 tokens count\n"
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["h.1.mlp.c_fc.weight", "wte.weight", "ln_f.bias"])
def test_a_broken_weight_is_named_instead_of_a_result(name, value):
    model = make_model(64)
    model.source = "run/model_final.pt"
    model.state_dict()[name].flatten()[3] = value
    message = f"run/model_final.pt is broken: its tensor {name} is not finite"
    with pytest.raises(NotFinite, match=message):
        score(model, make_requests(20), CPU)
    with pytest.raises(NotFinite, match=message):
        stream_loss(model, np.arange(90), 2, 16, CPU)
    assert model.training, "the model's mode is left as it was"


def test_an_overflow_with_finite_weights_is_no_result_either():
    model = make_model(64)
    with torch.no_grad():
        model.wte.weight.fill_(3e38)
    with pytest.raises(NotFinite, match="although its weights are: try --dtype float32"):
        score(model, make_requests(20), CPU)
    with pytest.raises(NotFinite, match="although its weights are: try --dtype float32"):
        stream_loss(model, np.arange(90), 2, 16, CPU)


def test_greedy_and_chosen_continuations():
    """Continuations that the model prefers, with and without excluded tokens at their beginning."""
    model, requests = make_model(64), make_requests(20)
    excluded = list(range(0, 100, 3))
    for n, request in enumerate(requests):
        with torch.no_grad():
            logits = model(torch.tensor([request.context]))[0, -1]
        if n % 2:
            logits[excluded] = -torch.inf
        first = int(logits.argmax())
        (rest,) = model.generate([request.context + [first]], 3, temperature=0)
        request.continuations = [[first, *rest], [first], [5]]
    scores = score(model, requests, CPU, choose_without(excluded))
    assert_plain(model, requests, scores, excluded)
    outcomes = {(s.greedy, s.chosen) for many in scores for s in many}
    assert outcomes == {(a, b) for a in (False, True) for b in (False, True)}


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


def test_a_row_is_laid_out_as_drawn():
    """The example in the docstring of scoring.py."""
    a, b, c, x, y, p, q, r, s, t = range(10)
    endings = [[x, y, p, q], [x, y, r]]
    (row,) = scoring.make_rows(Request([a, b, c], endings), 7, 64)
    assert row.tokens == [a, b, c, x, y, p]
    assert row.positions == [0, 1, 2, 3, 4, 5]
    assert row.branches == [0, 0, 0, 0, 0, 1]
    assert row.targets == [x, y, p, q, x, y, r]
    assert row.columns == [2, 3, 4, 5, 2, 3, 4]
    assert row.score_index == [7, 7, 7, 7, 8, 8, 8]
    assert row.is_first == [True, False, False, False, True, False, False]

    (row,) = scoring.make_rows(Request([a, b, c], [*endings, [x, y, s, t]]), 0, 64)
    assert row.tokens == [a, b, c, x, y, p, s]
    assert row.positions == [0, 1, 2, 3, 4, 5, 5]
    assert row.branches == [0, 0, 0, 0, 0, 1, 3]
    assert row.columns == [2, 3, 4, 5, 2, 3, 4, 2, 3, 4, 6]

    # An ending that is only the shared part.
    (row,) = scoring.make_rows(Request([a, b, c], [[x, y], [x, y, s, t]]), 0, 64)
    assert row.tokens == [a, b, c, x, y, s]
    assert row.columns == [2, 3, 2, 3, 4, 5]

    # Nothing but the shared part.
    for endings in ([[x, y, p]], [[x, y, p]] * 2):
        (row,) = scoring.make_rows(Request([a, b, c], endings), 0, 64)
        assert row.tokens == [a, b, c, x, y]
        assert row.columns == [2, 3, 4] * len(endings)


def test_the_first_tokens_of_a_continuation_may_be_unscored():
    """The second example in the docstring of scoring.py."""
    a, b, c, x, y, p, q, r = range(8)
    (row,) = scoring.make_rows(Request([a, b, c], [[x, y, p, q], [x, y, r]], [2, 0]), 7, 64)
    assert row.tokens == [a, b, c, x, y, p]
    assert row.targets == [p, q, x, y, r]
    assert row.columns == [4, 5, 2, 3, 4]
    assert row.score_index == [7, 7, 8, 8, 8]
    assert row.is_first == [True, False, True, False, False]


def test_unscored_tokens_are_a_context_of_their_own():
    """Also where the text is cut, which makes a row of each continuation."""
    model = make_model(64)
    rng = random.Random(0)
    for length in (5, 80):
        context = rng.choices(range(100), k=length)
        endings = [rng.choices(range(100), k=6), rng.choices(range(100), k=9)]
        (scores,) = score(model, [Request(context, endings, [4, 0])], CPU)
        ((expected,),) = score(model, [Request([*context, *endings[0][:4]], [endings[0][4:]])], CPU)
        assert scores[0].num_tokens == 2
        assert scores[0].logprob == pytest.approx(expected.logprob, abs=1e-4)


def test_bits_per_byte_by_hand():
    enc, _ = train_tokenizer(["ab ab ab"], 259)
    text = "abcé ab"  # 8 bytes
    tokens = np.array([enc.eot_token, *enc.encode_ordinary(text), enc.eot_token])
    bits = scoring.bits_per_byte(2.0, tokens, enc)
    assert bits == pytest.approx(2.0 * (len(tokens) - 1) / math.log(2) / 8)
    assert scoring.bits_per_byte(2.0, np.array([enc.eot_token] * 2), enc) == math.inf


def test_nothing_is_computed_twice():
    """A row has the context and the shared part once, and no ending's last token."""
    endings = [[4, 5, 6], [4, 7], [4, 8, 9, 10]]
    (row,) = scoring.make_rows(Request([1, 2, 3], endings), 0, 64)
    assert row.tokens == [1, 2, 3, 4, 5, 8, 9]
    assert row.positions == [0, 1, 2, 3, 4, 4, 5]


@pytest.mark.parametrize(
    "request_, message",
    [
        (Request([], [[1]]), "at least one"),
        (Request([1], [[]]), "at least one"),
    ],
)
def test_invalid_requests_are_rejected(request_, message):
    with pytest.raises(UserError, match=message):
        score(make_model(16), [request_], CPU)


@pytest.mark.parametrize("length", [2, 17, 33, 100, 321])
@pytest.mark.parametrize("B", [1, 3])
def test_stream_loss_is_the_mean_over_all_but_the_first_token(length, B):
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


def test_ranks_share_the_work_of_stream_loss(monkeypatch):
    """The parts that the ranks compute add up to the whole."""
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


def test_training_ends_with_the_exit_code_of_a_run_that_diverged():
    assert NotFinite.exit_code == Diverged.exit_code
