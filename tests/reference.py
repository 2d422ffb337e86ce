"""Random models, and transformers' GPT-2 with the same weights: what several tests compare with."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from model import GPT, GPTConfig

V = 300  # not a multiple of 128, so that wte has padding rows
TINY = dict(block_size=256, vocab_size=V, n_layer=3, n_head=4, n_embd=64)


def shake(model: torch.nn.Module, seed: int = 0):
    """Make all values random, biases and LayerNorms too, so that no two tensors can be confused."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    return model.eval()


def random_model(seed: int = 0, **changes) -> GPT:
    torch.manual_seed(seed)
    return shake(GPT(GPTConfig(**TINY | changes)), seed)


def random_tokens(*shape: int, vocab_size: int = V, seed: int = 1) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def random_reference() -> GPT2LMHeadModel:
    """transformers' model in eval mode, with eager attention, not the kernel that ours uses."""
    sizes = {"n_positions" if name == "block_size" else name: size for name, size in TINY.items()}
    torch.manual_seed(0)
    config = GPT2Config(
        **sizes, bos_token_id=V - 1, eos_token_id=V - 1, attn_implementation="eager"
    )
    return shake(GPT2LMHeadModel(config))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    assert a.shape == b.shape
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def same_logits(model: GPT, reference: GPT2LMHeadModel) -> bool:
    idx = random_tokens(2, 33)
    with torch.no_grad():
        logits = reference(idx).logits
        assert logits.std() > 0.5  # else there would be nothing to compare
        return torch.allclose(model(idx), logits, rtol=0, atol=1e-4)
