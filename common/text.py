"""Sources of text: documents in a fixed order, from the hub, from files or from Python itself.

    source = open_source("parquet", data_files=("corpus/*.parquet",))
    for batch in source.batches(SOURCE_START):
        ...     # batch.texts: a pyarrow.StringArray of consecutive documents

Each kind of source is a class below. Text and JSON files are read here, block by block; the
`datasets` library streams the others. Both can be entered again where an earlier run stopped.
"""

import glob
import itertools
import os
import re
import time
import zlib
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from common import blocks
from common.blocks import (
    import_datasets,
    json_array,
    json_lines,
    members,
    open_binary,
    place_to_cut,
    plain_name,
    read_blocks,
    split_at_separators,
    uncompressed_size,
)
from common.console import UserError, say
from common.hub import MAX_RETRIES, is_connection_error, retry_delay
from common.pydoc_texts import pydoc_texts
from common.shards import Position

BATCH_DOCUMENTS = 64  # documents in a batch; a worker process tokenizes one batch at a time
BATCH_CHARS = 2**20  # a batch of texts from files ends when it has more characters

# Half of a surrogate pair, which is no character: "\ud83d" in a JSON file whose text was cut.
SURROGATE = re.compile("[\ud800-\udfff]")


class HubDataset(NamedTuple):
    repository: str  # on the Hugging Face hub
    folder: str  # start of the default out_dir's name
    prefix: str  # of the shards' file names


# The datasets of the hub that fineweb.py knows, by the name of the source
HUB = {
    "fineweb-edu": HubDataset("HuggingFaceFW/fineweb-edu", "edu_fineweb", "edufineweb"),
    "fineweb": HubDataset("HuggingFaceFW/fineweb", "fineweb", "fineweb"),
}
# Nominal number of GPT-2 tokens in a subset
HUB_TOKENS = {"sample-10BT": 10e9, "sample-100BT": 100e9, "sample-350BT": 350e9}


class Batch(NamedTuple):
    position: Position  # of the first text
    texts: pa.StringArray
    # Is the first text the next part of the document whose last part was in the batch before?
    is_continuation: bool = False


def open_source(
    kind: str, subset: str = "", data_files: tuple[str, ...] = (), text_column: str = "text"
) -> "Source":
    """The source of a kind: a name in HUB (with a subset), a name in FILE_SOURCES, or pydoc.

    Raises FileNotFoundError if a pattern in data_files matches nothing, UserError if data_files
    is missing or the kind has no use for it or for text_column.
    """
    files = [name for pattern in data_files for name in expand(pattern)]
    # A flag that changes nothing is probably a mistake.
    if bool(files) != (kind in FILE_SOURCES):
        raise UserError(
            "--data_files GLOB is needed for the sources parquet, json and text, and only for these"
        )
    if text_column != "text" and kind not in ("parquet", "json"):
        raise UserError("--text_column is only for the sources parquet and json")
    if kind in HUB:
        return HubSource(kind, subset)
    if kind in FILE_SOURCES:
        return FILE_SOURCES[kind](kind, files, text_column)
    return PydocSource(kind)


# ---------------------------------------------------------------------------------------------
# Kinds of sources


