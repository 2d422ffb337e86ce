"""Check and measure on a GPU all that a CPU can't, in under nine minutes: runs/gpu_check.sh.

    python -m bench.gpu_check                            # GPT-2 (124M) on the first GPU
    python -m bench.gpu_check --nanogpt ../nanoGPT       # compared with nanoGPT
    python -m bench.gpu_check --small --device cpu       # only tries the script: a tiny model

It needs the repository and torch, and no network: the text is random tokens, and so are the weights
of the models that score and generate. The report is log/gpu_check/report.md; the folder also holds
the output of each section. A section that fails or runs out of time does not stop the others.
"""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common.before_torch

from common.console import UserError, parse_flags, run_script, say, table, write_text


@dataclass
class Config:
    nanogpt: str | None = None  # folder that contains nanoGPT's model.py
    B: int = 64  # micro-batch of the training runs
    minutes: float = 8.5  # time for everything; sections that do not fit are left out
    device: str = "cuda"  # cuda; cpu only with small
    small: bool = False  # a tiny model, to try the script where there is no GPU
    out: str = "log/gpu_check"  # folder for the report


if __name__ == "__main__":
    config = parse_flags(Config, __doc__)  # before the slow imports: --help answers at once

import numpy as np
import torch

from bench import peers
from bench.measure import Stopwatch, synchronize
from common import runtime
from common.optim import prepare_model, train_step
from common.runtime import Runtime
from common.scoring import Request, score
from common.shards import MANIFEST
from common.tokenizer import encoding_of, tokenizer_to_text
from model import GPT, GPTConfig

ROOT = Path(__file__).parent.parent
STEPS = 12  # training steps per measurement; the first ones warm up


# ---------------------------------------------------------------------------------------------
# What is measured


def shape(config: Config) -> dict:
    """The model: GPT-2 (124M), or a tiny one with the same vocabulary."""
    if config.small:
        return dict(n_layer=2, n_head=2, n_embd=32, block_size=64, padded_vocab_size=50304)
    return dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, padded_vocab_size=50304)


def gpt_config(config: Config) -> GPTConfig:
    """The same model as a GPTConfig."""
    return GPTConfig(vocab_size=50257, **shape(config))


def micro_batch(config: Config) -> int:
    """Rows of tokens per training step."""
    return 4 if config.small else config.B


def compile_flag(config: Config) -> str:
    """torch.compile on a CPU takes minutes and is not what is checked here."""
    return "off" if config.device == "cpu" else "on"


def machine(config: Config) -> list[str]:
    """The machine"""
    rt = runtime.start(config.device)
    lines = [f"torch {torch.__version__}, Python {sys.version.split()[0]}"]
    if rt.device.type == "cuda":
        memory = torch.cuda.get_device_properties(rt.device).total_memory
        name = torch.cuda.get_device_name(rt.device)
        lines.append(f"{name}, {memory / 2**30:.1f} GiB, CUDA {torch.version.cuda}")
        # nvidia-smi may be missing in a container. The other lines do without it.
        with contextlib.suppress(OSError):
            lines.append(output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv"))
    return lines


def output_of(*command: str) -> str:
    """What a command prints on stdout."""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def make_shards(config: Config) -> Path:
    """Random tokens as shards, with a tokenizer whose tokens are the 256 bytes."""
    folder = Path(config.out) / "shards"
    # The shards of an earlier run are the same tokens.
    if (folder / MANIFEST).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)

    # A tokenizer without merges. Its 257th token is end-of-text, hence the vocab_size of the
    # manifest.
    enc = encoding_of({bytes([n]): n for n in range(256)})
    write_text(folder / "vocab.tiktoken", tokenizer_to_text(enc))

    # With the default B, more tokens than the runs read: 24 steps of 64 x 1024 tokens, and 90,000
    # for the validation loss.
    shards = []
    for name, num_tokens in (("random_val_0.npy", 100_000), ("random_train_0.npy", 2_000_000)):
        tokens = np.random.default_rng(0).integers(256, size=num_tokens).astype(np.uint16)
        np.save(folder / name, tokens)
        shards.append(dict(name=name, tokens=num_tokens))

    # The manifest, in which train_gpt2.py finds the tokenizer and the shards
    manifest = dict(vocab_size=257, tokenizer="vocab.tiktoken", dtype="uint16", shards=shards)
    write_text(folder / MANIFEST, json.dumps(manifest))
    return folder


