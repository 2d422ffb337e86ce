"""Tokens -> batches, from shards or from memory: which tokens, in which order, for which rank.

Training reads windows of T + 1 tokens with stride T. In each epoch the shards are permuted, and
within a shard its windows, by generators seeded with (seed, epoch). The orders of all epochs, one
after the other, are cut into global batches. So for a given seed, T and batch size, batch k depends
on k alone: its windows are the same for any number of ranks and any micro-batch size.

The loader knows nothing of documents. In the shards, an end-of-text token stands before each one
(docs/formats.md), and a window may begin anywhere.
"""

import queue
import threading
from collections.abc import Generator
from functools import lru_cache

import numpy as np
import torch

from common.console import UserError
from common.shards import Shards
from model import IGNORE


class Windows:
    """The training windows of each shard: T + 1 tokens, every T tokens, none across two shards.

    Consecutive windows share a token, which is the last target of one and the first input of the
    next. Only this class decides which windows exist; the rest of the file orders and reads them.

    (Windows that begin at documents would be another such class. It would have to search the shards
    for the end-of-text token, and the choice would be one of train_gpt2.py's resume_keys. If they
    contained padding, the micro-batches would need weights as in FinetuneLoader.)
    """

    def __init__(self, shards: Shards, T: int):
        self.T = T
        # Number of windows in each shard. The last tokens of a shard, too few for a window, are
        # not trained on.
        self.counts = np.array([max(0, (length - 1) // T) for length in shards.lengths])

    def first_token(self, shard: int, window: int) -> int:
        """Where a window of a shard begins. It extends over T + 1 tokens."""
        return window * self.T


class WindowOrder:
    """The endless order in which windows are trained on: number i -> (shard, window).

    Each epoch permutes the shards, here of 5, 1 and 3 windows, and the windows of each shard:

        i           0 1 2   3 4 5 6 7   8 | 9 ...
        epoch       0                     | 1 ...
        shard       2 2 2   0 0 0 0 0   1 |
        window      1 0 2   4 2 0 1 3   0 |
    """

    def __init__(self, counts: np.ndarray, seed: int):
        self.counts = counts  # number of windows in each shard
        self.seed = seed
        self.windows_per_epoch = int(counts.sum())
        # A batch may lie across two epochs and across two shards, hence two of each are cached.
        self._shard_order = lru_cache(2)(self._permute_shards)
        self._window_order = lru_cache(2)(self._permute_windows)

    def _permute_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the shards in an epoch, and where the windows of each end in the epoch."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.counts))
        return order, np.cumsum(self.counts[order])

    def _permute_windows(self, epoch: int, shard: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, epoch, shard))
        return rng.permutation(self.counts[shard])

    def __getitem__(self, i: int) -> tuple[int, int]:
        # The epoch, and the number of the window in it.
        epoch, number = divmod(i, self.windows_per_epoch)
        order, ends = self._shard_order(epoch)
        # The first shard of the epoch whose windows end after this number.
        place = int(np.searchsorted(ends, number, side="right"))
        shard = int(order[place])
        start = ends[place] - self.counts[shard]  # windows of the epoch before this shard's
        window = self._window_order(epoch, shard)[number - start]
        return shard, int(window)


class PretrainLoader:
    """The micro-batches of one rank, read ahead by a thread.

    A global batch is total_batch_size tokens: W = total_batch_size / T windows. Each rank computes
    B of them in a forward pass and accumulates gradients over several such micro-steps. For W = 16,
    two ranks and B = 4, these are the numbers of the windows in the order:

        batch k          rank 0             rank 1
        micro-step 0     16k +  0 ...  3    16k +  4 ...  7
        micro-step 1     16k +  8 ... 11    16k + 12 ... 15

    In general, the first one is k * W + (micro_step * world_size + rank) * B. All micro-batches
    have B * T targets, so the loss of a batch is the plain mean of theirs.

    Raises UserError if the sizes do not divide, or the shards hold fewer windows than one batch.
    """

    def __init__(
        self,
        shards: Shards,
        B: int,
        T: int,
        total_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        # Tokens that all ranks compute in one micro-step. Batches must consist of whole ones.
        per_micro_step = B * T * world_size
        if min(B, T, total_batch_size) < 1 or total_batch_size % per_micro_step:
            raise UserError(
                f"total_batch_size {total_batch_size} is not divisible by B * T * processes "
                f"= {B} * {T} * {world_size} = {per_micro_step}: change B or total_batch_size"
            )
        self.shards = shards
        self.B = B
        self.T = T
        self.rank = rank
        self.world_size = world_size
        self.accumulation = total_batch_size // per_micro_step  # micro-steps per step
        self.windows_per_batch = total_batch_size // T

        # A batch larger than an epoch would contain every window at least once, some twice.
        self.windows = Windows(shards, T)
        self.order = WindowOrder(self.windows.counts, seed)
        if self.order.windows_per_epoch < self.windows_per_batch:
            raise UserError(
                f"the training shards contain {shards.num_tokens} tokens "
                f"({self.order.windows_per_epoch} windows of {T}), fewer than one batch of "
                f"{total_batch_size}: lower total_batch_size or shard more text"
            )

    def steps_in(self, num_epochs: int) -> int:
        """Number of complete batches in num_epochs passes over the shards."""
        return num_epochs * self.order.windows_per_epoch // self.windows_per_batch

    def micro_batch(self, step: int, micro_step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Read one micro-batch of this rank: x and y, (B, T) int64, y one token ahead of x."""
        # Number of the first row's window, as drawn above.
        first = step * self.windows_per_batch + (micro_step * self.world_size + self.rank) * self.B
        # torch's embedding takes int64 ids, not the uint16 of the shards.
        rows = np.empty((self.B, self.T + 1), dtype=np.int64)
        for row in range(self.B):
            shard, window = self.order[first + row]
            start = self.windows.first_token(shard, window)
            rows[row] = self.shards.read(shard, start, start + self.T + 1)
        tokens = torch.from_numpy(rows)  # (B, T + 1)
        # Token n of x is followed by token n of y, which is what the model has to predict.
        return tokens[:, :-1], tokens[:, 1:]

    def iterate(
        self, start_step: int, max_steps: int, device: torch.device
    ) -> Generator[list[tuple]]:
        """Yield, for each step from start_step on, the list of its micro-batches on the device.

        A thread reads up to three steps ahead, into pinned memory for CUDA.
        """
        # Two batches wait here, and the thread holds a third one.
        ready = queue.Queue(maxsize=2)  # batches, or the exception that ended the thread
        stopped = threading.Event()  # set when the consumer wants no more

        def put(item):
            # With a timeout, because nobody empties the queue once the consumer has stopped.
            while not stopped.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    pass

        def read_ahead():
            try:
                for step in range(start_step, max_steps):
                    batch = [self.micro_batch(step, n) for n in range(self.accumulation)]
                    if device.type == "cuda":
                        # Only pinned memory can be copied to a GPU in the background.
                        batch = [(x.pin_memory(), y.pin_memory()) for x, y in batch]
                    put(batch)
                    if stopped.is_set():
                        return
            except Exception as error:
                put(error)  # raised by the consumer, below

        # A daemon does not keep the process alive if it is still reading at the end.
        thread = threading.Thread(target=read_ahead, daemon=True)
        thread.start()
        try:
            for _ in range(start_step, max_steps):
                batch = ready.get()
                if isinstance(batch, Exception):
                    raise batch
                # From pinned memory, the copy to a GPU runs while the previous step is computed.
                yield [
                    (x.to(device, non_blocking=True), y.to(device, non_blocking=True))
                    for x, y in batch
                ]
        finally:
            stopped.set()
            # If Python shuts down while a daemon is inside torch, the process aborts.
            thread.join(timeout=5)


class FinetuneLoader:
    """Batches from a token stream in memory, for finetuning: every token once per epoch.

    The stream is cut into sequences of T inputs and T targets; the last one is filled up with
    targets that do not count (IGNORE). Each epoch permutes the sequences by a generator seeded
    with (seed, epoch). A batch is sequences_per_step of them, the last one of an epoch the rest.

    Micro-batches can have different numbers of targets, so the mean over a batch needs weights:

        weight of a micro-batch = its targets * world_size / targets of the batch on all ranks

    `train_step` adds up weight * mean loss on each rank, and averages over the ranks. The factor
    world_size cancels that average's divisor, so each target counts the same. An example with
    T = 4, B = 1, two ranks, and three sequences left, the last of them with two targets:

                         rank 0                      rank 1
        micro-step 0     4 targets, weight 0.8       4 targets, weight 0.8
        micro-step 1     2 targets, weight 0.4       padding,   weight 0

    Here the batch has 10 targets, and the weights of both ranks have the mean (1.2 + 0.8) / 2 = 1.

    Raises UserError if the stream is shorter than one batch.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        B: int,
        T: int,
        sequences_per_step: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        # Each token but the first is a target once.
        num_targets = len(tokens) - 1
        num_sequences = divide_up(num_targets, T)
        if num_sequences < sequences_per_step:
            raise UserError(
                f"the training part contains {len(tokens)} tokens ({num_sequences} sequences of "
                f"{T}), fewer than one batch of {sequences_per_step} sequences: "
                "lower total_batch_size or T, or add text"
            )

        # After the last token, x may be any id, because y does not count there.
        self.x = np.zeros((num_sequences, T), dtype=np.int64)
        self.y = np.full((num_sequences, T), IGNORE, dtype=np.int64)
        self.x.flat[:num_targets] = tokens[:-1]
        self.y.flat[:num_targets] = tokens[1:]
        self.B = B
        self.sequences_per_step = sequences_per_step
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.steps_per_epoch = divide_up(num_sequences, sequences_per_step)

    def batch(self, step: int, device: torch.device) -> tuple[list[tuple], list[float], int]:
        """This rank's micro-batches of a step, their weights, and the targets of the whole batch.

        A micro-batch is x and y, (B, T) int64; the weights are those for `train_step`, and the
        number of targets is that of all ranks. All ranks get the same number of micro-batches of
        the same shape. Where sequences are missing, they are padding without targets.
        """
        # The sequences of the step, on all ranks.
        epoch, number = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.x))
        first = number * self.sequences_per_step
        sequences = order[first : first + self.sequences_per_step]
        num_targets = int((self.y[sequences] != IGNORE).sum())

        # This rank's part of them, in micro-batches.
        micro_batches = []
        weights = []
        for micro_step in range(divide_up(len(sequences), self.B * self.world_size)):
            # As in PretrainLoader; the slice is short, or empty, where sequences are missing.
            first = (micro_step * self.world_size + self.rank) * self.B
            rows = sequences[first : first + self.B]
            # Always (B, T): with other shapes, a compiled model would be compiled again.
            padding = ((0, self.B - len(rows)), (0, 0))
            x = np.pad(self.x[rows], padding)
            y = np.pad(self.y[rows], padding, constant_values=IGNORE)
            micro_batches.append((start_copy(x, device), start_copy(y, device)))
            weights.append(float((y != IGNORE).sum() * self.world_size / num_targets))
        return micro_batches, weights, num_targets


def start_copy(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array on the device. The copy to a GPU runs while the previous step is computed."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # without this, the copy would wait for that step
    return tensor.to(device, non_blocking=True)


def divide_up(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
