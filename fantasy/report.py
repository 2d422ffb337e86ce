"""The report of finetune.py: figures, samples and pictures of a model before and after finetuning.

write_report measures both models and writes three files to the run's folder:

    report.md                       the figures in a table, and what they mean
    report.json                     the same figures for programs
    final_gens_after_finetune.txt   texts sampled from the finetuned model

If the model was trained on <LOC> ... </LOC> blocks, samples start with <LOC>, and one of the
figures is how many are well-formed blocks. Otherwise they start from the end-of-text token alone.
"""

import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tiktoken

from common.checkpoint import load_model, not_finite_error
from common.console import Progress, UserError, say, table, write_atomically, write_text
from common.finetune_data import CLOSE, OPEN, is_tagged
from common.runlog import finite_or_none
from common.runtime import Runtime, mixed_seed
from common.scoring import bits_per_byte, stream_loss
from common.shards import open_shards, shards_tokenizer
from common.tokenizer import tokenizer_to_text
from model import GPT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SAMPLES = "final_gens_after_finetune.txt"
LONG_RUN = 12  # words; a copied run above this length is more than a common phrase
DELIMITED = "delimited, share of samples"  # only if the training texts are blocks

# The figures in the order of the report: name, format, meaning.
FIGURES = (
    (
        "held-out perplexity",
        ".2f",
        "exp of the mean loss per token on texts that were not trained on. Lower is better.",
    ),
    (
        "held-out bits per byte",
        ".4f",
        "the same loss in bits, divided by the texts' bytes. It also compares models of different "
        "vocabularies.",
    ),
    (
        DELIMITED,
        ".1%",
        f"samples with one `{OPEN}`, at the start, and one `{CLOSE}`.",
    ),
    (
        "distinct-1",
        ".3f",
        "different words divided by all words, over all samples (Li et al. 2016). "
        "Low values mean little variety.",
    ),
    ("distinct-2", ".3f", "the same for pairs of consecutive words."),
    (
        "repeated 4-grams, share",
        ".1%",
        "sequences of four words that occurred earlier in the same sample, mean over the samples.",
    ),
    (
        "copied run, mean words",
        ".2f",
        "length of the longest sequence of words that also occurs in the training data, "
        "mean over the samples.",
    ),
    ("copied run, most words", "d", "the longest such sequence in any sample."),
    (
        f"copied run > {LONG_RUN} words, share of samples",
        ".1%",
        f"samples with such a sequence of more than {LONG_RUN} words.",
    ),
    (
        "general perplexity",
        ".2f",
        "exp of the mean loss per token on the validation shard of general text. "
        "If it rises, the model has forgotten some of what it had learned in pretraining.",
    ),
    ("general bits per byte", ".4f", "the same loss in bits, divided by the text's bytes."),
)


def write_report(
    config,
    finetuned: Path,
    training: list[str],
    val_tokens: np.ndarray,
    enc: tiktoken.Encoding,
    rt: Runtime,
):
    """Measure the model before and after finetuning, and write the report's files to out_dir.

    config is finetune.Config, finetuned a checkpoint, training the texts trained on, and
    val_tokens the held-out ones as one stream of token ids.
    """
    out_dir = Path(config.out_dir)
    general_tokens = read_general_text(config.general_data, config.general_tokens, enc)

    data = (training, val_tokens, general_tokens)
    # Both models are measured on the same texts, with the same seeds.
    base, _ = measure_model(config, config.init_from, *data, rt)
    after, samples = measure_model(config, finetuned, *data, rt)
    write_text(out_dir / SAMPLES, "".join(f"{sample}\n{'-' * 80}\n" for sample in samples))

    # The table of figures, for the screen and for report.md, and what each figure means
    rows = []
    meanings = []
    for name, spec, meaning in FIGURES:
        if name in base:
            rows.append((name, show(base[name], spec), show(after[name], spec)))
            meanings.append(f"- **{name}**: {meaning}\n")
    figures = table(("", "before finetuning", "after finetuning"), rows)

    # report.md adds what was compared.
    start = f"`{OPEN}`" if is_tagged(training) else "the end-of-text token"
    write_text(
        out_dir / "report.md",
        f"# Before and after finetuning\n\n"
        f"`{config.init_from}` was finetuned on {len(training)} texts from "
        f"`{config.data}`; the result is `{finetuned}`. Both models wrote {config.num_samples} "
        f"samples that start with {start}.\n\n{figures}\n\n{''.join(meanings)}\n"
        f"The samples of the finetuned model are in `{out_dir / SAMPLES}`.\n",
    )
    # The figures for programs: a perplexity can be infinite, and JSON has no infinity.
    both = dict(base=finite_or_none(base), finetuned=finite_or_none(after))
    write_text(out_dir / "report.json", json.dumps(both, indent=1) + "\n")
    say(f"{figures}\n{out_dir}/report.md, {out_dir}/{SAMPLES}")


