"""The study of vocabulary sizes: definitions by hand, and the study end to end."""

import json
import math

import pytest
import torch
from conftest import TEXTS
from study_helpers import CPU, PNG, TINY_MODEL, run_main

from common.console import UserError
from common.shards import shards_tokenizer
from common.tokenizer import load_tokenizer, train_tokenizer
from experiments import tokenizer_study
from experiments.fragmentation import count_words, find_terms
from model import GPT, GPTConfig

STUDY_FLAGS = [
    *TINY_MODEL,
    *"--context_bytes 64 --sequences 4 --B 4 --max_steps 12 --seeds 1".split(),
    *"--vocab_sizes 300 600 --num_parallel 2".split(),
]


def test_smaller_vocabularies_are_the_beginnings_of_larger_ones():
    large, _ = train_tokenizer(list(TEXTS), 1500)
    small, _ = train_tokenizer(list(TEXTS), 700)
    first = {token: rank for token, rank in large._mergeable_ranks.items() if rank < 699}
    assert small._mergeable_ranks == first


def test_terms_by_hand():
    texts = [
        "The os.path module (see utf8 and file_name, or camelCase) is a well-known "
        '"abstraction-layer"; the modules',
        "the Implementations. The other see, e.g. U.S. McDonald in the 1990s",
    ]
    known = count_words(["module see see-see, see! and the other", "other: other, other"])
    assert known == {"module": 1, "see": 4, "other": 4, "the": 1, "and": 1}
    words, terms = find_terms(texts, known, count=100)
    assert set(terms["code-like"]) == {"os.path", "utf8", "file_name", "camelCase"}
    assert set(terms["compound"]) == {"well-known", "abstraction-layer"}
    assert terms["long"] == ["Implementations"]
    assert set(terms["rare"]) == {"module", "modules", "McDonald"}
    assert (words["see"], words["the"], words["The"]) == (2, 3, 2)


def test_bits_per_byte_by_hand(data_dir):
    """A model whose output is 0 gives every token the same probability."""
    enc = shards_tokenizer(data_dir)
    texts = ["import os\n", "and Ünïcode"]
    model = GPT(GPTConfig(block_size=8, vocab_size=enc.n_vocab, n_layer=1, n_head=1, n_embd=8))
    with torch.no_grad():
        model.wte.weight.zero_()
    _, bits = tokenizer_study.bits_per_byte(model, enc, texts, 4, 8, CPU)
    # An end-of-text token precedes each text. All tokens but the first are predicted.
    num_predicted = sum(1 + len(enc.encode_ordinary(text)) for text in texts) - 1
    num_bytes = sum(len(text.encode()) for text in texts)
    assert bits == pytest.approx(num_predicted * math.log2(enc.n_vocab) / num_bytes, rel=1e-5)


def no_network(name):
    raise OSError("no network")


@pytest.mark.slow
def test_tokenizer_study(tmp_path, capsys, monkeypatch):
    """Without GPT-2's vocabulary, which is not always available and takes longer."""
    monkeypatch.setattr(tokenizer_study, "load_tokenizer", no_network)
    text = "\n".join(TEXTS) + "Ünïcödé " * 50
    (tmp_path / "text.txt").write_text(text)
    out = tmp_path / "study"
    flags = ["--source", "text", "--data_files", tmp_path / "text.txt", "--out_dir", out]
    flags += STUDY_FLAGS
    run_main(tokenizer_study, *flags)
    output = capsys.readouterr().out
    assert "warning: continuing without GPT-2's vocabulary: no network" in output
    results = json.loads((out / "results.json").read_text())
    size = len(text.encode())
    assert results["text"] == dict(tokens=size + 1, documents=1)

    # The held-out text precedes the training text of every vocabulary, and none has seen it.
    config = tokenizer_study.Config(source="text", out_dir=str(out), vocab_sizes=(300, 600))
    names = [path.name for path in (out / "shards").iterdir() if path.is_dir()]
    [held_out] = tokenizer_study.held_out(config, out, names)
    assert text.startswith(held_out)
    assert 0.05 * size < len(held_out.encode()) <= 0.1 * size
    learned_from = "".join(tokenizer_study.training_texts(config, out / "text", "reading"))
    assert text.endswith(learned_from)
    assert len(held_out) + len(learned_from) <= len(text)

    for name in ("300", "600"):
        result = results[f"vocabulary {name}"]
        enc = load_tokenizer(out / f"vocab_{name}.tiktoken")
        num_tokens = len(enc.encode_ordinary(text))
        assert result["vocab_size"] == enc.n_vocab == int(name)
        assert results[f"shards/{name}"]["tokens"] == num_tokens + 1
        # All models read the same number of bytes.
        assert result["T"] == round(64 * (num_tokens + 1) / size)
        assert result["bytes_per_token"] == pytest.approx(
            len(held_out.encode()) / len(enc.encode_ordinary(held_out)), rel=1e-9
        )
        run_config = json.loads((out / "runs" / f"{name}_seed_1" / "config.json").read_text())
        assert run_config["constants"]["total_batch_size"] == 4 * result["T"]
        assert 1 < results[f"{name} seed 1"]["bits_per_byte"] < 8
    small, large = results["vocabulary 300"], results["vocabulary 600"]
    assert large["tokens_per_word"] < small["tokens_per_word"]
    assert (out / "tradeoff.png").read_bytes()[:4] == PNG
    assert (out / "report.md").read_text() in output

    # A finished study runs nothing again.
    before = {path: path.stat().st_mtime for path in out.rglob("*.npy")}
    run_main(tokenizer_study, *flags)
    assert all(path.stat().st_mtime == mtime for path, mtime in before.items())


@pytest.mark.slow
def test_gpt2s_vocabulary_is_compared_with_the_learned_ones(tmp_path):
    try:
        load_tokenizer("gpt2")
    except OSError:
        pytest.skip("GPT-2's vocabulary is not available")
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    flags = ["--source", "text", "--data_files", tmp_path / "text.txt", *STUDY_FLAGS]
    flags += ["--vocab_sizes", 300, "--out_dir", tmp_path / "study"]
    run_main(tokenizer_study, *flags)
    results = json.loads((tmp_path / "study" / "results.json").read_text())
    small, large = results["vocabulary 300"], results["vocabulary gpt2"]
    assert large["vocab_size"] == 50257
    assert large["tokens_per_word"] < small["tokens_per_word"]
    assert results["gpt2 seed 1"]["bits_per_byte"] > 1
    assert (tmp_path / "study" / "tradeoff.png").read_bytes()[:4] == PNG


def test_wrong_inputs_are_refused(tmp_path):
    with pytest.raises(UserError, match="sequences 4 is not divisible by B 3"):
        tokenizer_study.Config(sequences=4, B=3)
    flags = ["--source", "text", *STUDY_FLAGS]
    (tmp_path / "text.txt").write_text("too little text " * 40)
    short = ["--data_files", tmp_path / "text.txt", "--out_dir", tmp_path / "study"]
    with pytest.raises(UserError, match="the texts give only"):
        run_main(tokenizer_study, *flags, *short)
    missing = ["--data_files", tmp_path / "no.txt", "--out_dir", tmp_path / "other"]
    with pytest.raises(UserError, match="no file matches"):
        run_main(tokenizer_study, *flags, *missing)