class Source:
    """Documents in a fixed order. Subclasses read them, from any position on."""

    is_remote = False  # read over the network?

    def __init__(self, kind: str, files: list[str] | None = None, text_column: str = "text"):
        self.kind = kind
        self.prefix = kind  # of the shards' file names
        self.files = files or []
        self.text_column = text_column

    def _read(self, position: Position) -> Iterator[tuple[Batch, Position]]:
        """Yields each batch and the position after it, without retries."""
        raise NotImplementedError

    @cached_property
    def text_bytes(self) -> int | None:
        """Estimated size of the text in bytes, None if unknown before the text is read."""
        return None

    def estimate_tokens(self, vocab_size: int) -> int | None:
        """Estimated number of tokens, None if unknown before the text is read."""
        if self.text_bytes is None:
            return None
        # In English text, GPT-2's tokens have 4 to 5 bytes, those of small vocabularies about 3.
        bytes_per_token = 4 if vocab_size > 20_000 else 3
        return int(self.text_bytes / bytes_per_token)

    def damaged_place(self) -> str:
        """The place of the first damage, for an error message."""
        return "the source"

    def batches(self, start: Position) -> Iterator[Batch]:
        """Read from `start` on.

        After a lost connection, it resumes at the last position. Raises OSError if that fails
        repeatedly, or if nothing was read before; UserError if the data is not what it should be.
        """
        position = start
        num_failures = 0
        has_read = False
        while True:
            try:
                # `position` is the first document that the caller has not got.
                for batch, next_position in self._read(position):
                    yield batch
                    position = next_position
                    # Only failures in a row count.
                    num_failures = 0
                    has_read = True
                return
            except UserError:
                raise
            except Exception as error:
                # A local file that can't be read is damaged or not permitted: no use in retrying.
                if not self.is_remote or not is_connection_error(error):
                    raise self._explain(error) from error
                num_failures += 1
                # If nothing was read, the network or the token is probably wrong: don't wait.
                if not has_read or num_failures > MAX_RETRIES:
                    raise OSError(
                        f"{self.kind} can't be reached: check network and HF_TOKEN, "
                        f"then run the same command again to resume: {error}"
                    ) from error
                say(
                    f"connection lost at document {position['document']:,}, retrying "
                    f"({type(error).__name__})"
                )
                time.sleep(retry_delay(num_failures))

    def _explain(self, error: Exception) -> Exception:
        """Turn a library's error about the data into a UserError that says where it is."""
        # ImportError: a URL whose scheme needs a package that is not installed.
        # TypeError: `datasets` can't cast a column.
        is_about_data = isinstance(error, (ValueError, OSError, EOFError, ImportError, zlib.error))
        is_about_data |= isinstance(error, TypeError) and "cast" in str(error)
        if is_about_data or type(error).__module__.startswith(("datasets", "pyarrow")):
            # The `datasets` library wraps the error that names the reason.
            reason = error.__cause__ or error
            return UserError(f"{self.damaged_place()} can't be read as {self.kind}: {reason}")
        # Any other error is a bug, and keeps its traceback.
        return error


class StreamSource(Source):
    """Documents from a stream of the `datasets` library."""

    def open(self):
        """The documents as a `datasets.IterableDataset` with the column text_column."""
        raise NotImplementedError

    def _read(self, position: Position) -> Iterator[tuple[Batch, Position]]:
        # Arrow tables, because Python strings would cost time and memory in this process: only the
        # workers that tokenize need them.
        dataset = self.open().with_format("arrow")
        if position["state"] is not None:
            dataset.load_state_dict(position["state"])
        for table in dataset.iter(batch_size=BATCH_DOCUMENTS):
            check_column_type(table[self.text_column].type, self.text_column, "the source")
            # Only the first batch after a resume has documents to skip.
            column = table[self.text_column].combine_chunks()[position["skip"] :]
            # One type for all sources: a column can also be large_string or null.
            texts = column.cast(pa.string())
            texts.validate(full=True)  # raises if a text is not UTF-8
            # After iter has yielded a batch, the state is that behind it.
            next_position = Position(
                document=position["document"] + len(texts),
                token=0,
                state=dataset.state_dict(),
                skip=0,
            )
            yield Batch(position, texts), next_position
            position = next_position


class HubSource(StreamSource):
    """FineWeb and FineWeb-Edu, streamed from the Hugging Face hub."""

    is_remote = True

    def __init__(self, kind: str, subset: str):
        super().__init__(kind)
        self.prefix = HUB[kind].prefix
        self.subset = subset

    def open(self):
        # The other columns are not decoded. They are still downloaded, unless they are large.
        return open_stream(HUB[self.kind].repository, name=self.subset, columns=["text"])

    def estimate_tokens(self, vocab_size: int) -> int | None:
        if self.subset not in HUB_TOKENS:
            return None
        return int(HUB_TOKENS[self.subset])


