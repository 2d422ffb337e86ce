"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

    model = GPT(GPTConfig())                     # random weights, 124M parameters
    logits = model(idx)                          # (B, T) int64 -> (B, T, vocab_size)
    loss = model(idx, targets)                   # mean cross-entropy in nats, a scalar
    texts = model.generate([[15496, 11]], 20)    # lists of token ids in, lists of new ids out

Parameters have GPT-2's own names (wte, wpe, h.0.attn.c_attn, ...). OpenAI's weights are loaded by
common/huggingface.py, our checkpoints by common/checkpoint.py, those of other projects by
common/convert.py.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

OPENAI_MODELS = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124M parameters
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}
IGNORE = -100  # a target with this value is not counted in the loss


@dataclass
class GPTConfig:
    """The shape of a model. Raises ValueError if it is impossible."""

    block_size: int = 1024  # longest context in tokens
    vocab_size: int = 50257  # tokens of the tokenizer, and width of the logits
    # rows of wte: more than vocab_size only for speed; 0 = the next multiple of 128
    padded_vocab_size: int = 0
    n_layer: int = 12
    n_head: int = 12  # heads per layer, each n_embd / n_head wide
    n_embd: int = 768
    # heads left in each layer of a pruned model (experiments/pruning.py); None = all
    heads_kept: tuple[int, ...] | None = None
    norm: Literal["pre", "post"] = "pre"  # LayerNorm before each sublayer, or after the sum
    # GELU by the approximation that GPT-2 was trained with, or exact as in nanoGPT
    activation: Literal["gelu_tanh", "gelu"] = "gelu_tanh"
    dropout: float = 0.0

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        # GPUs multiply matrices in tiles: 50304 = 393 * 128 rows are faster than 50257.
        if self.padded_vocab_size == 0:
            self.padded_vocab_size = math.ceil(self.vocab_size / 128) * 128
        if self.padded_vocab_size < self.vocab_size:
            raise ValueError(
                f"padded_vocab_size {self.padded_vocab_size} is below the {self.vocab_size} tokens"
            )
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if self.heads_kept is not None:
            self.heads_kept = tuple(self.heads_kept)  # a checkpoint holds it as a list
            in_range = all(1 <= count <= self.n_head for count in self.heads_kept)
            if len(self.heads_kept) != self.n_layer or not in_range:
                raise ValueError(
                    f"heads_kept is {self.heads_kept}: it needs {self.n_layer} numbers from 1 to "
                    f"{self.n_head}, one per layer"
                )
        if self.norm not in ("pre", "post"):
            raise ValueError(f"norm is {self.norm!r}, must be pre or post")
        if self.activation not in ("gelu_tanh", "gelu"):
            raise ValueError(f"activation is {self.activation!r}, must be gelu_tanh or gelu")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, must be at least 0 and below 1")

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of heads in each layer."""
        return self.heads_kept or (self.n_head,) * self.n_layer

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


# ---------------------------------------------------------------------------------------------
# The model


class KVCache:
    """Keys and values of the tokens read so far, so that generation computes each token once.

    The token at position p is stored in slot p of its row, and a query at position p sees slots 0
    to p. So rows of different lengths need no other bookkeeping. Prompts of 2 and 4 tokens, padded
    on the right, after the prompts were read (_ is padding) and after one more token:

        slot      0  1  2  3             0  1  2  3  4
        row 0     a  b  _  _             a  b  c  _  .      its next token is at position 2
        row 1     p  q  r  s             p  q  r  s  t      its next token is at position 4

    Row 0's new token c overwrites the padding in slot 2; slots 3 and 4 lie after its position.
    """

    def __init__(self, config: GPTConfig, size: int):
        self.size = size
        self.end = 0  # slots in use
        # One tensor per layer, each (B, n_head, size, head_dim), allocated when first used.
        self.keys: list[torch.Tensor | None] = [None] * config.n_layer
        self.values: list[torch.Tensor | None] = [None] * config.n_layer

    def locate(self, positions: torch.Tensor) -> torch.Tensor:
        """Announce the tokens at `positions` (B, T); return the mask of slots that they see."""
        self.positions = positions
        # No row can have a position beyond the number of columns read so far. The largest position
        # itself is known to the device only, and asking for it would wait for all work so far.
        self.end = min(self.end + positions.size(1), self.size)
        slots = torch.arange(self.end, device=positions.device)
        return (slots <= positions[:, :, None])[:, None]  # (B, 1, T, end)

    def update(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k and v (B, n_head, T, head_dim); return keys and values of all slots in use.

        On CPUs both are float32: attention of a few queries to many keys is 6 times as fast as in
        bf16 (bench/README.md).
        """
        keys, values = self.keys[layer], self.values[layer]
        if keys is None or values is None:
            B, n_head, _, head_dim = k.shape
            dtype = torch.float32 if k.device.type == "cpu" else k.dtype
            keys = k.new_zeros(B, n_head, self.size, head_dim, dtype=dtype)
            values = torch.zeros_like(keys)
            self.keys[layer] = keys
            self.values[layer] = values
        # Not by scatter_, which on CPUs converts the whole cache to float32 and back in bf16.
        rows = torch.arange(len(k), device=k.device)[:, None]  # (B, 1); positions may be (1, T)
        keys[rows, :, self.positions] = k.transpose(1, 2).to(keys.dtype)
        values[rows, :, self.positions] = v.transpose(1, 2).to(keys.dtype)
        return keys[:, :, : self.end], values[:, :, : self.end]

    def replace(self, rows: list[int], other: "KVCache"):
        """Take over the slots of another cache, whose rows these are."""
        for mine, theirs in zip(self.keys + self.values, other.keys + other.values):
            assert mine is not None and theirs is not None
            mine[rows, :, : other.size] = theirs


