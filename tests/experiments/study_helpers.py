"""Helpers for the tests of the studies."""

import gc
import signal

import torch
import tyro

from common.runtime import Runtime

CPU = Runtime(torch.device("cpu"), torch.float32)
TINY_MODEL = "--n_layer 2 --n_head 2 --n_embd 32 --device cpu --dtype float32".split()
PNG = b"\x89PNG"


def run_main(module, *argv):
    """Run a script in this process, which saves the seconds that starting another one takes."""
    config = tyro.cli(module.Config, args=[str(word) for word in argv])
    handler = signal.getsignal(signal.SIGTERM)
    try:
        module.main(config)
    finally:
        signal.signal(signal.SIGTERM, handler)
        gc.collect()  # closes the study's lock file, as the end of a process would
