"""Speed and memory beside other implementations of GPT-2, and how far each is from what the machine can do.

    python -m bench                                                  # transformers beside us, all rows
    python -m bench --nanogpt ../nanoGPT --build_nanogpt ../build-nanogpt
    python -m bench --rows train memory --nanogpt ../nanoGPT         # some rows
    python -m bench --rows tokenize --data_files 'corpus/*.parquet'

Needs requirements-dev.txt. nanoGPT and build-nanogpt are read from folders of yours (git clone them). What is compared
runs in turn, one candidate after the other, round after round; figures are medians. Rows:

    train       a training step, the second of two: every implementation as it is shipped, and compiled with fused AdamW
                in each dtype
    memory      most memory that a process holds during three steps, each candidate in a process of its own
    hellaswag   examples scored per second, beside a plain loop: four padded rows an example, all logits
    generate    greedy text of 256 tokens, one and eight texts at a time
    tokenize    fineweb.py as a command, beside tiktoken alone on texts that are in memory
    start       train_gpt2.py as a command: seconds until its first step is done, compiled code in the cache

"limit" is what the machine itself can do, measured in the same run: the matrix products of the step alone, reading all
weights from memory once a token, tiktoken alone. The result is a table and bench.json. Tokens needed by AdamW and Muon
are compared by optimizer_study.
"""

import copy
import json
import multiprocessing
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import tiktoken
import torch

import hellaswag
from bench.peers import (
    BUILD_NANOGPT,
    NANOGPT,
    OURS,
    TRANSFORMERS,
    build,
    find_scripts,
    fused_adamw,
    training_step,
)
from common import runtime
from common.console import Progress, UserError, cli, say, table, write_text
from common.cpu import can_pack, keep_freed_memory, pack_weights
from common.huggingface import save_pretrained
from common.runtime import Runtime
from common.shards import SOURCE_START
from common.text import open_source
from common.tokenizer import load_tokenizer
from experiments.sweep import read_stream
from model import GPT, GPTConfig

ROOT = Path(__file__).parent.parent
SHAPES = {  # (n_layer, n_head, n_embd), micro-batches B, T
    "cpu": [((6, 6, 384), (4,), 256), ((12, 12, 768), (4,), 256)],
    "cuda": [((12, 12, 768), (16, 32, 64), 1024)],
}
MEMORY_SHAPE = {"cpu": ((6, 6, 384), 8, 1024), "cuda": ((12, 12, 768), 16, 1024)}
NEW_TOKENS, PROMPT = 256, 16  # of the texts that are generated
CHECKPOINTED = f"{OURS}, --activation_checkpointing"
LIMIT = "limit"
READ = f"{LIMIT}: the weights read once a token, float32"


@dataclass
class Config:
    rows: tuple[Literal["train", "memory", "hellaswag", "generate", "tokenize", "start"], ...] = (
        "train", "memory", "hellaswag", "generate", "tokenize", "start",
    )  # what to measure  # fmt: skip
    nanogpt: str | None = None  # a folder that holds nanoGPT's model.py
    build_nanogpt: str | None = None  # a folder that holds build-nanogpt's train_gpt2.py
    rounds: int = 5  # in which each candidate runs once
    hellaswag_data: str | None = (
        None  # hellaswag_val.jsonl; None = downloaded once to datasets/hellaswag
    )
    hellaswag_limit: int = 100  # examples
    data_files: tuple[
        str, ...
    ] = ()  # parquet files to tokenize; none = Python's documentation, which is too little
    device: str = "auto"  # cuda or cpu; auto takes the first there is
    out: str = "log/bench/bench.json"  # the figures

    def __post_init__(self):
        if self.rounds < 1 or self.hellaswag_limit < 1:
            raise UserError("rounds and hellaswag_limit must be at least 1")


@dataclass
class Figure:
    row: str  # what was measured, and on which shape
    name: str  # of the candidate
    value: float
    unit: str
    ratio: float | None = None  # ours as shipped to this one; above 1 where we are ahead
    of_limit: float | None = None  # share of what the machine can do


