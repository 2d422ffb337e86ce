"""Redundant attention heads: which heads of a model look at the same tokens, and how many can be removed?

    python -m experiments.head_study --model gpt2  # OpenAI's 124M on FineWeb-Edu's validation shard
    python -m experiments.head_study  # log/model_final.pt
    python -m experiments.head_study --model log/quickstart/model_final.pt --data_dir datasets/pydoc --val_tokens 60000 \\
        --hellaswag_limit 0                                     # in small, on the quickstart's model

Two heads are alike if they attend to the same tokens: the cosine between their attention distributions, averaged over
the tokens of validation text (all but a text's first, which sees only itself). Heads are then removed, each layer
keeping one at least, in three orders:

    redundancy  of the two heads of a layer that are most alike, the one that is more like the others; again and again
    importance  Michel et al. 2019 ("Are Sixteen Heads Really Better than One?"): the mean over training texts of the
                loss's absolute gradient in a mask on the head's output, divided by the layer's norm; smallest first
    random      the control, from several seeds

The scores are those of the whole model throughout, and nothing is trained in between. Redundancy is taken on the
validation text on which perplexity is, importance on training text. How to read it: an order is worth something where
its perplexity lies below the random one's, and heads that are alike can be spared only if redundancy does, too. The
report names the largest share that costs less than 5% of perplexity; model_pruned.pt is the best such model, which
every other stage reads like any other.

Run again after a stop, it goes on where it was. Results: report.md, results.json and pictures in log/head_study/.
"""

import hashlib
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass

import numpy as np
import tiktoken
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

import hellaswag
from common import checkpoint, runtime
from common.console import Progress, UserError, cli, say, table, write_atomically, write_text
from common.runtime import Runtime
from common.scoring import stream_loss
from common.shards import manifest_checksum, open_shards, shards_tokenizer
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
from experiments.sweep import Results, read_windows
from model import GPT, GPTConfig

ALIKE = 0.85  # cosine above which two heads are listed as a pair
COST = 0.05  # more perplexity than the whole model's
SHOWN = 48  # tokens of the patterns in the picture
ROUNDS = 7  # of the measurement of speed


@dataclass
class Config:
    model: str = "log/model_final.pt"  # a checkpoint, a Hugging Face folder, or gpt2 ... gpt2-xl
    data_dir: str = "datasets/edu_fineweb10B"  # folder of shards that fineweb.py wrote
    out_dir: str = "log/head_study"  # report, numbers, pictures and the pruned model
    T: int = 1024  # sequence length in tokens; at most the model's context
    B: int = 8  # sequences per forward pass
    num_sequences: int = 32  # texts of T tokens for the patterns, and as many for the importance
    shares: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5)  # of the heads to remove
    random_orders: int = 5  # seeds of the control
    val_tokens: int = 1_000_000  # tokens of the validation shard for the perplexity
    hellaswag_data: str | None = (
        None  # hellaswag_val.jsonl; None = downloaded once to datasets/hellaswag
    )
    hellaswag_limit: int | None = None  # only the first so many examples; 0 = no HellaSwag
    device: str = "auto"  # cuda, mps or cpu; auto takes the first there is
    dtype: runtime.Dtype = (
        "auto"  # of matrix products; auto = bfloat16 where the hardware is fast at it
    )

    def __post_init__(self):
        for name, least in (
            ("T", 2),
            ("B", 1),
            ("num_sequences", 1),
            ("random_orders", 1),
            ("val_tokens", 2),
        ):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}, must be at least {least}")
        if not self.shares or not all(0 < share < 1 for share in self.shares):
            raise UserError("shares must hold at least one, each between 0 and 1")