def measure_model(
    config,
    name: str | Path,
    training: list[str],
    val_tokens: np.ndarray,
    general_tokens: np.ndarray | None,
    rt: Runtime,
) -> tuple[dict[str, float | None], list[str]]:
    """Return a model's figures by name (None if not available), and its samples.

    Raises UserError if the model computes values that are not finite.
    """
    model, enc = load_model(name)
    model.to(rt.device).eval()

    # A training text begins with the tag, or behind the end-of-text token.
    prompt = enc.encode_ordinary(OPEN) if is_tagged(training) else [enc.eot_token]
    samples = draw_samples(model, enc, prompt, config.num_samples, config.seed, rt)

    # In windows of T tokens, as during finetuning, so that the loss is that of the log.
    held_out_loss = stream_loss(model, val_tokens, config.B, config.T, rt)
    figures: dict[str, float | None] = {
        "held-out perplexity": perplexity(held_out_loss),
        "held-out bits per byte": bits_per_byte(held_out_loss, val_tokens, enc),
    }
    figures |= measure_samples(samples, training)

    # In windows of the whole context, as in pretraining.
    figures["general perplexity"] = None
    figures["general bits per byte"] = None
    # General text is only measured if there are shards made with the model's tokenizer.
    if general_tokens is not None:
        general_loss = stream_loss(model, general_tokens, config.B, model.config.block_size, rt)
        figures["general perplexity"] = perplexity(general_loss)
        figures["general bits per byte"] = bits_per_byte(general_loss, general_tokens, enc)
    return figures, samples


def perplexity(loss: float) -> float:
    """exp of a loss in nats per token; infinite where that is too large to mean anything."""
    # exp(99) is about 10^43. From about 710 on, math.exp raises an OverflowError.
    return math.exp(loss) if loss < 99 else math.inf


def show(value: float | None, spec: str) -> str:
    """A figure for the table."""
    return "not available" if value is None else format(value, spec)


def draw_samples(
    model: GPT, enc: tiktoken.Encoding, prompt: list[int], count: int, seed: int, rt: Runtime
) -> list[str]:
    """Samples that start with the prompt, of up to 300 tokens or until the model ends its text.

    An end-of-text token in the prompt is not part of the samples.
    """
    start = enc.decode([token for token in prompt if token != enc.eot_token])
    # A sample that fits into the context is drawn without reading a token twice.

    max_tokens = min(300, model.config.block_size - len(prompt))
    # Slightly sharper than the model's own distribution: less noise, still varied.
    options: dict[str, Any] = dict(stop_token=enc.eot_token, temperature=0.9, top_k=50)
    samples = []
    with Progress(total=count, desc="sampling", unit="sample", leave=False) as bar, rt.autocast():
        while len(samples) < count:
            # In batches, to bound the memory of the KV cache; each batch has a different seed.
            batch = [prompt] * min(16, count - len(samples))
            batch_seed = mixed_seed(seed, len(samples))
            try:
                outputs = model.generate(batch, max_tokens, seed=batch_seed, **options)
            except FloatingPointError as error:
                raise not_finite_error(model) from error
            samples += [start + enc.decode(output) for output in outputs]
            bar.update(len(batch))
    return samples


def read_general_text(folder: str, count: int, enc: tiktoken.Encoding) -> np.ndarray | None:
    """The first `count` predicted tokens of the validation shards, (count + 1,).

    None, with a message, if there are no shards or they were made with another tokenizer.
    """
    try:
        tokens = open_shards(folder, "val").read_first(count + 1)
        shards_enc = shards_tokenizer(folder)
    except (OSError, UserError) as error:
        say(f"no general perplexity: {error}")
        return None
    # Ids of another tokenizer would stand for other text.
    if tokenizer_to_text(shards_enc) != tokenizer_to_text(enc):
        say(f"no general perplexity: {folder} was made with another tokenizer")
        return None
    return tokens


# ---------------------------------------------------------------------------------------------
# Figures of the samples


def measure_samples(samples: list[str], training: list[str]) -> dict[str, float]:
    """The figures that need no model: variety, repetition, copying, and delimiters if any."""
    texts = [split_words(sample) for sample in samples]
    # Built once: each sample is then compared with all training texts in one pass.
    index = WordIndex([split_words(text) for text in training])
    copied = [index.longest_copied_run(text) for text in texts]
    # The first figure only makes sense for blocks.
    figures = {}
    if is_tagged(training):
        figures[DELIMITED] = mean([is_delimited(sample) for sample in samples])
    return figures | {
        "distinct-1": distinct(texts, 1),
        "distinct-2": distinct(texts, 2),
        "repeated 4-grams, share": mean([repeated(text, 4) for text in texts]),
        "copied run, mean words": mean(copied),
        "copied run, most words": max(copied),
        f"copied run > {LONG_RUN} words, share of samples": mean([n > LONG_RUN for n in copied]),
    }


def mean(values: list) -> float:
    """The mean as a Python float, which JSON can hold."""
    return float(np.mean(values))


def is_delimited(sample: str) -> bool:
    """Whether a sample has one opening tag, at its start, and one closing tag."""
    return sample.startswith(OPEN) and sample.count(OPEN) == 1 and sample.count(CLOSE) == 1


