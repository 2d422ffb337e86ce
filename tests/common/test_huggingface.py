"""Hugging Face's folder layout: read, written, and read back by transformers."""

import json
import os
from dataclasses import asdict

import numpy as np
import pytest
import tiktoken
import torch
from reference import TINY, V, random_model, random_reference, random_tokens, same_logits, shake
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import export
import fineweb
from common import checkpoint, shards, tokenizer
from common.console import UserError
from common.huggingface import load_pretrained, save_pretrained, save_tokenizer


def test_transformers_reads_what_we_save(tmp_path):
    model = random_model()
    save_pretrained(model, tmp_path)
    reference, info = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), (
        info
    )
    assert reference.config.eos_token_id == V - 1
    assert same_logits(model, reference.eval())


def test_what_we_save_comes_back_exactly(tmp_path):
    model = random_model()
    save_pretrained(model, tmp_path)
    again = load_pretrained(tmp_path)
    state = again.state_dict()
    for name, tensor in model.state_dict().items():
        if name == "wte.weight":
            assert state[name].shape == tensor.shape
            assert torch.equal(state[name][:V], tensor[:V])
        else:
            assert torch.equal(state[name], tensor), name


def test_from_pretrained_reads_shards(tmp_path):
    reference = random_reference()
    reference.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert same_logits(load_pretrained(tmp_path).eval(), reference)


def test_from_pretrained_reads_the_hub_files_of_openai(reference_folder, tmp_path):
    """They have no "transformer." before the names, and carry the causal mask of each layer."""
    weights = {}
    for name, tensor in load_file(reference_folder / "model.safetensors").items():
        weights[name.removeprefix("transformer.")] = tensor
    assert "wte.weight" in weights and "lm_head.weight" not in weights
    for layer in range(TINY["n_layer"]):
        weights[f"h.{layer}.attn.bias"] = torch.tril(torch.ones(256, 256)).view(1, 1, 256, 256)
        weights[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((reference_folder / "config.json").read_text())
    assert same_logits(load_pretrained(tmp_path).eval(), random_reference())


def test_from_pretrained_sets_dropout(reference_folder):
    assert load_pretrained(reference_folder).config.dropout == 0
    assert load_pretrained(reference_folder, dropout=0.25).h[0].attn.dropout == 0.25


def copy_with(folder, target, **config):
    (target / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (target / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | config)
    )


def refused(folder) -> str:
    with pytest.raises(UserError) as info:
        load_pretrained(folder)
    assert str(folder) in str(info.value)
    return str(info.value)


def test_empty_folder_is_refused(tmp_path):
    assert "config.json" in refused(tmp_path)


@pytest.mark.parametrize("kept", [0, 0.0001, 0.002, 0.5, 0.999])
def test_truncated_weights_are_refused(reference_folder, tmp_path, kept):
    copy_with(reference_folder, tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    refused(tmp_path)


@pytest.mark.parametrize(
    "text", [b"", b'{"model_type": "gp', b'{"model_type": "\xff"}', b"[]", b"7"]
)
def test_damaged_config_is_refused(reference_folder, tmp_path, text):
    copy_with(reference_folder, tmp_path)
    (tmp_path / "config.json").write_bytes(text)
    refused(tmp_path)


def test_missing_tensor_is_refused(reference_folder, tmp_path):
    copy_with(reference_folder, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    assert "h.1.mlp.c_fc.bias" in refused(tmp_path)


def test_other_models_are_refused(reference_folder, tmp_path):
    copy_with(reference_folder, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="llama", hidden_size=64)))
    assert "llama" in refused(tmp_path)


@pytest.mark.parametrize(
    "variant",
    [
        dict(activation_function="relu"),
        dict(layer_norm_epsilon=1e-3),
        dict(scale_attn_weights=False),
        dict(scale_attn_by_inverse_layer_idx=True),
        dict(tie_word_embeddings=False),
        dict(add_cross_attention=True),
        dict(n_inner=128),
        dict(activation_function="quick_gelu"),
        dict(activation_function=None),
        dict(auto_map={"AutoModelForCausalLM": "modeling.Model"}),
    ],
    ids=str,
)
def test_variants_that_we_would_compute_wrongly_are_refused(reference_folder, tmp_path, variant):
    copy_with(reference_folder, tmp_path, **variant)
    assert next(iter(variant)) in refused(tmp_path)


def reference_with(**config) -> GPT2LMHeadModel:
    """A random model of transformers whose configuration differs from ours only in its spelling."""
    sizes = {"n_positions" if name == "block_size" else name: n for name, n in TINY.items()}
    torch.manual_seed(0)
    model = shake(GPT2LMHeadModel(GPT2Config(**sizes | config)))
    with torch.no_grad():  # strong enough that the two GELUs differ visibly
        for block in model.transformer.h:
            block.mlp.c_fc.weight *= 5
    return model


def logit_difference(folder, reference) -> float:
    idx = random_tokens(2, 33)
    with torch.no_grad():
        logits = load_pretrained(folder).eval()(idx)
        return (logits - reference(idx).logits).abs().max().item()


@pytest.mark.parametrize(
    "name", "gelu_new gelu_pytorch_tanh gelu_python_tanh gelu_fast gelu_accurate".split()
)
def test_names_of_gpt2s_gelu(tmp_path, name):
    reference = reference_with(activation_function=name)
    reference.save_pretrained(tmp_path)
    assert load_pretrained(tmp_path).config.activation == "gelu_tanh"
    assert logit_difference(tmp_path, reference) < 3e-5


@pytest.mark.parametrize("name", ["gelu", "gelu_python"])
def test_the_exact_gelu(tmp_path, name):
    """Read, and written again. GPT-2's approximation would be visible."""
    reference = reference_with(activation_function=name)
    reference.save_pretrained(tmp_path)
    assert logit_difference(tmp_path, reference) < 3e-5
    assert logit_difference(tmp_path, reference_with(activation_function="gelu_new")) > 1e-4
    save_pretrained(load_pretrained(tmp_path), tmp_path / "out")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    assert again.config.activation_function == "gelu"
    assert logit_difference(tmp_path, again) < 3e-5


@pytest.mark.parametrize("config", [dict(n_inner=256), dict(reorder_and_upcast_attn=True)], ids=str)
def test_settings_that_change_nothing(tmp_path, config):
    reference = reference_with(**config)
    reference.save_pretrained(tmp_path)
    assert logit_difference(tmp_path, reference) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path, dtype):
    reference = reference_with().to(dtype)
    reference.save_pretrained(tmp_path)
    assert load_pretrained(tmp_path).wte.weight.dtype == torch.float32
    assert logit_difference(tmp_path, reference.float()) < 1e-4


