"""Shards and their manifest: reading, writing, and the positions from which a run resumes."""

import json
from pathlib import Path

import numpy as np
import pytest

from common.console import UserError, write_atomically
from common.shards import (
    SOURCE_START,
    Position,
    ShardWriter,
    map_shard,
    open_shards,
    shards_fingerprint,
    split_of,
)

HEADER = dict(tokenizer="gpt2", vocab_size=50257, dtype="uint16")


def write(folder, num_tokens: int, shard_size: int = 100) -> ShardWriter:
    writer = ShardWriter(folder, "x", shard_size, HEADER)
    writer.add(SOURCE_START, np.arange(num_tokens, dtype=np.uint16), [num_tokens])
    writer.finish()
    return writer


def test_what_is_written_is_read(tmp_path):
    write(tmp_path, 250)
    val = open_shards(tmp_path, "val")
    train = open_shards(tmp_path, "train")
    assert val.lengths == [100]
    assert train.lengths == [100, 50]
    assert val.read(0, 10, 20).tolist() == list(range(10, 20))
    assert train.read(1, 0, 50).tolist() == list(range(200, 250))
    assert train.read(0, 98, 100).tolist() == [198, 199]


def test_the_next_position_is_in_the_middle_of_a_document(tmp_path):
    """The drawing in Position: documents of 10, 9 and 8 tokens, a shard of 15, and state S."""
    writer = ShardWriter(tmp_path, "x", 15, HEADER)
    batch = Position(document=100, token=0, state={"S": 1}, skip=0)
    writer.add(batch, np.arange(27, dtype=np.uint16), [10, 9, 8])
    assert writer.num_tokens == 27

    resumed = ShardWriter(tmp_path, "x", 15, HEADER)
    position = resumed.next_position()
    assert position == dict(document=101, token=5, state={"S": 1}, skip=1)
    assert resumed.manifest["documents"] == 1
    # From there the stream gives documents 101 and 102, and the writer skips 5 tokens.
    resumed.add(position, np.arange(10, 27, dtype=np.uint16), [9, 8])
    assert resumed.manifest["documents"] == 3
    assert resumed.buffer[: resumed.num_buffered].tolist() == list(range(15, 27))


def test_a_shard_that_ends_with_a_document_leaves_none_of_its_tokens(tmp_path):
    """Empty documents after it are done with it."""
    writer = ShardWriter(tmp_path, "x", 10, HEADER)
    writer.add(SOURCE_START, np.arange(12, dtype=np.uint16), [4, 6, 0, 0, 2])
    position = writer.next_position()
    assert position == dict(document=4, token=0, state=None, skip=4)
    after = writer.manifest["shards"][0]["next"]
    assert (after["documents"], after["empty_documents"]) == (2, 2)


def test_a_shard_that_ends_in_the_skipped_part_of_a_batch_counts_all_documents(tmp_path):
    """Two shards that end in one batch: both positions count from the batch's state."""
    writer = ShardWriter(tmp_path, "x", 5, HEADER)
    batch = Position(document=50, token=0, state={"S": 1}, skip=3)
    writer.add(batch, np.arange(12, dtype=np.uint16), [4, 8])
    positions = [shard["next"]["position"] for shard in writer.manifest["shards"]]
    assert positions == [
        dict(document=51, token=1, state={"S": 1}, skip=4),
        dict(document=51, token=6, state={"S": 1}, skip=4),
    ]


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((2, 5), np.uint16), "2-dimensional"),
        (np.zeros(5, np.float32), "1-dimensional float32"),
        (np.zeros(5, np.int64), "1-dimensional int64"),
    ],
)
def test_an_array_that_is_not_a_shard_is_rejected(array, message, tmp_path):
    np.save(tmp_path / "x_train_000001.npy", array)
    with pytest.raises(UserError, match=message):
        map_shard(tmp_path / "x_train_000001.npy")


def test_a_truncated_shard_is_rejected(tmp_path):
    writer = write(tmp_path, 250)
    path = tmp_path / writer.manifest["shards"][1]["name"]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="truncated"):
        open_shards(tmp_path, "train")


