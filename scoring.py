"""The scoring engine: the mean loss over a stream of tokens."""

import numpy as np
import torch

from model import GPT, IGNORE
from runtime import Runtime


@torch.no_grad()
def stream_loss(model: GPT, tokens: np.ndarray, B: int, T: int, rt: Runtime) -> float:
    """Mean loss in nats per token of a 1-D stream, read in consecutive windows of T, split among the ranks.

    Every token but the first is predicted once, each from the earlier ones of its window. All forward passes have
    the shape (B, T), so that a compiled model is compiled once; what is missing in the last one does not count.
    """
    if len(tokens) < 2:
        raise ValueError("a stream of fewer than two tokens has no loss")
    predicted = len(tokens) - 1
    windows = -(-predicted // T)
    total = 0.0
    was_training = model.training
    model.eval()
    for first in range(rt.rank * B, windows, rt.world_size * B):
        chunk = torch.from_numpy(tokens[first * T : (first + B) * T + 1].astype(np.int64))
        x = torch.zeros(B * T, dtype=torch.int64)
        y = torch.full((B * T,), IGNORE)
        count = len(chunk) - 1
        x[:count], y[:count] = chunk[:-1], chunk[1:]
        with rt.autocast():
            loss = model(x.view(B, T).to(rt.device), y.view(B, T).to(rt.device))
        total += loss.double() * count if rt.device.type != "mps" else loss * count
    model.train(was_training)
    return float(rt.sum([float(total)])) / predicted
