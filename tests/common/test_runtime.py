"""Seeds, and what is said about a GPU that torch cannot use."""

import hashlib

import torch

from common.runtime import Runtime, mixed_seed


def test_seeds_never_change():
    """Resumed runs with dropout depend on them."""
    assert mixed_seed(1337, 7, 0) == 2861292847673320801
    digest = hashlib.blake2b(b"1337 7 0", digest_size=8).digest()
    assert mixed_seed(1337, 7, 0) == int.from_bytes(digest, "little") // 2


def test_seeds_differ_wherever_the_numbers_do():
    numbers = [(), (0,), (1,), (0, 0), (1, 0), (0, 1), (1, 0, 0), (10,), (1, 1), (11,), (2**64,)]
    assert len({mixed_seed(*each) for each in numbers}) == len(numbers)
    seeds = [
        mixed_seed(seed, step, rank) for seed in (1, 2) for step in range(50) for rank in (0, 1)
    ]
    assert len(set(seeds)) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_dropout_differs_between_steps_and_ranks():
    masks = []
    for step, rank in ((5, 0), (6, 0), (5, 1), (5, 0)):
        Runtime(torch.device("cpu"), torch.float32, rank=rank).seed(1337, step)
        masks.append(torch.rand(8).tolist())
    assert masks[0] == masks[3]
    assert masks[0] != masks[1] != masks[2] != masks[0]
