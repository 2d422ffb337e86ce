"""GPT-2 models and tokenizers in Hugging Face's folder layout, read and written.

model = load_pretrained("gpt2")          # OpenAI's weights from the hub; also a local folder
enc = load_model_tokenizer("gpt2", 50257)  # the tokenizer that belongs to a model
save_pretrained(model, "exported")       # config.json and model.safetensors
save_tokenizer(enc, "exported")          # tokenizer.json, vocab.json, merges.txt, ...
"""

import json
from pathlib import Path
from typing import Any, Literal

import tiktoken
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from common.console import UserError, say
from common.convert import (
    GPT2_VOCAB_SIZES,
    first_of,
    is_transposed,
    load_pickle,
    make_config,
    make_model,
)
from common.foreign import END_OF_TEXT, ForeignEncoding, byte_to_char, merge_pairs, read_json
from common.hub import OLD_WEIGHTS, TOKENIZER, WEIGHTS, download
from common.tokenizer import load_folder, load_gpt2, recover_merges, tokenizer_to_text
from model import GPT, OPENAI_MODELS, GPTConfig

# Settings that vary among Hugging Face's configurations, but are fixed in ours.
FIXED = dict(
    model_type="gpt2",
    layer_norm_epsilon=1e-5,
    scale_attn_weights=True,
    scale_attn_by_inverse_layer_idx=False,
    add_cross_attention=False,
)
# Hugging Face's names of the activation functions, and ours. Where several names mean the same
# function, the first one is written.
ACTIVATIONS: dict[str, Literal["gelu_tanh", "gelu"]] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
}


def load_pretrained(name_or_folder: str | Path, dropout: float = 0.0) -> GPT:
    """Read a model from a local folder, or by its name on the hub (`gpt2` ... `gpt2-xl`: OpenAI's).

    Raises UserError if it is not a GPT-2 or is damaged, OSError if it is not available.
    """
    # Most models have safetensors. The large older files are downloaded only for those that don't.
    folder = find_folder(name_or_folder, WEIGHTS)
    if not find_weights(folder) and not Path(name_or_folder).is_dir():
        folder = find_folder(name_or_folder, OLD_WEIGHTS)

    # The configuration and the tensors
    hf = read_config(folder)
    tensors = read_weights(folder)
    # If tie_word_embeddings is false, the file must store the head, so that make_model can compare
    # it with the embedding.
    if not hf["tie_word_embeddings"] and "lm_head.weight" not in tensors:
        raise UserError(f"{folder} differs from GPT-2: tie_word_embeddings is false")
    # GPTConfig raises for impossible sizes, such as a width that the heads don't divide.
    config = make_config(
        f"{folder}/config.json",
        block_size=hf["n_positions"],
        vocab_size=hf["vocab_size"],
        n_layer=hf["n_layer"],
        n_head=hf["n_head"],
        n_embd=hf["n_embd"],
        activation=ACTIVATIONS[hf["activation_function"]],
        dropout=dropout,
    )
    # GPTConfig has no field for the width of the MLP: it is always four times n_embd.
    if hf["n_inner"] not in (None, 4 * config.n_embd):
        raise UserError(
            f"{folder} differs from GPT-2: its n_inner is {hf['n_inner']}, not {4 * config.n_embd}"
        )
    return make_model(config, tensors, folder, transposed=True)


def find_folder(name_or_folder: str | Path, files: list[str]) -> Path:
    """The folder itself, or that of a hub model in the local cache, with `files` downloaded."""
    if Path(name_or_folder).is_dir():
        return Path(name_or_folder)
    name = str(name_or_folder)
    # OpenAI's models have short names, and belong to this organization on the hub.
    return download(f"openai-community/{name}" if name in OPENAI_MODELS else name, files)


