"""CORE (Li et al. 2024, "DataComp-LM", arXiv:2406.11794): one figure from 22 tasks.

    python dclm_core.py                                    # log/model_final.pt
    python dclm_core.py --model gpt2 --save_predictions predictions.jsonl
    torchrun --standalone --nproc_per_node=8 dclm_core.py --model gpt2-xl
    python dclm_core.py --data eval_bundle --limit 100     # a cheap estimate

CORE is the mean of the tasks' centered accuracies: 0 is guessing, 1 is always right.

    centered = (accuracy - chance) / (1 - chance)

The data is the bundle of DCLM and nanochat, downloaded once. The examples, their order, the prompts
and the metric are those of nanochat's core_eval.py, so that the figures can be compared with its
leaderboard. Each prompt begins with the end-of-text token, then with solved examples of the same
task ("shots"), drawn for each example by its own seed. Three types of tasks:

    multiple_choice     one question, several answers: the answer is the one with the lowest mean
                        loss per token. Tokens that all answers begin with are not counted.
    schema              several beginnings, one end: the answer is the beginning after which the
                        end has the lowest mean loss per token. The end is what the tokens of all
                        texts have in common, from the right.
    language_modeling   right if each token of the continuation is the most likely one

A text that is longer than the model's context loses its beginning. nanochat's own models have no
such limit, but it evaluates GPT-2 in the same way.

The paper computes CORE with another program, and its own figures may differ: core_eval.py says that
all tasks but SQuAD about match (31% there, 37% in the reference).
"""

import csv
import os
import random
import tempfile
import zipfile
from dataclasses import dataclass, field
from functools import partial
from math import nan, sqrt
from pathlib import Path

import common.before_torch

from common.console import (
    Dtype,
    UserError,
    check_at_least,
    check_output,
    checksum,
    parse_flags,
    read_text,
    run_script,
    say,
    table,
    write_atomically,
)


@dataclass
class Config:
    model: str = "log/model_final.pt"  # a checkpoint, a Hugging Face folder, or gpt2 ... gpt2-xl
    # folder with core.yaml, eval_meta_data.csv and eval_data; None = downloaded once
    data: str | None = None
    # evaluate only this many examples of each task; the same ones that nanochat takes
    limit: int | None = None
    device: str = "auto"  # cuda, mps or cpu; auto = the first available of these
    # dtype of matrix products; auto = the fastest of bfloat16, float16 and float32 on this hardware
    dtype: Dtype = "auto"
    save_predictions: str | None = None  # file for predictions, one line per example
    plot: str = "log/dclm_core.png"  # file for a picture of the tasks

    def __post_init__(self):
        check_at_least(self, 1, "limit")


if __name__ == "__main__":
    config = parse_flags(Config, __doc__)  # before the slow imports: --help answers at once

import tiktoken

from common import runtime, tasks
from common.checkpoint import load_model
from common.published import CORE_LEADERBOARD, REFERENCES
from common.runtime import Runtime
from common.scoring import Request, make_rows, score
from common.tasks import (
    Benchmark,
    Metric,
    accuracy,
    closest_openai_model,
    last_cut,
    load_on_all_ranks,
)
from model import GPT, OPENAI_MODELS

URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
# nanochat pins no checksum. This is the one that several other projects have recorded.
SHA256 = "90a7c19e28ee7a52b4f6e1f87658deb9fde7f63deba2379045bdb1fe9ea5d200"
ARCHIVE = "datasets/dclm_core/eval_bundle.zip"
FOLDER = "datasets/dclm_core/eval_bundle"
# nanochat's seeds: for the order of a task's examples, and for the shots of example 0. Example n
# has SHOTS_SEED + n.
ORDER_SEED = 1337
SHOTS_SEED = 1234
# Examples per task during training, as in nanochat's base_train.py
TRAINING_LIMIT = 500
# Examples that are tokenized at a time. All 10,042 of HellaSwag, each with its shots, would take
# gigabytes.
CHUNK = 2048
# The fields of an example, by type of task.
FIELDS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}


