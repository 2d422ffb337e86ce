"""LoRA adapters: what is trained, where they start, and merging them into an ordinary model."""

import pytest
import torch

from common import lora
from common.optim import make_adamw, train_step
from common.runtime import Runtime
from model import GPT, GPTConfig

CPU = Runtime(torch.device("cpu"), torch.float32)
SHAPE = dict(vocab_size=50, n_layer=2, n_head=2, n_embd=32, block_size=16)


@pytest.fixture
def plain() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**SHAPE))


@pytest.fixture
def adapted(plain) -> GPT:
    """The same model with adapters of rank 4."""
    model = GPT(GPTConfig(**SHAPE))
    model.load_state_dict(plain.state_dict())
    lora.add_adapters(model, rank=4)
    return model


def inputs() -> torch.Tensor:
    return torch.randint(50, (4, 16), generator=torch.Generator().manual_seed(1))


def train(model: GPT, steps: int):
    optimizer = make_adamw(model, 1e-2, 0.0, (0.9, 0.95), 1e-8)
    x = inputs()
    for _ in range(steps):
        train_step(model, optimizer, [(x, x.roll(-1, 1))], 1e-2, 1.0, CPU)


def test_only_the_adapters_are_trained(plain, adapted):
    trained = [p for p in adapted.parameters() if p.requires_grad]
    # Per block, rank * (in + out) of c_attn, c_proj, c_fc and the MLP's c_proj.
    per_block = 4 * ((32 + 96) + (32 + 32) + (32 + 128) + (128 + 32))
    assert sum(p.numel() for p in trained) == 2 * per_block
    train(adapted, 3)
    frozen = {
        name.replace(".base.", "."): tensor
        for name, tensor in adapted.state_dict().items()
        if not name.endswith((".A", ".B"))
    }
    before = plain.state_dict()
    assert frozen.keys() == before.keys()
    assert all(torch.equal(frozen[name], before[name]) for name in before)


def test_the_adapted_model_starts_as_the_pretrained_one_and_can_learn(plain, adapted):
    assert torch.equal(adapted(inputs()), plain(inputs()))
    adapted(inputs(), inputs().roll(-1, 1)).backward()
    adapter = adapted.h[0].attn.c_attn
    assert adapter.B.grad.abs().max() > 0
    assert adapter.A.grad.abs().max() == 0, "A follows when B has left zero"
    before = adapter.A.detach().clone()
    train(adapted, 2)
    assert not torch.equal(adapter.A, before)


def test_a_merged_model_computes_the_same_after_training(plain, adapted):
    original = plain(inputs())
    train(adapted, 25)
    plain.load_state_dict(lora.merged_state(adapted))
    assert (adapted(inputs()) - plain(inputs())).abs().max() < 1e-4
    assert (plain(inputs()) - original).abs().max() > 0.1


def test_adapter_state_holds_the_adapters_alone(plain, adapted):
    assert lora.adapter_state(plain) == {}
    state = lora.adapter_state(adapted)
    assert len(state) == 2 * 4 * 2  # blocks x linear layers x (A and B)
    assert state["h.1.mlp.c_fc.A"].shape == (4, 32)
    assert state["h.1.mlp.c_fc.B"].shape == (128, 4)


def test_a_rank_below_one_is_rejected(plain):
    with pytest.raises(ValueError, match="lora_rank is 0"):
        lora.add_adapters(plain, 0)
