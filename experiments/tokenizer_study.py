"""Vocabulary size against fragmentation: what does a larger vocabulary gain, and what does it cost?

    # one file of FineWeb-Edu (0.7B tokens), 24 runs of GPT-2 (124M)
    python -m experiments.tokenizer_study

    # at small scale, on 2 cores
    python -m experiments.tokenizer_study --source pydoc --vocab_sizes 1024 2048 4096 8192 16384 \\
        --n_layer 4 --n_head 4 --n_embd 64 --context_bytes 256 --sequences 8 --B 8 \\
        --max_steps 300 --max_lr 3e-3

Byte-level BPE vocabularies of several sizes are learned from the same text, and compared with
GPT-2's if it is available. For each of them, fineweb.py shards the text and train_gpt2.py trains
models. The held-out text is the same for all: the beginning of the text, as far as it is in the
validation shard of every vocabulary. Neither the new vocabularies nor the models have seen it.

All models read the same amount of text: the same number of steps, sequences per step, and bytes per
sequence. Where tokens are longer, a sequence has fewer of them. The models are compared in bits per
byte, which do not depend on how the text is split. (The loss per token is lower for shorter tokens,
however good the model is.) fragmentation.py defines the technical terms of the comparison.

How to read the results: bytes per token grow with the logarithm of the vocabulary size. Each
doubling shortens the sequences, which saves compute in the blocks, and adds embeddings, which are
most of a small model. Fragmentation hurts where terms are split into pieces without a meaning. The
best size has the lowest bits per byte among those whose compute is affordable.

An interrupted study resumes when the command is repeated. Output: report.md, results.json,
terms.json, tradeoff.png, vocabularies, shards and the logs of the runs in log/tokenizer_study/.
The runs' checkpoints are removed.
"""

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import common.before_torch

from common.console import (
    Progress,
    UserError,
    check_at_least,
    parse_flags,
    run_script,
    say,
    table,
    write_text,
)
from experiments.flags import TrainingConfig

# The first of the sample's files, to be read over the network
DEFAULT_PARQUET = "hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT/000_00000.parquet"


@dataclass
class Config(TrainingConfig):
    # source of the text, as in fineweb.py
    source: Literal["fineweb-edu", "fineweb", "parquet", "json", "text", "pydoc"] = "parquet"
    # files of the text, as in fineweb.py; none for parquet = first file of FineWeb-Edu sample-10BT
    data_files: tuple[str, ...] = ()
    # folder for the report, results.json, plot, vocabularies, shards and runs
    out_dir: str = "log/tokenizer_study"
    # sizes of the vocabularies to learn, in tokens
    vocab_sizes: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768, 50257)
    learn_bytes: int = 1_000_000_000  # maximum bytes of text to learn the vocabularies from
    held_out_bytes: int = 10_000_000  # maximum bytes of held-out text
    terms: int = 1000  # maximum number of technical terms of each kind
    context_bytes: int = 4096  # bytes per sequence, and of the models' context
    sequences: int = 128  # sequences per optimizer step
    max_lr: float = 6e-4  # learning rate after a warmup of a tenth of the steps; decays to a tenth

    def __post_init__(self):
        from common.tokenizer import MIN_VOCAB_SIZE  # imported here, because it is slow

        super().__post_init__()
        if self.source == "parquet" and not self.data_files:
            self.data_files = (DEFAULT_PARQUET,)
        if not self.vocab_sizes or min(self.vocab_sizes) < MIN_VOCAB_SIZE:
            raise UserError(
                f"vocab_sizes is {self.vocab_sizes}: give one or more, none below {MIN_VOCAB_SIZE}"
            )
        check_at_least(
            self, 1, "learn_bytes", "held_out_bytes", "terms", "context_bytes", "sequences"
        )
        if self.sequences % self.B:
            raise UserError(f"sequences {self.sequences} is not divisible by B {self.B}")
        if self.max_lr <= 0:
            raise UserError(f"max_lr is {self.max_lr}, must be above 0")


