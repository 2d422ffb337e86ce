"""Texts to finetune on, from a file or a folder of files, one string per text.

    texts = read_texts("datasets/finetune_data.txt")

The ending of a file decides how it is read:

    .json, .jsonl     an object per line, or one array of objects; a text per object
    .csv, .tsv        columns with a header; a text per row
    .parquet          the same
    .txt, all others  <LOC> ... </LOC> blocks, if it contains these tags: a text per block.
                      Otherwise documents with <|endoftext|>, or another separator, between them;
                      without a separator, the whole file is one text.

The columns of a row, or fields of an object, are `text`, or `prompt` and `completion`, or those
that the caller names. Several are joined into one text, with a line break where there is no white
space. The model is trained on all of it: the prompt is part of the text.
"""

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from common.console import UserError, checksum, read_lines, read_text
from common.foreign import END_OF_TEXT

# The tags around each text of a block file.
OPEN = "<LOC>"
CLOSE = "</LOC>"

# Columns that are looked for if the caller names none.
DEFAULT_COLUMNS = (("text",), ("prompt", "completion"))


def read_texts(
    path: str | Path,
    columns: tuple[str, ...] = (),
    separator: str = "",
    warn: Callable[[str], None] = print,
) -> list[str]:
    """All texts of a file, or of the files in a folder and its subfolders, sorted by name.

    `columns` replaces the default columns. `separator` replaces <|endoftext|> in .txt files, which
    then have no blocks. `warn` is called with a message for whatever is skipped.

    Raises UserError, with file and line, if a file is not in its format or there is no text;
    FileNotFoundError if there is no such file.
    """
    files = find_files(path, warn)
    # A flag that changes nothing is probably a mistake.
    num_record_files = sum(file.suffix.lower() in RECORDS for file in files)
    if columns and num_record_files == 0:
        raise UserError(f"--text_column is for {', '.join(RECORDS)}: {path} has no such file")
    if separator and num_record_files == len(files):
        raise UserError(f"--separator is for .txt files: {path} has no such file")

    texts = []
    for file in files:
        if file.suffix.lower() in RECORDS:
            texts += read_record_file(file, columns, warn)
        else:
            texts += read_text_file(file, separator)
    if not texts:
        raise UserError(f"{path} contains no text")
    return texts