def load_model_tokenizer(name_or_folder: str | Path, vocab_size: int) -> tiktoken.Encoding:
    """The tokenizer that belongs to a Hugging Face model with vocab_size embeddings.

    If the folder has no tokenizer, and the embeddings are as many as GPT-2's tokens (or as many as
    is usual with padding), it is GPT-2's. Raises UserError if it is of another kind, or has more
    tokens than the model.
    """
    enc = load_folder(find_folder(name_or_folder, TOKENIZER))
    # Without a tokenizer, GPT-2's is assumed only if it fits the number of embeddings.
    if enc is None and vocab_size not in GPT2_VOCAB_SIZES:
        raise UserError(
            f"{name_or_folder} has no tokenizer, and its vocabulary of {vocab_size} tokens is not "
            f"GPT-2's of {GPTConfig.vocab_size}: add the model's tokenizer.json"
        )
    if enc is None:
        if str(name_or_folder) not in OPENAI_MODELS:
            say(f"{name_or_folder} has no tokenizer: using GPT-2's, which has as many tokens")
        return load_gpt2()
    # More embeddings than tokens are padding. Fewer would leave tokens without one.
    if enc.n_vocab > vocab_size:
        raise UserError(
            f"{name_or_folder} has a vocabulary of {vocab_size} tokens, its tokenizer {enc.n_vocab}"
        )
    return enc


def read_config(folder: Path) -> dict:
    """config.json with GPT-2's defaults filled in. Raises UserError if it is not GPT-2's."""
    file = folder / "config.json"
    if not file.exists():
        raise UserError(f"{folder} has no model: its config.json is missing")
    # Start from GPT-2's defaults, and let the file replace them.
    hf: dict[str, Any] = FIXED | OPENAI_MODELS["gpt2"]
    hf |= dict(n_positions=1024, vocab_size=50257, n_inner=None)
    hf |= dict(activation_function="gelu_new", tie_word_embeddings=True)
    hf |= read_json(file)

    # Reject all that would make the model compute something else.
    for key, value in FIXED.items():
        if hf[key] != value:
            raise UserError(f"{folder} differs from GPT-2: its {key} is {hf[key]}, not {value}")
    if str(hf["activation_function"]) not in ACTIVATIONS:
        raise UserError(
            f"{folder} differs from GPT-2: its activation_function is "
            f"{hf['activation_function']}, not a GELU ({', '.join(ACTIVATIONS)})"
        )
    # A model with this field is computed by its own code, and only calls itself a GPT-2.
    if any(name.startswith("AutoModel") for name in hf.get("auto_map") or {}):
        raise UserError(f"{folder} differs from GPT-2: its config.json names code (auto_map)")
    return hf


