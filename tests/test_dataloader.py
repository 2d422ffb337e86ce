"""Which tokens, in which order, for which rank."""

import resource
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from common.console import UserError
from common.shards import open_shards
from dataloader import FinetuneLoader, PretrainLoader

T = 8
LENGTHS = [400, 253, 97]  # tokens of the training shards: 49 + 31 + 12 windows of 8
WINDOWS = 92


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """No token occurs twice in the shards, so a window shows where it was read."""
    folder = tmp_path_factory.mktemp("shards")
    first = 0
    for n, length in enumerate(LENGTHS):
        np.save(folder / f"x_train_{n:06d}.npy", np.arange(first, first + length, dtype=np.uint16))
        first += length
    np.save(folder / "x_val_000000.npy", np.arange(100, dtype=np.uint16))
    return folder


def loader(folder, B=4, batch=32 * T, seed=1, rank=0, world_size=1):
    return PretrainLoader(open_shards(folder, "train"), B, T, batch, seed, rank, world_size)


def first_tokens(folder, steps, **kwargs):
    """The first token of each window of the global batches, in order, gathered from all ranks."""
    world_size = kwargs.get("world_size", 1)
    loaders = [loader(folder, rank=rank, **kwargs) for rank in range(world_size)]
    firsts = []
    for step in steps:
        for micro_step in range(loaders[0].accumulation):
            for each in loaders:
                x, y = each.micro_batch(step, micro_step)
                assert x.shape == y.shape == (each.B, T)
                assert x.dtype == torch.int64
                assert torch.equal(x + 1, y), "y is one token ahead of x, within one shard"
                firsts += x[:, 0].tolist()
    return firsts


