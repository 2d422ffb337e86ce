"""float16: which GPUs use it, gradients of the loss, loss scaling, skipped and endless overflow."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_train import TORCHRUN, assert_same_bits, losses, stream, train_here, weights
from torch.amp import GradScaler

from common.console import UserError
from common.optim import Diverged, LossScaler, PendingResult, make_adamw, make_muon, train_step
from common.runtime import Runtime, choose_dtype
from model import GPT, IGNORE, GPTConfig, linear_cross_entropy

CPU = torch.device("cpu")
FLOAT16 = Runtime(CPU, torch.float16)
FLOAT32 = Runtime(CPU, torch.float32)


@pytest.mark.parametrize(
    "capability, dtype",
    [
        ((7, 0), torch.float16),  # V100
        ((7, 5), torch.float16),  # T4
        ((8, 0), torch.bfloat16),  # A100
        ((9, 0), torch.bfloat16),  # H100
    ],
)
def test_auto_on_gpus(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_dtype(torch.device("cuda", 0), "auto") == dtype


def test_auto_on_slow_cpus_is_float32(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    assert choose_dtype(CPU, "auto") == torch.float32
    assert choose_dtype(CPU, "float16") == torch.float16


# ---------------------------------------------------------------------------------------------
# The loss


def test_gradients_of_the_loss_of_65536_tokens_against_float64():
    """The scale arrives after the loss has computed its gradients: nothing may be lost before."""
    N, C, V = 65536, 32, 256
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, C, generator=generator)
    weight = torch.randn(V, C, generator=generator) * 0.2
    # The second half of the vocabulary has probabilities of 1e-9 to 1e-7, and is never a target.
    x[:, 0] = 1.0
    weight[V // 2 :, 0] = -14.0
    targets = torch.randint(V // 2, (N,), generator=generator)
    targets[torch.rand(N, generator=generator) < 0.3] = IGNORE

    # The reference, from the definition. float16 would round most of the probabilities to zero.
    probs = (x.double() @ weight.double().t()).softmax(-1)
    rare = probs[:, V // 2 :]
    assert (rare.half() == 0).float().mean() > 0.5
    counted = (targets != IGNORE).nonzero()[:, 0]
    d_logits = torch.zeros_like(probs)
    d_logits[counted] = probs[counted]
    d_logits[counted, targets[counted]] -= 1
    d_logits /= len(counted)
    d_x = d_logits @ weight.double()
    d_weight = d_logits.t() @ x.double()

    x.requires_grad_()
    weight.requires_grad_()
    with torch.autocast("cpu", torch.float16):
        loss = linear_cross_entropy(x, weight, targets, V)
    (loss * 65536).backward()
    assert_close(x.grad / 65536, d_x, 2e-3)
    assert_close(weight.grad[: V // 2] / 65536, d_weight[: V // 2], 2e-3)
    # Rows of rare tokens one by one, because Adam makes the updates of all rows equally large.
    for row in range(V // 2, V):
        assert_close(weight.grad[row] / 65536, d_weight[row], 1e-2)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float):
    assert (actual.double() - expected).norm() <= tolerance * expected.norm()


def test_gradients_of_the_model_are_as_near_as_bfloat16s():
    """Every parameter, against float32. The gradient is unscaled; bfloat16 has fewer digits."""

    def gradients(dtype: torch.dtype) -> dict:
        model = small_model()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(*small_batch()) / 100  # as one of 100 micro-batches
        scaler = LossScaler(Runtime(CPU, dtype))
        optimizer = small_optimizer(model)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        return {name: parameter.grad.double() for name, parameter in model.named_parameters()}

    exact = gradients(torch.float32)
    float16 = gradients(torch.float16)
    bfloat16 = gradients(torch.bfloat16)
    for name, gradient in exact.items():
        error = (float16[name] - gradient).norm()
        assert error < 0.5 * (bfloat16[name] - gradient).norm(), name
        assert error < 5e-3 * gradient.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_loss_can_be_compiled_without_a_graph_break(dtype):
    """With the backend "eager", only the tracing is tested, which takes no compiler."""
    gradients = []
    for compiled in (False, True):
        model = small_model()
        loss_of = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = loss_of(*small_batch())
        loss.backward()
        gradients.append(model.wte.weight.grad)
    assert gradients[0].count_nonzero() > 0
    assert_close(gradients[1], gradients[0], 1e-6)


# ---------------------------------------------------------------------------------------------
# A training step


def small_model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=32, vocab_size=384, n_layer=2, n_head=2, n_embd=32))


def small_batch() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = torch.randint(384, (2, 8, 32), generator=torch.Generator().manual_seed(1))
    return x, y


def small_optimizer(model: GPT, muon: bool = False):
    make = make_muon if muon else make_adamw
    return make(model, 1e-3, 0.1, (0.9, 0.95), 1e-8)


@pytest.mark.parametrize("grad_clip", [0.0, 0.1])
def test_clipping_sees_unscaled_gradients(grad_clip):
    results = []
    for rt in (FLOAT32, FLOAT16):
        model = small_model()
        # Unlike Adam's, the updates of plain SGD are proportional to the gradient.
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        batch = [small_batch()] * 2
        _, grad_norm = train_step(
            model, optimizer, batch, 1.0, grad_clip, rt, scaler=LossScaler(rt)
        )
        results.append((float(grad_norm), model.wte.weight.detach()))
    (norm32, weight32), (norm16, weight16) = results
    assert norm16 == pytest.approx(norm32, rel=1e-3)
    assert norm32 > 0.1
    update = weight32 - small_model().wte.weight.detach()
    assert (weight16 - weight32).norm() < 5e-3 * update.norm()


@pytest.mark.parametrize("muon", [False, True])
def test_an_overflow_changes_nothing_but_the_scale(muon):
    model = small_model()
    optimizer = small_optimizer(model, muon)
    scaler = LossScaler(FLOAT16)

    def step() -> bool:
        loss, grad_norm = train_step(
            model, optimizer, [small_batch()], 1e-3, 1.0, FLOAT16, scaler=scaler
        )
        assert loss.isfinite()
        return PendingResult(loss, grad_norm, scaler, FLOAT16).read().skipped

    assert not step()
    before = [*snapshot(model), *snapshot(optimizer.state_dict())]
    hook = model.h[0].mlp.c_fc.weight.register_hook(lambda gradient: gradient * 1e38)
    assert step()
    after = [*snapshot(model), *snapshot(optimizer.state_dict())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert scaler.get_scale() == 32768
    hook.remove()
    assert not step()
    assert not torch.equal(before[0], model.wte.weight)


def snapshot(state) -> list[torch.Tensor]:
    """Copies of all tensors of a model, or of nested dicts and lists."""
    if isinstance(state, GPT):
        state = state.state_dict()
    if isinstance(state, torch.Tensor):
        return [state.clone()]
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, list):
        return [tensor for value in state for tensor in snapshot(value)]
    return []


def test_float16_without_a_scaler_is_rejected():
    model = small_model()
    with pytest.raises(AssertionError, match="needs a scaler"):
        train_step(model, small_optimizer(model), [small_batch()], 1e-3, 1.0, FLOAT16)


# Rank 1 alone overflows in the second of three steps. Prints a line of JSON per rank and optimizer.
TWO_RANKS = """
import json, sys, torch, torch.distributed.optim
from common import runtime
from common.optim import LossScaler, PendingResult, make_adamw, make_muon, prepare_model, train_step
from model import GPT, GPTConfig

