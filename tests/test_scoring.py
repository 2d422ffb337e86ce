import numpy as np
import pytest
import torch
from torch.nn import functional as F

from model import GPT, GPTConfig
from runtime import Runtime
from scoring import stream_loss

CPU = Runtime(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("length", [2, 17, 33, 100, 321])
@pytest.mark.parametrize("B", [1, 3])
def test_stream_loss_is_the_mean_over_all_tokens_but_the_first(length, B):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=100, n_layer=2, n_head=2, n_embd=32))
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
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=100, n_layer=1, n_head=2, n_embd=32))
    tokens = np.random.default_rng(0).integers(0, 100, 500).astype(np.uint16)
    whole = stream_loss(model, tokens, 2, 16, CPU)
    monkeypatch.setattr(Runtime, "sum", lambda self, values: torch.tensor(values[0]))
    parts = [stream_loss(model, tokens, 2, 16, Runtime(CPU.device, CPU.dtype, rank, rank, 3)) for rank in range(3)]
    assert sum(parts) == pytest.approx(whole, abs=1e-6)
    assert min(parts) > 0
