"""Sources of text: documents in a fixed order, from the hub, from files or from Python itself.

    source = open_source("parquet", data_files=("corpus/*.parquet",))
    for position, texts in source.batches(SOURCE_START):
        ...     # texts: a pyarrow.StringArray of consecutive documents, the first at `position`

Each kind of source is a class below. The `datasets` library reads the documents as a stream that
can be entered again where an earlier run stopped.
"""

import ast
import glob
import json
import os
import sysconfig
import time
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from common.console import UserError, say
from common.shards import Position

BATCH_DOCUMENTS = 64  # documents in a batch; a worker process tokenizes one batch at a time
MAX_RETRIES = 8  # consecutive attempts to resume after a lost connection


class HubDataset(NamedTuple):
    repository: str  # on the Hugging Face hub
    folder: str  # start of the default out_dir's name
    prefix: str  # of the shards' file names


HUB = {
    "fineweb-edu": HubDataset("HuggingFaceFW/fineweb-edu", "edu_fineweb", "edufineweb"),
    "fineweb": HubDataset("HuggingFaceFW/fineweb", "fineweb", "fineweb"),
}
HUB_TOKENS = {"sample-10BT": 10e9, "sample-100BT": 100e9, "sample-350BT": 350e9}


def open_source(kind: str, subset: str = "", data_files: tuple[str, ...] = ()) -> "Source":
    """The source of a kind: a name in HUB (with a subset), a name in FILE_SOURCES, or pydoc.

    Raises FileNotFoundError if a pattern in data_files matches nothing, UserError if data_files
    is missing or the kind has no use for it.
    """
    files = [name for pattern in data_files for name in expand(pattern)]
    if bool(files) != (kind in FILE_SOURCES):
        raise UserError(
            "--data_files GLOB is needed for the sources parquet, json and text, and only for these"
        )
    if kind in HUB:
        return HubSource(kind, subset)
    if kind in FILE_SOURCES:
        return FILE_SOURCES[kind](kind, files)
    return PydocSource(kind)


# ---------------------------------------------------------------------------------------------
# Kinds of sources


class Source:
    """Documents in a fixed order. Subclasses say how to open the stream and what its texts are."""

    is_remote = False  # read over the network?
    batch_documents = BATCH_DOCUMENTS

    def __init__(self, kind: str, files: list[str] | None = None):
        self.kind = kind
        self.prefix = kind  # of the shards' file names
        self.files = files or []

    def open(self):
        """The documents as a `datasets.IterableDataset` with the column "text"."""
        raise NotImplementedError

    def parse(self, column: pa.StringArray) -> pa.StringArray:
        """The texts of the documents, from the stream's column."""
        return column

    @cached_property
    def text_bytes(self) -> int | None:
        """Estimated size of the text in bytes, None if it is not on this machine."""
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

    def batches(self, start: Position) -> Iterator[tuple[Position, pa.StringArray]]:
        """Read from `start` on. Yields batches of texts, each with the position of its first one.

        After a lost connection, it resumes at the last position. Raises OSError if that fails
        repeatedly, or if nothing was read before; UserError if the data is not what it should be.
        """
        position = start
        num_failures = 0
        has_read = False
        while True:
            try:
                # `position` is the first document that the caller has not got.
                for batch_position, texts, next_position in self._read(position):
                    yield batch_position, texts
                    position = next_position
                    num_failures = 0
                    has_read = True
                return
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
                # 2, 4, 8 ... 60 seconds
                time.sleep(min(60, 2**num_failures))

    def _read(self, position: Position) -> Iterator[tuple[Position, pa.StringArray, Position]]:
        """Yields (position, texts, next position) of each batch, without retries."""
        dataset = self.open().with_format("arrow")
        if position["state"] is not None:
            dataset.load_state_dict(position["state"])
        for table in dataset.iter(batch_size=self.batch_documents):
            column_type = table["text"].type
            if str(column_type) not in ("string", "large_string", "string_view", "null"):
                raise UserError(f"the field 'text' contains {column_type}, not only strings")
            # Only the first batch after a resume has documents to skip.
            column = table["text"].combine_chunks()[position["skip"] :].cast(pa.string())
            texts = self.parse(column)
            texts.validate(full=True)  # raises if a text is not UTF-8
            next_position = Position(
                document=position["document"] + len(texts),
                token=0,
                state=dataset.state_dict(),
                skip=0,
            )
            yield position, texts, next_position
            position = next_position

    def _explain(self, error: Exception) -> Exception:
        """Turn a library's error about the data into a UserError that says where it is."""
        # ImportError: a URL whose scheme needs a package that is not installed.
        is_about_data = isinstance(error, (UserError, ValueError, OSError, ImportError))
        if is_about_data or type(error).__module__.startswith(("datasets", "pyarrow")):
            reason = error.__cause__ or error
            return UserError(f"{self.damaged_place()} can't be read as {self.kind}: {reason}")
        return error


class HubSource(Source):
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