# Longest context for which `attention` stores all scores on a CPU, rather than a block at a time
SHORT_CONTEXT = 512


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, for queries, keys and values (B, n_head, T, head_dim).

    A token sees itself and the earlier ones, or what `mask` says, bool (B, 1, T, T). With a cache
    there are more keys and values than queries.
    """
    B, n_head, T, head_dim = q.shape
    is_short = k.size(2) == T <= SHORT_CONTEXT
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and is_short:
        # Flash attention in bf16 is slow on CPUs: at T=256, forward and backward take 2.6 times as
        # long as these products (bench/README.md).
        if mask is None:
            mask = torch.ones(T, T, dtype=torch.bool).tril()
        bias = q.new_zeros(()).where(mask, -torch.inf)  # (T, T) or (B, 1, T, T)
        bias = bias.expand(B, n_head, T, T).flatten(0, 1)  # (B * n_head, T, T)
        # The same for q, k and v: one batch of matrices for all rows and heads
        q, k, v = (tensor.flatten(0, 1) for tensor in (q, k, v))
        scores = torch.baddbmm(bias, q, k.mT, alpha=head_dim**-0.5)
        probs = F.dropout(scores.softmax(-1), dropout)
        return (probs @ v).view(B, n_head, T, head_dim)

    # Flash attention where the device has it: the scores (T, T) are never stored.
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout
    )


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head = config.heads[layer]
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        width = self.n_head * self.head_dim  # n_embd, unless heads were pruned
        self.c_attn = nn.Linear(config.n_embd, 3 * width)  # query, key and value in one product
        self.c_proj = nn.Linear(width, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None, cache: KVCache | None
    ) -> torch.Tensor:
        B, T, _ = x.shape
        # Each token's query says what it looks for, its key what it offers, its value what it
        # passes on. A head sees its own head_dim columns of them.
        q, k, v = self.c_attn(x).chunk(3, dim=2)  # each (B, T, width)
        q = q.view(B, T, self.n_head, self.head_dim).transpose(1, 2)  # (B, n_head, T, head_dim)
        k = k.view(B, T, self.n_head, self.head_dim).transpose(1, 2)
        v = v.view(B, T, self.n_head, self.head_dim).transpose(1, 2)
        # In generation, x is the new tokens only; keys and values of the earlier ones are stored.
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
            q = q.to(k.dtype)  # that of the cache

        dropout = self.dropout if self.training else 0.0
        y = attention(q, k, v, mask, dropout)  # (B, n_head, T, head_dim)
        y = y.transpose(1, 2).reshape(B, T, -1)  # heads side by side: (B, T, width)
        # The projection mixes what the heads found, and returns to the width of the stream.
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate="tanh" if config.activation == "gelu_tanh" else "none")
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
        # x is the residual stream, (B, T, n_embd): each sublayer reads it and adds to it.
        if self.pre_norm:  # GPT-2
            x = x + self.attn(self.ln_1(x), mask, cache)
            x = x + self.mlp(self.ln_2(x))
        else:  # Post-LN, as in Vaswani et al. 2017
            x = self.ln_1(x + self.attn(x, mask, cache))
            x = self.ln_2(x + self.mlp(x))
        return x


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        # Token embeddings, and also the output head: a token is predicted where the stream points
        # in the direction of its embedding. GPT-2 has no separate weights for the head.
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        # Post-LN blocks already end with a LayerNorm.
        self.ln_f = nn.LayerNorm(config.n_embd) if config.norm == "pre" else nn.Identity()
        # Recompute the blocks in the backward pass instead of keeping their activations.
        self.activation_checkpointing = False
        self.loss = linear_cross_entropy
        self.source = "the model"  # where the weights come from, for error messages
        # nn.Linear and nn.Embedding have drawn weights by other rules.
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Draw weights from N(0, 0.02); biases are zero.

        Each block adds two projections to the residual stream. They are multiplied by
        1 / sqrt(2 * n_layer), so that the stream's variance does not grow with depth.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                parameter.normal_(0.0, 0.02 * (2 * self.config.n_layer) ** -0.5)
            elif parameter.dim() == 2:
                parameter.normal_(0.0, 0.02)
            elif name.endswith("bias"):
                parameter.zero_()

    @torch.no_grad()
    def start_from_frequencies(self, counts: torch.Tensor):
        """Make an untrained model predict each token with its frequency, whatever the context.

        counts: how often each token occurs, (rows of the embedding,).

        Otherwise all tokens are equally likely at first, and learning which are frequent takes the
        first part of a run (Karpathy 2019, "A Recipe for Training Neural Networks", sets the bias
        of the last layer). GPT-2's head has no bias, but the LayerNorm before it has. A constant
        there meets one column of the head's weights, and that column takes the log-frequencies:

            logits = x @ wte.T + constant * wte[:, 0]
        """
        constant = 20.0  # large, so that the column is small in the embeddings of the input
        log_frequencies = (counts + 1).float().log()  # + 1: no logarithm of 0
        # Softmax does not see a shift of all logits; without it the column has the mean zero.
        self.wte.weight[:, 0] = (log_frequencies - log_frequencies.mean()) / constant
        self.ln_f.bias[0] = constant

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B, T, vocab_size) of tokens idx (B, T) int64; with targets, their loss instead.

        The loss is the mean cross-entropy in nats over the targets (B, T) int64 that are not
        IGNORE. It never holds the logits of all tokens at once.
        """
        x = self.hidden(idx)  # (B, T, n_embd)
        if targets is None:
            return self.head(x)
        x = x.flatten(0, 1)  # (B * T, n_embd)
        return self.loss(x, self.wte.weight, targets.flatten(), self.config.vocab_size)

    def hidden(
        self,
        idx: torch.Tensor,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """Final hidden states (B, T, n_embd) of tokens idx (B, T) int64.

        positions: (B, T) int64, each token's position; default 0, 1, 2, ...
        mask: (B, 1, T, T) bool, which tokens each one sees; default the earlier ones and itself.
        cache: with it, tokens also see those read before. It needs positions, and no mask.
        """
        # Callers that give positions have cut their texts to the context themselves.
        if positions is None:
            length = idx.size(1)
            if length > self.config.block_size:
                raise ValueError(f"{length} tokens exceed the context of {self.config.block_size}")
            positions = torch.arange(length, device=idx.device)[None]  # (1, T)
        if cache is not None:
            mask = cache.locate(positions)

        x = self.drop(self.wte(idx) + self.wpe(positions))  # (B, T, n_embd)
        for block in self.h:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, cache, use_reentrant=False)
            else:
                x = block(x, mask, cache)
        return self.ln_f(x)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (..., vocab_size) of hidden states (..., n_embd)."""
        return F.linear(x, self.wte.weight)[..., : self.config.vocab_size]

    def num_params(self) -> int:
        """Number of parameters, without padding rows: 124,439,808 for GPT-2.

        The embedding, which is also the head, counts once.
        """
        padding = (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd
        return sum(p.numel() for p in self.parameters()) - padding

    def flops_per_token(self, T: int) -> float:
        """FLOPs of one token's forward and backward pass at sequence length T.

        6 for each parameter that takes part in a matrix product (all but wpe), and
        12 * head_dim * T for each head (Chowdhery et al. 2022, "PaLM", appendix B). Causal masking
        is not deducted, recomputation is not added.
        """
        attention = 12 * sum(self.config.heads) * self.config.head_dim * T
        return 6 * (self.num_params() - self.wpe.weight.numel()) + attention

    # -----------------------------------------------------------------------------------------
    # Generation

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

        temperature: 0 is greedy.
        top_k: draw from the k most likely tokens only.
        top_p: draw from the most likely tokens that together reach this probability (Holtzman et
            al. 2020, "The Curious Case of Neural Text Degeneration").

        A text may be longer than the context: the model then sees a window at its end. Positions
        are absolute and learned, so the tokens of a window that has moved have to be read again.
        It therefore moves rarely, but then by half of its size (window_step): a pass over half a
        window for every block_size / 2 tokens. With a block_size of 8, tokens a to m:

            text       a b c d e f g h i j k l m
            window 1   a b c d e f g h
            window 2           e f g h i j k l       i is where e to i are read in one pass
            window 3                   i j k l m     the same at m

        The window depends only on the length of the text, not on where its prompt ended.

        Raises ValueError for an empty prompt, FloatingPointError if the logits are not finite.
        """
        if not prompts or not all(prompts):
            raise ValueError("the prompt is empty: give at least one token")
        block_size = self.config.block_size
        # What the model sees of each text. A long prompt begins with a window that has moved.
        windows = [prompt[self.window_start(len(prompt)) :] for prompt in prompts]
        device = self.wte.weight.device
        # A generator of its own: drawing does not depend on, or disturb, other random numbers.
        generator = torch.Generator(device).manual_seed(seed)
        longest = max(len(window) for window in windows)
        cache = KVCache(self.config, min(longest + max_tokens, block_size))
        x, last = self.read(windows, cache)  # (B, n_embd), (B,)

        for n in range(max_tokens):
            tokens = sample_token(self.head(x), temperature, top_k, top_p, generator)  # (B,)
            # The only wait for the device: the caller decides by these tokens whether to go on.
            new_ids = tokens.tolist()
            if min(new_ids) < 0:
                raise FloatingPointError("the logits are not finite")
            yield new_ids
            if n + 1 == max_tokens:
                break

            # The new tokens come behind the last ones. Where a window is full, it moves.
            last = last + 1
            for window, token in zip(windows, new_ids):
                window.append(token)
            full = [row for row, window in enumerate(windows) if len(window) > block_size]
            if full:
                for row in full:
                    del windows[row][: self.window_step]
                moved = KVCache(self.config, len(windows[full[0]]))  # all have this length
                _, positions = self.read([windows[row] for row in full], moved)
                cache.replace(full, moved)
                last[full] = positions

            # Rows that moved compute this token a second time; skipping them would complicate the
            # code.
            x = self.hidden(tokens[:, None], last[:, None], cache=cache)[:, 0]

    @property
    def window_step(self) -> int:
        """By how many tokens the window moves when a text has filled it."""
        return max(1, self.config.block_size // 2)

    def window_start(self, length: int) -> int:
        """Where the window begins in a text of `length` tokens: 0 if all of it fits."""
        moves = math.ceil((length - self.config.block_size) / self.window_step)
        return max(0, moves * self.window_step)

    def read(self, windows: list[list[int]], cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
        """Fill an empty cache with the tokens of windows of any lengths.

        Returns the hidden state (B, n_embd) and the position (B,) of each window's last token.
        """
        # Padded on the right. KVCache says why the padding does no harm.
        device = self.wte.weight.device
        longest = max(len(window) for window in windows)
        padded = [window + [0] * (longest - len(window)) for window in windows]
        idx = torch.tensor(padded, device=device)  # (B, longest)
        positions = torch.arange(longest, device=device).expand_as(idx)
        x = self.hidden(idx, positions, cache=cache)  # (B, longest, n_embd)
        last = torch.tensor([len(window) - 1 for window in windows], device=device)  # (B,)
        return x[torch.arange(len(windows), device=device), last], last

    def generate(
        self, prompts: list[list[int]], max_tokens: int, stop_token: int | None = None, **sampling
    ) -> list[list[int]]:
        """Up to max_tokens new token ids for each prompt, ending before stop_token.

        `sampling` are the arguments of `stream`.
        """
        outputs: list[list[int]] = [[] for _ in prompts]
        running = set(range(len(prompts)))
        was_training = self.training
        self.eval()
        try:
            for tokens in self.stream(prompts, max_tokens, **sampling):
                # Texts that have ended are still computed, but their tokens are dropped: what one
                # text says does not depend on when another one ends.
                running -= {row for row in running if tokens[row] == stop_token}
                for row in running:
                    outputs[row].append(tokens[row])
                if not running:
                    break
        finally:
            self.train(was_training)
        return outputs


def sample_token(
    logits: torch.Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> torch.Tensor:
    """Draw token ids (B,) from logits (B, vocab_size).

    The id is -1 where a logit is not finite: softmax and argmax would still return a token, but a
    meaningless one. The caller, who must read the ids anyway, raises the error.
    """
    logits = logits.float()
    # Infinity and NaN survive a sum; a single pass over the logits.
    is_finite = logits.sum(-1).isfinite()  # (B,)
    # Dividing by it is not possible; the limit is the most likely token.
    if temperature == 0:
        return logits.argmax(-1).where(is_finite, -1)
    # Without the maximum, tiny temperatures can't overflow.
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None:
        probs, order = logits.softmax(-1).sort(descending=True)
        # A token is left out if the more likely ones already reach top_p.
        outside = probs.cumsum(-1) - probs >= top_p
        logits = logits.masked_fill(outside.scatter(1, order, outside), -torch.inf)
    # An exponential race: token i wins, with the largest p_i / noise_i, with probability p_i.
    # torch.multinomial draws one token in the same way, but its checks wait for the device.
    noise = torch.empty_like(logits).exponential_(generator=generator)
    return (logits.softmax(-1) / noise).argmax(-1).where(is_finite, -1)


# ---------------------------------------------------------------------------------------------
# The loss


def linear_cross_entropy(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """Mean cross-entropy in nats (scalar, float32) of the logits x @ weight.T.

    x: hidden states (N, C). weight: (V, C), of which only the first vocab_size rows are tokens.
    targets: (N,) int64, IGNORE to leave a token out. Matrix products run in autocast's dtype.

    PyTorch 2.13 has F.linear_cross_entropy, which also works in chunks with `options`. It counts
    padding rows as tokens, and is slow on CPUs: for 1,024 tokens of width 384 and GPT-2's
    vocabulary in float32, forward and backward took 14.5 s, here 1.5 s, and with all logits at once
    1.4 s (medians of two, interleaved; 2 cores of an AMD EPYC with AVX2, torch 2.13.0).
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    with torch.autocast(device, enabled=False):
        return LinearCrossEntropy.apply(x, weight, targets, vocab_size, dtype, needs_grad)


# A power of two, so that scaling by it rounds nothing. (Not an attribute of the class below, which
# torch.compile could not read.)
GAIN = 1024.0
# Logits that a CPU turns into probabilities at a time: 8 MB in float32, which its cache holds.
CACHED_LOGITS = 2**21


def logits_to_gradient(
    rows: torch.Tensor,
    targets: torch.Tensor,
    share: torch.Tensor,
    vocab_size: int,
    needs_grad: bool,
) -> torch.Tensor:
    """The weighted sum of the losses of a few tokens (scalar, float32).

    rows: their logits (n, V). Replaced by softmax - onehot if needs_grad, times GAIN in float16.
    targets: (n, 1) int64. share: (n, 1), the weights of the tokens.
    """
    logits = rows.float()  # in float32 not a copy
    logits[:, vocab_size:] = -torch.inf  # padding rows get no probability
    target_logits = logits.gather(1, targets)

    # The softmax overwrites the logits. Its largest entry gives the logsumexp without another pass
    # over them: log p_max = max - lse.
    highest = logits.amax(-1, keepdim=True)
    probs = torch.softmax(logits, -1, out=logits)
    lse = highest - probs.amax(-1, keepdim=True).log()

    if needs_grad:
        # Not by scatter_add_, which has no deterministic CUDA kernel.
        probs[torch.arange(len(rows), device=rows.device), targets[:, 0]] -= 1
        if rows.dtype == torch.float16:
            probs *= GAIN
        rows.copy_(probs)  # in float32 onto itself: nothing happens
    return ((lse - target_logits) * share).sum()


class LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of a linear layer without ever holding all of its logits.

    The logits (N, V) are the largest tensor of a training step. They are computed for an eighth of
    the tokens at a time, or for 1,024 if that is more, and each part's gradients are computed at
    once in the forward pass:

        grad of logits = (softmax(logits) - onehot(target)) * share,   share = 1 / counted tokens
        grad of x      = grad of logits @ weight
        grad of weight = grad of logits.T @ x

    so that the backward pass only multiplies them by the incoming gradient. A consequence is that
    there is no second derivative.

    float16 needs care: it cannot represent numbers below 6e-8, among them most probabilities, and
    a share of 1 / 65,536 keeps few of its digits. The scale of torch.amp.GradScaler does not help:
    it arrives with the incoming gradient, after they were rounded. So the factors of the products
    are scaled here, and the results scaled back in float32. With d = softmax - onehot:

        grad of x      = (GAIN * d) @ weight            * share / GAIN
        grad of weight = (GAIN * d).T @ (x / part)      * share / GAIN * part

    `part` is the number of tokens in a part. The second product is thus GAIN times a mean over
    tokens, and cannot exceed float16's largest number while hidden states are below 64.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size: int, dtype: torch.dtype, needs_grad: bool):
        valid = targets != IGNORE
        share = (valid / valid.sum().clamp(min=1))[:, None]  # (N, 1) weight of a token in the mean
        # Shorter parts would make slow products.
        part = min(len(x), max(1024, math.ceil(len(x) / 8)))
        is_float16 = dtype == torch.float16
        # x_share is the factor of x in the gradient of weight.
        x_share = valid[:, None] / part if is_float16 else share
        w = weight.to(dtype)
        loss = torch.zeros((), device=x.device)
        grads_x = []
        grad_w = None  # summed in float32

        # All parts use the same buffer: on CPUs, allocating a large tensor is expensive.
        buffer = torch.empty(part, len(w), dtype=dtype, device=x.device)  # (part, V)
        # On CPUs the softmax takes a few rows at a time, which stay in the cache.
        few = max(1, CACHED_LOGITS // len(w)) if x.device.type == "cpu" else part
        per_token = (x.to(dtype), targets, valid, share, x_share)
        parts = zip(*(tensor.split(part) for tensor in per_token))
        for part_x, part_targets, part_valid, part_share, part_x_share in parts:
            logits = torch.mm(part_x, w.t(), out=buffer[: len(part_x)])
            part_targets = part_targets.where(part_valid, 0)[:, None]  # (part, 1)
            per_row = (logits, part_targets, part_share)
            for rows, row_targets, row_share in zip(*(tensor.split(few) for tensor in per_row)):
                # Not in place: torch.compile of PyTorch 2.11 would return a loss without gradients.
                loss = loss + logits_to_gradient(
                    rows, row_targets, row_share, vocab_size, needs_grad
                )

            if needs_grad:
                grad = logits  # as logits_to_gradient has made of it
                # The share is applied to the narrow factors (part, C), not to (part, V).
                grads_x.append((grad @ w) * part_share)
                shared_x = (part_x * part_x_share).to(dtype)
                if grad_w is None:
                    grad_w = (grad.t() @ shared_x).to(weight.dtype)
                elif dtype == weight.dtype:
                    grad_w.addmm_(grad.t(), shared_x)
                else:
                    grad_w.add_(grad.t() @ shared_x)
        if grad_w is not None:
            grad_x = torch.cat(grads_x)  # (N, C)
            if is_float16:
                grad_x /= GAIN
                grad_w *= share.amax() * (part / GAIN)
            ctx.save_for_backward(grad_x, grad_w)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_w = ctx.saved_tensors
        return grad_x.mul_(grad_loss), grad_w.mul_(grad_loss), None, None, None, None
