"""Byte-level BPE tokenizers of other projects, read from Hugging Face's files.

    enc = read_tokenizer("some/folder")     # tokenizer.json, or vocab.json and merges.txt
    enc.encode_ordinary("Hello"), enc.decode([15496]), enc.eot_token, enc.n_vocab

tiktoken knows one kind of BPE: a token's id is also the priority of its merge, and one pattern
splits the text. Other tokenizers have special tokens anywhere, ids in any order, several merges for
a token, missing bytes, a normalizer, or several splitting steps. So ForeignEncoding has the
interface of a tiktoken.Encoding, but the `tokenizers` library, for which these files are made,
computes the ids.
"""

import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tiktoken

from common.console import UserError, read_lines, read_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
# End-of-text tokens by convention, for tokenizers whose files do not name one.
USUAL_END_OF_TEXT = (END_OF_TEXT, "</s>", "<eos>", "[EOS]", "<|end_of_text|>")

# Files that reveal a tokenizer of another kind in a folder without tokenizer.json
OTHER_KINDS = {
    "vocab.txt": "WordPiece (BERT)",
    "tokenizer.model": "SentencePiece",
    "spiece.model": "SentencePiece",
    "sentencepiece.bpe.model": "SentencePiece",
    "spm.model": "SentencePiece",
}
# Tokenizer classes of transformers that split texts by GPT-2's pattern.
GPT2_CLASSES = {"GPT2", "Roberta", "Bart", "Longformer", "LED", "CodeGen"}


def byte_to_char() -> dict[int, str]:
    """The printable character by which GPT-2, and so Hugging Face's files, write each byte.

    Printable bytes are themselves. The others become characters from 256 on: a space is "Ġ".
    """
    # ASCII without the space and control characters; Latin-1 without its control characters, the
    # no-break space and the soft hyphen.
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    not_printable = [byte for byte in range(256) if byte not in printable]
    chars = {byte: chr(byte) for byte in printable}
    return chars | {byte: chr(256 + n) for n, byte in enumerate(not_printable)}


CHAR_TO_BYTE = {char: byte for byte, char in byte_to_char().items()}


def spelled_bytes(token: str) -> bytes:
    """The bytes of a token as Hugging Face's files spell it; other texts stand for themselves."""
    if all(char in CHAR_TO_BYTE for char in token):
        return bytes(CHAR_TO_BYTE[char] for char in token)
    return token.encode()


# ---------------------------------------------------------------------------------------------
# The tokenizer


class ForeignEncoding(tiktoken.Encoding):
    """A byte-level BPE of another project with the interface of a tiktoken.Encoding.

    `text` is how checkpoints store it: JSON with `end_of_text`, the end-of-text token, and
    `tokenizer`, the content of a tokenizer.json file. In `encode`, <|endoftext|> means the
    end-of-text token, even if the tokenizer calls it something else.

    Raises UserError if the tokenizer is not a byte-level BPE, or is damaged.
    """

    def __init__(
        self,
        text: str,
        source: str | Path = "the tokenizer",
        library: "Tokenizer | None" = None,  # made from `text` if absent
    ):
        self.text = text
        description = json.loads(text)
        self.description = description["tokenizer"]
        self.end_of_text = description["end_of_text"]
        library = library or make_library(self.description, source)
        end_of_text_id = library.token_to_id(self.end_of_text)
        if end_of_text_id is None:
            raise UserError(f"{source} has no token {self.end_of_text!r}")

        # The fields of tiktoken.Encoding, on which its methods rely.
        added = library.get_added_tokens_decoder()
        self._special_tokens = {token.content: i for i, token in added.items() if token.special}
        # Callers ask for GPT-2's name, whatever this tokenizer calls the token.
        self._special_tokens[END_OF_TEXT] = end_of_text_id
        self._special_token_values = set(self._special_tokens.values())
        self.max_token_value = max(library.get_vocab().values())
        self.name = f"foreign{self.max_token_value + 1}"
        # tiktoken's methods call this object for everything that needs the vocabulary.
        self._core_bpe = ForeignBPE(library, self.end_of_text)

    def __getstate__(self) -> str:
        # tiktoken pickles ranks and a pattern, which this tokenizer does not have. Its text is
        # enough.
        return self.text

    def __setstate__(self, value: object):
        self.__dict__ = ForeignEncoding(str(value)).__dict__