if __name__ == "__main__":
    config = parse_flags(Config, __doc__)  # before the slow imports: --help answers at once

import numpy as np
import pyarrow as pa
import tiktoken
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common import checkpoint
from common.optim import Diverged
from common.runtime import Runtime
from common.scoring import stream_loss
from common.shards import open_shards, read_manifest, shards_tokenizer
from common.tokenizer import (
    encode_texts,
    encoding_of,
    load_tokenizer,
    tokenizer_to_text,
    train_tokenizer,
)
from experiments.fragmentation import (
    LETTERS,
    TERM_KINDS,
    count_words,
    encoding_speeds,
    find_terms,
    measure_fragmentation,
)
from experiments.sweep import (
    Run,
    StudyFolder,
    finish_axes,
    mean_and_deviation,
    settings_of,
    start,
    train_run,
)
from model import GPT

BYTE_EOT = 256  # end-of-text token of the vocabulary of single bytes


def main(config: Config):
    """Learn the vocabularies, shard the text with each, train models, and compare."""
    rt = start(config)
    study = StudyFolder(config.out_dir, settings_of(config, rt))

    # Split the text, learn the vocabularies, and shard the text with each of them.
    shard_bytes(config, study)
    vocabularies = learn_vocabularies(config, study.path)
    tokenizers = {f"shards/{name}": file for name, file in vocabularies.items()}
    shard(config, study, tokenizers, "sharding")
    encodings = {name: shards_tokenizer(study.path / "shards" / name) for name in vocabularies}

    # Compare how they split the held-out text. "Rare" words are rare in the text to learn from.
    texts = held_out(config, study.path, list(vocabularies))
    known = count_words(training_texts(config, study.path / "text", "counting words"))
    words, terms = find_terms(texts, known, config.terms)
    study.once("encoding_speed", lambda: encoding_speeds(encodings, texts))
    for name, enc in encodings.items():
        measure = partial(measure_vocabulary, config, study, name, enc, texts, words, terms)
        study.once(f"vocabulary {name}", measure)

    # Train models with each vocabulary, and compare them on the held-out text. None should diverge.
    def read(run: Run, diverged: Diverged | None) -> dict:
        if diverged:
            raise diverged
        return read_run(config, run.folder, texts, rt)

    pairs = itertools.product(vocabularies, config.seeds)
    runs = [make_run(config, study, name, seed) for name, seed in pairs]
    study.run_all(runs, read, config.device, config.num_parallel, "training")
    summarize(config, study, encodings, terms)


# ---------------------------------------------------------------------------------------------
# Text and vocabularies


def shard_bytes(config: Config, study: StudyFolder):
    """Shard the text as single bytes, which splits it into training and held-out text."""
    # A vocabulary of the 256 bytes, without merges: the shards are then the text itself, in the
    # format and with the split into training and validation that all other shards have.
    tokenizer = study.path / "bytes.tiktoken"
    if not tokenizer.exists():
        single_bytes = {bytes([byte]): byte for byte in range(256)}
        write_text(tokenizer, tokenizer_to_text(encoding_of(single_bytes)))
    shard(config, study, {"text": tokenizer}, "reading")


def shard(config: Config, study: StudyFolder, tokenizers: Mapping[str, Path | str], desc: str):
    """Run fineweb.py for each tokenizer. The keys are folders, and the names of the results.

    A result holds the number of tokens and documents.
    """
    runs = []
    for name, tokenizer in tokenizers.items():
        folder = study.path / name
        argv: list = ["fineweb.py", "--source", config.source]
        if config.data_files:
            argv += ["--data_files", *config.data_files]
        argv += ["--tokenizer", tokenizer, "--out_dir", folder]
        runs.append(Run(name, argv, folder.with_name(folder.name + ".txt")))

    def read(run: Run, _) -> dict:
        manifest = read_manifest(study.path / run.name)
        assert manifest is not None  # fineweb.py has just written it
        counts = {key: manifest[key] for key in ("tokens", "documents")}
        # The text is read once for each vocabulary, perhaps from the network.
        if counts["documents"] != study.results.get("text", counts)["documents"]:
            raise UserError(f"{config.source} changed while it was read: choose another --out_dir")
        return counts

    # One at a time, because fineweb.py uses all cores.
    study.run_all(runs, read, config.device, 1, desc)


