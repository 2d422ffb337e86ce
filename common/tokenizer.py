"""Tokenizers: GPT-2's byte-level BPE, one of any size trained here, or that of another model.

    enc = load_tokenizer("gpt2")                            # tiktoken's, 50,257 tokens
    enc = load_tokenizer("datasets/pydoc/vocab.tiktoken")   # trained by fineweb.py
    enc = load_tokenizer("some/folder")                     # Hugging Face's tokenizer.json
    enc.encode_ordinary("Hello"), enc.decode([15496]), enc.eot_token, enc.n_vocab

All are a tiktoken.Encoding. Tokenizers trained here use GPT-2's splitting pattern, and their last
token is <|endoftext|>. Those of other models may differ from that; see common/foreign.py.
"""

import base64
import binascii
import hashlib
import sys
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str  # GPT-2's splitting pattern
from tqdm import tqdm

from common.console import UserError, read_text
from common.foreign import (
    CHAR_TO_BYTE,
    END_OF_TEXT,
    ForeignEncoding,
    merge_pairs,
    read_tokenizer,
    spelled_bytes,
    steps_of,
)
from common.hub import TOKENIZER, download

if TYPE_CHECKING:
    import pyarrow
    from tokenizers import Tokenizer

# sha256 of GPT-2's vocabulary, in the format of vocab.tiktoken, and merges; see simplify
GPT2_CHECKSUM = "83568348561f72762689c638ebb30a596c915ce12ad0d300a48642b92c91fea2"

MIN_VOCAB_SIZE = 257  # all bytes, and <|endoftext|>
CUT = "\0cut\0"  # special token at which encode_texts cuts a text
WHITESPACE = r"\s\v\x{85}\pZ"  # the characters of \s in GPT-2's pattern, as Arrow spells them

# GPT-2's pattern without its look-ahead, for texts that are cut; see encode_texts.
CUT_TEXT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"


# ---------------------------------------------------------------------------------------------
# Loading and saving


def load_tokenizer(name_or_path: str | Path) -> tiktoken.Encoding:
    """The tokenizer `gpt2`, that of a file or folder, or that of a model on the hub.

    Files are vocab.tiktoken, tokenizer.json, or vocab.json with merges.txt next to it. Raises
    OSError if the tokenizer is not available, UserError if it is not a byte-level BPE.
    """
    # A local file or folder comes first, then the hub. The name gpt2 is taken.
    if str(name_or_path) == "gpt2":
        return load_gpt2()
    path = Path(name_or_path)
    if path.is_file():
        return load_file(path)
    if not path.is_dir():
        # Only a name like "owner/model" can be on the hub.
        is_hub_name = len(path.parts) == 2 and not path.is_absolute() and not path.suffix
        if not is_hub_name:
            raise OSError(
                f"no tokenizer {str(name_or_path)!r}: give gpt2, a vocab.tiktoken or "
                "tokenizer.json file, a folder with one of them, or the name of a model on the hub"
            )
        path = download(str(name_or_path), TOKENIZER)
    enc = load_folder(path)
    if enc is None:
        raise UserError(
            f"{name_or_path} has no tokenizer: vocab.tiktoken, tokenizer.json, or vocab.json and "
            "merges.txt"
        )
    return enc


def load_gpt2() -> tiktoken.Encoding:
    """GPT-2's tokenizer, which tiktoken downloads once and keeps in a cache."""
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        # The errors of `requests` are OSErrors; a wrong checksum is a ValueError.
        raise OSError(
            "GPT-2's vocabulary can't be downloaded: check the network, or set "
            "TIKTOKEN_CACHE_DIR to a folder with tiktoken's copy of it"
        ) from error


def load_folder(folder: Path) -> tiktoken.Encoding | None:
    """The tokenizer of a folder with vocab.tiktoken or Hugging Face's files; None without them."""
    if (folder / "vocab.tiktoken").exists():  # export.py writes it
        return load_file(folder / "vocab.tiktoken")
    foreign = read_tokenizer(folder)
    return foreign and simplify(foreign)


def load_file(path: Path) -> tiktoken.Encoding:
    """The tokenizer of a file, whose content tells its format."""
    # merges.txt is the only one that does not.
    text = "" if path.name == "merges.txt" else read_text(path)
    # The three formats: merges.txt; Hugging Face's JSON; the text that checkpoints store, which is
    # vocab.tiktoken or the JSON of a ForeignEncoding, whose first field is end_of_text.
    is_checkpoint_text = text.startswith('{"end_of_text"')
    if path.name == "merges.txt" or text.lstrip().startswith("{") and not is_checkpoint_text:
        foreign = read_tokenizer(path)
        assert foreign
        return simplify(foreign)
    try:
        return tokenizer_from_text(text)
    except UserError as error:
        # The message begins with "not a ...".
        raise UserError(f"{path} is {error}") from error


