"""What a description is about: a place, a mood, a culture, a time of day and the weather.

    for seed in prompt_seeds(0)[:1000]:
        seed.place, seed.mood, seed.culture, seed.time, seed.weather

The words are in locations.toml, one table for each of the five. A prompt to a language model quotes
a seed. `grammar.py` also uses the fields of the seed's entries, such as the smells of a place.
"""

import random
import tomllib
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

from common.console import UserError

# The fields that every entry of a table has. Each is a word or phrase, or a list of them.
FIELDS = {
    "place": ("people", "part", "material", "smell", "sound"),
    "mood": ("feeling",),
    "culture": ("custom", "craft", "food", "power"),
    "time": ("at_hour", "light"),
    "weather": ("weather", "sky"),
}


class PromptSeed(NamedTuple):
    """What one description is about: the name of one entry from each table of locations.toml."""

    place: str
    mood: str
    culture: str
    time: str
    weather: str


def prompt_seeds(seed: int) -> list[PromptSeed]:
    """One seed for every pair of a place and a culture, in an order that depends on `seed`.

    Two seeds never share both place and culture; mood, time and weather are drawn at random.
    """
    rng = random.Random(seed)
    tables = load_tables()
    # All pairs, shuffled: a run of any number of samples sees a random selection.
    pairs = list(product(tables["place"], tables["culture"]))
    rng.shuffle(pairs)
    moods, times, weathers = (list(tables[name]) for name in ("mood", "time", "weather"))

    seeds = []
    for place, culture in pairs:
        # Drawn in this order since the first version: the same --seed gives the same seeds.
        mood = rng.choice(moods)
        time = rng.choice(times)
        weather = rng.choice(weathers)
        seeds.append(PromptSeed(place, mood, culture, time, weather))
    return seeds


@cache
def load_tables() -> dict[str, dict[str, dict[str, str | list[str]]]]:
    """The tables of locations.toml: table -> entry -> field -> its words.

    Raises UserError that names the entry if a field is missing, unknown or has no words.
    """
    # Checked here, not where the fields are used, so that a mistake in a rare entry shows at once.
    path, tables = load_toml("locations.toml")
    if tables.keys() != FIELDS.keys():
        raise UserError(f"{path}: its tables must be {', '.join(FIELDS)}, not {', '.join(tables)}")

    # grammar.py fills slots from every field, so each entry must have all of them.
    for table, fields in FIELDS.items():
        for name, entry in tables[table].items():
            where = f"{path}: {table} {name!r}"
            if not isinstance(entry, dict) or entry.keys() != set(fields):
                raise UserError(f"{where} must have the fields {', '.join(fields)}, and no others")
            for field, words in entry.items():
                check_words(f"{where}, {field}", words)
    return tables


def load_toml(name: str) -> tuple[Path, dict]:
    """A data file next to this module, with its path for error messages. Raises UserError."""
    path = Path(__file__).with_name(name)
    try:
        return path, tomllib.loads(path.read_text("utf-8"))
    except ValueError as error:  # TOMLDecodeError, which names the line, or UnicodeDecodeError
        raise UserError(f"{path} is malformed: {error}") from error


def check_words(where: str, words):
    """Raise UserError unless `words` is a string or a list of strings, none of them empty."""
    # A single phrase is checked like a list of one. An empty list would leave nothing to choose.
    options = words if isinstance(words, list) else [words]
    if not options or not all(isinstance(word, str) and word.strip() for word in options):
        raise UserError(f"{where} must be one or more words in quotes, not {words!r}")
