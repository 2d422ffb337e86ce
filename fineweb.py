"""Text -> token shards: FineWeb-Edu by default, streamed, tokenized with GPT-2's BPE, 100M tokens a shard.

    python fineweb.py                                                # FineWeb-Edu sample-10BT, 20 GB of shards
    python fineweb.py --source fineweb --subset sample-100BT
    python fineweb.py --source text --data_files tiny-shakespeare.txt --out_dir datasets/shakespeare
    python fineweb.py --source parquet --data_files "corpus/*.parquet"
    python fineweb.py --source pydoc --train_tokenizer 4096          # Python's own documentation, no network

Every document is preceded by the end-of-text token and runs on into the next shard where one is full. The first shard
is for validation; of a text that does not fill two shards, its first tenth is. Stopped at any moment and run again, it
goes on where the first unfinished shard begins; run on a finished folder, it verifies the checksums.
"""

import ast
import glob
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import sysconfig
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken

from common.console import Progress, UserError, cli, say, write_text
from common.shards import SOURCE_START, ShardWriter
from common.tokenizer import (
    encode_texts,
    encoding_of,
    load_tokenizer,
    tokenizer_to_text,
    train_tokenizer,
)

HUB = {
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "edu_fineweb", "edufineweb"),
    "fineweb": ("HuggingFaceFW/fineweb", "fineweb", "fineweb"),
}  # source -> repository, folder, prefix of the shards
HUB_TOKENS = {"sample-10BT": 10e9, "sample-100BT": 100e9, "sample-350BT": 350e9}
BATCH_DOCUMENTS = 64  # that a worker gets at a time
PENDING_BYTES = 2**28  # of text that waits for the workers, about
MAX_RETRIES = 8  # of a dropped connection, in a row


@dataclass
class Config:
    source: Literal["fineweb-edu", "fineweb", "parquet", "json", "text", "pydoc"] = (
        "fineweb-edu"  # of the text
    )
    subset: str = "sample-10BT"  # of fineweb-edu or fineweb
    data_files: tuple[
        str, ...
    ] = ()  # files, globs or URLs: parquet, json (a "text" per line), text (a document each)
    out_dir: str = ""  # folder of the shards; empty = datasets/edu_fineweb10B and its like, by source and subset
    shard_size: int = 100_000_000  # tokens per shard
    tokenizer: str = "gpt2"  # gpt2, or a vocab.tiktoken file
    train_tokenizer: int = (
        0  # learn a vocabulary of this size from the source and use it instead; 0 = do not
    )
    train_tokenizer_chars: int = 1_000_000_000  # of the source's text to learn it from, at most
    num_workers: int = 0  # tokenizer processes; 0 = one per CPU core

    def __post_init__(self):
        if not self.out_dir:
            size = self.subset.removeprefix("sample-").removesuffix("T")
            self.out_dir = (
                f"datasets/{HUB[self.source][1]}{size}"
                if self.source in HUB
                else f"datasets/{self.source}"
            )
        self.num_workers = self.num_workers or getattr(os, "process_cpu_count", os.cpu_count)() or 1


