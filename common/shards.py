"""Token shards on disk: a folder of .npy files and the manifest that says what they are.

A shard is a one-dimensional array of uint16 (uint32 above 65,536 tokens) with `train` or `val` in its name. The
manifest names the tokenizer and, for each shard, its number of tokens, its checksum and where in the source the next
one begins. Shards of other projects load without a manifest.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short

import numpy as np
import tiktoken

from common.console import Progress, UserError, checksum, say, write_atomically, write_text
from common.tokenizer import load_tokenizer

MANIFEST = "manifest.json"
# A position in the source: the document and the token in it, the state of the stream some documents before, and how
# many documents to pass over from there.
SOURCE_START = dict(document=0, token=0, state=None, skip=0)


@dataclass
class Shards:
    """The shards of one split, in the order of their names. Only their headers have been read."""

    split: str
    paths: list[Path]
    lengths: list[int]  # tokens in each
    vocab_size: int  # ids must be below this

    def __post_init__(self):
        self._open = (None, None)  # number of the shard in use and its memory map

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def read(self, shard: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a shard. Raises ValueError if an id is outside the vocabulary."""
        if (
            self._open[0] != shard
        ):  # one map at a time: resident memory does not grow with the dataset
            self._open = (shard, np.load(self.paths[shard], mmap_mode="r"))
        tokens = self._open[1][start:stop]
        if len(tokens) and tokens.max() >= self.vocab_size:
            raise UserError(
                f"{self.paths[shard]} holds the id {tokens.max()}, outside the vocabulary of {self.vocab_size}: "
                "it was made with another tokenizer, or is damaged"
            )
        return tokens


def read_manifest(folder: str | Path) -> dict | None:
    """What `fineweb.py` noted about the shards in a folder; None for shards of other projects."""
    path = Path(folder) / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text())
        manifest["vocab_size"], manifest["tokenizer"], manifest["dtype"]
        {shard["name"]: shard["tokens"] for shard in manifest["shards"]}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error}): make the shards again with fineweb.py"
        ) from error
    return manifest


def shards_tokenizer(folder: str | Path) -> tiktoken.Encoding:
    """The tokenizer that shards were made with; GPT-2's where no manifest says otherwise."""
    manifest = read_manifest(folder)
    name = manifest["tokenizer"] if manifest else "gpt2"
    return load_tokenizer(name if name == "gpt2" else Path(folder) / name)


def manifest_checksum(folder: str | Path) -> str | None:
    """sha256 of the manifest, which holds that of every shard: the identity of a dataset."""
    path = Path(folder) / MANIFEST
    return checksum(path) if path.exists() else None