def main(config: Config):
    rt = runtime.start(config.device)
    if rt.device.type not in SHAPES:
        raise UserError(f"nothing is measured on {rt.device}: --device cpu or cuda")
    scripts_of(config)  # an error now, rather than in an hour
    measure = dict(
        train=train,
        memory=memory,
        hellaswag=score,
        generate=generate,
        tokenize=tokenize,
        start=start,
    )
    figures = []
    for row in config.rows:
        figures += measure[row](config, rt)
        say(to_table([figure for figure in figures if figure.row.startswith(row)]), "\n")
        write_text(
            config.out,
            json.dumps(describe(rt) | dict(figures=[asdict(f) for f in figures]), indent=1) + "\n",
        )
    say(config.out)


def describe(rt: Runtime) -> dict:
    """The machine and the versions."""
    name = torch.cuda.get_device_name(rt.device) if rt.device.type == "cuda" else cpu_name()
    packages = {
        package: version(package) for package in ("torch", "transformers", "tiktoken", "numpy")
    }
    return dict(device=name, cores=runtime.num_cores(), python=platform.python_version()) | packages


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def scripts_of(config: Config) -> dict[str, Path]:
    return find_scripts({NANOGPT: config.nanogpt, BUILD_NANOGPT: config.build_nanogpt})


def shape_of(sizes: tuple[int, int, int], T: int) -> GPTConfig:
    """GPT-2's vocabulary, padded to 50304."""
    return GPTConfig(block_size=T, n_layer=sizes[0], n_head=sizes[1], n_embd=sizes[2])


def medians(
    candidates: dict[str, Callable], rounds: int, rt: Runtime, desc: str
) -> dict[str, float]:
    """Seconds that each takes, or that it returns itself (a float); they run in turn, after a first time that does not
    count. What does not fit the GPU's memory is left out."""
    seconds = {name: [] for name in candidates}
    with Progress(total=len(candidates) * (rounds + 1), desc=desc, unit="run", leave=False) as bar:
        for n in range(rounds + 1):
            for name in list(seconds):
                synchronize(rt)
                began = time.perf_counter()
                try:
                    own = candidates[name]()
                    synchronize(rt)
                except torch.OutOfMemoryError:
                    say(f"{desc}: {name}: out of memory")
                    del seconds[name]
                    continue
                if n:
                    seconds[name].append(
                        own if isinstance(own, float) else time.perf_counter() - began
                    )
                bar.update()
    return {name: statistics.median(values) for name, values in seconds.items()}


def synchronize(rt: Runtime):
    if rt.device.type == "cuda":
        torch.cuda.synchronize(rt.device)


def train(config: Config, rt: Runtime) -> list[Figure]:
    """Each implementation in a process of its own, as it is used: they run in turn all the same."""
    figures = []
    for sizes, batches, T in SHAPES[rt.device.type]:
        for B in batches:
            row = f"train {sizes[0]} x {sizes[2]}, B={B}, T={T}"
            with ExitStack() as stack:
                candidates = {}
                for name in (OURS, TRANSFORMERS, *scripts_of(config), LIMIT):
                    process = stack.enter_context(
                        ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
                    )
                    labels = process.submit(load_candidates, name, config, sizes, B, T).result()
                    candidates |= {label: partial(run_in, process, label) for label in labels}
                seconds = medians(candidates, config.rounds, rt, row)
            limit = min(taken for name, taken in seconds.items() if name.startswith(LIMIT))
            shipped = seconds.get(next(iter(candidates)))
            for name, taken in seconds.items():
                ratio = taken / shipped if shipped else None
                figures.append(Figure(row, name, B * T / taken, "tokens/s", ratio, limit / taken))
    return figures


CANDIDATES = {}  # of this process


def load_candidates(name: str, config: Config, sizes: tuple, B: int, T: int) -> list[str]:
    """Make a step of an implementation as it is shipped, and compiled with fused AdamW in the dtypes of the device."""
    rt, shape = start_as(name, config), shape_of(sizes, T)
    if name == LIMIT:
        steps = matrix_products(shape, B * T, rt)
    else:
        its = build(name, shape, scripts_of(config), rt)
        x, y = torch.randint(50257, (2, B, T), device=rt.device)
        dtype, compiled = its.shipped
        label = f"{name}, as shipped: {dtype_name(dtype)}{', compiled' if compiled else ''}"
        steps, fused = (
            {label: training_step(its, its.optimizer(), dtype, compiled, x, y, rt)},
            fused_adamw(its.model),
        )
        for dtype in dtypes(rt):
            label = f"{name}, best settings: {dtype_name(dtype)}, compiled, fused AdamW"
            steps[label] = training_step(its, fused, dtype, True, x, y, rt)
    CANDIDATES.update(steps)
    return list(steps)