def main(config: Config):
    if not 2 <= config.shard_size <= 2**30 or config.num_workers < 1:
        raise UserError("shard_size must be between 2 and 2**30, num_workers at least 1")
    if config.train_tokenizer and config.tokenizer != "gpt2":
        raise UserError("tokenizer and train_tokenizer exclude each other")
    out_dir = Path(config.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    source = Source(config)
    enc = choose_tokenizer(config, source, out_dir)
    writer = ShardWriter(
        out_dir, source.prefix, config.shard_size, manifest_header(config, source, enc, out_dir)
    )
    if writer.manifest["complete"]:
        return summarize(writer)
    check_disk(source, writer)
    start = writer.next_position()
    if writer.manifest["shards"]:
        say(
            f"going on at document {start['document']:,} after {len(writer.manifest['shards'])} finished shards"
        )

    began, first = time.monotonic(), writer.num_tokens
    total = source.estimate_tokens(enc.n_vocab)
    with Progress(
        total=total, initial=first, unit="tok", unit_scale=True, desc="tokenizing"
    ) as bar:
        for position, tokens, lengths in encode(source.batches(start), enc, config.num_workers):
            writer.add(position, tokens, lengths)
            bar.set_description(f"shard {len(writer.manifest['shards'])}", refresh=False)
            bar.update(len(tokens))
        writer.finish()
        bar.total = bar.n = writer.num_tokens
    summarize(writer, f", {(writer.num_tokens - first) / (time.monotonic() - began):,.0f} tokens/s")


def summarize(writer: ShardWriter, speed: str = ""):
    manifest, tokens, shards = writer.manifest, writer.num_tokens, len(writer.manifest["shards"])
    empty = f" ({n:,} empty ones left out)" if (n := manifest["empty_documents"]) else ""
    say(
        f"{writer.folder}: {tokens:,} tokens of {manifest['documents']:,} documents{empty} in {shards} shards{speed}"
    )


def choose_tokenizer(config: Config, source: "Source", out_dir: Path) -> tiktoken.Encoding:
    """The tokenizer to shard with: a named one, or one learned from the source and kept as out_dir/vocab.tiktoken."""
    if not config.train_tokenizer:
        return load_tokenizer(config.tokenizer)
    path = out_dir / "vocab.tiktoken"
    if path.exists():
        enc = load_tokenizer(path)
        if enc.n_vocab == config.train_tokenizer:
            say(f"using {path}, learned before")
            return enc
        raise UserError(
            f"{path} has {enc.n_vocab} tokens, not {config.train_tokenizer}: choose another out_dir"
        )

    def texts() -> Iterator[str]:
        chars = 0
        total = min(source.text_bytes or config.train_tokenizer_chars, config.train_tokenizer_chars)
        with Progress(
            total=total, unit="char", unit_scale=True, desc="learning the tokenizer"
        ) as bar:
            for _, texts in source.batches(SOURCE_START):
                for text in filter(None, texts.to_pylist()):
                    yield text
                    chars += len(text)
                bar.update(chars - bar.n)
                if chars >= config.train_tokenizer_chars:
                    return

    enc, _ = train_tokenizer(texts(), config.train_tokenizer)
    write_text(path, tokenizer_to_text(enc))
    say(f"learned {enc.n_vocab} tokens: {path}")
    return enc


def manifest_header(
    config: Config, source: "Source", enc: tiktoken.Encoding, out_dir: Path
) -> dict:
    """What determines the bytes of the shards; two runs that differ in it can't share a folder."""
    text = tokenizer_to_text(enc)
    name = "gpt2" if text == "gpt2" else "vocab.tiktoken"
    if name != "gpt2" and not (out_dir / name).exists():
        write_text(out_dir / name, text)  # so that the folder can be read by itself
    if name != "gpt2" and (out_dir / name).read_text() != text:
        raise UserError(f"{out_dir / name} is another vocabulary: choose another out_dir")
    return dict(
        source=config.source,
        subset=config.subset if config.source in HUB else None,
        data_files=[Path(f).name if os.path.exists(f) else f for f in source.files],
        data_bytes=None if source.remote else sum(map(os.path.getsize, source.files)),
        tokenizer=name,
        tokenizer_sha256=hashlib.sha256(text.encode()).hexdigest(),
        vocab_size=enc.n_vocab,
        end_of_text=enc.eot_token,
        dtype="uint16" if enc.n_vocab <= 65536 else "uint32",
        shard_size=config.shard_size,
    )


class Source:
    """The documents, in order, as a `datasets` stream that can be entered at any position."""

    def __init__(self, config: Config):
        self.kind, self.subset = config.source, config.subset
        self.prefix = HUB[self.kind][2] if self.kind in HUB else self.kind
        self.files = [name for pattern in config.data_files for name in expand(pattern)]
        self.remote = self.kind in HUB or any("://" in name for name in self.files)
        if bool(self.files) != (self.kind in ("parquet", "json", "text")):
            raise UserError(
                "the sources parquet, json and text, and only they, need --data_files GLOB"
            )

    def open(self):
        import datasets  # late: it takes a second, and worker processes import this file too
        from huggingface_hub.utils import logging

        logging.set_verbosity_error()
        datasets.logging.set_verbosity(
            datasets.logging.CRITICAL
        )  # what goes wrong is said once, by us
        datasets.disable_progress_bars()
        datasets.config.TORCH_AVAILABLE = False  # or it would import torch, for nothing
        if self.kind == "pydoc":
            return datasets.IterableDataset.from_generator(
                lambda: ({"text": text} for text in pydoc_texts())
            )
        if self.kind in HUB:
            path, options = HUB[self.kind][0], dict(name=self.subset)
        else:
            path, options = (
                self.kind,
                dict(data_files=[f if "://" in f else glob.escape(f) for f in self.files]),
            )
        if self.kind == "text":
            options |= dict(sample_by="document", keep_linebreaks=True)
        elif self.kind == "json":
            path = "text"  # by line: the loader of json wants the fields that we leave out alike in all of them
        else:
            options["columns"] = [
                "text"
            ]  # the others are not decoded; the download skips only large ones
        return datasets.load_dataset(path, split="train", streaming=True, **options)

    def batches(self, start: dict) -> Iterator[tuple[dict, pa.StringArray]]:
        """Arrays of consecutive texts, each with its position. A dropped connection is tried again, from the last
        position, unless nothing could be read at all."""
        position, failures, began = start, 0, False
        while True:
            try:
                for here, texts, following in self._read(position):
                    yield here, texts
                    position, failures, began = following, 0, True
                return
            except Exception as error:
                if not is_connection_error(error) or not self.remote:
                    raise self.readable(error) from error
                failures += 1
                if not began or failures > MAX_RETRIES:
                    raise OSError(
                        f"{self.kind} can't be reached: check network and HF_TOKEN, then run again to go on: {error}"
                    ) from error
                say(
                    f"connection lost at document {position['document']:,}, trying again ({type(error).__name__})"
                )
                time.sleep(min(60, 2**failures))

    def _read(self, position: dict) -> Iterator[tuple[dict, pa.StringArray, dict]]:
        dataset = self.open().with_format("arrow")
        if position["state"] is not None:
            dataset.load_state_dict(position["state"])
        for table in dataset.iter(
            batch_size=1 if self.kind == "text" else BATCH_DOCUMENTS
        ):  # a text may be a library
            if str(table["text"].type) not in ("string", "large_string", "string_view", "null"):
                raise UserError(f"the field 'text' holds {table['text'].type}, not only strings")
            texts = table["text"].combine_chunks()[position["skip"] :].cast(pa.string())
            if self.kind == "json":
                texts = pa.array(map(json_text, texts.to_pylist()), pa.string())
            texts.validate(full=True)  # that it is UTF-8
            following = dict(
                document=position["document"] + len(texts),
                token=0,
                state=dataset.state_dict(),
                skip=0,
            )
            yield position, texts, following
            position = following

    def estimate_tokens(self, vocab_size: int) -> int | None:
        """About how many tokens there are, None if there is no telling before they are read."""
        if self.kind in HUB:
            return int(HUB_TOKENS[self.subset]) if self.subset in HUB_TOKENS else None
        return self.text_bytes and int(self.text_bytes / (4 if vocab_size > 20_000 else 3))

    @cached_property
    def text_bytes(self) -> int | None:
        """About how many bytes of text there are, None if they are not on this machine."""
        if self.remote:
            return None
        if self.kind == "pydoc":
            return sum(map(len, pydoc_texts()))
        if self.kind != "parquet":
            return sum(map(os.path.getsize, self.files))
        total = 0
        for name in self.files:
            try:
                metadata = pq.read_metadata(name)
            except (OSError, ValueError) as error:
                raise UserError(f"{name} is damaged or no parquet file: {error}") from error
            if "text" not in metadata.schema.names or not metadata.num_rows:
                raise UserError(f"{name} has no column 'text', or no rows")
            for group in map(metadata.row_group, range(metadata.num_row_groups)):
                columns = map(group.column, range(group.num_columns))
                total += sum(
                    c.total_uncompressed_size for c in columns if c.path_in_schema == "text"
                )
        return total

    def readable(self, error: Exception) -> Exception:
        """A library's error about the text as one that says where to look."""
        known = isinstance(
            error, (ValueError, OSError, ImportError)
        )  # ImportError: a URL of a kind not installed
        if known or type(error).__module__.startswith(("datasets", "pyarrow")):
            return ValueError(
                f"{self.damaged_place()} can't be read as {self.kind}: {error.__cause__ or error}"
            )
        return error

    def damaged_place(self) -> str:
        """The first local file, or the first line of it, that holds no text; the libraries do not name it."""
        for name in filter(os.path.exists, self.files):
            number = 0
            try:
                if self.kind == "parquet":
                    for batch in pq.ParquetFile(name).iter_batches(columns=["text"]):
                        batch.validate(full=True)
                    continue
                with open(name, encoding="utf-8") as file:
                    for number, line in enumerate(file, 1):
                        if self.kind == "json":
                            (json_text(line) or "").encode()
            except UnicodeDecodeError:
                return f"{name} (not UTF-8)"
            except (UserError, ValueError, OSError):
                return f"{name}, line {number}," if number else name
        return "the source"


def expand(pattern: str) -> list[str]:
    """The files that a glob stands for, sorted; a URL stands for itself."""
    if "://" in pattern:
        return [pattern]
    found = (
        [pattern]
        if os.path.isfile(pattern)
        else glob.glob(os.path.expanduser(pattern), recursive=True)
    )
    if names := sorted(os.path.abspath(name) for name in found if os.path.isfile(name)):
        return names
    raise FileNotFoundError(f"no file matches {pattern}")


def json_text(line: str) -> str | None:
    """What the field "text" of a line of jsonl holds."""
    if not line.strip():
        return None
    match json.loads(line):
        case {"text": str() | None as text}:
            return text
    raise UserError("there is no field 'text' with a string")


def is_connection_error(error: BaseException) -> bool:
    """Whether the network is to blame; the HTTP libraries under `datasets` do not share a base class."""
    chain = [error, error.__cause__, error.__context__]
    library = ("httpx", "httpx2", "httpcore", "httpcore2", "aiohttp", "requests", "urllib3")
    return any(isinstance(e, OSError) or type(e).__module__.split(".")[0] in library for e in chain)


def init_worker(enc: tiktoken.Encoding):
    global encoding
    encoding = enc
    # A parent that was killed can't end its workers: each waits for that by itself.
    threading.Thread(
        target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True
    ).start()


def encode_batch(texts: pa.StringArray) -> tuple[np.ndarray, list[int]]:
    return encode_texts(encoding, texts)


def encode(
    batches, enc: tiktoken.Encoding, num_workers: int
) -> Iterator[tuple[dict, np.ndarray, list[int]]]:
    """Tokenize batches in worker processes, in order, a few batches ahead: memory does not grow with the source."""
    context = multiprocessing.get_context("spawn")
    by_value = encoding_of(
        enc._mergeable_ranks
    )  # GPT-2's is pickled as a name: each worker would read its files again
    pool = ProcessPoolExecutor(num_workers, context, init_worker, (by_value,))
    pending = deque()
    try:
        stops = {signal.SIGINT, signal.SIGTERM}
        signal.pthread_sigmask(
            signal.SIG_BLOCK, stops
        )  # the workers inherit it: they end when we do
        for _ in range(num_workers):
            pool.submit(int)  # they start while the source is being opened
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)
        for position, texts in batches:
            pending.append((position, pool.submit(encode_batch, texts), texts.nbytes))
            while (
                len(pending) > 3 * num_workers or sum(size for *_, size in pending) > PENDING_BYTES
            ):
                position, future, _ = pending.popleft()
                yield position, *future.result()
        while pending:
            position, future, _ = pending.popleft()
            yield position, *future.result()
    except BrokenProcessPool as error:
        raise OSError(
            "a tokenizer process was killed (out of memory?): run again to go on"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def check_disk(source: Source, writer: ShardWriter):
    """Say how much disk the shards will need, and refuse if it is not there."""
    tokens = source.estimate_tokens(writer.manifest["vocab_size"])
    free = shutil.disk_usage(writer.folder).free
    if tokens is None:
        return say(
            f"disk needed: 2 bytes per token, how many is not known beforehand; free: {free / 1e9:.1f} GB"
        )
    need = max(0, tokens - writer.num_tokens) * np.dtype(writer.manifest["dtype"]).itemsize
    say(f"disk needed: about {need / 1e9:.3g} GB in {writer.folder}; free: {free / 1e9:.1f} GB")
    if need > free:
        raise OSError(
            f"{writer.folder} has {free / 1e6:,.0f} MB free, the shards need {need / 1e6:,.0f} MB: make room"
        )


@lru_cache
def pydoc_texts() -> list[str]:
    """The documentation inside every Python: the help topics, and each standard module's docstrings, by name.

    Modules are parsed, never imported. About 2 MB.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    topics = {}
    if (path := library / "pydoc_data" / "topics.py").exists():
        assignment = next(
            n for n in ast.parse(path.read_text("utf-8")).body if isinstance(n, ast.Assign)
        )
        topics = ast.literal_eval(assignment.value)
    skipped = {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "lib2to3",
        "pydoc_data",
        "__pycache__",
    }
    modules = [p for p in library.rglob("*.py") if not skipped & set(p.relative_to(library).parts)]
    names = [(str(p.relative_to(library).as_posix()), p) for p in modules] + [
        (topic, None) for topic in topics
    ]
    names = sorted(names, key=lambda item: item[0].lower())
    return list(
        filter(None, (docstrings(path) if path else topics[name].strip() for name, path in names))
    )


def docstrings(path: Path) -> str:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return ""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
    return "\n\n".join(filter(None, found))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
    try:
        cli(Config, main, __doc__)
    except SystemExit as stop:  # a normal exit hangs or aborts amid a read (apache/arrow#45214)
        sys.stdout.flush()
        os._exit(stop.code or 0)
