"""The rows about inference with GPT-2 (124M), random weights: HellaSwag, CORE, generation."""

import copy
import functools
import runpy
import tempfile
from collections.abc import Callable
from pathlib import Path

import tiktoken
import torch
from torch.nn import functional as F

import dclm_core
import hellaswag as hellaswag_task
from bench import measure, peers
from bench.measure import DTYPE_NAMES, ROOFLINE, Figure, Stopwatch
from common.console import UserError, say
from common.cpu import can_pack, for_generation
from common.huggingface import save_pretrained
from common.runtime import Runtime
from common.tokenizer import load_tokenizer
from dclm_core import Task
from model import GPT, GPTConfig

NUM_TOKENS = 256  # tokens generated per text
# Tokens of each prompt: few, so that generation is what is measured
PROMPT_TOKENS = 16
READS = f"{ROOFLINE}all weights read from memory once per token"


def with_same_weights(rt: Runtime) -> tuple[GPT, torch.nn.Module]:
    """GPT-2 (124M) of this project and of transformers, both with the same random weights."""
    from transformers import GPT2LMHeadModel

    # Trained weights would take as long; random ones need no download.
    torch.manual_seed(0)
    ours = GPT(GPTConfig()).eval()

    # The export to Hugging Face's layout knows how transformers names and orients the weights.
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(ours, folder)
        theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    # Random weights may produce the end-of-text token, which would end a text early.
    theirs.generation_config.eos_token_id = None
    return ours.to(rt.device), theirs.to(rt.device)


# ---------------------------------------------------------------------------------------------
# HellaSwag


def hellaswag(config, rt: Runtime) -> list[Figure]:
    """Examples scored per second, compared with a plain loop over transformers' model."""
    row = f"hellaswag, GPT-2 (124M), {config.hellaswag_limit} examples"
    # Every candidate scores the same examples with the same weights.
    examples = hellaswag_task.load(config.hellaswag_data, config.hellaswag_limit)
    enc = load_tokenizer("gpt2")
    ours, theirs = with_same_weights(rt)

    dtypes = measure.dtypes_of(rt.device)
    # Each project in each dtype
    our_watches = {
        our_name(dtype): Stopwatch(rt, predict, ours, enc, examples, Runtime(rt.device, dtype))
        for dtype in dtypes
    }
    their_watches = {
        f"plain loop over transformers, {DTYPE_NAMES[dtype]}": Stopwatch(
            rt, predict_plainly, theirs, enc, examples, Runtime(rt.device, dtype)
        )
        for dtype in dtypes
    }
    seconds = measure.medians(our_watches | their_watches, config.rounds, row)

    # The comparison is fair only if both compute the same.
    our_predictions = next(iter(our_watches.values())).result
    their_predictions = next(iter(their_watches.values())).result
    equal = sum(a == b for a, b in zip(our_predictions, their_predictions))
    say(f"{equal} of {len(examples)} predictions equal those of the plain loop")
    return measure.rates(row, seconds, len(examples), "examples/s", our_name(rt.dtype))


def our_name(dtype: torch.dtype) -> str:
    """The name of this project's candidate in a dtype."""
    return f"{peers.ThisProject.name}, {DTYPE_NAMES[dtype]}"


def predict(model: GPT, enc: tiktoken.Encoding, examples: list[dict], rt: Runtime) -> list[int]:
    """The ending that this project chooses for each example."""
    _, lines = hellaswag_task.evaluate(model, enc, examples, rt, styles=("completion",))
    return [line["pred_norm"] for line in lines]


@torch.no_grad()
def predict_plainly(
    model: torch.nn.Module, enc: tiktoken.Encoding, examples: list[dict], rt: Runtime
) -> list[int]:
    """The ending with the lowest mean loss per token, by the loop that most people would write: one
    example at a time, its four texts padded to the longest, the logits of all tokens.

    It renders the examples on its own, so that it also checks this project's rendering.
    """
    predictions = []
    for example in examples:
        # Each row is the context and an ending, padded on the right. The model reads from left to
        # right, so the padding changes nothing before it.
        context = enc.encode_ordinary(example["ctx"])
        endings = [enc.encode_ordinary(" " + ending) for ending in example["endings"]]
        longest = max(len(ending) for ending in endings)
        padded = [context + ending + [0] * (longest - len(ending)) for ending in endings]
        idx = torch.tensor(padded, device=rt.device)  # (4, T)
        with rt.autocast():
            logits = model(idx).logits  # (4, T, vocab_size)
            losses = F.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), idx[:, 1:].flatten(), reduction="none"
            ).view(4, -1)  # (4, T - 1)
        # The loss in column t is that of token t + 1.
        first = len(context) - 1
        means = [
            float(row[first : first + len(ending)].mean()) for row, ending in zip(losses, endings)
        ]
        predictions.append(means.index(min(means)))
    return predictions


