"""Attention heads: similarity, importance, removal and orders; stages on pruned models."""

import json

import numpy as np
import pytest
import torch
from conftest import SMALL_RUN, command, ok
from reference import random_model, random_reference, random_tokens, relative
from transformers import GPT2LMHeadModel

from common import checkpoint, lora
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
KEEP = [[0, 3], [2], [0, 1, 2, 3]]  # of 3 layers with 4 heads


# ---------------------------------------------------------------------------------------------
# Removing heads


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_pruned_model_computes_what_the_masked_one_does(norm):
    model, idx = random_model(norm=norm), random_tokens(2, 33)
    pruned = prune_heads(model, KEEP)
    with torch.no_grad():
        whole = model(idx)
        with masked_heads(model, head_masks(model, KEEP)):
            masked = model(idx)
        assert (pruned(idx) - masked).abs().max() < 1e-5
        assert (whole - masked).abs().max() > 0.01  # the heads had an effect
        assert torch.equal(model(idx), whole)  # and have it again


def test_the_matrices_are_smaller_and_the_counts_follow():
    model, pruned = random_model(), prune_heads(random_model(), KEEP)
    C, width = 64, 16
    for block, heads in zip(pruned.h, KEEP):
        assert block.attn.c_attn.weight.shape == (3 * width * len(heads), C)
        assert block.attn.c_proj.weight.shape == (C, width * len(heads))
    # Query, key and value with their biases, and the projection
    per_head = 3 * (C * width + width) + width * C
    assert model.num_params() - pruned.num_params() == 5 * per_head
    saved_flops = model.flops_per_token(50) - pruned.flops_per_token(50)
    assert saved_flops == 5 * (6 * per_head + 12 * width * 50)


def test_a_pruned_model_can_be_pruned_again():
    model, idx = random_model(), random_tokens(2, 20)
    twice = prune_heads(prune_heads(model, KEEP), [[1], [0], [0, 2]])
    once = prune_heads(model, [[3], [2], [0, 2]])
    assert torch.equal(twice(idx), once(idx))


@pytest.mark.parametrize("keep", [[[0], [1], []], [[0], [1]], [[0], [4], [1]], [[0, 0], [1], [2]]])
def test_impossible_selections_are_refused(keep):
    with pytest.raises(ValueError, match="must list one or more of the heads"):
        prune_heads(random_model(), keep)


@pytest.mark.parametrize("heads_kept", [(1, 2), (0, 1, 2), (1, 2, 5)])
def test_impossible_head_counts_are_refused(heads_kept):
    with pytest.raises(ValueError, match="heads_kept"):
        GPTConfig(n_layer=3, n_head=4, n_embd=64, heads_kept=heads_kept)


# ---------------------------------------------------------------------------------------------
# Similarity and importance


def test_similarity_and_patterns_equal_those_of_transformers(tmp_path):
    reference = random_reference()
    reference.save_pretrained(tmp_path)
    texts = random_tokens(3, 150)  # longer than the number of queries computed at a time
    with torch.no_grad():
        attentions = torch.stack(reference(texts, output_attentions=True).attentions).double()
    # (layers, texts, heads, queries, keys) -> (layers * heads, texts, queries, keys)
    by_head = attentions.transpose(1, 2).reshape(12, 3, 150, 150)
    cosines = torch.nn.functional.cosine_similarity(by_head[:, None], by_head[None], dim=-1)
    model = load_pretrained(tmp_path).eval()
    similarity, patterns = attention_similarity(model, texts, CPU, shown=140)
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
    measured = head_importance(model.float(), x, y, B=2, rt=CPU).reshape(3, 4)
    assert np.abs(measured - expected).max() < 1e-3


def plain_loss(model: GPT, x: torch.Tensor, y: torch.Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()))


# ---------------------------------------------------------------------------------------------
# Orders of removal