def split_words(text: str) -> list[str]:
    """Words in lower case, without delimiters and punctuation."""
    return re.findall(r"[\w'’]+", text.replace(OPEN, " ").replace(CLOSE, " ").lower())


def ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    """All sequences of n consecutive words."""
    # For n = 2: zip(["a", "b", "c"], ["b", "c"]) gives ("a", "b") and ("b", "c").
    return list(zip(*(words[i:] for i in range(n))))


def distinct(texts: list[list[str]], n: int) -> float:
    """Different n-grams divided by all n-grams, over all texts."""
    grams = [gram for words in texts for gram in ngrams(words, n)]
    # An untrained model may write no word at all.
    return len(set(grams)) / max(1, len(grams))


def repeated(words: list[str], n: int) -> float:
    """Fraction of the n-grams of a text that occurred earlier in it."""
    grams = ngrams(words, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


class WordIndex:
    """Where each word occurs in the training texts, to find what a sample copied from them.

    The texts lie end to end, with a free position before each, so that no run spans two of them:

        position    0    1    2     3    4    5    6
        training    -   the  old  tower  -    an  old      old -> 2, 6
    """

    def __init__(self, texts: list[list[str]]):
        # Position 0 stays free, and so does one between two texts.
        occurrences = defaultdict(list)
        start = 1
        for words in texts:
            for position, word in enumerate(words, start):
                occurrences[word].append(position)
            start += len(words) + 1
        self.positions = {word: np.array(places) for word, places in occurrences.items()}
        self.size = start

    def longest_copied_run(self, words: list[str]) -> int:
        """Length of the longest sequence of words that also occurs in a training text.

        At each word, run_length[p] is the length of the longest sequence that ends at this word
        and also ends at position p of the training texts. It is one more than the value at p - 1
        for the word before, and 0 wherever the word does not occur.
        """

        run_length = np.zeros(self.size, dtype=np.int64)
        nowhere = np.array([], dtype=np.int64)
        previous = nowhere
        longest = 0
        for word in words:
            ends = self.positions.get(word, nowhere)
            # A copy: the old values are read before any of them is overwritten.
            extended = run_length[ends - 1] + 1
            # Only the positions of the previous word can differ from 0: clearing these is enough.
            run_length[previous] = 0
            run_length[ends] = extended
            longest = max(longest, extended.max(initial=0))
            previous = ends
        return int(longest)


# ---------------------------------------------------------------------------------------------
# Pictures


def draw_search(path: Path, results: list[dict], base_val_loss: float):
    """Validation loss by learning rate, next to the loss before finetuning."""
    figure, ax = start_figure("Learning-rate search")
    # An infinite loss has no place on the axis.
    finite = [result for result in results if math.isfinite(result["val_loss"])]
    rates = [result["lr"] for result in finite]
    losses = [result["val_loss"] for result in finite]
    ax.plot(rates, losses, "o-", label="after training at this rate")
    before = f"before finetuning: {base_val_loss:.3f}"
    ax.axhline(base_val_loss, color="grey", ls="--", label=before)
    # A diverged rate may have no finite loss to draw, so it is marked on the axis.
    for result in results:
        if result["status"] == "diverged":
            ax.axvline(result["lr"], color="tab:red", ls=":", label=f"diverged at {result['lr']:g}")
    ax.set(xscale="log", xlabel="learning rate", ylabel="validation loss (nats per token)")
    save_figure(path, figure, ax)


def draw_losses(path: Path, history: list[dict], base_val_loss: float):
    """Training and validation loss by epoch; epoch 0 is before finetuning."""
    figure, ax = start_figure("Loss before and during finetuning")
    # The validation curve begins one epoch earlier than the training curve.
    epochs = [record["epoch"] for record in history]
    val_losses = [record["val_loss"] for record in history]
    # The training loss is a mean over the epoch, the validation loss is measured at its end.
    # Hence the first may lie above the second.
    ax.plot(epochs, [record["train_loss"] for record in history], "o-", label="training")
    ax.plot([0, *epochs], [base_val_loss, *val_losses], "o-", label="validation")

    # The epoch whose model is model_best.pt
    lowest = min(val_losses)
    best_epoch = epochs[val_losses.index(lowest)]
    label = f"lowest: {lowest:.4f} after epoch {best_epoch}"
    ax.axvline(best_epoch, color="grey", ls=":", label=label)
    ax.set(xlabel="epoch", ylabel="loss (nats per token)")
    save_figure(path, figure, ax)


def start_figure(title: str) -> "tuple[Figure, Axes]":
    """An empty picture with a title."""
    from matplotlib.figure import Figure  # imported here: drawing comes last, and it is slow

    figure = Figure((7, 5), layout="constrained")
    ax = figure.subplots()
    ax.set_title(title)
    return figure, ax


def save_figure(path: Path, figure: "Figure", ax: "Axes"):
    """Add grid and legend, and write the picture as PNG."""
    ax.grid(alpha=0.3)
    ax.legend()
    with write_atomically(path) as file:
        figure.savefig(file, format="png", dpi=150)
