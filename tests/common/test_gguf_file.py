"""GGUF files: read by the package gguf, and by llama.cpp itself where it is installed."""

import json
import sys

import pytest
import torch
from conftest import command, ok
from reference import TINY, V, random_model
from test_huggingface import save_model, train_library
from tokenizers import pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

import export
from common import checkpoint, tokenizer
from common.console import UserError
from common.gguf_file import save_gguf
from model import GPT, GPTConfig

gguf = pytest.importorskip("gguf")

TEXT = "the cat sat on the mat and naïve bears don't like 12345 honeyed cakes, do they?\n" * 9
TEXT += "\n  Ja, größer! 日本語 🙂  two  spaces\t" * 9


@pytest.fixture(scope="module")
def enc():
    return tokenizer.train_tokenizer([TEXT], V)[0]


def value(reader, key: str):
    return reader.get_field(key).contents()


def test_tensors_have_llama_cpps_names_and_shapes(tmp_path, enc):
    model = random_model()
    save_gguf(model, enc, tmp_path / "new" / "model.gguf")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["model.gguf"]
    reader = gguf.GGUFReader(tmp_path / "new" / "model.gguf")
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    # Those that llama.cpp's gpt2 asks for; without "output", the embedding is the head.
    names = gguf.MODEL_TENSORS[gguf.MODEL_ARCH.GPT2]
    expected = set()
    for tensor in names:
        name = gguf.TENSOR_NAMES[tensor]
        layers = range(3) if "{bid}" in name else [0]
        for layer in layers:
            expected |= {f"{name.format(bid=layer)}.{kind}" for kind in ("weight", "bias")}
    without = {"token_embd.bias", "position_embd.bias", "output.weight", "output.bias"}
    assert set(tensors) == expected - without
    # Linear weights are (out, in): the same way round as ours.
    assert torch.equal(tensors["token_embd.weight"], model.wte.weight[:V])
    assert torch.equal(tensors["blk.1.attn_qkv.weight"], model.h[1].attn.c_attn.weight)
    assert torch.equal(tensors["blk.2.ffn_down.weight"], model.h[2].mlp.c_proj.weight)
    assert torch.equal(tensors["blk.0.ffn_norm.bias"], model.h[0].ln_2.bias)

    assert value(reader, "general.architecture") == "gpt2"
    assert value(reader, "gpt2.context_length") == 256
    assert value(reader, "gpt2.block_count") == 3
    assert value(reader, "gpt2.attention.head_count") == 4
    assert value(reader, "gpt2.feed_forward_length") == 256


