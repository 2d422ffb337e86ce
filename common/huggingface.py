"""GPT-2 models and tokenizers in Hugging Face's folder layout, read and written.

model = load_pretrained("gpt2")          # OpenAI's weights from the hub; also a local folder
enc = load_model_tokenizer("gpt2", 50257)  # the tokenizer that belongs to a model
save_pretrained(model, "exported")       # config.json and model.safetensors
save_tokenizer(enc, "exported")          # tokenizer.json, vocab.json, merges.txt, ...
"""

import json
from pathlib import Path
from typing import Any

import tiktoken
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F

from common.console import UserError, say
from common.foreign import END_OF_TEXT, ForeignEncoding, byte_to_char, merge_pairs
from common.hub import TOKENIZER, WEIGHTS, download
from common.tokenizer import load_folder, load_gpt2, recover_merges, tokenizer_to_text
from model import GPT, OPENAI_MODELS, GPTConfig

# Settings that vary among Hugging Face's configurations, but are fixed in ours.
FIXED = dict(
    model_type="gpt2",
    activation_function="gelu_new",
    layer_norm_epsilon=1e-5,
    scale_attn_weights=True,
    scale_attn_by_inverse_layer_idx=False,
    tie_word_embeddings=True,
)


def load_pretrained(name_or_folder: str | Path, dropout: float = 0.0) -> GPT:
    """Read a model from a local folder, or by its name on the hub (`gpt2` ... `gpt2-xl`: OpenAI's).

    Raises UserError if it is not a GPT-2 or is damaged, OSError if it is not available.
    """
    folder = find_folder(name_or_folder, WEIGHTS)
    hf, tensors = read_folder(folder)
    for key, value in FIXED.items():
        if hf.get(key, value) != value:
            raise UserError(f"{folder} differs from GPT-2: its {key} is {hf[key]}, not {value}")
    try:
        config = GPTConfig(
            block_size=hf["n_positions"],
            vocab_size=hf["vocab_size"],
            n_layer=hf["n_layer"],
            n_head=hf["n_head"],
            n_embd=hf["n_embd"],
            dropout=dropout,
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder}/config.json: {error}") from error

    # The folder may hold more tensors: lm_head, which equals wte, and buffers of the causal mask.
    model = GPT(config)
    state = model.state_dict()
    missing = sorted(state.keys() - tensors.keys())
    if missing:
        raise UserError(f"{folder} lacks the tensors {', '.join(missing[:3])} ...")
    for name, ours in state.items():
        tensor = tensors[name]
        if is_transposed(name):
            tensor = tensor.t()
        if name == "wte.weight":
            padding = config.padded_vocab_size - config.vocab_size
            tensor = F.pad(tensor, (0, 0, 0, padding))
        if tensor.shape != ours.shape:
            shapes = f"{tuple(tensor.shape)}, expected {tuple(ours.shape)}"
            raise UserError(f"{folder}: {name} is {shapes}")
        ours.copy_(tensor)
    return model


def find_folder(name_or_folder: str | Path, files: list[str]) -> Path:
    """The folder itself, or that of a hub model in the local cache, with `files` downloaded."""
    if Path(name_or_folder).is_dir():
        return Path(name_or_folder)
    name = str(name_or_folder)
    return download(f"openai-community/{name}" if name in OPENAI_MODELS else name, files)


def load_model_tokenizer(name_or_folder: str | Path, vocab_size: int) -> tiktoken.Encoding:
    """The tokenizer that belongs to a Hugging Face model with vocab_size embeddings.

    If the folder has no tokenizer, and GPT-2's has as many tokens, it is GPT-2's. Raises UserError
    if it is of another kind, or has more tokens than the model.
    """
    enc = load_folder(find_folder(name_or_folder, TOKENIZER))
    if enc is None and vocab_size != GPTConfig.vocab_size:
        raise UserError(
            f"{name_or_folder} has no tokenizer, and its vocabulary of {vocab_size} tokens is not "
            f"GPT-2's of {GPTConfig.vocab_size}: add the model's tokenizer.json"
        )
    if enc is None:
        if str(name_or_folder) not in OPENAI_MODELS:
            say(f"{name_or_folder} has no tokenizer: using GPT-2's, which has as many tokens")
        return load_gpt2()
    if enc.n_vocab > vocab_size:
        raise UserError(
            f"{name_or_folder} has a vocabulary of {vocab_size} tokens, its tokenizer {enc.n_vocab}"
        )
    return enc