def open_shards(folder: str | Path, split: str, vocab_size: int | None = None) -> Shards:
    """The shards of split `train` or `val` in a folder: .npy files with the split in their names.

    Raises FileNotFoundError if there are none, ValueError if one is damaged or disagrees with the manifest.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    paths = sorted(path for path in folder.glob("*.npy") if split in path.name)
    if not paths:
        found = "only other shards" if any(folder.glob("*.npy")) else "no shards"
        raise FileNotFoundError(
            f"{folder} holds {found}, none of split {split!r}: make them with fineweb.py"
        )
    noted = None
    if manifest:
        vocab_size = manifest["vocab_size"]
        if not manifest.get("complete", True):
            raise UserError(
                f"{folder} is unfinished: run the same fineweb.py command again and it will go on"
            )
        noted = {shard["name"]: shard["tokens"] for shard in manifest["shards"]}
        absent = [name for name in noted if not (folder / name).exists()]
        if absent:
            raise FileNotFoundError(
                f"{folder / absent[0]} is missing: run the same fineweb.py command again"
            )
    lengths = []
    for path in paths:
        length, dtype = read_header(path)
        if noted is not None and noted.get(path.name) != length:
            raise UserError(
                f"{path} holds {length} tokens, its manifest says {noted.get(path.name, 'nothing')}"
            )
        if manifest and dtype != manifest["dtype"]:
            raise UserError(f"{path} is of dtype {dtype}, its manifest says {manifest['dtype']}")
        lengths.append(length)
    return Shards(split, paths, lengths, vocab_size or 50257)


def read_header(path: Path) -> tuple[int, str]:
    """Number of tokens and dtype of a shard. Raises ValueError if it is no whole, flat array of token ids."""
    try:
        tokens = np.load(path, mmap_mode="r")
    except (ValueError, EOFError, OSError) as error:
        raise UserError(
            f"{path} is truncated or no .npy file ({error}): make it again with fineweb.py"
        ) from error
    if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32):
        raise UserError(
            f"{path} is {tokens.ndim}-dimensional {tokens.dtype}; a shard is one-dimensional, uint16 or uint32"
        )
    return len(tokens), str(tokens.dtype)


class ShardWriter:
    """Cuts the token stream into shards. Each is written whole, then entered in the manifest with its checksum and
    the position where the next one begins."""

    def __init__(self, folder: Path, prefix: str, shard_size: int, header: dict):
        self.folder, self.prefix, self.shard_size = folder, prefix, shard_size
        self.manifest = header | dict(
            complete=False, documents=0, empty_documents=0, tokens=0, shards=[]
        )
        self.buffer = np.empty(shard_size, dtype=header["dtype"])
        self.fill = 0
        for leftover in folder.glob(f"{prefix}_*.npy.tmp"):
            leftover.unlink()
        self._resume(header)

    def _resume(self, header: dict):
        found, shard = read_manifest(self.folder), next(self.folder.glob("*.npy"), None)
        if not shard:
            return self._commit(
                []
            )  # before the first shard, which is known as ours then if we are killed in between
        if found is None:
            raise UserError(
                f"{shard} is not from here (there is no {MANIFEST} beside it): choose another out_dir"
            )
        for key, value in header.items():
            if found.get(key) != value:
                raise UserError(
                    f"{self.folder} holds shards made with {key}={short(found.get(key))}, not {short(value)}: "
                    "choose another out_dir"
                )
        good = []
        for shard in Progress(found["shards"], desc="verifying", unit="shard"):
            path = self.folder / shard["name"]
            if not path.exists() or checksum(path) != shard["sha256"]:
                say(f"{path} is missing or damaged, and made again")
                break
            good.append(shard)
        if found["complete"] and len(good) == len(found["shards"]):
            self.manifest = found
        elif good and all(
            shard["next"] for shard in good
        ):  # a split text has no place to go on from: it starts afresh
            counts = {key: good[-1]["next"][key] for key in ("documents", "empty_documents")}
            self.manifest |= dict(
                shards=good, tokens=sum(shard["tokens"] for shard in good), **counts
            )

    @property
    def num_tokens(self) -> int:
        return self.manifest["tokens"] + self.fill

    def next_position(self) -> dict:
        """Where the first unfinished shard begins."""
        shards = self.manifest["shards"]
        return shards[-1]["next"]["position"] if shards else SOURCE_START

    def add(self, position: dict, tokens: np.ndarray, lengths: list[int]):
        """Append a batch's tokens, which begin at `position`, writing each shard that becomes full."""
        ends = np.cumsum(lengths)
        taken = position["token"]
        while taken < len(tokens):
            part = tokens[taken : taken + self.shard_size - self.fill]
            self.buffer[self.fill : self.fill + len(part)] = part
            self.fill += len(part)
            taken += len(part)
            if self.fill == self.shard_size:
                whole = int(
                    np.searchsorted(ends, taken, side="right")
                )  # documents of the batch that end by here
                inside = int(taken - (ends[whole - 1] if whole else 0))
                following = position | dict(
                    document=position["document"] + whole,
                    skip=position["skip"] + whole,
                    token=inside,
                )
                counts = dict(
                    documents=self.manifest["documents"] + int(np.count_nonzero(lengths[:whole])),
                    empty_documents=self.manifest["empty_documents"] + lengths[:whole].count(0),
                )
                split = "train" if self.manifest["shards"] else "val"
                shard = self._write(split, len(self.manifest["shards"]), self.buffer)
                self._commit(
                    [
                        *self.manifest["shards"],
                        shard | dict(next=dict(position=following, **counts)),
                    ]
                )
                self.fill = 0
        self.manifest["documents"] += int(np.count_nonzero(lengths))
        self.manifest["empty_documents"] += lengths.count(0)

    def finish(self):
        """Write what is left. A text that does not fill two shards is split into a tenth and the rest instead."""
        shards = list(self.manifest["shards"])
        rest = self.buffer[: self.fill]
        if self.num_tokens == 0:
            raise UserError("the source holds no text: no documents, or only empty ones")
        if self.num_tokens < 2 * self.shard_size:
            if shards:
                rest = np.concatenate([np.load(self.folder / shards[0]["name"]), rest])
            val, train = np.split(rest, [max(1, len(rest) // 10)])
            shards = [
                self._write("train", n + 1, train[first : first + self.shard_size])
                | dict(next=None)
                for n, first in enumerate(range(0, len(train), self.shard_size))
            ]
            shards.insert(0, self._write("val", 0, val) | dict(next=None))
        elif self.fill:
            shards.append(self._write("train", len(shards), rest) | dict(next=None))
        self.fill = 0
        self._commit(shards, complete=True)

    def _write(self, split: str, number: int, tokens: np.ndarray) -> dict:
        path = self.folder / f"{self.prefix}_{split}_{number:06d}.npy"
        with write_atomically(path) as file:
            np.save(file, tokens)
        return dict(name=path.name, tokens=len(tokens), sha256=checksum(path))

    def _commit(self, shards: list[dict], complete: bool = False):
        self.manifest |= dict(
            shards=shards, complete=complete, tokens=sum(shard["tokens"] for shard in shards)
        )
        write_text(self.folder / MANIFEST, json.dumps(self.manifest, indent=1) + "\n")