def train_as_a_user(config: Config, dtype: str, compile: str) -> list[str]:
    """Run train_gpt2.py for a few steps, with a checkpoint at the end, and read its metrics."""
    # train_gpt2.py refuses a folder that holds an earlier run.
    folder = Path(config.out) / f"run_{dtype}_{compile}"
    for path in folder.glob("*"):
        path.unlink()

    # One micro-batch per step, so that the time is that of the model and the optimizer. The
    # validation, the sample and the final checkpoint show that these parts work on the GPU, too.
    B = micro_batch(config)
    T = shape(config)["block_size"]
    flags: dict[str, Any] = dict(
        data_dir=make_shards(config),
        log_dir=folder,
        **shape(config),
        B=B,
        T=T,
        total_batch_size=B * T,
        max_steps=2 * STEPS,
        warmup_steps=5,
        val_every=2 * STEPS,
        val_tokens=2 * B * T if config.small else 90_000,
        hellaswag_every=0,
        sample_every=2 * STEPS,
        checkpoint_every=0,
        dtype=dtype,
        device=config.device,
        compile=compile,
    )

    # As a user runs it: a process of its own, with flags
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    began = time.perf_counter()
    subprocess.run([sys.executable, "train_gpt2.py", *words], cwd=ROOT, check=True)
    seconds = time.perf_counter() - began

    # The records of steps are those with a time. The first five steps compile and warm up.
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if "ms" in record]
    median = statistics.median(step["ms"] for step in steps[5:])
    rate = f"{1000 * B * T / median:,.0f} tokens/s"
    mfu = f", MFU {steps[-1]['mfu']:.1%}" if steps[-1]["mfu"] else ""
    slowest = max(step["ms"] for step in steps[5:])
    # What the first step takes longer than a usual one is mostly compilation.
    compiling = (steps[0]["ms"] - median) / 1000
    num_skipped = sum(step.get("skipped", False) for step in steps)
    return [
        f"train_gpt2.py, {dtype}, compile {compile}, B={B}, T={T}: **{rate}**{mfu}, median "
        f"{median:.1f} ms per step (from the sixth; the slowest {slowest:.1f})",
        f"the first step took {compiling:.1f} s longer (compilation), the command {seconds:.0f} s",
        f"peak memory {steps[-1]['memory'] / 1e9:.2f} GB",
        f"loss {steps[0]['loss']:.3f} to {steps[-1]['loss']:.3f}, {num_skipped} steps skipped",
    ]


def train_bfloat16(config: Config) -> list[str]:
    """Training in bfloat16"""
    return train_as_a_user(config, "bfloat16", compile_flag(config))


def train_float16(config: Config) -> list[str]:
    """Training in float16"""
    return train_as_a_user(config, "float16", compile_flag(config))


def train_uncompiled(config: Config) -> list[str]:
    """Training without torch.compile"""
    return train_as_a_user(config, "bfloat16", "off")


def step_rate(config: Config, name: str) -> list[str]:
    """Training steps of this project or of nanoGPT, in a process of their own."""
    rt = runtime.start(config.device, "bfloat16")
    scripts = peers.find_scripts(config.nanogpt, None)
    peer = peers.make_peer(name, gpt_config(config), scripts, rt)
    B = micro_batch(config)
    compiled = compile_flag(config) == "on"
    step = peer.make_step(peers.fused_adamw(peer.model), torch.bfloat16, compiled, B)

    # The first step compiles, and AdamW allocates its state. The second one warms up.
    began = time.perf_counter()
    step()
    synchronize(rt.device)
    first = time.perf_counter() - began
    step()

    # Without a wait after each step, as in training.
    synchronize(rt.device)
    began = time.perf_counter()
    for _ in range(STEPS):
        step()
    synchronize(rt.device)
    seconds = (time.perf_counter() - began) / STEPS

    # MFU is the share of the GPU's peak that the model's arithmetic amounts to. The peak of an
    # unknown GPU is None.
    rate = B * peer.block_size / seconds
    mfu = ""
    if peak := rt.peak_flops():
        flops = GPT(gpt_config(config)).flops_per_token(peer.block_size)
        mfu = f", MFU {rate * flops / peak:.1%}"
    return [
        f"{name}, bfloat16, compile {compile_flag(config)}, fused AdamW, B={B}: **{rate:,.0f} "
        f"tokens/s**{mfu}, {1000 * seconds:.1f} ms per step, first step {first:.1f} s, peak memory "
        f"{rt.peak_memory() / 1e9:.2f} GB"
    ]


def steps_of_this_project(config: Config) -> list[str]:
    """Only the steps, next to nanoGPT: this project"""
    return step_rate(config, peers.ThisProject.name)


def steps_of_nanogpt(config: Config) -> list[str]:
    """Only the steps: nanoGPT"""
    if not config.nanogpt:
        return ["left out: no --nanogpt folder given"]
    return step_rate(config, peers.NanoGPT.name)


