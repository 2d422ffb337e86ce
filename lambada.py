"""LAMBADA (Paperno et al. 2016) in OpenAI's version: predict the last word of a passage.

    python lambada.py                                      # log/model_final.pt
    python lambada.py --model gpt2-medium --save_predictions predictions.jsonl
    torchrun --standalone --nproc_per_node=8 lambada.py --model gpt2-xl
    python lambada.py --data lambada_test.jsonl --limit 1000

The 5,153 passages are from novels, and are downloaded once. Three metrics:

    accuracy    the share of passages in which each token of the last word is the most likely one
    perplexity  exp of the mean negative log-likelihood of the last word, given the text before it
    accuracy, no stop words
                as in the GPT-2 paper. Its authors saw that the model often predicts a frequent word
                that cannot end a passage, and excluded these words.

The first two are those of lm-evaluation-harness's task lambada_openai. For the third, the GPT-2
paper gives neither list nor method. Here, the list is NLTK's English stop words, and a token that
is a stop word by itself is excluded as the first token of the answer. This also excludes words that
only begin with such a token.
"""

import math
from dataclasses import dataclass

import common.before_torch

from common.console import Dtype, UserError, checksum, parse_flags, run_script


@dataclass
class Config:
    model: str = "log/model_final.pt"  # a checkpoint, a Hugging Face folder, or gpt2 ... gpt2-xl
    # lambada_test.jsonl, with a field "text" per line; None = downloaded once to datasets/lambada
    data: str | None = None
    limit: int | None = None  # evaluate only the first passages, this many
    device: str = "auto"  # cuda, mps or cpu; auto = the first available of these
    # dtype of matrix products; auto = the fastest of bfloat16, float16 and float32 on this hardware
    dtype: Dtype = "auto"
    save_predictions: str | None = None  # file for predictions, one line per passage


if __name__ == "__main__":
    config = parse_flags(Config, __doc__)  # before the slow imports: --help answers at once

import tiktoken
import torch

from common import tasks
from common.published import REFERENCES
from common.runtime import Runtime
from common.scoring import Choose, score
from common.tasks import Benchmark, Metric, accuracy, encode_request
from model import GPT

# OpenAI's version of the test set. The checksum detects a damaged download.
URL = "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl"
SHA256 = "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226"
PATH = "datasets/lambada/lambada_test.jsonl"
# NLTK's English stop words.
STOP_WORDS = """
i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her
hers herself it its itself they them their theirs themselves what which who whom this that these
those am is are was were be been being have has had having do does did doing a an the and but if or
because as until while of at by for with about against between into through during before after
above below to from up down in out on off over under again further then once here there when where
why how all any both each few more most other some such no nor not only own same so than too very s
t can will just don should now
""".split()


def main(config: Config):
    tasks.run(config, BENCHMARK)


# ---------------------------------------------------------------------------------------------
# Data


def load(path: str | None = None, limit: int | None = None) -> list[tuple[str, str]]:
    """Passages as (text before the last word, blank and last word). Raises OSError or UserError."""
    return tasks.read_jsonl(path or tasks.fetch(URL, PATH, SHA256), parse, limit)


def data_fingerprint(path: str | None) -> str:
    return SHA256 if path is None else checksum(path)


def parse(line: dict) -> tuple[str, str]:
    # Some copies of the data have a line end after the last word. It is not part of the word.
    context, blank, word = line["text"].rstrip().rpartition(" ")
    if not context.strip():
        raise UserError("the text must have at least two words, with a blank between them")
    return context, blank + word


# ---------------------------------------------------------------------------------------------
# Metrics


def evaluate(
    model: GPT, enc: tiktoken.Encoding, examples: list[tuple[str, str]], rt: Runtime
) -> tuple[list[Metric], list[dict]]:
    """The three metrics; for each passage its last word, log-probability, and what was right."""
    # One continuation per request: the last word, with the blank before it.
    requests = [encode_request(enc, context, [word]) for context, word in examples]
    choose = exclude_first_tokens(stop_tokens(enc), rt.device)
    scores = [only for (only,) in score(model, requests, rt, choose, desc="LAMBADA")]

    # A line per passage, for predictions files
    lines = []
    for n, ((_, word), s) in enumerate(zip(examples, scores)):
        lines.append(
            dict(
                ind=n,
                word=word.strip(),
                logprob=s.logprob,
                right=s.greedy,
                right_no_stop_words=s.chosen,
            )
        )

    # Perplexity is per word, not per token: a word counts once, whatever its number of tokens.
    mean = sum(s.logprob for s in scores) / len(scores)
    metrics = [
        accuracy("accuracy", [s.greedy for s in scores]),
        accuracy("accuracy, no stop words", [s.chosen for s in scores]),
        Metric("perplexity", math.exp(min(700, -mean))),  # beyond 700, exp overflows
    ]
    return metrics, lines


def stop_tokens(enc: tiktoken.Encoding) -> list[int]:
    """The tokens that are a stop word by themselves, after a blank, capitalized or not."""
    # Only stop words of one token: a longer one shares its first token with other words.
    tokens = set()
    for word in STOP_WORDS:
        for form in (word, word.capitalize()):
            ids = enc.encode_ordinary(" " + form)
            if len(ids) == 1:
                tokens.add(ids[0])
    return sorted(tokens)


def exclude_first_tokens(excluded: list[int], device: torch.device) -> Choose:
    """The most likely tokens, if an answer may not begin with the excluded ones."""
    # Made once, as `choose` is called for every chunk of logits.
    excluded_ids = torch.tensor(excluded, dtype=torch.int64, device=device)

    def choose(logits: torch.Tensor, is_first: torch.Tensor) -> torch.Tensor:
        # Only the logits of first tokens need to be changed and searched again.
        chosen = logits.argmax(-1)  # (n,)
        first_logits = logits[is_first].index_fill_(1, excluded_ids, -torch.inf)
        chosen[is_first] = first_logits.argmax(-1)
        return chosen

    return choose


BENCHMARK = Benchmark(
    name="lambada",
    reference=REFERENCES["lambada"],
    load=load,
    evaluate=evaluate,
    # All three metrics come from one pass, so leaving some out would save nothing.
    evaluate_headline=evaluate,
    data_fingerprint=data_fingerprint,
)


if __name__ == "__main__":
    run_script(main, config)