class ParquetSource(StreamSource):
    """Parquet files, local or at URLs, with a document per row in the column text_column."""

    def __init__(self, kind: str, files: list[str], text_column: str):
        super().__init__(kind, files, text_column)
        self.is_remote = has_url(files)

    def open(self):
        # The loader needs the type of the column, so look into the files first: into the first one
        # only if they are remote, otherwise into all.
        datasets = import_datasets()
        options = {}
        if self.is_remote:
            names = self.files
            with open_binary(names[0]) as file:
                types = [self.find_type(pq.read_schema(file), names[0])]
        else:
            footers = self.files_with_rows
            names = list(footers)
            schemas = {name: footer.schema.to_arrow_schema() for name, footer in footers.items()}
            types = [self.find_type(schema, name) for name, schema in schemas.items()]
            # By default, it reads as many rows at a time as are in the first row group.
            if any(footer.row_group(0).num_rows == 0 for footer in footers.values()):
                options["batch_size"] = 1000
        # Without a type, that of the first file would apply to all: no strings if it is all null.
        text_type = "large_string" if "large_string" in types else "string"
        features = datasets.Features({self.text_column: datasets.Value(text_type)})
        # Names are complete already: a * in one is part of the name.
        names = [name if "://" in name else glob.escape(name) for name in names]
        return open_stream(
            "parquet", data_files=names, columns=[self.text_column], features=features, **options
        )

    def find_type(self, schema: pa.Schema, name: str) -> str:
        """The type of the text column. Raises UserError if it has none for text, or is missing."""
        if self.text_column not in schema.names:
            columns = ", ".join(schema.names)
            raise UserError(
                f"{name} has no column {self.text_column!r}: choose one of its columns "
                f"({columns}) with --text_column"
            )
        column_type = schema.field(self.text_column).type
        check_column_type(column_type, self.text_column, name)
        return str(column_type)

    @cached_property
    def files_with_rows(self) -> dict[str, pq.FileMetaData]:
        """The footers of the files (local ones) that have rows; the others are reported."""
        found = {}
        for name in self.files:
            # A footer holds the schema and the number of rows. Reading it is fast for files of any
            # size.
            try:
                metadata = pq.read_metadata(name)
            except (OSError, ValueError) as error:
                raise UserError(f"{name} is damaged or not a parquet file: {error}") from error
            if metadata.num_rows:
                found[name] = metadata
            else:
                say(f"{name} has no rows, skipping it")
        if not found:
            raise UserError("the source holds no text: none of the parquet files has rows")
        return found

    @cached_property
    def text_bytes(self) -> int | None:
        if self.is_remote:
            return None
        # Only the text column counts, uncompressed. The footer knows its size in each row group.
        total = 0
        for name, metadata in self.files_with_rows.items():
            self.find_type(metadata.schema.to_arrow_schema(), name)
            for group in map(metadata.row_group, range(metadata.num_row_groups)):
                for column in map(group.column, range(group.num_columns)):
                    if column.path_in_schema == self.text_column:
                        total += column.total_uncompressed_size
        return total

    def damaged_place(self) -> str:
        """The first damaged file. The libraries' errors do not name it."""
        # URLs do not exist as paths, and are not downloaded again for this.
        for name in filter(os.path.exists, self.files):
            # Read the texts of each file again, until one fails.
            try:
                for batch in pq.ParquetFile(name).iter_batches(columns=[self.text_column]):
                    batch.validate(full=True)
            except (ValueError, OSError):
                return name
        return super().damaged_place()


