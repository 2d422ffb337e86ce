"""Text to shards, run as a person would: which bytes, and that a killed run ends with the same ones."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, TEXTS, command, ok, one_line

import fineweb
from common.tokenizer import load_tokenizer, tokenizer_to_text, train_tokenizer

RNG = random.Random(0)
WORDS = [word for text in TEXTS for word in text.split()]
DOCUMENTS = [" ".join(RNG.choices(WORDS, k=RNG.randrange(1, 300))) for _ in range(150)]
DOCUMENTS[7] = "this <|endoftext|> is ordinary text, naïve → 日本\n\n  \t  end"
DOCUMENTS[40] = "a" * 5000


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The documents as parquet in two files, as jsonl, and a vocabulary."""
    folder = tmp_path_factory.mktemp("source")
    for n, part in enumerate((DOCUMENTS[:90], DOCUMENTS[90:])):
        table = pa.table({"id": [str(i) for i in range(len(part))], "text": part})
        pq.write_table(table, folder / f"{n}.parquet", row_group_size=20)
    with open(folder / "all.jsonl", "w") as file:
        file.writelines(json.dumps({"text": text, "id": 1}) + "\n" for text in ["", *DOCUMENTS, ""])
    enc, _ = train_tokenizer(DOCUMENTS, 500)
    (folder / "vocab.tiktoken").write_text(tokenizer_to_text(enc))
    return folder


def flags(source: Path, out: Path, *more, kind="parquet", files="*.parquet") -> list:
    words = [
        "--source",
        kind,
        "--data_files",
        source / files,
        "--tokenizer",
        source / "vocab.tiktoken",
    ]
    return ["fineweb.py", *words, "--out_dir", out, "--num_workers", 1, *more]


def expected_tokens(source: Path) -> np.ndarray:
    enc = load_tokenizer(source / "vocab.tiktoken")
    return np.array([t for text in DOCUMENTS for t in (enc.eot_token, *enc.encode_ordinary(text))])


def stream(out: Path) -> np.ndarray:
    return np.concatenate(
        [np.load(path) for path in sorted(out.glob("*.npy"), key=lambda p: p.name[-10:])]
    )


def contents(out: Path) -> dict:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.mark.parametrize(
    "shard_size, kind, files", [(1000, "parquet", "*.parquet"), (7777, "json", "all.jsonl")]
)
def test_shards_are_the_documents_in_order(source, tmp_path, shard_size, kind, files):
    result = ok(
        command(*flags(source, tmp_path, "--shard_size", shard_size, kind=kind, files=files))
    )
    expected = expected_tokens(source)
    assert np.array_equal(stream(tmp_path), expected)
    paths = sorted(tmp_path.glob("*.npy"), key=lambda p: p.name[-10:])
    assert [path.name for path in paths[:2]] == [
        f"{kind}_val_000000.npy",
        f"{kind}_train_000001.npy",
    ]
    lengths = [len(np.load(path)) for path in paths]
    assert set(lengths[:-1]) == {shard_size}
    assert 0 < lengths[-1] <= shard_size
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["complete"]
    assert manifest["documents"] == len(DOCUMENTS)
    assert manifest["empty_documents"] == (2 if kind == "json" else 0)
    assert [shard["tokens"] for shard in manifest["shards"]] == lengths
    assert np.load(paths[0]).dtype == np.uint16
    assert f"{len(expected):,} tokens of 150 documents" in result.stdout


