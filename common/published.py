"""The figures that others published, each with its source. Our results are compared with them.

evaluate.py and the benchmarks print them in their tables, plot.py draws them as horizontal lines.
Each metric has one figure per model, so that every table and plot shows the same number. Where
sources differ, a comment says why. Models are named as in model.OPENAI_MODELS; gpt3-small ... are
those of GPT-3.

Sources:

    GPT-2 paper    Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"
    GPT-3 paper    Brown et al. 2020, "Language Models are Few-Shot Learners", arXiv:2005.14165
    build-nanogpt  https://github.com/karpathy/build-nanogpt, hellaswag.py and play.ipynb
    llm.c          https://github.com/karpathy/llm.c, dev/vislog.ipynb
    nanochat       https://github.com/karpathy/nanochat, README.md, dev/LEADERBOARD.md and
                   dev/estimate_gpt3_core.ipynb
    harness        https://github.com/EleutherAI/lm-evaluation-harness

This module imports nothing heavy: plot.py starts without torch.
"""

from dataclasses import dataclass

# Number of parameters. Those of GPT-2 are counted in the released weights, the tied embedding once.
# The GPT-2 paper has 117M, 345M, 762M and 1542M in table 2, which the README of
# https://github.com/openai/gpt-2 calls an error. Those of GPT-3 are from its paper, table 2.1.
PARAMETERS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "gpt3-small": 125e6,
    "gpt3-medium": 350e6,
    "gpt3-large": 760e6,
    "gpt3-xl": 1.3e9,
}


@dataclass(frozen=True)
class Reference:
    """What a benchmark's results are compared with, and which of its metrics training follows."""

    title: str  # name in tables and plots
    headline: str  # the metric that training logs and plot.py draws
    stream: str  # its name in log.txt and metrics.jsonl
    figures: dict[str, dict[str, float]]  # metric -> model -> published figure
    chance: float | None = None  # the headline metric of a model that guesses
    as_percent: bool = True  # how the headline metric is written

    def published(self, metric: str, model: str) -> float | None:
        return self.figures.get(metric, {}).get(model)


def openai_sizes(*figures: float) -> dict[str, float]:
    """Figures of gpt2, gpt2-medium, gpt2-large and gpt2-xl, by name."""
    return dict(zip(("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"), figures))


