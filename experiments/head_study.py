"""Redundant attention heads: which heads attend to the same tokens, and how many can be removed?

    python -m experiments.head_study --model gpt2  # OpenAI's 124M, on FineWeb-Edu
    python -m experiments.head_study               # log/model_final.pt

    # at small scale, on the quickstart's model
    python -m experiments.head_study --model log/quickstart/model_final.pt \\
        --data_dir datasets/pydoc --val_tokens 60000 --hellaswag_limit 0

Two heads are similar if they attend to the same tokens. The measure is the cosine between their
attention distributions, averaged over the tokens of validation text (without the first token of
each text, which can only attend to itself). Heads are then removed in three orders, down to one
head per layer:

    redundancy  repeatedly take the most similar pair of heads in a layer, and remove the one that
                is more similar to the other heads of the layer
    importance  Michel et al. 2019 ("Are Sixteen Heads Really Better than One?"): the least
                important first. Importance is the absolute gradient of the loss in a mask on the
                head's output, averaged over training texts, divided by the norm of its layer.
    random      the control, with several seeds

All scores are those of the complete model, and nothing is trained after the removal. Similarity is
measured on validation text, as is perplexity, and importance on training text.

How to read the results: an order is useful where its perplexity is below that of the random orders.
Similar heads are dispensable only if this holds for the order by redundancy. The report names the
largest fraction of heads that can be removed at a cost of less than 5% in perplexity. The best such
model is saved as model_pruned.pt, which every other stage can load.

An interrupted study resumes when the command is repeated. Output: report.md, results.json, plots
and model_pruned.pt in log/head_study/.
"""

import hashlib
import json
import math
import statistics
import time
from dataclasses import dataclass
from functools import partial

import common.before_torch

from common.console import (
    Progress,
    UserError,
    check_at_least,
    parse_flags,
    run_script,
    say,
    table,
    write_atomically,
)
from experiments.flags import StudyConfig


@dataclass
class Config(StudyConfig):
    model: str = "log/model_final.pt"  # a checkpoint, a Hugging Face folder, or gpt2 ... gpt2-xl
    data_dir: str = "datasets/edu_fineweb10B"  # folder of shards, written by fineweb.py
    out_dir: str = "log/head_study"  # folder for the report, results.json, plots and pruned model
    T: int = 1024  # sequence length in tokens; at most the context length of the model
    B: int = 8  # sequences per forward pass
    # texts of T tokens from which similarity is measured, and as many for importance
    num_sequences: int = 32
    # fractions of the heads to remove
    prune_fractions: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5)
    random_orders: int = 5  # number of random orders, the control
    val_tokens: int = 1_000_000  # tokens of the validation shard for the perplexity
    # hellaswag_val.jsonl; None = downloaded once to datasets/hellaswag
    hellaswag_data: str | None = None
    hellaswag_limit: int | None = None  # number of HellaSwag examples, 0 = none, None = all

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 2, "T", "val_tokens")
        check_at_least(self, 1, "num_sequences", "random_orders")
        check_at_least(self, 0, "hellaswag_limit")
        if not self.prune_fractions or not all(0 < f < 1 for f in self.prune_fractions):
            raise UserError(
                f"prune_fractions is {self.prune_fractions}: give one or more between 0 and 1"
            )


if __name__ == "__main__":
    config = parse_flags(Config, __doc__)  # before the slow imports: --help answers at once

import numpy as np
import tiktoken
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

import hellaswag
from common import checkpoint
from common.runtime import Runtime
from common.scoring import stream_loss
from common.shards import Shards, open_shards, shards_fingerprint, shards_tokenizer
from common.tokenizer import tokenizer_to_text
from experiments.pruning import (
    Head,
    all_heads,
    attention_similarity,
    head_importance,
    order_at_random,
    order_by_importance,
    order_by_redundancy,
    prune_heads,
    remaining,
    similar_pairs,
)
from experiments.sweep import StudyFolder, finish_axes, read_windows, settings_of, start
from model import GPT, GPTConfig

