"""How a vocabulary cuts text: tokens per byte and word, technical terms and how many pieces they fall into, speed.

A technical term belongs to the first kind that fits:

    code-like   a digit after a letter, an underscore or a dot inside, or a capital after a small letter: utf8, os.path
    compound    words joined by hyphens
    long        12 letters and more
    rare        4 to 11 letters, at most RARE times in the text that the vocabularies are learned from
"""

import re
import statistics
import time
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import tiktoken

from common.tokenizer import encode_texts

CODE_LIKE = re.compile(
    r"(?!Ma?c[A-Z])(?=\S*[A-Za-z])\S*(?:[A-Za-z]\d|\w_\w|[A-Za-z]{2}\.[A-Za-z]{2}|[a-z][A-Z])\S*"
)
COMPOUND = re.compile(r"[A-Za-z]+(?:-[A-Za-z]+)+")
LETTERS = re.compile(r"[A-Za-z]+")
RARE = 3  # times in the text to learn from, at most
KINDS = ("code-like", "compound", "long", "rare")
ROUNDS = 5  # of the measurement of encoding speed


def count_words(texts: Iterable[str]) -> Counter:
    counts = Counter()
    for text in texts:
        counts.update(LETTERS.findall(text))
    return counts


def find_terms(
    texts: list[str], known: Counter, count: int
) -> tuple[Counter, dict[str, list[str]]]:
    """How often each word of letters occurs in the texts, and the technical terms of each kind: `count` of them, at
    random. `known` says how often words occur in the text to learn from."""
    words, terms = Counter(), {kind: set() for kind in KINDS}
    for text in texts:
        for word in text.split():
            word = word.strip("\"'`()[]{}<>,.;:!?*=|/-_")
            if LETTERS.fullmatch(word):
                words[word] += 1
            elif CODE_LIKE.fullmatch(word):
                terms["code-like"].add(word)
            elif COMPOUND.fullmatch(word):
                terms["compound"].add(word)
    for word in words:
        if CODE_LIKE.fullmatch(word):
            terms["code-like"].add(word)
        elif len(word) >= 12:
            terms["long"].add(word)
        elif len(word) >= 4 and known[word] <= RARE:
            terms["rare"].add(word)
    rng = np.random.default_rng(0)
    return words, {
        kind: rng.permutation(sorted(found))[:count].tolist() for kind, found in terms.items()
    }


def describe(enc: tiktoken.Encoding, texts: list[str], words: Counter, terms: dict) -> dict:
    """How a vocabulary cuts the held-out text."""
    _, lengths = encode_texts(enc, pa.array(texts))
    pieces = {word: len(enc.encode_ordinary(" " + word)) for word in words}
    total = words.total()
    by_kind = {
        kind: [len(enc.encode_ordinary(" " + term)) for term in found]
        for kind, found in terms.items()
        if found
    }
    return dict(
        vocab_size=enc.n_vocab,
        bytes_per_token=sum(len(text.encode()) for text in texts) / (sum(lengths) - len(texts)),
        tokens_per_word=sum(pieces[word] * n for word, n in words.items()) / total,
        words_whole=sum(n for word, n in words.items() if pieces[word] == 1) / total,
        tokens_per_term={kind: statistics.mean(counts) for kind, counts in by_kind.items()},
        terms_whole={kind: counts.count(1) / len(counts) for kind, counts in by_kind.items()},
    )


def encoding_speeds(encodings: dict[str, tiktoken.Encoding], texts: list[str]) -> dict[str, float]:
    """MB/s of the vocabularies on one core, one after the other, several times: medians."""
    array, seconds = pa.array(texts), {name: [] for name in encodings}
    for _ in range(ROUNDS):
        for name, enc in encodings.items():
            began = time.perf_counter()
            encode_texts(enc, array)
            seconds[name].append(time.perf_counter() - began)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    return {name: megabytes / statistics.median(values) for name, values in seconds.items()}