def main():
    rt = runtime.start("cpu", "float16")
    for name in ("adamw", "sharded", "muon"):
        torch.manual_seed(0)
        model = GPT(GPTConfig(block_size=32, vocab_size=384, n_layer=1, n_head=2, n_embd=32))
        model.h[0].mlp.c_fc.weight.register_hook(
            lambda gradient: gradient * (torch.inf if rt.rank == 1 and step == 1 else 1)
        )
        shared = (model, 1e-3, 0.1, (0.9, 0.95), 1e-8)
        if name == "muon":
            optimizer = make_muon(*shared)
        else:
            optimizer = make_adamw(*shared, sharded=name == "sharded")
        train_model, _ = prepare_model(model, rt, "off")
        scaler = LossScaler(rt)
        torch.manual_seed(rt.rank)
        batch = [tuple(torch.randint(384, (2, 4, 32))) for _ in range(2)]
        skipped, sums = [], []
        for step in range(3):
            loss, norm = train_step(train_model, optimizer, batch, 1e-3, 1.0, rt, scaler=scaler)
            skipped.append(PendingResult(loss, norm, scaler, rt).read().skipped)
            sums.append(sum(p.double().abs().sum().item() for p in model.parameters()))
        result = dict(optimizer=name, skipped=skipped, sums=sums, scale=scaler.get_scale())
        sys.stdout.write(json.dumps(result) + "\\n")
        sys.stdout.flush()
    runtime.leave()