def copy_head(model: GPT, layer: int, source: int, target: int):
    """Let one head of a layer attend to the same tokens as another."""
    attn, width = model.h[layer].attn, model.config.head_dim
    with torch.no_grad():
        for tensor in (attn.c_attn.weight, attn.c_attn.bias):
            parts = tensor.unflatten(0, (3, 4, width))
            parts[:2, target] = parts[:2, source]


def test_redundancy_first_removes_one_of_two_identical_heads():
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
    # The pair 3-5 is the most similar, and 3 is more similar to 4 than 5 is. Then comes 0-1, and 1
    # is more similar to 2. Then 0-2, before 4-5: neither has another head left to be similar to,
    # and the one with the higher number is removed.
    assert order_by_redundancy(config, similarity) == [(1, 0), (0, 1), (0, 2), (1, 2)]


def test_a_head_without_effect_is_the_least_important():
    model = random_model()
    with torch.no_grad():
        model.h[2].attn.c_proj.weight[:, 16:32] = 0  # the output of head 1 of layer 2
    x, y = random_tokens(4, 20), random_tokens(4, 20, seed=2)
    importance = head_importance(model, x, y, B=4, rt=CPU)
    assert order_by_importance(model.config, importance)[0] == (2, 1)


def test_random_orders_depend_on_the_seed_and_leave_each_layer_a_head():
    config = GPTConfig(n_layer=3, n_head=4, n_embd=64)
    order = order_at_random(config, 1)
    assert order == order_at_random(config, 1) != order_at_random(config, 2)
    assert [len(heads) for heads in remaining(config, order)] == [1, 1, 1]


# ---------------------------------------------------------------------------------------------
# Pruned models in other stages


def test_generation_with_a_cache_is_that_of_the_masked_model():
    model = random_model()
    with masked_heads(model, head_masks(model, KEEP)):
        expected = model.generate([[1, 2, 3], [7]], 20, temperature=0)
    assert prune_heads(model, KEEP).generate([[1, 2, 3], [7]], 20, temperature=0) == expected


def test_export_writes_removed_heads_as_zeros(tmp_path):
    model, idx = prune_heads(random_model(), KEEP), random_tokens(2, 40)
    save_pretrained(model, tmp_path)
    reference = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    again = load_pretrained(tmp_path).eval()
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
    """A pruned checkpoint with the tokenizer of the shards, as head_study writes it."""
    enc = shards_tokenizer(data_dir)
    torch.manual_seed(0)
    whole = GPT(GPTConfig(block_size=64, vocab_size=enc.n_vocab, n_layer=2, n_head=4, n_embd=32))
    model = prune_heads(whole, [[1, 2], [3]])
    path = tmp_path_factory.mktemp("pruned") / "model_pruned.pt"
    checkpoint.save(path, checkpoint.build(model, enc, step=0))
    return path


@pytest.mark.slow
def test_it_trains_resumes_evaluates_samples_and_exports(data_dir, pruned_file, tmp_path):
    train = ["train_gpt2.py", "--data_dir", data_dir, *SMALL_RUN, "--init_from", pruned_file]
    train += ["--log_dir", tmp_path, "--max_steps", 12, "--checkpoint_every", 6]
    ok(command(*train))
    final = tmp_path / "model_final.pt"
    once = checkpoint.load(final)
    final.unlink()
    assert "model_00006.pt, step 6" in ok(command(*train, "--resume")).stdout
    again = checkpoint.load(final)
    assert again["config"]["heads_kept"] == (2, 1)
    assert all(torch.equal(again["model"][name], tensor) for name, tensor in once["model"].items())

    evaluate = ["evaluate.py", "--models", final, "--benchmarks", "val", "--val_data", data_dir]
    evaluate += ["--out_dir", tmp_path / "evaluation", "--device", "cpu"]
    assert "bits per byte" in ok(command(*evaluate)).stdout
    sample = ["sample.py", "--model", final, "--prompt", "import", "--max_tokens", 20]
    assert "import" in ok(command(*sample, "--device", "cpu")).stdout
    ok(command("export.py", "--model", final, "--out", tmp_path / "exported"))
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["n_head"] == 4
