"""The grammar of `generate_finetune_data.py --offline`, and the data files it reads."""

import re
from collections import Counter
from pathlib import Path

import pytest

from common.console import UserError
from fantasy import grammar, locations
from fantasy.grammar import as_text, describe, load_grammar
from fantasy.locations import load_tables, prompt_seeds


@pytest.fixture(scope="module")
def thousand() -> list:
    return [describe(seed, 0, 150, 400) for seed in prompt_seeds(0)[:1000]]


def test_seeds_are_all_pairs_of_place_and_culture_in_another_order_for_another_seed():
    seeds = prompt_seeds(0)
    pairs = {(seed.place, seed.culture) for seed in seeds}
    assert len(seeds) == len(pairs) == 60 * 40
    assert seeds == prompt_seeds(0) != prompt_seeds(1)
    assert {(seed.place, seed.culture) for seed in prompt_seeds(1)} == pairs


def test_descriptions_are_varied_and_of_the_right_length(thousand):
    texts = [as_text(paragraphs) for paragraphs in thousand]
    assert len(set(texts)) == 1000
    assert all(150 <= len(text.split()) <= 400 for text in texts)
    # no slot is left, "a" and "an" are right, no blank or word is doubled
    assert not re.search(r"[{}]|offline|\b[Aa] (?!one-)[aeio]|  |\b(\w+) \1\b", " ".join(texts))

    sentences = [s for paragraphs in thousand for paragraph in paragraphs for s in paragraph]
    _, most = Counter(sentence.pattern for sentence in sentences).most_common(1)[0]
    assert most <= 0.02 * len(sentences)
    _, most = Counter(sentence.text for sentence in sentences).most_common(1)[0]
    assert most <= 10, "the same sentence, word for word, in 1% of the descriptions"


def test_a_sentence_is_its_pattern_with_the_slots_filled(thousand):
    for paragraphs in thousand:
        for paragraph in paragraphs:
            for sentence in paragraph:
                regex = re.sub(r"\\{\w+\\}", "(.+)", re.escape(sentence.pattern))
                regex = re.sub(r"\b([Aa])n?\\ ", r"\1n?\\ ", regex)
                assert re.fullmatch(regex, sentence.text, re.I)
                assert re.match(r"[A-Z].*[.]$", sentence.text)


def test_limits_that_the_grammar_cannot_meet_are_errors():
    about = prompt_seeds(0)[0]
    with pytest.raises(UserError, match="at least min_words . 45"):
        describe(about, 0, 150, 194)
    with pytest.raises(UserError, match="too few sentences"):
        describe(about, 0, 9000, 9100)


BROKEN = {
    "locations.toml": {
        "no TOML": ('people = "copyists"', "people = copyists", "malformed: .*line 12"),
        "no field": ('people = "copyists"\n', "", "'drowned library' must have the fields people"),
        "no words": ('["swollen oak", "green marble"]', "[]", "'drowned library', material must"),
        "a table too many": ("[mood]", "[moods]", "tables must be place, mood"),
    },
    "grammar.toml": {
        "no TOML": ("shape = '''", "shape = ", "malformed"),
        "unknown slot": ("{at_hour}, {name}", "{at_our}, {name}", "no words for 'at_our'"),
        "no list": ('stems = [', 'stems = "Vel"\nmore = [', "stems must be a list"),
        "no limit": ("custom = 1", 'custom = "1"', "at_most custom must be a number"),
        "limit of nothing": ("custom = 1", "costum = 1", "at_most costum is not a slot"),
        "no section": ("closing = '''", "ending = '''", "'closing' has no sentences"),
        "no words": ("\n[words]", "\n[word]", "must have .sections., .words."),
    },
}  # fmt: skip


@pytest.mark.parametrize("name, kind", [(name, kind) for name in BROKEN for kind in BROKEN[name]])
def test_a_malformed_data_file_is_a_clear_error(tmp_path, monkeypatch, name, kind):
    old, new, expected = BROKEN[name][kind]
    text = Path(grammar.__file__).with_name(name).read_text()
    assert old in text
    (tmp_path / name).write_text(text.replace(old, new, 1))
    monkeypatch.setattr(locations, "__file__", str(tmp_path / "locations.py"))
    load = load_tables if name == "locations.toml" else load_grammar
    with pytest.raises(UserError, match=expected) as raised:
        load.__wrapped__()  # past the cache
    assert str(raised.value).startswith(str(tmp_path / name))
