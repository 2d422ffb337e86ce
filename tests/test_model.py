"""The model against transformers' GPT-2, float64 arithmetic by hand, and published numbers."""

import json
import math

import pytest
import torch
from reference import (
    TINY,
    V,
    random_model,
    random_tokens,
    relative,
)
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from common.optim import compile_model
from model import (
    GPT,
    IGNORE,
    OPENAI_MODELS,
    SHORT_CONTEXT,
    GPTConfig,
    KVCache,
    attention,
    linear_cross_entropy,
)

# Against transformers


@pytest.mark.parametrize("length", [1, 2, 17, 128, 256])
def test_logits_equal_transformers(pair, length):
    reference, model = pair
    idx = random_tokens(2, length, seed=length)
    with torch.no_grad():
        ours, theirs = model(idx), reference(idx).logits
    assert ours.shape == (2, length, V)
    assert (ours - theirs).abs().max() < 1e-4


def test_loss_and_every_gradient_equal_transformers(pair):
    reference, model = pair
    idx = random_tokens(4, 65)
    theirs = reference(idx, labels=idx).loss
    ours = model(idx[:, :-1], idx[:, 1:])
    assert abs(ours.item() - theirs.item()) < 1e-5
    theirs.backward()
    ours.backward()
    layers = dict(reference.transformer.named_modules())
    expected = {}
    for name, p in reference.transformer.named_parameters():
        layer = layers[name.rpartition(".")[0]]
        expected[name] = p.grad.t() if isinstance(layer, Conv1D) and p.dim() == 2 else p.grad
    gradients = {name: p.grad for name, p in model.named_parameters()}
    gradients["wte.weight"] = gradients["wte.weight"][:V]
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert relative(gradient, expected[name]) < 1e-4, name


def test_ignored_targets_do_not_count(pair):
    reference, model = pair
    idx, targets = random_tokens(3, 40), random_tokens(3, 40, seed=2)
    targets[0] = IGNORE
    targets[1, ::3] = IGNORE
    logits = reference(idx).logits
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    assert abs(model(idx, targets).item() - expected.item()) < 1e-5


# Sizes


@pytest.mark.parametrize(
    "name, published",
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_published_parameter_counts(name, published):
    with torch.device("meta"):
        assert GPT(GPTConfig(**OPENAI_MODELS[name])).num_params() == published
        if name == "gpt2":
            assert GPT(GPTConfig()).num_params() == published


def test_flops_per_token_against_a_count_of_matrix_products():
    T = 1024
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = GPT(GPTConfig())
        model(torch.zeros(1, T, dtype=torch.long))
    assert model.flops_per_token(T) == pytest.approx(3 * counter.get_total_flops() / T, rel=0.01)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(n_embd=65),
        dict(n_layer=0),
        dict(norm="middle"),
        dict(dropout=1.0),
        dict(vocab_size=300, padded_vocab_size=299),
    ],
)
def test_impossible_configurations_are_refused(wrong):
    with pytest.raises(ValueError):
        GPTConfig(**TINY | wrong)


def test_padding_rows_never_leave_the_model():
    model = random_model()
    with torch.no_grad():
        model.wte.weight[V:] = 5.0  # would win every softmax that let them in
    assert model.wte.weight.shape == (384, 64)
    idx, targets = random_tokens(3, 50), random_tokens(3, 50, seed=2)
    logits = model(idx)
    assert logits.shape == (3, 50, V)
    loss = model(idx, targets)
    assert abs(loss.item() - F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()) < 1e-5
    loss.backward()
    gradient = model.wte.weight.grad
    assert gradient[V:].count_nonzero() == 0
    assert gradient[:V].abs().sum(1).min() > 0  # and every real row learns
    hidden = model.hidden(idx)
    torch.testing.assert_close(model.head(hidden[:, -1]), logits[:, -1], atol=1e-5, rtol=1e-5)


def test_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match="context"):
        random_model()(random_tokens(1, 257))


# Generation


