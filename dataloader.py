"""Tokens -> batches: which tokens, in which order, for which rank; from shards on disk, or from memory.

Training reads windows of T + 1 tokens with stride T. In each epoch the shards are permuted, and within a shard its
windows, by generators seeded with (seed, epoch). The epochs' orders, one after the other, are cut into global batches:
batch k is the same windows whatever the number of ranks or the micro-batch size, and a function of k alone.
"""

import queue
import threading
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch

from common.console import UserError
from common.shards import Shards
from model import IGNORE


class WindowOrder:
    """The endless order of training windows: number i -> (shard, first token)."""

    def __init__(self, lengths: list[int], T: int, seed: int):
        self.T = T
        self.seed = seed
        self.counts = np.array(
            [max(0, (length - 1) // T) for length in lengths]
        )  # windows in each shard
        self.per_epoch = int(self.counts.sum())
        self._shards = lru_cache(2)(self._permute_shards)
        self._windows = lru_cache(2)(self._permute_windows)

    def _permute_shards(self, epoch: int):
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.counts))
        return order, np.cumsum(self.counts[order])

    def _permute_windows(self, epoch: int, shard: int):
        return np.random.default_rng((self.seed, epoch, shard)).permutation(self.counts[shard])

    def __getitem__(self, i: int) -> tuple[int, int]:
        epoch, i = divmod(i, self.per_epoch)
        order, ends = self._shards(epoch)
        place = int(np.searchsorted(ends, i, side="right"))
        shard = int(order[place])
        window = self._windows(epoch, shard)[i - (ends[place] - self.counts[shard])]
        return shard, int(window) * self.T


class PretrainLoader:
    """Micro-batches of this rank, read ahead by a thread.

    A global batch is total_batch_size tokens. Iterating from step k yields, per step, `accumulation` pairs (x, y) of
    shape (B, T) int64, y one token ahead of x. Raises ValueError if the sizes do not divide or the shards hold fewer
    tokens than one batch.
    """

    def __init__(
        self,
        shards: Shards,
        B: int,
        T: int,
        total_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size=1,
    ):
        per_micro_step = B * T * world_size
        if min(B, T, total_batch_size) < 1 or total_batch_size % per_micro_step:
            raise UserError(
                f"total_batch_size {total_batch_size} is not divisible by B * T * processes = {B} * {T} * {world_size}"
                f" = {per_micro_step}: change B or total_batch_size"
            )
        self.shards, self.B, self.T = shards, B, T
        self.rank, self.world_size = rank, world_size
        self.accumulation = total_batch_size // per_micro_step
        self.windows_per_batch = total_batch_size // T
        self.order = WindowOrder(shards.lengths, T, seed)
        if self.order.per_epoch < self.windows_per_batch:
            raise UserError(
                f"the training shards hold {shards.num_tokens} tokens ({self.order.per_epoch} windows of {T}), fewer "
                f"than one batch of {total_batch_size}: lower total_batch_size or shard more text"
            )

    def steps_in(self, num_epochs: int) -> int:
        """Whole batches in so many passes over the shards."""
        return num_epochs * self.order.per_epoch // self.windows_per_batch

    def micro_batch(self, step: int, micro_step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's part of a global batch, read now."""
        first = step * self.windows_per_batch + (micro_step * self.world_size + self.rank) * self.B
        rows = np.empty((self.B, self.T + 1), dtype=np.int64)
        for row in range(self.B):
            shard, start = self.order[first + row]
            rows[row] = self.shards.read(shard, start, start + self.T + 1)
        tokens = torch.from_numpy(rows)
        return tokens[:, :-1], tokens[:, 1:]

    def iterate(
        self, start_step: int, max_steps: int, device: torch.device
    ) -> Iterator[list[tuple]]:
        """Per step from start_step to max_steps, the list of its micro-batches on the device.

        The thread keeps the next steps ready in (pinned) memory.
        """
        ready = queue.Queue(maxsize=2)
        stopped = threading.Event()

        def put(item):
            while not stopped.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    pass

        def read_ahead():
            try:
                for step in range(start_step, max_steps):
                    batch = [
                        self.micro_batch(step, micro_step)
                        for micro_step in range(self.accumulation)
                    ]
                    if device.type == "cuda":
                        batch = [(x.pin_memory(), y.pin_memory()) for x, y in batch]
                    put(batch)
                    if stopped.is_set():
                        return
            except Exception as error:  # raised where the batch is asked for
                put(error)

        threading.Thread(target=read_ahead, daemon=True).start()
        try:
            for _ in range(start_step, max_steps):
                batch = ready.get()
                if isinstance(batch, Exception):
                    raise batch
                yield [
                    (x.to(device, non_blocking=True), y.to(device, non_blocking=True))
                    for x, y in batch
                ]
        finally:
            stopped.set()


class FinetuneLoader:
    """Batches of sequences from a token stream in memory, for finetuning: every token of it once per epoch.

    The stream is read in windows as above, the last one filled up with targets that do not count; each epoch permutes
    them by a generator seeded with (seed, epoch). A batch is `per_step` of them, the last one of an epoch what is left.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        B: int,
        T: int,
        per_step: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        count = -(-(len(tokens) - 1) // T)
        if count < per_step:
            raise UserError(
                f"the training part holds {len(tokens)} tokens ({count} sequences of {T}), fewer than one batch of "
                f"{per_step} sequences: lower total_batch_size or T, or add descriptions"
            )
        self.x, self.y = (
            np.zeros(count * T, dtype=np.int64),
            np.full(count * T, IGNORE, dtype=np.int64),
        )
        self.x[: len(tokens) - 1], self.y[: len(tokens) - 1] = tokens[:-1], tokens[1:]
        self.x, self.y = self.x.reshape(count, T), self.y.reshape(count, T)
        self.B, self.per_step, self.seed = B, per_step, seed
        self.rank, self.world_size = rank, world_size
        self.steps_per_epoch = -(-count // per_step)

    def batch(self, step: int, device: torch.device) -> tuple[list[tuple], list[float], int]:
        """This rank's micro-batches (x, y), each (B, T) int64, of a step, their shares for `train_step`, and how many
        targets the step counts on all ranks together.

        Every rank has as many; where there are too few sequences for that, some count for nothing.
        """
        epoch, number = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.x))
        rows = order[number * self.per_step : (number + 1) * self.per_step]
        counted = (self.y[rows] != IGNORE).sum()
        micro_steps = -(-len(rows) // (self.B * self.world_size))
        batch, shares = [], []
        for micro_step in range(micro_steps):
            first = (micro_step * self.world_size + self.rank) * self.B
            mine = rows[first : first + self.B]
            x, y = self.x[mine], self.y[mine]
            missing = (
                (0, self.B - len(mine)),
                (0, 0),
            )  # one shape for all, so that a compiled model is compiled once
            x, y = np.pad(x, missing), np.pad(y, missing, constant_values=IGNORE)
            batch.append((torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)))
            shares.append(float((y != IGNORE).sum() * self.world_size / counted))
        return batch, shares, int(counted)