class FileSource(Source):
    """Files, local or at URLs, all of one format."""

    loader: str  # builder of the `datasets` library
    options: dict = {}  # and its options

    def __init__(self, kind: str, files: list[str]):
        super().__init__(kind, files)
        self.is_remote = any("://" in name for name in files)

    def open(self):
        # Names are complete already: a * in one is part of the name.
        names = [name if "://" in name else glob.escape(name) for name in self.files]
        return open_stream(self.loader, data_files=names, **self.options)

    @cached_property
    def text_bytes(self) -> int | None:
        if self.is_remote:
            return None
        return sum(map(self.text_bytes_of, self.files))

    def text_bytes_of(self, name: str) -> int:
        return os.path.getsize(name)

    def damaged_place(self) -> str:
        """The first damaged file, and its line. The libraries' errors do not name them."""
        # URLs do not exist as paths, and are not downloaded again for this.
        for name in filter(os.path.exists, self.files):
            place = self.find_damage(name)
            if place:
                return place
        return super().damaged_place()

    def find_damage(self, name: str) -> str | None:
        """The file and the number of its first line that is not text, None if all are."""
        number = 0
        try:
            with open(name, encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    self.check_line(line)
        except UnicodeDecodeError:
            return f"{name} (not UTF-8)"
        except (UserError, ValueError, OSError):
            return f"{name}, line {number}," if number else name
        return None

    def check_line(self, line: str):
        """Raise UserError or ValueError if a line of a file is not in the format."""


class ParquetSource(FileSource):
    """Parquet files with a column "text", a document per row."""

    loader = "parquet"
    options = dict(columns=["text"])

    def text_bytes_of(self, name: str) -> int:
        try:
            metadata = pq.read_metadata(name)
        except (OSError, ValueError) as error:
            raise UserError(f"{name} is damaged or not a parquet file: {error}") from error
        if "text" not in metadata.schema.names or not metadata.num_rows:
            raise UserError(f"{name} has no column 'text', or no rows")
        # Only the text column counts, uncompressed. The footer knows its size in each row group.
        total = 0
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            for column in map(group.column, range(group.num_columns)):
                if column.path_in_schema == "text":
                    total += column.total_uncompressed_size
        return total

    def find_damage(self, name: str) -> str | None:
        try:
            for batch in pq.ParquetFile(name).iter_batches(columns=["text"]):
                batch.validate(full=True)
        except (ValueError, OSError):
            return name
        return None


class JsonSource(FileSource):
    """Files of JSON objects, one per line, with a document in the field "text"."""

    # Read as lines. The JSON loader wants the other fields, which are not used, to have the same
    # type in all objects.
    loader = "text"

    def parse(self, column: pa.StringArray) -> pa.StringArray:
        return pa.array(map(json_text, column.to_pylist()), pa.string())

    def check_line(self, line: str):
        (json_text(line) or "").encode()


class TextSource(FileSource):
    """Files of plain text, one document each."""

    loader = "text"
    options = dict(sample_by="document", keep_linebreaks=True)
    batch_documents = 1  # a file may hold a whole library


FILE_SOURCES = {"parquet": ParquetSource, "json": JsonSource, "text": TextSource}


class PydocSource(Source):
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


def open_stream(path: str, **options):
    """A dataset of the hub, or of a loader, as a stream."""
    return import_datasets().load_dataset(path, split="train", streaming=True, **options)


def expand(pattern: str) -> list[str]:
    """The files that match a glob, sorted; a URL is returned as it is."""
    if "://" in pattern:
        return [pattern]
    if os.path.isfile(pattern):  # a name with a * or [ in it
        matches = [pattern]
    else:
        matches = glob.glob(os.path.expanduser(pattern), recursive=True)
    names = sorted(os.path.abspath(name) for name in matches if os.path.isfile(name))
    if not names:
        raise FileNotFoundError(f"no file matches {pattern}")
    return names


def json_text(line: str) -> str | None:
    """The field "text" of a line of JSON, None for an empty line."""
    if not line.strip():
        return None
    match json.loads(line):
        case {"text": str() | None as text}:
            return text
    raise UserError("there is no field 'text' with a string")


def is_connection_error(error: BaseException) -> bool:
    """Whether an error was caused by the network."""
    # The HTTP libraries under `datasets` share no base class for their errors.
    http_libraries = ("httpx", "httpx2", "httpcore", "httpcore2", "aiohttp", "requests", "urllib3")
    for cause in (error, error.__cause__, error.__context__):
        library = type(cause).__module__.split(".")[0]
        if isinstance(cause, OSError) or library in http_libraries:
            return True
    return False


# ---------------------------------------------------------------------------------------------
# Python's own documentation


SKIPPED_FOLDERS = set(
    "site-packages dist-packages test tests idle_test lib2to3 pydoc_data __pycache__".split()
)


@lru_cache
def pydoc_texts() -> list[str]:
    """Python's help topics and the docstrings of the standard library, sorted by name; 2 MB.

    A document is a topic, or all docstrings of a module. Modules are parsed, never imported.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    topics = help_topics(library)
    modules = {}
    for path in library.rglob("*.py"):
        relative = path.relative_to(library)
        if not SKIPPED_FOLDERS & set(relative.parts):
            modules[relative.as_posix()] = path

    # Sorted, because rglob's order depends on the file system.
    texts = []
    for name in sorted([*modules, *topics], key=str.lower):
        text = docstrings(modules[name]) if name in modules else topics[name].strip()
        if text:
            texts.append(text)
    return texts


def help_topics(library: Path) -> dict[str, str]:
    """The topics of Python's `help()`: name -> text."""
    path = library / "pydoc_data" / "topics.py"
    if not path.exists():
        return {}
    # The file is one assignment of a dict.
    statements = ast.parse(path.read_text("utf-8")).body
    assignment = next(s for s in statements if isinstance(s, ast.Assign))
    return ast.literal_eval(assignment.value)


def docstrings(path: Path) -> str:
    """The docstrings of a module, its classes and its functions."""
    # Not every file there is valid Python for this version.
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return ""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(tree) if isinstance(node, documented))
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))
