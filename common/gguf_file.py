"""GGUF, the file format of llama.cpp: model and tokenizer in one file, written only.

    save_gguf(model, enc, "exported/model.gguf")

Names and metadata are those that llama.cpp expects for its architecture "gpt2". The package `gguf`
writes the bytes.
"""

import os
from pathlib import Path

import tiktoken

from common.console import UserError, say
from common.foreign import ForeignEncoding
from common.huggingface import pad_heads, vocab_and_merges
from common.tokenizer import splits_like_gpt2
from model import GPT

# Names of our modules in llama.cpp. Those in a block get the prefix "blk.LAYER.".
NAMES = {
    "wte": "token_embd",  # llama.cpp uses it as the head too if the file has none
    "wpe": "position_embd",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "ln_f": "output_norm",
}
LAYER_NORM_EPS = 1e-5  # of nn.LayerNorm


def save_gguf(model: GPT, enc: tiktoken.Encoding, path: str | Path):
    """Write a model and its tokenizer for llama.cpp, in float32.

    Pruned heads are written as zeros. Raises UserError for a Post-LN model, and for a tokenizer
    that splits texts in another way than GPT-2's.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError("GGUF files need the package gguf: pip install gguf==0.19.0") from error
    # What llama.cpp can't compute, or computes differently
    c = model.config
    if c.norm != "pre":
        raise UserError("a Post-LN model can't be exported: llama.cpp's GPT-2 is Pre-LN only")
    if c.activation == "gelu":
        say(
            "warning: this model has the exact GELU, but llama.cpp computes its tanh "
            "approximation: logits will differ slightly"
        )

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Write under another name until the file is complete.
    temporary = path.with_name(path.name + ".tmp")
    writer = gguf.GGUFWriter(temporary, "gpt2")
    try:
        # Metadata: the shape of the model, and the tokenizer
        writer.add_name(path.stem)
        writer.add_block_count(c.n_layer)
        writer.add_context_length(c.block_size)
        writer.add_embedding_length(c.n_embd)
        writer.add_feed_forward_length(4 * c.n_embd)
        writer.add_head_count(c.n_head)
        writer.add_layer_norm_eps(LAYER_NORM_EPS)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        add_tokenizer(writer, enc, c.vocab_size)

        # Tensors: without padding rows, with zeros for pruned heads
        for name, tensor in model.state_dict().items():
            if name == "wte.weight":
                tensor = tensor[: c.vocab_size]
            tensor = pad_heads(name, tensor, c.n_embd)
            # A linear weight is (out, in) here and there.
            writer.add_tensor(llama_cpp_name(name), tensor.float().cpu().contiguous().numpy())

        # The writer has only collected so far. The parts of the file have this order.
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(temporary, path)
    finally:
        # After an error, this removes the incomplete file.
        temporary.unlink(missing_ok=True)


def llama_cpp_name(name: str) -> str:
    """A parameter's name in llama.cpp: h.0.attn.c_attn.weight is blk.0.attn_qkv.weight."""
    # kind is weight or bias.
    module, kind = name.rsplit(".", 1)
    prefix = ""
    if module.startswith("h."):
        _, layer, module = module.split(".", 2)
        prefix = f"blk.{layer}."
    return f"{prefix}{NAMES[module]}.{kind}"


def add_tokenizer(writer, enc: tiktoken.Encoding, vocab_size: int):
    """Add the tokens, their kinds and the merges to a GGUFWriter."""
    from gguf import TokenType

    # What each id is: a special token, an added token, or an ordinary one
    special = set(enc._special_tokens.values())
    added: dict[int, str] = {}  # tokens that are not spelled byte by byte
    if isinstance(enc, ForeignEncoding):
        check_foreign(enc)
        added = {token["id"]: token["content"] for token in enc.description["added_tokens"]}
    vocab, merges = vocab_and_merges(enc)
    if not merges:
        raise UserError("llama.cpp can't read a vocabulary without merges: it has only bytes")

    # llama.cpp numbers tokens by their place in the list: every id needs an entry, also one without
    # a token. A special token is also spelled or added, so it is tested first.
    spelled = {i: token for token, i in vocab.items()}
    tokens = []
    kinds = []
    for i in range(vocab_size):
        if i in special:
            kind = TokenType.CONTROL
        elif i in added:
            kind = TokenType.USER_DEFINED
        elif i in spelled:
            kind = TokenType.NORMAL
        else:  # an id without a token
            kind = TokenType.UNUSED
        kinds.append(kind)
        tokens.append(added.get(i) or spelled.get(i) or f"[UNUSED{i}]")

    # llama.cpp knows splitting patterns by name only: "gpt-2" is one of them.
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre("gpt-2")  # GPT-2's splitting pattern
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{left} {right}" for left, right in merges])
    writer.add_bos_token_id(enc.eot_token)
    writer.add_eos_token_id(enc.eot_token)
    writer.add_add_bos_token(False)  # prompts are encoded as here, without a token before them


def check_foreign(enc: ForeignEncoding):
    """Raise UserError if llama.cpp would encode texts in another way than this tokenizer."""
    # With ignore_merges, a word that is in the vocabulary is one token, even if no merges lead to
    # it.
    if splits_like_gpt2(enc.description) and not enc.description["model"].get("ignore_merges"):
        return
    raise UserError(
        "the model's tokenizer does not split texts as GPT-2's does, and llama.cpp knows patterns "
        "only by name: use --format huggingface, then llama.cpp's convert_hf_to_gguf.py"
    )
