"""Text -> token shards: FineWeb-Edu by default, streamed and tokenized with GPT-2's BPE.

    python fineweb.py                                        # FineWeb-Edu sample-10BT: 20 GB
    python fineweb.py --max_tokens 1B                        # its first billion tokens: 2 GB
    python fineweb.py --source tokenized --max_tokens 1B     # about the same, already tokenized
    python fineweb.py --source fineweb --subset sample-100BT
    python fineweb.py --source text --data_files tiny-shakespeare.txt --out_dir datasets/shakespeare
    python fineweb.py --source parquet --data_files "corpus/*.parquet"
    python fineweb.py --source pydoc --train_tokenizer 4096  # Python's documentation, no network

It opens the source, loads or learns the tokenizer, tokenizes the documents in worker processes,
and writes shards of 100M tokens. <|endoftext|> precedes every document, and a document continues
in the next shard where one is full. The first shard is for validation; if the text does not fill
two shards, its first tenth is.

Killed at any moment and run again, it resumes where the first unfinished shard begins. Run on a
finished folder, it verifies the checksums. With a higher --max_tokens, it continues after the last
shard; those that are there stay as they are.
"""

import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from decimal import Decimal
from pathlib import Path
from typing import Literal

from common.console import Progress, UserError, parse_flags, run_script, say, write_text
from common.machine import num_cores


def parse_limit(text: str) -> int | None:
    """Number of tokens in text like 1e9, 1B or 800M; None for "all"."""
    if text == "all":
        return None
    # The last character is a unit, or a digit of a number without one.
    factor = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}.get(text[-1:].upper(), 1)
    try:
        # Not float: 1.1e9 has to be exact. What is not a number raises an ArithmeticError.
        number = Decimal(text if factor == 1 else text[:-1]) * factor
        # 1.5K is a whole number of tokens, 1.5 is not. Infinity is above the limit.
        if 1 <= number <= 10**15 and number == int(number):
            return int(number)
    except ArithmeticError:
        pass
    raise UserError(
        f"max_tokens is {text!r}, must be a number of tokens like 1e9, 1B or 800M, or all"
    )


@dataclass
class Config:
    # where the text comes from; tokenized = shards on the hub, made with GPT-2's tokenizer
    source: Literal["fineweb-edu", "fineweb", "tokenized", "parquet", "json", "text", "pydoc"] = (
        "fineweb-edu"
    )
    # subset of fineweb-edu or fineweb
    subset: str = "sample-10BT"
    # for tokenized: a dataset on the Hugging Face hub that holds .bin shards in llm.c's format
    repo: str = "kjj0/finewebedu10B-gpt2"
    # maximum number of tokens, those for validation included: 1e9, 1B, 800M, or all; for tokenized,
    # it is rounded up to whole shards
    max_tokens: str = "all"
    # files, globs or URLs: parquet; json, an object per line or an array of them; or text, where
    # lines of <|endoftext|> separate documents within a file. text and json also as .gz
    data_files: tuple[str, ...] = ()
    # column of parquet files, or field of json objects, that holds the text
    text_column: str = "text"
    # folder of the shards; empty = named by source and subset, like datasets/edu_fineweb10B
    out_dir: str = ""
    shard_size: int = 100_000_000  # tokens per shard
    # gpt2; a vocab.tiktoken or tokenizer.json file; a Hugging Face folder, or a model on the hub
    tokenizer: str = "gpt2"
    # learn a vocabulary of this size from the source and use it instead; 0 = off
    train_tokenizer: int = 0
    # maximum number of characters to learn the vocabulary from
    train_tokenizer_chars: int = 1_000_000_000
    num_workers: int = 0  # tokenizer processes; 0 = one per CPU core

    def __post_init__(self):
        # Imported here, because it takes longer than --help may take.
        from common.text import HUB
        from common.tokenizer import MIN_VOCAB_SIZE

        self.token_limit = parse_limit(self.max_tokens)
        # The flags of the two ways exclude each other: download finished shards, or tokenize text.
        if self.source == "tokenized":
            self._check_tokenized()
        elif self.repo != Config.repo:
            raise UserError("--repo is only for --source tokenized")
        elif self.token_limit is not None and self.token_limit <= self.shard_size:
            raise UserError(
                f"max_tokens is {self.max_tokens}, must be above shard_size {self.shard_size:,}: "
                "the first shard is for validation; raise max_tokens, or lower shard_size"
            )

        # The writer fills one shard in memory: at the upper limit, 2 or 4 GiB. The lower limit
        # leaves one token to predict.
        if not 2 <= self.shard_size <= 2**30:
            raise UserError(f"shard_size is {self.shard_size}, must be from 2 to {2**30}")
        if self.num_workers < 0:
            raise UserError(f"num_workers is {self.num_workers}, must be 0 (one per core) or more")

        if self.train_tokenizer and self.train_tokenizer < MIN_VOCAB_SIZE:
            raise UserError(
                f"train_tokenizer is {self.train_tokenizer}, must be 0 (off) or at least "
                f"{MIN_VOCAB_SIZE}: the bytes, and the end of text"
            )
        if self.train_tokenizer_chars < 1:
            raise UserError(
                f"train_tokenizer_chars is {self.train_tokenizer_chars}, must be at least 1"
            )
        if self.train_tokenizer and self.tokenizer != "gpt2":
            raise UserError("tokenizer and train_tokenizer exclude each other")

        # sample-10BT of fineweb-edu goes to datasets/edu_fineweb10B.
        if not self.out_dir:
            self.out_dir = f"datasets/{self.source}"
            if self.source in HUB:
                size = self.subset.removeprefix("sample-").removesuffix("T")
                self.out_dir = f"datasets/{HUB[self.source].folder}{size}"
            if self.source == "tokenized":
                self.out_dir = f"datasets/{self.repo.split('/')[-1]}"
        if not self.num_workers:
            self.num_workers = num_cores()

    def _check_tokenized(self):
        """Raise UserError for flags about text, which is not read here."""
        for field in fields(self):
            is_used = field.name in ("source", "repo", "max_tokens", "out_dir")
            if not is_used and getattr(self, field.name) != field.default:
                raise UserError(f"--{field.name} has no use with --source tokenized: leave it out")