def save_as_pickle(reference, folder, num_files: int = 1):
    """As transformers wrote models before safetensors: all names, and the causal mask."""
    reference.config.save_pretrained(folder)
    state = reference.state_dict()
    for layer in range(TINY["n_layer"]):
        mask = torch.ones(1, 1, 256, 256, dtype=torch.uint8).tril()
        state[f"transformer.h.{layer}.attn.bias"] = mask
        state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    if num_files == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    weight_map = {}
    for n in range(num_files):
        file = f"pytorch_model-{n + 1:05}-of-{num_files:05}.bin"
        part = dict(list(state.items())[n::num_files])
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = dict(metadata={}, weight_map=weight_map)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("num_files", [1, 3])
def test_pytorch_model_bin(tmp_path, num_files):
    reference = reference_with()
    save_as_pickle(reference, tmp_path, num_files)
    assert logit_difference(tmp_path, reference) < 1e-4
    first = checkpoint.fingerprint(str(tmp_path))
    assert first != checkpoint.fingerprint(str(tmp_path / "absent")) and first != str(tmp_path)


def test_a_hub_model_without_safetensors(tmp_path, monkeypatch):
    (tmp_path / "hub").mkdir()
    reference = reference_with()
    save_as_pickle(reference, tmp_path / "hub", 3)

    def snapshot_download(repo, allow_patterns):
        (tmp_path / "cache").mkdir(exist_ok=True)
        for file in (tmp_path / "hub").iterdir():
            if any(map(file.match, allow_patterns)):
                (tmp_path / "cache" / file.name).write_bytes(file.read_bytes())
        return tmp_path / "cache"

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert logit_difference("somebody/model", reference) < 1e-4


def test_a_weight_file_by_itself_is_refused(reference_folder, tmp_path):
    for name in ("model.safetensors", "pytorch_model.bin"):
        save_as_pickle(reference_with(), tmp_path)
        copy_with(reference_folder, tmp_path)
        with pytest.raises(UserError, match=f"{name} .* folder"):
            checkpoint.load_model(tmp_path / name)


