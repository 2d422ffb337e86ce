"""Several models x several benchmarks -> one table, as text, Markdown and JSON, beside the published figures.

    python evaluate.py                                                  # log/model_final.pt on everything
    python evaluate.py --models log/model_final.pt gpt2 gpt2-medium gpt2-large gpt2-xl
    python evaluate.py --models exported gpt2 --benchmarks hellaswag lambada --limit 500
    torchrun --standalone --nproc_per_node=8 evaluate.py --models gpt2-xl

The benchmarks are hellaswag, lambada, cbt and val: the validation shard's loss, in nats per token, and bits per byte of
its text, which compare models of different vocabularies. What is in evaluation.json already for the same model, data
and constants is not computed again. A model or a dataset that can't be had is a row that says so.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten
from typing import Literal

import numpy as np
import tiktoken

import cbt
import hellaswag
import lambada
from common import checkpoint, runtime, tasks
from common.console import UserError, checksum, cli, table, write_text
from common.runtime import Runtime
from common.scoring import stream_loss
from common.shards import manifest_checksum, open_shards, read_manifest, shards_tokenizer
from common.tasks import Metric, closest_openai_model
from common.tokenizer import tokenizer_to_text
from model import GPT, OPENAI_MODELS

BENCHMARKS = {"hellaswag": hellaswag, "lambada": lambada, "cbt": cbt}
OPENAI_VAL_LOSS = {"gpt2": 3.2924}  # on FineWeb-Edu's first shard: build-nanogpt


@dataclass
class Config:
    models: tuple[str, ...] = (
        "log/model_final.pt",
    )  # checkpoints, Hugging Face folders, gpt2 ... gpt2-xl
    benchmarks: tuple[Literal["hellaswag", "lambada", "cbt", "val"], ...] = (
        "hellaswag",
        "lambada",
        "cbt",
        "val",
    )
    hellaswag_data: str | None = None  # hellaswag_val.jsonl; None = downloaded
    lambada_data: str | None = None  # lambada_test.jsonl; None = downloaded
    cbt_data: str | None = (
        None  # a file, a glob or a folder of cbtest_*_test*.txt; None = from the hub
    )
    val_data: str = "datasets/edu_fineweb10B"  # folder of shards that fineweb.py wrote
    val_tokens: int = 10485760  # tokens of the validation shard, from its start
    limit: int | None = None  # only the first so many examples (of each kind) of the benchmarks
    B: int = 8  # sequences per forward pass of the validation loss
    out_dir: str = "log/evaluation"  # folder of evaluation.json and evaluation.md
    device: str = "auto"  # cuda, mps or cpu; auto takes the first there is
    dtype: runtime.Dtype = (
        "auto"  # of matrix products; auto = bfloat16 where the hardware is fast at it
    )


def main(config: Config):
    rt = runtime.start(config.device, config.dtype)
    out_dir = Path(config.out_dir)
    done = read_results(out_dir / "evaluation.json")
    rt.barrier()
    results = []
    for name in config.models:
        results += evaluate_model(name, config, done, rt)
        if rt.is_main:
            write_text(out_dir / "evaluation.json", json.dumps(done, indent=1) + "\n")
    text = to_table(results)
    if rt.is_main:
        write_text(out_dir / "evaluation.md", text + "\n")
    rt.print(f"{text}\n{out_dir}/evaluation.md, {out_dir}/evaluation.json")
    runtime.leave()
    if all("error" in result for result in results):
        raise UserError("nothing could be evaluated: the table says why")


def evaluate_model(name: str, config: Config, done: list[dict], rt: Runtime) -> list[dict]:
    """A result for each benchmark: found in `done`, or computed and added to it, or with the error that stopped it."""
    results, model = [], None
    for title in config.benchmarks:
        result = dict(model=name, benchmark=title)
        try:
            what = dict(
                benchmark=title,
                weights=checkpoint.fingerprint(name),
                data=data_identity(title, config),
            )
            what |= dict(limit=None if title == "val" else config.limit, dtype=str(rt.dtype)[6:])
            if earlier := next((r for r in done if what.items() <= r.items()), None):
                rt.print(f"{name} on {title}: computed before")
                results.append(earlier | dict(model=name))
                continue
            if model is None:
                model, enc = checkpoint.load_model(name)
                model.to(rt.device)
            metrics = [asdict(metric) for metric in run_benchmark(title, model, enc, config, rt)]
            result |= what | dict(size=closest_openai_model(name, model), metrics=metrics)
            done.append(result)
        except (OSError, UserError) as error:
            rt.print(f"{name} on {title}: {error}")
            result["error"] = str(error)
        results.append(result)
    return results


def run_benchmark(
    title: str, model: GPT, enc: tiktoken.Encoding, config: Config, rt: Runtime
) -> list[Metric]:
    if title == "val":
        return validation(model, enc, config, rt)
    module = BENCHMARKS[title]
    data = getattr(config, f"{title}_data")
    examples = tasks.load_on_all_ranks(lambda: module.load(data, config.limit), rt)
    return module.evaluate(model, enc, examples, rt)[0]


def validation(model: GPT, enc: tiktoken.Encoding, config: Config, rt: Runtime) -> list[Metric]:
    """Loss and bits per byte on the validation shard; under another tokenizer than its own, on the same text."""
    shards, manifest = open_shards(config.val_data, "val"), read_manifest(config.val_data) or {}
    tokens = shards.read(0, 0, min(config.val_tokens + 1, shards.lengths[0]))
    own = shards_tokenizer(config.val_data)
    documents = np.split(tokens, np.flatnonzero(tokens == own.eot_token))
    texts = [
        own.decode_bytes(document[document != own.eot_token].tolist()) for document in documents
    ]
    if tokenizer_to_text(enc) != tokenizer_to_text(own):
        texts = [text.decode("utf-8", "replace") for text in texts if text]
        tokens = np.array(
            [i for text in texts for i in (enc.eot_token, *enc.encode_ordinary(text))]
        )
        texts = [text.encode() for text in texts]
    loss = stream_loss(model, tokens, config.B, model.config.block_size, rt)
    bits = loss * (len(tokens) - 1) / math.log(2)
    published = (
        OPENAI_VAL_LOSS if manifest.get("source") == "fineweb-edu" and own.name == "gpt2" else {}
    )
    return [
        Metric("loss", loss, published=published),
        Metric("bits per byte", bits / sum(map(len, texts))),
    ]


def data_identity(title: str, config: Config) -> str:
    """What tells a benchmark's data from others: checksums of its files, or the name of a hub dataset."""
    if title == "val":
        identity = manifest_checksum(config.val_data) or checksum(
            open_shards(config.val_data, "val").paths[0]
        )
        return f"{identity} {config.val_tokens}"
    data = getattr(config, f"{title}_data")
    if data is None:
        return cbt.HUB if title == "cbt" else BENCHMARKS[title].SHA256
    return " ".join(map(checksum, cbt.find_files(data) if title == "cbt" else [data]))


def read_results(path: Path) -> list[dict]:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return []
    try:
        results = json.loads(path.read_text())
        [(result["model"], result["benchmark"], result["metrics"]) for result in results]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): move it away") from error
    return results


def to_table(results: list[dict]) -> str:
    """A row per model and metric; the figures published for OpenAI's models in columns of their own."""
    sizes = [
        s
        for s in OPENAI_MODELS
        if any(s in m["published"] for r in results for m in r.get("metrics", ()))
    ]
    rows = []
    for result in results:
        start = (result["model"], result["benchmark"])
        if "error" in result:
            reason = shorten(result["error"].replace("|", "/"), 80)
            rows.append((*start, "not available", reason, *[""] * len(sizes)))
        for metric in (Metric(**values) for values in result.get("metrics", ())):
            rows.append((*start, metric.name, str(metric), *map(metric.published_text, sizes)))
    return table(
        ("model", "benchmark", "metric", "figure", *(f"{size}, published" for size in sizes)), rows
    )


if __name__ == "__main__":
    cli(Config, main, __doc__)
