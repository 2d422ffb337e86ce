"""What finetuning brought: base and finetuned model side by side, in numbers and pictures.

held-out perplexity   exp of the mean loss on the descriptions that were held out
delimited             share of samples that open once and close once
distinct-1, -2        different words, and pairs of words, per word and pair of all samples (Li et al. 2016)
repeated 4-grams      share of a sample's sequences of four words that it has had before, mean
copied run            the longest run of words that stands like that in the training data: mean, longest, and the
                      share of samples with one of more than 12 words
general perplexity    exp of the mean loss on the validation shard of general text
"""

import json
import math
import re
from pathlib import Path

import numpy as np
import tiktoken
from matplotlib.figure import Figure

from common.checkpoint import load_model
from common.console import Progress, UserError, say, table, write_atomically, write_text
from common.runtime import Runtime
from common.scoring import stream_loss
from common.shards import open_shards, shards_tokenizer
from common.tokenizer import tokenizer_to_text
from fantasy.descriptions import CLOSE, OPEN
from model import GPT

LONG_RUN = 12  # words in a row
SAMPLES = "final_gens_after_finetune.txt"


def report(config, finetuned: Path, training: list[str], val_tokens: np.ndarray, rt: Runtime):
    """Compare finetune.py's base and finetuned model; write report.md, report.json and the finetuned one's samples."""
    out_dir, columns = Path(config.out_dir), {}
    for column, name in (("base", config.init_from), ("finetuned", finetuned)):
        model, enc = load_model(name)
        model.to(rt.device).eval()
        samples = draw(model, enc, config.num_samples, config.seed, rt, f"samples, {column}")
        if column == "finetuned":
            write_text(out_dir / SAMPLES, "".join(f"{sample}\n{'-' * 80}\n" for sample in samples))
        loss = stream_loss(model, val_tokens, config.B, config.T, rt)
        columns[column] = {"held-out perplexity": math.exp(min(99, loss))} | measure(
            samples, training
        )
        general = general_tokens(config.general_data, config.general_tokens, enc)
        loss = (
            None
            if general is None
            else stream_loss(model, general, config.B, model.config.block_size, rt)
        )
        columns[column]["general perplexity"] = None if loss is None else math.exp(min(99, loss))
    rows = [
        (name, *(shown(name, columns[column][name]) for column in columns))
        for name in columns["base"]
    ]
    text = table(("", *columns), rows)
    write_text(out_dir / "report.md", text + "\n")
    write_text(out_dir / "report.json", json.dumps(columns, indent=1) + "\n")
    say(f"{text}\n{out_dir}/report.md, {out_dir}/{SAMPLES}")


def shown(name: str, value: float | None) -> str:
    if value is None:
        return "not available"
    return (
        f"{value:.1%}"
        if "share" in name
        else f"{value:.3f}"
        if "distinct" in name
        else f"{value:.2f}"
    )


def draw(
    model: GPT, enc: tiktoken.Encoding, count: int, seed: int, rt: Runtime, desc: str
) -> list[str]:
    """Samples of up to 300 tokens, each ending where the model ends its text."""
    prompt = enc.encode_ordinary(OPEN)
    max_tokens = min(300, model.config.block_size - len(prompt))
    options = dict(stop_token=enc.eot_token, temperature=0.9, top_k=50)
    samples = []
    with Progress(total=count, desc=desc, unit="sample", leave=False) as bar, rt.autocast():
        while len(samples) < count:
            batch = [prompt] * min(16, count - len(samples))
            outputs = model.generate(batch, max_tokens, seed=seed + len(samples), **options)
            samples += [OPEN + enc.decode(output) for output in outputs]
            bar.update(len(batch))
    return samples