# ---------------------------------------------------------------------------------------------
# CORE


class CoreModel:
    """transformers' model behind the interface that nanochat's core_eval.py expects."""

    max_seq_len = 1024  # as nanochat evaluates GPT-2

    def __init__(self, model: torch.nn.Module):
        self.model = model

    def __call__(self, idx: torch.Tensor) -> torch.Tensor:
        return self.model(idx).logits


class CoreTokenizer:
    """The same for a tokenizer."""

    def __init__(self, enc: tiktoken.Encoding):
        self.enc = enc

    def get_bos_token_id(self) -> int:
        return self.enc.eot_token

    def __call__(self, texts: list[str], prepend: int) -> list[list[int]]:
        return [[prepend, *self.enc.encode_ordinary(text)] for text in texts]


def evaluate_as_nanochat(
    path: Path, model: CoreModel, tokenizer: CoreTokenizer, task: Task, indices: range, rt: Runtime
) -> list[bool]:
    """Whether the model is right, for each of these examples: by the core_eval.py at `path`."""
    # The names of core_eval.py for the fields of a task
    meta = dict(task_type=task.kind, num_fewshot=task.shots, continuation_delimiter=task.delimiter)
    # runpy loads the file without nanochat's package, which would have to be installed.
    evaluate_example = runpy.run_path(str(path))["evaluate_example"]
    with rt.autocast():
        return [
            evaluate_example(index, model, tokenizer, task.examples, rt.device, meta)
            for index in indices
        ]


def find_core_eval(folder: str | None) -> Path | None:
    """nanochat's core_eval.py in a folder that the user names."""
    if folder is None:
        return None
    path = Path(folder, "nanochat", "core_eval.py")
    if not path.exists():
        raise UserError(f"no file {path}: --nanochat is the folder of a clone of nanochat")
    return path


def core(config, rt: Runtime) -> list[Figure]:
    """Examples of a task with ten shots per second, compared with nanochat's evaluation."""
    row = f"CORE, HellaSwag with ten shots, GPT-2 (124M), {config.core_limit} examples"
    # The examples of HellaSwag in the format of CORE's tasks
    examples = []
    # The shots are drawn from more examples than are scored.
    for n, example in enumerate(hellaswag_task.load(config.hellaswag_data, 500)):
        query = f"{example['activity_label']}: {example['ctx']}"
        examples.append(dict(query=query, choices=example["endings"], gold=example["label"], ind=n))
    task = Task("hellaswag", "multiple_choice", 10, " ", 0.25, examples)
    indices = range(min(config.core_limit, len(examples)))

    enc = load_tokenizer("gpt2")
    ours, theirs = with_same_weights(rt)
    path = find_core_eval(config.nanochat)

    # In one dtype, the fastest on this hardware: the reference takes seconds per example.
    name = our_name(rt.dtype)
    watches = {name: Stopwatch(rt, dclm_core.evaluate_task, ours, enc, task, indices, rt, "CORE")}
    their_name = f"nanochat's core_eval.py on transformers, {DTYPE_NAMES[rt.dtype]}"
    if path:
        peer = (path, CoreModel(theirs), CoreTokenizer(enc))
        watches[their_name] = Stopwatch(rt, evaluate_as_nanochat, *peer, task, indices, rt)
    seconds = measure.medians(watches, config.rounds, row)

    # The comparison is fair only if both compute the same.
    result = watches[name].result
    if path:
        equal = sum(a == b for a, b in zip(watches[their_name].result, result.hits))
        say(f"{equal} of {len(indices)} examples have the same result with nanochat")
    reads = f"{result.tokens:,} tokens, the reference {result.reference_tokens:,}"
    say(f"this project reads {reads}")
    return measure.rates(row, seconds, len(indices), "examples/s", name)


# ---------------------------------------------------------------------------------------------
# Generation


