"""On a GPU, Python starts the next update before it reads the result of the last one. Forced here
on the CPU: the same logs, checkpoints and stops, and no other wait for the device."""

import json

import pytest
import torch
from test_train import STEPS, assert_same_bits, train_here, weights
from torch.utils._python_dispatch import TorchDispatchMode

import finetune
import train_gpt2
from common.optim import Diverged, LossScaler, PendingResult, make_adamw, train_step
from common.runtime import Runtime
from model import GPT, GPTConfig, sample_token

CPU = torch.device("cpu")


@pytest.fixture
def ahead(monkeypatch):
    monkeypatch.setattr(Runtime, "runs_ahead", True)


def records_of(log_dir) -> list[dict]:
    """The lines of metrics.jsonl without what is measured."""
    records = [json.loads(line) for line in (log_dir / "metrics.jsonl").read_text().splitlines()]
    measured = ("ms", "tokens_per_sec", "memory")
    return [{k: v for k, v in record.items() if k not in measured} for record in records]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_logs_and_weights_are_the_same(data_dir, tmp_path, monkeypatch, dtype):
    flags = ("--dtype", dtype, "--dropout", 0.1, "--sample_every", 7, "--rolling_every", 6)
    if dtype == "float16":  # the first updates overflow

        def scale_too_large(self, rt):
            torch.amp.GradScaler.__init__(self, "cpu", init_scale=2.0**28, growth_interval=3)

        monkeypatch.setattr(LossScaler, "__init__", scale_too_large)
    train_here(data_dir, tmp_path / "one", *flags)
    monkeypatch.setattr(Runtime, "runs_ahead", True)
    events = []
    for name in ("start_update", "finish_update", "save"):
        monkeypatch.setattr(train_gpt2, name, noting(events, getattr(train_gpt2, name)))
    train_here(data_dir, tmp_path / "two", *flags)

    assert records_of(tmp_path / "one") == records_of(tmp_path / "two")
    assert (tmp_path / "one/log.txt").read_text() == (tmp_path / "two/log.txt").read_text()
    assert_same_bits(tmp_path / "one/model_final.pt", tmp_path / "two/model_final.pt")
    # Step 6 is saved, so update 5 is read before. In between, updates overlap.
    assert " ".join(events).startswith(
        "start_update0 start_update1 finish_update0 start_update2 finish_update1 start_update3 "
        "finish_update2 start_update4 finish_update3 start_update5 finish_update4 finish_update5 "
        "save6 start_update6 finish_update6 start_update7"
    )


def noting(events: list[str], function):
    """`function`, whose name and step are appended to `events` at each call."""

    def noted(run, step, *args):
        number = step if isinstance(step, int) else step.step
        events.append(f"{function.__name__}{number}")
        return function(run, step, *args)

    return noted


def test_nothing_is_saved_after_a_loss_that_is_not_finite(data_dir, tmp_path, ahead):
    log_dir = tmp_path / "log"
    flags = ("--max_lr", "1e30", "--grad_clip", 0, "--val_every", 0, "--rolling_every", 2)
    with pytest.raises(Diverged, match="step 1: loss nan"):
        train_here(data_dir, log_dir, *flags)
    assert [record["step"] for record in records_of(log_dir)] == [0]
    assert not list(log_dir.glob("model_*.pt"))


def test_a_stop_saves_all_updates_and_the_run_resumes_to_the_bit(
    data_dir, tmp_path, monkeypatch, ahead
):
    class StopInStepFive(train_gpt2.StopSignal):
        reads = 0

        @property
        def number(self):  # is read once per update, and by main at the end
            self.reads += 1
            return 15 if self.reads > 5 else 0

        @number.setter
        def number(self, value):
            pass

    log_dir = tmp_path / "log"
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt2, "StopSignal", StopInStepFive)
        with pytest.raises(SystemExit) as stopped:
            train_here(data_dir, log_dir)
    assert stopped.value.code == 128 + 15
    # Update 5 was the first that knew. Update 6 had been started before its result was read.
    assert weights(log_dir / "model_00007.pt")["step"] == 7 == len(records_of(log_dir))
    train_here(data_dir, log_dir, "--resume")
    train_here(data_dir, tmp_path / "whole")
    assert_same_bits(log_dir / "model_final.pt", tmp_path / "whole/model_final.pt")
    assert (log_dir / "log.txt").read_text() == (tmp_path / "whole/log.txt").read_text()
    assert len(records_of(log_dir)) == STEPS + 1


def test_finetuning_starts_an_update_before_the_last_one_is_read(ahead):
    events = []

    def start_updates():
        for step in range(3):
            events.append(f"start {step}")
            yield finetune.Update(step, 1e-3, 10, began=-1.0, result=None)

    for update in finetune.in_background(start_updates(), Runtime(CPU, torch.float32)):
        events.append(f"read {update.step}")
        # The first update began when it was started, the others when the one before was done.
        assert (update.began > 0) == (update.step > 0)
    assert events == ["start 0", "start 1", "read 0", "start 2", "read 1", "read 2"]


# ---------------------------------------------------------------------------------------------
# Waits for the device


class Waits(TorchDispatchMode):
    """Notes where the value of a tensor is asked for: float(), int(), bool(), item()."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def small_model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(32, vocab_size=100, n_layer=2, n_head=2, n_embd=16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_update_asks_for_no_value(dtype):
    rt = Runtime(CPU, dtype)
    model = small_model()
    optimizer = make_adamw(model, 1e-3, 0.1, (0.9, 0.95), 1e-8)
    scaler = LossScaler(rt)
    batch = [tuple(torch.randint(100, (2, 4, 16))) for _ in range(2)]
    with Waits() as waits:
        loss, norm = train_step(model, optimizer, batch, 1e-3, 1.0, rt, scaler=scaler)
        result = PendingResult(loss, norm, scaler, rt)
    assert waits.count == 0
    assert result.read().loss == float(loss)
    assert result.read().grad_norm == float(norm)


@pytest.mark.parametrize("sampling", [dict(temperature=0), dict(top_k=5), dict(top_p=0.9)])
def test_generation_asks_for_no_value_but_the_tokens(sampling):
    model = small_model()
    with Waits() as waits:  # tolist(), by which the tokens are read, is not counted
        model.generate([[1, 2, 3], [4]], 10, **sampling)
    assert waits.count == 0


def test_tokens_are_those_that_torch_multinomial_draws():
    logits = torch.randn(50, 100, generator=torch.Generator().manual_seed(0))
    first, second = (torch.Generator().manual_seed(1) for _ in range(2))
    expected = torch.multinomial(logits.softmax(-1), 1, generator=first)[:, 0]
    assert torch.equal(sample_token(logits, 1.0, None, None, second), expected)


def test_logits_that_are_not_finite_have_no_token():
    logits = torch.zeros(3, 10)
    logits[1, 4] = torch.nan
    for temperature in (0, 1):
        tokens = sample_token(logits, temperature, None, None, torch.Generator())
        assert tokens[1] == -1
        assert (tokens[[0, 2]] >= 0).all()
    model = small_model()
    model.wpe.weight.data[5] = torch.inf
    with pytest.raises(FloatingPointError):
        model.generate([[1, 2, 3]], 10)
