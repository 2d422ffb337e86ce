"""Evaluate several models on several benchmarks and print one table, with the published figures.

    python evaluate.py                                                  # log/model_final.pt
    python evaluate.py --models log/model_final.pt gpt2 gpt2-medium gpt2-large gpt2-xl
    python evaluate.py --models exported gpt2 --benchmarks hellaswag lambada --limit 500
    torchrun --standalone --nproc_per_node=8 evaluate.py --models gpt2-xl

--benchmarks lists the benchmarks. One of them is val: the loss on the validation shards in nats per
token, and in bits per byte of its text, which also compares models of different vocabularies.

The table is printed and written to out_dir as evaluation.md, the results as evaluation.json, and a
picture as evaluation.png: a panel for each benchmark, a bar for each model, the published figures
as lines. A result in evaluation.json is reused if nothing that it depends on has changed: the
model's weights, the data, limit, dtype, and the code of the benchmark. If a model or its data is
not available, its row in the table gives the reason.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from textwrap import shorten

import common.before_torch

from common.console import (
    Dtype,
    UserError,
    check_at_least,
    checksum,
    parse_flags,
    read_text,
    run_script,
    say,
    table,
    write_atomically,
    write_text,
)
from common.published import REFERENCES


@dataclass
class Config:
    # models to evaluate: checkpoints, Hugging Face folders, gpt2 ... gpt2-xl
    models: tuple[str, ...] = ("log/model_final.pt",)
    benchmarks: tuple[str, ...] = tuple(REFERENCES)  # benchmarks to evaluate them on
    hellaswag_data: str | None = None  # hellaswag_val.jsonl; None = downloaded once
    lambada_data: str | None = None  # lambada_test.jsonl; None = downloaded once
    # a file, a glob or a folder of cbtest_*_test*.txt; None = from the Hugging Face hub
    cbt_data: str | None = None
    # folder with core.yaml, eval_meta_data.csv and eval_data; None = downloaded once
    core_data: str | None = None
    val_data: str = "datasets/edu_fineweb10B"  # folder of shards, written by fineweb.py
    val_tokens: int = 10485760  # tokens of the validation shards used for the validation loss
    limit: int | None = None  # evaluate only the first examples (of each kind or task), this many
    B: int = 8  # sequences per forward pass of the validation loss
    out_dir: str = "log/evaluation"  # folder for evaluation.json, evaluation.md and evaluation.png
    device: str = "auto"  # cuda, mps or cpu; auto = the first available of these
    # dtype of matrix products; auto = the fastest of bfloat16, float16 and float32 on this hardware
    dtype: Dtype = "auto"

    def __post_init__(self):
        for name in self.benchmarks:
            if name not in REFERENCES:
                raise UserError(f"benchmarks is {name!r}, must be one of {', '.join(REFERENCES)}")
        check_at_least(self, 1, "limit", "val_tokens", "B")


if __name__ == "__main__":
    config = parse_flags(Config, __doc__)  # before the slow imports: --help answers at once

import numpy as np
import tiktoken
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot, drawing needs no display

import cbt
import dclm_core
import hellaswag
import lambada
from common import checkpoint, runtime
from common.runtime import Runtime
from common.scoring import stream_loss
from common.shards import open_shards, read_manifest, shards_fingerprint, shards_tokenizer
from common.tasks import Benchmark, Metric, closest_openai_model, load_on_all_ranks
from common.tokenizer import tokenizer_to_text
from model import GPT, OPENAI_MODELS

# All of REFERENCES but the validation loss. A field NAME_data in Config gives a benchmark a flag
# for its data; without that field, it uses its default data.
BENCHMARKS = (hellaswag.BENCHMARK, lambada.BENCHMARK, cbt.BENCHMARK, dclm_core.BENCHMARK)


def main(config: Config):
    rt = runtime.start(config.device, config.dtype)

    # What was computed before, and what is to be computed
    out_dir = Path(config.out_dir)
    stored = read_results(out_dir / "evaluation.json")
    benchmarks = {benchmark.name: benchmark for benchmark in BENCHMARKS}
    benchmarks["val"] = validation_benchmark(config)
    # Rank 0 may only write the file when all ranks have read it.
    rt.barrier()

    # Write after each model, so that an interrupted evaluation loses little.
    results = []
    for name in config.models:
        results += evaluate_model(name, benchmarks, config, stored, rt)
        if rt.is_main:
            lines = json.dumps(stored, indent=1, allow_nan=False)
            write_text(out_dir / "evaluation.json", lines + "\n")

    # The table, the picture, and an error if a result is missing
    text = results_table(results, benchmarks)
    if rt.is_main:
        write_text(out_dir / "evaluation.md", text + "\n")
    rt.print(f"{text}\n{out_dir}/evaluation.md, {out_dir}/evaluation.json")
    if rt.is_main:
        draw(out_dir / "evaluation.png", results, benchmarks)
    runtime.leave()
    missing = sum("error" in result for result in results)
    if missing:
        raise UserError(
            f"{missing} of {len(results)} results are missing: see the table for the reasons, and "
            "run again for those"
        )


def evaluate_model(
    name: str,
    benchmarks: dict[str, Benchmark],
    config: Config,
    stored: list[dict],
    rt: Runtime,
) -> list[dict]:
    """One result per benchmark: from `stored`, or computed and added to it, or with its error."""
    results = []
    model = None  # loaded when the first result has to be computed
    fingerprint = cache(partial(checkpoint.fingerprint, name))  # reads the whole file: only once
    for title in config.benchmarks:
        benchmark = benchmarks[title]
        try:
            # Look for a stored result. This does not need the model, only its checksum.
            key = result_key(fingerprint(), benchmark, config, rt)
            result = find_result(stored, key)
            if result:
                rt.print(f"{name} on {title}: computed before")
                results.append(result | dict(model=name))
                continue

            if model is None:
                model, enc = checkpoint.load_model(name)
                model.to(rt.device)
            data, limit = data_and_limit(benchmark, config)
            examples = load_on_all_ranks(partial(benchmark.load, data, limit), rt)
            # Predictions are for the benchmarks' own scripts.
            metrics, _ = benchmark.evaluate(model, enc, examples, rt)
        except (OSError, UserError) as error:
            # One missing file should not cost the other results.
            rt.print(f"{name} on {title}: {error}")
            results.append(dict(model=name, benchmark=title, error=str(error)))
            continue

        # The key is part of the stored result, so that it can be found again.
        result = dict(model=name) | key
        result["size"] = closest_openai_model(name, model)
        result["metrics"] = [asdict(metric) for metric in metrics]
        store_result(stored, result)
        results.append(result)
    return results


# ---------------------------------------------------------------------------------------------
# Stored results


def data_and_limit(benchmark: Benchmark, config: Config) -> tuple[str | None, int | None]:
    """The arguments of benchmark.load."""
    # A benchmark without a flag for its data has no such field.
    data = getattr(config, f"{benchmark.name}_data", None)
    return data, config.val_tokens if benchmark.name == "val" else config.limit


def result_key(weights: str, benchmark: Benchmark, config: Config, rt: Runtime) -> dict:
    """Everything that a result depends on. Two results with the same key are the same.

    `weights` is the fingerprint of the model.
    """
    data, limit = data_and_limit(benchmark, config)
    return dict(
        benchmark=benchmark.name,
        weights=weights,
        data=benchmark.data_fingerprint(data),
        limit=limit,
        dtype=rt.dtype_name,
        code=benchmark.code_fingerprint(),
    )


def find_result(stored: list[dict], key: dict) -> dict | None:
    for result in stored:
        # A stored result is its key, the model's name and size, and the metrics.
        if key.items() <= result.items():
            return result
    return None


def store_result(stored: list[dict], result: dict):
    """Add a result, in place of the one that older code computed from the same inputs."""
    # The key without the code
    inputs = ("benchmark", "weights", "data", "limit", "dtype")
    outdated = [old for old in stored if all(old.get(key) == result[key] for key in inputs)]
    for old in outdated:
        stored.remove(old)
    stored.append(result)


def read_results(path: Path) -> list[dict]:
    if not path.exists():
        # A folder that can't be made is an error at once, not after hours of evaluation.
        path.parent.mkdir(parents=True, exist_ok=True)
        return []
    try:
        results = json.loads(read_text(path))
        # The fields that the table and the picture use. A missing one raises KeyError.
        for result in results:
            result["model"], result["benchmark"]
            [metric["value"] for metric in result["metrics"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): move it away") from error
    # Versions before this one stored NaN for broken models: those have no results.
    return [result for result in results if all_finite(result["metrics"])]


def all_finite(metrics: list[dict]) -> bool:
    return all(math.isfinite(metric["value"]) for metric in metrics)


def results_table(results: list[dict], benchmarks: dict[str, Benchmark]) -> str:
    """A row per model and metric; a column for each of OpenAI's models with published figures."""
    lines = []  # (model, benchmark, metric, figure, published figures by model)
    for result in results:
        start = (result["model"], result["benchmark"])
        if "error" in result:
            reason = shorten(result["error"].replace("|", "/"), 80)  # a | would end the cell
            lines.append((*start, "not available", reason, {}))
            continue
        reference = benchmarks[result["benchmark"]].reference
        for values in result["metrics"]:
            # The model's figure, formatted like the published ones
            metric = Metric(**values)
            published = {}
            for size in OPENAI_MODELS:
                published[size] = metric.format(reference.published(metric.name, size))
            lines.append((*start, metric.name, str(metric), published))

    # Leave out models without any figure.
    sizes = [size for size in OPENAI_MODELS if any(line[-1].get(size) for line in lines)]
    head = ("model", "benchmark", "metric", "figure", *[f"{size}, published" for size in sizes])
    rows = []
    for *cells, published in lines:
        rows.append((*cells, *[published.get(size, "") for size in sizes]))
    return table(head, rows)