def learn_vocabularies(config: Config, folder: Path) -> Mapping[str, Path | str]:
    """Name -> file, or "gpt2", as fineweb.py's --tokenizer takes it.

    BPE adds merges one by one, so each smaller vocabulary is the beginning of the largest.
    """
    # Written one by one: all are learned again if a stop left some of them missing.
    files = {str(size): folder / f"vocab_{size}.tiktoken" for size in sorted(config.vocab_sizes)}
    if not all(file.exists() for file in files.values()):
        texts = training_texts(config, folder / "text", "learning")
        # Only the largest is learned. The others are its first merges, without new training.
        enc, _ = train_tokenizer(texts, max(config.vocab_sizes))
        ranks = sorted(enc._mergeable_ranks.items(), key=lambda item: item[1])
        for name, file in files.items():
            size = int(name) - 1  # <|endoftext|> is added as the last token
            write_text(file, tokenizer_to_text(encoding_of(dict(ranks[:size]))))
    # Its first use downloads a file.
    try:
        load_tokenizer("gpt2")
    except OSError as error:
        say(f"warning: continuing without GPT-2's vocabulary: {error}")
        return files
    return files | {"gpt2": "gpt2"}


def training_texts(config: Config, folder: Path, desc: str) -> Iterator[str]:
    """The documents in the training shards of bytes, up to learn_bytes."""
    train = open_shards(folder, "train")
    total = min(config.learn_bytes, train.num_tokens)
    read = 0
    with Progress(total=total, unit="B", unit_scale=True, desc=desc) as bar:
        for number, length in enumerate(train.lengths):
            for document in split_bytes(train.read(number, 0, length)):
                # A shard may end within a character, hence "replace".
                yield document.decode("utf-8", "replace")
                read += len(document)
                bar.update(min(read, total) - bar.n)
                if read >= total:
                    return


def split_bytes(tokens: np.ndarray) -> Iterator[bytes]:
    """The documents of a shard of bytes, without the end-of-text token before each."""
    # What precedes the first end-of-text token is the rest of a document of an earlier shard.
    starts = np.flatnonzero(tokens == BYTE_EOT)
    for document in np.split(tokens, starts):
        # Ids below 256 are the bytes themselves, (bytes,) uint8.
        text = document[document != BYTE_EOT].astype(np.uint8).tobytes()
        if text:
            yield text


def held_out(config: Config, folder: Path, names: list[str]) -> list[str]:
    """The documents that are in every vocabulary's validation shard, up to held_out_bytes.

    The validation shards of these vocabularies, side by side, and what is held out:

        bytes   |-------------------------------|
        300     |-------------------|
        600     |-------------------------|
                 <---- held out ---->
    """
    # The shortest of the validation shards, counted in bytes, sets the limit.
    limit = config.held_out_bytes
    for part in (folder / "text", *(folder / "shards" / name for name in names)):
        limit = min(limit, validation_bytes(config, part))
    # The text itself is read from the shards of bytes.
    texts = []
    val = open_shards(folder / "text", "val")
    for document in split_bytes(val.read(0, 0, val.lengths[0])):
        # The limit may lie within a character, which is then left out.
        texts.append(document[:limit].decode("utf-8", "ignore"))
        # The next documents share what is left of the limit.
        limit -= len(document)
        if limit <= 0:
            break
    texts = [text for text in texts if text]
    if not any(LETTERS.search(text) for text in texts):
        raise UserError(
            "the held-out text has no words of Latin letters: give more text, or other text"
        )
    return texts