# One entry per benchmark, by the name that evaluate.py's flags use, and one for the validation
# loss. evaluate.py evaluates them in this order.
REFERENCES = {
    "hellaswag": Reference(
        title="HellaSwag",
        headline="completion acc_norm",
        stream="hella",
        chance=0.25,
        # Two renderings are in use; hellaswag.py describes them.
        figures={
            # build-nanogpt, hellaswag.py.
            "completion acc": {"gpt2": 0.2859, "gpt2-xl": 0.3842},
            # gpt2 and gpt2-xl: build-nanogpt, hellaswag.py, whose rendering is ours, in TF32.
            # gpt2-medium and gpt2-large: the notebooks of llm.c and build-nanogpt. For gpt2 and
            # gpt2-xl these have 0.294463 and 0.488946 instead. This is 2,957 and 4,910 of 10,042
            # examples, where the script has 2,967 and 4,914. The notebooks do not say how it was
            # computed. llm.c evaluates the same rendering in bfloat16 by default, and a
            # difference of ten examples is within its rounding.
            # gpt3-*: GPT-3 paper, table H.1, zero-shot; the paper does not give its rendering.
            "completion acc_norm": {
                "gpt2": 0.2955,
                "gpt2-medium": 0.375224,
                "gpt2-large": 0.431986,
                "gpt2-xl": 0.4893,
                "gpt3-small": 0.337,
                "gpt3-medium": 0.436,
                "gpt3-large": 0.510,
                "gpt3-xl": 0.547,
            },
            # harness, as quoted in build-nanogpt's hellaswag.py.
            "harness acc": {"gpt2": 0.2892, "gpt2-xl": 0.4004},
            "harness acc_norm": {"gpt2": 0.3114, "gpt2-xl": 0.5089},
        },
    ),
    "lambada": Reference(
        title="LAMBADA",
        headline="accuracy",
        stream="lambada",
        figures={
            # gpt2: harness, task lambada_openai, in its issue 2159.
            # gpt2-xl: GPT-2 paper, section 3.3, where stop words are not yet excluded.
            "accuracy": {"gpt2": 0.3256, "gpt2-xl": 0.5266},
            # GPT-2 paper, table 3.
            "accuracy, no stop words": {
                "gpt2": 0.4599,
                "gpt2-medium": 0.5548,
                "gpt2-large": 0.6012,
                "gpt2-xl": 0.6324,
            },
            # GPT-2 paper, table 3. The harness has 40.0554 for gpt2 in the same issue; the paper
            # does not say how its figures were computed.
            "perplexity": {
                "gpt2": 35.13,
                "gpt2-medium": 15.60,
                "gpt2-large": 10.87,
                "gpt2-xl": 8.63,
            },
        },
    ),
    "cbt": Reference(
        title="Children's Book Test",
        headline="paper all",
        stream="cbt",
        chance=0.1,
        figures={
            # GPT-2 paper, table 3.
            "paper CN": {
                "gpt2": 0.8765,
                "gpt2-medium": 0.9235,
                "gpt2-large": 0.9345,
                "gpt2-xl": 0.9330,
            },
            "paper NE": {
                "gpt2": 0.8340,
                "gpt2-medium": 0.8710,
                "gpt2-large": 0.8800,
                "gpt2-xl": 0.8905,
            },
        },
    ),
    "core": Reference(
        title="DCLM CORE",
        headline="CORE",
        stream="core",
        as_percent=False,
        chance=0.0,  # by definition: each task's accuracy is rescaled so that guessing gives 0
        # nanochat: gpt2-xl in dev/LEADERBOARD.md, the others in dev/estimate_gpt3_core.ipynb, which
        # also has the accuracies of six of the 22 tasks, in tenths of a percent. The figures that
        # the notebook lists for GPT-3 are estimates and left out.
        figures={
            "hellaswag_zeroshot": openai_sizes(0.309, 0.390, 0.440, 0.502),
            "lambada_openai": openai_sizes(0.323, 0.426, 0.488, 0.523),
            "hellaswag": openai_sizes(0.308, 0.395, 0.444, 0.512),
            "piqa": openai_sizes(0.623, 0.670, 0.698, 0.725),
            "arc_easy": openai_sizes(0.412, 0.480, 0.535, 0.595),
            "arc_challenge": openai_sizes(0.222, 0.262, 0.264, 0.299),
            "CORE": openai_sizes(0.1139, 0.1849, 0.2146, 0.256525),
        },
    ),
    "val": Reference(
        title="validation",
        headline="loss",
        stream="val",
        as_percent=False,
        # In nats per token, on the validation shard of FineWeb-Edu's sample-10BT: build-nanogpt,
        # play.ipynb. (llm.c's notebook has 3.424958, without saying on which data.)
        figures={"loss": {"gpt2": 3.2924}},
    ),
}

# CORE of the entries of nanochat's leaderboard (README.md), with the hours of training on eight
# H100.
CORE_LEADERBOARD = {
    "nanochat d24, 3.04 h (Jan 29 2026)": 0.2585,
    "nanochat d26 in fp8, 2.91 h (Feb 2 2026)": 0.2578,
    "nanochat, batches of 1M tokens, 2.76 h (Feb 5 2026)": 0.2602,
    "nanochat, ClimbMix, 2.02 h (Mar 4 2026)": 0.2571,
    "nanochat, autoresearch 1, 1.80 h (Mar 9 2026)": 0.2690,
    "nanochat, autoresearch 2, 1.65 h (Mar 14 2026)": 0.2626,
}
