"""Removes from a model's answer what is not part of the text that it was asked for.

    <think>They want a tower ...</think>          without_reasoning
    Sure! Here is your description:               without_frame
    **The Tower of Salt**                         without_frame
    The tower stands where ...                    the text
    Let me know if you'd like another one.        without_frame

What can't be removed with certainty, such as a list, is left for the caller: see MARKUP.
"""

import re

# Reasoning models put their thoughts between tags: <think>, [THINK] (Mistral), ◁think▷ (Kimi),
# <seed:think>, <|begin_of_thought|>.
_WORD = r"(?:\w+:)?(?:think|thinking|thoughts?|reasoning|reflection|analysis|scratchpad)"
OPENING = rf"(?:[<\[◁]{_WORD}[>\]▷]|<\|begin_of_(?:thought|thinking)\|>)"
CLOSING = rf"(?:[<\[◁]/{_WORD}[>\]▷]|<\|end_of_(?:thought|thinking)\|>)"
REASONING = re.compile(rf"{OPENING}.*?{CLOSING}", re.I | re.S)
# The format of gpt-oss: each part has a channel, and the answer is the part in "final".
FINAL_CHANNEL = re.compile(r".*<\|channel\|>final[^<]*<\|message\|>", re.S)
CHANNEL = re.compile(r"(?:<\|start\|>\w*)?<\|channel\|>")
# Tokens that end a message, which some servers leave in the text.
END_TOKENS = re.compile(
    r"(?:\s*(?:<\|(?:return|end|im_end|eot_id|eom_id|end_of_text|end_of_solution|endofturn)\|>"
    r"|</s>|<end_of_turn>))+$"
)

# Words that agree to a task, before or instead of an introduction.
AGREEMENT = (
    r"(?:sure(?: thing)?|certainly|of course|absolutely|okay|ok|alright|got it|understood|gladly"
    r"|no problem|happy to help)\b(?=\s*[!,.:—–-]|\s*$)"
)
INTRODUCTION = (
    r"(?:here(?:['’]s| is| are| you go)|below is|this is|i['’]ve|i have|i['’]ll"
    r"|i(?:['’]d| would) be (?:happy|glad) to)\b"
)
# Words that a text about a place does not use for itself.
TASK_WORDS = r"\b(?:descriptions?|passage|version|request(?:ed)?|words?|prose|draft|paragraphs?)\b"
# For example "Let me know if ...", "Would you like me to ...", "(About 250 words)" or "Note: ...".
CLOSING_REMARK = re.compile(
    r"[(\[*_]*(?:let me know\b|i hope (?:this|that|you)\b|feel free to (?:ask|let)\b"
    r"|would you like (?:me|another|a different|any)\b"
    r"|if you['’]?(?:d| would)? (?:like|want|need) (?:me|any|another|a different|more|changes)\b"
    r"|word count\b|(?:about |approximately |~ ?)?\d+ words\W*$|note:)",
    re.I,
)
RULE = re.compile(r"(?:[-*_=~]\s*){3,}$|```\w*$")  # a horizontal line, or a code fence
MAX_TITLE_WORDS = 12

# What prose does not contain: headings, lists, quotes, tables, code, tags, special tokens, links.
MARKUP = re.compile(
    r"^[ \t]*(?:#{1,6}\s|[-*•+]\s|\d+[.)]\s|>\s|\||```|(?:[-=_]\s*){3,}$)"
    r"|</?[a-z][^<>\n]*>|<\|\w|\*\*|\[/?INST\]|\]\(http",
    re.I | re.M,
)
# For example "Sure, ..." or "Here is a description of ...".
PREAMBLE = re.compile(
    rf"(?:{AGREEMENT}|(?:{INTRODUCTION})[^.!?\n]*{TASK_WORDS})", re.I
)  # at the start of a text
# A line that is nothing but a preamble.
PREAMBLE_LINE = re.compile(
    rf"(?=\S)(?:{AGREEMENT}[\s!,.:—–-]*)?"
    rf"(?:{INTRODUCTION}[^.!?:\n]*(?:{TASK_WORDS}[^.!?:\n]*[.!:]*|:))?",
    re.I,
)
# An introduction in the line of the text itself.
INLINE_PREAMBLE = re.compile(
    rf"(?:{AGREEMENT}[\s!,.:—–-]*)?{INTRODUCTION}[^.!?:\n]*{TASK_WORDS}[^.!?:\n]*:\s*", re.I
)


