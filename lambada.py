"""LAMBADA (Paperno et al. 2016) in OpenAI's version: the last word of a passage. 5,153 passages of books.

    python lambada.py                                      # log/model_final.pt; downloads the passages
    python lambada.py --model gpt2-medium --save_predictions predictions.jsonl
    torchrun --standalone --nproc_per_node=8 lambada.py --model gpt2-xl
    python lambada.py --data lambada_test.jsonl --limit 1000

accuracy is the share of passages of whose last word every token is the likeliest one; perplexity is exp of the mean
negative log-likelihood of the last word, given what comes before: both as lm-evaluation-harness's lambada_openai.

accuracy, no stop words is the variant of the GPT-2 paper, whose authors saw that the model often went on with a
frequent word that can't be the last one of a passage, and barred these. They state neither list nor method. Here, the
list is NLTK's English stop words, and what they bar is their tokens as the first one of the last word: a word of which
such a token is only the beginning is barred with them.
"""

import math
from dataclasses import dataclass

import tiktoken

from common import runtime, tasks
from common.console import UserError, cli
from common.runtime import Runtime
from common.scoring import score
from common.tasks import Metric, accuracy, encode_request
from model import GPT

URL = "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl"
SHA256 = "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226"
PATH = "datasets/lambada/lambada_test.jsonl"
PUBLISHED = {  # Radford et al. 2019, tables 3 and section 3.3
    "accuracy": {"gpt2-xl": 0.5266},
    "accuracy, no stop words": {
        "gpt2": 0.4599,
        "gpt2-medium": 0.5548,
        "gpt2-large": 0.6012,
        "gpt2-xl": 0.6324,
    },
    "perplexity": {"gpt2": 35.13, "gpt2-medium": 15.60, "gpt2-large": 10.87, "gpt2-xl": 8.63},
}
STOP_WORDS = """
i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself it its
itself they them their theirs themselves what which who whom this that these those am is are was were be been being
have has had having do does did doing a an the and but if or because as until while of at by for with about against
between into through during before after above below to from up down in out on off over under again further then once
here there when where why how all any both each few more most other some such no nor not only own same so than too very
s t can will just don should now
""".split()


@dataclass
class Config:
    model: str = "log/model_final.pt"  # a checkpoint, a Hugging Face folder, or gpt2 ... gpt2-xl
    data: str | None = (
        None  # lambada_test.jsonl, a "text" per line; None = downloaded once to datasets/lambada
    )
    limit: int | None = None  # only the first so many passages
    device: str = "auto"  # cuda, mps or cpu; auto takes the first there is
    dtype: runtime.Dtype = (
        "auto"  # of matrix products; auto = bfloat16 where the hardware is fast at it
    )
    save_predictions: str | None = None  # write a line per passage to this file


def main(config: Config):
    tasks.run(config, "LAMBADA", load, evaluate)


def load(path: str | None = None, limit: int | None = None) -> list[tuple[str, str]]:
    """Passages as (what comes before, last word with the blank before it). Raises OSError or ValueError."""
    return tasks.read_jsonl(path or tasks.fetch(URL, PATH, SHA256), parse, limit)


def parse(line: dict) -> tuple[str, str]:
    context, blank, word = line["text"].rpartition(" ")
    if not context or not word:
        raise UserError("the text must have two words at least, and end with one")
    return context, blank + word


def evaluate(
    model: GPT, enc: tiktoken.Encoding, examples: list[tuple[str, str]], rt: Runtime
) -> tuple[list[Metric], list[dict]]:
    """Accuracy, perplexity, accuracy without stop words, and a line per passage."""
    requests = [encode_request(enc, context, [word]) for context, word in examples]
    scores = [only for (only,) in score(model, requests, rt, stop_tokens(enc), desc="LAMBADA")]
    lines = [
        dict(
            ind=n,
            word=word.strip(),
            logprob=s.logprob,
            right=s.greedy,
            right_no_stop_words=s.greedy_unbarred,
        )
        for n, ((_, word), s) in enumerate(zip(examples, scores))
    ]
    mean = sum(s.logprob for s in scores) / len(scores)
    metrics = [
        accuracy("accuracy", [s.greedy for s in scores], PUBLISHED["accuracy"]),
        accuracy(
            name := "accuracy, no stop words", [s.greedy_unbarred for s in scores], PUBLISHED[name]
        ),
        Metric("perplexity", math.exp(min(700, -mean)), published=PUBLISHED["perplexity"]),
    ]
    return metrics, lines


def stop_tokens(enc: tiktoken.Encoding) -> list[int]:
    """Tokens that are a stop word by themselves, after a blank."""
    forms = [f" {form}" for word in STOP_WORDS for form in (word, word.capitalize())]
    return sorted({ids[0] for ids in map(enc.encode_ordinary, forms) if len(ids) == 1})


if __name__ == "__main__":
    cli(Config, main, __doc__)
