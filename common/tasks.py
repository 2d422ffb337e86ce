"""Code shared by the benchmarks: the record that describes each, metrics, data, requests."""

import ast
import hashlib
import inspect
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiktoken

from common import runtime, scoring
from common.checkpoint import load_model
from common.console import (
    Progress,
    UserError,
    check_at_least,
    check_output,
    read_lines,
    say,
    table,
    write_text,
)
from common.published import Reference
from common.runtime import Runtime
from common.scoring import Request
from model import GPT, OPENAI_MODELS

# Parts of a syntax tree that may begin with a docstring
HAVE_DOCSTRINGS = (ast.Module, ast.ClassDef, ast.FunctionDef)


@dataclass
class Metric:
    """One figure that a benchmark computes."""

    name: str
    value: float  # a fraction of 1 if it is an accuracy
    correct: int | None = None  # for accuracies: right answers
    total: int | None = None  # for accuracies: examples
    stderr: float | None = None  # standard error of the value, if it is known

    def __str__(self):
        text = self.format(self.value)
        if self.stderr is not None:
            text += f" ± {self.format(self.stderr)}"
        if self.total is None:
            return text
        return f"{text} ({self.correct}/{self.total})"

    def format(self, value: float | None) -> str:
        """A value of this metric, ours or a published one, as it appears in tables."""
        if value is None:
            return ""
        if self.total is not None:
            return f"{value:.2%}"
        # Losses need their decimals; large perplexities don't.
        return f"{value:.4f}" if value < 10 else f"{value:.2f}"


def accuracy(name: str, hits: list[bool]) -> Metric:
    share = sum(hits) / len(hits)
    # The standard error of a mean, from the sample's variance, as in lm-evaluation-harness. One
    # example has none.
    stderr = math.sqrt(share * (1 - share) / (len(hits) - 1)) if len(hits) > 1 else None
    return Metric(name, share, sum(hits), len(hits), stderr)


def result_line(metrics: list[Metric]) -> dict:
    """Metrics as a flat dict, for a line of JSON."""
    return {metric.name: metric.value for metric in metrics}


# evaluate(model, enc, examples, rt) -> the metrics, and one dict per example for predictions files
Evaluate = Callable[[GPT, tiktoken.Encoding, Any, Runtime], tuple[list[Metric], list[dict]]]


@dataclass(frozen=True)
class Benchmark:
    """All that evaluate.py and training need to know of a benchmark.

    Each benchmark's file defines one, called BENCHMARK. evaluate.py lists all of them, and
    train_gpt2.py those that can be evaluated during training.
    """

    name: str  # in flags and file names: hellaswag
    reference: Reference  # title, headline metric and published figures
    # load(data, limit): the examples of a file, the first `limit` of them; of the default data if
    # `data` is None. Raises OSError or UserError. A function of the benchmark's own file, because
    # code_fingerprint finds the file by it.
    load: Callable[..., Any]
    evaluate: Evaluate
    # data_fingerprint(data): what distinguishes the data from other data, for example a checksum
    data_fingerprint: Callable[..., str]
    evaluate_headline: Evaluate  # for training: computes only what the headline metric needs
    # result_line(metrics): what NAME_results.jsonl holds of one evaluation
    result_line: Callable[[list[Metric]], dict] = result_line

    def headline(self, metrics: list[Metric]) -> Metric:
        """The metric that training logs."""
        return next(metric for metric in metrics if metric.name == self.reference.headline)

    def code_fingerprint(self) -> str:
        """Changes whenever the code that renders the examples and computes the metrics changes.

        It covers the benchmark's file and the shared code, without comments, docstrings and layout.
        """
        digest = hashlib.sha256()
        for source in (sys.modules[self.load.__module__], sys.modules[__name__], scoring):
            # The syntax tree has no comments and no line numbers, but docstrings.
            tree = ast.parse(inspect.getsource(source))
            for node in ast.walk(tree):
                if isinstance(node, HAVE_DOCSTRINGS) and ast.get_docstring(node) is not None:
                    del node.body[0]
            digest.update(ast.dump(tree).encode())
        return digest.hexdigest()


# ---------------------------------------------------------------------------------------------
# The main function of a benchmark


def run(config, benchmark: Benchmark) -> list[Metric] | None:
    """Evaluate config.model and print a table of the metrics. Returns them on rank 0, else None.

    `config` is the Config of the benchmark's file: model, data, limit, device, dtype and
    save_predictions.
    """

    # Read the data before the model: a wrong file is then reported at once.
    check_at_least(config, 1, "limit")
    check_output(config.save_predictions)
    rt = runtime.start(config.device, config.dtype)
    examples = load_on_all_ranks(lambda: benchmark.load(config.data, config.limit), rt)
    model, enc = load_model(config.model)
    metrics, predictions = benchmark.evaluate(model.to(rt.device), enc, examples, rt)

    # All ranks have the same metrics, and the first one reports them.
    if rt.is_main:
        say(results_table(config.model, model, metrics, benchmark.reference, rt))
        if config.save_predictions:
            save_predictions(config.save_predictions, predictions)
    runtime.leave()
    return metrics if rt.is_main else None


def save_predictions(path: str, predictions: list[dict]):
    write_text(path, "".join(json.dumps(prediction) + "\n" for prediction in predictions))
    say(f"predictions: {path}")


def results_table(
    name: str, model: GPT, metrics: list[Metric], reference: Reference, rt: Runtime
) -> str:
    """A row per metric: the model's figure, and the one published for OpenAI's closest model."""
    # The first column's head names the benchmark, the others whose figures they hold.
    title = reference.title
    if reference.chance is not None:
        title += f" (chance {reference.chance:.0%})"

    # Where nobody published a figure, the cell stays empty.
    closest = closest_openai_model(name, model)
    rows = []
    for metric in metrics:
        published = metric.format(reference.published(metric.name, closest))
        rows.append((metric.name, str(metric), published))
    return table((f"{title}, {rt.dtype_name}", name, f"{closest}, published"), rows)