def find_files(path: str | Path, warn: Callable[[str], None] = print) -> list[Path]:
    """The file itself, or all files of a folder that can be read; hidden ones do not count."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(
            f"no file {path}: --data names your own text, or run generate_finetune_data.py "
            "(--offline needs no network)"
        )
    files = []
    ignored = []
    for file in sorted(path.rglob("*")):
        # Hidden folders hold version control and caches.
        is_hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if is_hidden or not file.is_file():
            continue
        # Other endings are only read if the user names the file: a README next to the data, or
        # source code, is not meant.
        is_known = file.suffix.lower() == ".txt" or file.suffix.lower() in RECORDS
        (files if is_known else ignored).append(file)
    endings = ", ".join([".txt", *RECORDS])
    if not files:
        raise UserError(f"{path} contains no file that ends in {endings}")
    if ignored:
        warn(
            f"ignored {len(ignored)} files in {path} that do not end in {endings}; "
            f"the first is {ignored[0]}"
        )
    return files


def fingerprint(path: str | Path) -> str:
    """Identifies the content of a file, or the names and contents of the files in a folder."""
    path = Path(path)
    files = find_files(path, warn=lambda message: None)
    # A file has the same fingerprint under any name.
    if files == [path]:
        return checksum(path)
    # Of a folder, the names count too: they decide the order of the texts.
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path)} {checksum(file)}\n".encode())
    return digest.hexdigest()


def is_tagged(texts: list[str]) -> bool:
    """Whether all texts are <LOC> ... </LOC> blocks."""
    return all(text.startswith(OPEN) and text.endswith(CLOSE) for text in texts)


# ---------------------------------------------------------------------------------------------
# Text files


def read_text_file(path: Path, separator: str) -> list[str]:
    """The texts of a .txt file: its blocks, if it has tags, or its documents."""
    text = read_text(path).replace("\r\n", "\n")
    # One tag is enough, in any case of letters: read_blocks then reports what is wrong with it.
    if not separator and re.search(f"{OPEN}|{CLOSE}", text, re.IGNORECASE):
        return read_blocks(text, path)
    return split_documents(text, separator or END_OF_TEXT)


def split_documents(text: str, separator: str) -> list[str]:
    """The documents between the separators, without line breaks around them; not the empty ones."""
    documents = [document.strip("\n") for document in text.split(separator)]
    return [document for document in documents if document.strip()]


def read_blocks(text: str, path: Path) -> list[str]:
    """The <LOC> ... </LOC> blocks of a text, including their tags.

    Raises UserError, with the line, if the tags do not alternate, are written in another case, or
    text lies outside the blocks; also if there are fewer than two blocks.
    """

    def place(position: int) -> str:
        return f"{path}, line {text.count(chr(10), 0, position) + 1}"

    def check_outside(start: int, end: int):
        """Only white space may lie between two blocks."""
        outside = text[start:end].strip()
        if outside:
            position = text.index(outside, start)
            raise UserError(
                f"{place(position)}: text outside the {OPEN} ... {CLOSE} blocks "
                f"({outside.splitlines()[0][:40]!r}): put it into a block or remove it"
            )

    # Tags must alternate: each opens a block or closes the one that is open.
    blocks = []
    start = None  # position of the tag that opened the current block, None between blocks
    outside = 0  # end of the last block
    tags = re.compile(f"{OPEN}|{CLOSE}|{re.escape(END_OF_TEXT)}", re.IGNORECASE)
    for tag in tags.finditer(text):
        if start is None:
            check_outside(outside, tag.start())
        expected = OPEN if start is None else CLOSE
        # Tags in another case of letters are found, but equal neither.
        if tag[0] == expected == OPEN:
            start = tag.start()
        elif tag[0] == expected:
            blocks.append(text[start : tag.end()])
            start = None
        elif start is not None or tag[0] != END_OF_TEXT:  # which may lie between blocks
            raise UserError(f"{place(tag.start())}: {tag[0]} where {expected} was expected")
        outside = tag.end()

    # The end of the file: no block may be open, and nothing may follow the last one.
    if start is not None:
        raise UserError(f"{place(start)}: the last {OPEN} is not closed")
    check_outside(outside, len(text))

    # One text for training and one for validation
    if len(blocks) < 2:
        raise UserError(
            f"{path} holds {len(blocks)} texts between {OPEN} and {CLOSE}; at least two are needed"
        )
    return blocks


# ---------------------------------------------------------------------------------------------
# Files of records: objects or rows


def read_record_file(
    path: Path, columns: tuple[str, ...], warn: Callable[[str], None]
) -> list[str]:
    """The texts of a file of records. Those without text are reported by one call of `warn`."""
    texts = []
    empty = []  # places of the records without text
    for place, record in RECORDS[path.suffix.lower()](path, columns):
        text = record_text(record, columns, place)
        # Data for GPT-2 often ends each text in the name of the end-of-text token.
        documents = split_documents(text, END_OF_TEXT) if END_OF_TEXT in text else [text]
        if text.strip():
            texts += documents
        else:
            empty.append(place)
    if empty:
        warn(f"skipped {len(empty)} records without text; the first is {empty[0]}")
    return texts


def record_text(record: dict, columns: tuple[str, ...], place: str) -> str:
    """The columns of a record as one text; "" if its last column is empty or null."""
    text = ""
    value = None
    for column in choose_columns(record, columns, place):
        value = record[column]
        # An optional column, like the `input` of an instruction, may be empty.
        if value is None:
            value = ""
        if not isinstance(value, str):
            kind = type(value).__name__
            raise UserError(f"{place}: {column!r} contains {kind}, must be text")
        # A prompt and its completion would otherwise be one word at the seam.
        if text and value and not text[-1].isspace() and not value[0].isspace():
            text += "\n"
        text += value
    # A prompt without a completion would teach the model not to answer.
    return text.replace("\r\n", "\n") if value else ""


def choose_columns(present, columns: tuple[str, ...], place: str | Path) -> tuple[str, ...]:
    """`columns`, or those of the default columns that are present. Raises UserError."""
    candidates = (columns,) if columns else DEFAULT_COLUMNS
    # The first candidate whose columns are all there
    for candidate in candidates:
        if all(column in present for column in candidate):
            return candidate
    expected = " or ".join(" and ".join(candidate) for candidate in candidates)
    raise UserError(
        f"{place}: no {expected}, only {', '.join(map(str, present)) or 'nothing'}: "
        "name what to train on with --text_column"
    )


def json_records(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict]]:
    """The objects of an array, or one per line, each with its place for error messages."""
    text = read_text(path)
    # No line of a file with one object per line starts with a bracket.
    if text.lstrip().startswith("["):
        for number, record in enumerate(parse_json(text, str(path)), 1):
            # An array is parsed as a whole, so its elements have numbers but no lines.
            yield check_object(record, f"{path}, object {number}")
        return
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            place = f"{path}, line {number}"
            yield check_object(parse_json(line, place), place)


def parse_json(text: str, place: str) -> dict | list:
    """json.loads, with a UserError that says where the text is."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{place}: not valid JSON ({error})") from error