SIMILAR = 0.85  # cosine above which two heads are listed as a pair
MAX_COST = 0.05  # acceptable increase of perplexity, relative to the complete model
SHOWN_TOKENS = 48  # size of the attention patterns in the plot
# Timed rounds, of which the median counts. One more, before them, warms up.
SPEED_ROUNDS = 7
ORDER_COLORS = {"redundancy": "tab:orange", "importance": "tab:blue", "random": "grey"}

# For each order of removal its sequences of heads: one, or for "random" one per seed.
Orders = dict[str, list[list[Head]]]


@dataclass
class Inputs:
    """The model of the study, and its data."""

    model: GPT  # on the device, without gradients
    enc: tiktoken.Encoding
    train: Shards
    val: Shards
    tokens: np.ndarray  # validation tokens for the perplexity
    examples: list[dict]  # of HellaSwag; empty if it is left out


def main(config: Config):
    """Score the heads, remove them in several orders, and report what that costs."""
    rt = start(config)
    inputs = load_inputs(config, rt)
    model = inputs.model

    # Replace flags that this model does not allow. The settings contain what is really used.
    config.T = min(config.T, model.config.block_size)
    config.prune_fractions = usable_fractions(config, model)
    settings = settings_of(
        config,
        rt,
        may_change=["hellaswag_data", "hellaswag_limit"],
        # Fingerprints instead of paths: a moved file is the same model, a changed one is not.
        model=checkpoint.fingerprint(config.model),
        data=shards_fingerprint(config.data_dir),
        hellaswag=hashlib.sha256(json.dumps(inputs.examples).encode()).hexdigest(),
    )
    study = StudyFolder(config.out_dir, settings)

    # Score the heads, and put them in the order of their removal.
    similarity = measure_similarity(config, study, inputs, rt)  # (heads, heads)
    importance = study.once("importance", lambda: measure_importance(config, inputs, rt))
    orders = {
        "redundancy": [order_by_redundancy(model.config, similarity)],
        "importance": [order_by_importance(model.config, np.array(importance))],
        "random": [order_at_random(model.config, seed) for seed in range(config.random_orders)],
    }

    # Remove heads, and measure the models that remain.
    removed_heads = removed_by_name(config, model, orders)
    for name, removed in Progress(removed_heads.items(), desc="pruned models", unit="model"):
        study.once(name, partial(measure_model, config, inputs, removed, rt))
    # Speed depends on how many heads are removed, and hardly on which: one order is enough.
    study.once("speed", lambda: measure_speeds(config, inputs, orders, rt))

    # Save the model with the fewest heads among those that are good enough.
    cheap = {order: largest_cheap_fraction(config, study, orders, order) for order in orders}
    # The random orders are the control, not candidates.
    best = max(("importance", "redundancy"), key=lambda order: cheap[order])
    if cheap[best]:
        removed = removed_heads[model_name(best, 0, cheap[best])]
        pruned = prune_heads(model, remaining(model.config, removed))
        path = study.path / "model_pruned.pt"
        checkpoint.save(path, checkpoint.build(pruned, inputs.enc, step=0))
    summarize(config, inputs, rt, study, similarity, orders, cheap, best)


def load_inputs(config: Config, rt: Runtime) -> Inputs:
    """Load the model, the shards and HellaSwag. Raises UserError if they do not go together."""
    model, enc = checkpoint.load_model(config.model)
    # Nothing is trained. Importance takes gradients with respect to masks, not to weights.
    model.to(rt.device).eval().requires_grad_(False)

    # The numbers of tokens mean nothing to a model with another tokenizer.
    val = open_shards(config.data_dir, "val")
    if tokenizer_to_text(shards_tokenizer(config.data_dir)) != tokenizer_to_text(enc):
        raise UserError(
            f"the shards in {config.data_dir} were made with another tokenizer than {config.model}"
        )

    # One token more than val_tokens, because the first one is not predicted.
    tokens = val.read_first(config.val_tokens + 1)
    T = min(config.T, model.config.block_size)
    if len(tokens) <= T:
        raise UserError(
            f"{len(tokens)} validation tokens are fewer than T + 1 = {T + 1}: "
            f"lower T or raise val_tokens"
        )
    train = open_shards(config.data_dir, "train")
    return Inputs(model, enc, train, val, tokens, load_hellaswag(config))


