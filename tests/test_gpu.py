"""What needs a GPU: `pytest -m gpu`, which runs/gpu_check.sh runs too. Small models, a minute."""

import os

import pytest
import torch
from test_train import assert_same_bits, losses, train_here

from common.optim import LossScaler, PendingResult, make_adamw, prepare_model, train_step
from common.runtime import Runtime
from model import GPT, GPTConfig

# For the runs with --deterministic: cuBLAS reads it only once, in the first product of the process.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def small_model(device: str) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(64, vocab_size=300, n_layer=2, n_head=2, n_embd=64)).to(device)


def batch(device: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    tokens = torch.randint(300, (2, 2, 8, 64), generator=torch.Generator().manual_seed(1))
    return [(x, y) for x, y in tokens.to(device)]


def three_losses(rt: Runtime, compile: str) -> list[float]:
    model = small_model(rt.device)
    optimizer = make_adamw(model, 1e-2, 0.1, (0.9, 0.95), 1e-8)
    train_model, _ = prepare_model(model, rt, compile)
    scaler = LossScaler(rt)
    return [
        float(train_step(train_model, optimizer, batch(rt.device), 1e-2, 1.0, rt, scaler=scaler)[0])
        for _ in range(3)
    ]


@pytest.mark.parametrize("compile", ["off", "on"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_training_losses_are_those_of_the_cpu(dtype, compile):
    expected = three_losses(Runtime(torch.device("cpu"), torch.float32), "off")
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    rt = Runtime(torch.device("cuda"), dtype)
    assert three_losses(rt, compile) == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_update_does_not_wait_for_the_device(dtype):
    rt = Runtime(torch.device("cuda"), dtype)
    model = small_model("cuda")
    optimizer = make_adamw(model, 1e-2, 0.1, (0.9, 0.95), 1e-8)
    scaler = LossScaler(rt)
    micro_batches = batch("cuda")
    for step in range(2):  # the first one allocates
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            loss, norm = train_step(model, optimizer, micro_batches, 1e-2, 1.0, rt, scaler=scaler)
            result = PendingResult(loss, norm, scaler, rt)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert result.read().loss == float(loss)


def test_generation_is_that_of_the_cpu():
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    expected = small_model("cpu").generate(prompts, 40, temperature=0)
    assert small_model("cuda").generate(prompts, 40, temperature=0) == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_run_resumes_to_the_bit_with_deterministic(data_dir, tmp_path, dtype):
    flags = ("--device", "cuda", "--dtype", dtype, "--compile", "off", "--deterministic")
    flags += ("--checkpoint_every", 10)
    try:
        train_here(data_dir, tmp_path / "whole", *flags)
        train_here(data_dir, tmp_path / "parts", *flags)
        for path in ("model_final.pt", "model_00020.pt"):
            (tmp_path / "parts" / path).unlink(missing_ok=True)
        train_here(data_dir, tmp_path / "parts", *flags, "--resume")
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(tmp_path / "whole/model_final.pt", tmp_path / "parts/model_final.pt")
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
