"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"), whole but for its loss.

    model = GPT(GPTConfig())                     # random weights, 124M
    model = GPT.from_pretrained("gpt2")          # OpenAI's weights; or a folder in Hugging Face's layout
    logits = model(idx)                          # (B, T) int64 -> (B, T, vocab_size)
    loss = model(idx, targets)                   # mean cross-entropy in nats, a scalar
    texts = model.generate([[15496, 11]], 20)    # lists of token ids in, lists of new token ids out

Parameters carry GPT-2's own names (wte, wpe, h.0.attn.c_attn, ...).
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from loss import linear_cross_entropy

SIZES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124M parameters
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}
HF_FIXED = dict(  # what may vary in Hugging Face's configurations, but not here
    model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5, scale_attn_weights=True,
    scale_attn_by_inverse_layer_idx=False, tie_word_embeddings=True,
)  # fmt: skip


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

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, dropout: float = 0.0) -> "GPT":
        """Read a model in Hugging Face's GPT-2 layout (config.json and safetensors): a local folder, or a hub name.

        `gpt2` ... `gpt2-xl` are OpenAI's weights. Raises ValueError if it is no GPT-2, OSError if it can't be had.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(name_or_folder)
        if not folder.is_dir():
            folder = download(str(name_or_folder))
        files, config_file = sorted(folder.glob("model*.safetensors")), folder / "config.json"
        if not files or not config_file.exists():
            raise ValueError(
                f"{folder} holds no model: config.json and model.safetensors are needed"
            )
        try:
            hf = dict(n_positions=1024, vocab_size=50257, **SIZES["gpt2"]) | json.loads(
                config_file.read_bytes()
            )
            weights = {
                k.removeprefix("transformer."): v
                for file in files
                for k, v in load_file(file).items()
            }
        except (SafetensorError, ValueError, TypeError) as error:
            raise ValueError(
                f"{folder} can't be read, it is damaged or incomplete: {error}"
            ) from error
        for key, value in HF_FIXED.items():
            if hf.get(key, value) != value:
                raise ValueError(
                    f"{folder} is no GPT-2 that fits here: its {key} is {hf[key]}, not {value}"
                )
        config = GPTConfig(
            block_size=hf["n_positions"], vocab_size=hf["vocab_size"], dropout=dropout,
            n_layer=hf["n_layer"], n_head=hf["n_head"], n_embd=hf["n_embd"],
        )  # fmt: skip
        model = cls(config)
        state = model.state_dict()
        missing = sorted(state.keys() - weights.keys())
        if missing:
            raise ValueError(f"{folder} lacks the tensors {', '.join(missing[:3])} ...")
        for (
            name,
            ours,
        ) in state.items():  # a file may also hold lm_head, which is wte, and the causal mask
            tensor = weights[name].t() if is_transposed(name) else weights[name]
            if name == "wte.weight":
                tensor = F.pad(tensor, (0, 0, 0, config.padded_vocab_size - config.vocab_size))
            if tensor.shape != ours.shape:
                raise ValueError(
                    f"{folder}: {name} is {tuple(tensor.shape)}, expected {tuple(ours.shape)}"
                )
            ours.copy_(tensor)
        return model

    def save_pretrained(self, folder: str | Path):
        """Write config.json and model.safetensors as Hugging Face's GPT2LMHeadModel reads them. Heads that were pruned
        are written as zeros."""
        from safetensors.torch import save_file

        c = self.config
        if c.norm != "pre":
            raise ValueError(
                "a Post-LN model can't be exported: Hugging Face's GPT-2 is Pre-LN only"
            )
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {}
        for name, tensor in self.state_dict().items():
            tensor = (
                tensor[: c.vocab_size]
                if name == "wte.weight"
                else pad_heads(name, tensor, c.n_embd)
            )
            tensor = tensor.t() if is_transposed(name) else tensor
            weights[f"transformer.{name}"] = tensor.cpu().clone(
                memory_format=torch.contiguous_format
            )
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        hf = HF_FIXED | dict(
            architectures=["GPT2LMHeadModel"], n_positions=c.block_size, n_ctx=c.block_size, vocab_size=c.vocab_size,
            n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd,
            bos_token_id=c.vocab_size - 1, eos_token_id=c.vocab_size - 1,
            resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout,
        )  # fmt: skip
        (folder / "config.json").write_text(json.dumps(hf, indent=2) + "\n")

    def config_dict(self) -> dict:
        """The configuration as plain values: GPT(GPTConfig(**d)) makes the same shape again."""
        return asdict(self.config)


def pad_heads(name: str, tensor: torch.Tensor, n_embd: int) -> torch.Tensor:
    """A parameter of attention with zeros where heads were pruned, others as they are."""
    if ".attn.c_attn." in name:  # (3 * width) or (3 * width, n_embd)
        parts = tensor.unflatten(0, (3, -1))
        missing = n_embd - parts.size(1)
        return F.pad(parts, (0, 0) * (parts.dim() - 2) + (0, missing)).flatten(0, 1)
    if name.endswith(".attn.c_proj.weight"):  # (n_embd, width)
        return F.pad(tensor, (0, n_embd - tensor.size(1)))
    return tensor


def is_transposed(name: str) -> bool:
    """Hugging Face's GPT-2 keeps its projections as (in, out), nn.Linear as (out, in)."""
    return name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))


def download(name: str) -> Path:
    """Folder of the hub model `name` in the local cache, downloaded if need be."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repo = f"openai-community/{name}" if name in SIZES else name
    try:
        return Path(snapshot_download(repo, allow_patterns=["config.json", "model*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise OSError(
            f"no model {name!r}: it is no local folder, and {repo} can't be had from the hub "
            f"({type(error).__name__}); check the name and the network, or set HF_HOME to a cache that holds it"
        ) from error


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
