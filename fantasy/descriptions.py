"""Descriptions of locations on disk: a jsonl file that only grows, and the text file made from it.

    with DescriptionStore("datasets", offline=False) as store:
        if not store.is_near_duplicate(text):
            store.add(seed, text, prompt_tokens, completion_tokens, model)
        store.write_text()

finetune.py reads the text file, see common/finetune_data.py.
"""

import json
import os
import re
from collections import Counter, defaultdict
from contextlib import ExitStack
from pathlib import Path

from common import console
from common.console import UserError
from common.finetune_data import CLOSE, OPEN
from common.tokenizer import load_tokenizer
from fantasy.locations import PromptSeed

# What no description may contain: the delimiters in any case, and GPT-2's end-of-text token.
DELIMITER = re.compile(r"</?loc>|<\|endoftext\|>", re.I)

OFFLINE = "offline"  # the `model` of descriptions that the grammar wrote
GRAM_WORDS = 5  # words per n-gram
# Two texts are near-duplicates if the Jaccard similarity of their word 5-grams is at least this.
# Texts with half of their sentences in common have 1/3: of 2n grams each, n are shared, n / 3n.
NEAR_DUPLICATE = 0.3


class DescriptionStore:
    """out_dir/finetune_data.jsonl, opened for appending, and out_dir/finetune_data.txt next to it.

    Each line of the jsonl file is an object with the fields seed (a PromptSeed as an object), text,
    prompt_tokens, completion_tokens and model. If a crash cut off the last line, that line is
    removed when the file is opened. A lock on the folder keeps a second run out.

    Opening raises UserError, with the line's number, if a line is malformed or written by the other
    source (grammar or model), or if another run is writing to the folder, and OSError if the file
    is not writable.
    """

    def __init__(self, out_dir: str | Path, offline: bool):
        self.path = Path(out_dir) / "finetune_data.jsonl"
        self.text_path = self.path.with_suffix(".txt")
        self.offline = offline
        self.records: list[dict] = []
        self.pairs: set[tuple[str, str]] = set()  # places and cultures that have a description
        self.index = SimilarityIndex()
        self.max_similarity = 0.0  # of two stored descriptions
        self.num_near_duplicates = 0  # stored descriptions that nearly repeat an earlier one

    def __enter__(self) -> "DescriptionStore":
        """Lock the folder, open the file and read it. If any of these fails, undo the others."""
        with ExitStack() as stack:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(console.lock_folder(self.path.parent))
                # Unbuffered, so that a finished write() has reached the system.
                self.file = stack.enter_context(open(self.path, "a+b", buffering=0))
            except OSError as error:
                raise OSError(
                    f"{self.path} can't be written ({error.strerror}): choose another out_dir"
                ) from error
            self.read()
            self.open_until_exit = stack.pop_all()  # nothing has failed: keep both open
        return self

    def __exit__(self, *_):
        self.open_until_exit.close()

    def read(self):
        """Load all records, and repair the end of the file if a crash cut off the last line."""
        self.file.seek(0)
        data = self.file.read()
        # The records, one per line. A bad line in the middle was not caused by a crash: an error.
        *lines, last = data.split(b"\n")  # `last` is empty if the file ends with a newline
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                self.remember(self.parse(line))
            except UserError as error:
                raise UserError(f"{self.path}, line {number}: {error}") from error

        # A line without a newline is the last one before a crash or a full disk.
        if not last:
            return
        try:
            parse_record(last)
        except UserError:
            # Half of a line: its description is lost, and its seed is free again.
            self.file.truncate(len(data) - len(last))
            return
        # Only the newline is missing.
        try:
            self.remember(self.parse(last))
        except UserError as error:
            raise UserError(f"{self.path}, last line: {error}") from error
        self.append(b"\n")

    def parse(self, line: bytes) -> dict:
        """The record of a line. Raises UserError if it is malformed or does not belong here."""
        record = parse_record(line)
        if DELIMITER.search(record["text"]):
            raise UserError("the text contains a delimiter")
        # Each pair is described once: see prompt_seeds.
        if (record["seed"]["place"], record["seed"]["culture"]) in self.pairs:
            raise UserError("an earlier line describes the same place and culture")
        # A mixture would make it unclear what a finetuned model has learned from.
        by_grammar = record["model"] == OFFLINE
        if by_grammar and not self.offline:
            raise UserError(
                "it was written by the grammar, which does not mix with a model: run with "
                f"--{OFFLINE}, or choose another out_dir"
            )
        if self.offline and not by_grammar:
            raise UserError(
                "it was written by a model, which does not mix with the grammar: run without "
                f"--{OFFLINE}, or choose another out_dir"
            )
        return record

    def add(
        self, about: PromptSeed, text: str, prompt_tokens: int, completion_tokens: int, model: str
    ):
        """Append a description; it is in the file when this returns. Raises OSError."""
        # On disk first: if that fails, the store still shows what is in the file.
        record = dict(
            seed=about._asdict(),
            text=text,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            model=model,
        )
        self.append(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self.remember(record)

    def append(self, data: bytes):
        """Write all of `data`, or leave the file as it was and raise OSError."""
        size = os.fstat(self.file.fileno()).st_size

        # Token counts are worth having, but no reason to fail without a network.
        try:
            while data:
                # An unbuffered write may take only a part of the data.
                written = self.file.write(data)
                data = data[written:]
            # An answer of a model was paid for, so it should survive a power cut too. The grammar
            # would write the same text again, and waiting for the disk is slow.
            if not self.offline:
                os.fsync(self.file.fileno())
        except OSError as error:
            # A full disk may have left a part of the line.
            self.file.truncate(size)
            raise OSError(
                f"{self.path} can't be written ({error.strerror}): {len(self.records):,} "
                "descriptions are kept; make room, then run again"
            ) from error

    def remember(self, record: dict):
        """Take over a record that is in the file."""
        # Compared before it is added, or it would be most similar to itself.
        similarity = self.index.similarity(record["text"])
        self.max_similarity = max(self.max_similarity, similarity)
        if similarity >= NEAR_DUPLICATE:
            self.num_near_duplicates += 1
        self.index.add(record["text"])
        self.records.append(record)
        self.pairs.add((record["seed"]["place"], record["seed"]["culture"]))

    def is_near_duplicate(self, text: str) -> bool:
        """Whether a text nearly repeats a stored one."""
        return self.index.similarity(text) >= NEAR_DUPLICATE

    def write_text(self):
        """Write finetune_data.txt, all descriptions in <LOC> blocks, atomically. Raises OSError."""
        # A blank line between two blocks, for readers: finetune.py does not need it.
        blocks = [f"{OPEN}\n{record['text']}\n{CLOSE}\n" for record in self.records]
        console.write_text(self.text_path, "\n".join(blocks))

    def summary(self) -> str:
        """Some lines on what is stored: sources, lengths, vocabulary and near-duplicates."""
        texts = [record["text"] for record in self.records]
        by_model = Counter(record["model"] for record in self.records)
        models = ", ".join(f"{number:,} by {model}" for model, number in by_model.items())

        # Lengths as finetuning will see them, and how varied the words are
        word_counts = [len(text.split()) for text in texts]
        vocabulary = {word for text in texts for word in words_of(text)}
        try:
            tokens = load_tokenizer("gpt2").encode_ordinary_batch(texts)
            token_counts = spread([len(ids) for ids in tokens])
        except OSError as error:  # the vocabulary is not cached, and there is no network
            token_counts = f"not counted, {error}"
        return (
            f"{self.text_path}: {len(texts):,} descriptions ({models})\n"
            f"words: {spread(word_counts)}; vocabulary: {len(vocabulary):,} different words\n"
            f"GPT-2 tokens: {token_counts}\n"
            f"near-duplicates (Jaccard similarity of word {GRAM_WORDS}-grams of {NEAR_DUPLICATE} "
            f"or more): {self.num_near_duplicates:,}; the most similar two have "
            f"{self.max_similarity:.2f}"
        )


def parse_record(line: bytes) -> dict:
    """A line of the jsonl file, with its fields and their types checked. Raises UserError."""
    try:
        record = json.loads(line)
        # PromptSeed raises TypeError for missing and for unknown fields.
        strings = [*PromptSeed(**record["seed"]), record["text"], record["model"]]
        numbers = [record["prompt_tokens"], record["completion_tokens"]]
    except UnicodeDecodeError as error:
        raise UserError("it is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(f"it is not JSON ({error.msg})") from error
    except (KeyError, TypeError) as error:
        raise UserError(f"it is not a record of a description ({error})") from error
    # Valid JSON may still have a number for a string, or the reverse.
    if not all(isinstance(value, str) and value.strip() for value in strings):
        raise UserError("it is not a record of a description (a string is empty or no string)")
    if not all(isinstance(value, int) for value in numbers):
        raise UserError("it is not a record of a description (a token count is not an integer)")
    return record


class SimilarityIndex:
    """Finds how similar a new text is to the most similar text added before.

    The similarity of two texts is the Jaccard similarity of their sets of word 5-grams: shared
    grams / different grams in both together. The index maps each gram to the texts that contain it,
    so a new text is compared only with texts that share a gram with it. With 2-grams:

        text 0     the bell rings       the-bell  bell-rings
        text 1     the bell is silent   the-bell  bell-is  is-silent
        new text   the bell rings low   the-bell  bell-rings  rings-low

        index      the-bell: 0, 1   bell-rings: 0   bell-is: 1   is-silent: 1
        shared     2 with text 0, 1 with text 1
        Jaccard    2 / (3 + 2 - 2) = 0.67 with text 0, 1 / (3 + 3 - 1) = 0.2 with text 1
    """

    def __init__(self):
        self.texts_with = defaultdict(list)  # gram -> numbers of the texts that contain it
        self.num_grams: list[int] = []  # different grams in each text

    def add(self, text: str):
        """Add a text, whose number is the number of texts before it."""
        grams = word_grams(text)
        for gram in grams:
            self.texts_with[gram].append(len(self.num_grams))
        self.num_grams.append(len(grams))

    def similarity(self, text: str) -> float:
        """Similarity with the most similar text of the index, between 0 and 1."""
        grams = word_grams(text)
        # Only texts that share a gram appear here. The others have similarity 0.
        shared: Counter[int] = Counter()  # number of a text -> grams shared with it
        for gram in grams:
            shared.update(self.texts_with.get(gram, ()))
        highest = 0.0
        for number, count in shared.items():
            # A gram in both texts is in both counts, and must be subtracted once.
            union = len(grams) + self.num_grams[number] - count
            highest = max(highest, count / union)
        return highest


def word_grams(text: str) -> set[int]:
    """Hashes of the word 5-grams of a text, or of all its words if there are fewer than five."""
    words = words_of(text)
    starts = range(max(1, len(words) - GRAM_WORDS + 1))
    # Hashes need less memory than tuples of strings, and 64 bits practically never collide.
    return {hash(tuple(words[start : start + GRAM_WORDS])) for start in starts}


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    # Letters and digits, with apostrophes and hyphens only between them.
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower())


def spread(numbers: list[int]) -> str:
    """Sum, minimum, mean and maximum of some numbers, as text."""
    mean = sum(numbers) / len(numbers)
    return (
        f"{sum(numbers):,} in all, {min(numbers):,} min / {mean:,.1f} mean / {max(numbers):,} max "
        "per description"
    )