class ForeignBPE:
    """Stands in for tiktoken's CoreBPE, the object that encodes and decodes for an Encoding."""

    def __init__(self, library: "Tokenizer", end_of_text: str):
        self.library = library
        self.end_of_text = end_of_text
        self.has_gpt2s_name = library.token_to_id(END_OF_TEXT) is not None
        self.added = library.get_added_tokens_decoder()

    @cached_property
    def bytes_of(self) -> dict[int, bytes]:
        """The bytes of each token."""
        # Added tokens are stored as plain text, the others with one character per byte.
        table = {i: spelled_bytes(token) for token, i in self.library.get_vocab().items()}
        return table | {i: token.content.encode() for i, token in self.added.items()}

    def encode_ordinary(self, text: str) -> list[int]:
        return self.encode(text, set())

    def encode(self, text: str, allowed_special: Iterable[str]) -> list[int]:
        """Token ids. Special tokens in the text are tokens if any are allowed, else text."""
        text.encode()  # raises UnicodeEncodeError, which tiktoken.Encoding handles
        if END_OF_TEXT in allowed_special and not self.has_gpt2s_name:
            text = text.replace(END_OF_TEXT, self.end_of_text)
        # This is a setting of the library, not an argument: set it before every call.
        self.library.encode_special_tokens = not allowed_special
        return self.library.encode(text, add_special_tokens=False).ids

    def encode_to_tiktoken_buffer(self, text: str, allowed_special: Iterable[str]) -> bytes:
        return np.array(self.encode(text, allowed_special), np.uint32).tobytes()

    def encode_single_token(self, token: bytes) -> int:
        # Only a few tokens are looked up this way, so no table is kept for it.
        for i, spelled in self.bytes_of.items():
            if spelled == token:
                return i
        raise KeyError(token)

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        return b"".join(self.decode_single_token_bytes(token) for token in tokens)

    def decode_single_token_bytes(self, token: int) -> bytes:
        # Some vocabularies have ids without a token. A model may still sample them.
        return self.bytes_of.get(int(token), b"")

    def token_byte_values(self) -> list[bytes]:
        return sorted(self.bytes_of.values())


def make_library(description: dict, source: str | Path) -> "Tokenizer":
    """The library's tokenizer from the content of a tokenizer.json file. Raises UserError."""
    # Imported here: it takes up to 0.3 s, and models with GPT-2's tokenizer do not need it.
    from tokenizers import Tokenizer

    reject_other_kinds(description, source)
    try:
        library = Tokenizer.from_str(json.dumps(description))
    except Exception as error:  # the library raises plain Exceptions
        raise UserError(f"{source} is damaged, or needs a newer tokenizers: {error}") from error
    # The library numbers added tokens itself, without gaps.
    for token in description.get("added_tokens") or []:
        if library.token_to_id(token["content"]) != token["id"]:
            raise UserError(
                f"{source} is inconsistent: its added token {token['content']!r} can't have the "
                f"id {token['id']}, the next free one is {library.token_to_id(token['content'])}"
            )
    return library


def reject_other_kinds(description: dict, source: str | Path):
    """Raise UserError, with the kind of the tokenizer, unless it is a byte-level BPE."""
    model = description.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise UserError(f"{source} is not a tokenizer: it has no model with a vocabulary")
    # Byte-level BPE has a ByteLevel step, which turns bytes into characters, in one of these.
    steps = steps_of(description.get("pre_tokenizer")) + steps_of(description.get("normalizer"))
    step_types = {step.get("type") for step in steps}
    # Old files don't name the type. Of the two that they can have, only BPE has merges.
    kind = model.get("type") or ("BPE" if "merges" in model else "WordPiece")
    suffix = model.get("end_of_word_suffix")

    # Name the kind as users know it. The only case that is accepted is the last one.
    if kind == "Unigram":
        kind = "Unigram (SentencePiece)"
    elif kind == "WordPiece":
        kind = "WordPiece (BERT)"
    elif kind == "BPE" and model.get("byte_fallback"):
        kind = "BPE with byte fallback (SentencePiece)"
    elif kind == "BPE" and suffix:
        kind = f"BPE of words that end in {suffix}"
    elif kind == "BPE" and model.get("continuing_subword_prefix"):
        kind = f"BPE of words continued by {model['continuing_subword_prefix']}"
    elif kind == "BPE" and "ByteLevel" not in step_types:
        kind = "BPE of characters, not of bytes"
    elif kind == "BPE":
        return
    raise UserError(f"{source} is {kind}: only byte-level BPE, like GPT-2's, is supported")


def steps_of(component: dict | None) -> list[dict]:
    """The steps of a pre-tokenizer or normalizer, which may be a (nested) sequence of them."""
    if not component:
        return []
    if component.get("type") != "Sequence":
        return [component]
    parts = component.get("pretokenizers") or component.get("normalizers") or []
    return [step for part in parts for step in steps_of(part)]