def without_reasoning(text: str) -> str:
    """The answer without a model's thoughts; empty if it has nothing else."""
    # gpt-oss: everything before the last "final" channel is reasoning. Without one, all is.
    final = FINAL_CHANNEL.match(text)
    if final:
        text = text[final.end() :]
    elif CHANNEL.match(text):
        return ""

    text = REASONING.sub("", text)
    # Chat templates often contain the opening tag, so that only the closing one is sent.
    text = re.split(CLOSING, text, flags=re.I)[-1].strip()

    # If the tokens ran out, the last thought is not closed.
    if re.match(OPENING, text, re.I):
        return ""
    return END_TOKENS.sub("", text).strip()


def without_frame(text: str) -> str:
    """A text without preamble, title, code fence, quotation marks, emphasis and closing remark."""
    text = unwrap(text.strip())

    # Until nothing changes: a title may follow a preamble, and a rule a title.
    before = None
    while text != before:
        before = text
        text = without_first_line(text)
        text = without_last_line(text)

    inline = INLINE_PREAMBLE.match(text)
    if inline:
        text = text[inline.end() :]

    # Emphasis: *word*, **word**, _word_
    text = re.sub(r"(\*{1,3})(?=\S)([^*\n]+?)(?<=\S)\1", r"\2", text)
    text = re.sub(r"(?<!\w)(_{1,3})(?=[^\s_])([^_\n]+?)(?<=\S)\1(?!\w)", r"\2", text)
    return unwrap(text.strip())


def unwrap(text: str) -> str:
    """A text without one tag, or one pair of quotation marks, around all of it."""
    tagged = re.fullmatch(
        r"<(answer|output|response|description|text)>(.*)</\1>", text, re.I | re.S
    )
    if tagged:
        return tagged[2].strip()
    for opening, closing in ('""', "“”"):
        # Quotation marks inside belong to speech: the first and the last are then not a pair.
        inner = text[1:-1]
        is_quoted = text.startswith(opening) and text.endswith(closing)
        if len(text) > 1 and is_quoted and opening not in inner and closing not in inner:
            return inner.strip()
    return text


def without_first_line(text: str) -> str:
    """The text without its first line if that is a title, a preamble or a rule."""
    line, _, rest = text.partition("\n")
    line = line.strip()
    rest = rest.strip()
    # A text of one line is the description itself.
    if not rest:
        return text
    plain = line.strip("*_ ")
    # A heading, bold or italic from end to end, a label, or a short line that is not a sentence.
    is_bold = re.fullmatch(r"(\*{1,3}|_{1,3})[^*_]+\1:?", line) is not None
    is_title = len(plain.split()) <= MAX_TITLE_WORDS and (
        is_bold or re.search(r"[^.!?…,;\"”’')—–-]$", plain) is not None
    )
    is_heading = re.match(r"#{1,6}\s", line) is not None
    is_preamble = PREAMBLE_LINE.fullmatch(plain) is not None
    if RULE.match(line) or is_heading or is_title or is_preamble:
        return rest
    return text


def without_last_line(text: str) -> str:
    """The text without its last line if that is a remark to the reader or a rule."""
    rest, _, line = text.rpartition("\n")
    line = line.strip()
    if rest.strip() and (RULE.match(line) or CLOSING_REMARK.match(line)):
        return rest.strip()
    return text