def test_shards_that_contradict_the_manifest_are_rejected(tmp_path):
    write(tmp_path, 250)
    np.save(tmp_path / "x_train_000002.npy", np.zeros(49, np.uint16))
    with pytest.raises(UserError, match="49 tokens, its manifest says 50"):
        open_shards(tmp_path, "train")
    np.save(tmp_path / "x_train_000002.npy", np.zeros(50, np.uint32))
    with pytest.raises(UserError, match="dtype uint32, its manifest says uint16"):
        open_shards(tmp_path, "train")
    (tmp_path / "x_val_000000.npy").unlink()
    with pytest.raises(FileNotFoundError, match="x_val_000000.npy is missing"):
        open_shards(tmp_path, "train")


def test_shards_without_a_manifest_are_taken_to_be_gpt2s(tmp_path):
    np.save(tmp_path / "their_train_1.npy", np.arange(10, dtype=np.uint32))
    assert open_shards(tmp_path, "train").vocab_size == 50257
    with pytest.raises(FileNotFoundError, match="only other shards"):
        open_shards(tmp_path, "val")


@pytest.mark.parametrize(
    "name, split",
    [
        ("edufineweb_val_000000", "val"),
        ("pretrain_val_000", "val"),
        ("retrieval_train_000", "train"),
        ("train001", "train"),
        ("My-Validation.1", "val"),
        ("fineweb-training-00001-of-00013", "train"),
        ("pretrain_000", None),
        ("interval", None),
    ],
)
def test_only_complete_words_in_a_name_are_a_split(name, split):
    assert split_of(Path(f"{name}.npy")) == split


def test_a_name_with_both_splits_is_rejected(tmp_path):
    np.save(tmp_path / "train_val_1.npy", np.arange(10, dtype=np.uint16))
    with pytest.raises(UserError, match="train_val_1.npy has the words of both.*rename it"):
        open_shards(tmp_path, "val")


def test_the_first_tokens_of_a_split_come_from_several_shards(tmp_path):
    np.save(tmp_path / "pretrain_val_0.npy", np.arange(5, dtype=np.uint16))
    np.save(tmp_path / "pretrain_val_1.npy", np.arange(5, 8, dtype=np.uint16))
    np.save(tmp_path / "retrieval_train_0.npy", np.arange(50, dtype=np.uint16))
    val = open_shards(tmp_path, "val")
    for num_tokens in (1, 4, 5, 6, 8):
        assert val.read_first(num_tokens).tolist() == list(range(num_tokens))
    assert val.read_first(100).tolist() == list(range(8))
    assert open_shards(tmp_path, "train").paths == [tmp_path / "retrieval_train_0.npy"]


def test_a_split_of_one_token_is_rejected_by_name(tmp_path):
    np.save(tmp_path / "x_val_0.npy", np.arange(1, dtype=np.uint16))
    with pytest.raises(UserError, match="x_val_0.npy has too few tokens .1."):
        open_shards(tmp_path, "val").read_first(100)


def write_limited(folder, num_tokens: int, max_tokens: int | None) -> list[int]:
    """Write documents of 30 tokens from where the folder ends. Returns the lengths of the shards.

    It is what fineweb.py does with a source of num_tokens tokens.
    """
    writer = ShardWriter(folder, "x", 100, HEADER, max_tokens)
    if not writer.manifest["complete"]:
        position = writer.next_position()
        for document in range(position["document"], num_tokens // 30):
            tokens = np.arange(document * 30, document * 30 + 30, dtype=np.uint16)
            skip = position["token"] if document == position["document"] else 0
            place = Position(document=document, token=skip, state={"S": document}, skip=0)
            if not writer.is_full:
                writer.add(place, tokens, [30])
        writer.finish()
    return [
        shard["tokens"] for shard in json.loads((folder / "manifest.json").read_text())["shards"]
    ]


def all_tokens(folder) -> list[int]:
    shards = [open_shards(folder, split) for split in ("val", "train")]
    return np.concatenate([split.read_first(10**6) for split in shards]).tolist()


@pytest.mark.parametrize(
    "limits, lengths",
    [
        ((300, None), [100, 100, 100, 100, 50]),
        # A last shard that is not full stays as it is.
        ((230, 360, None), [100, 100, 30, 100, 30, 90]),
        # At 450, the source ends with the limit.
        ((120, 450, 1000), [100, 20, 100, 100, 100, 30]),
        ((400, 300, 450), [100, 100, 100, 100, 50]),
    ],
)
def test_raising_the_limit_adds_shards_and_changes_none(limits, lengths, tmp_path):
    before = {}
    expected = 0
    for limit in limits:
        expected = max(expected, min(450, limit or 450))
        found = write_limited(tmp_path, 450, limit)
        assert all_tokens(tmp_path) == list(range(expected))
        after = {path.name: path.read_bytes() for path in tmp_path.glob("*.npy")}
        assert before.items() <= after.items()
        before = after
    assert found == lengths


def test_a_source_shorter_than_the_limit_is_split_as_without_one(tmp_path):
    assert write_limited(tmp_path, 150, 1000) == [15, 100, 35]
    assert write_limited(tmp_path, 150, None) == [15, 100, 35]


def test_a_source_that_ends_with_a_full_shard_is_not_read_again(tmp_path):
    assert write_limited(tmp_path, 300, None) == [100, 100, 100]
    assert ShardWriter(tmp_path, "x", 100, HEADER).manifest["complete"]


def test_a_damaged_shard_of_a_raised_folder_leaves_no_old_files(tmp_path):
    """What follows is cut as in one run, into fewer shards."""
    write_limited(tmp_path, 450, 130)
    assert write_limited(tmp_path, 450, 330) == [100, 30, 100, 100]
    np.save(tmp_path / "x_train_000001.npy", np.zeros(30, np.uint16))
    assert write_limited(tmp_path, 450, 250) == [100, 100, 50]
    assert all_tokens(tmp_path) == list(range(250))
    assert len(list(tmp_path.glob("*.npy"))) == 3


# ---------------------------------------------------------------------------------------------
# Other projects' files


def write_bin(path, tokens, magic=20240520, version=1, count=None):
    """As llm.c's dev/data/data_common.py writes it."""
    header = np.zeros(256, dtype=np.int32)
    header[0] = magic
    header[1] = version
    header[2] = len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype=np.uint16).tobytes())