def general_tokens(folder: str, count: int, enc: tiktoken.Encoding) -> np.ndarray | None:
    """Tokens of general text; None if there are no shards, or shards of another tokenizer."""
    try:
        shards, own = open_shards(folder, "val"), shards_tokenizer(folder)
    except (OSError, UserError) as error:
        say(f"no general perplexity: {error}")
        return None
    if tokenizer_to_text(own) != tokenizer_to_text(enc):
        say(f"no general perplexity: {folder} was made with another tokenizer")
        return None
    return shards.read(0, 0, min(count + 1, shards.lengths[0]))


def measure(samples: list[str], training: list[str]) -> dict[str, float]:
    """The figures that samples give by themselves and beside the training data."""
    delimited = [s.startswith(OPEN) and s.count(OPEN) == s.count(CLOSE) == 1 for s in samples]
    texts = [words(sample) for sample in samples]
    known = " ".join(["", *(" ".join(words(text)) + " |" for text in training), ""])
    copied = [longest_copied_run(text, known) for text in texts]
    return {
        "delimited, share of samples": float(np.mean(delimited)),
        "distinct-1": distinct(texts, 1),
        "distinct-2": distinct(texts, 2),
        "repeated 4-grams, share": float(np.mean([repeated(text, 4) for text in texts])),
        "copied run, mean words": float(np.mean(copied)),
        "copied run, most words": max(copied),
        f"copied run > {LONG_RUN} words, share of samples": float(
            np.mean([n > LONG_RUN for n in copied])
        ),
    }


def words(text: str) -> list[str]:
    return re.findall(r"[\w'’]+", text.replace(OPEN, " ").replace(CLOSE, " ").lower())


def ngrams(text: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(text[i:] for i in range(n))))


def distinct(texts: list[list[str]], n: int) -> float:
    grams = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(grams)) / max(1, len(grams))


def repeated(text: list[str], n: int) -> float:
    grams = ngrams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def longest_copied_run(text: list[str], known: str) -> int:
    """Words of the longest run of `text` within `known`, whose words have a blank on either side."""
    longest = 0
    for start in range(len(text)):
        while (
            start + longest < len(text)
            and f" {' '.join(text[start : start + longest + 1])} " in known
        ):
            longest += 1
    return longest


def draw_search(path: Path, results: list[dict], base_val_loss: float):
    figure = Figure((7, 5), layout="constrained")
    ax = figure.subplots()
    good = [r for r in results if math.isfinite(r["val_loss"])]
    ax.plot([r["lr"] for r in good], [r["val_loss"] for r in good], "o-", label="validation loss")
    ax.axhline(
        base_val_loss, color="grey", ls="--", label=f"before finetuning: {base_val_loss:.3f}"
    )
    for result in results:
        if result["status"] == "diverged":
            ax.axvline(result["lr"], color="tab:red", ls=":", label=f"diverged at {result['lr']:g}")
    ax.set(
        xscale="log", xlabel="learning rate", ylabel="nats per token", title="Learning-rate search"
    )
    finish(path, figure, ax)


def draw_losses(path: Path, history: list[dict], base_val_loss: float):
    figure = Figure((7, 5), layout="constrained")
    ax = figure.subplots()
    epochs = [epoch["epoch"] for epoch in history]
    ax.plot(epochs, [epoch["train_loss"] for epoch in history], "o-", label="training")
    ax.plot(
        [0, *epochs],
        [base_val_loss, *(epoch["val_loss"] for epoch in history)],
        "o-",
        label="validation",
    )
    best = min(history, key=lambda epoch: epoch["val_loss"])
    ax.axvline(
        best["epoch"],
        color="grey",
        ls=":",
        label=f"best: {best['val_loss']:.4f} after epoch {best['epoch']}",
    )
    ax.set(xlabel="epoch", ylabel="nats per token", title="Finetuning")
    finish(path, figure, ax)


def finish(path: Path, figure: Figure, ax):
    ax.grid(alpha=0.3)
    ax.legend()
    with write_atomically(path) as file:
        figure.savefig(file, format="png", dpi=150)