def validation_bytes(config: Config, folder: Path) -> int:
    """How many bytes of text a validation shard holds, counted up to held_out_bytes tokens."""
    enc = shards_tokenizer(folder)
    # Look up the length of each token, then sum up the lengths of all tokens.
    lengths = [len(enc.decode_single_token_bytes(token)) for token in range(enc.eot_token)]
    bytes_of_token = np.array([*lengths, 0])  # the end-of-text token stands for no text
    val = open_shards(folder, "val")
    tokens = val.read_first(config.held_out_bytes)
    return int(bytes_of_token[tokens].sum())


def text_size(study: StudyFolder) -> int:
    """Bytes of the text: its tokens, without the end-of-text token of each document."""
    counts = study.results["text"]
    return counts["tokens"] - counts["documents"]


def measure_vocabulary(
    config: Config,
    study: StudyFolder,
    name: str,
    enc: tiktoken.Encoding,
    texts: list[str],
    words: Counter,
    terms: dict[str, list[str]],
) -> dict:
    """How the vocabulary splits the held-out text, and what a model with it costs."""
    fragmentation = measure_fragmentation(enc, texts, words, terms)

    # The costs are those of the whole text, training and held-out.
    num_tokens = study.results[f"shards/{name}"]["tokens"]
    return fragmentation | costs(config, enc, num_tokens, text_size(study))


def costs(config: Config, enc: tiktoken.Encoding, num_tokens: int, num_bytes: int) -> dict:
    """Sequence length, parameters and training compute of a model that reads the whole text."""
    # As many tokens as context_bytes have on average in this text
    T = max(1, round(config.context_bytes * num_tokens / num_bytes))
    with torch.device("meta"):  # counts only: no memory for weights
        model = GPT(config.gpt_config(block_size=T, vocab_size=enc.n_vocab))
    return dict(
        T=T,
        parameters=model.num_params(),
        embedding_share=enc.n_vocab * config.n_embd / model.num_params(),
        flops_per_byte=model.flops_per_token(T) * num_tokens / num_bytes,
    )


# ---------------------------------------------------------------------------------------------
# Models


def run_name(vocabulary: str, seed: int) -> str:
    """The name of a run, and of its result."""
    return f"{vocabulary} seed {seed}"


def make_run(config: Config, study: StudyFolder, name: str, seed: int) -> Run:
    """A training run with one vocabulary, on context_bytes of text per sequence."""
    # Tokens that context_bytes have with this vocabulary: every model sees as much text.
    T = study.results[f"vocabulary {name}"]["T"]
    return train_run(
        config,
        run_name(name, seed),
        study.path / "shards" / name,
        T=T,
        total_batch_size=config.sequences * T,
        max_lr=config.max_lr,
        seed=seed,
        warmup_steps=config.max_steps // 10,
        # The held-out text is the same for all vocabularies; the validation shards are not.
        val_every=0,
        checkpoint_every=0,  # the rolling checkpoints are enough to resume from
    )


def read_run(config: Config, folder: Path, texts: list[str], rt: Runtime) -> dict:
    """A trained model's loss on the held-out text."""
    # All models read context_bytes, so each is measured at its own context length.
    model, enc = checkpoint.load_model(folder / "model_final.pt")
    T = model.config.block_size
    loss, bits = bits_per_byte(model.to(rt.device), enc, texts, config.B, T, rt)
    torch.cuda.empty_cache()  # leave the memory to the runs on the same GPU
    return dict(loss=loss, bits_per_byte=bits)


