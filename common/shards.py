"""Token shards on disk: a folder of files with token ids, and the manifest that describes them.

A shard has the word `train` or `val` in its file name. Three formats are read, one is written:

    *.npy                 ours: one-dimensional, uint16, or uint32 above 65,536 tokens
    *.bin                 of llm.c and modded-nanogpt: a header of 1,024 bytes, then uint16
    train.bin, val.bin    of nanoGPT: uint16 without a header

The manifest names the tokenizer and lists the shards, each with its number of tokens, its checksum
and the position in the source at which the next one begins. docs/formats.md lists all fields.
Folders of other projects need no manifest; their tokenizer is then taken to be GPT-2's.
"""

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shorten
from typing import TypedDict

import numpy as np
import tiktoken

from common.console import Progress, UserError, checksum, say, write_atomically, write_text
from common.tokenizer import load_tokenizer

# File in the folder of the shards that describes them
MANIFEST = "manifest.json"
GPT2_VOCAB_SIZE = 50257

# A .bin file begins with 256 int32: magic number, version, number of tokens, zeros.
BIN_HEADER_INTS = 256
BIN_HEADER_BYTES = 4 * BIN_HEADER_INTS
BIN_MAGIC = 20240520
BIN_VERSION = 1

# what nanoGPT writes next to train.bin and val.bin if their tokens are not GPT-2's
NANOGPT_VOCABULARY = "meta.pkl"
SAMPLE_BYTES = 4096  # of each end of a shard that has no checksum in a manifest, for a fingerprint
# words in the names of shards
SPLIT_WORDS = {"train": {"train", "training"}, "val": {"val", "valid", "validation"}}
# smallest corpus: the tenth for validation then has two tokens, so that one can be predicted
MIN_TOKENS = 20


class Position(TypedDict):
    """A place in the source. The manifest stores one for each shard: where the next shard begins.

    A stream can be entered only where its state was recorded, which is once per batch of documents.
    So a position is that state, the documents of the batch to skip, and the tokens of the next
    document to skip, because they are in the previous shard already.

        batch read from state S    | document 100 | document 101 | document 102 |
        tokens in the full shard    xxxxxxxxxxxxxx xxxxx
        tokens in the next shard                        ........ ..............

        next position: document=101, token=5, state=S, skip=1
    """

    # number of the document, counted from the start of the source; each part of a document that
    # is read in parts counts
    document: int
    token: int  # tokens of this document that are in earlier shards
    state: dict | None  # state of the stream before the batch; None = at the start of the source
    skip: int  # documents between that state and this document


SOURCE_START = Position(document=0, token=0, state=None, skip=0)


# ---------------------------------------------------------------------------------------------
# Reading


