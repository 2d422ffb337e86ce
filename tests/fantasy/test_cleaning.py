"""fantasy/cleaning.py: reasoning, preambles, titles and remarks are removed, prose is not."""

import pytest

from fantasy.cleaning import MARKUP, PREAMBLE, without_frame, without_reasoning
from fantasy.grammar import as_text, describe
from fantasy.locations import prompt_seeds

PROSE = (
    "The tower stands in the salt. Its bell rings twice.\n\nNobody hears it, of course: not now."
)


@pytest.mark.parametrize(
    "text, expected",
    [
        (PROSE, PROSE),
        (f"<think>\nHm.\n</think>\n\n{PROSE}", PROSE),
        (f"Hm.\n</think>{PROSE}", PROSE),
        (f"<THINKING>Hm.</THINKING> <think>Again.</think>{PROSE}", PROSE),
        (f"<think>Or <think>this</think> that</think>{PROSE}", PROSE),
        (f"[THINK]Hm.[/THINK]{PROSE}", PROSE),
        (f"◁think▷Hm.◁/think▷{PROSE}", PROSE),
        (f"<seed:think>Hm.</seed:think>{PROSE}", PROSE),
        (f"<|begin_of_thought|>Hm.<|end_of_thought|>{PROSE}", PROSE),
        (
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>"
            f"{PROSE}<|return|>",
            PROSE,
        ),
        ("<|channel|>analysis<|message|>Hm.", ""),
        (f"{PROSE}<|im_end|>\n", PROSE),
        (f"{PROSE}</s>", PROSE),
        ("<think>Hm. So", ""),
        ("<think>Hm.</think>", ""),
        ("", ""),
    ],
)
def test_reasoning(text, expected):
    assert without_reasoning(text) == expected


@pytest.mark.parametrize(
    "frame",
    [
        "{}",
        "Sure! Here is a description of the tower:\n\n{}",
        "Sure, here's your description:\n{}",
        "Certainly!\n\n{}",
        "Okay.\n\nHere is the text you asked for:\n\n**The Tower**\n\n{}",
        "Of course! Below is a 200-word passage: {}",
        "Here’s a description of the location: {}",
        "# The Tower\n\n{}",
        "### The Tower: A Story.\n{}",
        "**The Tower**\n\n{}",
        "*The Tower*\n\n{}",
        "**Title: The Tower**\n\n{}",
        "Title: The Tower\n\n{}",
        "The Tower\n=========\n\n{}",
        "The Tower of Salt\n\n{}",
        "```\n{}\n```",
        "```text\n{}\n```",
        "---\n{}\n---",
        "<description>\n{}\n</description>",
        '"{}"',
        "“{}”",
        "{}\n\nLet me know if you'd like me to change anything!",
        "{}\n\n---\n\n*(Word count: 213)*",
        "{}\n\n[213 words]",
        "{}\n\nI hope this description helps!",
    ],
)
def test_frames(frame):
    result = without_frame(frame.format(PROSE))
    assert result == PROSE
    assert not MARKUP.search(result)
    assert not PREAMBLE.match(result)


def test_emphasis_is_removed_and_words_with_underscores_are_not():
    text = "The **old** *tower* and _its_ bell_rope cost 3 * 4 * 5 coins."
    assert without_frame(text) == "The old tower and its bell_rope cost 3 * 4 * 5 coins."


@pytest.mark.parametrize(
    "text",
    [
        PROSE,
        "Here is where the river ends.\n\nThe tower stands there.",
        "Here is a place: salt, stone and wind. It is old.",
        "This is the sea.\n\nIt is cold.",
        "Surely nobody lives here.\n\nThe tower is empty.",
        "Of course it rains. It always rains in the harbour.",
        "Absolutely still, the water lies between the houses.",
        "“Who goes there?”\n\nThe guard lifts a lamp. “Nobody.”",
        "The bell rings—\n\nand then nothing.",
        "It is late. If you want to stay, knock.\n\nI have seen it once.",
    ],
)
def test_prose_stays(text):
    assert without_frame(text) == text
    assert not MARKUP.search(text)
    assert not PREAMBLE.match(text)


def test_descriptions_of_the_grammar_stay():
    for seed in prompt_seeds(0)[:300]:
        text = as_text(describe(seed, 0, 150, 400))
        assert without_frame(without_reasoning(text)) == text
        assert not MARKUP.search(text)
        assert not PREAMBLE.match(text)


@pytest.mark.parametrize(
    "text",
    [
        f"{PROSE}\n\n- salt\n- stone",
        f"{PROSE}\n\n1. Salt\n2. Stone",
        f"{PROSE}\n\n## The Gate\n\n{PROSE}",
        f"{PROSE}\n\n| a | b |\n\nMore.",
        f"A <b>tower</b>. {PROSE}",
        f"{PROSE} <|im_start|>user More.",
        f"A [tower](http://example.org). {PROSE}",
    ],
)
def test_markup_is_found(text):
    assert MARKUP.search(without_frame(text))


def test_a_preamble_in_the_line_of_the_text_is_found():
    for text in (f"Sure! {PROSE}", f"Absolutely. I would be glad to help. {PROSE}"):
        assert without_frame(text) == text
        assert PREAMBLE.match(text)
    assert PREAMBLE.match(without_frame(f"Here is the description you requested. {PROSE}"))