def closest_openai_model(name: str, model: GPT) -> str:
    """The OpenAI model whose published figures stand beside those of `model`.

    The model itself, or the one of the same shape, or else gpt2.
    """
    # A model by OpenAI's name
    if name in OPENAI_MODELS:
        return name

    # A model of the same shape as one of OpenAI's
    config = model.config
    shape = dict(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd)
    for openai_name, openai_shape in OPENAI_MODELS.items():
        if openai_shape == shape:
            return openai_name
    return "gpt2"


# ---------------------------------------------------------------------------------------------
# Data


def load_on_all_ranks(load: Callable[[], Any], rt: Runtime):
    """Return load(), which may download a file: one rank per machine calls it before the others.

    If it raises OSError or UserError on any rank, all ranks raise.
    """
    examples = None
    error = None
    # Two rounds with a barrier after each: local rank 0 first, which downloads, then the others,
    # which find the file.
    for is_my_turn in (rt.local_rank == 0, rt.local_rank != 0):
        if is_my_turn:
            try:
                examples = load()
            except (OSError, UserError) as failure:
                error = failure
        rt.barrier()
    # A rank that succeeded must raise as well, or it would wait for the others forever.
    if rt.sum([error is not None]):
        raise error or OSError("another process could not read the examples")
    return examples


def fetch(url: str, path: str | Path, sha256: str) -> Path:
    """Download a file unless it exists. Nothing is left behind if it is cut off or its checksum is
    wrong. Raises OSError.
    """
    import pooch  # imported here: not needed if the data exists

    # pooch checks the checksum, and moves the file to its name only if it is right.
    path = Path(path)
    pooch.get_logger().setLevel("ERROR")
    # pooch sets the total.
    bar = Progress(total=1, desc=f"downloading {path.name}", unit="B", unit_scale=True)
    try:
        downloader = pooch.HTTPDownloader(progressbar=bar, timeout=30)
        return Path(
            pooch.retrieve(url, f"sha256:{sha256}", path.name, path.parent, downloader=downloader)
        )
    except (OSError, ValueError) as error:
        # Network errors of requests, which pooch uses, are OSErrors. pooch itself raises ValueError
        # for a wrong checksum.
        reason = type(error).__name__
        if isinstance(error, ValueError):
            reason = "its checksum is wrong"
        raise OSError(
            f"{url} can't be downloaded to {path} ({reason}): check the network, or put the file "
            "there yourself"
        ) from error


def read_jsonl(path: str | Path, parse: Callable[[dict], Any], limit: int | None = None) -> list:
    """parse(object) for each line of a file, the first `limit` of them.

    Raises UserError, naming the line, if a line is malformed, lacks a field or is rejected by
    `parse` with a UserError; and if the file has no lines.
    """
    lines = read_lines(path)
    parsed = []
    try:
        for number, line in enumerate(lines, 1):
            # Blank lines are allowed. Lines beyond the limit are not parsed.
            if line.strip() and (limit is None or len(parsed) < limit):
                parsed.append(parse(json.loads(line)))
    except ValueError as error:  # also for an integer of thousands of digits
        raise UserError(f"{path}, line {number}, is not JSON: {error}") from error
    except KeyError as error:
        raise UserError(f"{path}, line {number}, has no field {error}") from error
    except (UserError, TypeError, AttributeError) as error:
        # TypeError and AttributeError: the line is a list or a number where `parse` needs a dict.
        raise UserError(f"{path}, line {number}: {error}") from error
    if not parsed:
        raise UserError(f"{path} holds no examples")
    return parsed


# ---------------------------------------------------------------------------------------------
# Requests


def encode_request(enc: tiktoken.Encoding, context: str, continuations: list[str]) -> Request:
    """Tokenize a context and its continuations in the way of lm-evaluation-harness.

    Blanks at the end of the context move to the continuation. Then both are tokenized together, and
    all tokens after those of the context alone belong to the continuation:

        context "He said ", continuation "hi"    ->  "He said" and " hi"
        tokens of the context alone              ->  "He", " said"
        tokens of the whole text                 ->  "He", " said", " hi"
        the continuation has those from 2 on     ->  " hi"

    The shortcut: a long context would be tokenized again for every continuation. Therefore it is
    split before its last word, into a head and a tail, and only the tail is tokenized again. The
    tokens are the same, because GPT-2's pattern never joins the blank before a word with the text
    before it, except where two blanks meet.
    """
    # Split the context into head, tail and the blanks at its end.
    stripped = context.rstrip()
    blanks = context[len(stripped) :]
    cut = last_cut(stripped)
    head = enc.encode_ordinary(stripped[:cut])
    tail = stripped[cut:]
    tail_ids = enc.encode_ordinary(tail)

    # What the whole has beyond the context's tokens is the continuation.
    continuation_ids = []
    for continuation in continuations:
        whole = enc.encode_ordinary(tail + blanks + continuation)
        continuation_ids.append(whole[len(tail_ids) :])
    # An empty context is the end-of-text token, which every document starts with.
    return Request(head + tail_ids or [enc.eot_token], continuation_ids)


def last_cut(text: str) -> int:
    """Where a text can be split so that its parts have the tokens of the whole: before its last
    blank that follows a character other than a blank; 0 if it has none."""
    # A run of blanks must stay in one piece: go left to a blank that begins one.
    cut = text.rfind(" ")
    while cut > 0 and text[cut - 1].isspace():
        cut = text.rfind(" ", 0, cut)
    return max(0, cut)