def bits_per_byte(
    model: GPT, enc: tiktoken.Encoding, texts: list[str], B: int, T: int, rt: Runtime
) -> tuple[float, float]:
    """Mean loss of the texts in nats per token, and in bits per byte of UTF-8."""
    tokens, _ = encode_texts(enc, pa.array(texts))
    loss = stream_loss(model, tokens, B, T, rt)
    total_bits = loss * (len(tokens) - 1) / math.log(2)  # the first token is not predicted
    return loss, total_bits / sum(len(text.encode()) for text in texts)


def bits_of_seeds(config: Config, study: StudyFolder, name: str) -> list[float]:
    """Bits per byte of the models with a vocabulary, one per seed."""
    return [study.results[run_name(name, seed)]["bits_per_byte"] for seed in config.seeds]


# ---------------------------------------------------------------------------------------------
# Report


def summarize(
    config: Config,
    study: StudyFolder,
    encodings: dict[str, tiktoken.Encoding],
    terms: dict[str, list[str]],
):
    """Write the report, the terms and the plot."""
    names = list(encodings)
    kinds = [kind for kind in TERM_KINDS if terms[kind]]
    # The first terms of each kind, as every vocabulary splits them
    examples = []
    for kind in kinds:
        for term in terms[kind][:3]:
            examples.append((escape(term), *(show_split(encodings[name], term) for name in names)))
    write_text(study.path / "terms.json", json.dumps(terms, indent=1) + "\n")
    study.report(
        f"{text_size(study):,} bytes of {config.source}; models of {config.n_layer} layers of "
        f"width {config.n_embd}, {config.max_steps} steps of {config.sequences} x "
        f"{config.context_bytes} bytes; bits per byte of the held-out text, mean and standard "
        f"deviation of {len(config.seeds)} seeds",
        vocabularies_table(config, study, names),
        "Tokens per technical term (fraction kept whole):",
        terms_table(study, names, terms, kinds),
        "How terms are split:",
        table(("term", *names), examples),
    )
    draw(config, study, names, kinds)


def vocabularies_table(config: Config, study: StudyFolder, names: list[str]) -> str:
    """A row for each vocabulary: fragmentation, cost and quality."""
    rows = []
    for name in names:
        result = study.results[f"vocabulary {name}"]
        rows.append(
            (
                name,
                f"{result['bytes_per_token']:.2f}",
                f"{result['tokens_per_word']:.3f}",
                f"{result['words_whole']:.1%}",
                f"{result['T']}",
                f"{result['parameters'] / 1e6:.2f}M",
                f"{result['embedding_share']:.1%}",
                f"{result['flops_per_byte'] / 1e6:.3g}",
                f"{study.results['encoding_speed'][name]:.1f}",
                mean_and_deviation(bits_of_seeds(config, study, name), 4),
            )
        )
    # In the order of the cells above
    titles = (
        "vocabulary",
        "bytes per token",
        "tokens per word",
        "words whole",
        f"tokens in {config.context_bytes} bytes",
        "parameters",
        "embeddings",
        "training MFLOP per byte",
        "encoding MB/s",
        "bits per byte",
    )
    return table(titles, rows)


def terms_table(
    study: StudyFolder, names: list[str], terms: dict[str, list[str]], kinds: list[str]
) -> str:
    """A row for each vocabulary: tokens per term of each kind."""
    rows = []
    for name in names:
        result = study.results[f"vocabulary {name}"]
        # Mean tokens per term, and the fraction of the terms that are a single token
        row = [name]
        for kind in kinds:
            tokens, whole = result["tokens_per_term"][kind], result["terms_whole"][kind]
            row.append(f"{tokens:.2f} ({whole:.0%})")
        rows.append(tuple(row))
    return table(("vocabulary", *(f"{kind}, {len(terms[kind])}" for kind in kinds)), rows)


def show_split(enc: tiktoken.Encoding, term: str) -> str:
    """A term as it is split after a blank, with dots between the tokens."""
    # A token may hold part of a character, hence "replace".
    tokens = enc.encode_ordinary(" " + term)
    parts = [enc.decode_single_token_bytes(token).decode("utf-8", "replace") for token in tokens]
    return escape("·".join(part.strip() for part in parts).strip("·"))


