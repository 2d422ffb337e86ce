"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"), whole but for its loss.

    model = GPT(GPTConfig())                     # random weights, 124M
    logits = model(idx)                          # (B, T) int64 -> (B, T, vocab_size)
    loss = model(idx, targets)                   # mean cross-entropy in nats, a scalar
    texts = model.generate([[15496, 11]], 20)    # lists of token ids in, lists of new token ids out

Parameters carry GPT-2's own names (wte, wpe, h.0.attn.c_attn, ...).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # a target with this value does not count
OPENAI_MODELS = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124M parameters
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}


@dataclass
class GPTConfig:
    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50257  # the tokenizer's tokens: logits are this wide
    padded_vocab_size: int = (
        0  # rows of wte, more than vocab_size for speed only; 0 = the next multiple of 128
    )
    n_layer: int = 12
    n_head: int = 12  # heads per layer, each n_embd / n_head wide
    n_embd: int = 768
    heads_kept: tuple[int, ...] | None = (
        None  # heads left in each layer of a pruned model (pruning.py); None = all
    )
    norm: Literal["pre", "post"] = (
        "pre"  # LayerNorm before each sublayer, or after the residual sum
    )
    dropout: float = 0.0

    def __post_init__(self):
        self.padded_vocab_size = self.padded_vocab_size or math.ceil(self.vocab_size / 128) * 128
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if self.heads_kept is not None:
            self.heads_kept = tuple(self.heads_kept)
            if len(self.heads_kept) != self.n_layer or not all(
                1 <= n <= self.n_head for n in self.heads_kept
            ):
                raise ValueError(
                    f"heads_kept is {self.heads_kept}: each of {self.n_layer} layers keeps between 1 and {self.n_head}"
                )
        if self.padded_vocab_size < self.vocab_size:
            raise ValueError(
                f"{self.padded_vocab_size} embedding rows are fewer than the {self.vocab_size} tokens"
            )
        if self.norm not in ("pre", "post"):
            raise ValueError(f"norm is {self.norm!r}, must be pre or post")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, must be at least 0 and below 1")

    @property
    def heads(self) -> tuple[int, ...]:
        """Heads in each layer."""
        return self.heads_kept or (self.n_head,) * self.n_layer

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