def read_folder(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """config.json with GPT-2's defaults filled in, and all tensors under GPT-2's own names."""
    weight_files = sorted(folder.glob("model*.safetensors"))
    config_file = folder / "config.json"
    if not weight_files or not config_file.exists():
        raise UserError(f"{folder} has no model: config.json and model.safetensors are needed")
    defaults = dict(n_positions=1024, vocab_size=50257, **OPENAI_MODELS["gpt2"])
    tensors = {}
    try:
        hf = defaults | json.loads(config_file.read_bytes())
        for file in weight_files:
            for name, tensor in load_file(file).items():
                tensors[name.removeprefix("transformer.")] = tensor
    except (SafetensorError, ValueError, TypeError) as error:
        raise UserError(f"{folder} is damaged or incomplete: {error}") from error
    return hf, tensors


def save_pretrained(model: GPT, folder: str | Path, end_of_text: int | None = None):
    """Write config.json and model.safetensors as transformers' GPT2LMHeadModel reads them.

    end_of_text is the id of the end-of-text token, by default the last one. Pruned heads are
    written as zeros. Raises UserError for a Post-LN model.
    """
    c = model.config
    if end_of_text is None:
        end_of_text = c.vocab_size - 1
    if c.norm != "pre":
        raise UserError("a Post-LN model can't be exported: Hugging Face's GPT-2 is Pre-LN only")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "wte.weight":
            tensor = tensor[: c.vocab_size]
        tensor = pad_heads(name, tensor, c.n_embd)
        if is_transposed(name):
            tensor = tensor.t()
        # safetensors wants contiguous tensors that share no memory.
        tensor = tensor.cpu().clone(memory_format=torch.contiguous_format)
        tensors[f"transformer.{name}"] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    hf = FIXED | dict(
        architectures=["GPT2LMHeadModel"],
        n_positions=c.block_size,
        n_ctx=c.block_size,
        vocab_size=c.vocab_size,
        n_layer=c.n_layer,
        n_head=c.n_head,
        n_embd=c.n_embd,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        resid_pdrop=c.dropout,
        embd_pdrop=c.dropout,
        attn_pdrop=c.dropout,
    )
    (folder / "config.json").write_text(json.dumps(hf, indent=2) + "\n")


def is_transposed(name: str) -> bool:
    """Whether Hugging Face stores this weight as (in, out); nn.Linear's are (out, in)."""
    return name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))


def pad_heads(name: str, tensor: torch.Tensor, n_embd: int) -> torch.Tensor:
    """An attention parameter with zeros in place of pruned heads; other parameters unchanged."""
    if ".attn.c_attn." in name:  # (3 * width, n_embd) or (3 * width,); width < n_embd if pruned
        qkv = tensor.unflatten(0, (3, -1))  # (3, width, ...)
        missing = n_embd - qkv.size(1)
        last_dimensions = (0, 0) * (qkv.dim() - 2)
        return F.pad(qkv, (*last_dimensions, 0, missing)).flatten(0, 1)
    if name.endswith(".attn.c_proj.weight"):  # (n_embd, width)
        return F.pad(tensor, (0, n_embd - tensor.size(1)))
    return tensor


def save_tokenizer(enc: tiktoken.Encoding, folder: str | Path, max_length: int | None = None):
    """Write the files from which transformers' AutoTokenizer builds the same tokenizer.

    max_length is the context of the model: transformers cuts longer texts if asked to. For our own
    scripts, vocab.tiktoken is added to tokenizers that fit into its format.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Files of an earlier export would contradict the new ones.
    for name in ("vocab.tiktoken", "added_tokens.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)

    if isinstance(enc, ForeignEncoding):
        end_of_text = enc.end_of_text
        text = json.dumps(enc.description, indent=2, ensure_ascii=False)
        (folder / "tokenizer.json").write_text(text, "utf-8")
        library = Tokenizer.from_str(text)
        vocab = library.get_vocab()
        merges = merge_pairs(enc.description)
        # This class takes every step from tokenizer.json; GPT2Tokenizer replaces some.
        config: dict[str, Any] = dict(tokenizer_class="PreTrainedTokenizerFast")
    else:
        end_of_text = END_OF_TEXT
        chars = byte_to_char()

        def spell(token: bytes) -> str:
            return "".join(chars[byte] for byte in token)

        ranks = enc._mergeable_ranks
        vocab = {spell(token): rank for token, rank in ranks.items()}
        merges = [(spell(left), spell(right)) for left, right in recover_merges(ranks)]
        library = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        library.add_special_tokens([END_OF_TEXT])
        library.save(str(folder / "tokenizer.json"))
        vocab[END_OF_TEXT] = enc.eot_token
        config = dict(
            tokenizer_class="GPT2Tokenizer", add_prefix_space=False, unk_token=END_OF_TEXT
        )
        (folder / "vocab.tiktoken").write_text(tokenizer_to_text(enc))

    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), "utf-8")
    merge_lines = "".join(f"{left} {right}\n" for left, right in merges)
    (folder / "merges.txt").write_text("#version: 0.2\n" + merge_lines, "utf-8")
    config |= dict(bos_token=end_of_text, eos_token=end_of_text)
    if max_length:
        config["model_max_length"] = max_length
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
