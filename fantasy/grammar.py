"""Fantasy locations without a language model, for `generate_finetune_data.py --offline`.

    paragraphs = describe(prompt_seeds(0)[0], seed=0, min_words=150, max_words=400)
    paragraphs[0][0].text, paragraphs[0][0].pattern, as_text(paragraphs)

A sentence is a pattern with slots, which are filled with words:

    pattern   A wall of {material} runs along the {part}, low enough to sit on.
    words     material: swollen oak, green marble    part: flooded stacks, lamp niches, ...
    text      A wall of green marble runs along the lamp niches, low enough to sit on.

The patterns and most of the words are in grammar.toml, the rest in locations.toml. Each pattern
makes sense alone, so the sentences of a section can follow each other in any order, and so can the
sections between the opening and the closing. A description uses no pattern twice, and there are so
many patterns that each is rare among thousands of sentences.
"""

import random
import re
from functools import cache
from typing import NamedTuple

from common.console import UserError
from fantasy.locations import FIELDS, PromptSeed, check_words, load_tables, load_toml

# Matches {material}; the group is the name.
SLOT = re.compile(r"\{(\w+)\}")
# Slots that SentenceWriter fills from the seed itself, and not from a list of words.
SEED_SLOTS = ("name", "place", "a_place", "folk", "hour", "mood", "a_mood")
MAX_SENTENCE_WORDS = 45  # no sentence has as many, once its slots are filled


class Sentence(NamedTuple):
    """A sentence, and what it was made from."""

    text: str
    pattern: str  # with {slots} in place of the words


class Grammar(NamedTuple):
    """The contents of grammar.toml."""

    sections: dict[str, list[str]]  # section -> patterns
    words: dict[str, list[str]]  # slot -> words
    at_most: dict[str, int]  # slot -> number of sentences in a description that may use it
    stems: list[str]  # beginnings of names
    endings: list[str]  # ends of names


def describe(about: PromptSeed, seed: int, min_words: int, max_words: int) -> list[list[Sentence]]:
    """Paragraphs of a description of min_words to max_words, the same for the same arguments.

    Raises UserError if the limits are less than MAX_SENTENCE_WORDS apart, or if the grammar has too
    few sentences for that many words.
    """
    if max_words - min_words < MAX_SENTENCE_WORDS:
        raise UserError(f"max_words must be at least min_words + {MAX_SENTENCE_WORDS}")
    # A generator for each description, so that it does not depend on those written before it.
    rng = random.Random(f"{seed} {about}")
    # Writing stops with the sentence that reaches the target, so it is exceeded by less than one.
    target = rng.randint(min_words, max_words - MAX_SENTENCE_WORDS)

    # The ends come first, because the body fills what they leave of the target.
    writer = SentenceWriter(about, rng)
    opening = writer.write("opening")
    closing = writer.write("closing")
    assert opening and closing  # load_grammar checks that both sections have sentences
    body = write_body(writer, rng, target - count_words([opening, closing]))

    # Sections are not split. A paragraph ends with the section that exceeds a random length.
    paragraphs = [[opening]]
    paragraph_words = rng.choice([50, 80, 110])
    for sentences in body:
        if count_words(paragraphs[-1]) > paragraph_words:
            paragraphs.append([])
        paragraphs[-1] += sentences
    paragraphs[-1].append(closing)
    return paragraphs


def write_body(writer: "SentenceWriter", rng: random.Random, target: int) -> list[list[Sentence]]:
    """The sections between opening and closing, `target` words or a little more in all.

    The sections get one sentence each in turn, so that even a short description has something of
    every section.
    """
    names = [name for name in load_grammar().sections if name not in ("opening", "closing")]
    # A random order, in which dictionaries keep their keys.
    body = {name: [] for name in rng.sample(names, len(names))}
    words = 0
    # Rounds of one sentence per section, until there are enough words.
    while words < target:
        words_before = words
        for name, sentences in body.items():
            if words >= target:
                break
            if name == "origin" and sentences:
                # Two stories of how the place began would contradict each other.
                continue
            sentence = writer.write(name)
            if sentence:
                sentences.append(sentence)
                words += count_words([sentence])
        # No section had a sentence left.
        if words == words_before:
            raise UserError(
                f"the grammar has too few sentences for a body of {target} words in one "
                "description: lower min_words and max_words"
            )
    # The reader first learns what the place looks like. The other sections keep their random order.
    shape = body.pop("shape")
    return [shape, *body.values()]


def count_words(sentences: list[Sentence]) -> int:
    """Number of words in all of these sentences."""
    return sum(len(sentence.text.split()) for sentence in sentences)


def as_text(paragraphs: list[list[Sentence]]) -> str:
    """Paragraphs as a text, with blank lines between them."""
    return "\n\n".join(
        " ".join(sentence.text for sentence in paragraph) for paragraph in paragraphs
    )