def test_any_number_of_workers_writes_the_same_bytes(source, tmp_path):
    for workers in (1, 3):
        ok(
            command(
                *flags(
                    source, tmp_path / str(workers), "--shard_size", 3000, "--num_workers", workers
                )
            )
        )
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_a_text_that_does_not_fill_two_shards_is_split(source, tmp_path):
    expected = expected_tokens(source)
    for shard_size in (10**6, len(expected) // 2 + 50):
        out = tmp_path / str(shard_size)
        ok(command(*flags(source, out, "--shard_size", shard_size)))
        assert np.array_equal(
            np.load(out / "parquet_val_000000.npy"), expected[: len(expected) // 10]
        )
        assert np.array_equal(stream(out), expected)


def test_killed_again_and_again_it_ends_with_the_same_bytes(source, tmp_path):
    ok(command(*flags(source, tmp_path / "whole", "--shard_size", 500)))
    words = [sys.executable, *map(str, flags(source, tmp_path / "killed", "--shard_size", 500))]
    went_on = []
    for kill in range(4):
        process = subprocess.Popen(
            words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        have = len(list((tmp_path / "killed").glob("*.npy")))
        deadline = time.monotonic() + 60
        while (
            len(list((tmp_path / "killed").glob("*.npy"))) < have + 5 + kill
            and process.poll() is None
        ):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
        out, _ = process.communicate()
        went_on += [
            int(line.split()[4].replace(",", ""))
            for line in out.splitlines()
            if "going on at" in line
        ]
        for path in (tmp_path / "killed").glob("*.npy"):
            assert len(np.load(path)) == 500, "never half a shard under its final name"
    ok(command(*words[1:]))
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")
    assert went_on == sorted(went_on)
    assert went_on[-1] > 0
    time.sleep(2)
    left = subprocess.run(
        ["pgrep", "-f", str(tmp_path / "killed")], capture_output=True, text=True
    ).stdout
    assert left == "", "no worker outlives a killed run"


def test_going_on_tokenizes_no_earlier_document_again(source, tmp_path, monkeypatch):
    """From the middle of a document: its tokens, then the later documents', and nothing else."""
    from common.tokenizer import load_tokenizer

    enc = load_tokenizer(source / "vocab.tiktoken")
    monkeypatch.setattr(fineweb, "encoding", enc, raising=False)
    config = fineweb.Config(
        source="parquet", data_files=(str(source / "*.parquet"),), out_dir=str(tmp_path)
    )
    whole = fineweb.Source(config)
    header = fineweb.manifest_header(config, whole, enc, tmp_path)
    writer = fineweb.ShardWriter(tmp_path, "x", 3000, header)
    batches = list(whole.batches(fineweb.SOURCE_START))
    for position, texts in batches[:2]:
        writer.add(position, *fineweb.encode_batch(texts))
    start = fineweb.ShardWriter(tmp_path, "x", 3000, header).next_position()
    assert start["token"] > 0
    read = [text for _, texts in whole.batches(start) for text in texts.to_pylist()]
    assert read == DOCUMENTS[start["document"] :]


def test_run_again_it_verifies_and_mends(source, tmp_path):
    words = flags(source, tmp_path, "--shard_size", 3000)
    ok(command(*words))
    before, times = (
        contents(tmp_path),
        {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()},
    )
    ok(command(*words))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times
    tokens = np.load(tmp_path / "parquet_train_000002.npy")
    tokens[5] += 1
    np.save(tmp_path / "parquet_train_000002.npy", tokens)
    assert "parquet_train_000002.npy is missing or damaged" in ok(command(*words)).stdout
    assert contents(tmp_path) == before
    assert "shard_size=3000, not 4000" in one_line(command(*words, "--shard_size", 4000))
    assert contents(tmp_path) == before


def test_a_dropped_connection_is_tried_again_where_it_was(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    config = fineweb.Config(
        source="parquet", data_files=(str(source / "*.parquet"),), out_dir=str(tmp_path)
    )
    whole = fineweb.Source(config)
    whole.remote = True
    original, drops = whole._read, []

    def drops_out(position):
        for n, batch in enumerate(original(position)):
            yield batch
            if n == 0 and len(drops) < 2:
                drops.append(position["document"])
                raise ConnectionResetError("reset by peer")

    monkeypatch.setattr(whole, "_read", drops_out)
    assert [
        text for _, texts in whole.batches(fineweb.SOURCE_START) for text in texts.to_pylist()
    ] == DOCUMENTS
    assert drops == [0, 64]
    assert capsys.readouterr().out.count("trying again") == 2


def test_pydoc_reads_and_never_imports():
    before = set(sys.modules)
    texts = fineweb.pydoc_texts()
    assert sum(map(len, texts)) > 1_000_000
    assert not {"antigravity", "this", "turtle", "tkinter", "idlelib"} & (set(sys.modules) - before)


def wrong(name: str, source: Path, tmp_path: Path) -> tuple[list, str]:
    folder, out = tmp_path / "wrong", tmp_path / "out"
    folder.mkdir()
    json_flags = flags(
        folder, out, "--tokenizer", source / "vocab.tiktoken", kind="json", files="*.jsonl"
    )
    text_flags = flags(
        folder, out, "--tokenizer", source / "vocab.tiktoken", kind="text", files="*.txt"
    )
    if name == "no files":
        return text_flags, "no file matches"
    if name == "no data_files":
        return ["fineweb.py", "--source", "text", "--out_dir", out], "--data_files"
    if name == "no documents":
        (folder / "a.jsonl").write_text("")
        return json_flags, "holds no text"
    if name == "empty documents":
        (folder / "a.txt").write_text("")
        return text_flags, "holds no text"
    if name == "not UTF-8":
        (folder / "good.txt").write_text("good")
        (folder / "latin.txt").write_bytes("naïve".encode("latin-1"))
        return text_flags, "latin.txt (not UTF-8) can't be read"
    if name == "malformed json":
        (folder / "a.jsonl").write_text('{"text": "good"}\n{"text": \n')
        return json_flags, "a.jsonl, line 2, can't be read as json"
    if name == "no text field":
        (folder / "a.jsonl").write_text('{"body": "good"}\n')
        return json_flags, "no field 'text'"
    if name == "damaged parquet":
        (folder / "a.parquet").write_bytes((source / "0.parquet").read_bytes()[:3000])
        return flags(folder, out, "--tokenizer", source / "vocab.tiktoken"), "a.parquet is damaged"
    if name == "no vocabulary":
        return flags(source, out, "--tokenizer", "none.tiktoken"), "no tokenizer 'none.tiktoken'"
    if name == "small vocabulary":
        return flags(source, out, "--tokenizer", "gpt2", "--train_tokenizer", 10), "too small"
    if name == "two vocabularies":
        return flags(source, out, "--train_tokenizer", 300), "exclude each other"
    if name == "out_dir is a file":
        out.write_text("")
        return flags(source, out), "out"
    if name == "foreign shards":
        out.mkdir()
        np.save(out / "x_train_0.npy", np.zeros(10, dtype=np.uint16))
        return flags(source, out), "not from here"


@pytest.mark.parametrize(
    "name",
    [
        "no files", "no data_files", "no documents", "empty documents", "not UTF-8", "malformed json", "no text field",
        "damaged parquet", "no vocabulary", "small vocabulary", "two vocabularies", "out_dir is a file",
        "foreign shards",
    ],
)  # fmt: skip
def test_wrong_inputs_end_in_one_line(name, source, tmp_path):
    words, expected = wrong(name, source, tmp_path)
    assert expected in one_line(command(*words))


def test_no_network_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = one_line(
        command("fineweb.py", "--out_dir", tmp_path, "--tokenizer", tokenizer_file(tmp_path))
    )
    assert "fineweb-edu can't be" in line


def tokenizer_file(folder: Path) -> Path:
    path = folder / "v.tiktoken"
    path.write_text(tokenizer_to_text(train_tokenizer([], 257)[0]))
    return path


def test_gpt2_vocabulary_without_network_names_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nothing answers there
    assert "TIKTOKEN_CACHE_DIR" in one_line(
        command("fineweb.py", "--source", "pydoc", "--out_dir", tmp_path / "out")
    )


def test_not_enough_disk_is_refused_before_anything_is_written(source, tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(fineweb.shutil, "disk_usage", lambda _: usage(10, 10, 10))
    tokenizer = str(source / "vocab.tiktoken")
    files = (str(source / "*.parquet"),)
    config = fineweb.Config(
        source="parquet", data_files=files, tokenizer=tokenizer, out_dir=str(tmp_path / "out")
    )
    with pytest.raises(OSError, match="make room"):
        fineweb.main(config)
    assert not list((tmp_path / "out").glob("*.npy"))


def test_a_full_disk_keeps_the_old_file(tmp_path):
    from common.console import write_atomically

    (tmp_path / "file").write_text("old")
    with pytest.raises(OSError, match="make room"):
        with write_atomically(tmp_path / "file") as file:
            file.write(b"new")
            raise OSError(28, "No space left on device")
    assert contents(tmp_path) == {"file": b"old"}


@pytest.mark.slow
def test_a_document_of_50_megabytes(tmp_path):
    (tmp_path / "big.txt").write_text(("word " * 10 + "\n") * (50 * 2**20 // 51))
    (tmp_path / "dense.txt").write_text("x" * 2**20)
    enc = load_tokenizer(tokenizer_file(tmp_path))
    result = command(
        *flags(
            tmp_path,
            tmp_path / "out",
            "--tokenizer",
            tmp_path / "v.tiktoken",
            kind="text",
            files="*.txt",
        )
    )
    ok(result)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.txt"))
    assert len(stream(tmp_path / "out")) == size + 2, f"{enc.name}: a token a byte, and two ends"