def start_as(name: str, config: Config) -> Runtime:
    """What a process begins with that trains with the implementation of that name."""
    rt = runtime.start(config.device)
    if name == OURS:
        keep_freed_memory(rt.device)
    return rt


def run_in(process: ProcessPoolExecutor, label: str) -> float:
    return process.submit(run_candidate, label).result()


def run_candidate(label: str) -> float:
    """Seconds of a step that follows another one, as steps do: the first finds the others' data in the caches."""
    for _ in range(2):
        began = time.perf_counter()
        CANDIDATES[label]()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return time.perf_counter() - began


def dtypes(rt: Runtime) -> list[torch.dtype]:
    return [torch.bfloat16] if rt.device.type == "cuda" else [torch.float32, torch.bfloat16]


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.float32: "float32", torch.bfloat16: "bf16"}[dtype]


def matrix_products(shape: GPTConfig, N: int, rt: Runtime) -> dict[str, Callable]:
    """The products of a step on N tokens and nothing else: forward, and twice as many backward; per dtype."""
    C, V = shape.n_embd, shape.padded_vocab_size
    layers = [
        (C, 3 * C, shape.n_layer),
        (C, C, shape.n_layer),
        (C, 4 * C, shape.n_layer),
        (4 * C, C, shape.n_layer),
    ]

    def products(dtype: torch.dtype) -> Callable:
        tensors = []
        for wide, tall, count in (*layers, (C, V, 1)):
            new = lambda *sizes: torch.randn(sizes, device=rt.device, dtype=dtype)  # noqa: B023, E731
            tensors.append(
                (new(N, wide), new(tall, wide), new(N, tall), new(N, wide), new(tall, wide), count)
            )

        def run():
            for x, weight, y, grad_x, grad_weight, count in tensors:
                for _ in range(count):
                    torch.mm(x, weight.t(), out=y)
                    torch.mm(y, weight, out=grad_x)
                    torch.mm(y.t(), x, out=grad_weight)

        return run

    return {
        f"{LIMIT}: {dtype_name(dtype)} matrix products alone": products(dtype)
        for dtype in dtypes(rt)
    }


def memory(config: Config, rt: Runtime) -> list[Figure]:
    sizes, B, T = MEMORY_SHAPE[rt.device.type]
    row = f"memory {sizes[0]} x {sizes[2]}, B={B}, T={T}"
    names, peaks = [OURS, TRANSFORMERS, *scripts_of(config), CHECKPOINTED], {}
    for name in Progress(names, desc=row, unit="process", leave=False):
        with multiprocessing.get_context("spawn").Pool(
            1
        ) as pool:  # a new process: peaks do not fall again
            peaks[name] = pool.apply(peak_memory, (name, config, sizes, B, T))
    return [Figure(row, name, peak / 1e6, "MB", peak / peaks[OURS]) for name, peak in peaks.items()]


def peak_memory(name: str, config: Config, sizes: tuple, B: int, T: int) -> int:
    """Bytes at the peak of three steps of an implementation as it is shipped."""
    rt = start_as(name, config)
    its = build(OURS if name == CHECKPOINTED else name, shape_of(sizes, T), scripts_of(config), rt)
    its.model.activation_checkpointing = name == CHECKPOINTED
    x, y = torch.randint(50257, (2, B, T), device=rt.device)
    step = training_step(its, its.optimizer(), *its.shipped, x, y, rt)
    for _ in range(3):
        step()
    return rt.peak_memory()


def with_transformers(rt: Runtime) -> tuple[GPT, object]:
    """GPT-2 (124M) of ours with new weights, and transformers' with the same ones."""
    from transformers import GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT(GPTConfig()).eval()
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    theirs.generation_config.eos_token_id = None  # the text does not end early
    return model.to(rt.device), theirs.to(rt.device)