# ---------------------------------------------------------------------------------------------
# The picture


def draw(path: Path, results: list[dict], benchmarks: dict[str, Benchmark]):
    """Draw a panel for each benchmark that has results, and write the picture."""
    # One panel per benchmark and one bar per model, without those that failed
    results = [result for result in results if "error" not in result]
    names = [name for name in benchmarks if any(name == r["benchmark"] for r in results)]
    if not names:
        return
    # dict.fromkeys keeps the first of equal names, in order.
    models = list(dict.fromkeys(result["model"] for result in results))
    figure = Figure((1.5 + len(names) * max(3.5, 0.6 * len(models)), 5), layout="constrained")

    # squeeze=False: a single panel is an array, too.
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for ax, name in zip(axes, names):
        draw_benchmark(ax, benchmarks[name], models, results)
    with write_atomically(path) as file:
        figure.savefig(file, format="png", dpi=150)
    say(path)


def draw_benchmark(ax: Axes, benchmark: Benchmark, models: list[str], results: list[dict]):
    """The headline metric of each model as a bar with its standard error. Dashed lines are the
    published figures of OpenAI's models, the dotted line is chance."""
    reference = benchmark.reference
    # The end of a long path says more than its beginning.
    ticks = [model if len(model) <= 24 else f"...{model[-21:]}" for model in models]

    # A bar for each model, with the figure below its name
    for result in results:
        if result["benchmark"] != benchmark.name:
            continue
        metric = benchmark.headline([Metric(**values) for values in result["metrics"]])
        place = models.index(result["model"])
        ax.bar(place, metric.value, yerr=metric.stderr, color="#0072B2", ecolor="black", capsize=3)
        ticks[place] += f"\n{metric.format(metric.value)}"

    # Horizontal lines: published figures, and chance. A chance of 0 is the axis.
    for model, color in zip(OPENAI_MODELS, ("#E69F00", "#009E73", "#CC79A7", "#D55E00")):
        figure = reference.published(reference.headline, model)
        if figure is not None:
            text = f"{figure:.1%}" if reference.as_percent else f"{figure:.4f}"
            ax.axhline(figure, color=color, ls="--", label=f"{model}, published: {text}")
    if reference.chance:
        ax.axhline(reference.chance, color="grey", ls=":", label=f"chance: {reference.chance:.0%}")

    # Room for one bar and a margin, also if there is a single model
    ax.set_xticks(range(len(models)), ticks, rotation=30, ha="right")
    ax.set(title=f"{reference.title}: {reference.headline}", xlim=(-0.6, len(models) - 0.4))
    if reference.as_percent:
        ax.yaxis.set_major_formatter("{x:.0%}")
    if ax.get_legend_handles_labels()[0]:
        # above the title, where it covers no bar
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.08), fontsize="small")