def escape(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return text.replace("|", "\\|")


# ---------------------------------------------------------------------------------------------
# Plot


def draw(config: Config, study: StudyFolder, names: list[str], kinds: list[str]):
    """Fragmentation, cost and quality by the size of the vocabulary."""
    # Three panels over the same axis: how text is split, what that costs, what it gains.
    figure = Figure((17, 5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    results = {name: study.results[f"vocabulary {name}"] for name in names}
    draw_fragmentation(left, results, kinds)
    draw_costs(middle, results)
    draw_bits(right, config, study, results)
    # Ticks at the sizes themselves, rather than at powers of ten
    sizes = sorted({result["vocab_size"] for result in results.values()})
    for ax in (left, middle, right):
        ax.set(xscale="log", xlabel="tokens in the vocabulary")
        ax.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30)
        ax.minorticks_off()
    finish_axes(left, middle, right)
    study.save_plot("tradeoff.png", figure)


def plot_by_size(ax: Axes, results: dict[str, dict], values: list[float], **style):
    """A line through one value per vocabulary, with a star for GPT-2's vocabulary."""
    # GPT-2's was learned from another text: it is not part of the line.
    sizes = [result["vocab_size"] for result in results.values()]
    count = len(sizes)
    if "gpt2" in results:  # the last one
        count -= 1
        ax.plot(sizes[-1], values[-1], marker="*", ms=12, color=style["color"], ls="")
    ax.plot(sizes[:count], values[:count], **dict(marker="o") | style)


def draw_fragmentation(ax: Axes, results: dict[str, dict], kinds: list[str]):
    """Tokens per word, and per technical term of each kind."""
    per_word = [result["tokens_per_word"] for result in results.values()]
    plot_by_size(ax, results, per_word, label="words of the text", color="black", marker="s")
    for n, kind in enumerate(kinds):
        per_term = [result["tokens_per_term"][kind] for result in results.values()]
        plot_by_size(ax, results, per_term, label=kind, color=f"C{n}")
    ax.set(title="Fragmentation (stars: GPT-2's own vocabulary)", ylabel="tokens per word or term")


def draw_costs(ax: Axes, results: dict[str, dict]):
    """Embeddings, compute and sequence length, all relative."""
    found = list(results.values())
    # All three as fractions, for a common axis
    embeddings = [result["embedding_share"] for result in found]
    label = "embeddings, fraction of the parameters"
    plot_by_size(ax, results, embeddings, label=label, color="C0")

    highest = max(result["flops_per_byte"] for result in found)
    compute = [result["flops_per_byte"] / highest for result in found]
    label = "training compute per byte, relative to the highest"
    plot_by_size(ax, results, compute, label=label, color="C1")

    lengths = [result["T"] / found[0]["T"] for result in found]
    label = "tokens per sequence, relative to the smallest vocabulary"
    plot_by_size(ax, results, lengths, label=label, color="C2")
    ax.set(title="Cost", ylim=(0, None))


def draw_bits(ax: Axes, config: Config, study: StudyFolder, results: dict[str, dict]):
    """Bits per byte: the mean, and a dash for each seed."""
    # The mean as a line, and the seeds as dashes at the same size
    bits = {name: bits_of_seeds(config, study, name) for name in results}
    means = [np.mean(bits[name]) for name in results]
    plot_by_size(ax, results, means, label=f"mean of {len(config.seeds)} seeds", color="C0")
    for name, result in results.items():
        sizes = [result["vocab_size"]] * len(bits[name])
        ax.plot(sizes, bits[name], "_", color="C0", alpha=0.6)
    ax.set_title("Models trained on the same bytes (dashes: seeds)")
    ax.set_ylabel("bits per byte, held out")


if __name__ == "__main__":
    run_script(main, config)