def score(config: Config, rt: Runtime) -> list[Figure]:
    row = f"hellaswag, GPT-2 (124M), {config.hellaswag_limit} examples"
    examples, enc = (
        hellaswag.load(config.hellaswag_data, config.hellaswag_limit),
        load_tokenizer("gpt2"),
    )
    model, theirs = with_transformers(rt)
    predictions = {}

    def ours(dtype: torch.dtype):
        _, lines = hellaswag.evaluate(
            model, enc, examples, Runtime(rt.device, dtype), styles=("completion",)
        )
        predictions["ours", dtype] = [line["pred_norm"] for line in lines]

    def plain(dtype: torch.dtype):
        with torch.no_grad(), Runtime(rt.device, dtype).autocast():
            predictions["plain", dtype] = [
                plain_answer(theirs, enc, example, rt) for example in examples
            ]

    candidates = {f"{OURS}, {dtype_name(d)}": lambda d=d: ours(d) for d in dtypes(rt)}
    candidates |= {
        f"plain loop over {TRANSFORMERS}, {dtype_name(d)}": lambda d=d: plain(d) for d in dtypes(rt)
    }
    seconds = medians(candidates, config.rounds, rt, row)
    shipped = seconds[f"{OURS}, {dtype_name(rt.dtype)}"]
    alike = [
        a == b
        for a, b in zip(predictions["ours", dtypes(rt)[0]], predictions["plain", dtypes(rt)[0]])
    ]
    say(f"{sum(alike)} of {len(alike)} predictions are those of the plain loop")
    return [
        Figure(row, name, len(examples) / s, "examples/s", s / shipped)
        for name, s in seconds.items()
    ]


def plain_answer(theirs, enc, example: dict, rt: Runtime) -> int:
    """The likeliest ending: four rows padded to the longest, logits of all tokens, mean loss of the ending's."""
    context = enc.encode_ordinary(example["ctx"])
    endings = [enc.encode_ordinary(" " + ending) for ending in example["endings"]]
    longest = len(context) + max(map(len, endings))
    rows = [context + ending + [0] * (longest - len(context) - len(ending)) for ending in endings]
    idx = torch.tensor(rows, device=rt.device)
    logits = theirs(idx).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), idx[:, 1:].flatten(), reduction="none"
    ).view(4, -1)
    first = len(context) - 1
    return int(
        np.argmin(
            [
                float(losses[n, first : first + len(ending)].mean())
                for n, ending in enumerate(endings)
            ]
        )
    )