def merge_pairs(description: dict) -> list[tuple[str, str]]:
    """The merges of a description. Older files have strings, "a b", in place of pairs."""
    merges = description["model"]["merges"]
    return [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]


# ---------------------------------------------------------------------------------------------
# Hugging Face's files


def read_tokenizer(path: str | Path) -> ForeignEncoding | None:
    """The tokenizer of a Hugging Face folder, or of a tokenizer.json file; None if it has none.

    tokenizer.json decides how texts are split, as in transformers 4. For models of GPT-2's class,
    transformers 5 splits by GPT-2's pattern, whatever the file says.

    Raises UserError if it is not a byte-level BPE, or has no end-of-text token.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    # A file by another name does not belong to the other files of its folder.
    is_complete = path.is_dir() or path.name in ("tokenizer.json", "vocab.json", "merges.txt")
    settings = {}
    model_settings = {}
    if is_complete:
        # Where the two files disagree, tokenizer_config.json counts.
        roles = read_json(folder / "special_tokens_map.json")
        settings = roles | read_json(folder / "tokenizer_config.json")
        model_settings = read_json(folder / "config.json")

    # Find the vocabulary and bring it into the form of tokenizer.json.
    json_file = folder / "tokenizer.json" if path.is_dir() else path
    if path.name in ("vocab.json", "merges.txt"):
        description = read_vocab_and_merges(folder, settings)
        source = folder / "vocab.json"
    elif json_file.exists():
        description = read_json(json_file)
        source = json_file
    else:
        reject_other_files(folder, settings)
        if not (folder / "vocab.json").exists():
            return None
        description = read_vocab_and_merges(folder, settings)
        source = folder / "vocab.json"

    # Change it as transformers would, and let the library check the result.
    reject_other_kinds(description, source)
    try:
        apply_settings(description, settings)
        drop_tokens_without_embedding(description, model_settings.get("vocab_size"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{source} or its tokenizer_config.json is damaged: {error!r}") from error

    # A stream of documents needs an end-of-text token between them.
    library = make_library(description, source)
    end_of_text = find_end_of_text(library, settings, model_settings)
    if end_of_text is None:
        raise UserError(
            f"{source} has no end-of-text token: name one of its tokens as eos_token in "
            f"{folder / 'tokenizer_config.json'}"
        )
    # The text that checkpoints store
    text = json.dumps(dict(end_of_text=end_of_text, tokenizer=description), ensure_ascii=False)
    return ForeignEncoding(text, source, library)


def read_json(path: Path) -> dict:
    """A JSON object from a file; empty if the file does not exist."""
    if not path.exists():
        return {}
    try:
        value = json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: not a JSON object")
    return value


def reject_other_files(folder: Path, settings: dict):
    """Raise UserError if a folder without tokenizer.json has a tokenizer that we can't read."""
    # A vocabulary of another kind, which the message can name
    for name, kind in OTHER_KINDS.items():
        if (folder / name).exists():
            raise UserError(
                f"{folder / name} is {kind}: only byte-level BPE, like GPT-2's, is supported"
            )

    # One file of the pair without the other
    has_vocab = (folder / "vocab.json").exists()
    if has_vocab != (folder / "merges.txt").exists():
        missing = "merges.txt" if has_vocab else "vocab.json"
        raise UserError(f"{folder} has no {missing}: vocab.json and merges.txt belong together")

    # vocab.json and merges.txt don't say how texts are split: only the class does.
    tokenizer_class = settings.get("tokenizer_class") or "GPT2Tokenizer"
    if re.sub("Tokenizer(Fast)?$", "", tokenizer_class) not in GPT2_CLASSES:
        raise UserError(
            f"{folder} has a {tokenizer_class} but no tokenizer.json: write it with "
            "transformers' AutoTokenizer and save_pretrained"
        )