main()
"""


@pytest.mark.slow
def test_all_ranks_skip_a_step_if_one_overflows(tmp_path):
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    # If a rank is killed by a signal, its stack is part of the message.
    env = os.environ | dict(PYTHONPATH=str(ROOT), PYTHONFAULTHANDLER="1")
    result = subprocess.run(
        [*TORCHRUN, str(script)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    for name in ("adamw", "sharded", "muon"):
        first, second = [record for record in records if record["optimizer"] == name]
        assert first == second
        assert first["skipped"] == [False, True, False]
        assert first["scale"] == 32768
        assert first["sums"][0] == first["sums"][1] != first["sums"][2]


# ---------------------------------------------------------------------------------------------
# Runs


def test_the_loss_curve_is_that_of_float32(data_dir, tmp_path):
    curves = []
    for dtype in ("float32", "float16"):
        train_here(data_dir, tmp_path / dtype, "--dtype", dtype, "--max_steps", 20)
        curves.append(losses(tmp_path / dtype) + [v for _, v in stream(tmp_path / dtype, "val")])
    float32, float16 = curves
    assert float16 == pytest.approx(float32, abs=3e-3)
    assert float16 != float32


def records_of(log_dir: Path) -> list[dict]:
    """The training steps in metrics.jsonl, which must be valid JSON: without NaN and Infinity."""

    def reject(constant: str):
        raise AssertionError(f"{constant} in metrics.jsonl")

    lines = (log_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=reject) for line in lines]
    return [record for record in records if "loss" in record]


def scaler_that_overflows(self, rt: Runtime):
    """Starts with far too large a scale, and raises it after 3 steps instead of 2,000."""
    GradScaler.__init__(self, "cpu", init_scale=2.0**28, growth_interval=3)


@pytest.mark.slow
def test_skipped_steps_are_logged_and_resumed_to_the_bit(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(LossScaler, "__init__", scaler_that_overflows)
    flags = ("--dtype", "float16", "--dropout", 0.1, "--checkpoint_every", 1)
    whole = tmp_path / "whole"
    train_here(data_dir, whole, *flags)

    # The scale is halved at each overflow, and doubled after three steps without.
    records = records_of(whole)
    skipped = [record["step"] for record in records if record["skipped"]]
    assert skipped[0] == 0
    assert 5 < len(skipped) < len(records) - 10
    scale = 2.0**28
    good = 0
    for record in records:
        good = 0 if record["skipped"] else good + 1
        scale *= 0.5 if record["skipped"] else 2 if good == 3 else 1
        good %= 3
        assert record["loss_scale"] == scale
        assert (record["grad_norm"] is None) == record["skipped"]
    screen = capsys.readouterr().out
    for step in skipped:
        assert f"step {step} | float16 overflow: the update is skipped" in screen
    assert len(losses(whole)) == len(records)
    assert losses(whole)[-1] < losses(whole)[0] - 0.1

    # Resume twice: from a step that was skipped, and between two increases of the scale.
    for step in (skipped[1], len(records) - 2):
        log_dir = tmp_path / f"from_{step}"
        log_dir.mkdir()
        checkpoint = whole / f"model_{step:05d}.pt"
        (log_dir / checkpoint.name).write_bytes(checkpoint.read_bytes())
        train_here(data_dir, log_dir, *flags, "--resume")
        assert_same_bits(whole / "model_final.pt", log_dir / "model_final.pt")
        scalers = [weights(run / "model_final.pt")["scaler"] for run in (whole, log_dir)]
        assert scalers[0] == scalers[1]
        resumed = [(record["loss"], record["skipped"]) for record in records_of(log_dir)]
        assert resumed == [(record["loss"], record["skipped"]) for record in records[step:]]


def test_a_run_that_keeps_overflowing_ends(data_dir, tmp_path):
    """The weights explode in the first step, so that every later loss is NaN."""
    log_dir = tmp_path / "log"
    flags = ("--dtype", "float16", "--max_lr", "1e30", "--grad_clip", 0, "--val_every", 0)
    with pytest.raises(Diverged, match="the run diverged and stops.*try --dtype float32"):
        train_here(data_dir, log_dir, *flags)
    records = records_of(log_dir)
    assert [record["skipped"] for record in records] == [False] + 16 * [True]
    assert records[-1]["loss_scale"] == 1
    assert not (log_dir / "model_final.pt").exists()


def test_validation_and_samples_of_a_model_that_overflows_end_the_run(data_dir, tmp_path):
    for flag in ("--val_every", "--sample_every"):
        flags = ("--dtype", "float16", "--max_lr", "1e30", "--grad_clip", 0, "--val_every", 0)
        with pytest.raises(UserError, match="not finite") as error:
            train_here(data_dir, tmp_path / flag, *flags, flag, 10)
        assert error.value.exit_code == Diverged.exit_code


def test_a_run_can_change_its_dtype(data_dir, tmp_path):
    log_dir = tmp_path / "log"
    scalers = []
    for max_steps, dtype in ((2, "float32"), (4, "float16"), (6, "float32")):
        train_here(data_dir, log_dir, "--dtype", dtype, "--max_steps", max_steps, "--resume")
        scalers.append(weights(log_dir / "model_final.pt")["scaler"])
    assert scalers[0] == scalers[2] == {}
    assert scalers[1]["scale"] == 65536
    assert losses(log_dir)[-1] < losses(log_dir)[0]
