"""Text and JSON files of any size, as streams: blocks of text, documents, JSON values.

    for path in members("texts.txt.gz"):
        for block in read_blocks(path):
            ...     # some complete lines, without a byte-order mark

Memory does not grow with the size of a file.
"""

import codecs
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterator
from typing import IO

from common.console import UserError, encoding_of_text
from common.tokenizer import END_OF_TEXT

BLOCK_BYTES = 2**20  # bytes read from a text file at a time
PART_CHARS = 2**22  # a longer document of a text file is handled in parts

# <|endoftext|> at the end of a line
SEPARATOR = re.compile(re.escape(END_OF_TEXT) + r"[ \t]*(?:\n|\Z)")
# A text up to the last character that a space or line break follows: "one two" of "one two three"
LAST_SPACE = re.compile(r".*\S(?=[ \n])", re.DOTALL)
NOT_SPACE = re.compile(r"\S")


def import_datasets():
    """The `datasets` library, without its progress bars and log messages."""
    # Imported here: it takes a second, and worker processes import this module too.
    import datasets
    from huggingface_hub.utils import logging

    # Our own error messages say what went wrong.
    logging.set_verbosity_error()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    datasets.config.TORCH_AVAILABLE = False  # otherwise it imports torch, which takes seconds
    return datasets


def members(name: str) -> list[str]:
    """The paths by which `datasets` opens a file decompressed; several for a zip archive."""
    manager = import_datasets().StreamingDownloadManager()
    try:
        # Nothing is downloaded or extracted yet: the path of a .gz file becomes
        # gzip://a.txt::b/a.txt.gz, and is decompressed while it is read.
        path = manager.download_and_extract(name)
    except NotImplementedError as error:
        raise UserError(f"{name} is an archive that can't be read: unpack it") from error
    return list(manager.iter_files(path)) if path.startswith("zip://") else [path]


def open_binary(path: str) -> IO[bytes]:
    """Open a local file, a URL or one of the members of a file."""
    import_datasets()
    from datasets.utils.file_utils import xopen

    return xopen(path, "rb")


def plain_name(path: str) -> str:
    """The file that a path of `members` is in: gzip://a.txt::b/a.txt.gz -> b/a.txt.gz"""
    return path.split("::")[-1]


def uncompressed_size(name: str) -> int | None:
    """The size of a local file in bytes: estimated for .gz, None for other compressed files."""
    size = os.path.getsize(name)
    path = members(name)[0]
    if path == name:
        return size
    if not path.startswith("gzip://"):
        return None
    # A .gz file stores its size modulo 4 GiB, or that of its last part. The ratio of the beginning
    # is an estimate for all of them, and exact for the usual file below 1 MiB.
    with open(name, "rb") as file:
        head = file.read(2**20)
    # 31: the largest window (15), and a header of gzip (16). The limit of 16 MiB keeps a file that
    # decompresses to gigabytes from filling the memory.
    decompressor = zlib.decompressobj(wbits=31)
    try:
        text = decompressor.decompress(head, 2**24)
    except zlib.error as error:
        raise UserError(f"{name} is damaged or not a .gz file: {error}") from error
    # Bytes behind the limit, or behind the first part of the file, have not become text.
    rest = len(decompressor.unconsumed_tail) + len(decompressor.unused_data)
    return int(size * len(text) / max(1, len(head) - rest))


def read_blocks(path: str) -> Iterator[str]:
    """Read a text file block by block, with line breaks as "\\n" and without a byte-order mark.

    A block consists of complete lines, or is a piece of a line that is longer than a block, or the
    end of the file. Raises UserError if the file is neither UTF-8 nor marked as UTF-16.
    """
    num_lines = 0  # complete lines before the current block of bytes
    rest = ""  # the beginning of the next line
    with open_binary(path) as file:
        # The first block tells the encoding. The decoder keeps what a block cuts: a character, or
        # one of the line breaks \r\n.
        data = file.read(BLOCK_BYTES)
        encoding = encoding_of_text(data)
        decoder = io.IncrementalNewlineDecoder(
            codecs.getincrementaldecoder(encoding)(), translate=True
        )
        while True:
            try:
                # An empty block is the end of the file: then nothing may be left in the decoder.
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                # The error holds the block and the position in it. Count the lines before that.
                before = error.object[: error.start].decode(encoding, "ignore")
                line = num_lines + before.count("\n") + 1
                kind = "UTF-8" if encoding == "utf-8-sig" else "UTF-16"
                place = f"{plain_name(path)}, line {line}"
                raise UserError(f"{place}, is not {kind}: convert the file") from error
            num_lines += text.count("\n")
            # Yield up to the last line break and keep the rest.
            text = rest + text
            end = text.rfind("\n") + 1
            # Of a very long line, every block is passed on, so that memory does not grow with it.
            if end == 0 and len(text) >= BLOCK_BYTES or not data:
                end = len(text)
            if end:
                yield text[:end]
            rest = text[end:]
            if not data:
                return
            data = file.read(BLOCK_BYTES)


