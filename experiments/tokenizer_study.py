"""Vocabulary size against fragmentation: what does a larger vocabulary buy, and what does it cost?

    python -m experiments.tokenizer_study  # a file of FineWeb-Edu (0.7B tokens); 24 runs of GPT-2 (124M)
    python -m experiments.tokenizer_study --source pydoc --vocab_sizes 1024 2048 4096 8192 16384 --n_layer 4 \\
        --n_head 4 --n_embd 64 --context_bytes 256 --sequences 8 --B 8 --max_steps 300 --max_lr 3e-3   # in small, on 2 cores

Byte-level BPEs of several sizes are learned from the same text, beside GPT-2's own if it can be had. fineweb.py shards
the text with each, train_gpt2.py trains a model on each, both as commands. What is held out is the same for all: the
beginning of the text, as far as it is in every vocabulary's validation shard. None of ours has seen it.

The models read as much of the same corpus: as many sequences a step, of as many bytes, for as many steps, so that a
sequence has fewer tokens where tokens are longer. They are compared in bits per byte, the only unit that does not
depend on how the text is cut: a loss per token is lower for shorter tokens, whatever the model is worth. Technical
terms come from the held-out text: code-like, compound, long and rare ones, as fragmentation.py defines them.

How to read it: bytes per token grow with the logarithm of the vocabulary, so that each doubling shortens sequences and
saves compute in the blocks, and adds embeddings, which are most of a small model. Fragmentation costs where terms are
cut into pieces that mean nothing. The best size is where bits per byte are lowest at the compute that one can afford.

Run again after a stop, it goes on where it was. Results: report.md, results.json and tradeoff.png in
log/tokenizer_study/. The runs' logs are kept, their checkpoints are not.
"""

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import tiktoken
import torch
from matplotlib.figure import Figure

from common import checkpoint, runtime
from common.console import Progress, UserError, cli, say, table, write_text
from common.runtime import Runtime
from common.scoring import stream_loss
from common.shards import open_shards, read_manifest, shards_tokenizer
from common.tokenizer import (
    MIN_VOCAB_SIZE,
    encode_texts,
    encoding_of,
    load_tokenizer,
    tokenizer_to_text,
    train_tokenizer,
)
from experiments.fragmentation import (
    KINDS,
    LETTERS,
    count_words,
    describe,
    encoding_speeds,
    find_terms,
)
from experiments.sweep import Results, mean_and_deviation, stop_like_ctrl_c, train_command
from model import GPT, GPTConfig