def greedy_without_cache(model: GPT, prompt: list[int], max_tokens: int) -> list[int]:
    """Each token from a pass over the window of the text that the docstring of stream describes."""
    size = model.config.block_size
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(max_tokens):
            start = 0
            while len(tokens) - start > size:
                start += max(1, size // 2)
            tokens.append(model(torch.tensor([tokens[start:]]))[0, -1].argmax().item())
    return tokens[len(prompt) :]


def test_greedy_with_cache_equals_greedy_without():
    model = random_model()
    prompt = random_tokens(11).tolist()
    expected = greedy_without_cache(model, prompt, 200)
    assert len(set(expected)) > 20  # no text that says the same again and again
    assert model.generate([prompt], 200, temperature=0) == [expected]


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_logits_with_cache_equal_those_without(norm):
    model = random_model(norm=norm)
    tokens = random_tokens(2, 40)
    cache = KVCache(model.config, 40)
    with torch.no_grad():
        parts = [
            model.head(model.hidden(tokens[:, a:b], torch.arange(a, b)[None], cache=cache))
            for a, b in [(0, 7), (7, 8), (8, 9), (9, 30), (30, 40)]
        ]
        torch.testing.assert_close(torch.cat(parts, 1), model(tokens), atol=1e-4, rtol=0)


def test_greedy_equals_transformers(pair):
    reference, model = pair
    prompt = random_tokens(1, 5)
    reference.generation_config.eos_token_id = None
    mask = torch.ones_like(prompt)
    theirs = reference.generate(
        prompt, attention_mask=mask, do_sample=False, max_new_tokens=200, pad_token_id=0
    )
    ours = model.generate(prompt.tolist(), 200, temperature=0)
    assert len(ours[0]) == 200
    assert ours == theirs[:, 5:].tolist()


def test_rows_of_a_batch_do_not_see_each_other():
    model = random_model()
    prompts = [random_tokens(length, seed=length).tolist() for length in (7, 1, 30, 12, 7)]
    expected = [greedy_without_cache(model, prompt, 40) for prompt in prompts]
    assert model.generate(prompts, 40, temperature=0) == expected


@pytest.mark.parametrize("block_size", [1, 2, 7, 16])
def test_texts_longer_than_the_context(block_size):
    """Rows move their windows at different tokens; some prompts are longer than the context."""
    model = random_model(block_size=block_size)
    prompts = [random_tokens(length, seed=length).tolist() for length in (5, 1, 40, 16, 17, 5)]
    copies = [list(prompt) for prompt in prompts]
    expected = [greedy_without_cache(model, prompt, 60) for prompt in prompts]
    assert model.generate(prompts, 60, temperature=0) == expected
    assert prompts == copies
    # A text is continued in the same way wherever it was interrupted.
    longer = [prompt + text[:23] for prompt, text in zip(prompts, expected)]
    assert model.generate(longer, 37, temperature=0) == [text[23:] for text in expected]


def test_windows_move_rarely(monkeypatch):
    """Past a context of 32, 17 tokens are read again once in 16 tokens."""
    model = random_model(block_size=32)
    computed = []
    hidden = model.hidden

    def counted(idx, *args, **kwargs):
        computed.append(idx.numel())
        return hidden(idx, *args, **kwargs)

    monkeypatch.setattr(model, "hidden", counted)
    model.generate([random_tokens(8).tolist()], 24 + 16 * 10 + 1)
    assert computed[:25] == [8] + [1] * 24  # fills the context
    assert sum(computed[25:]) == 10 * (17 + 16)


def test_stop_token_ends_its_row_only():
    model = random_model()
    prompts = [random_tokens(4, seed=seed).tolist() for seed in range(4)]
    whole = model.generate(prompts, 30, temperature=0)
    stop = whole[0][9]
    expected = [row[: row.index(stop)] if stop in row else row for row in whole]
    assert any(len(row) == 30 for row in expected) and len(expected[0]) <= 9
    assert model.generate(prompts, 30, stop_token=stop, temperature=0) == expected


def test_seed_decides_the_draws_alone():
    model = random_model()
    prompts = [[1, 2, 3], [4]]
    before = torch.get_rng_state()
    first = model.generate(prompts, 30, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert model.generate(prompts, 30, seed=7) == first
    assert model.generate(prompts, 30, seed=8) != first
    assert list(map(list, zip(*model.stream(prompts, 30, seed=7)))) == first


@pytest.mark.parametrize("sampling", [dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-4)])
def test_the_narrowest_sampling_is_greedy(sampling):
    model = random_model()
    prompts = [[1, 2, 3], [4]]
    assert model.generate(prompts, 50, **sampling) == model.generate(prompts, 50, temperature=0)


@pytest.mark.parametrize(
    "sampling",
    [
        dict(),
        dict(temperature=0.5),
        dict(temperature=2.0),
        dict(top_k=5),
        dict(top_k=100),
        dict(top_p=0.7),
        dict(temperature=2.0, top_k=9, top_p=0.6),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(sampling):
    """Pearson's chi-squared test of 8,000 draws against probabilities computed in float64."""
    model = random_model(vocab_size=16, n_layer=1, n_embd=32, n_head=2, seed=3)
    draws = 8_000
    logits = (
        model(torch.tensor([[3, 1, 4]]))[0, -1].double() / sampling.get("temperature", 1.0)
    ).tolist()
    probs = {token: math.exp(logit) for token, logit in enumerate(logits)}
    ranked = sorted(probs, key=probs.get, reverse=True)[: sampling.get("top_k")]
    total, reached, kept = sum(probs[token] for token in ranked), 0.0, []
    for token in ranked:
        if reached < sampling.get("top_p", 2.0):
            kept.append(token)
        reached += probs[token] / total
    total = sum(probs[token] for token in kept)

    outputs = model.generate([[3, 1, 4]] * draws, 1, **sampling)
    counts = torch.tensor(outputs)[:, 0].bincount(minlength=16).tolist()
    expected = {token: draws * probs[token] / total for token in kept}
    # A sound test has no cell without a few expected draws.
    assert len(kept) > 2 and min(expected.values()) > 5, expected
    assert {token for token, count in enumerate(counts) if count} == set(kept)
    chi2 = sum((counts[token] - expected[token]) ** 2 / expected[token] for token in kept)
    freedom = len(kept) - 1
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom) + 4


@pytest.mark.parametrize("prompts", [[[]], [[1, 2], []], []])
def test_empty_prompts_are_refused(prompts):
    model = random_model().train()
    with pytest.raises(ValueError, match="prompt"):
        model.generate(prompts, 5)
    assert model.training  # a refusal leaves no trace


def test_generate_puts_the_mode_back():
    model = random_model(dropout=0.5)
    expected = model.generate([[1, 2]], 20, temperature=0)
    model.train()
    assert model.generate([[1, 2]], 20, temperature=0) == expected
    assert model.training


# Initialization and learning


@pytest.fixture(scope="module")
def fresh():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=256, n_layer=4, n_head=4, n_embd=128))