def simplify(foreign: ForeignEncoding) -> tiktoken.Encoding:
    """The same tokenizer in the form of those trained here, if it has that form.

    Then GPT-2's is `gpt2` again, and one exported from here the one that was exported.

    tiktoken merges any two neighbours that together are a token; Hugging Face's files list the
    pairs to merge. Both give the same ids on all texts if the pairs, in the order of the ids, are
    those that recover_merges finds. Why: suppose that tiktoken merges two neighbours x and y of a
    text into a token t, which the file makes of other parts. No merge has crossed the borders of
    t's bytes so far, so the same merges, in the same order, would have happened if these bytes
    were the whole text. But that text is what recover_merges has looked at: its last two parts are
    those in the file.
    """
    description = foreign.description
    added = description["added_tokens"]
    # Tokenizers of this form split by GPT-2's pattern, and have one special token.
    if (
        not splits_like_gpt2(description)
        or [token["content"] for token in added] != [END_OF_TEXT]
        or not added[0]["special"]
        or foreign.end_of_text != END_OF_TEXT
    ):
        return foreign

    # The ids must run without a gap, <|endoftext|> last, and all bytes must have a token.
    vocab = {token: i for token, i in description["model"]["vocab"].items() if token != END_OF_TEXT}
    if any(char not in CHAR_TO_BYTE for token in vocab for char in token):
        return foreign
    ranks = {spelled_bytes(token): i for token, i in vocab.items()}
    if sorted(ranks.values()) != list(range(foreign.eot_token)):
        return foreign
    if not all(bytes([byte]) in ranks for byte in range(256)):
        return foreign

    # GPT-2's tokenizer, recognized by its checksum, gets its name back. In all others, the merges
    # must be those that follow from the ids.
    enc = encoding_of(ranks)
    pairs = merge_pairs(description)
    merges = [(spelled_bytes(left), spelled_bytes(right)) for left, right in pairs]
    content = tokenizer_to_text(enc) + repr(merges)
    if hashlib.sha256(content.encode()).hexdigest() == GPT2_CHECKSUM:
        enc.name = "gpt2"
        return enc
    return enc if merges == recover_merges(ranks) else foreign


def splits_like_gpt2(description: dict) -> bool:
    """Whether a tokenizer.json file splits texts by GPT-2's pattern and does nothing else first."""
    splits = steps_of(description["pre_tokenizer"])
    return (
        not description.get("normalizer")
        and len(splits) == 1
        and splits[0].get("type") == "ByteLevel"
        and not splits[0].get("add_prefix_space", True)
        and splits[0].get("use_regex", True)
    )


def tokenizer_to_text(enc: tiktoken.Encoding) -> str:
    """A tokenizer as checkpoints store it: `gpt2`, or the text of its vocab.tiktoken file.

    A line of that file is a token in base64 and its rank, which is also its id. A tokenizer of
    another model that does not fit into this format is JSON; see ForeignEncoding.
    """
    if enc.name == "gpt2":
        return "gpt2"
    if isinstance(enc, ForeignEncoding):
        return enc.text
    # <|endoftext|> has no line: its id follows from the number of lines.
    ranks = sorted(enc._mergeable_ranks.items(), key=lambda item: item[1])
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks)


def tokenizer_from_text(text: str) -> tiktoken.Encoding:
    """The inverse of tokenizer_to_text. Raises UserError if the text is not a vocabulary."""
    if text.strip() == "gpt2":
        return load_gpt2()
    if text.startswith("{"):
        try:
            return ForeignEncoding(text)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"not a tokenizer: its JSON is damaged ({error!r})") from error
    try:
        pairs = [line.split() for line in text.splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error) as error:
        raise UserError(
            "not a vocabulary: each line must be a token in base64 and its rank"
        ) from error
    # Without a token for each byte, some texts could not be encoded.
    has_all_bytes = all(bytes([byte]) in ranks for byte in range(256))
    if not has_all_bytes or sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(
            "not a byte-level vocabulary: it must contain all bytes, and its ranks must be "
            "0, 1, 2 ... without a gap"
        )
    return encoding_of(ranks)


def encoding_of(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """The tokenizer with these tokens and <|endoftext|> after them."""
    return tiktoken.Encoding(
        f"bpe{len(ranks) + 1}",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: len(ranks)},
    )


# ---------------------------------------------------------------------------------------------
# Encoding many texts