def test_each_window_of_each_shard_once_per_epoch(folder):
    expected = []
    for start, length in zip(np.cumsum([0, *LENGTHS]), LENGTHS):
        expected += [start + T * n for n in range((length - 1) // T)]
    assert len(expected) == WINDOWS
    batches = 92 * 32 // 32  # 32 epochs, a whole number of batches
    order = first_tokens(folder, range(batches))
    for epoch in range(32):
        assert sorted(order[epoch * WINDOWS : (epoch + 1) * WINDOWS]) == sorted(expected)


def test_the_order_depends_on_epoch_and_seed_only(folder):
    order = first_tokens(folder, range(12))
    assert order[:WINDOWS] != order[WINDOWS : 2 * WINDOWS]
    assert order == first_tokens(folder, range(12))
    assert order != first_tokens(folder, range(12), seed=2)
    assert order[:WINDOWS] != sorted(order[:WINDOWS])


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("B", [1, 2, 4])
def test_global_batch_is_the_same_for_any_world_size_and_micro_batch(folder, world_size, B):
    assert first_tokens(folder, range(7), world_size=world_size, B=B) == first_tokens(
        folder, range(7), B=32
    )


def test_micro_batches_are_the_windows_drawn_in_the_docstring(folder):
    """W = 16, two ranks, B = 4."""
    order = first_tokens(folder, range(3), batch=16 * T)
    for rank in range(2):
        each = loader(folder, batch=16 * T, rank=rank, world_size=2)
        for step in range(3):
            for micro_step in range(2):
                first = 16 * step + 8 * micro_step + 4 * rank
                x, _ = each.micro_batch(step, micro_step)
                assert x[:, 0].tolist() == order[first : first + 4]


def test_weights_of_a_short_batch_are_those_in_the_docstring():
    """Three sequences, the last of them with two targets: T = 4, B = 1, two ranks."""
    tokens = np.arange(11)
    weights = []
    for rank in range(2):
        each = FinetuneLoader(tokens, 1, 4, 3, 0, rank, world_size=2)
        batch, rank_weights, num_targets = each.batch(0, torch.device("cpu"))
        assert num_targets == 10
        assert [x.shape for x, _ in batch] == [(1, 4), (1, 4)]
        weights += rank_weights
    assert sorted(weights) == pytest.approx([0, 0.4, 0.8, 0.8])


def test_ranks_are_disjoint(folder):
    seen = Counter()
    for rank in range(4):
        each = loader(folder, rank=rank, world_size=4)
        for micro_step in range(each.accumulation):
            seen.update(each.micro_batch(0, micro_step)[0][:, 0].tolist())
    assert len(seen) == 32
    assert set(seen.values()) == {1}


def test_iterating_from_a_step_gives_the_batches_of_an_uninterrupted_run(folder):
    """Also across shards and epochs: 92 windows are not a multiple of the batch of 32."""
    whole = list(loader(folder).iterate(0, 9, torch.device("cpu")))
    for start in (1, 2, 3, 5, 8):
        resumed = list(loader(folder).iterate(start, 9, torch.device("cpu")))
        assert len(resumed) == 9 - start
        for a, b in zip(whole[start:], resumed):
            for (xa, ya), (xb, yb) in zip(a, b):
                assert torch.equal(xa, xb)
                assert torch.equal(ya, yb)


def test_epochs_count_complete_batches(folder):
    assert loader(folder).steps_in(1) == 2  # 92 windows, 32 a batch
    assert loader(folder).steps_in(8) == 23


def test_the_next_batches_are_read_ahead(folder):
    each = loader(folder)
    read = []
    original = each.micro_batch
    each.micro_batch = lambda step, micro_step: (read.append(step), original(step, micro_step))[1]
    steps = each.iterate(0, 20, torch.device("cpu"))
    next(steps)
    deadline = time.monotonic() + 5
    while max(read) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert max(read) >= 2


def test_resident_memory_does_not_grow_with_the_shards(tmp_path):
    """After reading 30 shards of 20 MB, less than two of them are in memory."""
    for n in range(30):
        np.save(tmp_path / f"x_train_{n:06d}.npy", np.zeros(10_000_000, dtype=np.uint16))
    each = PretrainLoader(open_shards(tmp_path, "train"), 64, 1024, 64 * 1024, seed=1)
    at_start = resident_bytes()
    most = 0
    for step in range(0, each.steps_in(1), 4):
        each.micro_batch(step, 0)
        most = max(most, resident_bytes() - at_start)
    assert most < 2 * 20e6 + 10e6


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_an_id_outside_the_vocabulary_is_rejected_when_it_is_read(tmp_path):
    np.save(tmp_path / "x_train_000000.npy", np.full(1000, 50257, dtype=np.uint16))
    with pytest.raises(UserError, match="50257, outside the vocabulary"):
        next(loader(tmp_path).iterate(0, 2, torch.device("cpu")))


@pytest.mark.parametrize(
    "kwargs", [dict(batch=33 * T), dict(B=3), dict(B=4, world_size=3), dict(B=0)]
)
def test_sizes_that_do_not_divide_are_rejected(folder, kwargs):
    with pytest.raises(UserError, match="not divisible"):
        loader(folder, **kwargs)


def test_fewer_tokens_than_one_batch_are_rejected(folder):
    with pytest.raises(UserError, match="fewer than one batch"):
        loader(folder, batch=128 * T)


def test_the_same_tokens_in_another_format_make_the_same_batches(folder, tmp_path):
    """llm.c's format, and nanoGPT's, in which all of the training text is one file."""
    llm_c = tmp_path / "llm.c"
    nanogpt = tmp_path / "nanogpt"
    single = tmp_path / "single"
    for other in (llm_c, nanogpt, single):
        other.mkdir()
    for path in folder.glob("*.npy"):
        tokens = np.load(path)
        header = np.zeros(256, np.int32)
        header[:3] = 20240520, 1, len(tokens)
        (llm_c / path.with_suffix(".bin").name).write_bytes(header.tobytes() + tokens.tobytes())
    assert first_tokens(llm_c, range(5)) == first_tokens(folder, range(5))

    tokens = np.arange(sum(LENGTHS), dtype=np.uint16)
    tokens.tofile(nanogpt / "train.bin")
    np.save(single / "x_train_0.npy", tokens)
    assert first_tokens(nanogpt, range(5)) == first_tokens(single, range(5))


def test_uint32_shards_and_shards_of_other_projects_load(tmp_path):
    np.save(tmp_path / "fineweb_train_0.npy", np.arange(1000, dtype=np.uint32))
    x, _ = loader(tmp_path).micro_batch(0, 0)
    assert x[0, 0] % T == 0