def test_initial_loss_is_that_of_a_guess(fresh):
    idx, targets = (
        random_tokens(4, 256, vocab_size=50257),
        random_tokens(4, 256, vocab_size=50257, seed=2),
    )
    with torch.no_grad():
        loss = fresh(idx, targets).item()
    assert math.log(50257) < loss < math.log(50257) + 0.3


def test_initial_weights(fresh):
    for name, p in fresh.named_parameters():
        if name.endswith("bias"):
            assert p.count_nonzero() == 0, name
        elif ".ln_" in name or name.startswith("ln_"):
            assert (p == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 4) if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel()), name


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_one_batch_can_be_learned_by_heart(norm):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY | dict(n_layer=2, norm=norm)))
    idx = random_tokens(4, 33)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(200):
        optimizer.zero_grad()
        model(idx[:, :-1], idx[:, 1:]).backward()
        optimizer.step()
    logits = model(idx[:, :-1])
    assert F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten()).item() < 0.01


# The loss


def loss_problem(N: int, C: int = 48):
    generator = torch.Generator().manual_seed(N)
    x = torch.randn(N, C, generator=generator)
    weight = torch.randn(384, C, generator=generator) * 0.3
    targets = torch.randint(V, (N,), generator=generator)
    if N > 1:
        targets[torch.rand(N, generator=generator) < 0.3] = IGNORE
    return x, weight, targets


def float64_reference(x, weight, targets):
    """Loss and both gradients, from the definition."""
    x, weight = x.double(), weight.double()
    counted = [n for n, target in enumerate(targets.tolist()) if target != IGNORE]
    probs = (x @ weight[:V].t()).softmax(-1)
    loss = -probs[counted, targets[counted]].log().sum() / len(counted)
    d_logits = torch.zeros_like(probs)
    d_logits[counted] = probs[counted] / len(counted)
    d_logits[counted, targets[counted]] -= 1 / len(counted)
    d_weight = torch.zeros_like(weight)
    d_weight[:V] = d_logits.t() @ x
    return loss, d_logits @ weight[:V], d_weight