def main(config: Config):
    rt = runtime.start(config.device, config.dtype)
    model, enc = checkpoint.load_model(config.model)
    model.to(rt.device).eval().requires_grad_(False)
    config.T = min(config.T, model.config.block_size)
    train, val = open_shards(config.data_dir, "train"), open_shards(config.data_dir, "val")
    if tokenizer_to_text(shards_tokenizer(config.data_dir)) != tokenizer_to_text(enc):
        raise UserError(
            f"the shards in {config.data_dir} were made with another tokenizer than {config.model}"
        )
    tokens = val.read(0, 0, min(config.val_tokens + 1, val.lengths[0]))
    if len(tokens) <= config.T:
        raise UserError(
            f"{len(tokens)} validation tokens do not fill T = {config.T}: lower T or raise val_tokens"
        )
    config.shares = usable_shares(config, model)
    examples = load_hellaswag(config)
    settings = asdict(config) | dict(
        model=checkpoint.fingerprint(config.model), data=manifest_checksum(config.data_dir)
    )
    settings |= dict(
        dtype=str(rt.dtype), hellaswag=hashlib.sha256(json.dumps(examples).encode()).hexdigest()
    )
    for key in ("data_dir", "out_dir", "B", "device", "hellaswag_data", "hellaswag_limit"):
        del settings[key]
    results = Results(config.out_dir, settings)

    if not (results.folder / "similarity.npy").exists():
        texts, _ = read_windows(val, config.num_sequences, config.T)
        similarity, patterns = attention_similarity(model, texts, rt, SHOWN)
        draw_patterns(results, model.config, patterns)
        with write_atomically(
            results.folder / "similarity.npy"
        ) as file:  # 1,200 x 1,200 for GPT-2 XL
            np.save(file, similarity)
    similarity = np.load(results.folder / "similarity.npy")
    if "importance" not in results:
        texts, targets = read_windows(train, config.num_sequences, config.T)
        results["importance"] = head_importance(model, texts, targets, config.B, rt).tolist()
        results.save()
    orders = {
        "redundancy": [order_by_redundancy(model.config, similarity)],
        "importance": [order_by_importance(model.config, np.array(results["importance"]))],
        "random": [order_at_random(model.config, seed) for seed in range(config.random_orders)],
    }
    plan = make_plan(config, model, orders)
    for name, removed in Progress(plan.items(), desc="pruned models", unit="model"):
        if name not in results:
            pruned = prune_heads(model, remaining(model.config, removed))
            results[name] = measure(pruned, enc, tokens, examples, config, rt)
            results.save()
    if "speed" not in results:
        results["speed"] = {
            f"{share:g}": compare_speed(
                model, orders["importance"][0][: count_heads(model, share)], tokens, config, rt
            )
            for share in Progress(config.shares, desc="speed", unit="model", leave=False)
        }
        results.save()
    summarize(config, model, enc, rt, results, similarity, orders)


def load_hellaswag(config: Config) -> list[dict]:
    if config.hellaswag_limit == 0:
        return []
    try:
        return hellaswag.load(config.hellaswag_data, config.hellaswag_limit)
    except OSError as error:
        if config.hellaswag_data:
            raise
        say(f"warning: going on without HellaSwag: {error}")
        return []


def usable_shares(config: Config, model: GPT) -> tuple[float, ...]:
    """The shares that stand for different numbers of heads. Raises ValueError if one leaves a layer without any."""
    by_count = {count_heads(model, share): share for share in sorted(config.shares, reverse=True)}
    by_count.pop(0, None)
    if not by_count:
        raise UserError(
            f"the shares {config.shares} of {sum(model.config.heads)} heads are not one: raise shares"
        )
    if max(by_count) > sum(model.config.heads) - model.config.n_layer:
        raise UserError(
            f"a share of {max(config.shares)} leaves layers of {config.model} without a head: lower shares"
        )
    return tuple(sorted(by_count.values()))


def count_heads(model: GPT, share: float) -> int:
    """Heads that are removed for a share of all."""
    return round(share * sum(model.config.heads))


def make_plan(
    config: Config, model: GPT, orders: dict[str, list[list[Head]]]
) -> dict[str, list[Head]]:
    """The models to evaluate: name -> the heads that it lacks."""
    plan = {"whole model": []}
    for share in config.shares:
        count = count_heads(model, share)
        for order, sequences in orders.items():
            for number, sequence in enumerate(sequences):
                plan[model_name(order, number, share)] = sequence[:count]
    return plan


