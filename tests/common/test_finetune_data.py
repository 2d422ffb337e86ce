"""Texts to finetune on, from every kind of file."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.console import UserError
from common.finetune_data import fingerprint, is_tagged, read_texts


@pytest.fixture
def read(tmp_path):
    """Write a file with the given name and content, and read its texts."""

    def write_and_read(name: str, content: str | bytes, **options) -> list[str]:
        data = content.encode() if isinstance(content, str) else content
        (tmp_path / name).write_bytes(data)
        return read_texts(tmp_path / name, **options)

    return write_and_read


# ---------------------------------------------------------------------------------------------
# Text files


def test_a_text_file_without_separators_is_one_text(read):
    assert read("a.txt", "One.\n\nTwo.\n") == ["One.\n\nTwo."]
    assert read("a.md", "# One") == ["# One"]


def test_documents_are_separated_by_end_of_text(read):
    text = "One.\nMore.\n<|endoftext|>\nTwo.\n<|endoftext|>\n\n<|endoftext|>"
    assert read("a.txt", text) == ["One.\nMore.", "Two."]
    assert read("a.txt", text.replace("\n", "\r\n")) == ["One.\nMore.", "Two."]


def test_documents_are_separated_by_another_separator(read):
    assert read("a.txt", "One.\nMore.\n\n\nTwo.\n", separator="\n\n") == ["One.\nMore.", "Two."]
    # With a separator, the file is not read as blocks.
    assert read("a.txt", "One <LOC>\nTwo\n", separator="\n") == ["One <LOC>", "Two"]


def test_every_encoding_of_a_text_file_is_read(read):
    assert read("a.txt", b"\xef\xbb\xbfOne") == ["One"]
    assert read("a.txt", "One\r\nTwo".encode("utf-16")) == ["One\nTwo"]
    assert read("a.jsonl", b'\xef\xbb\xbf{"text": "One"}') == ["One"]
    assert read("a.csv", 'text\r\n"One\r\nTwo"\r\n'.encode("utf-16")) == ["One\nTwo"]


def test_blocks_keep_their_tags(read):
    text = "\n<LOC>\nOne.\n</LOC>\n\n<LOC> Two. </LOC>\n<|endoftext|>\n"
    blocks = read("a.txt", text)
    assert blocks == ["<LOC>\nOne.\n</LOC>", "<LOC> Two. </LOC>"]
    assert read("a.txt", b"\xef\xbb\xbf" + text.encode()) == blocks
    assert is_tagged(blocks)
    assert not is_tagged([*blocks, "Three."])


BLOCK = "<LOC>\na\n</LOC>\n"


@pytest.mark.parametrize(
    "text, expected",
    [
        (BLOCK, "a.txt holds 1 texts"),
        (BLOCK + "<LOC> b", "a.txt, line 4: the last <LOC> is not closed"),
        (BLOCK + "<LOC> b <LOC> c", "a.txt, line 4: <LOC> where </LOC> was expected"),
        (BLOCK + "</LOC>", "a.txt, line 4: </LOC> where <LOC> was expected"),
        (BLOCK + "b\n</LOC>", "a.txt, line 4: text outside the <LOC> ... </LOC> blocks ('b')"),
        (BLOCK + "<loc>b</loc>", "a.txt, line 4: <loc> where <LOC> was expected"),
        (BLOCK + "<LOC>\nb\n</loc>", "a.txt, line 6: </loc> where </LOC> was expected"),
        ("<loc>\na\n</loc>\n" * 2, "a.txt, line 1: <loc> where <LOC> was expected"),
        ("Title\nb\n\n" + BLOCK, "a.txt, line 1: text outside the <LOC> ... </LOC> blocks ('Title"),
        (BLOCK + "\n\nafter\n" + BLOCK, "a.txt, line 6: text outside"),
        (BLOCK + BLOCK + "\n end", "a.txt, line 8: text outside"),
        ("<LOC> a <|endoftext|> b </LOC>", "line 1: <|endoftext|> where </LOC> was expected"),
    ],
)
def test_wrong_blocks_are_errors(read, text, expected):
    with pytest.raises(UserError, match=re.escape(expected)):
        read("a.txt", text)


# ---------------------------------------------------------------------------------------------
# Records


def lines(*records: dict) -> str:
    return "\n".join(map(json.dumps, records)) + "\n"


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def test_objects_are_one_per_line_or_an_array(read):
    records = [{"text": "One\u2028.", "id": 1}, {"text": "Two."}]
    assert read("a.jsonl", lines(*records)) == ["One\u2028.", "Two."]
    assert read("a.jsonl", json.dumps(records[0], ensure_ascii=False)) == ["One\u2028."]
    assert read("a.json", json.dumps(records, indent=1)) == ["One\u2028.", "Two."]


def test_prompt_and_completion_are_joined(read):
    records = [
        {"prompt": "Q: a?", "completion": "A"},
        {"prompt": "Q: b?\n", "completion": "B"},
        {"prompt": "Q:", "completion": " C", "source": None},
        {"prompt": "", "completion": "D"},
    ]
    assert read("a.jsonl", lines(*records)) == ["Q: a?\nA", "Q: b?\nB", "Q: C", "D"]
    assert read("a.csv", "completion,prompt\nA,Q\n") == ["Q\nA"]


def test_other_columns_are_named(read, tmp_path):
    record = {"instruction": "Add.", "input": "", "output": "3", "text": "not this"}
    columns = ("instruction", "input", "output")
    assert read("a.jsonl", lines(record), columns=columns) == ["Add.\n3"]
    assert read("a.csv", "id;content\n1;a,b\n", columns=("content",)) == ["a,b"]
    path = parquet(tmp_path / "a.parquet", content=["One", "Two"], other=[1, 2])
    assert read_texts(path, columns=("content",)) == ["One", "Two"]


def test_rows_are_read_from_csv_tsv_and_parquet(read, tmp_path):
    text = 'id,text\n1,"One, ""and""\nmore"\n\n2,Two\n'
    assert read("a.csv", text) == ['One, "and"\nmore', "Two"]
    assert read("a.tsv", "text\tid\nOne, two\t1\n") == ["One, two"]
    assert read("a.CSV", "text\n" + "x" * 200_000) == ["x" * 200_000]
    encoded = pa.array(["One", "One"]).dictionary_encode()
    assert read_texts(parquet(tmp_path / "a.parquet", text=encoded)) == ["One", "One"]


def test_records_may_contain_the_end_of_text(read):
    assert read("a.jsonl", lines({"text": "One<|endoftext|>"})) == ["One"]
    assert read("a.csv", "text\nOne<|endoftext|>Two\n") == ["One", "Two"]


def test_records_without_text_are_skipped_and_reported(read, tmp_path):
    said = []
    text = lines({"text": "One"}, {"text": None}, {"text": " "}, {"prompt": "Q", "completion": ""})
    assert read("a.jsonl", text, warn=said.append) == ["One"]
    assert said == [f"skipped 3 records without text; the first is {tmp_path}/a.jsonl, line 2"]
    path = parquet(tmp_path / "a.parquet", text=pa.array([None, "Two"]))
    assert read_texts(path, warn=said.append) == ["Two"]
    assert said[1].endswith("a.parquet, row 1")
    with pytest.raises(UserError, match="a.parquet contains no text"):
        read_texts(parquet(tmp_path / "a.parquet", text=pa.nulls(3)), warn=said.append)


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("a.jsonl", '{"text": "a"}\n{"text": ', "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", '{"text": "a"}\n\n"b"', "a.jsonl, line 3: not an object with fields, but str"),
        ("a.jsonl", '{"text": ["a"]}', "a.jsonl, line 1: 'text' contains list, must be text"),
        ("a.jsonl", '{"text": 3}', "a.jsonl, line 1: 'text' contains int, must be text"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"messages": []}',
            "a.jsonl, line 2: no text or prompt and completion, only messages: name what to "
            "train on with --text_column",
        ),
        ("a.json", '[{"text": "a"}, 3]', "a.json, object 2: not an object"),
        ("a.json", '[{"text": "a"},\n{"te', "a.json: not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "a.jsonl, line 2, is not UTF-8"),
        ("a.csv", "tweet\na\n", "a.csv, line 1: no text or prompt and completion, only tweet"),
        ("a.csv", "id,text\n1,a\n2,b, c\n", "a.csv, line 3: 3 fields, but 2 columns"),
        ("a.csv", 'id,text\n1,"a\nb"\n2,"c\n3,d\n', "a.csv, line 4: not valid CSV"),
        ("a.csv", "text\n", "a.csv contains no text"),
        ("a.csv", "", "a.csv contains no text"),
        ("a.parquet", "PAR", "a.parquet is damaged or not a parquet file"),
        ("a.txt", " \n", "a.txt contains no text"),
        ("a.txt", b"a\nb\xff", "a.txt, line 2, is not UTF-8"),
    ],
)
def test_wrong_records_are_errors(read, name, content, expected):
    with pytest.raises(UserError, match=re.escape(expected)):
        read(name, content)


def test_wrong_columns_of_parquet_files_are_errors(tmp_path):
    path = parquet(tmp_path / "a.parquet", text=[1, 2], other=["a", "b"])
    with pytest.raises(UserError, match="a.parquet, row 1: 'text' contains int"):
        read_texts(path)
    with pytest.raises(UserError, match="a.parquet: no content, only text, other"):
        read_texts(path, columns=("content",))


def test_a_flag_without_effect_is_an_error(read):
    with pytest.raises(UserError, match="--text_column is for .json, .jsonl, .csv, .tsv, .parquet"):
        read("a.txt", "One", columns=("content",))
    with pytest.raises(UserError, match="--separator is for .txt files: .*a.csv has no such file"):
        read("a.csv", "text\nOne", separator="\n")


# ---------------------------------------------------------------------------------------------
# Folders


def test_all_files_of_a_folder_are_read(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b.txt").write_text("Two<|endoftext|>Three")
    (tmp_path / "a.jsonl").write_text('{"text": "One"}')
    (tmp_path / "sub" / "c.TXT").write_text("Four")
    (tmp_path / ".git" / "d.txt").write_text("hidden")
    assert read_texts(tmp_path) == ["One", "Two", "Three", "Four"]

    said = []
    (tmp_path / "x.pdf").write_bytes(b"%PDF")
    (tmp_path / "README.md").write_text("About this data.")
    assert len(read_texts(tmp_path, warn=said.append)) == 4
    assert re.search(r"ignored 2 files .* the first is .*README.md", said[0])


def test_a_folder_without_texts_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"contains no file that ends in .txt, .json"):
        read_texts(tmp_path)
    with pytest.raises(FileNotFoundError, match="generate_finetune_data.py"):
        read_texts(tmp_path / "none")


def test_the_fingerprint_changes_with_the_files(tmp_path):
    (tmp_path / "a.txt").write_text("One")
    first = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == first
    (tmp_path / "a.txt").write_text("Two")
    second = fingerprint(tmp_path)
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert len({first, second, fingerprint(tmp_path)}) == 3