class FileSource(Source):
    """Text files of any size, local or at URLs, plain or compressed.

    A position's state is the number of a file and of a text in it. Each file is cut into batches
    from its beginning, so they are the same after a resume.
    """

    def __init__(self, kind: str, files: list[str], text_column: str):
        super().__init__(kind, files, text_column)
        self.is_remote = has_url(files)
        self._current_file = "the source"  # nothing was read yet
        self._has_surrogates = False

    def damaged_place(self) -> str:
        return self._current_file

    def read_texts(self, path: str) -> Iterator[tuple[str | None, bool]]:
        """The texts of a file, each with: is it the next part of the text before?"""
        raise NotImplementedError

    @cached_property
    def text_bytes(self) -> int | None:
        if self.is_remote:
            return None
        total = 0
        for name in self.files:
            size = uncompressed_size(name)
            if size is None:
                return None
            total += size
        return total

    def _read(self, position: Position) -> Iterator[tuple[Batch, Position]]:
        # Position of the first batch: number of its file, and texts of that file in earlier batches
        state = position["state"] or {"file": 0, "text": 0}
        # The `datasets` library read these files in earlier versions, and its state has other
        # fields.
        if state.keys() != {"file", "text"}:
            raise UserError(
                "the shards were begun by an earlier version, which read text differently: "
                "choose another out_dir"
            )

        # Cut the files into batches as in the run that stored the position, and drop those before
        # it.
        for number in range(state["file"], len(self.files)):
            num_texts = 0
            self._current_file = self.files[number]
            for texts, is_continuation in self._cut_into_batches(self._current_file):
                num_texts += len(texts)
                if number == state["file"] and num_texts <= state["text"]:
                    continue  # before the position
                # Only the first batch after a resume has texts to skip.
                skip = position["skip"]
                array = self._to_array(texts[skip:])
                next_position = Position(
                    document=position["document"] + len(array),
                    token=0,
                    state={"file": number, "text": num_texts},
                    skip=0,
                )
                # Only the first text of a batch can be the next part of a document. If it was
                # skipped, the batch begins with a new one.
                yield Batch(position, array, is_continuation and skip == 0), next_position
                position = next_position

    def _to_array(self, texts: list[str | None]) -> pa.StringArray:
        """Arrow array of texts. Half a surrogate pair, which JSON permits, becomes U+FFFD."""
        try:
            return pa.array(texts, pa.string())
        except UnicodeEncodeError:
            if not self._has_surrogates:
                say(f"{self._current_file}: incomplete characters (\\ud800 ...) become U+FFFD")
            self._has_surrogates = True
            return pa.array([text and SURROGATE.sub("\ufffd", text) for text in texts], pa.string())

    def _cut_into_batches(self, name: str) -> Iterator[tuple[list[str | None], bool]]:
        """The texts of a file in batches, each with: does its first text continue the last one?"""
        texts = []
        num_chars = 0
        begins_with_part = False
        # A zip archive has several members, which follow each other like the parts of one file.
        paths = members(name)
        for text, is_part in itertools.chain.from_iterable(map(self.read_texts, paths)):
            # A part of a document must be the first text of its batch: is_continuation is about
            # that one only.
            is_full = len(texts) == BATCH_DOCUMENTS or num_chars >= BATCH_CHARS
            if texts and (is_full or is_part):
                yield texts, begins_with_part
                texts = []
                num_chars = 0
            if not texts:
                begins_with_part = is_part
            texts.append(text)
            num_chars += len(text or "")
        if texts:
            yield texts, begins_with_part


class JsonSource(FileSource):
    """JSON objects with a document in the field text_column: one per line, or in one array."""

    def read_texts(self, path: str) -> Iterator[tuple[str | None, bool]]:
        file_blocks = read_blocks(path)
        # The first block that is not blank tells which of the two it is.
        start = ""
        while not start.strip():
            block = next(file_blocks, None)
            if block is None:
                return
            start += block
        read = json_array if start.lstrip().startswith("[") else json_lines
        for place, value in read(plain_name(path), start, file_blocks):
            yield self.text_of(value, place), False

    def text_of(self, value: object, place: str) -> str | None:
        """The text of an object, None if it is null. Raises UserError if there is no such field."""
        # The field must hold a string, or null for an empty document.
        match value:
            case {self.text_column: str() | None as text}:
                return text
            case {self.text_column: other}:
                kind = type(other).__name__
                raise UserError(f"{place}: the field {self.text_column!r} is {kind}, not a string")
            case dict():
                fields = ", ".join(map(str, value))
                raise UserError(
                    f"{place}: no field {self.text_column!r}; choose one of the fields ({fields}) "
                    "with --text_column"
                )
        raise UserError(f"{place}: not a JSON object, but {type(value).__name__}")


