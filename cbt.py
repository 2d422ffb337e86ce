"""The Children's Book Test (Hill et al. 2015): which of ten words belongs in a blank?

    python cbt.py                                          # log/model_final.pt; data from the hub
    python cbt.py --model gpt2 --save_predictions predictions.jsonl
    torchrun --standalone --nproc_per_node=8 cbt.py --model gpt2-xl
    python cbt.py --data CBTest/data                       # folder of cbtest_*_test_2500ex.txt

A question is twenty sentences of a book and a 21st with a missing word: a common noun (CN), a named
entity (NE), a verb (V) or a preposition (P). Guessing is right in 10%. Both protocols in use are
evaluated:

    paper     as in Radford et al. 2019: the answer is the candidate with which the rest of the
              sentence, from the blank on, is most likely given the text before the blank. The text
              is detokenized: `` Oh , no ! '' becomes "Oh, no!".
    sequence  another common choice: the answer is the candidate with which the whole text has the
              lowest mean loss. The text is used as it is in the files.

The difference is large: on named entities, OpenAI's models reach 83.4% to 89.05% with the first and
59.33% to 72.32% with the second. GPT-2 has rarely seen text with blanks around commas, which makes
all of it unlikely. And the mean over all tokens favors candidates of several tokens, because the
later tokens of a word are easy to predict. Training follows the first protocol.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any

import common.before_torch

from common.console import Dtype, UserError, checksum, parse_flags, read_lines, run_script


@dataclass
class Config:
    model: str = "log/model_final.pt"  # a checkpoint, a Hugging Face folder, or gpt2 ... gpt2-xl
    # a file, a glob or a folder of cbtest_{CN,NE,V,P}_test*.txt; None = from the Hugging Face hub
    data: str | None = None
    limit: int | None = None  # evaluate only the first questions of each kind, this many
    device: str = "auto"  # cuda, mps or cpu; auto = the first available of these
    # dtype of matrix products; auto = the fastest of bfloat16, float16 and float32 on this hardware
    dtype: Dtype = "auto"
    save_predictions: str | None = None  # file for predictions, one line per question


if __name__ == "__main__":
    config = parse_flags(Config, __doc__)  # before the slow imports: --help answers at once

import tiktoken

from common import tasks
from common.published import REFERENCES
from common.runtime import Runtime
from common.scoring import Request, score
from common.tasks import Benchmark, Metric, accuracy, encode_request
from model import GPT

# The data set on the hub, with a subset for each kind of missing word
HUB = "cam-cst/cbt"
KINDS = ("CN", "NE", "V", "P")
PROTOCOLS = ("paper", "sequence")
QUERY_BLANK = "XXXXX"  # marks the missing word


def main(config: Config):
    tasks.run(config, BENCHMARK)


# ---------------------------------------------------------------------------------------------
# Data


@dataclass
class Question:
    kind: str  # CN, NE, V or P
    context: str  # the twenty sentences
    query: str  # the 21st, with QUERY_BLANK for the missing word
    answer: str
    candidates: list[str]


def load(path: str | None = None, limit: int | None = None) -> list[Question]:
    """The questions of local files, or of the hub. `limit` counts for each file or kind.

    Raises OSError or UserError.
    """
    questions = []
    # The hub has one subset per kind of word, and a local copy one file.
    if path is None:
        for kind in KINDS:
            questions += from_hub(kind, limit)
    else:
        for file in find_files(path):
            questions += from_file(file)[:limit]
    return questions


def data_fingerprint(path: str | None) -> str:
    if path is None:
        return HUB  # its name: the files would have to be downloaded for a checksum
    return " ".join(map(checksum, find_files(path)))


def find_files(path: str) -> list[Path]:
    """The files that a name, a glob or a folder stands for."""
    # Matches the original names, cbtest_NE_test_2500ex.txt, and shorter ones, cbtest_NE_test.txt.
    if Path(path).is_dir():
        path = f"{path}/cbtest_*_test*.txt"
    files = sorted(map(Path, glob(path)))
    if not files:
        raise FileNotFoundError(f"no file {path}")
    return files


def from_hub(kind: str, limit: int | None) -> list[Question]:
    import datasets  # imported here: it takes a second

    try:
        rows = datasets.load_dataset(HUB, kind, split="test")
    except Exception as error:  # the HTTP libraries that `datasets` uses share no base class
        raise OSError(
            f"{HUB} is not available from the hub ({type(error).__name__}): check the network, or "
            "give its files (--help says how)"
        ) from error
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    # `sentences` is a list of twenty texts, `options` one of ten words.
    questions = []
    for row in rows:
        questions.append(
            make_question(kind, row["sentences"], row["question"], row["answer"], row["options"])
        )
    return questions


def from_file(path: Path) -> list[Question]:
    """The questions of a file in the test's own format.

    A question has 21 numbered lines. The last one has four fields with tabs between them: query,
    answer, an empty field, candidates. A blank line follows.

        1 `` Oh , '' said Mary .
        ...
        20 She looked at the dog .
        21 Then XXXXX ran away . <tab> Mary <tab><tab> dog|Mary|...|Mr
    """
    # The name is the only place that tells the kind: cbtest_NE_test_2500ex.txt.
    kind = re.search(r"cbtest_(CN|NE|V|P)_", path.name)
    if not kind:
        raise UserError(
            f"{path}: its name must say which kind of word is missing: cbtest_CN_test.txt, or NE, "
            "V, P"
        )
    questions = []
    sentences = []  # of the current question
    lines = read_lines(path)
    number = 0
    try:
        for number, line in enumerate(lines, 1):
            # A blank line separates questions. Within a question, it shows that the rest is
            # missing.
            if not line.strip():
                if sentences:
                    raise UserError(
                        f"the question ends after {len(sentences)} sentences, without a query"
                    )
                continue
            # Sentences are numbered. A wrong number means that a line is missing or damaged.
            line_number, _, text = line.partition(" ")
            expected = str(len(sentences) + 1)
            if line_number != expected:
                raise UserError(f"it must begin with {expected}, the number of the sentence")

            # Twenty sentences, then the query, which completes the question.
            if len(sentences) < 20:
                sentences.append(text)
            else:
                questions.append(parse_query(kind[1], sentences, text))
                sentences = []

        # The file may have been cut off.
        if sentences:
            raise UserError(f"the file ends after {len(sentences)} sentences, without a query")
    except UserError as error:
        raise UserError(f"{path}, line {number}: {error}") from error
    if not questions:
        raise UserError(f"{path} holds no questions")
    return questions


def parse_query(kind: str, sentences: list[str], text: str) -> Question:
    """The question whose 21st line, without its number, is `text`."""
    fields = text.split("\t")
    if len(fields) < 3:  # without candidates, which make_question reports
        fields = [text, "", ""]
    # The empty field, or several of them, stands between answer and candidates.
    query, answer, *_, candidates = fields
    return make_question(kind, sentences, query, answer, candidates.split("|"))


def make_question(
    kind: str, sentences: list[str], query: str, answer: str, candidates: list[str]
) -> Question:
    """Raises UserError if there is not exactly one blank, or no candidate is the answer."""
    blanks = query.count(QUERY_BLANK)
    if blanks != 1:
        raise UserError(f"the query must have one {QUERY_BLANK}, has {blanks}")
    if answer not in candidates:
        raise UserError(f"the answer {answer!r} is not among the candidates {'|'.join(candidates)}")
    return Question(kind, " ".join(sentences), query, answer, candidates)


# ---------------------------------------------------------------------------------------------
# Requests


def detokenize(text: str) -> str:
    """Undo the Penn Treebank's tokenization: spacing, quotes and brackets."""
    # Left and right: round brackets, curly and square ones.
    brackets = {"-LRB-": "(", "-RRB-": ")", "-LCB-": "{", "-RCB-": "}", "-LSB-": "[", "-RSB-": "]"}
    for mark, bracket in brackets.items():
        text = text.replace(mark, bracket)
    # Quotes: ``, '' and `. A ' may be an apostrophe and stays.
    text = re.sub(r"`` ?", '"', text)
    text = re.sub(r" ?''", '"', text)
    # Only at the beginning of a word: ` Oh becomes 'Oh.
    text = re.sub(r"(?<!\S)` ?", "'", text)
    # Contractions and possessives: do n't, it 's, the boys ' coats.
    text = re.sub(r" (n't|'(?:s|S|m|re|ve|ll|d)?)(?!\S)", r"\1", text)
    # No blank before closing punctuation, and none after opening brackets.
    text = re.sub(r" ([,.;:!?)\]}%])", r"\1", text)
    return re.sub(r"([(\[{$£]) ", r"\1", text)