def split_at_separators(block: str, at_line_start: bool) -> list[str]:
    """The texts before, between and after the lines of a block that are only <|endoftext|>."""
    texts = []
    start = 0
    for match in SEPARATOR.finditer(block):
        # Only white space may stand before it on its line. The line can have begun in an earlier
        # block.
        line = block.rfind("\n", 0, match.start()) + 1
        begins_line = line > 0 or at_line_start
        if begins_line and not block[line : match.start()].strip(" \t"):
            texts.append(block[start:line])
            start = match.end()
    return [*texts, block[start:]]


def place_to_cut(text: str) -> int:
    """Where a part of a long text can end: its tokens, and those of the rest, stay the same.

    GPT-2's pattern always splits a text before the first of several spaces or line breaks. If
    there are none in PART_CHARS characters, the text is cut anyway, perhaps within a token.
    """
    match = LAST_SPACE.match(text, 0, PART_CHARS)
    return match.end() if match else PART_CHARS


# ---------------------------------------------------------------------------------------------
# JSON files: the values of a file, each with its place for error messages


def json_lines(name: str, start: str, blocks: Iterator[str]) -> Iterator[tuple[str, object]]:
    """The values on the lines of a file. `start` is the beginning of it, `blocks` the rest."""
    # Each line is parsed by itself, so that an error names it.
    number = 0
    for lines in complete_lines(start, blocks):
        for line in lines:
            number += 1
            if not line or line.isspace():
                continue
            place = f"{name}, line {number}"
            try:
                yield place, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{place}, can't be read as json: {error}") from error


def complete_lines(start: str, blocks: Iterator[str]) -> Iterator[list[str]]:
    """The lines of a file, those of a block at a time; lines longer than a block are joined."""
    unfinished = []
    for block in itertools.chain([start], blocks):
        unfinished.append(block)
        if block.endswith("\n"):
            # A block ends at a line break unless its line is longer than a block. Joined once,
            # because adding to a string of many blocks would copy it each time.
            *lines, _ = "".join(unfinished).split("\n")
            yield lines
            unfinished = []
    yield ["".join(unfinished)]


def json_array(name: str, start: str, blocks: Iterator[str]) -> Iterator[tuple[str, object]]:
    """The elements of the array that a file contains. The array is not read as a whole."""
    decoder = json.JSONDecoder()
    text = start
    end = text.index("[") + 1  # of what has been parsed
    line = 1 + text.count("\n", 0, end)  # number of the line at `end`
    is_empty = True
    is_closed = False
    while not is_closed:
        try:
            # One element, and the comma or bracket behind it
            first = skip_space(text, end)
            if is_empty and text[first : first + 1] == "]":
                end = first + 1
                break
            value, behind = decoder.raw_decode(text, first)
            behind = skip_space(text, behind)
            if text[behind : behind + 1] not in (",", "]"):
                raise json.JSONDecodeError("expecting ',' or ']' after an element", text, behind)
        except (json.JSONDecodeError, RecursionError) as error:
            # The end of the text may be in the middle of an element.
            position = getattr(error, "pos", 0)
            # Its error is then near the end: 20 characters cover the longest word or escape of
            # JSON. Only the error of an unfinished string has the position of the string's start.
            is_cut = position > len(text) - 20 or "Unterminated string" in str(error)
            # The text grows to twice its size: a long element is then parsed only a few times.
            more = read_chars(blocks, len(text) - end) if is_cut else ""
            if not more:
                line += text.count("\n", end, position)
                raise UserError(f"{name}, line {line}, can't be read as json: {error}") from error
            text = text[end:] + more
            end = 0
            continue

        # The line of an element is the one on which it begins.
        line += text.count("\n", end, first)
        yield f"{name}, line {line}", value
        line += text.count("\n", first, behind)
        end = behind + 1
        is_empty = False
        is_closed = text[behind] == "]"

    # Only white space may follow the array.
    if text[end:].strip() or any(block.strip() for block in blocks):
        raise UserError(f"{name}, line {line}, can't be read as json: text after the array")


def skip_space(text: str, start: int) -> int:
    """The first position from `start` on that is not white space."""
    match = NOT_SPACE.search(text, start)
    return match.start() if match else len(text)


def read_chars(blocks: Iterator[str], num_chars: int) -> str:
    """The next blocks, with at least this many characters; fewer at the end."""
    read = []
    num_read = 0
    for block in blocks:
        read.append(block)
        num_read += len(block)
        if num_read >= num_chars:
            break
    return "".join(read)
