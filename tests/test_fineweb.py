"""fineweb.py, run as a user would: the bytes it writes, also after it was killed and run again."""

import json
import os
import random
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, TEXTS, command, ok, one_line

import fineweb
from common import shards as shards_module
from common.console import UserError
from common.shards import SOURCE_START, ShardWriter, open_shards
from common.text import open_source, pydoc_texts
from common.tokenizer import load_tokenizer, tokenizer_to_text, train_tokenizer

RNG = random.Random(0)
WORDS = [word for text in TEXTS for word in text.split()]
DOCUMENTS = [" ".join(RNG.choices(WORDS, k=RNG.randrange(1, 300))) for _ in range(150)]
DOCUMENTS[7] = "this <|endoftext|> is ordinary text, naïve → 日本\n\n  \t  end"
DOCUMENTS[40] = "a" * 5000


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The documents as two parquet files and as jsonl, and a vocabulary."""
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


def test_the_number_of_workers_does_not_change_the_bytes(source, tmp_path):
    for workers in (1, 3):
        out = tmp_path / str(workers)
        ok(command(*flags(source, out, "--shard_size", 3000, "--num_workers", workers)))
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_a_corpus_that_does_not_fill_two_shards_is_split(source, tmp_path):
    expected = expected_tokens(source)
    for shard_size in (10**6, len(expected) // 2 + 50):
        out = tmp_path / str(shard_size)
        ok(command(*flags(source, out, "--shard_size", shard_size)))
        val = np.load(out / "parquet_val_000000.npy")
        assert np.array_equal(val, expected[: len(expected) // 10])
        assert np.array_equal(stream(out), expected)


@pytest.mark.slow
def test_killed_repeatedly_it_ends_with_the_same_bytes(source, tmp_path):
    ok(command(*flags(source, tmp_path / "whole", "--shard_size", 500)))
    killed = tmp_path / "killed"
    argv = [sys.executable, *map(str, flags(source, killed, "--shard_size", 500))]
    resumed_at = []  # number of the first document, of each run that resumed
    for kill in range(4):
        process = subprocess.Popen(
            argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        wanted = len(list(killed.glob("*.npy"))) + 5 + kill
        deadline = time.monotonic() + 60
        while len(list(killed.glob("*.npy"))) < wanted and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
        out, _ = process.communicate()
        for line in out.splitlines():
            if "resuming at document" in line:
                resumed_at.append(int(line.split()[3].replace(",", "")))
        for path in killed.glob("*.npy"):
            assert len(np.load(path)) == 500, "no partial shard under its final name"
    ok(command(*argv[1:]))
    assert contents(tmp_path / "whole") == contents(killed)
    assert resumed_at == sorted(resumed_at)
    assert resumed_at[-1] > 0
    time.sleep(2)
    left = subprocess.run(["pgrep", "-f", str(killed)], capture_output=True, text=True).stdout
    assert left == "", "no worker outlives a killed run"


def test_resuming_tokenizes_no_earlier_document_again(source, tmp_path, monkeypatch):
    """From the middle of a document: the rest of its tokens, then the later documents'."""
    enc = load_tokenizer(source / "vocab.tiktoken")
    monkeypatch.setattr(fineweb, "worker_encoding", enc, raising=False)
    config = fineweb.Config(
        source="parquet", data_files=(str(source / "*.parquet"),), out_dir=str(tmp_path)
    )
    parquet = open_source("parquet", data_files=config.data_files)
    header = fineweb.manifest_header(config, parquet, enc, tmp_path)
    writer = ShardWriter(tmp_path, "x", 3000, header)
    batches = list(parquet.batches(SOURCE_START))
    for batch in batches[:2]:
        writer.add(batch.position, *fineweb.encode_batch(batch.texts))
    start = ShardWriter(tmp_path, "x", 3000, header).next_position()
    assert start["token"] > 0
    read = [text for batch in parquet.batches(start) for text in batch.texts.to_pylist()]
    assert read == DOCUMENTS[start["document"] :]


def test_run_again_it_verifies_and_repairs(source, tmp_path):
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


def test_after_a_lost_connection_it_resumes(source, monkeypatch, capsys):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    parquet = open_source("parquet", data_files=(str(source / "*.parquet"),))
    parquet.is_remote = True
    original = parquet._read
    lost_at = []

    def read_with_losses(position):
        for n, batch in enumerate(original(position)):
            yield batch
            if n == 0 and len(lost_at) < 2:
                lost_at.append(position["document"])
                raise ConnectionResetError("reset by peer")

    monkeypatch.setattr(parquet, "_read", read_with_losses)
    read = [text for batch in parquet.batches(SOURCE_START) for text in batch.texts.to_pylist()]
    assert read == DOCUMENTS
    assert lost_at == [0, 64]
    assert capsys.readouterr().out.count("retrying") == 2


