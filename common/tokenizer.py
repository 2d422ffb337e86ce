"""Tokenizers: GPT-2's own byte-level BPE, or one of any size that we train in the same manner.

    enc = load_tokenizer("gpt2")                        # tiktoken's, 50,257 tokens
    enc = load_tokenizer("datasets/pydoc/vocab.tiktoken")  # one of ours
    enc.encode_ordinary("Hello"), enc.decode([15496]), enc.eot_token, enc.n_vocab

Either is a tiktoken.Encoding. Ours use GPT-2's splitting pattern, and <|endoftext|> is their last token.
"""

import base64
import binascii
import sys
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str  # GPT-2's splitting pattern
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from common.console import UserError

if TYPE_CHECKING:
    import pyarrow

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # every byte, and <|endoftext|>
CUT = "\0cut\0"  # marks the places where encode_texts cuts a text
BLANK = r"\s\v\x{85}\pZ"  # what \s is in GPT-2's pattern, in the words of Arrow's regex


def load_tokenizer(name_or_path: str | Path) -> tiktoken.Encoding:
    """The tokenizer `gpt2`, or the one in a vocab.tiktoken file that `fineweb.py --train_tokenizer` wrote.

    Raises OSError if it can't be had, ValueError if the file is no vocabulary.
    """
    if str(name_or_path) != "gpt2":
        try:
            return tokenizer_from_text(Path(name_or_path).read_text("ascii"))
        except FileNotFoundError as error:
            raise OSError(
                f"no tokenizer {str(name_or_path)!r}: give gpt2, or a vocab.tiktoken file"
            ) from error
        except UnicodeDecodeError as error:
            raise UserError(f"{name_or_path} is not a vocab.tiktoken file") from error
    try:
        return tiktoken.get_encoding("gpt2")
    except (
        OSError,
        ValueError,
    ) as error:  # requests' errors are OSErrors; a wrong checksum is a ValueError
        raise OSError(
            "GPT-2's vocabulary can't be downloaded: check the network, or set TIKTOKEN_CACHE_DIR to a folder "
            "that holds tiktoken's copy of it"
        ) from error


def tokenizer_to_text(enc: tiktoken.Encoding) -> str:
    """What a checkpoint keeps of a tokenizer: `gpt2`, or the text of its vocab.tiktoken ("base64 rank" a line)."""
    if enc.name == "gpt2":
        return "gpt2"
    ranks = sorted(enc._mergeable_ranks.items(), key=lambda item: item[1])
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks)


def tokenizer_from_text(text: str) -> tiktoken.Encoding:
    """The inverse of tokenizer_to_text. Raises ValueError if the text is no vocabulary."""
    if text.strip() == "gpt2":
        return load_tokenizer("gpt2")
    try:
        pairs = [line.split() for line in text.splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error) as error:
        raise UserError(
            "not a vocabulary: each line must hold a token in base64 and its rank"
        ) from error
    if sorted(ranks.values()) != list(range(len(ranks))) or any(
        bytes([b]) not in ranks for b in range(256)
    ):
        raise UserError(
            "not a byte-level vocabulary: ranks must run from 0 without a gap and include every byte"
        )
    return encoding_of(ranks)


def encoding_of(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        f"bpe{len(ranks) + 1}",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: len(ranks)},
    )


def encode_texts(
    enc: tiktoken.Encoding, texts: "pyarrow.StringArray"
) -> tuple[np.ndarray, list[int]]:
    """Ids of the texts, <|endoftext|> before each, and the number for each; an empty text has none.

    They are those of enc.encode_ordinary, in two thirds of its time. Of several blanks before a word, GPT-2's pattern
    leaves the last one to the word, by a look-ahead that bars the regex engine from its fast automaton. Here the texts
    are cut at these places first, and a pattern without look-ahead finds the same pieces in between.
    """
    import pyarrow.compute as pc  # late: only the sharding needs it

    quick, cuts = quick_encoding(enc), {CUT}
    if any("\0" in text for text in filter(None, texts.to_pylist())):
        quick, cuts = enc, set()
    else:
        texts = pc.replace_substring_regex(
            texts, f"([{BLANK}])([{BLANK}][^{BLANK}])", rf"\1{CUT}\2"
        )
    end_of_text = np.array([enc.eot_token], dtype=np.uint32)
    parts, lengths = [], []
    for text in texts.to_pylist():
        lengths.append(0)
        if text:
            ids = quick.encode_to_numpy(
                text, allowed_special=cuts, disallowed_special=()
            )  # <|endoftext|> is text here
            parts += [end_of_text, ids]
            lengths[-1] = 1 + np.count_nonzero(ids != enc.n_vocab)
    ids = np.concatenate(parts) if parts else np.empty(0, np.uint32)
    return ids[ids != enc.n_vocab].astype(np.uint16 if enc.n_vocab <= 65536 else np.uint32), lengths


@lru_cache
def quick_encoding(enc: tiktoken.Encoding) -> tiktoken.Encoding:
    """The same vocabulary under the pattern without look-ahead, for texts that are cut; a cut has the id n_vocab."""
    return tiktoken.Encoding(
        f"{enc.name} for texts that are cut",
        pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+",
        mergeable_ranks=enc._mergeable_ranks,
        special_tokens={CUT: enc.n_vocab},
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> tuple[tiktoken.Encoding, Tokenizer]:
    """Learn a byte-level BPE of vocab_size tokens, <|endoftext|> among them, with Hugging Face `tokenizers`.

    Returns it as a tiktoken.Encoding and as the library's own object; both give the same ids.
    Raises ValueError if the size is below 257 or the texts are too few for that many tokens.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"a vocabulary of {vocab_size} tokens is too small: the bytes alone need {MIN_VOCAB_SIZE}"
        )
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # <|endoftext|> comes last
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    library.train_from_iterator(texts, trainer)
    library.add_special_tokens([END_OF_TEXT])
    if library.get_vocab_size() < vocab_size:
        raise UserError(
            f"the texts give only {library.get_vocab_size()} tokens, not {vocab_size}: lower the size"
        )
    to_byte = {char: byte for byte, char in byte_to_char().items()}
    vocab = library.get_vocab(with_added_tokens=False)
    ranks = {bytes(to_byte[char] for char in token): rank for token, rank in vocab.items()}
    return encoding_of(ranks), library


def recover_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs that a BPE's tokens were merged from, in order: each token's own parts under the ranks below its."""
    merges = []
    for token, rank in tqdm(
        sorted(ranks.items(), key=lambda item: item[1]), "merges", leave=False, delay=2
    ):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            lowest = min(range(len(pairs)), key=pairs.__getitem__)
            if pairs[lowest] >= rank:
                break
            parts[lowest : lowest + 2] = [parts[lowest] + parts[lowest + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def byte_to_char() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte, with which Hugging Face's files spell tokens."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}