if __name__ == "__main__":
    config = parse_flags(Config, __doc__)  # before the slow imports: --help answers at once

import numpy as np
import pyarrow as pa
import tiktoken

from common.shards import SOURCE_START, ShardWriter, check_disk
from common.text import HUB, Batch, Source, open_source
from common.tokenized import download_shards
from common.tokenizer import (
    encode_texts,
    encoding_of,
    load_tokenizer,
    tokenizer_to_text,
    train_tokenizer,
)

PENDING_BYTES = 2**28  # upper bound on the text that waits for the workers
# File of the tokenizer in the folder of the shards, unless it is GPT-2's: the first, or the second
# for a tokenizer of another model that does not fit into the format of the first.
VOCABULARY = "vocab.tiktoken"
FOREIGN_VOCABULARY = "foreign_tokenizer.json"


def main(config: Config):
    """Write the shards of the source, or those that an earlier run left unfinished."""
    out_dir = Path(config.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    # Shards from the hub are downloaded as they are: no text, no tokenizing.
    if config.source == "tokenized":
        manifest = download_shards(config.repo, out_dir, config.token_limit)
        summarize(out_dir, manifest, config.token_limit)
        say(f"train on them with: python train_gpt2.py --data_dir {out_dir}")
        return

    # Where the text comes from, and how it is tokenized.
    source = open_source(config.source, config.subset, config.data_files, config.text_column)
    enc = choose_tokenizer(config, source, out_dir)

    # The writer verifies the shards of an earlier run, and knows where to continue.
    header = manifest_header(config, source, enc, out_dir)
    writer = ShardWriter(out_dir, source.prefix, config.shard_size, header, config.token_limit)
    # A run that was killed after its last shard has only the manifest left to complete.
    if writer.is_full:
        writer.finish()
    if writer.manifest["complete"]:
        return summarize(out_dir, writer.manifest, config.token_limit)
    # Find out before the first shard, rather than after hours, that the disk is too small.
    num_expected = estimate_tokens(source, writer)
    check_disk_for(num_expected, writer)

    # Continue where the last finished shard ends. Without one, that is the start of the source.
    start = writer.next_position()
    if writer.num_shards:
        say(f"resuming at document {start['document']:,} after {writer.num_shards} finished shards")

    # Tokenize the documents and write shards. `finish` splits off the validation shard of a
    # small corpus; otherwise the first shard is it.
    start_tokens = writer.num_tokens
    start_time = time.monotonic()
    with Progress(
        total=num_expected,
        initial=start_tokens,
        unit="tok",
        unit_scale=True,
        desc="tokenizing",
    ) as bar:
        # If max_tokens ends the loop before the source ends, `closing` stops the workers.
        with closing(tokenize(source.batches(start), enc, config.num_workers)) as tokenized:
            for batch, tokens, lengths in tokenized:
                writer.add(batch.position, tokens, lengths, batch.is_continuation)
                bar.set_description(f"shard {writer.num_shards}", refresh=False)
                bar.update(len(tokens))
                if writer.is_full:
                    break
        writer.finish()
        # The total was an estimate.
        bar.total = writer.num_tokens
        bar.n = writer.num_tokens

    # The speed is that of this run. Tokens of earlier runs do not count.
    seconds = time.monotonic() - start_time
    speed = f", {(writer.num_tokens - start_tokens) / seconds:,.0f} tokens/s"
    summarize(out_dir, writer.manifest, config.token_limit, speed)


def summarize(folder: Path, manifest: dict, limit: int | None, speed: str = ""):
    """Print what the folder holds, and whether the source ended before the limit."""
    empty = ""
    if manifest["empty_documents"]:
        empty = f" ({manifest['empty_documents']:,} empty ones left out)"
    num_tokens = manifest["tokens"]
    say(
        f"{folder}: {num_tokens:,} tokens of {manifest['documents']:,} documents"
        f"{empty} in {len(manifest['shards'])} shards{speed}"
    )
    if limit is not None and num_tokens < limit:
        say(f"the source has no more: {num_tokens:,} tokens instead of max_tokens {limit:,}")


# ---------------------------------------------------------------------------------------------
# Before the shards: tokenizer, manifest, disk


def choose_tokenizer(config: Config, source: Source, out_dir: Path) -> tiktoken.Encoding:
    """Load the tokenizer, or learn it from the source and save it as out_dir/vocab.tiktoken."""
    if not config.train_tokenizer:
        return load_tokenizer(config.tokenizer)

    # Learn it, unless an earlier run has. It is saved before the first shard, so that a run that is
    # killed later resumes with the same tokens.
    path = out_dir / VOCABULARY
    if not path.exists():
        texts = training_texts(source, config.train_tokenizer_chars)
        enc, _ = train_tokenizer(texts, config.train_tokenizer)
        write_text(path, tokenizer_to_text(enc))
        say(f"learned {enc.n_vocab} tokens: {path}")
        return enc

    # Learned by an earlier run, which this one resumes.
    enc = load_tokenizer(path)
    if enc.n_vocab != config.train_tokenizer:
        raise UserError(
            f"{path} has {enc.n_vocab} tokens, not {config.train_tokenizer}: choose another out_dir"
        )
    say(f"using {path} from an earlier run")
    return enc


def training_texts(source: Source, max_chars: int) -> Iterator[str]:
    """The first documents of the source, about max_chars characters, with a progress bar."""
    # Only for the bar: bytes stand in for characters, and the limit for a size that is unknown.
    total = min(source.text_bytes or max_chars, max_chars)
    num_chars = 0
    with Progress(total=total, unit="char", unit_scale=True, desc="learning the tokenizer") as bar:
        for batch in source.batches(SOURCE_START):
            # Empty texts are None or "".
            for text in filter(None, batch.texts.to_pylist()):
                yield text
                num_chars += len(text)
            bar.update(num_chars - bar.n)
            if num_chars >= max_chars:
                return


def manifest_header(config: Config, source: Source, enc: tiktoken.Encoding, out_dir: Path) -> dict:
    """The manifest's fields that determine the bytes of the shards.

    Two runs that differ in one of them can't share a folder.
    """
    return dict(
        source=config.source,
        subset=config.subset if config.source in HUB else None,
        # Local files without their folder, so that the corpus can be moved.
        data_files=[Path(f).name if os.path.exists(f) else f for f in source.files],
        # Null for the default, because manifests made before this flag existed have no such field.
        text_column=None if config.text_column == "text" else config.text_column,
        # Notices local files that have changed. Remote ones have no size in the file system.
        data_bytes=None if source.is_remote else sum(map(os.path.getsize, source.files)),
        # The tokenizer, by name and by content: another one may have the same file name
        tokenizer=store_tokenizer(enc, out_dir),
        tokenizer_sha256=hashlib.sha256(tokenizer_to_text(enc).encode()).hexdigest(),
        vocab_size=enc.n_vocab,
        end_of_text=enc.eot_token,
        # The files: the smaller dtype if every id fits into it
        dtype="uint16" if enc.n_vocab <= 65536 else "uint32",
        shard_size=config.shard_size,
    )


def store_tokenizer(enc: tiktoken.Encoding, out_dir: Path) -> str:
    """Save a tokenizer other than GPT-2's next to the shards, so that the folder is complete.

    Returns the name for the manifest. Raises UserError if the folder has another tokenizer.
    """
    text = tokenizer_to_text(enc)
    if text == "gpt2":
        return "gpt2"

    # JSON begins with a brace. A line of vocab.tiktoken, like "IQ== 0", cannot: base64 has none.
    name = FOREIGN_VOCABULARY if text.startswith("{") else VOCABULARY

    # The file of an earlier run stays. With another tokenizer, new shards would not fit the old.
    path = out_dir / name
    if not path.exists():
        write_text(path, text)
    if path.read_text("utf-8") != text:
        raise UserError(f"{path} is another vocabulary: choose another out_dir")
    return name


def estimate_tokens(source: Source, writer: ShardWriter) -> int | None:
    """Estimated number of tokens in the finished folder, None if unknown."""
    estimate = source.estimate_tokens(writer.manifest["vocab_size"])
    # The run ends with the source or at max_tokens, whichever comes first. Either may be None.
    return min([n for n in (estimate, writer.max_tokens) if n is not None], default=None)


def check_disk_for(num_tokens: int | None, writer: ShardWriter):
    """Print how much disk space this number of tokens needs. Raises OSError if there is less."""
    bytes_per_token = np.dtype(writer.manifest["dtype"]).itemsize
    if num_tokens is None:
        say(f"disk needed: {bytes_per_token} bytes per token, their number is unknown")
    else:
        check_disk(writer.folder, max(0, num_tokens - writer.num_tokens) * bytes_per_token)


# ---------------------------------------------------------------------------------------------
# Tokenizing in worker processes


def tokenize(
    batches: Iterator[Batch], enc: tiktoken.Encoding, num_workers: int
) -> Generator[tuple[Batch, np.ndarray, list[int]]]:
    """Tokenize batches of texts. Yields (batch, tokens, lengths) in the order of the batches.

    It reads a few batches ahead, bounded in number and in bytes: memory does not grow with the
    source.
    """
    with worker_pool(enc, num_workers) as pool:
        # Batches in the pool. The workers may finish them in any order; the oldest is yielded
        # first.
        pending = deque()  # (batch, future)
        for batch in batches:
            pending.append((batch, pool.submit(encode_batch, batch.texts, batch.is_continuation)))
            # Read ahead while the oldest batch is computed, but not without limit. Three batches
            # per worker keep all of them busy; the bound in bytes matters if documents are long.
            while (
                len(pending) > 3 * num_workers
                or sum(waiting.texts.nbytes for waiting, _ in pending) > PENDING_BYTES
            ):
                oldest, future = pending.popleft()
                yield oldest, *future.result()
        # The source has ended: only the results of the last batches are missing.
        while pending:
            oldest, future = pending.popleft()
            yield oldest, *future.result()


@contextmanager
def worker_pool(enc: tiktoken.Encoding, num_workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that run `encode_batch`."""
    # The processes are spawned, not forked: the libraries that read the source have threads.
    context = multiprocessing.get_context("spawn")
    # tiktoken pickles GPT-2's tokenizer as its name, and each worker would load its files again.
    # One of our own is pickled with its tokens.
    by_value = enc
    if tokenizer_to_text(enc) == "gpt2":
        by_value = encoding_of(enc._mergeable_ranks)
    # Each process gets the tokenizer once, at its start, and not with every batch.
    pool = ProcessPoolExecutor(num_workers, context, init_worker, (by_value,))
    try:
        with signals_blocked():
            for _ in range(num_workers):
                pool.submit(int)  # a task that does nothing: they start while the source is opened
        yield pool
    except BrokenProcessPool as error:
        raise OSError(
            "a tokenizer process was killed (out of memory?): run the same command again to resume"
        ) from error
    finally:
        # After an error or an early end, the results of waiting batches are of no use.
        pool.shutdown(cancel_futures=True)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Processes that start inside this block inherit that SIGINT and SIGTERM are blocked.

    Ctrl-C then stops only this process, and the workers end with it. Windows has no such blocking:
    there, the workers may print a traceback as well.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # A new process inherits the set of blocked signals from the thread that starts it.
    stop_signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals)


worker_encoding: tiktoken.Encoding  # in the worker processes


def init_worker(enc: tiktoken.Encoding):
    """Prepare a worker process: its tokenizer, and a thread that ends it with its parent."""
    global worker_encoding
    worker_encoding = enc
    # A parent that is killed can't stop its workers, so each waits for the parent's end.
    threading.Thread(target=exit_with_parent, daemon=True).start()


def exit_with_parent():
    """Wait for the end of the parent, then end this process."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
    # sys.exit would end only this thread.
    os._exit(1)


def encode_batch(
    texts: pa.StringArray, is_continuation: bool = False
) -> tuple[np.ndarray, list[int]]:
    """Tokens of all texts, and the number of tokens of each. See encode_texts."""
    tokens, lengths = encode_texts(worker_encoding, texts)
    if is_continuation:
        # Only the first part of a document begins with <|endoftext|>.
        tokens = tokens[1:]
        lengths[0] -= 1
    return tokens, lengths


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # handled like Ctrl-C
    try:
        run_script(main, config)
    except SystemExit as stop:
        # A normal exit in the middle of a read hangs or aborts (apache/arrow#45214).
        sys.stdout.flush()
        os._exit(int(stop.code or 0))