# Not parquet: Python's own server does not send parts of a file.
@pytest.mark.parametrize("kind, name", [("json", "all.jsonl"), ("text", "vocab.tiktoken")])
def test_a_url_reads_as_the_same_file_on_disk(source, kind, name):
    def texts(place: str) -> list[str]:
        batches = open_source(kind, data_files=(place,)).batches(SOURCE_START)
        return [text for batch in batches for text in batch.texts.to_pylist()]

    handler = partial(SimpleHTTPRequestHandler, directory=source)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        from_url = texts(f"http://127.0.0.1:{server.server_port}/{name}")
        server.shutdown()
    assert from_url and from_url == texts(str(source / name))


@pytest.mark.slow
def test_pydoc_parses_modules_without_importing_them():
    before = set(sys.modules)
    texts = pydoc_texts()
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
    if name == "a folder":
        return flags(tmp_path, out, files="wrong"), "wrong is a folder: name its files"
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
        return text_flags, "latin.txt, line 1, is not UTF-8"
    if name == "null column":
        pq.write_table(pa.table({"text": pa.nulls(9)}), folder / "a.parquet")
        words = flags(folder, out, "--tokenizer", source / "vocab.tiktoken")
        return words, "holds no text: no documents, or only empty ones"
    if name == "damaged parquet":
        (folder / "a.parquet").write_bytes((source / "0.parquet").read_bytes()[:3000])
        return flags(folder, out, "--tokenizer", source / "vocab.tiktoken"), "a.parquet is damaged"
    if name == "no vocabulary":
        return flags(source, out, "--tokenizer", "none.tiktoken"), "no tokenizer 'none.tiktoken'"
    if name == "out_dir is a file":
        out.write_text("")
        return flags(source, out), "out"
    if name == "foreign shards":
        out.mkdir()
        np.save(out / "x_train_0.npy", np.zeros(10, dtype=np.uint16))
        return flags(source, out), "was not written by fineweb.py"


WRONG_INPUTS = [
    "no files", "a folder", "no data_files", "no documents", "empty documents", "not UTF-8",
    "null column", "damaged parquet", "no vocabulary", "out_dir is a file", "foreign shards",
]  # fmt: skip


@pytest.mark.parametrize("name", WRONG_INPUTS)
def test_wrong_inputs_end_in_one_line(name, source, tmp_path):
    words, expected = wrong(name, source, tmp_path)
    assert expected in one_line(command(*words))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(shard_size=1), "shard_size is 1, must be from 2 to 1073741824"),
        (dict(shard_size=2**30 + 1), "shard_size is 1073741825, must be from 2"),
        (dict(num_workers=-1), "num_workers is -1, must be 0"),
        (dict(train_tokenizer=10), "train_tokenizer is 10, must be 0 .* or at least 257"),
        (dict(train_tokenizer=-1), "train_tokenizer is -1, must be 0"),
        (dict(train_tokenizer_chars=0), "train_tokenizer_chars is 0, must be at least 1"),
        (dict(train_tokenizer=300, tokenizer="v.tiktoken"), "exclude each other"),
        (dict(max_tokens="many"), "max_tokens is 'many', must be a number of tokens like 1e9"),
        (dict(max_tokens="nan"), "must be a number of tokens"),
        (dict(max_tokens="inf"), "must be a number of tokens"),
        (dict(max_tokens="1e999999999"), "must be a number of tokens"),
        (dict(max_tokens="-1B"), "must be a number of tokens"),
        (dict(max_tokens="0"), "must be a number of tokens"),
        (dict(max_tokens="1.5"), "must be a number of tokens"),
        (dict(max_tokens="B"), "must be a number of tokens"),
        (dict(max_tokens=""), "must be a number of tokens"),
        (dict(max_tokens="50M"), "max_tokens is 50M, must be above shard_size 100,000,000"),
        (dict(max_tokens="1e8"), "max_tokens is 1e8, must be above shard_size 100,000,000"),
        (dict(repo="a/b"), "--repo is only for --source tokenized"),
        (dict(source="tokenized", tokenizer="v.tiktoken"), "--tokenizer has no use with"),
        (dict(source="tokenized", shard_size=50), "--shard_size has no use with"),
    ],
)
def test_values_out_of_range_name_the_flag(settings, message):
    with pytest.raises(UserError, match=message):
        fineweb.Config(**settings)


@pytest.mark.parametrize(
    "text, number",
    [
        ("1e9", 10**9),
        ("1B", 10**9),
        ("800M", 800 * 10**6),
        ("1.1b", 1_100_000_000),
        ("200_000K", 200_000_000),
        ("123456789", 123456789),
        ("all", None),
    ],
)
def test_max_tokens_is_exact(text, number):
    assert fineweb.Config(max_tokens=text).token_limit == number