def test_the_tokenizer(tmp_path, enc):
    save_gguf(random_model(), enc, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tokens = value(reader, "tokenizer.ggml.tokens")
    assert len(tokens) == V and tokens[-1] == "<|endoftext|>"
    chars = {char: byte for byte, char in bytes_to_unicode().items()}
    for i, token in enumerate(tokens[:-1]):
        assert bytes(chars[char] for char in token) == enc.decode_single_token_bytes(i)
    assert value(reader, "tokenizer.ggml.eos_token_id") == enc.eot_token
    assert value(reader, "tokenizer.ggml.pre") == "gpt-2"
    kinds = value(reader, "tokenizer.ggml.token_type")
    assert kinds == [gguf.TokenType.NORMAL] * (V - 1) + [gguf.TokenType.CONTROL]
    assert len(value(reader, "tokenizer.ggml.merges")) == V - 257


def test_tokens_of_other_models(tmp_path):
    """Special tokens first and last, and embeddings without a token."""
    save_model(tmp_path / "hub", 272, train_library(270, added=["[PAD]"]), eos_token="</s>")
    model, enc = checkpoint.load_model(tmp_path / "hub")
    save_gguf(model, enc, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tokens = value(reader, "tokenizer.ggml.tokens")
    kinds = value(reader, "tokenizer.ggml.token_type")
    assert (tokens[0], tokens[270], len(tokens)) == ("</s>", "[PAD]", 271)
    assert [i for i, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL] == [0, 270]
    assert value(reader, "tokenizer.ggml.eos_token_id") == 0


def test_what_llama_cpp_can_not_compute(tmp_path, enc, capsys):
    with pytest.raises(UserError, match="Post-LN"):
        save_gguf(random_model(norm="post"), enc, tmp_path / "model.gguf")
    # A tokenizer with another splitting pattern.
    library = train_library(270)
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    save_model(tmp_path / "hub", 270, library, eos_token="</s>")
    config = export.Config(str(tmp_path / "hub"), str(tmp_path / "out"), format="gguf")
    with pytest.raises(UserError, match="does not split texts as GPT-2's does"):
        export.main(config)
    assert not list((tmp_path / "out").iterdir())
    bytes_only, _ = tokenizer.train_tokenizer([TEXT], 257)
    with pytest.raises(UserError, match="without merges"):
        save_gguf(random_model(vocab_size=257), bytes_only, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()
    # The exact GELU is only slightly different.
    save_gguf(random_model(activation="gelu"), enc, tmp_path / "model.gguf")
    assert "exact GELU" in capsys.readouterr().out


def test_without_the_package(tmp_path, enc, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install gguf"):
        save_gguf(random_model(), enc, tmp_path / "model.gguf")


# ---------------------------------------------------------------------------------------------
# llama.cpp


def model_with(kind: str, folder, enc):
    """A model that has learned TEXT, with one of the tokenizers that can be exported."""
    changes = {}
    if kind == "other":
        save_model(folder, 272, train_library(270, added=["[PAD]"]), eos_token="</s>")
        enc = tokenizer.load_tokenizer(folder)
    elif kind == "gpt2":
        try:
            enc = tokenizer.load_gpt2()
        except OSError:
            pytest.skip("GPT-2's vocabulary is not available")
    elif kind == "pruned":
        changes = dict(heads_kept=(2, 4, 1))
    elif kind == "exact GELU":
        changes = dict(activation="gelu")
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY | dict(vocab_size=enc.n_vocab) | changes))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    ids = torch.tensor([enc.encode_ordinary(TEXT)[:200]])
    for _ in range(80):
        model(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), enc


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ours", "gpt2", "other", "pruned", "exact GELU"])
def test_llama_cpp_computes_the_same(tmp_path, enc, kind):
    """Tokens, logits, and the greedy text of sample.py."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model, enc = model_with(kind, tmp_path, enc)
    checkpoint.save(tmp_path / "model.pt", checkpoint.build(model, enc, 1))
    config = export.Config(str(tmp_path / "model.pt"), str(tmp_path / "out"), format="gguf")
    export.main(config)
    llama = llama_cpp.Llama(
        str(tmp_path / "out" / "model.gguf"), n_ctx=256, logits_all=True, verbose=False
    )

    texts = [TEXT, "They'll've  DON'T 007\n\n\n x", " ", "a\u00a0b €\x7f", "👩\u200d👧 مرحبا"]
    for text in (*texts, "\t\tx   y", " ".join(TEXT[n:] for n in range(0, 60, 7))):
        ids = llama.tokenize(text.encode(), add_bos=False, special=False)
        assert ids == enc.encode_ordinary(text), text
    special = "cat<|endoftext|>mat" if kind != "other" else "cat</s>mat[PAD]"
    ids = llama.tokenize(special.encode(), add_bos=False, special=True)
    assert ids == enc.encode(special, allowed_special="all")

    ids = enc.encode_ordinary(TEXT)[:100]
    llama.eval(ids)
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0]
    theirs = torch.tensor(llama.scores[: len(ids)])
    difference = (theirs - logits).abs().max().item()
    print(f"{kind}: logits differ by up to {difference:.1e}, their deviation is {logits.std():.1f}")
    assert difference < 0.02 * logits.std()

    prompt = "the cat sat"
    answer = llama.create_completion(prompt, max_tokens=40, temperature=0)
    result = ok(
        command(
            *("sample.py", "--model", tmp_path / "model.pt", "--prompt", prompt),
            *"--temperature 0 --num_samples 1 --max_tokens 40 --dtype float32".split(),
        )
    )
    text = answer["choices"][0]["text"]
    print(json.dumps(text))
    assert f"{prompt}{text}\n" in result.stdout
