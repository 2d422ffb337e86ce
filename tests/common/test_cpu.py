"""Faster products for generation and scoring: the same model."""

import pytest
import torch

from common.cpu import can_pack, for_generation, for_scoring
from common.runtime import Runtime
from model import GPT, GPTConfig

DEVICE = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    not can_pack(DEVICE, torch.float32), reason="PyTorch without oneDNN"
)


def make_model(**more) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=300, n_layer=3, n_head=4, n_embd=64, **more))
    # Inputs of GELU for which its variants differ
    for block in model.h:
        block.mlp.c_fc.weight.data *= 10
    return model.eval()


@pytest.mark.parametrize("num_texts", [1, 3])
@pytest.mark.parametrize(
    "more", [{}, dict(norm="post"), dict(heads_kept=(4, 1, 3)), dict(activation="gelu")]
)
def test_it_writes_the_same_texts(more, num_texts, monkeypatch):
    # Otherwise it would depend on the processor whether one text means SplitLinear.
    monkeypatch.setattr("common.cpu.has_fast_bf16", lambda device: False)
    model = make_model(**more)
    prompts = [[1, 2, 3], [4] * 20, [5]][:num_texts]
    replica = for_generation(model, torch.float32, num_texts)
    assert replica.generate(prompts, 40, temperature=0) == model.generate(
        prompts, 40, temperature=0
    )
    idx = torch.randint(300, (2, 50))
    with torch.no_grad():
        assert torch.allclose(replica(idx), model(idx), atol=1e-5)
        assert replica(idx).shape == (2, 50, 300)


@pytest.mark.parametrize("num_texts", [1, 3])
def test_the_model_itself_stays_as_it_was(num_texts):
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    replica = for_generation(model, torch.float32, num_texts)
    assert replica.wte.weight is model.wte.weight
    assert replica.ln_f.weight is model.ln_f.weight
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()
    model(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64)).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu"])
def test_scoring_copy_has_the_same_logits(activation, monkeypatch):
    monkeypatch.setattr("common.cpu.has_fast_bf16", lambda device: True)
    model = make_model(activation=activation)
    replica = for_scoring(model, Runtime(DEVICE, torch.float32), 100)
    assert replica is not model
    idx = torch.randint(300, (2, 50))
    with torch.no_grad():
        assert torch.allclose(replica(idx), model(idx), atol=1e-5)
        assert replica(idx).shape == (2, 50, 300)


@pytest.mark.skipif(not can_pack(DEVICE, torch.bfloat16), reason="no bf16 on this processor")
def test_bfloat16_is_as_near_as_autocast():
    model = make_model()
    idx = torch.randint(300, (2, 50))
    with torch.no_grad():
        exact = model(idx)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = (model(idx) - exact).abs().max()
        assert (for_generation(model, torch.bfloat16, 8)(idx) - exact).abs().max() < 2 * autocast
