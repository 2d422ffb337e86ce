"""The descriptions of locations on disk: an append-only jsonl, and the text to train on that is made from it.

with Dataset("datasets", offline=False) as dataset:
    if not dataset.near_duplicate(text):
        dataset.add(seed, text, prompt_tokens, completion_tokens, model)
    dataset.write_text()
"""

import fcntl
import json
import os
import re
from collections import Counter, defaultdict
from pathlib import Path

from common import console
from common.console import UserError
from common.tokenizer import load_tokenizer
from fantasy.locations import PromptSeed

OPEN, CLOSE = "<LOC>", "</LOC>"  # of a description in the text to train on
OFFLINE = "offline"  # the model of the grammar's descriptions
DELIMITER = re.compile(r"</?loc>|<\|endoftext\|>", re.I)  # what no description may hold
NEAR_DUPLICATE = 0.3  # Jaccard similarity of word 5-grams: about half of the sentences the same


class Dataset:
    """out_dir/finetune_data.jsonl, opened to go on writing, and finetune_data.txt beside it.

    A line is an object: seed (the words of a PromptSeed), text, prompt_tokens, completion_tokens, model. A last line
    that a crash cut off is dropped from the file. Raises ValueError that names the line if another one is malformed or
    comes from the other source (grammar or model), OSError if the file can't be written or another run is writing it.
    """

    def __init__(self, out_dir: str | Path, offline: bool):
        self.path = Path(out_dir) / "finetune_data.jsonl"
        self.text_path = self.path.with_suffix(".txt")
        self.records = []
        self.pairs = set()  # of place and culture, that have a description
        self.grams = defaultdict(list)  # word 5-gram -> the records that have it
        self.sizes = []  # number of different 5-grams, by record
        self.closest = 0.0  # similarity of two records, the highest
        self.duplicates = 0  # records that are near-duplicates of an earlier one
        self.offline = offline

    def __enter__(self):
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "a+b", buffering=0)
        except OSError as error:
            raise OSError(
                f"{self.path} can't be written ({error.strerror}): choose another out_dir"
            ) from error
        try:
            fcntl.flock(
                self.file, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # ends with the process, however that ends
            self.read()
        except BlockingIOError as error:
            self.file.close()
            raise OSError(f"another run is writing {self.path}") from error
        except BaseException:
            self.file.close()
            raise
        return self

    def __exit__(self, *_):
        self.file.close()

    def read(self):
        self.file.seek(0)
        data = self.file.read()
        whole, newline, last = data.rpartition(b"\n")
        for number, line in enumerate(whole.split(b"\n") if newline else [], 1):
            if line.strip():
                try:
                    self.remember(self.parse(line))
                except UserError as error:
                    raise UserError(f"{self.path}, line {number}: {error}") from error
        if last:
            try:
                record = self.parse(last)
            except UserError:
                self.file.truncate(len(data) - len(last))
            else:  # only its newline is missing
                self.remember(record)
                self.append(b"\n")

    def parse(self, line: bytes) -> dict:
        """A record. Raises ValueError."""
        try:
            record = json.loads(line)
            seed, text, model = record["seed"], record["text"], record["model"]
            right = PromptSeed(**seed) and all(
                isinstance(word, str) for word in (*seed.values(), text, model)
            )
            right = right and all(
                isinstance(record[f"{kind}_tokens"], int) for kind in ("prompt", "completion")
            )
        except UnicodeDecodeError as error:
            raise UserError("it is not UTF-8") from error
        except json.JSONDecodeError as error:
            raise UserError(f"it is not JSON ({error.msg})") from error
        except (KeyError, TypeError) as error:
            raise UserError(f"it is no record of a description ({error})") from error
        if not right or not text.strip():
            raise UserError(
                "it is no record of a description (a field has the wrong type or is empty)"
            )
        if DELIMITER.search(text):
            raise UserError("its text holds a delimiter")
        if (seed["place"], seed["culture"]) in self.pairs:
            raise UserError("its place and culture have a description already")
        if (model == OFFLINE) != self.offline:
            kind, other = ("a model", "without") if self.offline else ("the grammar", "with")
            raise UserError(
                f"it is by {kind}; the two do not mix: run {other} --offline, or choose another out_dir"
            )
        return record

    def add(
        self, about: PromptSeed, text: str, prompt_tokens: int, completion_tokens: int, model: str
    ):
        """Write a description to the disk before anything else happens. Raises OSError if the disk is full."""
        tokens = dict(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
        record = dict(seed=about._asdict(), text=text, **tokens, model=model)
        self.append(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self.remember(record)

    def append(self, data: bytes):
        size = os.fstat(self.file.fileno()).st_size
        try:
            while data:
                data = data[self.file.write(data) :]
            if not self.offline:
                os.fsync(self.file.fileno())  # it was paid for
        except OSError as error:
            self.file.truncate(size)
            kept = f"{len(self.records):,} descriptions are kept; make room, then run again"
            raise OSError(f"{self.path} can't be written ({error.strerror}): {kept}") from error

    def remember(self, record: dict):
        grams, similarity = word_grams(record["text"]), self.similarity(record["text"])
        self.closest = max(self.closest, similarity)
        self.duplicates += similarity >= NEAR_DUPLICATE
        for gram in grams:
            self.grams[gram].append(len(self.records))
        self.sizes.append(len(grams))
        self.records.append(record)
        self.pairs.add((record["seed"]["place"], record["seed"]["culture"]))

    def similarity(self, text: str) -> float:
        """Jaccard similarity of the text's word 5-grams with those of the record that is closest."""
        grams = word_grams(text)
        shared = Counter(record for gram in grams for record in self.grams.get(gram, ()))
        return max(
            (n / (len(grams) + self.sizes[record] - n) for record, n in shared.items()), default=0.0
        )

    def near_duplicate(self, text: str) -> bool:
        return self.similarity(text) >= NEAR_DUPLICATE

    def write_text(self):
        """finetune_data.txt: all descriptions, whole or not at all. Raises OSError."""
        console.write_text(
            self.text_path,
            "\n".join(f"{OPEN}\n{record['text']}\n{CLOSE}\n" for record in self.records),
        )

    def summary(self) -> str:
        texts = [record["text"] for record in self.records]
        models = ", ".join(
            f"{n:,} by {model}" for model, n in Counter(r["model"] for r in self.records).items()
        )
        vocabulary = {word for text in texts for word in words_of(text)}
        lines = [
            f"{self.text_path}: {len(texts):,} descriptions ({models})",
            f"words: {spread([len(text.split()) for text in texts])}; vocabulary: {len(vocabulary):,} different words",
        ]
        try:
            lines.append(
                f"GPT-2 tokens: {spread(list(map(len, load_tokenizer('gpt2').encode_ordinary_batch(texts))))}"
            )
        except OSError as error:
            lines.append(f"GPT-2 tokens: not counted, {error}")
        kind = f"Jaccard similarity of word 5-grams of {NEAR_DUPLICATE} or more"
        lines.append(
            f"near-duplicates ({kind}): {self.duplicates:,}; the closest two have {self.closest:.2f}"
        )
        return "\n".join(lines)


def read_descriptions(path: str | Path) -> list[str]:
    """The <LOC> ... </LOC> blocks of a file, with their delimiters. Raises ValueError if they do not alternate."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {path}: write it with generate_finetune_data.py (--offline needs no network)"
        )
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from error
    blocks, start = [], None
    for mark in re.finditer(f"{OPEN}|{CLOSE}", text):
        if (mark[0] == OPEN) != (start is None):
            line = text.count("\n", 0, mark.start()) + 1
            raise UserError(
                f"{path}, line {line}: {mark[0]} where {CLOSE if mark[0] == OPEN else OPEN} is due"
            )
        if mark[0] == CLOSE:
            blocks.append(text[start : mark.end()])
        start = mark.start() if mark[0] == OPEN else None
    if start is not None:
        raise UserError(f"{path}: the last {OPEN} is not closed")
    if len(blocks) < 2:
        raise UserError(
            f"{path} holds {len(blocks)} descriptions between {OPEN} and {CLOSE}; two are the fewest"
        )
    return blocks


def words_of(text: str) -> list[str]:
    """In lower case, without punctuation."""
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower())


def word_grams(text: str) -> set[int]:
    """Hashes of a text's word 5-grams (of all its words, if it has fewer)."""
    words = words_of(text)
    return {hash(tuple(words[i : i + 5])) for i in range(max(1, len(words) - 4))}


def spread(numbers: list[int]) -> str:
    mean = sum(numbers) / len(numbers)
    return f"{sum(numbers):,} in all, {min(numbers):,} min / {mean:,.1f} mean / {max(numbers):,} max per description"