def main(config: Config):
    check_output(config.save_predictions)
    rt = runtime.start(config.device, config.dtype)
    # Read the data before the model: a wrong folder is then reported at once.
    core_tasks = load_on_all_ranks(lambda: load(config.data, config.limit), rt)
    model, enc = load_model(config.model)
    results = evaluate_tasks(model.to(rt.device), enc, core_tasks, rt)

    # All ranks have the same results, and the first one reports them.
    if rt.is_main:
        closest = closest_openai_model(config.model, model)
        say(results_table(config.model, closest, results, rt))
        say(describe_tokens(results, model.config.block_size))
        if config.save_predictions:
            tasks.save_predictions(
                config.save_predictions, [line for result in results for line in result.lines]
            )
        draw(Path(config.plot), config.model, closest, results)
    runtime.leave()


# ---------------------------------------------------------------------------------------------
# Data


@dataclass
class Task:
    name: str
    kind: str  # multiple_choice, schema or language_modeling
    shots: int  # solved examples in front of each example
    delimiter: str  # what stands between a context and its continuation
    chance: float  # accuracy of guessing
    examples: list[dict]  # with the FIELDS of its kind, and `ind`: the number in its file


def load(path: str | None = None, limit: int | None = None) -> list[Task]:
    """The tasks of a bundle, each with `limit` examples at most.

    The examples are shuffled before they are cut, so that a limit takes examples of all kinds.
    Raises OSError or UserError.
    """
    folder = Path(path) if path else fetch_bundle()
    chances = read_chances(folder / "eval_meta_data.csv")
    loaded = []
    for entry in read_entries(folder / "core.yaml"):
        # The same generator as in nanochat, so that a limit takes the same examples.
        task = make_task(folder, entry, chances)
        random.Random(ORDER_SEED).shuffle(task.examples)
        loaded.append(cut_task(task, limit))
    return loaded


def data_fingerprint(path: str | None) -> str:
    if path is None:
        return SHA256
    # All files that the tasks are made of
    files = [Path(path, "core.yaml"), Path(path, "eval_meta_data.csv")]
    files += [file for _, file in map(partial(data_file, Path(path)), read_entries(files[0]))]
    return " ".join(map(checksum, files))


def cut_task(task: Task, limit: int | None) -> Task:
    """The task with its first examples only. The shots are drawn from these, too."""
    examples = task.examples[:limit]
    # An example is not its own shot, so a task needs one more example than it has shots.
    if len(examples) <= task.shots:
        raise UserError(
            f"task {task.name} shows {task.shots} other examples with each, and has only "
            f"{len(examples)} in all: raise --limit to {task.shots + 1} or more"
        )
    return Task(task.name, task.kind, task.shots, task.delimiter, task.chance, examples)


