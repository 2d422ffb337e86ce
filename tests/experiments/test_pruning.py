"""Attention heads: similarity and importance against references, removal against masking, stages on pruned models."""

import json

import numpy as np
import pytest
import torch
from conftest import SMALL_RUN, command, ok
from reference import random_model, random_reference, random_tokens, relative
from transformers import GPT2LMHeadModel

from common import checkpoint, lora, tokenizer
from common.console import UserError
from common.huggingface import load_pretrained, save_pretrained
from common.runtime import Runtime
from common.shards import shards_tokenizer
from experiments.pruning import (
    all_heads,
    attention_similarity,
    head_importance,
    head_masks,
    masked_heads,
    order_at_random,
    order_by_importance,
    order_by_redundancy,
    prune_heads,
    remaining,
)
from model import GPT, GPTConfig

CPU = Runtime(torch.device("cpu"), torch.float32)
KEEP = [[0, 3], [2], [0, 1, 2, 3]]


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_pruned_model_computes_what_the_masked_one_does(norm):
    model, idx = random_model(norm=norm), random_tokens(2, 33)
    pruned = prune_heads(model, KEEP)
    with torch.no_grad():
        whole = model(idx)
        with masked_heads(model, head_masks(model, KEEP)):
            masked = model(idx)
        assert (pruned(idx) - masked).abs().max() < 1e-5
        assert (whole - masked).abs().max() > 0.01  # the heads did something
        assert torch.equal(model(idx), whole)  # and do so again


def test_the_matrices_are_smaller_and_the_counts_follow():
    model, pruned = random_model(), prune_heads(random_model(), KEEP)
    C, width = 64, 16
    assert [tuple(block.attn.c_attn.weight.shape) for block in pruned.h] == [
        (3 * width * len(k), C) for k in KEEP
    ]
    assert [tuple(block.attn.c_proj.weight.shape) for block in pruned.h] == [
        (C, width * len(k)) for k in KEEP
    ]
    per_head = (
        3 * (C * width + width) + width * C
    )  # query, key, value with their biases, and the projection
    assert model.num_params() - pruned.num_params() == 5 * per_head
    assert model.flops_per_token(50) - pruned.flops_per_token(50) == 5 * (
        6 * per_head + 12 * width * 50
    )


def test_pruning_again_removes_heads_of_what_is_left():
    model, idx = random_model(), random_tokens(2, 20)
    twice = prune_heads(prune_heads(model, KEEP), [[1], [0], [0, 2]])
    once = prune_heads(model, [[3], [2], [0, 2]])
    assert torch.equal(twice(idx), once(idx))


@pytest.mark.parametrize("keep", [[[0], [1], []], [[0], [1]], [[0], [4], [1]], [[0, 0], [1], [2]]])
def test_a_layer_keeps_heads_of_its_own_and_one_at_least(keep):
    with pytest.raises(UserError, match="keeps one of its heads"):
        prune_heads(random_model(), keep)


@pytest.mark.parametrize("heads_kept", [(1, 2), (0, 1, 2), (1, 2, 5)])
def test_impossible_head_counts_are_refused(heads_kept):
    with pytest.raises(UserError, match="heads_kept"):
        GPTConfig(n_layer=3, n_head=4, n_embd=64, heads_kept=heads_kept)


def test_similarity_and_patterns_equal_those_of_transformers(tmp_path):
    reference = random_reference()
    reference.save_pretrained(tmp_path)
    windows = random_tokens(3, 150)  # longer than the rows that are computed at a time
    with torch.no_grad():
        attentions = torch.stack(reference(windows, output_attentions=True).attentions).double()
    by_head = attentions.transpose(1, 2).reshape(
        12, 3, 150, 150
    )  # layers and heads, texts, queries, keys
    cosines = torch.nn.functional.cosine_similarity(by_head[:, None], by_head[None], dim=-1)
    similarity, patterns = attention_similarity(
        load_pretrained(tmp_path).eval(), windows, CPU, shown=140
    )
    assert np.abs(similarity - cosines[..., 1:].mean((2, 3)).numpy()).max() < 1e-5
    assert np.abs(patterns - by_head.mean(1)[:, :140, :140].numpy()).max() < 1e-5


def test_importance_is_the_change_of_loss_with_the_mask():
    """Against a difference quotient in float64, one text and one head at a time."""
    model, x, y = random_model().double(), random_tokens(5, 12), random_tokens(5, 12, seed=3)
    expected = np.zeros((3, 4))
    for layer, head in all_heads(model.config):
        for text in range(len(x)):
            losses = []
            for value in (1 + 1e-4, 1 - 1e-4):
                masks = [torch.ones(1, 4, dtype=torch.float64) for _ in range(3)]
                masks[layer][0, head] = value
                with torch.no_grad(), masked_heads(model, masks):
                    losses.append(plain_loss(model, x[text : text + 1], y[text : text + 1]))
            expected[layer, head] += abs(losses[0] - losses[1]) / 2e-4
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = head_importance(model.float(), x, y, B=2, rt=CPU).reshape(3, 4)
    assert np.abs(found - expected).max() < 1e-3


def plain_loss(model: GPT, x: torch.Tensor, y: torch.Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()))


def copy_head(model: GPT, layer: int, source: int, target: int):
    """Let one head of a layer look at what another does."""
    attn, width = model.h[layer].attn, model.config.head_dim
    with torch.no_grad():
        for tensor in (attn.c_attn.weight, attn.c_attn.bias):
            parts = tensor.unflatten(0, (3, 4, width))
            parts[:2, target] = parts[:2, source]