@dataclass
class Shards:
    """The shards of one split, sorted by name. Opening them has read only their headers."""

    split: str
    paths: list[Path]
    lengths: list[int]  # number of tokens in each shard
    vocab_size: int  # all ids must be below this

    def __post_init__(self):
        self._mapped_shard = -1  # none yet
        self._mapped_tokens = np.empty(0, np.uint16)

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all shards of the split."""
        return sum(self.lengths)

    def read(self, shard: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a shard. Raises UserError if an id is outside the vocabulary."""
        # Only one shard is mapped at a time, so that memory does not grow with the dataset.
        if self._mapped_shard != shard:
            self._mapped_shard = shard
            self._mapped_tokens = map_shard(self.paths[shard])
        # A slice of the map: the tokens come from the disk when they are used, first by `max`
        # below.
        tokens = self._mapped_tokens[start:stop]
        if len(tokens) and tokens.max() >= self.vocab_size:
            raise UserError(
                f"{self.paths[shard]} contains the id {tokens.max()}, outside the vocabulary of "
                f"{self.vocab_size}: it was made with another tokenizer, or is damaged"
            )
        return tokens

    def read_first(self, num_tokens: int) -> np.ndarray:
        """The first num_tokens tokens of the split, from as many shards as needed.

        Fewer if the split is shorter. Raises UserError if it has only one or none: a model could
        not predict any.
        """
        parts = []
        num_read = 0
        for shard, length in enumerate(self.lengths):
            parts.append(self.read(shard, 0, min(length, num_tokens - num_read)))
            num_read += len(parts[-1])
            if num_read == num_tokens:
                break
        if num_read < min(2, num_tokens):
            raise UserError(
                f"{self.paths[0]} has too few tokens ({num_read}): at least 2 are needed, "
                "shard more text"
            )
        # In the usual case, one shard is enough and nothing is copied.
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def open_shards(folder: str | Path, split: str) -> Shards:
    """The shards of split `train` or `val` in a folder, by the words in their names.

    Raises FileNotFoundError if there are none, UserError if one is damaged or contradicts the
    manifest, or has the words of both splits in its name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        reason = "is a file" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"the folder of shards {folder} {reason}: make it with fineweb.py")
    all_paths = find_shards(folder)
    paths = [path for path in all_paths if split_of(path) == split]
    if not paths:
        found = "only other shards" if all_paths else "no shards"
        raise FileNotFoundError(
            f"{folder} holds {found}, none of split {split!r}: make them with fineweb.py, "
            f"or name files like text_{split}_000.npy or {split}.bin"
        )
    # The same tokens in two formats would be trained on twice.
    if len({path.suffix for path in all_paths if split_of(path)}) > 1:
        raise UserError(f"{folder} holds both .npy and .bin shards: move one kind away")

    # The manifest, if there is one, must agree with the files.
    manifest = read_manifest(folder)
    if manifest:
        check_all_present(folder, manifest)

    lengths = []
    for path in paths:
        tokens = map_shard(path)
        if manifest:
            check_against_manifest(path, tokens, manifest)
        lengths.append(len(tokens))
    vocab_size = manifest["vocab_size"] if manifest else GPT2_VOCAB_SIZE
    return Shards(split, paths, lengths, vocab_size)


def split_of(path: Path) -> str | None:
    """The split in the name of a shard, `train` or `val`; None if the name has neither.

    Only complete words count: pretrain_val_000.npy is for validation, retrieval_train_000.npy for
    training.
    """

    # The words of edufineweb_val_000000: {"edufineweb", "val"}
    words = set(re.findall("[a-z]+", path.stem.lower()))
    splits = [split for split, synonyms in SPLIT_WORDS.items() if words & synonyms]
    if len(splits) > 1:
        raise UserError(f"{path} has the words of both train and val in its name: rename it")
    return splits[0] if splits else None


def find_shards(folder: Path) -> list[Path]:
    """The shard files of a folder, of all splits, sorted by name."""
    return sorted([*folder.glob("*.npy"), *folder.glob("*.bin")])


def map_shard(path: Path) -> np.ndarray:
    """Memory-map a shard file: its tokens, (number of tokens,) uint16 or uint32.

    The only place that reads tokens. Another ending is added here and in `find_shards`, another
    kind of .bin file in `map_bin`.
    Raises UserError if the file is not a complete, one-dimensional array of token ids.
    """
    return map_bin(path) if path.suffix == ".bin" else map_npy(path)


def map_npy(path: Path) -> np.ndarray:
    """A .npy file, as this project and build-nanogpt write it."""
    # np.load fails if the file is shorter than its header says, without reading the tokens.
    try:
        tokens = np.load(path, mmap_mode="r")
    except (ValueError, EOFError, OSError) as error:
        raise UserError(
            f"{path} is truncated or not a .npy file ({error}): make it again with fineweb.py"
        ) from error
    if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32):
        raise UserError(
            f"{path} is {tokens.ndim}-dimensional {tokens.dtype}; "
            "a shard is one-dimensional, uint16 or uint32"
        )
    return tokens


def map_bin(path: Path) -> np.ndarray:
    """A .bin file: with a header, or without one if it is called train.bin or val.bin."""
    header = np.fromfile(path, dtype="<i4", count=BIN_HEADER_INTS)
    # As uint16, the magic number begins with 55,432, which is no token of GPT-2: a file without
    # a header can't be mistaken for one with a header. Another magic number must be like that, too.
    has_header = len(header) > 0 and header[0] == BIN_MAGIC

    # Files without a header are recognized by their names only.
    if path.stem in ("train", "val") and not has_header:
        return map_nanogpt(path)
    if not has_header:
        raise UserError(
            f"{path} does not begin with {BIN_MAGIC}, the magic number of GPT-2 tokens in llm.c's "
            "format: it is damaged, or of another format (only train.bin and val.bin, as nanoGPT "
            "names them, are read without a header)"
        )

    # The file must have exactly the tokens that its header announces.
    size = path.stat().st_size
    if size < BIN_HEADER_BYTES:
        raise UserError(f"{path} is truncated in its header: download or make it again")
    if header[1] != BIN_VERSION:
        raise UserError(f"{path} is of version {header[1]}, only version {BIN_VERSION} is known")
    num_tokens = int(header[2])
    expected_size = BIN_HEADER_BYTES + 2 * num_tokens
    if num_tokens < 1 or size != expected_size:
        raise UserError(
            f"{path} has {size:,} bytes, with the {num_tokens:,} tokens in its header it should "
            f"have {expected_size:,}: it is truncated or damaged, download or make it again"
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=BIN_HEADER_BYTES, shape=num_tokens)


def map_nanogpt(path: Path) -> np.ndarray:
    """nanoGPT's train.bin or val.bin: nothing but uint16."""
    size = path.stat().st_size
    # Without a header, this is the only sign of a truncated file.
    if size == 0 or size % 2:
        raise UserError(f"{path} has {size:,} bytes, not 2 per token: make it again")
    vocabulary = path.with_name(NANOGPT_VOCABULARY)
    # A pickle is never opened: loading it can run code from its author.
    if vocabulary.exists():
        raise UserError(
            f"{path} does not hold GPT-2's tokens but those of {vocabulary}, a pickle, which could "
            "run any code: shard the text instead, with fineweb.py --source text"
        )
    return np.memmap(path, dtype="<u2", mode="r")


