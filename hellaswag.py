"""HellaSwag (Zellers et al. 2019): which of four endings best continues a context?

    python hellaswag.py                                    # log/model_final.pt
    python hellaswag.py --model gpt2 --save_predictions predictions.jsonl
    torchrun --standalone --nproc_per_node=8 hellaswag.py --model gpt2-xl
    python hellaswag.py --model exported --data hellaswag_val.jsonl --limit 1000

The validation set has 10,042 examples, and is downloaded once. Guessing is right in 25% of them.
The model's answer is the ending with the highest log-likelihood. Two renderings are in use, and
their figures differ:

    completion  as in build-nanogpt: the context as it is.
                acc compares sums of log-probabilities, acc_norm their means per token.
    harness     as in lm-evaluation-harness: the activity precedes the context, and markers in
                brackets are removed.
                acc compares sums, acc_norm sums divided by the ending's length in characters.

A line for each evaluated model is added to log/hellaswag_results.jsonl.
"""

import json
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import common.before_torch

from common.console import Dtype, UserError, checksum, parse_flags, run_script


@dataclass
class Config:
    model: str = "log/model_final.pt"  # a checkpoint, a Hugging Face folder, or gpt2 ... gpt2-xl
    data: str | None = None  # hellaswag_val.jsonl; None = downloaded once to datasets/hellaswag
    limit: int | None = None  # evaluate only the first examples, this many
    device: str = "auto"  # cuda, mps or cpu; auto = the first available of these
    # dtype of matrix products; auto = the fastest of bfloat16, float16 and float32 on this hardware
    dtype: Dtype = "auto"
    save_predictions: str | None = None  # file for predictions, one line per example
    results: str = "log/hellaswag_results.jsonl"  # file to which a line of results is added


if __name__ == "__main__":
    config = parse_flags(Config, __doc__)  # before the slow imports: --help answers at once

import numpy as np
import tiktoken

from common import tasks
from common.published import REFERENCES
from common.runtime import Runtime
from common.scoring import Request, score
from common.tasks import Benchmark, Metric, accuracy, encode_request
from model import GPT

# The validation set from the authors' repository. The checksum detects a damaged download.
URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
PATH = "datasets/hellaswag/hellaswag_val.jsonl"


def main(config: Config):
    metrics = tasks.run(config, BENCHMARK)
    # Add a line, so that the file collects the results of all models.
    if metrics:  # only on rank 0
        line = dict(model=config.model) | result_line(metrics)
        Path(config.results).parent.mkdir(parents=True, exist_ok=True)
        with open(config.results, "a") as file:
            file.write(json.dumps(line) + "\n")


# ---------------------------------------------------------------------------------------------
# Data


def load(path: str | None = None, limit: int | None = None) -> list[dict]:
    """The examples of a file, or of the validation set, which is downloaded if necessary.

    Raises OSError or UserError.
    """
    return tasks.read_jsonl(path or tasks.fetch(URL, PATH, SHA256), parse, limit)


def data_fingerprint(path: str | None) -> str:
    return SHA256 if path is None else checksum(path)


def parse(example: dict) -> dict:
    """The fields that are used, checked. Raises UserError.

    Some copies of the data, among them the one on the Hugging Face hub, have labels like "3".
    """
    # A missing field raises KeyError, which read_jsonl reports with the line.
    fields = ("activity_label", "ctx_a", "ctx_b", "ctx", "endings", "label")
    kept = {field: example[field] for field in fields}

    # The endings must be four texts, and one of them is right.
    endings = example["endings"]
    if not isinstance(endings, list) or len(endings) != 4:
        raise UserError("endings must be four texts")
    if not all(isinstance(ending, str) and ending for ending in endings):
        raise UserError("endings must be four texts")
    if str(example["label"]) not in ("0", "1", "2", "3"):
        raise UserError(f"the label is {example['label']!r}, must be 0, 1, 2 or 3")
    kept["label"] = int(example["label"])
    # `ind` numbers the examples of the original. It appears in predictions only.
    return kept | dict(ind=example.get("ind"))


# ---------------------------------------------------------------------------------------------
# Renderings: the request of an example, and the lengths by which acc_norm divides