def generate(config, rt: Runtime) -> list[Figure]:
    """Tokens per second of greedy generation, with one text and with eight texts at a time."""
    # The models: this project's, transformers' in each dtype, and nanoGPT's
    ours, theirs = with_same_weights(rt)
    # As a user would load it in bf16: the weights themselves are bf16, without autocast.
    theirs_in = {
        dtype: copy.deepcopy(theirs).to(dtype)
        # dict.fromkeys: float32 once, whether or not it is among the dtypes.
        for dtype in dict.fromkeys((torch.float32, *measure.dtypes_of(rt.device)))
    }
    nanogpt = None
    if config.nanogpt:
        scripts = peers.find_scripts(config.nanogpt, None)
        nanogpt = peers.make_peer(peers.NanoGPT.name, GPTConfig(), scripts, rt).model

    # The roofline: every weight has to come from memory once per token.
    reads = {
        f"{READS}, {DTYPE_NAMES[dtype]}": functools.partial(
            read_repeatedly, fastest_read(weights_per_token(ours, dtype))
        )
        for dtype in measure.dtypes_of(rt.device)
    }

    figures = []
    for num_texts in (1, 8):
        row = f"generate, GPT-2 (124M), {num_texts} x {NUM_TOKENS} tokens"
        prompts = torch.randint(50257, (num_texts, PROMPT_TOKENS), device=rt.device)
        # The candidates: this project in every dtype, transformers in these and float32, the
        # roofline.
        watches = {}
        for dtype in measure.dtypes_of(rt.device):
            watches[our_name(dtype)] = Stopwatch(
                rt, generate_ours, ours, prompts, Runtime(rt.device, dtype)
            )
        name = f"{peers.Transformers.name} with its cache, "
        for dtype, model in theirs_in.items():
            watches[name + DTYPE_NAMES[dtype]] = Stopwatch(rt, generate_theirs, model, prompts)
        for name_of_read, read in reads.items():
            watches[name_of_read] = Stopwatch(rt, read)
        seconds = measure.medians(watches, config.rounds, row)
        if nanogpt is not None:
            # Without a cache this takes minutes: one run, and no warmup.
            watch = Stopwatch(rt, nanogpt.generate, prompts, NUM_TOKENS)
            seconds[f"{peers.NanoGPT.name}, float32, one run"] = watch()

        # In float32 both must generate the same texts. In bf16 they may differ by rounding.
        if torch.float32 in measure.dtypes_of(rt.device):
            our_texts = watches[our_name(torch.float32)].result
            their_texts = watches[name + "float32"].result
            equal = sum(a == b for a, b in zip(our_texts, their_texts))
            say(f"{equal} of {num_texts} greedy texts in float32 equal those of transformers")

        amount = num_texts * NUM_TOKENS
        # The machine's best: the fastest read, whatever its dtype
        roofline = min(reads, key=lambda read: seconds[read])
        figures += measure.rates(row, seconds, amount, "tokens/s", our_name(rt.dtype), roofline)
    return figures


def generate_ours(model: GPT, prompts: torch.Tensor, rt: Runtime) -> list[list[int]]:
    """As sample.py does it once the model is loaded: on a CPU, preparing the weights counts."""
    if can_pack(rt.device, rt.dtype):
        replica = for_generation(model, rt.dtype, len(prompts))
        return replica.generate(prompts.tolist(), NUM_TOKENS, temperature=0)
    with rt.autocast():
        return model.generate(prompts.tolist(), NUM_TOKENS, temperature=0)


def generate_theirs(model, prompts: torch.Tensor) -> list[list[int]]:
    """The same texts, by transformers' own loop."""
    # Without a stop token every text has NUM_TOKENS tokens.
    out = model.generate(prompts, do_sample=False, max_new_tokens=NUM_TOKENS, pad_token_id=0)
    return out[:, PROMPT_TOKENS:].tolist()


def weights_per_token(model: GPT, dtype: torch.dtype) -> torch.Tensor:
    """A tensor as large as all weights that a token needs: the blocks and the head, not wpe."""
    # wte counts once: it is read as the head. As the embedding, only one row is read.
    count = sum(p.numel() for p in model.h.parameters()) + model.wte.weight.numel()
    width = model.config.n_embd
    return torch.ones(count // width, width, dtype=dtype, device=model.wte.weight.device)


def fastest_read(weights: torch.Tensor) -> Callable[[], object]:
    """The operation that reads the tensor in the shortest time, of several."""
    # Which operation reads fastest depends on the device and on the kernels for the dtype.
    vector = torch.ones(weights.shape[1], dtype=weights.dtype, device=weights.device)
    flat = weights.flatten()
    as_ints = weights.view(torch.int32)
    operations = [
        lambda: weights @ vector,
        lambda: torch.dot(flat, flat),
        lambda: flat.sum(),
        lambda: as_ints.sum(dtype=torch.int32),
        lambda: as_ints.max(),
    ]
    return measure.fastest(operations, weights.device)


def read_repeatedly(read: Callable[[], object]):
    """Once per generated token."""
    for _ in range(NUM_TOKENS):
        read()
