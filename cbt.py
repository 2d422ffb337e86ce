"""The Children's Book Test (Hill et al. 2015): which of ten words belongs in a blank? Chance is 10%.

    python cbt.py                                          # log/model_final.pt; the questions from the hub
    python cbt.py --model gpt2 --save_predictions predictions.jsonl
    torchrun --standalone --nproc_per_node=8 cbt.py --model gpt2-xl
    python cbt.py --data CBTest/data                       # cbtest_NE_test_2500ex.txt and its like

A question is twenty sentences of a book and a 21st in which a word is missing: a common noun (CN), a named entity (NE),
a verb (V) or a preposition (P). Two protocols answer it, and both are shown:

    paper     as Radford et al. 2019: the candidate for which it and the rest of its sentence are likeliest, given all
              that comes before it, in text whose tokenization is undone (`` Oh , no ! '' is "Oh, no!" again).
    sequence  as is often done instead: the candidate for which the mean loss over the whole text is lowest, in the text
              as the files have it.

The difference is large: for OpenAI's models on named entities, 83.4% to 89.05% against 59.33% to 72.32%. GPT-2 has
hardly seen text with blanks around its commas, which makes all of it unlikely; and a mean over all tokens favours
candidates of several tokens, whose later ones are easy. The first protocol is the one that other stages use.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import tiktoken

from common import runtime, tasks
from common.console import UserError, cli
from common.runtime import Runtime
from common.scoring import Request, score
from common.tasks import Metric, accuracy, encode_request
from model import GPT

HUB = "cam-cst/cbt"
KINDS = ("CN", "NE", "V", "P")
BLANK = "XXXXX"
SIZES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
PUBLISHED = {  # Radford et al. 2019, table 3; "sequence" from a reproduction with OpenAI's weights
    "paper CN": dict(zip(SIZES, (0.8765, 0.9235, 0.9345, 0.9330))),
    "paper NE": dict(zip(SIZES, (0.834, 0.871, 0.880, 0.8905))),
    "sequence NE": dict(zip(SIZES, (0.5933, 0.6711, 0.6895, 0.7232))),
}


@dataclass
class Config:
    model: str = "log/model_final.pt"  # a checkpoint, a Hugging Face folder, or gpt2 ... gpt2-xl
    data: str | None = (
        None  # a file, a glob or a folder of cbtest_{CN,NE,V,P}_test*.txt; None = from the hub
    )
    limit: int | None = None  # only the first so many questions of each kind
    device: str = "auto"  # cuda, mps or cpu; auto takes the first there is
    dtype: runtime.Dtype = (
        "auto"  # of matrix products; auto = bfloat16 where the hardware is fast at it
    )
    save_predictions: str | None = None  # write a line per question to this file


@dataclass
class Question:
    kind: str
    context: str  # the twenty sentences
    query: str  # the 21st, with the blank
    answer: str
    candidates: list[str]


def main(config: Config):
    tasks.run(config, "Children's Book Test (chance 10%)", load, evaluate)


def load(path: str | None = None, limit: int | None = None) -> list[Question]:
    """The questions: of local files, or of the hub. Raises OSError or ValueError."""
    if path is None:
        return [question for kind in KINDS for question in from_hub(kind, limit)]
    return [question for file in find_files(path) for question in from_file(file)[:limit]]


def find_files(path: str) -> list[Path]:
    """The files that a name, a glob or a folder stands for."""
    if Path(path).is_dir():
        path = f"{path}/cbtest_*_test*.txt"
    if files := sorted(map(Path, glob(path))):
        return files
    raise FileNotFoundError(f"no file {path}")


def from_hub(kind: str, limit: int | None) -> list[Question]:
    import datasets  # late: it takes a second

    try:
        rows = datasets.load_dataset(HUB, kind, split="test")
    except Exception as error:  # the HTTP libraries under `datasets` do not share a base class
        raise OSError(
            f"{HUB} can't be had from the hub ({type(error).__name__}): check the network, or give --data FILES"
        ) from error
    rows = rows.select(range(min(limit or len(rows), len(rows))))
    return [
        make_question(kind, r["sentences"], r["question"], r["answer"], r["options"]) for r in rows
    ]


def from_file(path: Path) -> list[Question]:
    """The questions of a file in the test's own format: numbered sentences, the 21st with query, answer and, after an
    empty field, candidates, with tabs between them; a blank line between questions."""
    kind = re.search(r"cbtest_(CN|NE|V|P)_", path.name)
    if not kind:
        raise UserError(
            f"{path}: its name must say what is missing: cbtest_CN_test.txt, or NE, V, P"
        )
    questions, sentences = [], []
    number = 0
    try:
        for number, line in enumerate(path.read_text("utf-8").split("\n"), 1):
            if not line.strip():
                if sentences:
                    raise UserError(
                        f"the question ends after {len(sentences)} sentences, without a query"
                    )
                continue
            place, _, text = line.partition(" ")
            if place != str(len(sentences) + 1):
                raise UserError(
                    f"it must begin with {len(sentences) + 1}, the number of the sentence"
                )
            if len(sentences) < 20:
                sentences.append(text)
                continue
            query, answer, *_, candidates = (
                text.split("\t") if text.count("\t") >= 2 else (text, "", "")
            )
            questions.append(
                make_question(kind[1], sentences, query, answer, candidates.split("|"))
            )
            sentences = []
        if sentences:
            raise UserError(f"the file ends after {len(sentences)} sentences, without a query")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from error
    except UserError as error:
        raise UserError(f"{path}, line {number}: {error}") from error
    if not questions:
        raise UserError(f"{path} holds no questions")
    return questions


def make_question(
    kind: str, sentences: list[str], query: str, answer: str, candidates: list[str]
) -> Question:
    """Raises ValueError if there is not one blank, or the candidates don't hold the answer."""
    if query.count(BLANK) != 1:
        raise UserError(f"the query must have one {BLANK}, has {query.count(BLANK)}")
    if answer not in candidates:
        raise UserError(f"the answer {answer!r} is not among the candidates {'|'.join(candidates)}")
    return Question(kind, " ".join(sentences), query, answer, candidates)