def model_name(order: str, number: int, share: float) -> str:
    return f"{order} {number} {share:g}" if order == "random" else f"{order} {share:g}"


def measure(
    model: GPT,
    enc: tiktoken.Encoding,
    tokens: np.ndarray,
    examples: list[dict],
    config: Config,
    rt: Runtime,
) -> dict:
    loss = stream_loss(model, tokens, config.B, config.T, rt)
    result = dict(
        heads=list(model.config.heads),
        parameters=model.num_params(),
        loss=loss,
        perplexity=math.exp(loss),
    )
    if examples:
        metrics, _ = hellaswag.evaluate(model, enc, examples, rt, styles=("completion",))
        result["hellaswag"] = metrics[1].value
    return result


@torch.no_grad()
def compare_speed(
    model: GPT, removed: list[Head], tokens: np.ndarray, config: Config, rt: Runtime
) -> dict:
    """Forward passes of the whole and the pruned model, one after the other: medians in tokens/s."""
    pruned = prune_heads(model, remaining(model.config, removed)).eval()
    count = min(config.B, (len(tokens) - 1) // config.T) * config.T
    x, y = (
        torch.from_numpy(tokens[n : n + count].astype(np.int64)).view(-1, config.T).to(rt.device)
        for n in (0, 1)
    )
    rates = {"whole": [], "pruned": []}
    for n in range(ROUNDS + 1):  # the first warms up
        for name, candidate in (("whole", model), ("pruned", pruned)):
            began = time.perf_counter()
            with rt.autocast():
                candidate(x, y).item()
            if n:
                rates[name].append(count / (time.perf_counter() - began))
    return {name: statistics.median(measured) for name, measured in rates.items()}


def summarize(
    config: Config,
    model: GPT,
    enc: tiktoken.Encoding,
    rt: Runtime,
    results: Results,
    similarity: np.ndarray,
    orders: dict[str, list[list[Head]]],
):
    best = {order: cheap_share(config, results, orders, order) for order in orders}
    text = "\n\n".join(
        (
            f"{config.model}: {sum(model.config.heads)} heads in {model.config.n_layer} layers",
            layers_table(model.config, similarity),
            f"Pairs above {ALIKE}:\n\n{list_pairs(model.config, similarity)}",
            pruning_table(config, model, rt, results, orders),
            f"Random: mean (lowest to highest) of {config.random_orders} orders.",
            table(
                ("order", f"largest share that costs less than {COST:.0%} of perplexity"),
                [(order, f"{share:.0%}") for order, share in best.items()],
            ),
        )
    )
    order = max(("importance", "redundancy"), key=lambda order: best[order])
    if best[order]:
        pruned = prune_heads(
            model, remaining(model.config, orders[order][0][: count_heads(model, best[order])])
        )
        state = dict(
            model=pruned.state_dict(),
            config=pruned.config_dict(),
            tokenizer=tokenizer_to_text(enc),
            step=0,
        )
        checkpoint.save(results.folder / "model_pruned.pt", state)
        text += f"\n\nmodel_pruned.pt: {best[order]:.0%} of the heads removed by {order}"
    write_text(results.folder / "report.md", text + "\n")
    draw_similarity(results, model.config, similarity)
    draw_pruning(config, results, orders)
    say(
        f"{text}\n\n{results.folder}/report.md, {results.folder}/results.json and pictures beside them"
    )


def figures_of(results: Results, orders: dict, order: str, share: float, key: str) -> list[float]:
    """A figure of the models that an order gives at a share of removed heads: one, or one for each random order."""
    if not share:
        return [results["whole model"][key]]
    return [results[model_name(order, number, share)][key] for number in range(len(orders[order]))]


def cheap_share(config: Config, results: Results, orders: dict, order: str) -> float:
    """The largest share up to which the (mean) perplexity stays below the whole model's and COST."""
    cheap = 0.0
    for share in sorted(config.shares):
        limit = (1 + COST) * results["whole model"]["perplexity"]
        if np.mean(figures_of(results, orders, order, share, "perplexity")) >= limit:
            break
        cheap = share
    return cheap


def layers_table(config: GPTConfig, similarity: np.ndarray) -> str:
    """How alike the heads of a layer are, in the early, middle and late third of the layers, and those of others."""
    layers, pairs = (
        np.array([layer for layer, _ in all_heads(config)]),
        similar_pairs(config, similarity),
    )
    rows = []
    for third, name in zip(
        np.array_split(np.arange(config.n_layer), 3), ("early", "middle", "late")
    ):
        cosines = np.array([similarity[i, j] for i, j in pairs if layers[i] in third])
        if len(cosines):
            numbers = f"{name}: {third[0]}-{third[-1]}"
            rows.append(
                (numbers, str(len(cosines)), str((cosines > ALIKE).sum()), f"{cosines.mean():.3f}")
            )
    others = similarity[layers[:, None] < layers]
    if len(others):
        rows.append(
            (
                "between layers",
                str(len(others)),
                str((others > ALIKE).sum()),
                f"{others.mean():.3f}",
            )
        )
    return table(("layers", "pairs of heads", f"above {ALIKE}", "mean cosine"), rows)


def list_pairs(config: GPTConfig, similarity: np.ndarray) -> str:
    heads, lines = all_heads(config), {}
    for i, j in similar_pairs(config, similarity):
        if similarity[i, j] > ALIKE:
            lines.setdefault(heads[i][0], []).append(
                f"{heads[i][1]}-{heads[j][1]} ({similarity[i, j]:.2f})"
            )
    return (
        "\n".join(f"- layer {layer}: {', '.join(lines[layer])}" for layer in sorted(lines))
        or "none"
    )


def pruning_table(config: Config, model: GPT, rt: Runtime, results: Results, orders: dict) -> str:
    figures = {"perplexity": ("perplexity", "{:.2f}"), "HellaSwag": ("hellaswag", "{:.2%}")}
    if "hellaswag" not in results["whole model"]:
        del figures["HellaSwag"]
    head = ["heads removed", *(f"{name}, {order}" for name in figures for order in orders)]
    rate = statistics.median(speed["whole"] for speed in results["speed"].values())
    rows, whole_speed = [], dict(whole=rate, pruned=rate)
    for share in (0.0, *sorted(config.shares)):
        count = count_heads(model, share)
        row = [f"{share:.0%} ({count})"]
        for key, style in figures.values():
            for order in orders:
                found = figures_of(results, orders, order, share, key)
                low, mean, high = (style.format(f(found)) for f in (min, np.mean, max))
                row.append(mean if len(found) == 1 else f"{mean} ({low} to {high})")
        speed = results["speed"][f"{share:g}"] if share else whole_speed
        cache = (
            2
            * torch.finfo(rt.dtype).bits
            // 8
            * (sum(model.config.heads) - count)
            * model.config.head_dim
        )
        row.append(f"{figures_of(results, orders, 'importance', share, 'parameters')[0]:,}")
        rows.append(
            (*row, f"{cache:,}", f"{speed['pruned']:,.0f} ({speed['pruned'] / speed['whole']:.2f})")
        )
    return table(
        (*head, "parameters", "KV cache, bytes a token", "tokens/s (to the whole model's)"), rows
    )


def draw_patterns(results: Results, config: GPTConfig, patterns: np.ndarray):
    """The mean attention of every head, a row for each layer."""
    size = patterns.shape[-1]
    canvas = np.full((config.n_layer * (size + 2), config.n_head * (size + 2)), np.nan)
    for (layer, head), pattern in zip(all_heads(config), patterns):
        top, left = layer * (size + 2), head * (size + 2)
        canvas[top : top + size, left : left + size] = (
            np.where(np.tri(size), pattern, np.nan) ** 0.5
        )
    figure = Figure((2 + 0.8 * config.n_head, 1 + 0.8 * config.n_layer), layout="constrained")
    ax = figure.subplots()
    ax.imshow(canvas, vmin=0, vmax=1)
    ax.set_xticks(np.arange(config.n_head) * (size + 2) + size / 2, range(config.n_head))
    ax.set_yticks(np.arange(config.n_layer) * (size + 2) + size / 2, range(config.n_layer))
    ax.set(
        xlabel="head",
        ylabel="layer",
        title=f"Square root of the mean attention, first {size} tokens",
    )
    results.save_picture("patterns.png", figure)


def draw_similarity(results: Results, config: GPTConfig, similarity: np.ndarray):
    """Heat maps of the cosines: of each layer, and of all heads together."""
    columns = math.ceil(config.n_layer**0.5)
    rows = math.ceil(config.n_layer / columns)
    figure = Figure((3 * columns + 1, 3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    ends = np.cumsum((0, *config.heads))
    for layer, ax in enumerate(axes):
        if layer >= config.n_layer:
            ax.axis("off")
            continue
        part = slice(ends[layer], ends[layer + 1])
        image = ax.imshow(similarity[part, part], vmin=0, vmax=1)
        ax.set(
            title=f"layer {layer}",
            xticks=range(config.heads[layer]),
            yticks=range(config.heads[layer]),
        )
        ax.tick_params(labelsize="x-small")
    figure.colorbar(image, ax=axes, label="cosine between the heads' attention")
    results.save_picture("similarity_by_layer.png", figure)

    figure = Figure((9, 8), layout="constrained")
    ax = figure.subplots()
    figure.colorbar(
        ax.imshow(similarity, vmin=0, vmax=1), label="cosine between the heads' attention"
    )
    ax.set_xticks((ends[:-1] + ends[1:] - 1) / 2, range(config.n_layer))
    ax.set_yticks((ends[:-1] + ends[1:] - 1) / 2, range(config.n_layer))
    for end in ends[1:-1]:
        ax.axhline(end - 0.5, color="white", lw=0.5)
        ax.axvline(end - 0.5, color="white", lw=0.5)
    ax.set(xlabel="layer", ylabel="layer", title="All heads")
    results.save_picture("similarity.png", figure)


def draw_pruning(config: Config, results: Results, orders: dict):
    panels = {"perplexity": "perplexity", "hellaswag": "HellaSwag, acc_norm"}
    panels = {key: title for key, title in panels.items() if key in results["whole model"]}
    figure = Figure((5.5 * (1 + len(panels)), 4.5), layout="constrained")
    *axes, right = figure.subplots(1, 1 + len(panels))
    shares = [0.0, *sorted(config.shares)]
    for ax, (key, title) in zip(axes, panels.items()):
        for order, color in zip(orders, ("tab:orange", "tab:blue", "grey")):
            found = [figures_of(results, orders, order, share, key) for share in shares]
            ax.plot(shares, [np.mean(v) for v in found], color=color, marker="o", label=order)
            if max(map(max, found)) > 5 * found[0][0]:
                ax.set_yscale("log")
            ax.fill_between(
                shares, list(map(min, found)), list(map(max, found)), color=color, alpha=0.2, lw=0
            )
        ax.set(ylabel=title)
    limit = (1 + COST) * results["whole model"]["perplexity"]
    axes[0].axhline(limit, color="grey", ls=":", label=f"{COST:.0%} more")
    parameters = [
        figures_of(results, orders, "importance", share, "parameters")[0] for share in shares
    ]
    speeds = [
        1.0,
        *(
            s["pruned"] / s["whole"]
            for s in (results["speed"][f"{share:g}"] for share in shares[1:])
        ),
    ]
    right.plot(shares, np.array(parameters) / parameters[0], marker="o", label="parameters")
    right.plot(shares, speeds, marker="o", label="tokens/s, forward pass")
    right.set(ylabel="against the whole model")
    for ax in (*axes, right):
        ax.set(xlabel="share of heads removed")
        ax.xaxis.set_major_formatter(PercentFormatter(1))
        ax.grid(alpha=0.3)
        ax.legend()
    results.save_picture("pruning.png", figure)


if __name__ == "__main__":
    cli(Config, main, __doc__)
