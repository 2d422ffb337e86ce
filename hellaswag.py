"""HellaSwag (Zellers et al. 2019): which of four endings goes on from a context? 10,042 examples; chance is 25%.

    python hellaswag.py                                    # log/model_final.pt; downloads the examples
    python hellaswag.py --model gpt2 --save_predictions predictions.jsonl
    torchrun --standalone --nproc_per_node=8 hellaswag.py --model gpt2-xl
    python hellaswag.py --model exported --data hellaswag_val.jsonl --limit 1000

The ending with the highest log-likelihood is the answer. Two renderings are in use, and their figures differ:

    completion  as in build-nanogpt: the context as it is. acc compares sums, acc_norm means over an ending's tokens.
    harness     as in lm-evaluation-harness: the activity before the context, bracketed markers removed.
                acc compares sums, acc_norm sums divided by an ending's length in characters.

A line for each model is added to log/hellaswag_results.jsonl.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken

from common import runtime, tasks
from common.console import UserError, cli
from common.runtime import Runtime
from common.scoring import Request, score
from common.tasks import Metric, accuracy, encode_request
from model import GPT

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
PATH = "datasets/hellaswag/hellaswag_val.jsonl"
PUBLISHED = {  # build-nanogpt's hellaswag.py lists both renderings
    "completion acc": {"gpt2": 0.2859, "gpt2-xl": 0.3842},
    "completion acc_norm": {"gpt2": 0.2955, "gpt2-xl": 0.4893},
    "harness acc": {"gpt2": 0.2892, "gpt2-xl": 0.4004},
    "harness acc_norm": {"gpt2": 0.3114, "gpt2-xl": 0.5089},
}
STYLES = ("completion", "harness")


@dataclass
class Config:
    model: str = "log/model_final.pt"  # a checkpoint, a Hugging Face folder, or gpt2 ... gpt2-xl
    data: str | None = None  # hellaswag_val.jsonl; None = downloaded once to datasets/hellaswag
    limit: int | None = None  # only the first so many examples
    device: str = "auto"  # cuda, mps or cpu; auto takes the first there is
    dtype: runtime.Dtype = (
        "auto"  # of matrix products; auto = bfloat16 where the hardware is fast at it
    )
    save_predictions: str | None = None  # write a line per example to this file
    results: str = "log/hellaswag_results.jsonl"  # a line per evaluated model is added here


def main(config: Config):
    metrics = tasks.run(config, "HellaSwag (chance 25%)", load, evaluate)
    if metrics:
        Path(config.results).parent.mkdir(parents=True, exist_ok=True)
        with open(config.results, "a") as file:
            file.write(json.dumps(dict(model=config.model) | result_line(metrics)) + "\n")


def result_line(metrics: list[Metric]) -> dict:
    """acc, acc_norm, correct, correct_norm, total of the completion style; the harness's with its name before."""
    line = {}
    for metric in metrics:
        style, name = metric.name.split()
        prefix = "harness_" if style == "harness" else ""
        line |= {
            prefix + name: metric.value,
            prefix + name.replace("acc", "correct"): metric.correct,
        }
    return line | dict(total=metrics[0].total)


def load(path: str | None = None, limit: int | None = None) -> list[dict]:
    """The examples: of a file, or of the validation set, downloaded if need be. Raises OSError or ValueError."""
    return tasks.read_jsonl(path or tasks.fetch(URL, PATH, SHA256), parse, limit)


def parse(example: dict) -> dict:
    kept = {
        key: example[key] for key in ("activity_label", "ctx_a", "ctx_b", "ctx", "endings", "label")
    }
    endings, label = example["endings"], example["label"]
    if not (
        isinstance(endings, list)
        and len(endings) == 4
        and all(isinstance(e, str) and e for e in endings)
    ):
        raise UserError("endings must be four texts")
    if label not in (0, 1, 2, 3):
        raise UserError(f"the label is {label!r}, must be 0, 1, 2 or 3")
    return kept | dict(ind=example.get("ind"))


def completion(enc: tiktoken.Encoding, example: dict) -> Request:
    context = enc.encode_ordinary(example["ctx"])
    return Request(
        context or [enc.eot_token],
        [enc.encode_ordinary(" " + ending) for ending in example["endings"]],
    )


def harness(enc: tiktoken.Encoding, example: dict) -> Request:
    context = f"{example['activity_label']}: {example['ctx_a']} {example['ctx_b'].capitalize()}"
    return encode_request(
        enc, clean(context), [" " + clean(ending) for ending in example["endings"]]
    )


def clean(text: str) -> str:
    """What the harness does to WikiHow's markers."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def evaluate(
    model: GPT,
    enc: tiktoken.Encoding,
    examples: list[dict],
    rt: Runtime,
    styles: tuple[str, ...] = STYLES,
) -> tuple[list[Metric], list[dict]]:
    """acc and acc_norm in each style, and a line per example: ind, label, pred, pred_norm and the four sums; those
    of the harness's style with its name before."""
    metrics, lines = [], [dict(ind=example["ind"], label=example["label"]) for example in examples]
    for style in styles:
        requests = [
            dict(completion=completion, harness=harness)[style](enc, example)
            for example in examples
        ]
        scores = score(model, requests, rt, desc=f"HellaSwag, {style}")
        prefix = "harness_" if style == "harness" else ""
        for line, example, request, four in zip(lines, examples, requests, scores):
            sums = np.array([s.logprob for s in four])
            if style == "completion":
                lengths = [len(ending) for ending in request.continuations]
            else:
                lengths = [len(clean(ending)) for ending in example["endings"]]
            preds = dict(
                pred=int(sums.argmax()),
                pred_norm=int((sums / lengths).argmax()),
                sums=sums.tolist(),
            )
            line |= {prefix + key: value for key, value in preds.items()}
        for name, key in (("acc", "pred"), ("acc_norm", "pred_norm")):
            hits = [line[prefix + key] == line["label"] for line in lines]
            metrics.append(accuracy(f"{style} {name}", hits, PUBLISHED[f"{style} {name}"]))
    return metrics, lines


if __name__ == "__main__":
    cli(Config, main, __doc__)
