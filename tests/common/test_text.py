"""Sources of text: which documents are read from files of all kinds, and from where they resume."""

import bz2
import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TEXTS

import fineweb
from common import blocks, text
from common.console import UserError
from common.shards import SOURCE_START, ShardWriter
from common.text import open_source
from common.tokenizer import train_tokenizer

STORIES = ["Once upon a time, naïve → 日本.\n\nThe end.", "A second story\n  is indented.", "third"]
SEPARATED = "\n<|endoftext|>\n".join(STORIES) + "\n<|endoftext|>\n"


@pytest.fixture(scope="module")
def enc():
    return train_tokenizer(TEXTS[:1], 400)[0]


def read(kind: str, *files: Path, start=SOURCE_START, **options) -> list:
    """The documents; the parts of a long one are joined."""
    documents = []
    source = open_source(kind, data_files=tuple(map(str, files)), **options)
    for batch in source.batches(start):
        texts = batch.texts.to_pylist()
        if batch.is_continuation:
            documents[-1] += texts.pop(0)
        documents += texts
    return documents


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# ---------------------------------------------------------------------------------------------
# Text


@pytest.mark.parametrize(
    "content, documents",
    [
        (SEPARATED, STORIES),
        (SEPARATED.rstrip("\n"), STORIES),
        (SEPARATED.replace("\n", "\r\n"), STORIES),
        ("<|endoftext|>\n" + SEPARATED, STORIES),
        (SEPARATED.replace("<|endoftext|>\n", "\n <|endoftext|>\t\n\n\n<|endoftext|>\n"), STORIES),
        ("one\n<|endoftext|>\n  two\n", ["one", "  two"]),
        # Without separators, a file is taken as it is.
        ("\n\none\n\n", ["\n\none\n\n"]),
        ("one <|endoftext|>\n<|endoftext|> two\n", ["one <|endoftext|>\n<|endoftext|> two\n"]),
        # Form feeds and U+2028 are no line breaks.
        ("one\f<|endoftext|>\u2028two", ["one\f<|endoftext|>\u2028two"]),
        ("", [""]),
        ("<|endoftext|>\n<|endoftext|>", []),
    ],
)
@pytest.mark.parametrize("block_bytes", [20, 33, 2**20])
def test_lines_of_end_of_text_separate_documents(
    content, documents, block_bytes, tmp_path, monkeypatch
):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)
    assert read("text", write(tmp_path / "a.txt", content)) == documents


def test_files_are_documents_in_the_order_of_their_names(tmp_path):
    write(tmp_path / "b.txt", "second")
    write(tmp_path / "a.txt", "first\n<|endoftext|>\nfirst, too")
    assert read("text", tmp_path / "*.txt") == ["first", "first, too", "second"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress])
def test_byte_order_marks_and_compression(encoding, compress, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 21)
    suffix = {bytes: "", gzip.compress: ".gz", bz2.compress: ".bz2"}[compress]
    path = write(tmp_path / f"a.txt{suffix}", compress(SEPARATED.encode(encoding)))
    assert read("text", path) == STORIES
    objects = "\n".join(json.dumps({"text": story}) for story in STORIES)
    path = write(tmp_path / f"a.jsonl{suffix}", compress(objects.encode(encoding)))
    assert read("json", path) == STORIES


def test_sizes_are_those_of_the_uncompressed_text(tmp_path):
    content = b'{"text": "to be or not to be"}\n' * 30_000
    write(tmp_path / "a.jsonl", content)
    write(tmp_path / "a.jsonl.gz", gzip.compress(content))
    parts = [
        gzip.compress(content[first : first + 31_000]) for first in range(0, len(content), 31_000)
    ]
    write(tmp_path / "parts.gz", b"".join(parts))
    write(tmp_path / "a.jsonl.bz2", bz2.compress(content))

    def text_bytes(name: str):
        return open_source("json", data_files=(str(tmp_path / name),)).text_bytes

    assert text_bytes("a.jsonl") == text_bytes("a.jsonl.gz") == len(content)
    assert text_bytes("parts.gz") == pytest.approx(len(content), rel=0.05)
    assert text_bytes("a.jsonl.bz2") is None