# One token, less than one part, one token more than a part, eight parts, a shorter last part.
@pytest.mark.parametrize("N", [1, 100, 1025, 8192, 8500])
def test_linear_cross_entropy_against_float64(N):
    x, weight, targets = loss_problem(N)
    loss, d_x, d_weight = float64_reference(x, weight, targets)
    x.requires_grad_()
    weight.requires_grad_()
    ours = linear_cross_entropy(x, weight, targets, V)
    assert abs(ours.item() - loss.item()) < 1e-5
    (ours * 3).backward()
    assert relative(x.grad, 3 * d_x) < 1e-5
    assert relative(weight.grad, 3 * d_weight) < 1e-5
    assert weight.grad[V:].count_nonzero() == 0
    assert x.grad[targets == IGNORE].count_nonzero() == 0


def test_linear_cross_entropy_without_gradients():
    x, weight, targets = loss_problem(300)
    loss, d_x, _ = float64_reference(x, weight, targets)
    with torch.no_grad():
        ours = linear_cross_entropy(x.requires_grad_(), weight, targets, V)
    assert not ours.requires_grad
    assert abs(ours.item() - loss.item()) < 1e-5
    linear_cross_entropy(x, weight, targets, V).backward()  # the weight is frozen
    assert relative(x.grad, d_x) < 1e-5
    assert weight.grad is None


# All rows of a part at once, and few enough that the last ones are fewer
@pytest.mark.parametrize("cached_logits", [10**9, 100 * V])
def test_linear_cross_entropy_under_autocast(cached_logits, monkeypatch):
    monkeypatch.setattr("model.CACHED_LOGITS", cached_logits)
    x, weight, targets = loss_problem(2125)
    loss, d_x, d_weight = float64_reference(x, weight, targets)
    x.requires_grad_()
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(x, weight, targets, V)
    assert ours.dtype == torch.float32
    assert abs(ours.item() - loss.item()) < 5e-3 * loss.item()
    ours.backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    assert 1e-5 < relative(x.grad, d_x) < 2e-2  # bfloat16 took part, and did no harm
    assert 1e-5 < relative(weight.grad, d_weight) < 2e-2


# Short contexts, where the scores are stored, and longer ones
@pytest.mark.parametrize("T", [50, SHORT_CONTEXT + 1])
@pytest.mark.parametrize("is_masked", [False, True])
def test_attention_in_bfloat16_against_float64(T, is_masked):
    torch.manual_seed(0)
    q, k, v, grad = torch.randn(4, 2, 3, T, 16)  # each (B, n_head, T, head_dim)
    # Each token sees itself, and in the masked case about half of the others.
    mask = torch.ones(2, 1, T, T).tril().bool()
    if is_masked:
        mask = (torch.rand(2, 1, T, T) < 0.5) | torch.eye(T).bool()

    wide = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    scores = (wide[0] @ wide[1].mT) / 4  # sqrt(head_dim)
    expected = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ wide[2]
    expected.backward(grad.double())

    narrow = [tensor.bfloat16().requires_grad_() for tensor in (q, k, v)]
    y = attention(*narrow, mask if is_masked else None, dropout=0.0)
    y.backward(grad.bfloat16())
    assert 1e-5 < relative(y, expected) < 2e-2
    for ours, exact in zip(narrow, wide):
        assert relative(ours.grad, exact.grad) < 2e-2