def paper_request(enc: tiktoken.Encoding, question: Question) -> Request:
    """Context: all text before the blank. Continuations: each candidate and the rest of the
    sentence. Both are detokenized."""
    return query_request(enc, question, detokenize)


def sequence_request(enc: tiktoken.Encoding, question: Question, block_size: int) -> Request:
    """Context: the first token. Continuations: all that follows, with each of the candidates.

    If the longest of these texts exceeds block_size, all lose the same number of tokens from their
    beginning, at most the whole text before the blank.
    """
    # The context ends before the blank. Move all but its first token to the continuations: they are
    # predicted, too. The engine computes what the continuations share only once.
    whole = query_request(enc, question, str)

    # Cut all texts equally, so that the scores compare the same tokens. One token is left as
    # context.
    longest = len(whole.context) + max(map(len, whole.continuations))
    start = min(max(0, longest - block_size), len(whole.context) - 1)
    context = whole.context[start:]
    continuations = [context[1:] + continuation for continuation in whole.continuations]
    return Request(context[:1], continuations)


def query_request(
    enc: tiktoken.Encoding, question: Question, render: Callable[[str], str]
) -> Request:
    """The text before the blank as context, each candidate with the rest as continuations."""
    context = render(question.context)
    # The blank before the missing word belongs to the continuations.
    before = f"{context} {render(question.query.split(QUERY_BLANK)[0])}".rstrip()
    continuations = []
    for candidate in question.candidates:
        # Rendered as a whole, because the candidate changes the spacing around it ("Tom 's").
        text = f"{context} {render(question.query.replace(QUERY_BLANK, candidate))}"
        continuations.append(text[len(before) :])
    return encode_request(enc, before, continuations)


