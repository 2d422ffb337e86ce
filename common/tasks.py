"""What the benchmarks share: their data fetched and read, models and metrics, results on the screen and in files."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import tiktoken

from common import runtime
from common.checkpoint import load_model
from common.console import Progress, UserError, say, table, write_text
from common.runtime import Runtime
from common.scoring import Request
from model import GPT, OPENAI_MODELS


@dataclass
class Metric:
    """A figure that a benchmark gives, and what OpenAI's models are published to reach in it, by their names."""

    name: str
    value: float  # a share of 1, unless it has no counts
    correct: int | None = None
    total: int | None = None
    published: dict[str, float] = field(default_factory=dict)

    def __str__(self):
        text = self.text(self.value)
        return text if self.total is None else f"{text} ({self.correct}/{self.total})"

    def published_text(self, size: str) -> str:
        return self.text(self.published[size]) if size in self.published else ""

    def text(self, value: float) -> str:
        return (
            f"{value:.2%}"
            if self.total is not None
            else f"{value:.4f}"
            if value < 10
            else f"{value:.2f}"
        )


def accuracy(name: str, hits: list[bool], published: dict[str, float] | None = None) -> Metric:
    return Metric(name, sum(hits) / len(hits), sum(hits), len(hits), published or {})


def run(config, title: str, load: Callable, evaluate: Callable) -> list[Metric] | None:
    """A benchmark's main: its examples, the model, the table of its metrics. Returns them on rank 0, None elsewhere."""
    rt = runtime.start(config.device, config.dtype)
    examples = load_on_all_ranks(lambda: load(config.data, config.limit), rt)
    model, enc = load_model(config.model)
    metrics, predictions = evaluate(model.to(rt.device), enc, examples, rt)
    if not rt.is_main:
        return runtime.leave()
    size = closest_openai_model(config.model, model)
    rows = [(metric.name, str(metric), metric.published_text(size)) for metric in metrics]
    say(table((f"{title}, {str(rt.dtype)[6:]}", config.model, f"{size}, published"), rows))
    if config.save_predictions:
        write_text(
            config.save_predictions, "".join(json.dumps(line) + "\n" for line in predictions)
        )
        say(f"predictions: {config.save_predictions}")
    runtime.leave()
    return metrics


def load_on_all_ranks(load: Callable, rt: Runtime):
    """What `load` gives, which may download a file: first on one rank of each machine. Raises its error on all."""
    examples = error = None
    for turn in (rt.local_rank == 0, rt.local_rank != 0):
        if turn:
            try:
                examples = load()
            except (OSError, UserError) as failure:
                error = failure
        rt.barrier()
    if rt.sum([error is not None]):
        raise error or OSError("another process could not read the examples")
    return examples


def closest_openai_model(name: str, model: GPT) -> str:
    """The OpenAI model whose published figures stand beside a model's: itself, or the one of its shape, or `gpt2`."""
    shape = dict(
        n_layer=model.config.n_layer, n_head=model.config.n_head, n_embd=model.config.n_embd
    )
    return (
        name
        if name in OPENAI_MODELS
        else next((size for size, its in OPENAI_MODELS.items() if its == shape), "gpt2")
    )


def fetch(url: str, path: str | Path, sha256: str) -> Path:
    """Download a file unless it is there: whole and with the right checksum, or not at all. Raises OSError."""
    import pooch  # late: whoever has the data needs none of it

    path = Path(path)
    pooch.get_logger().setLevel("ERROR")
    try:
        bar = Progress(
            total=1, desc=f"downloading {path.name}", unit="B", unit_scale=True
        )  # pooch sets the total
        downloader = pooch.HTTPDownloader(progressbar=bar, timeout=30)
        return Path(
            pooch.retrieve(url, f"sha256:{sha256}", path.name, path.parent, downloader=downloader)
        )
    except (
        OSError,
        ValueError,
    ) as error:  # requests' errors are OSErrors; a wrong checksum is a ValueError
        reason = "its checksum is wrong" if isinstance(error, ValueError) else type(error).__name__
        raise OSError(
            f"{url} can't be downloaded to {path} ({reason}): check the network, or give --data FILE"
        ) from error


def read_jsonl(path: str | Path, parse: Callable, limit: int | None = None) -> list:
    """parse(object) of each line of a file, the first `limit` of them. Raises ValueError that names the line if it is
    malformed, a field is missing, or `parse` raises one; and if there are no lines."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    parsed = []
    try:
        for number, line in enumerate(path.read_text("utf-8").split("\n"), 1):
            if line.strip() and (limit is None or len(parsed) < limit):
                parsed.append(parse(json.loads(line)))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number}, is not JSON: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from error
    except KeyError as error:
        raise UserError(f"{path}, line {number}, has no field {error}") from error
    except (UserError, TypeError, AttributeError) as error:
        raise UserError(f"{path}, line {number}: {error}") from error
    if not parsed:
        raise UserError(f"{path} holds no examples")
    return parsed


def encode_request(enc: tiktoken.Encoding, context: str, continuations: list[str]) -> Request:
    """Tokens as lm-evaluation-harness takes them: a continuation's are those that the whole text has more than its
    context, after blanks at the end of the context have gone over to the continuation."""
    stripped = context.rstrip()
    blanks = context[len(stripped) :]
    cut = stripped.rfind(
        " "
    )  # GPT-2's pattern splits before a blank and a word: up to here, all have the same tokens
    if cut > 0 and stripped[cut - 1].isspace():
        cut = 0
    head, tail = enc.encode_ordinary(stripped[:cut]), stripped[cut:]
    ids = enc.encode_ordinary(tail)
    wholes = [enc.encode_ordinary(tail + blanks + continuation) for continuation in continuations]
    return Request(head + ids or [enc.eot_token], [whole[len(ids) :] for whole in wholes])