def encode_texts(
    enc: tiktoken.Encoding, texts: "pyarrow.StringArray"
) -> tuple[np.ndarray, list[int]]:
    r"""Encode documents for the shards: <|endoftext|> before each, empty ones left out.

    Returns the ids of all texts, uint16 or uint32, and the number of ids of each text. They are
    those of enc.encode_ordinary, in two thirds of the time.

    GPT-2's pattern splits a text into pieces, in which BPE then works. Of several whitespace
    characters before a word, the last one is a piece by itself or begins the word's piece. The
    pattern finds it by a look-ahead, `\s+(?!\S)`, which makes the regex engine backtrack. Here the
    texts are cut at these places first, and a pattern without look-ahead splits the rest:

        text                               "a   b"
        pieces by GPT-2's pattern          "a", "  ", " b"
        text after cutting                 "a  " CUT " b"
        pieces without the look-ahead      "a", "  ", CUT, " b"

    Why the pieces, and therefore the ids, are the same: each run of two or more whitespace
    characters that a word follows has one cut, before its last character, and `\s+` can't reach
    across it. All other runs (single characters, and those at the end of a text) are one piece
    in both patterns, or begin the word's piece in both.

    CUT is a special token with the id n_vocab, filtered out at the end. A text with a null
    character could contain CUT itself, so its whole batch is split by GPT-2's pattern. Tokenizers
    of other models split in their way.
    """
    import pyarrow.compute as pc  # imported here: only sharding needs it

    has_null_character = any("\0" in text for text in texts.to_pylist() if text)
    if has_null_character or isinstance(enc, ForeignEncoding):
        # Without cuts: the text itself could contain CUT, or the tokenizer has another pattern.
        splitter = enc
        special_tokens = set()
    else:
        splitter = cut_text_encoding(enc)
        special_tokens = {CUT}
        # Matches end with a character that is not whitespace, so they never overlap.
        before_last = f"([{WHITESPACE}])([{WHITESPACE}][^{WHITESPACE}])"
        texts = pc.replace_substring_regex(texts, before_last, rf"\1{CUT}\2")

    # The arrays of all texts are joined once: appending to one array would copy it each time.
    end_of_text = np.array([enc.eot_token], dtype=np.uint32)
    parts = []
    lengths = []
    for text in texts.to_pylist():
        if not text:
            lengths.append(0)
            continue
        # disallowed_special=(): <|endoftext|> inside a document is ordinary text.
        ids = splitter.encode_to_numpy(
            text, allowed_special=special_tokens, disallowed_special=()
        )  # (tokens and cuts,) uint32
        parts += [end_of_text, ids]
        lengths.append(1 + np.count_nonzero(ids != enc.n_vocab))
    # Remove the cuts. The remaining ids fit into 16 bits if the vocabulary does.
    ids = np.concatenate(parts) if parts else np.empty(0, np.uint32)
    dtype = np.uint16 if enc.n_vocab <= 65536 else np.uint32
    return ids[ids != enc.n_vocab].astype(dtype), lengths


@lru_cache
def cut_text_encoding(enc: tiktoken.Encoding) -> tiktoken.Encoding:
    """The tokenizer for texts that are cut: same tokens, no look-ahead, CUT has the id n_vocab."""
    return tiktoken.Encoding(
        f"{enc.name} for texts that are cut",
        pat_str=CUT_TEXT_PATTERN,
        mergeable_ranks=enc._mergeable_ranks,
        special_tokens={CUT: enc.n_vocab},
    )


# ---------------------------------------------------------------------------------------------
# Training


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "tuple[tiktoken.Encoding, Tokenizer]":
    """Learn a byte-level BPE of vocab_size tokens, including <|endoftext|>, from texts.

    Hugging Face's `tokenizers` does the training. Returns the result as a tiktoken.Encoding and as
    the library's own object; both give the same ids. Raises UserError if vocab_size is below 257
    or the texts are too short for that many tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # it is slow

    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"a vocabulary of {vocab_size} tokens is too small: "
            f"the bytes alone need {MIN_VOCAB_SIZE}"
        )

    # GPT-2's way: the text is split by its pattern, and merges work on the bytes of the pieces.
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # <|endoftext|> is added last
        # All 256 bytes, also those that the texts do not contain
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    library.train_from_iterator(texts, trainer)
    library.add_special_tokens([END_OF_TEXT])
    # Training ends early if no pair is left to merge.
    if library.get_vocab_size() < vocab_size:
        raise UserError(
            f"the texts give only {library.get_vocab_size()} tokens, not {vocab_size}: "
            "lower the size"
        )

    # The library spells each byte as a printable character; tiktoken wants the bytes.
    vocab = library.get_vocab(with_added_tokens=False)
    ranks = {spelled_bytes(token): rank for token, rank in vocab.items()}
    return encoding_of(ranks), library


# ---------------------------------------------------------------------------------------------
# Hugging Face's files


def recover_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges of a BPE, in the order in which they were learned.

    Hugging Face's files list merges, ours only the tokens with their ranks. The last merge of a
    token joins two parts; encoding the token with the tokens of lower rank gives these parts.
    """
    merges = []
    by_rank = sorted(ranks.items(), key=lambda item: item[1])
    for token, rank in tqdm(by_rank, "merges", leave=False, delay=2):
        # Encode the token with the tokens of lower rank, from its bytes on. In GPT-2's, "the" is
        # "t", "h", "e", then "t", "he".
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            # Merge the pair with the lowest rank, as BPE does when it encodes.
            pair_ranks = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            first = min(range(len(pair_ranks)), key=pair_ranks.__getitem__)
            if pair_ranks[first] >= rank:
                break
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        # Single bytes are one part: they are in the vocabulary without a merge.
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges
