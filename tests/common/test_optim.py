"""Muon and AdamW together: their parameters, the size of their updates, resumed runs."""

import pytest
import torch
from conftest import one_line
from test_train import TORCHRUN, arguments, launch, losses, train, train_here, weights

from common import runtime
from common.console import UserError
from common.muon import Muon, orthogonalize
from common.optim import load_optimizer_state, make_muon, train_step
from model import GPT, GPTConfig


def small_model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=16, vocab_size=100, n_layer=2, n_head=2, n_embd=64))


def test_muon_has_the_matrices_of_the_blocks_and_adamw_all_else():
    model = small_model()
    optimizer = make_muon(model, 1e-3, 0.1, (0.9, 0.95), 1e-8)
    names = {id(p): name for name, p in model.named_parameters()}
    attention, matrices, tokens, positions, rest = (
        [names[id(p)] for p in group["params"]] for group in optimizer.param_groups
    )
    assert attention == ["h.0.attn.c_attn.weight", "h.1.attn.c_attn.weight"]
    others = ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert matrices == [f"h.{layer}.{matrix}.weight" for layer in range(2) for matrix in others]
    assert (tokens, positions) == (["wte.weight"], ["wpe.weight"])
    assert sorted(attention + matrices + tokens + positions + rest) == sorted(names.values())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1] * 4 + [0.0]


def test_muons_update_is_the_nearest_orthogonal_matrix_and_as_large_as_adamws():
    """It is U V^T of the gradient (float64 SVD), with a root mean square of 0.2 * learning rate.

    Queries, keys and values are matrices of their own.
    """
    model = small_model()
    optimizer = make_muon(model, 1e-3, 0.0, (0.9, 0.95), 1e-8)
    idx = torch.randint(100, (16, 17), generator=torch.Generator().manual_seed(0))
    model(idx[:, :-1], idx[:, 1:]).backward()
    matrices = {
        name: p for name, p in model.named_parameters() if name.startswith("h.1.") and p.dim() == 2
    }
    before = {name: p.detach().clone() for name, p in matrices.items()}
    gradients = {name: p.grad.double() for name, p in matrices.items()}
    optimizer.step()
    for name, p in matrices.items():
        update = (before[name] - p.detach()).double()
        assert update.square().mean().sqrt() == pytest.approx(0.2e-3, rel=0.25)
        parts = 3 if "c_attn" in name else 1
        for part, gradient in zip(update.chunk(parts), gradients[name].chunk(parts), strict=True):
            U, _, V = torch.linalg.svd(gradient, full_matrices=False)
            cosine = (part * (U @ V)).sum() / part.norm() / (U @ V).norm()
            assert cosine > 0.85  # singular values are between 0.4 and 1.6, the smallest ones less


def test_orthogonalized_matrices_have_the_same_directions_and_similar_sizes():
    """In the bases of the singular value decomposition, the result is diagonal."""
    torch.manual_seed(0)
    matrices = torch.randn(3, 24, 64, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    diagonal = u.mT @ orthogonalize(matrices) @ vh.mT  # (3, 24, 24)
    sizes = diagonal.diagonal(dim1=-2, dim2=-1)
    assert sizes.min() > 0.4 and sizes.max() < 1.6
    assert torch.allclose(diagonal, sizes.diag_embed(), atol=1e-9)


def test_muons_momentum_is_that_of_pytorch(monkeypatch):
    """Five steps of the same gradients; that there are two batches changes nothing."""
    monkeypatch.setattr("common.muon.BATCH_ELEMENTS", 400)
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((24, 8), (8, 24), (24, 8), (8, 8))]
    ours = [torch.nn.Parameter(p.clone()) for p in start]
    theirs = [torch.nn.Parameter(p.clone()) for p in start]
    options = dict(lr=0.1, weight_decay=0.1)
    jordan = ((3.4445, -4.7750, 2.0315),) * 5  # PyTorch's polynomials
    optimizers = (
        Muon([dict(params=ours)], dtype=torch.float32, rounds=jordan, **options),
        torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options),
    )
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, before in zip(ours, theirs, start, strict=True):
        # PyTorch computes in bfloat16, with a relative error of about 1%.
        assert (a - b).norm() < 0.03 * (b - before).norm()


def test_embeddings_have_learning_rates_of_their_own():
    """AdamW's first update changes each weight with a gradient by its learning rate."""
    model = small_model()
    scales = dict(embedding_lr_scale=4.0, position_lr_scale=0.5)
    optimizer = make_muon(model, 1e-3, 0.0, (0.9, 0.95), 1e-8, **scales)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    idx = torch.arange(34).reshape(2, 17)
    train_step(model, optimizer, [(idx[:, :-1], idx[:, 1:])], 0.01, 0.0, runtime.start("cpu"))
    changed = {
        name: (p.detach() - before[name]).abs().max().item() for name, p in model.named_parameters()
    }
    assert changed["wte.weight"] == pytest.approx(0.04, rel=1e-3)
    assert changed["wpe.weight"] == pytest.approx(0.005, rel=1e-3)
    assert changed["h.0.ln_1.bias"] == pytest.approx(0.01, rel=1e-3)


def test_an_optimizer_of_another_version_is_named():
    model = small_model()
    optimizer = make_muon(model, 1e-3, 0.1, (0.9, 0.95), 1e-8)
    state = optimizer.state_dict()
    del state[0]["param_groups"][0]
    with pytest.raises(UserError, match="other groups of parameters .* --init_from FILE starts"):
        load_optimizer_state(optimizer, state)


@pytest.fixture(scope="module")
def reference(data_dir, tmp_path_factory):
    log_dir = tmp_path_factory.mktemp("muon") / "log"
    train_here(data_dir, log_dir, "--optimizer", "muon", "--checkpoint_every", 10)
    return log_dir


def test_a_muon_run_learns_and_resumes_to_the_bit(data_dir, tmp_path, reference, capsys):
    assert losses(reference)[-1] < losses(reference)[0] - 0.2
    log_dir = tmp_path / "log"
    log_dir.mkdir()
    (log_dir / "model_00020.pt").write_bytes((reference / "model_00020.pt").read_bytes())
    lines = (reference / "log.txt").read_text().splitlines(keepends=True)
    (log_dir / "log.txt").write_text("".join(line for line in lines if int(line.split()[0]) < 20))
    train_here(data_dir, log_dir, "--optimizer", "muon", "--resume")
    assert "model_00020.pt, step 20" in capsys.readouterr().out
    ours, theirs = weights(log_dir / "model_final.pt"), weights(reference / "model_final.pt")
    assert all(torch.equal(ours["model"][name], theirs["model"][name]) for name in theirs["model"])
    assert losses(log_dir) == losses(reference)


@pytest.mark.slow
def test_two_processes_draw_muons_curve(data_dir, tmp_path, reference):
    process = launch(arguments(data_dir, tmp_path / "log", "--optimizer", "muon"), TORCHRUN)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    # Sums in another order round to other updates, more with each step.
    assert losses(tmp_path / "log")[:10] == pytest.approx(losses(reference)[:10], abs=1e-3)


def test_muon_refuses(data_dir, tmp_path, reference):
    error = one_line(train(data_dir, tmp_path, "--optimizer", "muon", "--shard_optimizer"))
    assert "shard_optimizer works with AdamW only" in error
    with pytest.raises(UserError, match="is from a run with optimizer=muon, not adamw"):
        train_here(data_dir, reference, "--resume")