def tests(config: Config) -> list[str]:
    """The tests that need a GPU"""
    # Without pytest's cache, which would be written into the repository
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, "tests/test_gpu.py"], cwd=ROOT, capture_output=True, text=True
    )
    print(result.stdout, result.stderr)
    # pytest's last line holds the counts.
    last = result.stdout.strip().splitlines()[-1:] or ["no output; is pytest installed?"]
    if result.returncode == 0:
        return last

    # With -q, a line of the summary is "FAILED tests/test_gpu.py::test_name - reason".
    failed = [line for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return [f"failed: {last[0]}", *failed]


def memory(config: Config) -> list[str]:
    """Peak memory of a training step by B, compiled, bfloat16"""
    rt = runtime.start(config.device, "bfloat16")
    # All sizes without activation checkpointing, the largest also with it
    rows = []
    sizes = (2, 4) if config.small else (4, 8, 16, 32)
    for checkpointing in (False, True):
        for B in sizes:
            if checkpointing and sizes[-1] != B:
                continue

            # Forget the code compiled for the previous size, so that each size is compiled like the
            # first one.
            torch.compiler.reset()
            model = GPT(gpt_config(config)).to(rt.device)
            model.activation_checkpointing = checkpointing
            optimizer = peers.fused_adamw(model)
            train_model, _ = prepare_model(model, rt, compile_flag(config))
            batch = [tuple(torch.randint(256, (2, B, model.config.block_size), device=rt.device))]

            # Three steps: the optimizer's state exists from the end of the first on.
            if rt.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            for _ in range(3):
                train_step(train_model, optimizer, batch, 1e-4, 1.0, rt)
            name = f"{B}, activation checkpointing" if checkpointing else str(B)
            rows.append((name, f"{rt.peak_memory() / 1e9:.2f} GB"))
            # Their memory has to be free before the next model is made.
            del model, optimizer, train_model
    return table(("B", "peak"), rows).splitlines()


def inference(config: Config) -> list[str]:
    """Scoring and generation"""
    lines = []
    device = runtime.start(config.device).device
    for dtype in (torch.bfloat16, torch.float16):
        rt = Runtime(device, dtype)
        # Random weights take as long as trained ones.
        torch.manual_seed(0)
        model = GPT(gpt_config(config)).to(rt.device).eval()

        # Scoring. A quarter of the requests warms up, the time is that of all.
        rng = random.Random(0)
        count = 8 if config.small else 1000
        requests = [request_like_hellaswags(config, rng) for _ in range(count)]
        score(model, requests[: count // 4], rt)
        seconds = Stopwatch(rt, score, model, requests, rt)()
        lines.append(f"{dtype}: HellaSwag-like scoring, {count / seconds:,.0f} examples/s")

        # Generation. Four tokens warm up.
        num_tokens = 8 if config.small else 256
        for num_texts in (1, 8, 64):
            prompts = [random_ids(config, rng, 16, 16) for _ in range(num_texts)]
            with rt.autocast():
                model.generate(prompts, 4, temperature=0)
                seconds = Stopwatch(rt, model.generate, prompts, num_tokens)()
            rate = num_texts * num_tokens / seconds
            lines.append(f"{dtype}: generating {num_texts} texts, {rate:,.0f} tokens/s")
    return lines


def request_like_hellaswags(config: Config, rng: random.Random) -> Request:
    """A context and four endings of random tokens, about as long as HellaSwag's."""
    endings = [random_ids(config, rng, 10, 40) for _ in range(4)]
    return Request(random_ids(config, rng, 20, 80), endings)


def random_ids(config: Config, rng: random.Random, least: int, most: int) -> list[int]:
    """Random tokens, at most a quarter of the context."""
    # Random tokens need no tokenizer. A tiny model has a short context.
    shape = gpt_config(config)
    length = min(rng.randint(least, most), shape.block_size // 4)
    return rng.choices(range(shape.vocab_size), k=length)


def profile(config: Config) -> list[str]:
    """A profile of three training steps, compiled, bfloat16"""
    rt = runtime.start(config.device, "bfloat16")
    peer = peers.make_peer(peers.ThisProject.name, gpt_config(config), {}, rt)
    compiled = compile_flag(config) == "on"
    step = peer.make_step(peer.shipped_optimizer(), torch.bfloat16, compiled, micro_batch(config))
    # The first steps compile, which would fill the profile.
    for _ in range(3):
        step()
    synchronize(rt.device)

    # Profile three steps, and wait for the GPU inside, so that its kernels are recorded.
    is_cuda = rt.device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if is_cuda:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profiler:
        began = time.perf_counter()
        for _ in range(3):
            step()
        synchronize(rt.device)
        seconds = time.perf_counter() - began

    # The 25 operations that take the most time themselves, without what they call
    averages = profiler.key_averages()
    order = "self_device_time_total" if is_cuda else "self_cpu_time_total"
    text = averages.table(sort_by=order, row_limit=25, max_name_column_width=60)
    lines = [f"{1000 * seconds / 3:.1f} ms per step while profiled"]
    if is_cuda:
        # On one stream, kernels run one after the other, so the sum of their times is the time that
        # the GPU works.
        kernels = [event for event in averages if "CUDA" in str(event.device_type)]
        busy = sum(event.self_device_time_total for event in kernels) / 1e6
        lines.append(f"kernels run for {busy / seconds:.1%} of the time")
    return [*lines, "```", *text.splitlines(), "```"]


# The sections, the most important ones first, each with its limit in seconds. Together they may
# exceed --minutes: what does not fit is left out. The docstring of a section is its heading.
SECTIONS: dict[Callable[[Config], list[str]], float] = {
    machine: 60,
    train_bfloat16: 150,
    steps_of_this_project: 90,
    steps_of_nanogpt: 120,
    tests: 120,
    train_float16: 120,
    inference: 90,
    memory: 150,
    profile: 90,
    train_uncompiled: 90,
}


# ---------------------------------------------------------------------------------------------
# The run


def main(config: Config):
    # Reject what can't work before the first section starts.
    if config.device == "cpu" and not config.small:
        raise UserError("GPT-2 (124M) takes hours on a CPU: --small --device cpu tries the script")
    runtime.choose_device(config.device, 0)  # a UserError without a GPU
    peers.find_scripts(config.nanogpt, None)

    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)

    began = time.perf_counter()
    report = ["# What runs/gpu_check.sh found", "", f"`{' '.join(sys.argv)}`"]
    num_failed = 0
    for section, limit in SECTIONS.items():
        # A section gets its limit, or what is left of the time; less than 5 s are not worth a
        # start.
        left = 60 * config.minutes - (time.perf_counter() - began)
        section_began = time.perf_counter()
        lines = run_section(section, config, min(limit, left)) if left > 5 else ["no time left"]

        # The words are those that run_section and `tests` begin their lines with.
        num_failed += lines[0].startswith(("failed", "no result"))
        seconds = time.perf_counter() - section_began
        text = [f"## {section.__doc__} ({seconds:.0f} s)", "", *as_list(lines)]
        say("\n".join(text), "\n")
        report += ["", *text]
        # Written after each section, so that an interrupted run leaves what it has.
        write_text(out / "report.md", "\n".join(report) + "\n")
    say(f"{out}/report.md, {time.perf_counter() - began:.0f} s, {num_failed} sections failed")
    if num_failed:
        sys.exit(1)


def as_list(lines: list[str]) -> list[str]:
    """Sentences as a Markdown list; tables and code stay as they are."""
    if any(line.startswith(("|", "```")) for line in lines):
        return lines
    return [f"- {line}" for line in lines]


def run_section(section: Callable, config: Config, limit: float) -> list[str]:
    """The lines that a section returns, in a new process that ends with it."""
    out = Path(config.out) / f"{section.__name__}.txt"
    result = Path(config.out) / f"{section.__name__}.json"
    # What an earlier run left must not pass for that of this one.
    result.unlink(missing_ok=True)
    write_text(out, "")

    # A process of its own: its GPU memory is free afterwards, and a crash in it ends nothing else.
    # Spawned, because CUDA may fail in a forked process.
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=record_section, args=(section.__name__, config, out, result))
    process.start()
    try:
        process.join(limit)
    finally:  # also after Ctrl-C
        is_late = process.is_alive()
        if is_late:
            # The section leads a group of processes, with the commands that it started.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.join()

    # Three outcomes: too late, failed, or finished with a result
    if is_late:
        return [f"no result after {limit:.0f} s; its output is in {out}"]
    if not result.exists():
        last = out.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
        return [f"failed: {last[0]}; its output is in {out}"]
    return json.loads(result.read_text())


def record_section(name: str, config: Config, out: Path, result: Path):
    """Run a section in this process: output to one file, the lines that it returns to another."""
    # A group of processes, which run_section can end together.
    os.setpgrp()
    # Redirected below Python: commands and C++ code write to these descriptors, too.
    file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)

    section = next(section for section in SECTIONS if section.__name__ == name)
    try:
        lines = section(config)
    # Also for SystemExit: the traceback belongs in the output file.
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    write_text(result, json.dumps(lines))


if __name__ == "__main__":
    run_script(main, config)