def read_vocab_and_merges(folder: Path, settings: dict) -> dict:
    """vocab.json and merges.txt in the form of tokenizer.json."""
    reject_other_files(folder, settings)
    vocab = read_json(folder / "vocab.json")
    # A line of merges.txt is a pair of tokens, "Ġ t". The first line is usually "#version: 0.2".
    merges = []
    for number, line in enumerate(read_lines(folder / "merges.txt"), 1):
        if not line.strip() or number == 1 and line.startswith("#version"):
            continue
        parts = line.split(" ")
        if len(parts) != 2 or not all(token in vocab for token in (*parts, "".join(parts))):
            raise UserError(
                f"{folder / 'merges.txt'}, line {number}, is not a merge of two tokens of "
                "vocab.json into a third"
            )
        merges.append(line)
    # GPT-1 and CLIP mark the end of a word with </w>, GPT-2 its beginning with a blank.
    if any(token.endswith("</w>") for token in vocab):
        raise UserError(
            f"{folder / 'vocab.json'} is BPE of words that end in </w>: only byte-level BPE, like "
            "GPT-2's, is supported"
        )

    # Special tokens: those that have a role, and those that were added later.
    specials: set[str] = {END_OF_TEXT}
    for role, value in settings.items():
        if role.endswith("_token") or role == "additional_special_tokens":
            values = value if isinstance(value, list) else [value]
            specials |= {str(content_of(token)) for token in values if token}
    ids = {token: vocab[token] for token in specials if token in vocab}
    # added_tokens.json maps tokens to their ids: {"[PAD]": 50257}.
    ids |= read_json(folder / "added_tokens.json")
    # GPT-2's splitting pattern, then bytes written as characters; the decoder undoes the latter.
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    return dict(
        version="1.0",
        truncation=None,
        padding=None,
        added_tokens=[added_token(token, ids[token]) for token in sorted(ids, key=ids.__getitem__)],
        normalizer=None,
        pre_tokenizer=byte_level,
        post_processor=None,
        decoder=byte_level,
        model=dict(type="BPE", vocab=vocab, merges=merges),
    )


def content_of(token: str | dict | None) -> str | None:
    """The text of a token as the settings name it: a string, or an object with `content`."""
    return token.get("content") if isinstance(token, dict) else token


def added_token(content: str, number: int, **flags: bool) -> dict:
    """An entry of `added_tokens`."""
    defaults = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    return dict(id=number, content=content) | defaults | flags


def apply_settings(description: dict, settings: dict):
    """Change a description as transformers does when it reads tokenizer_config.json as well."""
    # These would cut texts off, fill them up, or encode them at random.
    description["truncation"] = None
    description["padding"] = None
    description["model"].pop("dropout", None)

    # GPT-2's class decides about the space before a text, whatever tokenizer.json says.
    tokenizer_class = settings.get("tokenizer_class") or "GPT2Tokenizer"
    add_prefix_space = settings.get("add_prefix_space")
    # The default of the class counts only if the settings name the class.
    if add_prefix_space is None and "tokenizer_class" in settings:
        add_prefix_space = False
    if tokenizer_class.startswith("GPT2") and isinstance(add_prefix_space, bool):
        for step in steps_of(description["pre_tokenizer"]):
            if step["type"] == "ByteLevel":
                step["add_prefix_space"] = add_prefix_space

    # Add the tokens that only tokenizer_config.json lists, by their ids:
    #     "50257": {"content": "[PAD]", "lstrip": false, "special": true, ...}
    # A token that tokenizer.json also lists keeps the entry of that file.
    added = {token["content"]: token for token in description.get("added_tokens") or []}
    for number, fields in (settings.get("added_tokens_decoder") or {}).items():
        flags = {key: value for key, value in fields.items() if isinstance(value, bool)}
        token = added_token(fields["content"], int(number), **flags)
        added.setdefault(fields["content"], token)
    description["added_tokens"] = sorted(added.values(), key=lambda token: token["id"])


def drop_tokens_without_embedding(description: dict, vocab_size: int | None):
    """Remove the added special tokens that the model has no embeddings for.

    A [PAD] that was added to the tokenizer only: a text never contains it, so the model works.
    """
    # Nothing to compare with; or a vocabulary that is too large even without added tokens, which
    # load_model_tokenizer reports.
    if not isinstance(vocab_size, int) or len(description["model"]["vocab"]) > vocab_size:
        return
    description["added_tokens"] = [
        token
        for token in description["added_tokens"]
        if token["id"] < vocab_size or not token["special"]
    ]


def find_end_of_text(library: "Tokenizer", settings: dict, model_settings: dict) -> str | None:
    """The end-of-text token: the eos_token of the settings, else one by convention."""
    special = {i: token.content for i, token in library.get_added_tokens_decoder().items()}

    # config.json has one id or a list of them. Of a list, the first is taken.
    end_ids = model_settings.get("eos_token_id")
    end_id = end_ids[0] if isinstance(end_ids, list) and end_ids else end_ids
    candidates = [content_of(settings.get("eos_token")), END_OF_TEXT]
    # transformers writes GPT-2's 50256 for models of any vocabulary: it must be a special token.
    if isinstance(end_id, int):
        candidates.append(special.get(end_id))

    # The first candidate that the tokenizer really has
    for token in (*candidates, *USUAL_END_OF_TEXT):
        if token and library.token_to_id(token) is not None:
            return token
    return None