def read_manifest(folder: str | Path) -> dict | None:
    """Read the manifest of a folder. None if the folder has none, as with other projects' shards.

    Raises UserError if the manifest is damaged.
    """
    path = Path(folder) / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text())
        # Look up all fields that readers need, so that a missing one is noticed at once.
        for key in ("vocab_size", "tokenizer", "dtype"):
            manifest[key]
        for shard in manifest["shards"]:
            shard["name"], shard["tokens"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error}): make the shards again with fineweb.py"
        ) from error
    return manifest


def check_all_present(folder: Path, manifest: dict):
    """Raise if the shards of a manifest are unfinished (UserError) or missing (OSError)."""
    if not manifest.get("complete", True):
        raise UserError(f"{folder} is unfinished: run the same fineweb.py command again to resume")
    for shard in manifest["shards"]:
        if not (folder / shard["name"]).exists():
            raise FileNotFoundError(
                f"{folder / shard['name']} is missing: run the same fineweb.py command again"
            )


def check_against_manifest(path: Path, tokens: np.ndarray, manifest: dict):
    """Raise UserError if the length or dtype of a shard is not the one in the manifest.

    Checksums are not compared: that would read all shards before training can start.
    """
    expected = {shard["name"]: shard["tokens"] for shard in manifest["shards"]}
    if expected.get(path.name) != len(tokens):
        raise UserError(
            f"{path} has {len(tokens)} tokens, "
            f"its manifest says {expected.get(path.name, 'nothing')}"
        )
    if str(tokens.dtype) != manifest["dtype"]:
        raise UserError(f"{path} has dtype {tokens.dtype}, its manifest says {manifest['dtype']}")


def shards_tokenizer(folder: str | Path) -> tiktoken.Encoding:
    """The tokenizer that the shards of a folder were made with; without a manifest, GPT-2's."""
    manifest = read_manifest(folder)
    # Any name but gpt2 is that of a vocabulary file next to the shards.
    name = manifest["tokenizer"] if manifest else "gpt2"
    return load_tokenizer(name if name == "gpt2" else Path(folder) / name)