# ---------------------------------------------------------------------------------------------
# Metrics


def evaluate(
    model: GPT,
    enc: tiktoken.Encoding,
    examples: list[Question],
    rt: Runtime,
    protocols: tuple[str, ...] = PROTOCOLS,
) -> tuple[list[Metric], list[dict]]:
    """Accuracy by protocol and kind of word; for each question its answer and both predictions."""
    metrics = []
    # A line per question, for predictions files. Each protocol adds its fields.
    lines: list[dict[str, Any]] = []
    for n, question in enumerate(examples):
        lines.append(
            dict(ind=n, kind=question.kind, answer=question.answer, candidates=question.candidates)
        )

    for protocol in protocols:
        # Among equal scores, the first candidate is the answer.
        candidate_scores = score_candidates(model, enc, examples, rt, protocol)
        for line, scores in zip(lines, candidate_scores):
            line[f"{protocol}_pred"] = line["candidates"][scores.index(max(scores))]
            line[f"{protocol}_scores"] = scores
        # One metric per kind of word in the data, and one over all.
        for kind in (*KINDS, "all"):
            of_kind = [line for line in lines if kind in ("all", line["kind"])]
            hits = [line[f"{protocol}_pred"] == line["answer"] for line in of_kind]
            if hits:
                metrics.append(accuracy(f"{protocol} {kind}", hits))
    return metrics, lines


def score_candidates(
    model: GPT, enc: tiktoken.Encoding, examples: list[Question], rt: Runtime, protocol: str
) -> list[list[float]]:
    """For each question a score per candidate: paper: the sum of log-probabilities, sequence: the
    mean."""
    # The protocols differ in what is context and what is scored.
    if protocol == "paper":
        requests = [paper_request(enc, question) for question in examples]
    else:
        block_size = model.config.block_size
        requests = [sequence_request(enc, question, block_size) for question in examples]
    scores = score(model, requests, rt, desc=f"CBT, {protocol}")

    # All candidates have the same context, so the sums compare the texts' probabilities. The means
    # divide by different numbers of tokens.
    result = []
    for candidate_scores in scores:
        if protocol == "paper":
            result.append([s.logprob for s in candidate_scores])
        else:
            result.append([s.logprob / s.num_tokens for s in candidate_scores])
    return result


BENCHMARK = Benchmark(
    name="cbt",
    reference=REFERENCES["cbt"],
    load=load,
    evaluate=evaluate,
    # Training logs a metric of this protocol only.
    evaluate_headline=partial(evaluate, protocols=("paper",)),
    data_fingerprint=data_fingerprint,
)


if __name__ == "__main__":
    run_script(main, config)