def read_entries(path: Path) -> list[dict]:
    """The entries of core.yaml, checked."""
    import yaml  # imported here, as only this benchmark needs it

    # An entry of core.yaml:
    #     label: piqa
    #     dataset_uri: commonsense_reasoning/piqa.jsonl
    #     num_fewshot: [10]
    #     icl_task_type: multiple_choice
    #     continuation_delimiter: "\nAnswer: "    (a blank if absent)
    try:
        entries = yaml.safe_load(read_text(path))["icl_tasks"]
        for entry in entries:
            kind = entry["icl_task_type"]
            if kind not in FIELDS:
                raise UserError(
                    f"{path}: icl_task_type is {kind!r}, not one of {', '.join(FIELDS)}"
                )
            if not isinstance(entry["num_fewshot"][0], int) or entry["num_fewshot"][0] < 0:
                raise UserError(f"{path}: num_fewshot of {entry['label']} is not a number")
            # Adding them up raises TypeError unless all three are texts.
            str(entry["label"] + entry["dataset_uri"] + entry.get("continuation_delimiter", ""))
    except (yaml.YAMLError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    if not entries:
        raise UserError(f"{path} lists no tasks")
    return entries


def read_chances(path: Path) -> dict[str, float]:
    """The accuracy of guessing by task: eval_meta_data.csv has it in percent."""
    # Two of the columns are used: Eval Task, for example piqa, and Random baseline, 50.
    chances = {}
    try:
        for row in csv.DictReader(read_text(path).splitlines()):
            chances[row["Eval Task"]] = float(row["Random baseline"]) / 100
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise UserError(
            f"{path} is damaged: it needs the columns 'Eval Task' and 'Random baseline' ({error})"
        ) from error
    return chances


def data_file(folder: Path, entry: dict) -> tuple[str, Path]:
    """Name and file of a task. The file must be inside of the bundle."""
    # resolve() follows links and `..`, which could lead out of the folder.
    root = (folder / "eval_data").resolve()
    file = (root / entry["dataset_uri"]).resolve()
    if not file.is_relative_to(root):
        raise UserError(f"{folder}/core.yaml: {entry['dataset_uri']} is outside of the bundle")
    return entry["label"], file


def make_task(folder: Path, entry: dict, chances: dict[str, float]) -> Task:
    name, file = data_file(folder, entry)
    kind = entry["icl_task_type"]
    # A chance of 1 would make `centered` divide by zero. The -1 is for a missing one.
    if not 0 <= chances.get(name, -1) < 1:
        raise UserError(f"{folder}/eval_meta_data.csv has no random baseline for task {name}")
    try:
        examples = tasks.read_jsonl(file, partial(parse, kind))
    except FileNotFoundError as error:
        raise UserError(f"task {name} has no file {file}") from error
    # Number the examples before they are shuffled.
    for number, example in enumerate(examples):
        example["ind"] = number
    delimiter = entry.get("continuation_delimiter", " ")
    return Task(name, kind, entry["num_fewshot"][0], delimiter, chances[name], examples)


def parse(kind: str, line: dict) -> dict:
    """The fields that are used, checked. Raises UserError."""
    # A missing field raises KeyError, which read_jsonl reports with the line.
    example = {name: line[name] for name in FIELDS[kind]}

    # These kinds have several options, and `gold` is the number of the right one.
    if kind != "language_modeling":
        options = example["choices" if kind == "multiple_choice" else "context_options"]
        if not isinstance(options, list) or not options:
            raise UserError("it must have a list of choices or context_options")
        if not isinstance(example["gold"], int) or not 0 <= example["gold"] < len(options):
            raise UserError(f"gold is {example['gold']!r}, must be 0 to {len(options) - 1}")
    return example


def fetch_bundle() -> Path:
    """The folder of the bundle, which is downloaded and unpacked if it is not there."""
    folder = Path(FOLDER)
    if not folder.exists():
        archive = tasks.fetch(URL, ARCHIVE, SHA256)
        unpack(archive, folder)
    return folder


def unpack(archive: Path, folder: Path):
    """Unpack what an archive has under eval_bundle/ into a folder, all of it or nothing.

    Files are written as plain files, never as links or with rights to execute. Raises UserError if
    the archive is damaged, or has a path that leaves the folder; then nothing is unpacked.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder, so that both are on one file system and the rename at the end is atomic.
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        root = Path(temporary).resolve()
        try:
            with zipfile.ZipFile(archive) as file:
                # Check all paths before the first file is written. An archive from Windows may have
                # \ between folders.
                members = [member for member in file.infolist() if not member.is_dir()]
                for member in members:
                    target = (root / member.filename.replace("\\", "/")).resolve()
                    if not target.is_relative_to(root):
                        raise UserError(f"{archive}: {member.filename} leaves the folder")
                for member in members:
                    target = root / member.filename
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(file.read(member))
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
            raise UserError(f"{archive} is damaged ({error}): delete it") from error

        # Complete: the folder appears under its name.
        if not (root / "eval_bundle" / "core.yaml").exists():
            raise UserError(f"{archive} holds no eval_bundle/core.yaml")
        os.rename(root / "eval_bundle", folder)


# ---------------------------------------------------------------------------------------------
# Prompts


@dataclass
class Text:
    """One of an example's texts, as the model reads it."""

    tokens: list[int]  # at most block_size
    start: int  # the tokens from here on are scored; at least 1
    num_cut: int  # tokens that it lost at its beginning


def draw_shots(task: Task, index: int) -> list[dict]:
    """The solved examples in front of an example: others of the same task, drawn by its seed."""
    others = [number for number in range(len(task.examples)) if number != index]
    # The same calls of `random` as in core_eval.py draw the same shots.
    numbers = random.Random(SHOTS_SEED + index).sample(others, task.shots)
    return [task.examples[number] for number in numbers]


def render_shot(task: Task, example: dict) -> str:
    # Context and right continuation. The blank line separates the shots.
    if task.kind == "multiple_choice":
        context, continuation = example["query"], example["choices"][example["gold"]]
    elif task.kind == "schema":
        context = example["context_options"][example["gold"]]
        continuation = example["continuation"]
    else:
        context, continuation = str(example["context"]).strip(), example["continuation"]
    return f"{context}{task.delimiter}{continuation}\n\n"


def render(task: Task, index: int) -> list[str]:
    """The texts of an example: one per choice; for language modeling, without and with the
    continuation."""
    shots = "".join(render_shot(task, shot) for shot in draw_shots(task, index))

    # The shots, then the example with each of its options
    example = task.examples[index]
    delimiter = task.delimiter
    if task.kind == "multiple_choice":
        return [f"{shots}{example['query']}{delimiter}{choice}" for choice in example["choices"]]
    if task.kind == "schema":
        end = f"{delimiter}{example['continuation']}"
        return [f"{shots}{context}{end}" for context in example["context_options"]]

    # Blanks around the context are removed, because a blank at its end would be part of the
    # continuation's first token. For the same reason the delimiter is stripped from the text
    # without continuation.
    before = f"{shots}{str(example['context']).strip()}{delimiter}"
    return [before.strip(), f"{before}{example['continuation']}"]


def encode(enc: tiktoken.Encoding, texts: list[str]) -> list[list[int]]:
    """Tokens of texts that begin alike, each after the end-of-text token.

    The tokens are those of each text as a whole, but what the texts share is tokenized only once.
    """
    # Cut where all texts are still the same, and where each has the tokens of its whole.
    cut = last_cut(os.path.commonprefix(texts))
    head = [enc.eot_token, *enc.encode_ordinary(texts[0][:cut])]
    return [head + enc.encode_ordinary(text[cut:]) for text in texts]


def make_texts(enc: tiktoken.Encoding, task: Task, index: int, block_size: int) -> list[Text]:
    """The tokens of an example's texts, and which are scored."""
    rows = encode(enc, render(task, index))
    if task.kind == "multiple_choice":
        # Score all that follows what the texts share at their beginning.
        starts = [common_length(rows)] * len(rows)
    elif task.kind == "schema":
        # Score what the texts share at their end.
        length = common_length([row[::-1] for row in rows])
        starts = [len(row) - length for row in rows]
    else:
        # Score what the whole text has beyond the text without continuation. That works only if the
        # tokens of the latter are the first of the former.
        without, whole = rows
        if whole[: len(without)] != without or len(without) == len(whole):
            number = task.examples[index]["ind"] + 1
            raise UserError(
                f"task {task.name}, example {number}: its continuation is empty, or its first "
                "token is not separate from the context"
            )
        rows = [whole]
        starts = [len(without)]

    texts = []
    for row, start in zip(rows, starts):
        # The reference stops if less than a scored text is left. Here, all is scored that fits.
        num_cut = max(0, len(row) - block_size)
        texts.append(Text(row[num_cut:], max(1, start - num_cut), num_cut))
    return texts


def common_length(rows: list[list[int]]) -> int:
    """How many tokens all rows begin with."""
    length = 0
    for tokens in zip(*rows):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length


def make_requests(texts: list[Text]) -> list[tuple[Request, list[int]]]:
    """The requests of an example, each with the numbers of the texts that it scores.

    Texts that begin at the same position and with the same token are one request, in which the
    scoring engine computes what they share only once: the shots, and usually the question. Texts
    that were cut differently share nothing, because each token has another position.
    """
    # Group the texts by what they begin with: position and token.
    groups: dict[tuple[int, int], list[int]] = {}
    for number, text in enumerate(texts):
        # One answer may be the beginning of another. It has no token of its own, thus no score.
        if text.start < len(text.tokens):
            groups.setdefault((text.num_cut, text.tokens[0]), []).append(number)

    # The first token is the context, because the engine needs one. The others are continuations, of
    # which only the tokens from `start` on are scored.
    requests = []
    for (_, first_token), numbers in groups.items():
        continuations = [texts[number].tokens[1:] for number in numbers]
        unscored = [texts[number].start - 1 for number in numbers]
        requests.append((Request([first_token], continuations, unscored), numbers))
    return requests


# ---------------------------------------------------------------------------------------------
# Results


@dataclass
class Result:
    """What a model reaches on a task."""

    task: Task
    hits: list[bool] = field(default_factory=list)  # for each example, whether it is right
    lines: list[dict] = field(default_factory=list)  # for each example, the prediction
    num_texts: int = 0
    num_cut: int = 0  # texts that are longer than the context
    tokens: int = 0  # tokens that the model reads
    reference_tokens: int = 0  # tokens that it would read if each text were read by itself

    @property
    def accuracy(self) -> Metric:
        return accuracy(self.task.name, self.hits)

    @property
    def centered(self) -> Metric:
        metric = self.accuracy
        scale = 1 - self.task.chance
        stderr = None if metric.stderr is None else metric.stderr / scale
        return Metric(metric.name, (metric.value - self.task.chance) / scale, stderr=stderr)


def evaluate_tasks(
    model: GPT, enc: tiktoken.Encoding, core_tasks: list[Task], rt: Runtime
) -> list[Result]:
    results = []
    # All examples of each task, in order
    for number, task in enumerate(core_tasks, 1):
        title = f"CORE {number}/{len(core_tasks)}, {task.name}"
        indices = range(len(task.examples))
        results.append(evaluate_task(model, enc, task, indices, rt, title))
    return results


def evaluate_task(
    model: GPT, enc: tiktoken.Encoding, task: Task, indices: range, rt: Runtime, title: str
) -> Result:
    """Evaluate the examples with these numbers. All ranks return the same."""
    result = Result(task)
    for start in range(0, len(indices), CHUNK):
        # Tokenize the texts of a chunk of examples, and collect their requests.
        chunk = indices[start : start + CHUNK]
        texts = [make_texts(enc, task, index, model.config.block_size) for index in chunk]
        requests = []
        places = []  # for each request: which example, and which of its texts
        for example, example_texts in enumerate(texts):
            for request, numbers in make_requests(example_texts):
                requests.append(request)
                places.append((example, numbers))

        # Score the chunk. The title tells how far a large task has come.
        desc = title if len(indices) <= CHUNK else f"{title}, from {start}"
        scores = score(model, requests, rt, desc=desc)

        # Put the scores of each example together again.
        by_example: list[dict] = [{} for _ in chunk]
        # A text without a request gets no score.
        for (example, numbers), request_scores in zip(places, scores):
            by_example[example].update(zip(numbers, request_scores))
        for index, example_texts, by_text in zip(chunk, texts, by_example):
            add_prediction(result, task.examples[index], len(example_texts), by_text)

        # Count the tokens that were read, and those that would be without sharing.
        for example_texts in texts:
            result.num_texts += len(example_texts)
            result.num_cut += sum(text.num_cut > 0 for text in example_texts)
            result.reference_tokens += sum(len(text.tokens) for text in example_texts)
        for request in requests:
            result.tokens += sum(map(len, make_rows(request, 0, model.config.block_size)))
    return result


def add_prediction(result: Result, example: dict, num_texts: int, scores: dict):
    """Add an example, whose texts have `scores` by number."""
    line = dict(task=result.task.name, ind=example["ind"])
    if result.task.kind == "language_modeling":
        # In a context of a single token, nothing of the continuation is left.
        hit = bool(scores) and scores[0].greedy
        line["logprob"] = scores[0].logprob if scores else None
    else:
        # The mean loss of each text; nan for a text that could not be scored
        losses = [nan] * num_texts
        for number, text_score in scores.items():
            losses[number] = -text_score.logprob / text_score.num_tokens
        # As in the reference, Python's own rules decide: the first of equal losses, and a text
        # without a score only if it is the first.
        prediction = losses.index(min(losses))
        hit = prediction == example["gold"]
        line |= dict(gold=example["gold"], pred=prediction)
        # JSON has no NaN.
        line["losses"] = [
            losses[number] if number in scores else None for number in range(num_texts)
        ]
    result.hits.append(hit)
    result.lines.append(line | dict(right=hit))


def core_metric(results: list[Result]) -> Metric:
    """The mean of the centered accuracies. The tasks' errors are independent."""
    centered = [result.centered for result in results]
    value = sum(metric.value for metric in centered) / len(centered)
    stderrs = [metric.stderr for metric in centered if metric.stderr is not None]
    # A task of one example has no standard error, so the mean has none either.
    stderr = None
    if len(stderrs) == len(centered):
        stderr = sqrt(sum(error**2 for error in stderrs)) / len(stderrs)
    return Metric("CORE", value, stderr=stderr)


def evaluate(
    model: GPT,
    enc: tiktoken.Encoding,
    core_tasks: list[Task],
    rt: Runtime,
    limit: int | None = None,
) -> tuple[list[Metric], list[dict]]:
    """CORE and the accuracy of each task; for each example the prediction."""
    # Training loads all examples, and evaluates the first ones.
    core_tasks = [cut_task(task, limit) for task in core_tasks]

    results = evaluate_tasks(model, enc, core_tasks, rt)
    metrics = [core_metric(results), *[result.accuracy for result in results]]
    return metrics, [line for result in results for line in result.lines]


# ---------------------------------------------------------------------------------------------
# Output


def results_table(name: str, closest: str, results: list[Result], rt: Runtime) -> str:
    """A row per task, with the published accuracy of OpenAI's closest model; then CORE, next to
    what others published."""
    # The tasks
    reference = REFERENCES["core"]
    rows = []
    for result in results:
        task = result.task
        metric = result.accuracy
        published = metric.format(reference.published(task.name, closest))
        shots = str(task.shots)
        count = str(len(result.hits))
        rows.append(
            (task.name, task.kind, shots, count, str(metric), str(result.centered), published)
        )
    head = (f"task, {rt.dtype_name}", "type", "shots", "examples", f"accuracy of {name}")
    text = table((*head, "centered", f"accuracy of {closest}, published"), rows)

    # CORE: this model, OpenAI's, and those of nanochat's leaderboard
    core = core_metric(results)
    figures = [(name, str(core), f"this run, {len(results)} tasks")]
    for model in OPENAI_MODELS:
        figure = reference.published("CORE", model)
        figures.append((model, core.format(figure), "published by nanochat"))
    for title, figure in CORE_LEADERBOARD.items():
        figures.append((title, core.format(figure), "nanochat's leaderboard"))
    return f"{text}\n\n{table(('model', 'CORE', 'source'), figures)}\n"


def describe_tokens(results: list[Result], block_size: int) -> str:
    tokens = sum(result.tokens for result in results)
    reference_tokens = sum(result.reference_tokens for result in results)
    num_cut = sum(result.num_cut for result in results)
    num_texts = sum(result.num_texts for result in results)
    return (
        f"tokens read: {tokens:,}; the reference, which reads each text by itself: "
        f"{reference_tokens:,}, {reference_tokens / tokens:.2f} times as many\n"
        f"texts longer than the context of {block_size:,} tokens, which lost their beginning: "
        f"{num_cut:,} of {num_texts:,}"
    )


def draw(path: Path, name: str, closest: str, results: list[Result]):
    """Bars of the accuracy by task, next to OpenAI's closest model where a figure is published."""
    from matplotlib.figure import Figure

    # Two bars per task: this model, and below it OpenAI's closest one. A dotted line is chance.
    figure = Figure((9, 1.5 + 0.4 * len(results)), layout="constrained")
    ax = figure.subplots()
    for row, result in enumerate(results):
        metric = result.accuracy
        ax.barh(row - 0.2, metric.value, 0.4, xerr=metric.stderr, color="#0072B2", ecolor="grey")
        published = REFERENCES["core"].published(result.task.name, closest)
        if published is not None:
            ax.barh(row + 0.2, published, 0.4, color="#E69F00")
        ax.plot([result.task.chance] * 2, [row - 0.45, row + 0.45], "k:")

    # Empty bars and lines, for the legend only
    core = core_metric(results)
    ax.barh(0, 0, color="#0072B2", label=f"{name}: CORE {core}")
    figure_of_closest = REFERENCES["core"].published("CORE", closest)
    label = f"OpenAI's {closest}: CORE {core.format(figure_of_closest)} (six tasks are published)"
    ax.barh(0, 0, color="#E69F00", label=label)
    ax.plot([], [], "k:", label="chance")

    # The first task is at the top.
    ax.set_yticks(range(len(results)), [result.task.name for result in results])
    ax.invert_yaxis()
    ax.xaxis.set_major_formatter("{x:.0%}")
    ax.set(title="CORE by task", xlabel="accuracy, with its standard error")
    figure.legend(loc="outside lower center")

    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as file:
        figure.savefig(file, format="png", dpi=150)
    say(path)


BENCHMARK = Benchmark(
    name="core",
    reference=REFERENCES["core"],
    load=load,
    evaluate=evaluate,
    # A part of the examples, because all of them take too long during training.
    evaluate_headline=partial(evaluate, limit=TRAINING_LIMIT),
    data_fingerprint=data_fingerprint,
)


if __name__ == "__main__":
    run_script(main, config)