def test_code_in_pytorch_model_bin_is_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "victim"),)

    save_as_pickle(reference_with(), tmp_path)
    torch.save({"transformer.wte.weight": Attack()}, tmp_path / "pytorch_model.bin")
    assert "could run code (posix.mkdir)" in refused(tmp_path)
    assert not (tmp_path / "victim").exists()


def test_a_missing_file_of_several_is_named(tmp_path):
    random_reference().save_pretrained(tmp_path / "new", max_shard_size="200KB")
    missing = sorted((tmp_path / "new").glob("model-*.safetensors"))[1]
    missing.unlink()
    assert f"lacks {missing.name}" in refused(tmp_path / "new")
    (tmp_path / "old").mkdir()
    save_as_pickle(reference_with(), tmp_path / "old", 3)
    (tmp_path / "old" / "pytorch_model-00002-of-00003.bin").unlink()
    assert "lacks pytorch_model-00002-of-00003.bin" in refused(tmp_path / "old")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_damaged_index_is_refused(reference_folder, tmp_path, text):
    copy_with(reference_folder, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json is damaged" in refused(tmp_path)


def test_a_head_that_is_stored_too(reference_folder, tmp_path):
    """Equal to the embedding, it changes nothing, also if the config calls it untied."""
    copy_with(reference_folder, tmp_path, tie_word_embeddings=False)
    tensors = load_file(reference_folder / "model.safetensors")
    head = tensors["transformer.wte.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    assert same_logits(load_pretrained(tmp_path).eval(), random_reference())
    save_file(tensors | {"lm_head.weight": head + 1e-3}, tmp_path / "model.safetensors")
    assert "its head (lm_head.weight) is not the embedding" in refused(tmp_path)
    # safetensors' save_model keeps only the first of two names.
    del tensors["transformer.wte.weight"]
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    assert same_logits(load_pretrained(tmp_path).eval(), random_reference())


def test_tensors_of_another_architecture_are_named(reference_folder, tmp_path):
    copy_with(reference_folder, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    extra = {"transformer.h.0.crossattention.c_attn.weight": torch.ones(2)}
    save_file(tensors | extra, tmp_path / "model.safetensors")
    assert "it has the tensors h.0.crossattention.c_attn.weight" in refused(tmp_path)


def test_absent_settings_are_those_of_transformers(reference_folder, tmp_path):
    copy_with(reference_folder, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    absent = ["n_layer", "activation_function", "layer_norm_epsilon", "tie_word_embeddings"]
    (tmp_path / "config.json").write_text(
        json.dumps({key: saved[key] for key in saved if key not in absent})
    )
    assert GPT2Config.from_pretrained(tmp_path).n_layer == 12
    assert "h.10." in refused(tmp_path)  # twelve layers are expected, and three are there


def test_other_shapes_are_refused(reference_folder, tmp_path):
    copy_with(reference_folder, tmp_path, n_positions=512)
    assert "wpe.weight" in refused(tmp_path)


def test_unknown_name_is_an_os_error():
    with pytest.raises(OSError, match="no-such-model"):
        load_pretrained("no-such-model")


def test_export_is_readable_by_transformers(tmp_path):
    words = "the cat sat on the mat and naïve bears don't like 12345 honeyed cakes, do they?\n"
    words += "\n  Ja, größer! 日本語 🙂\n"
    text = "".join(words[n % 50 :] for n in range(400))
    enc, _ = tokenizer.train_tokenizer([text], 300)
    model = random_model()
    fields = dict(
        model=model.state_dict(),
        config=asdict(model.config),
        tokenizer=tokenizer.tokenizer_to_text(enc),
    )
    checkpoint.save(tmp_path / "model_final.pt", fields | {"step": 1})
    export.main(export.Config(str(tmp_path / "model_final.pt"), str(tmp_path / "out")))

    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(theirs) == enc.n_vocab == 300
    assert theirs.eos_token_id == enc.eot_token == 299
    for sample in (
        words,
        text,
        "",
        " ",
        "  two  spaces\t",
        "the\u00a0cat €\x00\x7f",
        "They'll've DON'T 007",
        "👩‍👩‍👧 مرحبا",
    ):
        ids = enc.encode_ordinary(sample)
        assert theirs(sample)["input_ids"] == ids
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == enc.decode(ids) == sample
    special = "cat<|endoftext|>mat"
    assert theirs(special)["input_ids"] == enc.encode(special, allowed_special="all")
    assert (
        max(map(len, map(enc.decode_single_token_bytes, enc.encode_ordinary(words)))) > 2
    )  # merges took place

    assert same_logits(model, GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval())
    loaded, own = checkpoint.load_model(tmp_path / "out")
    assert isinstance(own, tiktoken.Encoding) and own.encode_ordinary(text) == enc.encode_ordinary(
        text
    )
    assert torch.equal(loaded(random_tokens(1, 9)), model(random_tokens(1, 9)))


def test_post_ln_is_not_exported(tmp_path):
    with pytest.raises(UserError, match="Post-LN"):
        save_pretrained(random_model(norm="post"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------
# A model and its tokenizer


def save_model(folder, tokens: int, library: Tokenizer | None = None, **settings):
    """A random model with `tokens` embeddings, and a tokenizer as `tokenizers` saves it."""
    save_pretrained(random_model(vocab_size=tokens), folder)
    if library:
        library.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def train_library(tokens: int, added=()) -> Tokenizer:
    """A byte-level BPE whose end-of-text token comes first."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=tokens,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(["the cat sat on the mat, naïve as cats are " * 9], trainer)
    library.add_special_tokens(list(added))
    return library


@pytest.mark.parametrize("rows", [271, 272, 384, 400])
def test_a_model_is_read_with_its_tokenizer(rows, tmp_path):
    """Also one with added tokens, and with embeddings that are resized or padded."""
    library = train_library(270, added=["[PAD]"])
    save_model(tmp_path, rows, library, eos_token="</s>")
    model, enc = checkpoint.load_model(tmp_path)
    assert enc.encode_ordinary("the cat") == library.encode("the cat").ids
    assert (enc.eot_token, enc.n_vocab) == (0, 271)
    # Rows without a token are never chosen, and do not change the logits of the others.
    idx = random_tokens(1, 9, vocab_size=271)
    logits = model(idx)
    assert logits.shape[-1] == 271
    reference = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(logits, reference(idx).logits[..., :271], rtol=0, atol=1e-4)


def test_a_tokenizer_with_more_tokens_than_the_model_is_rejected(tmp_path):
    save_model(tmp_path, 265, train_library(270))
    with pytest.raises(UserError, match="265 tokens, its tokenizer 270"):
        checkpoint.load_model(tmp_path)


def test_special_tokens_that_only_the_tokenizer_has_are_dropped(tmp_path):
    """A common mistake: [PAD] was added to the tokenizer, but the embeddings were not resized."""
    save_model(tmp_path, 270, train_library(270, added=["[PAD]"]))
    _, enc = checkpoint.load_model(tmp_path)
    assert enc.n_vocab == 270
    assert tokenizer.tokenizer_to_text(tokenizer.load_tokenizer(tmp_path)) == (
        tokenizer.tokenizer_to_text(enc)
    )


def test_without_a_tokenizer_gpt2s_is_used_only_if_the_size_matches(tmp_path, capsys):
    save_model(tmp_path / "small", 300)
    with pytest.raises(UserError, match="no tokenizer, and its vocabulary of 300 .* 50257"):
        checkpoint.load_model(tmp_path / "small")
    try:
        tokenizer.load_tokenizer("gpt2")
    except OSError:
        pytest.skip("GPT-2's vocabulary is not available")
    for rows in (50257, 50304):  # without and with padding
        save_model(tmp_path / "large", rows)
        model, enc = checkpoint.load_model(tmp_path / "large")
        assert enc.name == "gpt2" and model.config.vocab_size == 50257
    assert "has no tokenizer: using GPT-2's" in capsys.readouterr().out


def test_gpt2s_number_of_tokens_does_not_mean_gpt2s_tokenizer(tmp_path):
    library = train_library(270)
    description = json.loads(library.to_str())
    description["model"]["vocab"] |= {f"<{n}>": n for n in range(270, 50257)}
    save_model(tmp_path, 50257, Tokenizer.from_str(json.dumps(description)))
    _, enc = checkpoint.load_model(tmp_path)
    assert enc.encode_ordinary("the cat") == library.encode("the cat").ids


def test_another_kind_of_tokenizer_is_rejected_with_its_model(tmp_path):
    save_model(tmp_path, 300)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    with pytest.raises(UserError, match="WordPiece"):
        checkpoint.load_model(tmp_path)


def test_a_finetuned_model_keeps_the_tokenizer(tmp_path):
    """From a Hugging Face folder to a checkpoint, an export, and back."""
    library = train_library(270, added=["[PAD]", "<|im_start|>"])
    save_model(tmp_path / "hub", 280, library, eos_token="</s>")
    model, enc = checkpoint.load_model(tmp_path / "hub")
    checkpoint.save(tmp_path / "model.pt", checkpoint.build(model, enc, 1))
    export.main(export.Config(str(tmp_path / "model.pt"), str(tmp_path / "out")))

    idx = random_tokens(1, 9, vocab_size=270)
    text = "<|im_start|>the naïve cat"
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(text)["input_ids"] == library.encode(text).ids
    for name in ("model.pt", "out"):
        loaded, own = checkpoint.load_model(tmp_path / name)
        assert tokenizer.tokenizer_to_text(own) == tokenizer.tokenizer_to_text(enc)
        assert own.encode(text, allowed_special="all") == library.encode(text).ids
        assert torch.equal(loaded(idx), model(idx))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] == enc.eot_token == theirs.eos_token_id == 0


def test_an_export_states_the_longest_text(tmp_path):
    """Without it, a pipeline of transformers does not cut long texts, and raises IndexError."""
    save_model(tmp_path / "hub", 270, train_library(270))
    for name in ("hub", "out"):  # an exported tokenizer, then one exported again
        export.main(export.Config(str(tmp_path / name), str(tmp_path / "out")))
        theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
        assert theirs.model_max_length == TINY["block_size"]
        assert len(theirs("cat " * 1000, truncation=True).input_ids) == TINY["block_size"]


def test_an_export_replaces_the_tokenizer_of_an_earlier_one(tmp_path):
    ours, _ = tokenizer.train_tokenizer(["the cat sat on the mat"], 260)
    save_model(tmp_path, 270, train_library(270))
    _, foreign = checkpoint.load_model(tmp_path)
    for enc in (ours, foreign, ours):
        save_tokenizer(enc, tmp_path / "out")
        again = tokenizer.load_tokenizer(tmp_path / "out")
        assert tokenizer.tokenizer_to_text(again) == tokenizer.tokenizer_to_text(enc)


def test_a_hub_model_comes_with_its_tokenizer(tmp_path, monkeypatch):
    """The files of the tokenizer are downloaded too."""
    save_model(tmp_path / "hub", 270, train_library(270))

    def snapshot_download(repo, allow_patterns):
        folder = tmp_path / "cache"
        folder.mkdir(exist_ok=True)
        for file in (tmp_path / "hub").iterdir():
            if repo == "somebody/model" and any(map(file.match, allow_patterns)):
                (folder / file.name).write_bytes(file.read_bytes())
        return folder

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model, enc = checkpoint.load_model("somebody/model")
    assert (model.config.vocab_size, enc.n_vocab, enc.eot_token) == (270, 270, 0)
    (tmp_path / "cache" / "model.safetensors").unlink()
    assert tokenizer.load_tokenizer("somebody/model").n_vocab == 270
    assert not (tmp_path / "cache" / "model.safetensors").exists()


def test_shards_are_made_with_the_tokenizer_of_a_model(tmp_path):
    library = train_library(270, added=["[PAD]"])
    save_model(tmp_path / "model", 280, library)
    texts = [f"the naïve cat {n} sat on the mat </s>" for n in range(20)]
    for n, text in enumerate(texts):
        (tmp_path / f"{n:02}.txt").write_text(text, "utf-8")
    config = fineweb.Config(
        source="text",
        data_files=(str(tmp_path / "*.txt"),),
        out_dir=str(tmp_path / "shards"),
        tokenizer=str(tmp_path / "model"),
        num_workers=1,
    )
    for _ in range(2):  # the second run resumes
        fineweb.main(config)

    _, enc = checkpoint.load_model(tmp_path / "model")
    shards_enc = shards.shards_tokenizer(tmp_path / "shards")
    assert tokenizer.tokenizer_to_text(shards_enc) == tokenizer.tokenizer_to_text(enc)
    manifest = json.loads((tmp_path / "shards" / "manifest.json").read_text())
    assert manifest["tokenizer"] == "foreign_tokenizer.json"
    assert (manifest["vocab_size"], manifest["end_of_text"]) == (271, 0)
    library.encode_special_tokens = True  # </s> inside a document is text
    expected = [token for text in texts for token in (0, *library.encode(text).ids)]
    names = [shard["name"] for shard in manifest["shards"]]
    tokens = [token for name in names for token in np.load(tmp_path / "shards" / name).tolist()]
    assert tokens == expected
