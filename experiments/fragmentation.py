"""How a vocabulary splits text: tokens per byte and per word, pieces per technical term, speed.

A technical term belongs to the first kind that fits:

    code-like   a digit after a letter, an underscore or dot inside, or a capital after a small
                letter: utf8, file_name, os.path, camelCase
    compound    words joined by hyphens: well-known
    long        12 letters or more
    rare        4 to 11 letters, at most RARE times in the text that the vocabularies learn from
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

# The first lookahead excludes names like McDonald, the second requires a letter.
CODE_LIKE = re.compile(
    r"(?!Ma?c[A-Z])(?=\S*[A-Za-z])\S*(?:[A-Za-z]\d|\w_\w|[A-Za-z]{2}\.[A-Za-z]{2}|[a-z][A-Z])\S*"
)
COMPOUND = re.compile(r"[A-Za-z]+(?:-[A-Za-z]+)+")
LETTERS = re.compile(r"[A-Za-z]+")
PUNCTUATION = "\"'`()[]{}<>,.;:!?*=|/-_"  # removed from both ends of a word
# The module's docstring defines the kinds of terms, and what is rare.
RARE = 3
TERM_KINDS = ("code-like", "compound", "long", "rare")
SPEED_ROUNDS = 5


def count_words(texts: Iterable[str]) -> Counter:
    """How often each sequence of letters occurs."""
    counts = Counter()
    for text in texts:
        counts.update(LETTERS.findall(text))
    return counts


def find_terms(
    texts: list[str], known: Counter, count: int
) -> tuple[Counter, dict[str, list[str]]]:
    """The words and the technical terms of held-out texts.

    `known` says how often each word occurs in the text that the vocabularies learn from. Returns
    the number of occurrences of each word of letters, and of each kind of term up to `count`
    examples in random order (the same in each call).
    """
    words = Counter()
    terms = {kind: set() for kind in TERM_KINDS}
    # Terms with other characters than letters are complete between blanks.
    for text in texts:
        for word in text.split():
            word = word.strip(PUNCTUATION)
            if LETTERS.fullmatch(word):
                words[word] += 1
            elif CODE_LIKE.fullmatch(word):
                terms["code-like"].add(word)
            elif COMPOUND.fullmatch(word):
                terms["compound"].add(word)
    # Each word of letters is classified only once.
    for word in words:
        if CODE_LIKE.fullmatch(word):
            terms["code-like"].add(word)
        elif len(word) >= 12:
            terms["long"].add(word)
        elif len(word) >= 4 and known[word] <= RARE:
            terms["rare"].add(word)

    rng = np.random.default_rng(0)
    chosen = {}
    for kind, all_terms in terms.items():
        # Sorted first, because the order of a set differs from one process to the next.
        chosen[kind] = rng.permutation(sorted(all_terms))[:count].tolist()
    return words, chosen


def measure_fragmentation(
    enc: tiktoken.Encoding, texts: list[str], words: Counter, terms: dict[str, list[str]]
) -> dict:
    """How a vocabulary splits the held-out texts with these words and terms (see find_terms).

    tokens_per_word and words_whole weigh words by their occurrences. "Whole" is the fraction of
    words or terms that are a single token.
    """

    # Words and terms are encoded one by one, as they are after a blank.
    def num_tokens(word: str) -> int:
        # In byte-level BPE, the blank before a word is part of its first token.
        return len(enc.encode_ordinary(" " + word))

    # The text as a whole
    _, lengths = encode_texts(enc, pa.array(texts))
    num_text_tokens = sum(lengths) - len(texts)  # without the end-of-text token of each text
    num_bytes = sum(len(text.encode()) for text in texts)

    # Its words, each encoded once, and its technical terms
    pieces = {word: num_tokens(word) for word in words}
    whole = sum(count for word, count in words.items() if pieces[word] == 1)
    tokens_per_term, terms_whole = {}, {}
    for kind, examples in terms.items():
        if examples:
            counts = [num_tokens(term) for term in examples]
            tokens_per_term[kind] = statistics.mean(counts)
            terms_whole[kind] = counts.count(1) / len(counts)

    # Words count by their occurrences, terms once each.
    return dict(
        vocab_size=enc.n_vocab,
        bytes_per_token=num_bytes / num_text_tokens,
        tokens_per_word=sum(pieces[word] * n for word, n in words.items()) / words.total(),
        words_whole=whole / words.total(),
        tokens_per_term=tokens_per_term,
        terms_whole=terms_whole,
    )


def encoding_speeds(encodings: dict[str, tiktoken.Encoding], texts: list[str]) -> dict[str, float]:
    """MB/s of each vocabulary on one core: the median of several rounds."""
    # Made once: encode_texts takes the texts as Arrow arrays.
    array = pa.array(texts)
    seconds = {name: [] for name in encodings}
    for _ in range(SPEED_ROUNDS):
        # In turn, so that all see the same disturbances by other processes.
        for name, enc in encodings.items():
            began = time.perf_counter()
            encode_texts(enc, array)
            seconds[name].append(time.perf_counter() - began)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    return {name: megabytes / statistics.median(values) for name, values in seconds.items()}