def peak_bytes(step, tmp_path) -> int:
    """Peak bytes of tensors allocated during a step, from torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        torch.ones(1)  # the first event says what there was before
        step()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    totals = [(e["ts"], e["args"]["Total Allocated"]) for e in events if e["name"] == "[memory]"]
    totals = [total for _, total in sorted(totals)]
    return max(totals) - totals[0]


def test_linear_cross_entropy_needs_little_memory(tmp_path):
    x = torch.randn(4096, 16, requires_grad=True)
    weight = torch.randn(50304, 16, requires_grad=True)
    targets = random_tokens(4096, vocab_size=50257)
    whole = peak_bytes(
        lambda: F.cross_entropy(F.linear(x, weight)[:, :50257], targets).backward(), tmp_path
    )
    assert (
        whole > 2 * 4096 * 50257 * 4
    )  # logits and their gradient: the measurement sees what it should
    ours = peak_bytes(lambda: linear_cross_entropy(x, weight, targets, 50257).backward(), tmp_path)
    assert 1024 * 50304 * 4 < ours < whole / 2


# Post-LN, dropout, compilation


def test_post_ln_block_against_float64():
    model = random_model(norm="post", n_layer=1)
    p = {name: tensor.double() for name, tensor in model.state_dict().items()}
    C, n_head, T = 64, 4, 21

    def layer_norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return centred / scale * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x, name):
        return x @ p[f"{name}.weight"].t() + p[f"{name}.bias"]

    idx = random_tokens(T)
    x = p["wte.weight"][idx] + p["wpe.weight"][:T]
    qkv = linear(x, "h.0.attn.c_attn")
    heads = []
    for head in range(n_head):
        q, k, v = (qkv[:, part * C + head * 16 : part * C + head * 16 + 16] for part in range(3))
        scores = q @ k.t() / math.sqrt(16)
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ v)
    x = layer_norm(x + linear(torch.cat(heads, -1), "h.0.attn.c_proj"), "h.0.ln_1")
    inner = linear(x, "h.0.mlp.c_fc")
    inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
    x = layer_norm(x + linear(inner, "h.0.mlp.c_proj"), "h.0.ln_2")
    logits = x @ p["wte.weight"][:V].t()
    assert not any(name.startswith("ln_f") for name in p)
    assert (model(idx[None])[0].double() - logits).abs().max() < 1e-4


@pytest.mark.parametrize("site", ["embedding", "attention", "attention output", "mlp"])
def test_dropout_acts_at_each_site_in_training_only(site):
    model = random_model(dropout=0.4)
    idx = random_tokens(2, 30)
    with torch.no_grad():
        plain = random_model()(idx)
        assert torch.equal(model(idx), plain) and torch.equal(model(idx), plain)
        model.train()
        assert model.drop.p == 0.4
        model.drop.p = 0.4 if site == "embedding" else 0.0
        for block in model.h:
            assert block.attn.dropout == block.attn.resid_dropout.p == block.mlp.dropout.p == 0.4
            block.attn.dropout = 0.4 if site == "attention" else 0.0
            block.attn.resid_dropout.p = 0.4 if site == "attention output" else 0.0
            block.mlp.dropout.p = 0.4 if site == "mlp" else 0.0
        first = model(idx)
        assert (first - plain).abs().max() > 0.01
        assert (first - model(idx)).abs().max() > 0.01
        assert torch.equal(model.eval()(idx), plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    "compile", [torch.compile, compile_model]
)  # all of it as on GPUs, and as on CPUs
def test_compiled_model_equals_the_eager_one(compile):
    model = random_model(n_layer=1)
    idx, targets = random_tokens(2, 48), random_tokens(2, 48, seed=2)
    expected = model(idx, targets)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    text = model.generate([[1, 2, 3]], 20, temperature=0)
    model.zero_grad()
    compiled = compile(model)
    loss = compiled(idx, targets)
    loss.backward()
    assert abs(loss.item() - expected.item()) < 1e-4
    for name, p in model.named_parameters():
        assert relative(p.grad, gradients[name]) < 1e-4, name
    assert model.generate([[1, 2, 3]], 20, temperature=0) == text


def test_a_model_starts_from_the_frequencies_of_the_tokens():
    """Its loss is the entropy of the counts, in any context."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=256, n_layer=2, n_head=2, n_embd=64))
    counts = torch.arange(256) ** 3
    model.start_from_frequencies(counts)
    ids = torch.multinomial(counts.double(), 64 * 33, replacement=True).view(64, 33)
    loss = model(ids[:, :-1], ids[:, 1:]).item()
    p = counts[1:].double() / counts.sum()
    entropy = -(p * p.log()).sum().item()
    assert loss == pytest.approx(entropy, abs=0.1)
    assert loss < math.log(256) - 0.4  # of a model that knows nothing