# ---------------------------------------------------------------------------------------------
# The validation loss, as a benchmark


@dataclass
class ValidationText:
    tokens: np.ndarray  # (val_tokens + 1,), less if the shards have fewer
    enc: tiktoken.Encoding  # the tokenizer that the shards were made with


def validation_benchmark(config: Config) -> Benchmark:
    """The record of `val`. Its "limit" is val_tokens."""
    # The published losses are those of GPT-2 on FineWeb-Edu. On other data they mean nothing.
    reference = REFERENCES["val"]
    try:
        manifest = read_manifest(config.val_data) or {}
    except UserError:
        manifest = {}  # damaged: load_validation reports it
    if (manifest.get("source"), manifest.get("tokenizer")) != ("fineweb-edu", "gpt2"):
        reference = replace(reference, figures={})
    # B does not change the loss, so it is not part of the result's key.
    evaluate = partial(evaluate_validation, B=config.B)
    return Benchmark(
        name="val",
        reference=reference,
        load=load_validation,
        evaluate=evaluate,
        evaluate_headline=evaluate,
        data_fingerprint=validation_fingerprint,
    )


def load_validation(folder: str, val_tokens: int) -> ValidationText:
    # One more than is predicted: the first token is only read.
    tokens = open_shards(folder, "val").read_first(val_tokens + 1)
    return ValidationText(tokens, shards_tokenizer(folder))