def test_shards_of_llm_c_are_read(tmp_path):
    write_bin(tmp_path / "fineweb_val_000000.bin", range(50))
    write_bin(tmp_path / "fineweb_train_000001.bin", range(50, 150))
    write_bin(tmp_path / "fineweb_train_000002.bin", range(150, 220))
    train = open_shards(tmp_path, "train")
    assert open_shards(tmp_path, "val").lengths == [50]
    assert train.lengths == [100, 70]
    assert train.read(1, 5, 70).tolist() == list(range(155, 220))
    assert train.read(0, 98, 100).dtype == np.uint16
    assert isinstance(map_shard(train.paths[0]), np.memmap)


def test_nanogpts_files_are_read(tmp_path):
    np.arange(50, dtype=np.uint16).tofile(tmp_path / "val.bin")
    np.arange(300, dtype=np.uint16).tofile(tmp_path / "train.bin")
    train = open_shards(tmp_path, "train")
    assert (open_shards(tmp_path, "val").lengths, train.lengths) == ([50], [300])
    assert train.read(0, 0, 300).tolist() == list(range(300))
    assert isinstance(map_shard(train.paths[0]), np.memmap)


def test_llm_cs_format_is_recognized_under_nanogpts_names(tmp_path):
    write_bin(tmp_path / "train.bin", range(50))
    assert open_shards(tmp_path, "train").read(0, 0, 50).tolist() == list(range(50))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(magic=20240801), "x_train_1.bin does not begin with 20240520"),
        (dict(version=7), "x_train_1.bin is of version 7, only version 1 is known"),
        (dict(count=101), "has 1,224 bytes, with the 101 tokens in its header.*1,226.*truncated"),
        (dict(count=99), "has 1,224 bytes, with the 99 tokens"),
        (dict(count=-1), "with the -1 tokens"),
        (dict(tokens=[]), "with the 0 tokens"),
        (dict(tokens=[50256, 50257]), "contains the id 50257, outside the vocabulary of 50257"),
    ],
)
def test_wrong_bin_files_are_rejected(options, message, tmp_path):
    write_bin(tmp_path / "x_train_1.bin", **dict(tokens=range(100)) | options)
    with pytest.raises(UserError, match=message):
        open_shards(tmp_path, "train").read(0, 0, 100)


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("x_train_1.bin", b"", "does not begin with 20240520"),
        ("x_train_1.bin", b"<!DOCTYPE html>", "does not begin with 20240520"),
        ("x_train_1.bin", np.int32([20240520, 1, 9]).tobytes(), "truncated in its header"),
        ("train.bin", b"", "train.bin has 0 bytes"),
        ("train.bin", b"\1" * 11, "train.bin has 11 bytes, not 2 per token"),
        ("train.bin", np.uint16([50257, 1]).tobytes(), "train.bin contains the id 50257"),
    ],
)
def test_bytes_that_are_no_shard_are_rejected(name, data, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        open_shards(tmp_path, "train").read(0, 0, 2)


def test_characters_of_nanogpt_are_not_taken_for_tokens(tmp_path):
    """And its pickle is not opened."""
    np.arange(65, dtype=np.uint16).tofile(tmp_path / "train.bin")
    (tmp_path / "meta.pkl").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(UserError, match="train.bin does not hold GPT-2's tokens.*fineweb.py"):
        open_shards(tmp_path, "train")


def test_the_same_folder_in_two_formats_is_rejected(tmp_path):
    write_bin(tmp_path / "x_train_1.bin", range(50))
    np.save(tmp_path / "x_train_1.npy", np.arange(50, dtype=np.uint16))
    with pytest.raises(UserError, match="holds both .npy and .bin shards"):
        open_shards(tmp_path, "train")


# ---------------------------------------------------------------------------------------------
# Fingerprint


def test_an_interruption_does_not_change_the_fingerprint(tmp_path):
    """Nor does the name of the folder. Other tokens do, and so does another tokenizer."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, 250)
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    first = shards_fingerprint(tmp_path / "a")
    manifest["shards"][0]["next"]["position"]["state"] = {"other": 1}
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(manifest))
    assert shards_fingerprint(tmp_path / "b") == first
    manifest["shards"][1]["sha256"] = "0" * 64
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(manifest))
    changed = shards_fingerprint(tmp_path / "b")
    manifest["tokenizer_sha256"] = "1" * 64
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(manifest))
    assert len({first, changed, shards_fingerprint(tmp_path / "b")}) == 3


@pytest.mark.parametrize("change", ["first", "last", "length", "name", "another"])
def test_shards_without_a_manifest_have_a_fingerprint(change, tmp_path):
    tokens = np.arange(20_000, dtype=np.uint16)
    write_bin(tmp_path / "x_train_1.bin", tokens)
    (tmp_path / "README.bin").write_text("not a shard")
    before = shards_fingerprint(tmp_path)
    (tmp_path / "README.bin").write_text("changed")
    assert shards_fingerprint(tmp_path) == before
    if change in ("first", "last"):
        tokens[0 if change == "first" else -1] += 1
        write_bin(tmp_path / "x_train_1.bin", tokens)
    elif change == "length":
        write_bin(tmp_path / "x_train_1.bin", tokens[:-1])
    elif change == "name":
        (tmp_path / "x_train_1.bin").rename(tmp_path / "x_train_2.bin")
    else:
        write_bin(tmp_path / "x_train_2.bin", tokens)
    assert shards_fingerprint(tmp_path) != before


def test_too_little_text_is_rejected_when_it_is_written(tmp_path):
    with pytest.raises(UserError, match="only 19 tokens.*at least 20 are needed"):
        write(tmp_path, 19)
    assert write(tmp_path, 20).manifest["complete"]
    assert open_shards(tmp_path, "val").lengths == [2]


def test_parts_of_a_document_are_counted_once(tmp_path):
    """A document of 9 + 8 + 7 tokens in three batches, an empty one and another one after it."""
    writer = ShardWriter(tmp_path, "x", 10, HEADER)
    position = SOURCE_START
    for number, lengths in enumerate([[9], [8], [7, 0, 3]]):
        position = Position(document=number, token=0, state={"S": number}, skip=0)
        tokens = np.arange(sum(lengths), dtype=np.uint16)
        writer.add(position, tokens, lengths, is_continuation=number > 0)
    assert (writer.manifest["documents"], writer.manifest["empty_documents"]) == (2, 1)
    counts = [shard["next"]["documents"] for shard in writer.manifest["shards"]]
    assert counts == [1, 1]


def test_an_unfinished_folder_is_rejected(tmp_path):
    writer = ShardWriter(tmp_path, "x", 10, HEADER)
    writer.add(SOURCE_START, np.arange(25, dtype=np.uint16), [25])
    assert not json.loads((tmp_path / "manifest.json").read_text())["complete"]
    with pytest.raises(UserError, match="unfinished"):
        open_shards(tmp_path, "train")


def test_a_full_disk_keeps_the_old_file(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(OSError, match="make room"), write_atomically(tmp_path / "file") as file:
        file.write(b"new")
        raise OSError(28, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"
