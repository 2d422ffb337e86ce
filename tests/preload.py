"""What the scripts import and is slow to import. conftest's fork server imports it once."""

import datasets  # noqa: F401
import matplotlib.figure  # noqa: F401
import numpy  # noqa: F401
import openai  # noqa: F401
import pooch  # noqa: F401
import pyarrow.parquet  # noqa: F401
import safetensors.torch  # noqa: F401
import tiktoken  # noqa: F401
import tokenizers  # noqa: F401
import torch
import torch._dynamo  # noqa: F401
import tyro  # noqa: F401

assert torch.get_num_threads() == 1, "OMP_NUM_THREADS must be set before torch is imported"