def find_weights(folder: Path) -> list[Path]:
    """The files of a model's weights, in transformers' order of preference; empty if none.

    Raises UserError if an index names a file that is missing.
    """
    # A single file, or an index of several:
    #     {"weight_map": {"wte.weight": "model-00001-of-00002.safetensors", ...}}
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if not index.exists():
            continue
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            files = [folder / name for name in names]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is damaged: {error!r}") from error
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise UserError(f"{folder} is incomplete: it lacks {first_of(missing)}")
        return files
    return []


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model, under the names in its files."""
    files = find_weights(folder)
    if not files:
        of_a_run = sorted(folder.glob("model_*.pt"))
        if of_a_run:
            raise UserError(f"{folder} is a run folder: name a checkpoint, such as {of_a_run[-1]}")
        raise UserError(f"{folder} has no model: model.safetensors or pytorch_model.bin is missing")
    # A model in several files has each tensor in one of them.
    tensors = {}
    for file in files:
        try:
            content = load_file(file) if file.suffix == ".safetensors" else load_pickle(file)
        except (SafetensorError, ValueError) as error:
            raise UserError(f"{folder} is damaged or incomplete: {error}") from error
        if not isinstance(content, dict):
            raise UserError(f"{file} is not a model: it holds a {type(content).__name__}")
        tensors.update(content)
    return tensors


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

    # The weights: without padding rows, with zeros for pruned heads, linear layers as (in, out)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "wte.weight":
            tensor = tensor[: c.vocab_size]
        tensor = pad_heads(name, tensor, c.n_embd)
        if is_transposed(name):
            tensor = tensor.t()
        # safetensors wants contiguous tensors that share no memory.
        tensor = tensor.cpu().clone(memory_format=torch.contiguous_format)
        # GPT2LMHeadModel keeps all but the head under this prefix. The head is the embedding, so it
        # is not stored.
        tensors[f"transformer.{name}"] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    # The configuration. `reversed`, because the last of several names stays, and the first is
    # wanted.
    names = {ours: name for name, ours in reversed(ACTIVATIONS.items())}
    hf = FIXED | dict(
        activation_function=names[c.activation],
        tie_word_embeddings=True,
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


def pad_heads(name: str, tensor: torch.Tensor, n_embd: int) -> torch.Tensor:
    """An attention parameter with zeros in place of pruned heads; other parameters unchanged."""
    if ".attn.c_attn." in name:  # (3 * width, n_embd) or (3 * width,); width < n_embd if pruned
        # Each of the three parts gets its zeros at its own end, so they are separated first.
        qkv = tensor.unflatten(0, (3, -1))  # (3, width, ...)
        missing = n_embd - qkv.size(1)
        # F.pad takes pairs from the last dimension backwards. Only dimension 1 grows.
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
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # it is slow

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Files of an earlier export would contradict the new ones.
    for name in ("vocab.tiktoken", "added_tokens.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)

    vocab, merges = vocab_and_merges(enc)
    # A tokenizer of another project: its own description is written.
    if isinstance(enc, ForeignEncoding):
        end_of_text = enc.end_of_text
        text = json.dumps(enc.description, indent=2, ensure_ascii=False)
        (folder / "tokenizer.json").write_text(text, "utf-8")
        # This class takes every step from tokenizer.json; GPT2Tokenizer replaces some.
        config: dict[str, Any] = dict(tokenizer_class="PreTrainedTokenizerFast")
    else:
        # A tokenizer trained by this project, or GPT-2's. The library gives the end-of-text token
        # the next free id, which is the last one.
        end_of_text = END_OF_TEXT
        mergeable = {token: i for token, i in vocab.items() if i != enc.eot_token}
        library = Tokenizer(models.BPE(vocab=mergeable, merges=merges))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        library.add_special_tokens([END_OF_TEXT])
        library.save(str(folder / "tokenizer.json"))
        config = dict(
            tokenizer_class="GPT2Tokenizer", add_prefix_space=False, unk_token=END_OF_TEXT
        )
        (folder / "vocab.tiktoken").write_text(tokenizer_to_text(enc))

    # The older pair of files, for programs that don't read tokenizer.json
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), "utf-8")
    merge_lines = "".join(f"{left} {right}\n" for left, right in merges)
    (folder / "merges.txt").write_text("#version: 0.2\n" + merge_lines, "utf-8")

    # The settings. The end-of-text token stands before documents, so it also begins texts.
    config |= dict(bos_token=end_of_text, eos_token=end_of_text)
    if max_length:
        config["model_max_length"] = max_length
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def vocab_and_merges(enc: tiktoken.Encoding) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids by token, and the pairs to merge, with bytes spelled as in vocab.json and merges.txt."""
    if isinstance(enc, ForeignEncoding):
        from tokenizers import Tokenizer

        library = Tokenizer.from_str(json.dumps(enc.description))
        return library.get_vocab(), merge_pairs(enc.description)

    chars = byte_to_char()

    def spell(token: bytes) -> str:
        return "".join(chars[byte] for byte in token)

    # Files need the merges, which tiktoken does not keep: recover them from the ranks.
    ranks = enc._mergeable_ranks
    vocab = {spell(token): rank for token, rank in ranks.items()}
    merges = [(spell(left), spell(right)) for left, right in recover_merges(ranks)]
    return vocab | {END_OF_TEXT: enc.eot_token}, merges