def load_hellaswag(config: Config) -> list[dict]:
    """The examples of HellaSwag; none if they are left out or not available."""
    if config.hellaswag_limit == 0:
        return []
    try:
        return hellaswag.load(config.hellaswag_data, config.hellaswag_limit)
    except OSError as error:
        # Without a network the study is still useful. A file that was asked for must exist.
        if config.hellaswag_data:
            raise
        say(f"warning: continuing without HellaSwag: {error}")
        return []


def count_heads(model: GPT, fraction: float) -> int:
    """The number of heads to remove for a fraction of all."""
    return round(fraction * sum(model.config.heads))


def usable_fractions(config: Config, model: GPT) -> tuple[float, ...]:
    """The fractions without those that remove no head, or as many as a smaller fraction does.

    Raises UserError if none is left, or if one would leave a layer without a head.
    """
    total = sum(model.config.heads)
    # From the largest to the smallest, so that the smallest of equal ones is stored last.
    smallest = {}  # number of heads -> the smallest fraction that removes as many
    for fraction in sorted(config.prune_fractions, reverse=True):
        smallest[count_heads(model, fraction)] = fraction
    # Zero heads removed is the complete model, which is measured anyway.
    smallest.pop(0, None)

    if not smallest:
        raise UserError(
            f"each of prune_fractions {config.prune_fractions} rounds to zero heads of {total}: "
            f"give larger ones"
        )
    if max(smallest) > total - model.config.n_layer:
        raise UserError(
            f"removing {max(config.prune_fractions)} of the heads leaves layers of {config.model} "
            f"without a head: lower prune_fractions"
        )
    return tuple(sorted(smallest.values()))


# ---------------------------------------------------------------------------------------------
# Measurements


def measure_similarity(
    config: Config, study: StudyFolder, inputs: Inputs, rt: Runtime
) -> np.ndarray:
    """The similarity (heads, heads) of all pairs of heads. Also draws the attention patterns.

    It has its own file instead of an entry in results.json: GPT-2 XL has 1,200 x 1,200 pairs.
    """
    # The file appears last, and only when it is complete: if it exists, so does the plot.
    path = study.path / "similarity.npy"
    if not path.exists():
        texts, _ = read_windows(inputs.val, config.num_sequences, config.T)
        similarity, patterns = attention_similarity(inputs.model, texts, rt, SHOWN_TOKENS)
        draw_patterns(study, inputs.model.config, patterns)
        with write_atomically(path) as file:
            np.save(file, similarity)
    return np.load(path)


def measure_importance(config: Config, inputs: Inputs, rt: Runtime) -> list[float]:
    """The importance (heads,) of each head, as a list for results.json."""
    texts, targets = read_windows(inputs.train, config.num_sequences, config.T)
    return head_importance(inputs.model, texts, targets, config.B, rt).tolist()


def removed_by_name(config: Config, model: GPT, orders: Orders) -> dict[str, list[Head]]:
    """The models to measure: the name of each, and the heads that are removed from it."""
    # The control has several models per fraction, the other orders one.
    removed = {"whole model": []}
    for fraction in config.prune_fractions:
        for order, sequences in orders.items():
            for number, sequence in enumerate(sequences):
                name = model_name(order, number, fraction)
                removed[name] = sequence[: count_heads(model, fraction)]
    return removed