def test_redundancy_removes_one_of_two_heads_that_are_the_same_first():
    model = random_model()
    copy_head(model, 1, source=0, target=2)
    similarity, _ = attention_similarity(model, random_tokens(2, 40), CPU, shown=8)
    assert similarity[4, 6] == pytest.approx(1, abs=1e-5)
    order = order_by_redundancy(model.config, similarity)
    assert order[0] in ((1, 0), (1, 2))
    assert len(set(order)) == len(order) == 9  # of twelve; one of each of three layers stays


def test_redundancy_by_hand():
    config = GPTConfig(n_layer=2, n_head=3, n_embd=48)
    similarity = np.eye(6)
    for i, j, cosine in (
        (0, 1, 0.9),
        (0, 2, 0.3),
        (1, 2, 0.5),
        (3, 4, 0.7),
        (3, 5, 0.95),
        (4, 5, 0.2),
        (1, 4, 0.99),
    ):
        similarity[i, j] = similarity[j, i] = cosine
    # 3-5 are most alike, and 3 is more like 4 than 5 is; then 0-1, and 1 is more like 2; then 0-2 before 4-5, where
    # only one peer is left and neither is more like the other: the later one goes.
    assert order_by_redundancy(config, similarity) == [(1, 0), (0, 1), (0, 2), (1, 2)]


def test_importance_spares_heads_that_do_something():
    model = random_model()
    with torch.no_grad():
        model.h[2].attn.c_proj.weight[:, 16:32] = 0  # what head 1 of layer 2 writes
    importance = head_importance(
        model, random_tokens(4, 20), random_tokens(4, 20, seed=2), B=4, rt=CPU
    )
    assert order_by_importance(model.config, importance)[0] == (2, 1)


def test_random_orders_differ_by_seed_only_and_leave_each_layer_a_head():
    config = GPTConfig(n_layer=3, n_head=4, n_embd=64)
    order = order_at_random(config, 1)
    assert order == order_at_random(config, 1) != order_at_random(config, 2)
    assert [len(heads) for heads in remaining(config, order)] == [1, 1, 1]


# A pruned model is a model like any other


def test_generation_with_a_cache_is_that_of_the_masked_model():
    model = random_model()
    with masked_heads(model, head_masks(model, KEEP)):
        expected = model.generate([[1, 2, 3], [7]], 20, temperature=0)
    assert prune_heads(model, KEEP).generate([[1, 2, 3], [7]], 20, temperature=0) == expected


def test_export_writes_removed_heads_as_zeros(tmp_path):
    model, idx = prune_heads(random_model(), KEEP), random_tokens(2, 40)
    save_pretrained(model, tmp_path)
    reference, again = (
        GPT2LMHeadModel.from_pretrained(tmp_path).eval(),
        load_pretrained(tmp_path).eval(),
    )
    assert reference.transformer.h[1].attn.c_proj.weight.shape == (64, 64)
    with torch.no_grad():
        logits = model(idx)
        assert (reference(idx).logits - logits).abs().max() < 1e-4
        assert (again(idx) - logits).abs().max() < 1e-5


def test_adapters_merge_into_a_pruned_model():
    model, idx = prune_heads(random_model(), KEEP), random_tokens(2, 20)
    lora.add_adapters(model, rank=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.normal_()
    merged = GPT(model.config).eval()
    merged.load_state_dict(lora.merged_state(model))
    assert relative(merged(idx), model.eval()(idx)) < 1e-5


@pytest.fixture(scope="module")
def pruned_file(data_dir, tmp_path_factory):
    """A pruned checkpoint on the tokenizer of the shards, as head_study writes it."""
    enc = shards_tokenizer(data_dir)
    torch.manual_seed(0)
    whole = GPT(GPTConfig(block_size=64, vocab_size=enc.n_vocab, n_layer=2, n_head=4, n_embd=32))
    model = prune_heads(whole, [[1, 2], [3]])
    path = tmp_path_factory.mktemp("pruned") / "model_pruned.pt"
    text = tokenizer.tokenizer_to_text(enc)
    checkpoint.save(
        path, dict(model=model.state_dict(), config=model.config_dict(), tokenizer=text, step=0)
    )
    return path


@pytest.mark.slow
def test_it_trains_resumes_evaluates_samples_and_exports(data_dir, pruned_file, tmp_path):
    words = [
        "train_gpt2.py",
        "--data_dir",
        data_dir,
        *SMALL_RUN,
        "--init_from",
        pruned_file,
        "--log_dir",
        tmp_path,
    ]
    words += ["--max_steps", 12, "--checkpoint_every", 6]
    ok(command(*words))
    final = tmp_path / "model_final.pt"
    once = checkpoint.load(final)
    final.unlink()
    assert "model_00006.pt, step 6" in ok(command(*words, "--resume")).stdout
    again = checkpoint.load(final)
    assert again["config"]["heads_kept"] == (2, 1)
    assert all(torch.equal(again["model"][name], tensor) for name, tensor in once["model"].items())
    words = [
        "--benchmarks",
        "val",
        "--val_data",
        data_dir,
        "--out_dir",
        tmp_path / "evaluation",
        "--device",
        "cpu",
    ]
    assert "bits per byte" in ok(command("evaluate.py", "--models", final, *words)).stdout
    sample = command(
        "sample.py", "--model", final, "--prompt", "import", "--max_tokens", 20, "--device", "cpu"
    )
    assert "import" in ok(sample).stdout
    ok(command("export.py", "--model", final, "--out", tmp_path / "exported"))
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["n_head"] == 4