def validation_fingerprint(folder: str) -> str:
    if read_manifest(folder):
        return shards_fingerprint(folder)
    # Without a manifest, a change in the middle of a shard is found only by reading all of it.
    return " ".join(map(checksum, open_shards(folder, "val").paths))


def evaluate_validation(
    model: GPT, enc: tiktoken.Encoding, text: ValidationText, rt: Runtime, B: int
) -> tuple[list[Metric], list[dict]]:
    """Loss and bits per byte of a text. A model with another tokenizer reads the same text."""
    # Split into documents, to count bytes: the end-of-text token before each is not text.
    eot_token = text.enc.eot_token
    documents = np.split(text.tokens, np.flatnonzero(text.tokens == eot_token))
    texts = []
    for document in documents:
        texts.append(text.enc.decode_bytes(document[document != eot_token].tolist()))

    # With the tokenizer of the shards, the model reads the tokens as they are.
    tokens = text.tokens
    if tokenizer_to_text(enc) != tokenizer_to_text(text.enc):
        # The last document may end within a character, hence "replace".
        strings = [document.decode("utf-8", "replace") for document in texts if document]
        # Encode document by document, with this model's own end-of-text token.
        ids = []
        for string in strings:
            ids += [enc.eot_token, *enc.encode_ordinary(string)]
        tokens = np.array(ids)
        texts = [string.encode() for string in strings]

    num_bytes = sum(map(len, texts))
    if not num_bytes:
        raise UserError("the validation tokens hold no text: raise --val_tokens")
    # Bits per byte: the loss of all predicted tokens in bits, divided by the size of the text.
    loss = stream_loss(model, tokens, B, model.config.block_size, rt)
    bits = loss * (len(tokens) - 1) / math.log(2)
    metrics = [
        Metric("loss", loss),
        # The limit keeps exp from overflowing for a model that diverged.
        Metric("perplexity", math.exp(min(loss, 99))),
        Metric("bits per byte", bits / num_bytes),
    ]
    return metrics, []


if __name__ == "__main__":
    run_script(main, config)