def generate(config: Config, rt: Runtime) -> list[Figure]:
    model, theirs = with_transformers(rt)
    half = copy.deepcopy(theirs).to(torch.bfloat16)
    nano = (
        build(NANOGPT, shape_of((12, 12, 768), 1024), scripts_of(config), rt).model
        if config.nanogpt
        else None
    )
    numbers = (
        sum(p.numel() for p in model.h.parameters()) + model.wte.weight.numel()
    )  # that a token needs
    weights, vector = (
        torch.ones(numbers // 768, 768, device=rt.device),
        torch.ones(768, device=rt.device),
    )
    figures = []
    for batch in (1, 8):
        row = f"generate, GPT-2 (124M), {batch} x {NEW_TOKENS} tokens"
        prompts = torch.randint(50257, (batch, PROMPT), device=rt.device)
        texts = {}

        def ours(dtype: torch.dtype):
            """As sample.py does it, from the loaded model on."""
            if can_pack(rt.device, dtype):
                texts[dtype] = pack_weights(model, dtype).generate(
                    prompts.tolist(), NEW_TOKENS, temperature=0
                )  # noqa: B023
            else:
                with Runtime(rt.device, dtype).autocast():
                    texts[dtype] = model.generate(prompts.tolist(), NEW_TOKENS, temperature=0)  # noqa: B023

        def with_cache(theirs):
            out = theirs.generate(
                prompts, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0
            )  # noqa: B023
            texts[theirs] = out[:, PROMPT:].tolist()  # noqa: B023

        candidates = {f"{OURS}, {dtype_name(d)}": lambda d=d: ours(d) for d in dtypes(rt)}
        candidates[f"{TRANSFORMERS} with its cache, float32"] = lambda: with_cache(theirs)
        candidates[f"{TRANSFORMERS} with its cache, bf16"] = lambda: with_cache(half)
        candidates[READ] = lambda: [weights @ vector for _ in range(NEW_TOKENS)]
        seconds = medians(candidates, config.rounds, rt, row)
        if nano is not None:  # once: it takes minutes
            began = time.perf_counter()
            nano.generate(prompts, NEW_TOKENS)
            synchronize(rt)
            seconds[f"{NANOGPT}, float32, once"] = time.perf_counter() - began
        if torch.float32 in texts:
            same = sum(a == b for a, b in zip(texts[torch.float32], texts[theirs]))
            say(f"{same} of {batch} greedy texts in float32 are those of {TRANSFORMERS}")
        shipped, limit = seconds[f"{OURS}, {dtype_name(rt.dtype)}"], seconds[READ]
        for name, taken in seconds.items():
            figures.append(
                Figure(
                    row,
                    name,
                    batch * NEW_TOKENS / taken,
                    "tokens/s",
                    taken / shipped,
                    limit / taken,
                )
            )
    return figures


def tokenize(config: Config, rt: Runtime) -> list[Figure]:
    """Both on a process per core; fineweb.py with all that the command does, its start included."""
    cores = runtime.num_cores()
    kind = "parquet" if config.data_files else "pydoc"
    source = open_source(kind, data_files=config.data_files)
    TEXTS[:] = [text for _, batch in source.batches(SOURCE_START) for text in batch.to_pylist()]
    megabytes = sum(len(text.encode()) for text in TEXTS) / 1e6
    row = f"tokenize {megabytes:,.0f} MB, {cores} processes"
    parts = [slice(first, first + 64) for first in range(0, len(TEXTS), 64)]
    with (
        tempfile.TemporaryDirectory() as folder,
        multiprocessing.get_context("fork").Pool(cores) as pool,
    ):
        words = [
            "--source",
            kind,
            *(["--data_files", *config.data_files] if config.data_files else []),
        ]

        def ours():
            out_dir = Path(folder) / str(time.monotonic_ns())
            run_command("fineweb.py", *words, "--out_dir", out_dir)

        candidates = {
            OURS: ours,
            "limit: tiktoken alone, texts in memory": lambda: pool.map(count_tokens, parts),
        }
        seconds = medians(candidates, config.rounds, rt, row)
    limit = seconds["limit: tiktoken alone, texts in memory"]
    return [
        Figure(row, name, megabytes / s, "MB/s", s / seconds[OURS], limit / s)
        for name, s in seconds.items()
    ]


TEXTS = []  # of the tokenizing, inherited by its processes


def count_tokens(part: slice) -> int:
    enc = tiktoken.get_encoding("gpt2")
    return sum(len(enc.encode_ordinary(text)) for text in TEXTS[part])


def start(config: Config, rt: Runtime) -> list[Figure]:
    """GPT-2 (124M) on made-up shards of GPT-2's tokens."""
    row = "start, GPT-2 (124M), to the end of the first step"
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        data.mkdir()
        for split in ("train", "val"):
            np.save(
                data / f"x_{split}_0.npy",
                np.random.default_rng(0).integers(50257, size=100_000, dtype=np.uint16),
            )
        words = [
            "--data_dir",
            data,
            "--B",
            "4",
            "--T",
            "256",
            "--total_batch_size",
            "1024",
            "--val_every",
            "0",
        ]
        words += ["--hellaswag_every", "0", "--sample_every", "0", "--device", rt.device.type]

        def until_first_step(compile: str):
            log_dir = Path(folder) / str(time.monotonic_ns())
            command = [
                sys.executable,
                ROOT / "train_gpt2.py",
                *words,
                "--log_dir",
                log_dir,
                "--compile",
                compile,
            ]
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            while process.poll() is None and not read_stream(log_dir, "train")[0]:
                time.sleep(0.01)
            if process.poll() is not None:
                raise UserError(
                    f"train_gpt2.py ended before its first step: {process.communicate()[1]}"
                )
            process.kill()
            process.wait()

        candidates = {"compiled, from the cache": lambda: until_first_step("on")}
        candidates["not compiled"] = lambda: until_first_step("off")
        seconds = medians(candidates, config.rounds, rt, row)
    return [Figure(row, name, taken, "s") for name, taken in seconds.items()]


def run_command(script: str, *words):
    result = subprocess.run(
        [sys.executable, ROOT / script, *map(str, words)], capture_output=True, text=True
    )
    if result.returncode:
        raise UserError(f"{script} failed: {result.stderr.strip().splitlines()[-1]}")


def to_table(figures: list[Figure]) -> str:
    rows = []
    for figure in figures:
        value = f"{figure.value:,.0f}" if figure.value >= 100 else f"{figure.value:.3g}"
        ratio = f"{figure.ratio:.2f}" if figure.ratio else ""
        of_limit = f"{figure.of_limit:.0%}" if figure.of_limit else ""
        rows.append((figure.row, figure.name, f"{value} {figure.unit}", ratio, of_limit))
    return table(("what", "who", "figure", "times better are we", "of the limit"), rows)


if __name__ == "__main__":
    cli(Config, main, __doc__)
