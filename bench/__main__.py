"""Speed and memory compared with other implementations of GPT-2, and with what the machine can do.

    python -m bench                                    # all rows: this project and transformers
    python -m bench --nanogpt ../nanoGPT --build_nanogpt ../build-nanogpt
    python -m bench --rows train memory --nanogpt ../nanoGPT
    python -m bench --rows core --nanochat ../nanochat
    python -m bench --rows tokenize --data_files 'corpus/*.parquet'

Needs requirements-dev.txt. nanoGPT, build-nanogpt and nanochat are folders that you have cloned.
The rows:

    train       time of a training step: every implementation as it is shipped, and compiled with
                fused AdamW in each dtype
    memory      peak memory of a process that trains for three steps
    hellaswag   examples scored per second, compared with a plain loop over transformers' model
    core        the same for a task of CORE with ten shots, compared with nanochat's evaluation
    generate    greedy generation of 256 tokens, one and eight texts at a time
    tokenize    fineweb.py as a command, compared with tiktoken on texts that are in memory
    start       train_gpt2.py as a command: seconds until its first step is done

The candidates of a row run in turn, round after round, and the figures are medians. "speedup" is
the speed of this project as shipped divided by the candidate's: above 1, this project is faster.
"share of the roofline" is the candidate's speed divided by the best that the machine can do, which
is measured in the same run: the matrix products of a training step without anything else, or
reading all weights from memory once per generated token.
"""

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import common.before_torch

from common.console import (
    UserError,
    check_at_least,
    check_known,
    parse_flags,
    run_script,
    say,
    table,
    write_text,
)

# The keys of ROWS, which needs imports that --help should not wait for
ROW_NAMES = ("train", "memory", "hellaswag", "core", "generate", "tokenize", "start")


@dataclass
class Config:
    rows: tuple[str, ...] = ROW_NAMES  # what to measure
    nanogpt: str | None = None  # folder that contains nanoGPT's model.py
    build_nanogpt: str | None = None  # folder that contains build-nanogpt's train_gpt2.py
    nanochat: str | None = None  # folder that contains nanochat's nanochat/core_eval.py
    rounds: int = 5  # times that each candidate is measured
    # leave out training steps whose name contains one of these texts, such as bf16 on a processor
    # that emulates it: a step of nanoGPT, as shipped, then takes minutes
    skip: tuple[str, ...] = ()
    # hellaswag_val.jsonl; None = download it once to datasets/hellaswag
    hellaswag_data: str | None = None
    hellaswag_limit: int = 100  # number of HellaSwag examples
    core_limit: int = 8  # number of HellaSwag examples with ten shots
    # parquet files to tokenize; none = Python's documentation, which is too short for a fair figure
    data_files: tuple[str, ...] = ()
    device: str = "auto"  # cuda or cpu; auto = the first that is available
    out: str = "log/bench/bench.json"  # file for the figures

    def __post_init__(self):
        check_known("row", self.rows, ROW_NAMES)
        check_at_least(self, 1, "rounds", "hellaswag_limit", "core_limit")


if __name__ == "__main__":
    config = parse_flags(Config, __doc__)  # before the slow imports: --help answers at once

import torch

from bench.commands import start, tokenize
from bench.inference import core, find_core_eval, generate, hellaswag
from bench.measure import Figure
from bench.peers import find_scripts
from bench.train import memory, train
from common import machine, runtime
from common.runtime import Runtime

# To add a row, write a function like these, row(config, rt) -> figures, and list it here and in
# ROW_NAMES.
ROWS: dict[str, Callable[..., list[Figure]]] = {
    "train": train,
    "memory": memory,
    "hellaswag": hellaswag,
    "core": core,
    "generate": generate,
    "tokenize": tokenize,
    "start": start,
}


def main(config: Config):
    rt = runtime.start(config.device)
    if rt.device.type not in ("cpu", "cuda"):
        raise UserError(f"the benchmark does not support {rt.device}: use --device cpu or cuda")
    if rt.dtype == torch.float16:
        raise UserError(
            "the projects are compared in bfloat16, which this GPU lacks: use an Ampere GPU or "
            "newer, or --device cpu"
        )
    # Look for the folders first: a wrong one should not end the benchmark after an hour.
    find_scripts(config.nanogpt, config.build_nanogpt)
    find_core_eval(config.nanochat)
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)

    # The rows, one after the other
    figures = []
    for row in config.rows:
        new_figures = ROWS[row](config, rt)
        say(to_table(new_figures), "\n")
        figures += new_figures
        # Written after each row, so that an interrupted run keeps its finished rows.
        result = describe_machine(rt) | dict(figures=[asdict(figure) for figure in figures])
        write_text(config.out, json.dumps(result, indent=1) + "\n")
    say(config.out)
    # At the end, because a wrong roofline should not cost the other rows.
    if config.rounds >= 3:  # fewer are noise
        check_rooflines(figures)


def check_rooflines(figures: list[Figure]):
    """A candidate that is faster than its roofline shows that it is none. 5% are noise."""
    # A candidate without a roofline has no share.
    for figure in figures:
        share = figure.roofline_share
        assert share is None or share <= 1.05, f"{figure.row}: {figure.name} has {share:.0%}"


def describe_machine(rt: Runtime) -> dict:
    """The hardware and the versions that the figures depend on."""
    device = machine.cpu_name()
    if rt.device.type == "cuda":
        device = torch.cuda.get_device_name(rt.device)
    description = dict(device=device, cores=machine.num_cores(), python=platform.python_version())
    for package in ("torch", "transformers", "tiktoken", "numpy"):
        description[package] = version(package)
    return description


def to_table(figures: list[Figure]) -> str:
    """A Markdown table of one row's figures."""
    # All figures of a row have the same unit.
    ratio_name = "speedup"
    if figures[0].unit == "MB":
        ratio_name = "memory ratio"
    lines = []
    for figure in figures:
        value = format_value(figure.value, figure.unit)
        ratio = format_optional(figure.ratio, ".2f")
        share = format_optional(figure.roofline_share, ".0%")
        lines.append((figure.row, figure.name, value, ratio, share))
    return table(("what", "candidate", "figure", ratio_name, "share of the roofline"), lines)


def format_value(value: float, unit: str) -> str:
    """A figure with its unit."""
    # Three significant digits for small figures, whole numbers for large ones
    digits = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{digits} {unit}"


def format_optional(value: float | None, spec: str) -> str:
    """The value in the format `spec`. A figure without a ratio or roofline has an empty cell."""
    return "" if value is None else format(value, spec)


if __name__ == "__main__":
    run_script(main, config)