class KVCache:
    """Keys and values of the tokens read so far, so that generation computes each token once.

    A token at position p lies in slot p of its row, and a query at position p sees the slots up to p:
    rows of different lengths need no other bookkeeping.
    """

    def __init__(self, config: GPTConfig, size: int):
        self.size = size
        self.keys = [None] * config.n_layer  # each (B, n_head, size, head_dim)
        self.values = [None] * config.n_layer

    def locate(self, positions: torch.Tensor) -> torch.Tensor:
        """Prepare for tokens at `positions` (B, T), the slots that they go to; return which ones they see."""
        self.positions = positions
        self.end = int(positions.max()) + 1
        slots = torch.arange(self.end, device=positions.device)
        return (slots <= positions[:, :, None])[:, None]  # (B, 1, T, end)

    def update(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k and v (B, n_head, T, head_dim); return all keys and values up to the last position."""
        if self.keys[layer] is None:
            B, n_head, _, head_dim = k.shape
            self.keys[layer] = k.new_zeros(B, n_head, self.size, head_dim)
            self.values[layer] = v.new_zeros(B, n_head, self.size, head_dim)
        index = self.positions[:, None, :, None].expand_as(k)
        self.keys[layer].scatter_(2, index, k)
        self.values[layer].scatter_(2, index, v)
        return self.keys[layer][:, :, : self.end], self.values[layer][:, :, : self.end]


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head, self.head_dim = config.heads[layer], config.head_dim
        self.dropout = config.dropout
        width = self.n_head * self.head_dim
        self.c_attn = nn.Linear(config.n_embd, 3 * width)  # query, key, value
        self.c_proj = nn.Linear(width, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None, cache: KVCache | None
    ) -> torch.Tensor:
        B, T, _ = x.shape
        q, k, v = self.c_attn(x).chunk(3, dim=2)
        q, k, v = (
            t.view(B, T, self.n_head, self.head_dim).transpose(1, 2) for t in (q, k, v)
        )  # (B, nh, T, hd)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout
        )
        y = y.transpose(1, 2).reshape(B, T, -1)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate="tanh")  # the approximation that GPT-2 was trained with
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.pre_norm = config.norm == "pre"
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None, cache: KVCache | None
    ) -> torch.Tensor:
        if self.pre_norm:
            x = x + self.attn(self.ln_1(x), mask, cache)
            return x + self.mlp(self.ln_2(x))
        x = self.ln_1(x + self.attn(x, mask, cache))
        return self.ln_2(x + self.mlp(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        # Post-LN blocks already end in a LayerNorm.
        self.ln_f = nn.LayerNorm(config.n_embd) if config.norm == "pre" else nn.Identity()
        self.activation_checkpointing = (
            False  # compute the blocks' activations again in the backward pass
        )
        self.loss = linear_cross_entropy
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """N(0, 0.02), with the projections into the residual stream scaled down by the number of those sums."""
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                parameter.normal_(0.0, 0.02 * (2 * self.config.n_layer) ** -0.5)
            elif parameter.dim() == 2:
                parameter.normal_(0.0, 0.02)
            elif name.endswith("bias"):
                parameter.zero_()

    def hidden(
        self,
        idx: torch.Tensor,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """Final hidden states (B, T, n_embd) of tokens idx (B, T) int64.

        `positions` (B, T) int64 says where in its row each token stands if not at 0, 1, 2, ...; `mask` (B, 1, T, T)
        bool which tokens it sees if not the earlier ones. With a cache, which takes positions and no mask, it sees the
        tokens read before, too.
        """
        if positions is None:
            if idx.size(1) > self.config.block_size:
                raise ValueError(
                    f"{idx.size(1)} tokens are more than the model's context of {self.config.block_size}"
                )
            positions = torch.arange(idx.size(1), device=idx.device)[None]
        if cache is not None:
            mask = cache.locate(positions)
        x = self.drop(self.wte(idx) + self.wpe(positions))
        for block in self.h:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, cache, use_reentrant=False)
            else:
                x = block(x, mask, cache)
        return self.ln_f(x)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (..., vocab_size) of hidden states (..., n_embd)."""
        return F.linear(x, self.wte.weight)[..., : self.config.vocab_size]

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B, T, vocab_size) of idx (B, T) int64; with targets (B, T) int64, their mean loss in nats instead.

        Targets equal to IGNORE do not count. The loss never holds the logits of all tokens at once.
        """
        x = self.hidden(idx)
        if targets is None:
            return self.head(x)
        return self.loss(
            x.flatten(0, 1), self.wte.weight, targets.flatten(), self.config.vocab_size
        )

    def num_params(self) -> int:
        """Parameters, the tied embedding once and padding rows not at all: 124,439,808 for GPT-2."""
        padding = (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd
        return sum(p.numel() for p in self.parameters()) - padding

    def flops_per_token(self, T: int) -> float:
        """Model FLOPs of one token's forward and backward pass at sequence length T.

        6 per parameter that takes part in a matrix product (all but wpe) and 12 * head_dim * T per head for attention:
        Chowdhery et al. 2022 ("PaLM"), appendix B. Causal masking is not deducted, recomputation not added.
        """
        attention = 12 * sum(self.config.heads) * self.config.head_dim * T
        return 6 * (self.num_params() - self.wpe.weight.numel()) + attention

    @torch.no_grad()
    def stream(
        self,
        prompts: list[list[int]],
        max_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 42,
    ) -> Iterator[list[int]]:
        """Yield the next token id of each prompt, max_tokens times.

        temperature 0 is greedy. top_k keeps the k likeliest tokens, top_p the likeliest ones that together reach
        probability p (Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration").
        Raises ValueError for an empty prompt, or when the longest prompt and its continuation pass block_size.
        """
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths, default=0)
        if not prompts or min(lengths) == 0:
            raise ValueError("the prompt is empty: give at least one token")
        if longest + max_tokens > self.config.block_size:
            raise ValueError(
                f"a prompt of {longest} tokens and {max_tokens} new ones do not fit the context of "
                f"{self.config.block_size} tokens: shorten the prompt or lower max_tokens"
            )
        device = self.wte.weight.device
        generator = torch.Generator(device).manual_seed(seed)
        cache = KVCache(self.config, longest + max_tokens)
        # Rows are padded on the right: a pad's slot is overwritten before any later token can see it.
        idx = torch.tensor(
            [prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device
        )
        positions = torch.arange(longest, device=device).expand_as(idx)
        last = torch.tensor(lengths, device=device) - 1  # position of each row's newest token
        x = self.hidden(idx, positions, cache=cache)[
            torch.arange(len(prompts), device=device), last
        ]
        for n in range(max_tokens):
            tokens = sample_token(self.head(x), temperature, top_k, top_p, generator)
            yield tokens.tolist()
            if n + 1 < max_tokens:
                last = last + 1
                x = self.hidden(tokens[:, None], last[:, None], cache=cache)[:, 0]

    def generate(
        self, prompts: list[list[int]], max_tokens: int, stop_token: int | None = None, **sampling
    ):
        """Up to max_tokens new token ids for each prompt, ending before stop_token. Sampling as in `stream`."""
        outputs = [[] for _ in prompts]
        running = set(range(len(prompts)))
        was_training = self.training
        self.eval()
        try:
            for tokens in self.stream(prompts, max_tokens, **sampling):
                running -= {row for row in running if tokens[row] == stop_token}
                for row in running:
                    outputs[row].append(tokens[row])
                if not running:
                    break
        finally:
            self.train(was_training)
        return outputs


def sample_token(
    logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None, generator
):
    """Draw one token id (B,) from logits (B, vocab_size)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None:
        probs, order = logits.softmax(-1).sort(descending=True)
        outside = probs.cumsum(-1) - probs >= top_p  # the tokens before it already reach top_p
        logits = logits.masked_fill(outside.scatter(1, order, outside), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of x @ weight.T against targets, an eighth of the tokens at a time.

    Each part's gradient is computed while its logits are there, so that they need not be kept or computed again:
    of the (N, V) logits only an eighth ever exists, and it is passed over no more than need be.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size: int, dtype: torch.dtype, needs_grad: bool):
        valid = targets != IGNORE
        share = (valid / valid.sum().clamp(min=1))[:, None]  # of each token in the mean
        w = weight.to(dtype)
        loss = torch.zeros((), device=x.device)
        grads_x = []
        grad_w = torch.zeros_like(weight) if needs_grad else None  # summed in float32
        part = max(256, math.ceil(len(x) / 8))
        rows = torch.arange(part, device=x.device)
        buffer = torch.empty(
            part, len(w), dtype=dtype, device=x.device
        )  # new memory is dear on CPUs
        for xs, ts, vs, ss in zip(
            x.to(dtype).split(part), targets.split(part), valid.split(part), share.split(part)
        ):
            logits = torch.mm(xs, w.t(), out=buffer[: len(xs)]).float()
            logits[:, vocab_size:] = -torch.inf  # padding rows take no probability
            ts = ts.where(vs, 0)[:, None]
            target_logits = logits.gather(1, ts)
            highest = logits.amax(-1, keepdim=True)
            probs = torch.softmax(logits, -1, out=logits)
            lse = highest - probs.amax(-1, keepdim=True).log()
            loss += ((lse - target_logits) * ss).sum()
            if needs_grad:
                probs[rows[: len(ts)], ts[:, 0]] -= (
                    1  # not scatter_add_: it has no deterministic CUDA kernel
                )
                grad = probs.to(dtype)
                grads_x.append((grad @ w) * ss)
                shared_x = (xs * ss).to(dtype)
                if dtype == weight.dtype:
                    grad_w.addmm_(grad.t(), shared_x)
                else:
                    grad_w.add_(grad.t() @ shared_x)
        if needs_grad:
            ctx.save_for_backward(torch.cat(grads_x).to(x.dtype), grad_w)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_w = ctx.saved_tensors
        return grad_x.mul_(grad_loss), grad_w.mul_(grad_loss), None, None, None, None


def linear_cross_entropy(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """Mean loss in nats (scalar, float32) of hidden states x (N, C) against targets (N,) int64 under the logits
    x @ weight.T, of which only the first vocab_size columns count. Matrix products run in autocast's dtype."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    with torch.autocast(device, enabled=False):
        return LinearCrossEntropy.apply(x, weight, targets, vocab_size, dtype, needs_grad)
