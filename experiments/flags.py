"""The flags that studies share. Nothing here needs torch, so `--help` is fast.

A study's Config inherits from one of these classes, and overrides defaults where needed. (tyro
takes the help of a flag from the comment behind or above its field, also if it is inherited.)
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from common.console import Dtype, UserError, check_at_least

if TYPE_CHECKING:
    from model import GPTConfig


@dataclass
class StudyConfig:
    """The flags of every study."""

    out_dir: str = "log/study"  # folder for the report, results.json and plots
    B: int = 32  # micro-batch: sequences per forward pass
    device: str = "auto"  # cuda, mps or cpu; auto = the first available of these
    # dtype of matrix products; auto = the fastest of bfloat16, float16 and float32 on this hardware
    dtype: Dtype = "auto"

    def __post_init__(self):
        check_at_least(self, 1, "B")


@dataclass
class TrainingConfig(StudyConfig):
    """The flags of a study that trains models."""

    seeds: tuple[int, ...] = (1, 2, 3)  # seeds of the weights and of the data order
    n_layer: int = 12  # number of blocks
    n_head: int = 12  # attention heads per block
    n_embd: int = 768  # width of the residual stream
    max_steps: int = 2000  # optimizer steps per run
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto = on GPUs only
    num_parallel: int = 0  # runs at the same time; 0 = one per GPU, or per CPU core

    def __post_init__(self):
        super().__post_init__()
        check_different(self, "seeds")
        check_at_least(self, 1, "max_steps")
        check_at_least(self, 0, "seeds", "num_parallel")
        # An architecture that is impossible should show before the first run.
        self.gpt_config()

    def gpt_config(self, **more) -> "GPTConfig":
        """The architecture that the flags describe. Raises UserError if it is impossible."""
        from model import GPTConfig  # imported here, because it needs torch

        try:
            return GPTConfig(n_layer=self.n_layer, n_head=self.n_head, n_embd=self.n_embd, **more)
        except ValueError as error:
            raise UserError(str(error)) from error


@dataclass
class SweepConfig(TrainingConfig):
    """The flags of a study that trains at several learning rates on one folder of shards."""

    data_dir: str = "datasets/edu_fineweb10B"  # folder of shards, written by fineweb.py
    # peak learning rates; each decays to a tenth
    learning_rates: tuple[float, ...] = (3e-4, 6e-4, 1.2e-3, 2.4e-3)
    T: int = 1024  # sequence length in tokens, and the context length of the models
    total_batch_size: int = 131072  # tokens per optimizer step
    val_tokens: int = 1048576  # tokens of the validation shard used for the validation loss

    def __post_init__(self):
        super().__post_init__()
        check_different(self, "learning_rates")
        check_at_least(self, 1, "T", "total_batch_size", "val_tokens")
        if not all(0 < lr < math.inf for lr in self.learning_rates):
            raise UserError(f"learning_rates is {self.learning_rates}: give finite values above 0")


def check_different(config: StudyConfig, *names: str):
    """Raise UserError if a flag with several values has none, or has one of them twice."""
    for name in names:
        values = getattr(config, name)
        # Each value is part of the name of a run or a result, and no two may share a name.
        if not values or len(set(values)) < len(values):
            raise UserError(f"{name} is {values}: give one value or more, all different")