def model_name(order: str, number: int, fraction: float) -> str:
    """The name of a pruned model in results.json, such as "redundancy 0.3" or "random 2 0.3"."""
    return f"{order} {number} {fraction:g}" if order == "random" else f"{order} {fraction:g}"


def measure_model(config: Config, inputs: Inputs, removed: list[Head], rt: Runtime) -> dict:
    """Size, loss, perplexity and HellaSwag accuracy (acc_norm) of the model without these heads."""
    # A model that is really smaller, not a masked one: it is also the one that would be saved.
    model = prune_heads(inputs.model, remaining(inputs.model.config, removed))
    loss = stream_loss(model, inputs.tokens, config.B, config.T, rt)
    result = dict(
        heads=list(model.config.heads),
        parameters=model.num_params(),
        loss=loss,
        perplexity=math.exp(loss),
    )
    # In the "completion" style, the one of the curves in training
    if inputs.examples:
        metrics, _ = hellaswag.evaluate(
            model, inputs.enc, inputs.examples, rt, styles=("completion",)
        )
        by_name = {metric.name: metric.value for metric in metrics}
        result["hellaswag"] = by_name["completion acc_norm"]
    return result


def measure_speeds(config: Config, inputs: Inputs, orders: Orders, rt: Runtime) -> dict[str, dict]:
    """For each fraction the tokens/s of the complete and of the pruned model."""
    speeds = {}
    bar = Progress(config.prune_fractions, desc="speed", unit="model", leave=False)
    for fraction in bar:
        removed = orders["importance"][0][: count_heads(inputs.model, fraction)]
        speeds[f"{fraction:g}"] = compare_speed(config, inputs, removed, rt)
    return speeds