class TextSource(FileSource):
    """Files of plain text: one document each, or several with lines of <|endoftext|> between them.

    The line breaks next to such a line belong to it. A file without them is taken as it is.
    """

    def read_texts(self, path: str) -> Iterator[tuple[str, bool]]:
        document = ""  # what has been read of a document, without the parts that were yielded
        is_part = False
        is_separated = False  # is there a separator before the document?
        at_line_start = True
        for block in read_blocks(path):
            # The block continues the document. Texts behind its separators begin new ones.
            first, *others = split_at_separators(block, at_line_start)
            at_line_start = block.endswith("\n")
            document += first
            if is_separated and not is_part:
                # The line breaks behind a separator can go on in the next block.
                document = document.lstrip("\n")
            for text in others:
                # A separator ends the document.
                document = document.rstrip("\n")
                if document:
                    yield document, is_part
                document = text.lstrip("\n")
                is_part = False
                is_separated = True
            # Pass on the beginning of a long document, so that memory does not grow with it.
            while len(document) > blocks.PART_CHARS:
                place = place_to_cut(document)
                yield document[:place], is_part
                document = document[place:]
                is_part = True

        # The end of a file is like a separator, but a file without separators is taken as it is.
        if is_separated:
            document = document.rstrip("\n")
        # An empty file counts as an empty document.
        if document or not is_separated:
            yield document, is_part


FILE_SOURCES = {"parquet": ParquetSource, "json": JsonSource, "text": TextSource}


class PydocSource(StreamSource):
    """The documentation inside every Python, which needs no network. See pydoc_texts."""

    def open(self):
        def documents():
            for text in pydoc_texts():
                yield {"text": text}

        return import_datasets().IterableDataset.from_generator(documents)

    @cached_property
    def text_bytes(self) -> int:
        return sum(map(len, pydoc_texts()))


# ---------------------------------------------------------------------------------------------
# Helpers


def open_stream(path: str, **options):
    """A dataset of the hub, or of a loader, as a stream."""
    return import_datasets().load_dataset(path, split="train", streaming=True, **options)


def expand(pattern: str) -> list[str]:
    """The files that match a glob, sorted; a URL is returned as it is."""
    # A URL is no pattern: servers do not list their files.
    if "://" in pattern:
        return [pattern]
    if os.path.isfile(pattern):  # a name with a * or [ in it
        matches = [pattern]
    else:
        matches = glob.glob(os.path.expanduser(pattern), recursive=True)
    names = sorted(os.path.abspath(name) for name in matches if os.path.isfile(name))
    if not names and os.path.isdir(pattern):
        raise FileNotFoundError(f"{pattern} is a folder: name its files, as in '{pattern}/*.txt'")
    if not names:
        raise FileNotFoundError(f"no file matches {pattern}")
    return names


def has_url(files: list[str]) -> bool:
    """Whether some of the files are read over the network."""
    return any("://" in name for name in files)


def check_column_type(column_type: pa.DataType, column: str, place: str):
    """Raise UserError if a column does not contain strings, or nulls only."""
    # A dictionary column stores each distinct value once, and refers to it.
    if pa.types.is_dictionary(column_type):
        column_type = column_type.value_type
    if str(column_type) not in ("string", "large_string", "string_view", "null"):
        raise UserError(
            f"{place}: the column {column!r} contains {column_type}, not only strings; "
            "choose another one with --text_column"
        )