@pytest.mark.slow
def test_max_tokens_makes_a_complete_folder_and_can_be_raised(source, tmp_path):
    """The folder of one run with the higher limit has the same bytes, its manifest included."""
    expected = expected_tokens(source)
    limited = tmp_path / "limited"
    words = flags(source, limited, "--shard_size", 1000)
    ok(command(*words, "--max_tokens", "3K"))
    assert np.array_equal(stream(limited), expected[:3000])
    manifest = json.loads((limited / "manifest.json").read_text())
    assert manifest["complete"]
    ends = np.flatnonzero(expected == manifest["end_of_text"])
    assert manifest["documents"] == np.count_nonzero(ends[1:] <= 3000)  # complete documents
    assert open_shards(limited, "val").lengths == [1000]
    assert open_shards(limited, "train").lengths == [1000, 1000]

    # The same limit, and a lower one, change nothing.
    before = contents(limited)
    config = fineweb.Config(
        source="parquet",
        data_files=(str(source / "*.parquet"),),
        tokenizer=str(source / "vocab.tiktoken"),
        out_dir=str(limited),
        shard_size=1000,
        max_tokens="3K",
    )
    fineweb.main(config)
    fineweb.main(replace(config, max_tokens="2K"))
    assert contents(limited) == before

    # A higher limit adds shards.
    assert "resuming" in ok(command(*words, "--max_tokens", "5e3")).stdout
    raised = contents(limited)
    ok(command(*flags(source, tmp_path / "whole", "--shard_size", 1000, "--max_tokens", 5000)))
    assert contents(tmp_path / "whole") == raised
    for name in before:
        assert name == "manifest.json" or raised[name] == before[name]

    # Killed between the fourth shard and its entry, and finished with fewer tokens.
    unfinished = dict(manifest, complete=False, shards=manifest["shards"][:2], tokens=2000)
    (limited / "manifest.json").write_text(json.dumps(unfinished))
    with pytest.raises(UserError, match="unfinished"):
        open_shards(limited, "train")
    fineweb.main(replace(config, max_tokens="1500"))
    assert open_shards(limited, "train").lengths == [1000]


def test_the_disk_that_uint32_needs(monkeypatch, tmp_path, capsys):
    header = dict(tokenizer="x", vocab_size=70000, dtype="uint32")
    writer = ShardWriter(tmp_path, "x", 100, header)
    fineweb.check_disk_for(None, writer)
    assert "disk needed: 4 bytes per token" in capsys.readouterr().out
    fineweb.check_disk_for(10**9, writer)
    assert "disk needed: about 4 GB" in capsys.readouterr().out


def test_workers_are_as_many_as_the_cores_that_may_be_used(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert fineweb.Config().num_workers == 1


@pytest.mark.slow
def test_stories_of_another_column_and_then_too_little_text(tmp_path):
    """After a rejection, the same folder can be used with more text."""
    tokenizer = tokenizer_file(tmp_path)  # a token per byte
    path = tmp_path / "a.jsonl"
    more = ["--tokenizer", tokenizer, "--text_column", "story"]
    words = flags(tmp_path, tmp_path / "out", *more, kind="json", files="a.jsonl")
    path.write_text(json.dumps([{"story": "a" * 12}]))
    assert "only 13 tokens" in one_line(command(*words))
    path.write_text(json.dumps([{"story": "a" * 12, "text": 1}, {"story": "b" * 30}]))
    ok(command(*words))
    assert len(np.load(tmp_path / "out" / "json_val_000000.npy")) == 4
    text = load_tokenizer(tokenizer).decode(stream(tmp_path / "out").tolist())
    assert text == "<|endoftext|>" + "a" * 12 + "<|endoftext|>" + "b" * 30
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["text_column"], manifest["documents"]) == ("story", 2)
    words[words.index("story")] = "text"
    assert "text_column='story', not None" in one_line(command(*words))


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
    monkeypatch.setattr(shards_module.shutil, "disk_usage", lambda _: usage(10, 10, 10))
    tokenizer = str(source / "vocab.tiktoken")
    files = (str(source / "*.parquet"),)
    config = fineweb.Config(
        source="parquet", data_files=files, tokenizer=tokenizer, out_dir=str(tmp_path / "out")
    )
    with pytest.raises(OSError, match="make room"):
        fineweb.main(config)
    assert not list((tmp_path / "out").glob("*.npy"))


@pytest.mark.slow
def test_a_document_of_50_megabytes(tmp_path):
    (tmp_path / "big.txt").write_text(("word " * 10 + "\n") * (50 * 2**20 // 51))
    (tmp_path / "dense.txt").write_text("x" * 2**20)
    enc = load_tokenizer(tokenizer_file(tmp_path))
    more = ["--tokenizer", tmp_path / "v.tiktoken"]
    ok(command(*flags(tmp_path, tmp_path / "out", *more, kind="text", files="*.txt")))
    size = sum(path.stat().st_size for path in tmp_path.glob("*.txt"))
    assert len(stream(tmp_path / "out")) == size + 2, f"{enc.name}: a token per byte and document"