@dataclass
class Rendering:
    request: Request
    # of the four endings in characters; None = the number of their tokens that are scored
    lengths: list[int] | None


def completion(enc: tiktoken.Encoding, example: dict) -> Rendering:
    """build-nanogpt's way: the ending is tokenized by itself, its length is counted in tokens."""
    context = enc.encode_ordinary(example["ctx"])
    endings = [enc.encode_ordinary(" " + ending) for ending in example["endings"]]
    return Rendering(Request(context or [enc.eot_token], endings), lengths=None)


def harness(enc: tiktoken.Encoding, example: dict) -> Rendering:
    """lm-evaluation-harness's way: the whole text is tokenized, lengths are in characters."""
    # ctx_b is the beginning of the sentence that the endings continue; it is often empty.
    context = f"{example['activity_label']}: {example['ctx_a']} {example['ctx_b'].capitalize()}"
    endings = [clean(ending) for ending in example["endings"]]
    request = encode_request(enc, clean(context), [" " + ending for ending in endings])
    return Rendering(request, list(map(len, endings)))


def clean(text: str) -> str:
    """Remove the markers of WikiHow's texts, as lm-evaluation-harness does."""
    # A new heading, "[title]", ends the sentence before it. Other markers, such as "[step]", are
    # removed, which may leave two blanks.
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


# A new rendering is added here. Its metrics are named after it.
RENDERINGS = {"completion": completion, "harness": harness}


# ---------------------------------------------------------------------------------------------
# Metrics


def evaluate(
    model: GPT,
    enc: tiktoken.Encoding,
    examples: list[dict],
    rt: Runtime,
    styles: tuple[str, ...] = tuple(RENDERINGS),
) -> tuple[list[Metric], list[dict]]:
    """acc and acc_norm in each rendering; for each example ind, label, pred, pred_norm and sums.

    `sums` are the log-likelihoods of the four endings. The fields of the harness rendering have the
    prefix "harness_".
    """
    metrics = []
    # Each rendering adds its fields to the lines, and two metrics.
    lines = [dict(ind=example["ind"], label=example["label"]) for example in examples]
    for style in styles:
        # Score the endings of all examples in this rendering.
        renderings = [RENDERINGS[style](enc, example) for example in examples]
        requests = [rendering.request for rendering in renderings]
        scores = score(model, requests, rt, desc=f"HellaSwag, {style}")

        # The model's answers: by the sums, and by the sums divided by the lengths.
        prefix = key_prefix(style)
        for line, rendering, ending_scores in zip(lines, renderings, scores):
            sums = np.array([s.logprob for s in ending_scores])  # (4,)
            lengths = rendering.lengths or [s.num_tokens for s in ending_scores]
            line[prefix + "pred"] = int(sums.argmax())
            line[prefix + "pred_norm"] = int((sums / lengths).argmax())
            line[prefix + "sums"] = sums.tolist()

        # An example is right if the answer is the ending that its label names.
        for name, key in (("acc", "pred"), ("acc_norm", "pred_norm")):
            hits = [line[prefix + key] == line["label"] for line in lines]
            metrics.append(accuracy(f"{style} {name}", hits))
    return metrics, lines


def result_line(metrics: list[Metric]) -> dict:
    """acc, correct, acc_norm, correct_norm and total, for a line of hellaswag_results.jsonl.

    The fields of the harness rendering have the prefix "harness_".
    """
    line: dict[str, float | None] = {}
    for metric in metrics:
        # "harness acc_norm" becomes harness_acc_norm and harness_correct_norm.
        style, name = metric.name.split()
        prefix = key_prefix(style)
        line[prefix + name] = metric.value
        line[prefix + name.replace("acc", "correct")] = metric.correct
    return line | dict(total=metrics[0].total)


def key_prefix(style: str) -> str:
    return "" if style == "completion" else f"{style}_"


BENCHMARK = Benchmark(
    name="hellaswag",
    reference=REFERENCES["hellaswag"],
    load=load,
    evaluate=evaluate,
    # Training logs only a metric of this rendering, and the other one would double the time.
    evaluate_headline=partial(evaluate, styles=("completion",)),
    data_fingerprint=data_fingerprint,
    result_line=result_line,
)


if __name__ == "__main__":
    run_script(main, config)
