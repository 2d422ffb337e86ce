"""The path of a GPU, as far as a CPU can check it: what torch.compile makes of the model.

The backend only counts: graph breaks and recompilations happen before a backend sees a graph.
"""

import functools

import numpy as np
import pytest
import torch

from common.optim import LossScaler, make_adamw, prepare_model, train_step
from common.runtime import Runtime
from common.scoring import stream_loss
from model import GPT, GPTConfig

CPU = torch.device("cpu")


def small_model(dropout: float = 0.0) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(16, vocab_size=100, n_layer=2, n_head=2, n_embd=16, dropout=dropout))


class Counter:
    """A backend for torch.compile that runs graphs as they are, and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture
def counter(monkeypatch):
    """torch.compile as on a GPU, where the loss is compiled too; a graph break is an error."""
    torch._dynamo.reset()
    counter = Counter()
    compile = functools.partial(torch.compile, backend=counter, fullgraph=True)
    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch.compiler, "disable", lambda function: function)
    yield counter
    torch._dynamo.reset()


def update(train_model, optimizer, rt: Runtime) -> float:
    x, y = torch.randint(100, (2, 4, 16), generator=torch.Generator().manual_seed(1))
    batch = [(x, y), (y, x)]
    loss, _ = train_step(train_model, optimizer, batch, 1e-2, 1.0, rt, scaler=LossScaler(rt))
    return float(loss)


@pytest.mark.parametrize(
    ("dtype", "dropout", "checkpointing"),
    [
        pytest.param(torch.float32, 0.0, False, marks=pytest.mark.slow),
        (torch.bfloat16, 0.1, True),
        pytest.param(torch.bfloat16, 0.1, False, marks=pytest.mark.slow),
        pytest.param(torch.float16, 0.0, True, marks=pytest.mark.slow),
    ],
)
def test_training_and_evaluation_are_one_graph_each(counter, dtype, dropout, checkpointing):
    rt = Runtime(CPU, dtype)
    tokens = np.random.default_rng(0).integers(100, size=4 * 16 * 3 - 5)

    def losses(model, train_model, eval_model) -> list[float]:
        """The losses of: update, validation, update, validation, update."""
        optimizer = make_adamw(model, 1e-2, 0.1, (0.9, 0.95), 1e-8)
        model.activation_checkpointing = checkpointing
        values = []
        for _ in range(2):
            torch.manual_seed(3)
            values.append(update(train_model, optimizer, rt))
            values.append(stream_loss(eval_model, tokens, 4, 16, rt))
        return [*values, update(train_model, optimizer, rt)]

    model = small_model(dropout)
    compiled = losses(model, *prepare_model(model, rt, "on"))
    assert counter.graphs == 2  # with gradients and without; none is compiled again

    # This backend recomputes blocks without restoring the state of the random numbers.
    if not (dropout and checkpointing):
        model = small_model(dropout)
        assert compiled == pytest.approx(losses(model, model, model), rel=1e-5)


# ---------------------------------------------------------------------------------------------
# With DDP: DDP of one rank, which prepare_model takes for two


TWO_RANKS = Runtime(CPU, torch.float32, world_size=2)


@pytest.fixture
def group(tmp_path):
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_the_graph_is_cut_into_buckets_of_gradients(counter, group):
    """Otherwise all gradients would be delivered at the end of the backward pass."""
    # 0.8M parameters per block. The first bucket of DDP holds 1 MB, less than a block.
    model = GPT(GPTConfig(16, vocab_size=100, n_layer=2, n_head=2, n_embd=256))
    train_model, _ = prepare_model(model, TWO_RANKS, "on")
    x, y = torch.randint(100, (2, 2, 16))
    train_model(x, y).backward()
    assert counter.graphs > 1

    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x, y).backward()
    for ours, p in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, atol=1e-6, rtol=1e-4)