def detokenize(text: str) -> str:
    """Undo the spacing, quotes and brackets of the Penn Treebank's tokenizer."""
    for mark, char in (
        ("-LRB-", "("),
        ("-RRB-", ")"),
        ("-LCB-", "{"),
        ("-RCB-", "}"),
        ("-LSB-", "["),
        ("-RSB-", "]"),
    ):
        text = text.replace(mark, char)
    text = re.sub(r"`` ?", '"', text)
    text = re.sub(r" ?''", '"', text)
    text = re.sub(r"(?<!\S)` ?", "'", text)
    text = re.sub(
        r" (n't|'(?:s|S|m|re|ve|ll|d)?)(?!\S)", r"\1", text
    )  # do n't, it 's, the boys ' coats
    text = re.sub(r" ([,.;:!?)\]}%])", r"\1", text)
    return re.sub(r"([(\[{$£]) ", r"\1", text)


def paper_request(enc: tiktoken.Encoding, question: Question) -> Request:
    """The candidates, each with the rest of its sentence, after all that comes before the blank; detokenized."""
    return request(enc, detokenize(question.context), question, detokenize)


def sequence_request(enc: tiktoken.Encoding, question: Question, block_size: int) -> Request:
    """The whole texts, of which all but the first token is predicted; of one longer than block_size, its end."""
    split = request(enc, question.context, question, str)
    cut = max(0, len(split.context) + max(map(len, split.continuations)) - block_size)
    shared = split.context[cut:]
    return Request(shared[:1], [shared[1:] + continuation for continuation in split.continuations])


def request(
    enc: tiktoken.Encoding, context: str, question: Question, render: Callable[[str], str]
) -> Request:
    before = f"{context} {render(question.query.split(BLANK)[0])}".rstrip()
    texts = [
        f"{context} {render(question.query.replace(BLANK, candidate))}"
        for candidate in question.candidates
    ]
    return encode_request(enc, before, [text[len(before) :] for text in texts])


def evaluate(
    model: GPT, enc: tiktoken.Encoding, examples: list[Question], rt: Runtime
) -> tuple[list[Metric], list[dict]]:
    """Accuracy by protocol and kind, and a line per question."""
    lines = [
        dict(ind=n, kind=q.kind, answer=q.answer, candidates=q.candidates)
        for n, q in enumerate(examples)
    ]
    metrics = []
    for protocol in ("paper", "sequence"):
        if protocol == "paper":
            requests = [paper_request(enc, question) for question in examples]
        else:
            requests = [
                sequence_request(enc, question, model.config.block_size) for question in examples
            ]
        scores = score(model, requests, rt, desc=f"CBT, {protocol}")
        for line, request, ten in zip(lines, requests, scores):
            sums = [s.logprob for s in ten]
            if protocol == "sequence":
                sums = [total / len(tokens) for total, tokens in zip(sums, request.continuations)]
            line |= {
                f"{protocol}_pred": line["candidates"][sums.index(max(sums))],
                f"{protocol}_scores": sums,
            }
        for kind in (*KINDS, "all"):
            hits = [
                line[f"{protocol}_pred"] == line["answer"]
                for line in lines
                if kind in ("all", line["kind"])
            ]
            if hits:
                metrics.append(accuracy(name := f"{protocol} {kind}", hits, PUBLISHED.get(name)))
    return metrics, lines


if __name__ == "__main__":
    cli(Config, main, __doc__)