def shards_fingerprint(folder: str | Path) -> str:
    """sha256 that identifies the tokens of a folder, their order and their tokenizer.

    It is the same for an interrupted and an undisturbed run of fineweb.py, whose manifests can
    differ. Tokens are not read: the checksums of the shards come from the manifest. Shards without
    one are told apart by their sizes and by the bytes at both ends.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    # With a manifest, the tokenizer and the shards count, not how they were made.
    identity = hashlib.sha256()
    if manifest:
        identity.update(json.dumps(manifest.get("tokenizer_sha256")).encode())
        for shard in manifest["shards"]:
            description = [shard["name"], shard["tokens"], shard.get("sha256")]
            identity.update(json.dumps(description).encode())
        return identity.hexdigest()

    # Without one, a sample of each file must do, because reading all of it would take minutes.
    for path in filter(split_of, find_shards(folder)):
        with open(path, "rb") as file:
            size = path.stat().st_size
            identity.update(json.dumps([path.name, size]).encode())
            identity.update(file.read(SAMPLE_BYTES))
            file.seek(max(0, size - SAMPLE_BYTES))
            identity.update(file.read())
    return identity.hexdigest()


# ---------------------------------------------------------------------------------------------
# Writing


def check_disk(folder: Path, needed: int):
    """Print how much disk space shards need, in bytes. Raises OSError if there is less."""
    free = shutil.disk_usage(folder).free
    say(f"disk needed: about {needed / 1e9:.3g} GB in {folder}; free: {free / 1e9:.1f} GB")
    if needed > free:
        raise OSError(
            f"{folder} has {free / 1e6:,.0f} MB free, "
            f"the shards need {needed / 1e6:,.0f} MB: make room"
        )


class ShardWriter:
    """Cuts a stream of tokens into shards of `shard_size` tokens and writes them to a folder.

    A full shard is written atomically, then entered in the manifest with its checksum and the
    position at which the next one begins. A writer for a folder with an unfinished manifest
    verifies the shards and continues after the last good one; `next_position` tells where.

    `header` holds the manifest's fields that determine the bytes of the shards. Raises UserError
    if the folder contains shards without a manifest, or with another header.

    With max_tokens, the last shard ends at that number of tokens. A later writer with a higher
    limit, or none, continues after it and leaves it as it is.
    """

    def __init__(
        self,
        folder: Path,
        prefix: str,
        shard_size: int,
        header: dict,
        max_tokens: int | None = None,
    ):
        self.folder = folder
        self.prefix = prefix
        self.shard_size = shard_size
        self.max_tokens = max_tokens
        counts = dict(complete=False, documents=0, empty_documents=0, tokens=0, shards=[])
        self.manifest = header | counts
        self.buffer = np.empty(shard_size, dtype=header["dtype"])  # the shard being filled
        self.num_buffered = 0
        # A run that was killed may have left an unfinished file.
        for leftover in folder.glob(f"{prefix}_*.npy.tmp"):
            leftover.unlink()
        self._resume(header)

    def _resume(self, header: dict):
        """Take over the shards of an earlier run with the same header."""
        earlier = read_manifest(self.folder)
        paths = find_shards(self.folder)
        if not paths:
            # The manifest comes before the first shard. A run that is killed between the two
            # would otherwise leave a shard that looks foreign.
            return self._write_manifest([])
        if earlier is None:
            raise UserError(
                f"{paths[0]} was not written by fineweb.py (the folder has no {MANIFEST}): "
                "choose another out_dir"
            )
        # With another header, the next shards would not fit those that are there.
        for key, value in header.items():
            if earlier.get(key) != value:
                raise UserError(
                    f"{self.folder} contains shards made with {key}={shorten(earlier.get(key))}, "
                    f"not {shorten(value)}: choose another out_dir"
                )

        # The first bad shard and all after it are made again: the source is read in one pass.
        verified = []
        for shard in Progress(earlier["shards"], desc="verifying", unit="shard"):
            path = self.folder / shard["name"]
            if not path.exists() or checksum(path) != shard["sha256"]:
                say(f"{path} is missing or damaged, making it again")
                break
            verified.append(shard)

        # Take over what is good. What happens next depends on how the earlier run ended.
        is_verified = earlier["complete"] and len(verified) == len(earlier["shards"])
        # At the end of the source there is no next position.
        has_ended = is_verified and verified[-1]["next"] is None
        if has_ended:
            self.manifest = earlier
        elif verified and all(shard["next"] for shard in verified):
            # Shards of a corpus that was split at the end have no next position: if one of those
            # is damaged, all are made again.
            self._take(verified)
            # An earlier limit was as high as this one, or higher.
            self.manifest["complete"] = is_verified and self.is_full

    def _take(self, shards: list[dict]):
        """Set the manifest's shards, and the counts up to the end of the last one."""
        last = shards[-1]["next"]
        self.manifest |= dict(
            shards=shards,
            tokens=sum(shard["tokens"] for shard in shards),
            documents=last["documents"],
            empty_documents=last["empty_documents"],
        )

    @property
    def num_tokens(self) -> int:
        """Number of tokens so far, in finished shards and in the buffer."""
        return self.manifest["tokens"] + self.num_buffered

    @property
    def is_full(self) -> bool:
        """Whether the limit of max_tokens is reached."""
        return self.max_tokens is not None and self.num_tokens >= self.max_tokens

    @property
    def num_shards(self) -> int:
        return len(self.manifest["shards"])

    def next_position(self) -> Position:
        """The position in the source at which the first unfinished shard begins."""
        if not self.manifest["shards"]:
            return SOURCE_START
        # The last finished shard says where it stopped.
        return self.manifest["shards"][-1]["next"]["position"]

    def add(
        self,
        position: Position,
        tokens: np.ndarray,
        lengths: list[int],
        is_continuation: bool = False,
    ):
        """Append the tokens of a batch of documents and write each shard that becomes full.

        Tokens above the limit of max_tokens are left out.

        position            of the first document of the batch
        tokens              of all documents, one after the other; the first position["token"] of
                            them are in an earlier shard already
        lengths             number of tokens of each document
        is_continuation     is the first one only the next part of a document?
        """
        # num_taken counts the tokens of the batch that are in the buffer or in a shard.
        num_taken = position["token"]
        while num_taken < len(tokens) and not self.is_full:
            # Copy what fits into the shard, below the limit of max_tokens.
            room = self.shard_size - self.num_buffered
            if self.max_tokens is not None:
                room = min(room, self.max_tokens - self.num_tokens)
            part = tokens[num_taken : num_taken + room]
            self.buffer[self.num_buffered : self.num_buffered + len(part)] = part
            self.num_buffered += len(part)
            num_taken += len(part)
            # One batch can fill several shards, if they are small.
            if self.num_buffered == self.shard_size or self.is_full:
                self._finish_shard(position, lengths, num_taken, is_continuation)

        documents, empty = count_documents(lengths, is_continuation)
        self.manifest["documents"] += documents
        self.manifest["empty_documents"] += empty

    def _finish_shard(
        self, position: Position, lengths: list[int], num_taken: int, is_continuation: bool
    ):
        """Write the buffer. `num_taken` tokens of the batch are in this or earlier shards."""
        # The next shard begins in the first document that does not end by here. Empty documents
        # (length 0) at this place belong to the finished shard, hence side="right". For example:
        #
        #     lengths 3, 0, 5    ends 3, 3, 8    num_taken 3 gives num_done 2
        ends = np.cumsum(lengths)
        num_done = int(np.searchsorted(ends, num_taken, side="right"))
        done_tokens = int(ends[num_done - 1]) if num_done else 0

        # The state is that before the batch, because the stream can only be entered there.
        next_position = Position(
            document=position["document"] + num_done,
            token=num_taken - done_tokens,
            state=position["state"],
            skip=position["skip"] + num_done,
        )
        # self.manifest counts only complete batches, so the documents of this one are added here.
        documents, empty = count_documents(lengths[:num_done], is_continuation)
        after = dict(
            position=next_position,
            documents=self.manifest["documents"] + documents,
            empty_documents=self.manifest["empty_documents"] + empty,
        )

        # The first shard is for validation, as in build-nanogpt.
        split = "train" if self.manifest["shards"] else "val"
        shard = self._write_shard(split, self.num_shards, self.buffer[: self.num_buffered], after)
        self.num_buffered = 0
        self._write_manifest([*self.manifest["shards"], shard])

    def finish(self):
        """Write what is left in the buffer, and mark the manifest as complete."""
        if self.num_tokens == 0:
            raise UserError("the source holds no text: no documents, or only empty ones")
        if self.num_tokens < MIN_TOKENS:
            raise UserError(
                f"the source holds only {self.num_tokens} tokens of text, too few to set a tenth "
                f"aside for validation: at least {MIN_TOKENS} are needed, give more text"
            )

        shards = list(self.manifest["shards"])
        rest = self.buffer[: self.num_buffered]
        # All branches leave at least one token for training.
        if self.is_full:
            # The documents of the batch that crossed the limit were counted to its end: take the
            # count at the limit instead.
            self._take(shards)
        elif len(shards) < 2:
            shards = self._split_small_corpus(shards, rest)
        elif len(rest):
            shards.append(self._write_shard("train", len(shards), rest, after=None))
        else:
            # The source ended where the last shard became full.
            shards[-1] = shards[-1] | dict(next=None)
        self.num_buffered = 0
        self._write_manifest(shards, complete=True)
        self._remove_leftovers()

    def _remove_leftovers(self):
        """Remove shards of earlier, interrupted runs that the manifest does not list."""
        names = {shard["name"] for shard in self.manifest["shards"]}
        # For example edufineweb_train_000012.npy
        for path in self.folder.glob(f"{self.prefix}_*_??????.npy"):
            if path.name not in names:
                path.unlink()

    def _split_small_corpus(self, shards: list[dict], rest: np.ndarray) -> list[dict]:
        """Split a corpus that does not fill two shards: the first tenth for validation.

        A whole shard for validation would leave less than that for training.
        """
        # Read back the full shard, if there is one. It was written for validation.
        tokens = rest
        if shards:
            tokens = np.concatenate([map_shard(self.folder / shards[0]["name"]), rest])
        num_val = max(1, len(tokens) // 10)
        train = tokens[num_val:]
        # The validation shard is overwritten last. Until then, a run that was killed here can
        # resume after the full one.
        train_shards = []
        for number, first in enumerate(range(0, len(train), self.shard_size), 1):
            part = train[first : first + self.shard_size]
            train_shards.append(self._write_shard("train", number, part, after=None))
        return [self._write_shard("val", 0, tokens[:num_val], after=None), *train_shards]

    def _write_shard(self, split: str, number: int, tokens: np.ndarray, after: dict | None) -> dict:
        """Write a shard file. Returns its entry in the manifest, in which `after` is `next`."""
        path = self.folder / f"{self.prefix}_{split}_{number:06d}.npy"
        with write_atomically(path) as file:
            np.save(file, tokens)
        return dict(name=path.name, tokens=len(tokens), sha256=checksum(path), next=after)

    def _write_manifest(self, shards: list[dict], complete: bool = False):
        """Write the manifest with these shards. `tokens` always agrees with them."""
        self.manifest |= dict(
            shards=shards, complete=complete, tokens=sum(shard["tokens"] for shard in shards)
        )
        write_text(self.folder / MANIFEST, json.dumps(self.manifest, indent=1) + "\n")


def count_documents(lengths: list[int], is_continuation: bool) -> tuple[int, int]:
    """How many documents begin in a batch, and how many of its documents are empty."""
    empty = lengths.count(0)
    # The first length may be that of a document's next part.
    continued = 1 if is_continuation and lengths else 0
    return len(lengths) - empty - continued, empty