@torch.no_grad()
def compare_speed(config: Config, inputs: Inputs, removed: list[Head], rt: Runtime) -> dict:
    """Tokens/s of forward passes of the complete and the pruned model: medians of several."""
    model, tokens = inputs.model, inputs.tokens
    pruned = prune_heads(model, remaining(model.config, removed)).eval()
    # A batch of validation tokens; fewer than B sequences if there are no more
    count = min(config.B, (len(tokens) - 1) // config.T) * config.T
    stream = torch.from_numpy(tokens[: count + 1].astype(np.int64)).to(rt.device)
    x = stream[:-1].view(-1, config.T)  # (B, T)
    y = stream[1:].view(-1, config.T)  # (B, T)

    rates = {"whole": [], "pruned": []}
    for round_number in range(SPEED_ROUNDS + 1):
        # In turn, so that both see the same disturbances by other processes.
        for name, candidate in (("whole", model), ("pruned", pruned)):
            began = time.perf_counter()
            with rt.autocast():
                candidate(x, y).item()  # item() waits for the GPU
            if round_number > 0:  # the first round warms up
                rates[name].append(count / (time.perf_counter() - began))
    return {name: statistics.median(measured) for name, measured in rates.items()}


# ---------------------------------------------------------------------------------------------
# Report


def values_of(
    study: StudyFolder, orders: Orders, order: str, fraction: float, key: str
) -> list[float]:
    """A measurement of the models of an order: one value, or for "random" one per seed."""
    # Without a removed head, all orders are the same model.
    if fraction == 0:
        return [study.results["whole model"][key]]
    names = [model_name(order, number, fraction) for number in range(len(orders[order]))]
    return [study.results[name][key] for name in names]


def largest_cheap_fraction(config: Config, study: StudyFolder, orders: Orders, order: str) -> float:
    """The largest fraction up to which the mean perplexity rises by less than MAX_COST."""
    # Stop at the first fraction that costs too much: a larger one below the limit would be luck.
    limit = (1 + MAX_COST) * study.results["whole model"]["perplexity"]
    cheap = 0.0
    for fraction in sorted(config.prune_fractions):
        if np.mean(values_of(study, orders, order, fraction, "perplexity")) >= limit:
            break
        cheap = fraction
    return cheap


def summarize(
    config: Config,
    inputs: Inputs,
    rt: Runtime,
    study: StudyFolder,
    similarity: np.ndarray,
    orders: Orders,
    cheap: dict[str, float],
    best: str,
):
    """Write the report and the plots."""
    # What was studied, how similar the heads are, and what removing them costs
    shape = inputs.model.config
    paragraphs = [
        f"{config.model}: {sum(shape.heads)} heads in {shape.n_layer} layers",
        layers_table(shape, similarity),
        f"Pairs above {SIMILAR}:",
        list_pairs(shape, similarity),
        pruning_table(config, inputs.model, rt, study, orders),
        f"Random: mean (lowest to highest) of {config.random_orders} orders.",
        table(
            ("order", f"largest fraction that costs less than {MAX_COST:.0%} of perplexity"),
            [(order, f"{fraction:.0%}") for order, fraction in cheap.items()],
        ),
    ]

    # Nothing was saved if even the smallest fraction costs too much.
    if cheap[best]:
        paragraphs.append(f"model_pruned.pt: {cheap[best]:.0%} of the heads removed by {best}")
    study.report(*paragraphs)
    draw_layer_similarity(study, shape, similarity)
    draw_similarity(study, shape, similarity)
    draw_pruning(config, study, orders)


def layers_table(shape: GPTConfig, similarity: np.ndarray) -> str:
    """Similarity within layers (early, middle and late ones), and between different layers."""
    # Pairs within a layer, by the third of the model that the layer is in
    layers = np.array([layer for layer, _ in all_heads(shape)])  # (heads,)
    pairs = similar_pairs(shape, similarity)
    groups = {}
    thirds = np.array_split(np.arange(shape.n_layer), 3)
    for third, name in zip(thirds, ("early", "middle", "late")):
        cosines = [similarity[i, j] for i, j in pairs if layers[i] in third]
        if cosines:  # a model of fewer than three layers has empty thirds
            groups[f"{name}: {third[0]}-{third[-1]}"] = np.array(cosines)
    # Pairs of different layers, each counted once
    groups["between layers"] = similarity[layers[:, None] < layers]

    rows = []
    for name, cosines in groups.items():
        if len(cosines):
            num_similar = (cosines > SIMILAR).sum()
            rows.append((name, f"{len(cosines)}", f"{num_similar}", f"{cosines.mean():.3f}"))
    return table(("layers", "pairs of heads", f"above {SIMILAR}", "mean cosine"), rows)


def list_pairs(shape: GPTConfig, similarity: np.ndarray) -> str:
    """The similar pairs of each layer, the most similar first."""
    # Heads are numbered over all layers in the matrix, within their layer in the text.
    heads = all_heads(shape)
    by_layer = {}
    for i, j in similar_pairs(shape, similarity):
        if similarity[i, j] > SIMILAR:
            (layer, first), (_, second) = heads[i], heads[j]
            # For example "3-7 (0.91)": heads 3 and 7 of the layer
            pair = f"{first}-{second} ({similarity[i, j]:.2f})"
            by_layer.setdefault(layer, []).append(pair)
    lines = [f"- layer {layer}: {', '.join(by_layer[layer])}" for layer in sorted(by_layer)]
    return "\n".join(lines) or "none"


def pruning_table(
    config: Config, model: GPT, rt: Runtime, study: StudyFolder, orders: Orders
) -> str:
    """A row for each fraction: quality for each order, parameters, KV cache and speed."""
    # HellaSwag has columns only if it was measured.
    columns = [("perplexity", "perplexity", "{:.2f}")]  # key, title, format
    if "hellaswag" in study.results["whole model"]:
        columns.append(("hellaswag", "HellaSwag", "{:.2%}"))
    # The complete model was timed next to each pruned one: take the median for its row.
    speeds = study.results["speed"]
    whole_speed = statistics.median(speed["whole"] for speed in speeds.values())
    rows = []
    for fraction in (0.0, *sorted(config.prune_fractions)):
        count = count_heads(model, fraction)
        row = [f"{fraction:.0%} ({count})"]
        # Quality: one value, or the mean of the random orders with their range
        for key, _, style in columns:
            for order in orders:
                values = values_of(study, orders, order, fraction, key)
                cell = style.format(np.mean(values))
                if len(values) > 1:
                    cell += f" ({style.format(min(values))} to {style.format(max(values))})"
                row.append(cell)
        # Costs, which are the same for all orders
        parameters = values_of(study, orders, "importance", fraction, "parameters")[0]
        # A key and a value of head_dim numbers for each remaining head
        heads_left = sum(model.config.heads) - count
        cache = 2 * heads_left * model.config.head_dim * torch.finfo(rt.dtype).bits // 8
        speed = dict(whole=whole_speed, pruned=whole_speed)
        if fraction:
            speed = speeds[f"{fraction:g}"]
        relative_speed = speed["pruned"] / speed["whole"]
        row += [f"{parameters:,}", f"{cache:,}", f"{speed['pruned']:,.0f} ({relative_speed:.2f})"]
        rows.append(tuple(row))
    quality = [f"{title}, {order}" for _, title, _ in columns for order in orders]
    costs = ["parameters", "KV cache, bytes per token", "tokens/s (relative to the whole model)"]
    return table(("heads removed", *quality, *costs), rows)


# ---------------------------------------------------------------------------------------------
# Plots


def draw_patterns(study: StudyFolder, shape: GPTConfig, patterns: np.ndarray):
    """The mean attention (heads, size, size) of every head, one row of squares per layer."""
    size = patterns.shape[-1]
    pitch = size + 2  # a gap of two pixels between the squares
    # All patterns in one image, because hundreds of subplots would be slow
    canvas = np.full((shape.n_layer * pitch, shape.n_head * pitch), np.nan)
    for (layer, head), pattern in zip(all_heads(shape), patterns):
        top, left = layer * pitch, head * pitch
        visible = np.where(np.tri(size), pattern, np.nan)  # the past only
        # The square root makes weak attention visible.
        canvas[top : top + size, left : left + size] = np.sqrt(visible)

    # Size and labels: the number of a head or layer is at the middle of its square.
    figure = Figure((2 + 0.8 * shape.n_head, 1 + 0.8 * shape.n_layer), layout="constrained")
    ax = figure.subplots()
    ax.imshow(canvas, vmin=0, vmax=1)
    ax.set_xticks(np.arange(shape.n_head) * pitch + size / 2, range(shape.n_head))
    ax.set_yticks(np.arange(shape.n_layer) * pitch + size / 2, range(shape.n_layer))
    ax.set(xlabel="head", ylabel="layer")
    ax.set_title(f"Square root of the mean attention, first {size} tokens")
    study.save_plot("patterns.png", figure)


def draw_layer_similarity(study: StudyFolder, shape: GPTConfig, similarity: np.ndarray):
    """A heat map of the cosines for each layer."""
    # A grid that is about as wide as it is high
    columns = math.ceil(shape.n_layer**0.5)
    rows = math.ceil(shape.n_layer / columns)
    figure = Figure((3 * columns + 1, 3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    ends = np.cumsum((0, *shape.heads))  # layer n has the heads from ends[n] to ends[n + 1]
    for layer, ax in enumerate(axes):
        # The last row of the grid may have empty places.
        if layer >= shape.n_layer:
            ax.axis("off")
            continue
        part = slice(ends[layer], ends[layer + 1])
        image = ax.imshow(similarity[part, part], vmin=0, vmax=1)
        ticks = range(shape.heads[layer])
        ax.set(title=f"layer {layer}", xticks=ticks, yticks=ticks)
        ax.tick_params(labelsize="x-small")
    # All panels have the same scale from 0 to 1, so the bar of the last one is that of all.
    figure.colorbar(image, ax=axes, label="cosine between the heads' attention")
    study.save_plot("similarity_by_layer.png", figure)


def draw_similarity(study: StudyFolder, shape: GPTConfig, similarity: np.ndarray):
    """A heat map of the cosines between all heads."""
    figure = Figure((9, 8), layout="constrained")
    ax = figure.subplots()
    image = ax.imshow(similarity, vmin=0, vmax=1)
    figure.colorbar(image, label="cosine between the heads' attention")
    # The layers are blocks on the diagonal: their numbers at the middle, white lines between them
    ends = np.cumsum((0, *shape.heads))
    middles = (ends[:-1] + ends[1:] - 1) / 2
    ax.set_xticks(middles, range(shape.n_layer))
    ax.set_yticks(middles, range(shape.n_layer))
    for end in ends[1:-1]:
        ax.axhline(end - 0.5, color="white", lw=0.5)
        ax.axvline(end - 0.5, color="white", lw=0.5)
    ax.set(xlabel="layer", ylabel="layer", title="All heads")
    study.save_plot("similarity.png", figure)


def draw_pruning(config: Config, study: StudyFolder, orders: Orders):
    """Quality, parameters and speed by the fraction of removed heads."""
    titles = {"perplexity": "perplexity"}
    if "hellaswag" in study.results["whole model"]:
        titles["hellaswag"] = "HellaSwag, acc_norm"
    figure = Figure((5.5 * (1 + len(titles)), 4.5), layout="constrained")
    # Left: perplexity, and HellaSwag if it was measured
    *quality_axes, cost_ax = figure.subplots(1, 1 + len(titles))
    fractions = [0.0, *sorted(config.prune_fractions)]
    for ax, (key, title) in zip(quality_axes, titles.items()):
        draw_quality(ax, study, orders, fractions, key)
        ax.set_ylabel(title)

    # The limit up to which a fraction counts as cheap
    limit = (1 + MAX_COST) * study.results["whole model"]["perplexity"]
    quality_axes[0].axhline(limit, color="grey", ls=":", label=f"{MAX_COST:.0%} more")

    # Right: what is saved
    whole = study.results["whole model"]["parameters"]
    # The complete model has speed 1 by definition: speeds are ratios to it.
    parameters, speeds = [], [1.0]
    for fraction in fractions:
        [count] = values_of(study, orders, "importance", fraction, "parameters")
        parameters.append(count / whole)
    for fraction in fractions[1:]:
        speed = study.results["speed"][f"{fraction:g}"]
        speeds.append(speed["pruned"] / speed["whole"])
    cost_ax.plot(fractions, parameters, marker="o", label="parameters")
    cost_ax.plot(fractions, speeds, marker="o", label="tokens/s, forward pass")
    cost_ax.set_ylabel("relative to the whole model")

    for ax in (*quality_axes, cost_ax):
        ax.set_xlabel("fraction of heads removed")
        ax.xaxis.set_major_formatter(PercentFormatter(1))
    finish_axes(*quality_axes, cost_ax)
    study.save_plot("pruning.png", figure)


def draw_quality(ax: Axes, study: StudyFolder, orders: Orders, fractions: list[float], key: str):
    """A curve per order; for the random ones their mean, and a band from lowest to highest."""
    for order, color in ORDER_COLORS.items():
        values = [values_of(study, orders, order, fraction, key) for fraction in fractions]
        means = [np.mean(v) for v in values]
        lows = [min(v) for v in values]
        highs = [max(v) for v in values]
        ax.plot(fractions, means, color=color, marker="o", label=order)
        ax.fill_between(fractions, lows, highs, color=color, alpha=0.2, lw=0)
        # An order that ruins the model would hide the differences between the others.
        if max(highs) > 5 * means[0]:
            ax.set_yscale("log")


if __name__ == "__main__":
    run_script(main, config)