@dataclass
class Config:
    source: Literal["fineweb-edu", "fineweb", "parquet", "json", "text", "pydoc"] = (
        "parquet"  # as in fineweb.py
    )
    data_files: tuple[
        str, ...
    ] = ()  # as in fineweb.py; none for parquet = the first file of FineWeb-Edu sample-10BT
    out_dir: str = (
        "log/tokenizer_study"  # report, numbers, picture, vocabularies, shards and the runs' logs
    )
    vocab_sizes: tuple[int, ...] = (
        1024,
        2048,
        4096,
        8192,
        16384,
        32768,
        50257,
    )  # tokens of the BPEs, besides GPT-2's
    learn_bytes: int = 1_000_000_000  # of the text to learn them from, at most
    held_out_bytes: int = 10_000_000  # of the held-out text to look at, at most
    terms: int = 1000  # of each kind, at most
    # each run
    seeds: tuple[int, ...] = (1, 2, 3)  # of weights and data order
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads per block
    n_embd: int = 768  # width
    context_bytes: int = 4096  # bytes of a sequence, and of the models' context
    sequences: int = 128  # per optimizer step
    B: int = 32  # micro-batch: sequences per forward pass
    max_steps: int = 2000  # optimizer steps
    max_lr: float = (
        6e-4  # learning rate after a warmup of a tenth of the steps; it falls to a tenth
    )
    device: str = "auto"  # cuda, mps or cpu; auto takes the first there is
    dtype: runtime.Dtype = (
        "auto"  # of matrix products; auto = bfloat16 where the hardware is fast at it
    )
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto = on GPUs
    num_parallel: int = 0  # runs at a time; 0 = one per GPU, or per CPU core

    def __post_init__(self):
        if self.source == "parquet" and not self.data_files:
            self.data_files = (
                "hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT/000_00000.parquet",
            )
        if not self.vocab_sizes or min(self.vocab_sizes) < MIN_VOCAB_SIZE:
            raise UserError(f"vocab_sizes must hold at least one, none below {MIN_VOCAB_SIZE}")
        for name in (
            "learn_bytes",
            "held_out_bytes",
            "terms",
            "context_bytes",
            "sequences",
            "B",
            "max_steps",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, must be at least 1")
        if self.sequences % self.B:
            raise UserError(f"sequences {self.sequences} is not divisible by B {self.B}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds is {self.seeds}: give different ones")
        if self.max_lr <= 0 or self.num_parallel < 0:
            raise UserError("max_lr must be above 0, num_parallel not negative")
        GPTConfig(
            n_layer=self.n_layer, n_head=self.n_head, n_embd=self.n_embd
        )  # refuses what can't be


def main(config: Config):
    stop_like_ctrl_c()
    rt = runtime.start(config.device, config.dtype)
    settings = asdict(config) | dict(dtype=str(rt.dtype))
    for key in ("out_dir", "B", "device", "compile", "num_parallel"):
        del settings[key]
    results = Results(config.out_dir, settings)
    folder = results.folder

    # the text as bytes: what to learn vocabularies from, and what to hold out
    if not (folder / "bytes.tiktoken").exists():
        write_text(
            folder / "bytes.tiktoken",
            tokenizer_to_text(encoding_of({bytes([b]): b for b in range(256)})),
        )
    shard(config, results, {"text": folder / "bytes.tiktoken"}, "reading")
    vocabularies = learn(config, folder)
    shard(
        config, results, {f"shards/{name}": file for name, file in vocabularies.items()}, "sharding"
    )

    texts = held_out(config, folder, list(vocabularies))
    known = count_words(training_texts(config, folder / "text", "counting words"))
    words, terms = find_terms(texts, known, config.terms)
    encodings = {name: shards_tokenizer(folder / "shards" / name) for name in vocabularies}
    if "encoding_speed" not in results:
        results["encoding_speed"] = encoding_speeds(encodings, texts)
    for name, enc in encodings.items():
        if f"vocabulary {name}" not in results:
            numbers = describe(enc, texts, words, terms)
            results[f"vocabulary {name}"] = numbers | costs(
                config, enc, results["text"], results[f"shards/{name}"]
            )
            results.save()

    runs = {
        f"{name} seed {seed}": (name, seed)
        for name, seed in itertools.product(vocabularies, config.seeds)
    }
    commands = {run: run_command(config, results, *what) for run, what in runs.items()}

    def read(run: str, error: str | None) -> dict:
        name = runs[run][0]
        return read_run(
            commands[run][1].parent, error, texts, config.B, results[f"vocabulary {name}"]["T"], rt
        )

    results.run_all(commands, read, config.device, config.num_parallel, "training")
    summarize(config, results, encodings, terms)


def shard(config: Config, results: Results, tokenizers: dict[str, Path | str], desc: str):
    """Let fineweb.py shard the text into folders, each with its tokenizer; keep the numbers of tokens and documents."""
    source = ["fineweb.py", "--source", config.source]
    if config.data_files:
        source += ["--data_files", *config.data_files]
    commands = {}
    for name, tokenizer in tokenizers.items():
        out_dir = results.folder / name
        words = [*source, "--tokenizer", tokenizer, "--out_dir", out_dir]
        commands[name] = words, out_dir.with_name(out_dir.name + ".txt")

    def read(name: str, error: str | None) -> dict:
        if error:
            raise UserError(error)
        manifest = read_manifest(results.folder / name)
        numbers = {key: manifest[key] for key in ("tokens", "documents")}
        if numbers["documents"] != results.get("text", numbers)["documents"]:
            raise UserError(f"{config.source} changed while it was read: choose another --out_dir")
        return numbers

    results.run_all(commands, read, config.device, 1, desc)


def learn(config: Config, folder: Path) -> dict[str, Path | str]:
    """The vocabularies, by name, as fineweb.py takes them. Merges come in the order of their frequency, so the smaller
    vocabularies are the beginnings of the largest."""
    files = {str(size): folder / f"vocab_{size}.tiktoken" for size in sorted(config.vocab_sizes)}
    if not all(file.exists() for file in files.values()):
        enc, _ = train_tokenizer(
            training_texts(config, folder / "text", "learning"), max(config.vocab_sizes)
        )
        ranks = sorted(enc._mergeable_ranks.items(), key=lambda item: item[1])
        for name, file in files.items():
            write_text(
                file, tokenizer_to_text(encoding_of(dict(ranks[: int(name) - 1])))
            )  # <|endoftext|> comes last
    try:
        load_tokenizer("gpt2")
    except OSError as error:
        say(f"warning: going on without GPT-2's vocabulary: {error}")
        return files
    return files | {"gpt2": "gpt2"}


def training_texts(config: Config, folder: Path, desc: str) -> Iterator[str]:
    """The documents of the training shards of bytes, learn_bytes of them."""
    train = open_shards(folder, "train")
    total, read = min(config.learn_bytes, train.num_tokens), 0
    with Progress(total=total, unit="B", unit_scale=True, desc=desc) as bar:
        for number, length in enumerate(train.lengths):
            for document in split_bytes(train.read(number, 0, length)):
                yield document.decode("utf-8", "replace")
                read += len(document)
                bar.update(min(read, total) - bar.n)
                if read >= total:
                    return


def split_bytes(tokens: np.ndarray) -> Iterator[bytes]:
    """The documents of a shard of bytes, without the end-of-text tokens before each."""
    starts = np.flatnonzero(tokens == 256)
    for document in np.split(tokens, starts):
        if text := document[document != 256].astype(np.uint8).tobytes():
            yield text


def held_out(config: Config, folder: Path, names: list[str]) -> list[str]:
    """The documents that every vocabulary's validation shard holds, held_out_bytes of them."""
    limit = config.held_out_bytes
    for part in (folder / "text", *(folder / "shards" / name for name in names)):
        enc, val = shards_tokenizer(part), open_shards(part, "val")
        sizes = np.array(
            [*(len(enc.decode_single_token_bytes(n)) for n in range(enc.eot_token)), 0]
        )
        limit = min(
            limit, int(sizes[val.read(0, 0, min(config.held_out_bytes, val.lengths[0]))].sum())
        )
    texts, val = [], open_shards(folder / "text", "val")
    for document in split_bytes(val.read(0, 0, val.lengths[0])):
        texts.append(document[:limit].decode("utf-8", "ignore"))
        limit -= len(document)
        if limit <= 0:
            break
    texts = list(filter(None, texts))
    if not any(LETTERS.search(text) for text in texts):
        raise UserError(
            "the held-out text has no words of Latin letters: give more text, or other text"
        )
    return texts


def costs(config: Config, enc: tiktoken.Encoding, text: dict, shards: dict) -> dict:
    """What follows for a model that reads the whole text: tokens in a sequence, parameters, training compute."""
    tokens, text_bytes = (
        shards["tokens"],
        text["tokens"] - text["documents"],
    )  # a token a byte, and one a document
    T = max(1, round(config.context_bytes * tokens / text_bytes))
    shape = GPTConfig(
        T, enc.n_vocab, n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd
    )
    with torch.device("meta"):
        model = GPT(shape)
    return dict(
        T=T,
        parameters=model.num_params(),
        embedding_share=enc.n_vocab * config.n_embd / model.num_params(),
        flops_per_byte=model.flops_per_token(T) * tokens / text_bytes,
    )


def run_command(config: Config, results: Results, name: str, seed: int) -> tuple[list, Path]:
    """The words of the command that trains a model on a vocabulary, and the file for its output."""
    T = results[f"vocabulary {name}"]["T"]
    constants = {
        key: getattr(config, key)
        for key in ("n_layer", "n_head", "n_embd", "B", "max_steps", "max_lr")
    }
    constants |= dict(T=T, block_size=T, total_batch_size=config.sequences * T, seed=seed)
    constants |= dict(min_lr=config.max_lr / 10, warmup_steps=config.max_steps // 10)
    constants |= dict(
        val_every=0, sample_every=0, hellaswag_every=0, checkpoint_every=config.max_steps
    )
    folder = results.folder
    return train_command(
        config, folder / "runs" / f"{name}_seed_{seed}", folder / "shards" / name, **constants
    )


def read_run(
    folder: Path, error: str | None, texts: list[str], B: int, T: int, rt: Runtime
) -> dict:
    """A trained model's loss on the held-out text. Raises ValueError if the run failed."""
    if error:
        raise UserError(error)
    model, enc = checkpoint.load_model(folder / "model_final.pt")
    loss, bits = bits_per_byte(model.to(rt.device), enc, texts, B, T, rt)
    torch.cuda.empty_cache()  # for the runs on the same GPU
    return dict(loss=loss, bits_per_byte=bits)


def bits_per_byte(
    model: GPT, enc: tiktoken.Encoding, texts: list[str], B: int, T: int, rt: Runtime
):
    """Mean loss of the texts in nats per token, and in bits per byte of UTF-8."""
    tokens, _ = encode_texts(enc, pa.array(texts))
    loss = stream_loss(model, tokens, B, T, rt)
    return loss, loss * (len(tokens) - 1) / math.log(2) / sum(len(text.encode()) for text in texts)


def summarize(
    config: Config,
    results: Results,
    encodings: dict[str, tiktoken.Encoding],
    terms: dict[str, list[str]],
):
    names, text_bytes = list(encodings), results["text"]["tokens"] - results["text"]["documents"]
    kinds = [kind for kind in KINDS if terms[kind]]
    rows, by_kind = [], []
    for name in names:
        found = results[f"vocabulary {name}"]
        bits = [results[f"{name} seed {seed}"]["bits_per_byte"] for seed in config.seeds]
        rows.append((
            name, f"{found['bytes_per_token']:.2f}", f"{found['tokens_per_word']:.3f}", f"{found['words_whole']:.1%}",
            str(found["T"]), f"{found['parameters'] / 1e6:.2f}M", f"{found['embedding_share']:.1%}",
            f"{found['flops_per_byte'] / 1e6:.3g}", f"{results['encoding_speed'][name]:.1f}",
            mean_and_deviation(bits, 4),
        ))  # fmt: skip
        cells = (
            f"{found['tokens_per_term'][k]:.2f} ({found['terms_whole'][k]:.0%})" for k in kinds
        )
        by_kind.append((name, *cells))
    head = (
        "vocabulary", "bytes per token", "tokens per word", "words whole", f"tokens in {config.context_bytes} bytes",
        "parameters", "of them embeddings", "training MFLOP per byte", "encoding MB/s", "bits per byte",
    )  # fmt: skip
    examples = [
        (escape(term), *(cut(encodings[name], term) for name in names))
        for kind in kinds
        for term in terms[kind][:3]
    ]
    text = "\n\n".join(
        (
            f"{text_bytes:,} bytes of {config.source}; models of {config.n_layer} layers of width {config.n_embd}, "
            f"{config.max_steps} steps of {config.sequences} x {config.context_bytes} bytes; bits per byte of the "
            f"held-out text, mean and standard deviation of {len(config.seeds)} seeds",
            table(head, rows),
            "Tokens per technical term (share kept whole):",
            table(("vocabulary", *(f"{kind}, {len(terms[kind])}" for kind in kinds)), by_kind),
            "How terms are cut:",
            table(("term", *names), examples),
        )
    )
    write_text(results.folder / "terms.json", json.dumps(terms, indent=1) + "\n")
    write_text(results.folder / "report.md", text + "\n")
    draw(config, results, names, kinds)
    say(
        f"{text}\n\n{results.folder}/report.md, {results.folder}/results.json, {results.folder}/tradeoff.png"
    )


def cut(enc: tiktoken.Encoding, term: str) -> str:
    """A term after a blank, with a stroke between its tokens."""
    parts = (enc.decode_single_token_bytes(token) for token in enc.encode_ordinary(" " + term))
    return escape("·".join(part.decode("utf-8", "replace").strip() for part in parts).strip("·"))


def escape(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return text.replace("|", "\\|")


def draw(config: Config, results: Results, names: list[str], kinds: list[str]):
    figure = Figure((17, 5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    found = {name: results[f"vocabulary {name}"] for name in names}
    own = [name for name in names if name != "gpt2"]
    sizes = [found[name]["vocab_size"] for name in own]

    def plot(ax, value, label: str, color: str, marker: str = "o"):
        ax.plot(sizes, [value(name) for name in own], marker=marker, color=color, label=label)
        if "gpt2" in names:
            ax.plot(
                found["gpt2"]["vocab_size"], value("gpt2"), marker="*", ms=12, color=color, ls=""
            )

    plot(left, lambda name: found[name]["tokens_per_word"], "words of the text", "black", "s")
    for n, kind in enumerate(kinds):
        plot(left, lambda name, kind=kind: found[name]["tokens_per_term"][kind], kind, f"C{n}")
    left.set(
        title="Fragmentation (stars: GPT-2's own vocabulary)", ylabel="tokens per word or term"
    )

    plot(
        middle,
        lambda name: found[name]["embedding_share"],
        "embeddings, share of the parameters",
        "C0",
    )
    top = max(each["flops_per_byte"] for each in found.values())
    plot(
        middle,
        lambda name: found[name]["flops_per_byte"] / top,
        "training compute per byte, to the highest",
        "C1",
    )
    longest = found[own[0]]["T"]
    plot(
        middle,
        lambda name: found[name]["T"] / longest,
        "tokens in a sequence, to the smallest vocabulary",
        "C2",
    )
    middle.set(title="Cost", ylim=(0, None))

    bits = {
        name: [results[f"{name} seed {seed}"]["bits_per_byte"] for seed in config.seeds]
        for name in names
    }
    plot(right, lambda name: np.mean(bits[name]), f"mean of {len(config.seeds)} seeds", "C0")
    for name in names:
        right.plot(
            [found[name]["vocab_size"]] * len(bits[name]), bits[name], "_", color="C0", alpha=0.6
        )
    right.set(
        title="Models trained on the same bytes (strokes: seeds)", ylabel="bits per byte, held out"
    )
    ticks = sorted({each["vocab_size"] for each in found.values()})
    for ax in (left, middle, right):
        ax.set(xscale="log", xlabel="tokens in the vocabulary")
        ax.set_xticks(ticks, [f"{size:,}" for size in ticks], rotation=30)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small")
    results.save_picture("tradeoff.png", figure)


if __name__ == "__main__":
    cli(Config, main, __doc__)