class SentenceWriter:
    """Writes the sentences of one description, without repeating a pattern.

    The words of a slot are dealt like cards from a shuffled deck, so a word comes back as late as
    possible. When one card is left, the others are shuffled and put below it, so no word follows
    itself. With the words a, b and c, dealt from the right:

        deck   c a b   deal b   c a   deal a   c   shuffle   b a c   deal c   b a   ...
    """

    def __init__(self, about: PromptSeed, rng: random.Random):
        self.rng = rng
        grammar = load_grammar()
        self.sections = grammar.sections
        self.at_most = grammar.at_most
        self.used_patterns = set()
        self.uses = dict.fromkeys(grammar.at_most, 0)  # slot -> sentences so far that use it

        # Collect the words of all slots: those that every description can use, the fields of the
        # seed's entries, and the seed itself.
        self.words = dict(grammar.words)  # slot -> its words
        tables = load_tables()
        for table, entry in about._asdict().items():
            for slot, words in tables[table][entry].items():
                # A field is one word or phrase, or a list to deal from.
                self.words[slot] = [words] if isinstance(words, str) else words

        # SEED_SLOTS, each with a single word. The name of the place is drawn once.
        seed_words = dict(
            name=rng.choice(grammar.stems) + rng.choice(grammar.endings),
            place=about.place.split()[-1],
            a_place=f"a {about.place}",
            folk=about.culture,
            hour=about.time,
            mood=about.mood,
            a_mood=f"a {about.mood}",
        )
        for slot, word in seed_words.items():
            self.words[slot] = [word]
        # Slot -> words that are still to be dealt. `deal` fills a deck when it is needed.
        self.decks = {slot: [] for slot in self.words}

    def write(self, section: str) -> Sentence | None:
        """A new sentence of a section, or None if no pattern of it is left."""
        # Choose a pattern.
        patterns = [pattern for pattern in self.sections[section] if self.is_allowed(pattern)]
        if not patterns:
            return None
        pattern = self.rng.choice(patterns)
        self.used_patterns.add(pattern)
        for slot in self.uses.keys() & SLOT.findall(pattern):
            self.uses[slot] += 1

        # Fill its slots, and correct the grammar.
        text = SLOT.sub(lambda slot: self.deal(slot[1]), pattern)
        # "a" becomes "an" before a vowel, unless it sounds like "w" (one-eyed) or "y" (uniform).
        text = re.sub(r"\b([Aa]) (?=[aeiou])(?!one|uni|us|eu)", r"\1n ", text)
        return Sentence(text[0].upper() + text[1:], pattern)

    def is_allowed(self, pattern: str) -> bool:
        """Whether a pattern is new, and none of its slots has been used too often."""
        if pattern in self.used_patterns:
            return False
        # at_most limits how many sentences of a description use a slot, such as {sky}.
        limited = self.uses.keys() & SLOT.findall(pattern)
        return all(self.uses[slot] < self.at_most[slot] for slot in limited)

    def deal(self, slot: str) -> str:
        """The next word for a slot."""
        deck = self.decks[slot]
        # The last card stays on top of the next round.
        if len(deck) < 2:
            others = [word for word in self.words[slot] if word not in deck]
            deck[:0] = self.rng.sample(others, len(others))
        return deck.pop()


@cache
def load_grammar() -> Grammar:
    """grammar.toml. Raises UserError if a part is missing or a pattern has an unknown slot."""
    # People edit this file by hand, so an error names the place of the mistake.
    path, data = load_toml("grammar.toml")
    try:
        sections = {}
        for name, text in data["sections"].items():
            # A pattern per line
            sections[name] = [line.strip() for line in text.splitlines() if line.strip()]
        stems, endings = data["names"]["stems"], data["names"]["endings"]
        grammar = Grammar(sections, data["words"], data["at_most"], stems, endings)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} must have [sections], [words], [at_most] and [names] with stems and endings "
            f"({error})"
        ) from error

    # describe() treats these sections in a special way; all others are interchangeable.
    for name in ("opening", "shape", "origin", "closing"):
        if not sections.get(name):
            raise UserError(f"{path}: section {name!r} has no sentences")
    for slot, words in (grammar.words | data["names"]).items():
        check_words(f"{path}: {slot}", words)
        if isinstance(words, str):
            raise UserError(f"{path}: {slot} must be a list of words")

    # Check that there are words for every slot.
    known_slots = {*SEED_SLOTS, *grammar.words}
    known_slots.update(*FIELDS.values())
    for slot, limit in grammar.at_most.items():
        if slot not in known_slots:
            raise UserError(f"{path}: at_most {slot} is not a slot")
        if not isinstance(limit, int):
            raise UserError(f"{path}: at_most {slot} must be a number, not {limit!r}")
    for name, patterns in sections.items():
        for pattern in patterns:
            for slot in SLOT.findall(pattern):
                if slot not in known_slots:
                    raise UserError(
                        f"{path}, section {name!r}: no words for {slot!r} in {pattern!r}"
                    )
    return grammar