@pytest.mark.parametrize(
    "content",
    [
        "\n".join(TEXTS)[:20_000],
        "no space: " + "x" * 3000,
        "a  b   c\n\n\n  d \t \n'll we're  1234  !!  \u3000\u3000x\u2028 y\x1c z\x85 \xa0" * 60,
        "日本語。テキスト、" * 300 + "\n" + "naïve " * 300,
    ],
)
def test_a_long_document_has_the_tokens_of_the_whole(content, enc, tmp_path, monkeypatch):
    """A file above 2 GiB, at small scale: its document is read, and tokenized, in parts."""
    monkeypatch.setattr(fineweb, "worker_encoding", enc, raising=False)
    monkeypatch.setattr(blocks, "PART_CHARS", 1000)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100)
    path = write(tmp_path / "a.txt", content)
    batches = list(open_source("text", data_files=(str(path),)).batches(SOURCE_START))
    assert [batch.is_continuation for batch in batches] == [False] + [True] * (len(batches) - 1)
    assert all(len(piece) <= 1100 for batch in batches for piece in batch.texts.to_pylist())
    assert read("text", path) == [content]
    tokens = [fineweb.encode_batch(batch.texts, batch.is_continuation)[0] for batch in batches]
    expected = [enc.eot_token, *enc.encode_ordinary(content)]
    if "xxx" in content or "日本語" in content:
        # Cut within a word, where there is no space: the same text in slightly other tokens.
        assert enc.decode(np.concatenate(tokens).tolist()) == enc.decode(expected)
    else:
        assert np.concatenate(tokens).tolist() == expected


def test_a_text_that_is_not_utf8_names_the_line(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 16)
    latin = ("good line\n" * 99 + "naïve\n").encode("latin-1")
    for path in (
        write(tmp_path / "a.txt", latin),
        write(tmp_path / "a.txt.gz", gzip.compress(latin)),
        write(tmp_path / "a.jsonl", ("\n" * 99 + '{"text": "naïve"}').encode("latin-1")),
    ):
        kind = "json" if "json" in path.name else "text"
        with pytest.raises(UserError, match=f"{path.name}, line 100, is not UTF-8: convert"):
            read(kind, path)
    with pytest.raises(UserError, match="line 2, is not UTF-16"):
        read("text", write(tmp_path / "b.txt", "a\nb".encode("utf-16") + b"\0"))


@pytest.mark.parametrize("name", ["cut.txt.gz", "plain.txt.gz", "a.tar.gz"])
def test_damaged_archives_name_the_file(name, tmp_path):
    content = {"cut.txt.gz": gzip.compress(SEPARATED.encode())[:-20], "plain.txt.gz": b"plain"}
    path = write(tmp_path / name, content.get(name, b"x"))
    with pytest.raises(UserError, match=name):
        read("text", path)


# ---------------------------------------------------------------------------------------------
# JSON


OBJECTS = [
    {"id": n, "text": story, "more": ["]", {"text": ","}]} for n, story in enumerate(STORIES)
]


@pytest.mark.parametrize("block_bytes", [3, 50, 2**20])
@pytest.mark.parametrize(
    "content",
    [
        json.dumps(OBJECTS),
        "\n " + json.dumps(OBJECTS, indent=1, ensure_ascii=False) + "\n\n",
        "\n".join(map(json.dumps, OBJECTS)),
        "\r\n\r\n".join(map(json.dumps, OBJECTS)) + "\r\n",
        "[\n" + ",\n".join(map(json.dumps, OBJECTS)) + "\n]",
    ],
)
def test_json_is_lines_of_objects_or_one_array(content, block_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)
    assert read("json", write(tmp_path / "a.json", content)) == STORIES


def test_json_without_documents(tmp_path):
    for content in ("", "\n \n", "[]", "[\n]\n"):
        assert read("json", write(tmp_path / "a.json", content)) == []
    assert read("json", write(tmp_path / "a.json", '{"text": null}\n{"text": ""}')) == [None, ""]


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"text": "good"}\n{"text": \n', "a.json, line 2, can't be read as json"),
        ('{\n "text": "good"\n}', "a.json, line 1, can't be read as json"),
        ('{"text": "good"}\n\n{"body": "good", "id": 1}', r"line 3: no field 'text'.*\(body, id\)"),
        ('{"text": 7}', "line 1: the field 'text' is int, not a string"),
        ("7", "line 1: not a JSON object, but int"),
        ('[{"text": "good"},\n{"text": "bad"', "line 2, can't be read as json"),
        ('[{"text": "good"}\n{"text": "bad"}]' + " " * 100, "line 2, can't be read as json"),
        ('[{"text": "good"},\n{"text": "bad}]', "line 2, can't be read as json: Unterminated"),
        ('[{"text": "good"},\n]', "line 2, can't be read as json"),
        ('[{"text": "good"}]\n{"text": "bad"}', "text after the array"),
        ('[\n"good"\n]', "line 2: not a JSON object, but str"),
    ],
)
@pytest.mark.parametrize("block_bytes", [3, 2**20])
def test_malformed_json_names_the_line(content, message, block_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)
    with pytest.raises(UserError, match=message):
        read("json", write(tmp_path / "a.json", content))


def test_half_a_surrogate_pair_is_replaced_and_reported(tmp_path, capsys):
    lines = [r'{"text": "a \ud83d b"}', r'{"text": "\ud83d\ude00"}', '{"text": null}'] * 40
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    assert read("json", path) == ["a \ufffd b", "😀", None] * 40
    assert capsys.readouterr().out.count("a.jsonl: incomplete characters") == 1


# ---------------------------------------------------------------------------------------------
# Parquet