def check_object(record, place: str) -> tuple[str, dict]:
    """`place` and the record, which must be an object."""
    if not isinstance(record, dict):
        raise UserError(f"{place}: not an object with fields, but {type(record).__name__}")
    return place, record


def csv_records(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict]]:
    """The rows below the header, with their places. Commas, semicolons and tabs are recognized."""
    text = read_text(path)
    # The delimiter is the character that the header contains most often.
    header = text.lstrip("\r\n").split("\n", 1)[0]
    delimiter = max(",;\t", key=header.count)
    csv.field_size_limit(2**31 - 1)  # the default is 131,072 characters in a field
    # strict, because a quote that is never closed would swallow the rest of the file.
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)

    # The first row that is not empty names the columns. The fields of the others must match them.
    names = None
    line = 1  # of the row's first line; a quoted field may contain line breaks
    try:
        for row in rows:
            place = f"{path}, line {line}"
            # line_num counts the lines that the reader has read, so the next row begins one line
            # later.
            line = rows.line_num + 1
            if not row:  # an empty line
                continue
            if names is None:
                names = [name.strip() for name in row]
                choose_columns(names, columns, place)
            elif len(row) != len(names):
                # Usually commas in a text that is not quoted: the rest of it would be lost.
                raise UserError(
                    f"{place}: {len(row)} fields, but {len(names)} columns: put texts that "
                    f"contain {delimiter!r} into double quotes"
                )
            else:
                yield place, dict(zip(names, row))
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: not valid CSV ({error})") from error


def parquet_records(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict]]:
    """The rows of a Parquet file, with their places."""
    import pyarrow.parquet as pq  # takes half a second, and few users have such files

    number = 0
    try:
        file = pq.ParquetFile(path)
        # The other columns, which may be large, are not decoded.
        chosen = choose_columns(file.schema_arrow.names, columns, path)
        for batch in file.iter_batches(columns=list(chosen)):
            for record in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", record
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged or not a parquet file: {error}") from error


# The reader of each kind of file. It takes a path and the columns, and yields each record with its
# place for error messages.
RECORDS = {
    ".json": json_records,
    ".jsonl": json_records,
    ".csv": csv_records,
    ".tsv": csv_records,
    ".parquet": parquet_records,
}
