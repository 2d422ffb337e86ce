"""The file of descriptions, the search for near-duplicates, and the text file to train on."""

import json
import re

import pytest

from common.console import UserError
from common.finetune_data import read_texts
from fantasy.descriptions import DescriptionStore, SimilarityIndex
from fantasy.grammar import as_text, describe
from fantasy.locations import prompt_seeds

SEEDS = prompt_seeds(0)[:4]
TEXTS = [as_text(describe(seed, 0, 150, 400)) for seed in SEEDS]


@pytest.fixture
def lines(tmp_path) -> list[str]:
    """The lines of a file with four descriptions, written by the store."""
    with DescriptionStore(tmp_path / "written", offline=True) as store:
        for seed, text in zip(SEEDS, TEXTS):
            store.add(seed, text, 0, 0, "offline")
    return store.path.read_text().splitlines()


def test_descriptions_are_in_the_file_at_once_and_read_again(tmp_path):
    with DescriptionStore(tmp_path, offline=False) as store:
        for number, (seed, text) in enumerate(zip(SEEDS, TEXTS), 1):
            store.add(seed, text, 100, 250, "gpt")
            assert len(store.path.read_text().splitlines()) == number
    with DescriptionStore(tmp_path, offline=False) as store:
        assert [record["text"] for record in store.records] == TEXTS
        assert store.pairs == {(seed.place, seed.culture) for seed in SEEDS}
        assert store.is_near_duplicate(TEXTS[0] + " One more sentence.")
        assert not store.is_near_duplicate("A new text, with words that no other text has.")
        store.write_text()
    blocks = read_texts(tmp_path / "finetune_data.txt")
    assert blocks == [f"<LOC>\n{text}\n</LOC>" for text in TEXTS]


@pytest.mark.parametrize("cut", [1, 10, 500])
def test_a_last_line_that_was_cut_off_is_repaired(lines, tmp_path, cut):
    """If only the newline is missing it is added, else the line is removed."""
    path = tmp_path / "finetune_data.jsonl"
    path.write_bytes("".join(line + "\n" for line in lines).encode()[:-cut])
    with DescriptionStore(tmp_path, offline=True) as store:
        kept = 4 if cut == 1 else 3
        assert len(store.records) == kept
    assert path.read_text() == "".join(line + "\n" for line in lines[:kept])


def test_a_complete_description_without_newline_is_not_removed(lines, tmp_path):
    """A model wrote it, so it was paid for, and does not belong to a store of the grammar."""
    path = tmp_path / "finetune_data.jsonl"
    path.write_text(lines[0].replace('"offline"', '"gpt"'))
    before = path.read_bytes()
    with pytest.raises(UserError, match=f"{path.name}, last line: it was written by a model"):
        DescriptionStore(tmp_path, offline=True).__enter__()
    assert path.read_bytes() == before


SPOILED = {
    "not JSON": (lambda line: line[:50], "is not JSON"),
    "not UTF-8": (lambda line: line[:50] + "\udcff", "is not UTF-8"),
    "no object": (lambda line: "[1]", "not a record"),
    "no text": (lambda line: line.replace('"text"', '"body"'), "not a record"),
    "wrong type": (lambda line: re.sub('"text": ".*?"', '"text": 7', line), "no string"),
    "no number": (lambda line: line.replace('tokens": 0', 'tokens": "0"'), "not an integer"),
    "delimiter": (lambda line: line.replace('"text": "', '"text": "<LOC>'), "delimiter"),
    "a model": (lambda line: line.replace('"offline"', '"gpt"'), "written by a model"),
    "twice": (lambda line: line + "\n" + line, "the same place and culture"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_malformed_line_is_named_and_the_file_unchanged(lines, tmp_path, name):
    spoil, expected = SPOILED[name]
    lines[2] = spoil(lines[2])
    path = tmp_path / "finetune_data.jsonl"
    data = ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")
    path.write_bytes(data)
    with pytest.raises(UserError, match=expected) as raised:
        DescriptionStore(tmp_path, offline=True).__enter__()
    assert str(raised.value).startswith(f"{path}, line {4 if name == 'twice' else 3}: ")
    assert path.read_bytes() == data


def test_records_have_the_documented_fields(lines):
    record = json.loads(lines[0])
    assert list(record) == ["seed", "text", "prompt_tokens", "completion_tokens", "model"]
    assert list(record["seed"]) == ["place", "mood", "culture", "time", "weather"]


def test_similarity_is_that_of_the_most_similar_text():
    index = SimilarityIndex()
    assert index.similarity("a b c d e f") == 0
    index.add("a b c d e f g")  # abcde bcdef cdefg
    index.add("a b c d e x")  # abcde bcdex
    assert index.similarity("A b, c d: e f!") == pytest.approx(2 / 3)  # abcde bcdef
    assert index.similarity("b c d e x") == pytest.approx(1 / 2)
    assert index.similarity("a b c d e") == pytest.approx(1 / 2)
    assert index.similarity("a b c d e f g") == 1
    assert index.similarity("a b") == 0
    index.add("a b")  # fewer than five words are one gram
    assert index.similarity("a b") == 1