def write_parquet(path: Path, **columns) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_parquet_files_without_text_or_rows(tmp_path, capsys):
    write_parquet(tmp_path / "a.parquet", text=pa.nulls(2), n=[1, 2])
    write_parquet(tmp_path / "b.parquet", text=pa.array([], pa.string()))
    write_parquet(tmp_path / "c.parquet", text=["c", None], n=[1, 2])
    write_parquet(tmp_path / "d.parquet", n=[7], text=pa.array(["d"]).dictionary_encode())
    write_parquet(tmp_path / "e.parquet", text=pa.array(["e"], pa.large_string()))
    table = pa.table({"text": ["f"]})
    with pq.ParquetWriter(tmp_path / "f.parquet", table.schema) as writer:
        writer.write_table(table.slice(0, 0))
        writer.write_table(table)
    assert read("parquet", tmp_path / "*.parquet") == [None, None, "c", None, "d", "e", "f"]
    assert "b.parquet has no rows, skipping it" in capsys.readouterr().out
    assert read("parquet", tmp_path / "a.parquet") == [None, None]
    with pytest.raises(UserError, match="none of the parquet files has rows"):
        read("parquet", tmp_path / "b.parquet")


def test_a_wrong_parquet_column_is_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", text=["a"])
    path = write_parquet(tmp_path / "b.parquet", content=["b"], n=[1], text=[2])
    with pytest.raises(UserError, match="b.parquet: the column 'text' contains int64"):
        read("parquet", tmp_path / "*.parquet")
    with pytest.raises(UserError, match=r"b.parquet has no column 'body'.*\(content, n, text\)"):
        read("parquet", path, text_column="body")
    assert read("parquet", path, text_column="content") == ["b"]
    write(tmp_path / "c.parquet", path.read_bytes()[:-10])
    with pytest.raises(UserError, match="c.parquet is damaged or not a parquet file"):
        read("parquet", tmp_path / "c.parquet")


def test_the_text_column_of_other_sources(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"content": "good", "text": 7}')
    assert read("json", path, text_column="content") == ["good"]
    with pytest.raises(UserError, match="--text_column is only for"):
        read("text", path, text_column="content")


# ---------------------------------------------------------------------------------------------
# Resuming


@pytest.mark.parametrize("kind", ["text", "json"])
def test_a_resumed_run_writes_the_same_bytes(kind, enc, tmp_path, monkeypatch):
    """Interrupted after several shards; documents in parts, several files, empty documents."""
    monkeypatch.setattr(fineweb, "worker_encoding", enc, raising=False)
    monkeypatch.setattr(blocks, "PART_CHARS", 300)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 64)
    monkeypatch.setattr(text, "BATCH_DOCUMENTS", 3)
    words = "\n".join(TEXTS)[:6000]
    stories = [words[n * 50 : n * 60] for n in range(1, 30)]
    for name, documents in dict(a=[words], b=stories, c=[""], d=[words[:2500], *stories]).items():
        if kind == "text":
            content = "\n<|endoftext|>\n".join(documents)
        else:
            content = "\n".join(json.dumps({"text": document}) for document in documents)
        write(tmp_path / f"{name}.{kind}", content)

    def shard(folder: Path) -> ShardWriter:
        header = dict(tokenizer="gpt2", vocab_size=enc.n_vocab, dtype="uint16")
        writer = ShardWriter(folder, "x", 401, header)
        source = open_source(kind, data_files=(str(tmp_path / f"*.{kind}"),))
        for batch in source.batches(writer.next_position()):
            tokens, lengths = fineweb.encode_batch(batch.texts, batch.is_continuation)
            writer.add(batch.position, tokens, lengths, batch.is_continuation)
        writer.finish()
        return writer

    whole = tmp_path / "whole"
    whole.mkdir()
    manifest = shard(whole).manifest
    documents = read(kind, tmp_path / f"*.{kind}")
    assert manifest["documents"] == len(list(filter(None, documents)))
    tokens = [np.load(whole / entry["name"]) for entry in manifest["shards"]]
    assert enc.decode(np.concatenate(tokens).tolist()).split("<|endoftext|>")[1:] == list(
        filter(None, documents)
    )
    expected = {path.name: path.read_bytes() for path in whole.iterdir()}
    for num_shards in range(1, len(manifest["shards"]), 5):
        # As it was when this many shards were finished.
        unfinished = dict(manifest, complete=False, shards=manifest["shards"][:num_shards])
        (whole / "manifest.json").write_text(json.dumps(unfinished))
        for entry in manifest["shards"][num_shards:]:
            (whole / entry["name"]).unlink()
        shard(whole)
        assert {path.name: path.read_bytes() for path in whole.iterdir()} == expected


def test_positions_of_an_earlier_version_are_rejected(tmp_path):
    path = write(tmp_path / "a.txt", "text")
    with pytest.raises(UserError, match="earlier version.*choose another out_dir"):
        read("text", path, start=dict(SOURCE_START, state={"examples_iterable": {}}))
