"""Reads training logs: those of this project, and those of others.

`read_points(file)` yields (step, name, value), with the names of metrics.jsonl. It reads:

    log.txt, also build-nanogpt's    10 train 4.1234
    metrics.jsonl, *_results.jsonl   {"step": 10, "loss": 4.1234, "lr": 0.0006}
    llm.c, main.log                  s:10 trl:4.1234 lr:0.000600 norm:0.50
    llm.c, terminal                  step   11/20 | loss 4.1234 (+0.10z)| lr 6.00e-04 | 300 tok/s
    build-nanogpt, terminal          step    10 | loss: 4.1234 | lr 6.0000e-04 | tok/sec: 300.00
    nanoGPT, terminal                step 10: train loss 4.1234, val loss 4.2345
                                     iter 10: loss 4.1234, time 12.30ms, mfu 3.00%
    transformers                     trainer_state.json, a single object with a "log_history"

On a terminal, build-nanogpt and llm.c print a validation loss or a HellaSwag accuracy on a line
without a step. It belongs to the step whose line comes next.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.console import UserError, read_text

# The same series has other names in other logs than in metrics.jsonl, whose names are used here.
NAMES = {
    # log.txt
    "train": "loss",
    # main.log
    "trl": "loss",
    "tel": "val",
    "eval": "hella",
    "norm": "grad_norm",
    # terminals
    "train loss": "loss",
    "val loss": "val",
    "validation loss": "val",
    "HellaSwag": "hella",
    "HellaSwag accuracy": "hella",
    "tok/sec": "tokens_per_sec",
    "tok/s": "tokens_per_sec",
    "bf16 MFU": "mfu",
    # trainer_state.json
    "eval_loss": "val",
    "learning_rate": "lr",
}
# A larger value is a mistake, and no axis can show it.
MAX_VALUE = 1e100
MAX_STEP = 10**15


# A number and its percent sign: "4.1234", "6.0e-04", "1,234,567", "45.2%"
NUMBER = r"([-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?(?:e[-+]?\d+)?)(%?)"
# The beginning of a line: "s:10 ", "step   11/20 |", "step    10 |", "iter 10:"
STEP = re.compile(r"\s*(?:s:(\d+)\s|(?:step|iter)\s+(\d+)(/\d+)?\s*[:|])")
# "loss 4.1", "loss: 4.1", "trl:4.1"; and "300 tok/s"
NAME_AND_NUMBER = re.compile(
    rf"\b(train loss|val loss|loss|val|HellaSwag|lr|norm|mfu|tok/sec|trl|tel|eval)[: ] *{NUMBER}"
)
NUMBER_AND_NAME = re.compile(rf"{NUMBER} (tok/s|bf16 MFU)\b")
# "validation loss: 10.95", "HellaSwag accuracy: 2464/10042=0.2454"
WITHOUT_STEP = re.compile(
    rf"(validation loss|val loss|HellaSwag accuracy|HellaSwag):? +(?:\d+/\d+ *= *)?{NUMBER}\s*$"
)


def read_points(file: Path) -> Iterator[tuple[int, str, float]]:
    """(step, name, value) of everything that a log file holds; nothing if it does not exist.

    Values that are not finite are left out, and so are lines of any other kind.
    """
    if not file.exists():
        return
    try:
        text = read_text(file)
    except UserError:  # the output of a terminal may contain bytes of another encoding
        text = file.read_text("utf-8", "replace")
    names = NAMES
    # Other benchmarks have an acc_norm, too.
    if file.name == "hellaswag_results.jsonl":
        names = NAMES | {"acc_norm": "hella"}
    for step, name, value in parse(text):
        number = to_number(value)
        # nanoGPT prints an MFU of -100% until it knows it.
        is_unknown = name == "mfu" and number is not None and number < 0
        if number is not None and not is_unknown and 0 <= step <= MAX_STEP:
            yield step, names.get(name, name), number


def to_number(value: Any) -> float | None:
    """A value as float; None if it is not a number, not finite, or too large."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # Python's integers have any size. They compare with a float, but may not fit into one.
    return float(value) if abs(value) < MAX_VALUE else None


def parse(text: str) -> Iterator[tuple[int, str, Any]]:
    """(step, name, value) with the names and values of the log."""
    history = read_history(text)
    if history is not None:
        for record in history:
            yield from read_record(record)
        return

    # A crash may have cut off the last digits of a line without an end.
    *lines, cut_off = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    # A line without a step waits for the next line that has one.
    next_step = 0
    waiting = []  # (name, value) of lines without a step
    for line in lines:
        found = WITHOUT_STEP.match(line)
        if found:
            name, digits, percent = found.groups()
            waiting.append((name, parse_number(digits, percent)))
            continue
        points = read_line(line)
        # All points of a line have the same step: look at the first, if there is one.
        for step, _, _ in points[:1]:
            yield from ((step, name, value) for name, value in waiting)
            waiting = []
            next_step = step + 1
        yield from points
    # llm.c evaluates once more after the last step.
    yield from ((next_step, name, value) for name, value in waiting)
    if cut_off.startswith("{"):
        yield from read_line(cut_off)  # nothing, unless the object is complete


def read_history(text: str) -> list | None:
    """The records in transformers' trainer_state.json; None if it is another file."""
    # A cheap test first: metrics.jsonl begins with a brace, too.
    if not text.lstrip().startswith("{") or '"log_history"' not in text:
        return None
    try:
        history = json.loads(text)["log_history"]
    except (ValueError, KeyError):
        return None
    return history if isinstance(history, list) else None


def read_line(line: str) -> list[tuple[int, str, Any]]:
    """The points on a line, all of the same step; none if the line has another format."""
    try:
        # The formats are told apart by the beginning of the line: an object, a step, or three words
        # of log.txt. Any other line raises ValueError.
        if line.startswith("{"):
            return read_record(json.loads(line))
        found = STEP.match(line)
        if found:
            return read_fields(found, line)
        step, name, value = line.split()
        return [(int(step), name, float(value))]
    except ValueError:
        return []


def read_record(record: Any) -> list[tuple[int, str, Any]]:
    """The points of a JSON object with a step."""
    try:
        step = int(record["step"])
        return [(step, name, value) for name, value in record.items() if name != "step"]
    except (ValueError, KeyError, TypeError, OverflowError):
        return []


def read_fields(found: re.Match, line: str) -> list[tuple[int, str, float]]:
    """The points on a line of main.log or of a terminal, from the match of its step."""
    of_main_log, of_terminal, of_total = found.groups()
    step = int(of_main_log or of_terminal)
    if of_total:  # "step 1/20": llm.c counts from 1 on the terminal, from 0 in main.log
        step -= 1
    # The name stands before the number, or behind it.
    rest = line[found.end() :]
    points = []
    for name, digits, percent in NAME_AND_NUMBER.findall(rest):
        points.append((step, name, parse_number(digits, percent)))
    for digits, percent, name in NUMBER_AND_NAME.findall(rest):
        points.append((step, name, parse_number(digits, percent)))
    return points


def parse_number(digits: str, percent: str) -> float:
    """The value of a number that NUMBER has matched; 0.452 for 45.2%."""
    number = float(digits.replace(",", ""))
    return number / 100 if percent else number
