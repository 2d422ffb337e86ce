"""A run's logs: log.txt (`step stream value`), metrics.jsonl (one object per step), the screen."""

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from common.console import write_text
from common.published import REFERENCES
from common.runtime import Runtime
from common.tracker import TrackerName, start_tracker

# Names of the series in metrics.jsonl -> in log.txt. Benchmarks have the same name in both.
STREAMS = {"loss": "train", "val": "val"}
STREAMS |= {reference.stream: reference.stream for reference in REFERENCES.values()}


class RunLog:
    """Writes the logs on rank 0; does nothing on the other ranks.

    A killed run may have logged steps after its newest checkpoint. They are removed when it
    resumes, so that each step appears once.
    """

    def __init__(
        self,
        folder: Path,
        start_step: int,
        rt: Runtime,
        tracker: TrackerName = "none",
        name: str = "",
        settings: dict | None = None,
    ):
        """The tracker shows the run by its name, with its settings."""
        self.folder = folder
        self.rt = rt
        self.record: dict[str, Any] = {}  # values of the current step, not yet written
        self.last_shown = 0.0
        self.tracker = None
        if not rt.is_main:
            return
        if tracker != "none":
            self.tracker = start_tracker(tracker, folder, name, start_step, settings or {})

        # Remove the steps that will be taken again. The tracker reads metrics.jsonl before that.
        def is_earlier(line: str) -> bool:
            # hellaswag.py adds results without a step to its file: they stay.
            return json.loads(line).get("step", -1) < start_step

        def is_earlier_in_log(line: str) -> bool:
            step, _, _ = line.split()
            return int(step) < start_step

        keep_lines(folder / "log.txt", is_earlier_in_log)
        keep_lines(folder / "metrics.jsonl", is_earlier)
        for results in folder.glob("*_results.jsonl"):
            keep_lines(results, is_earlier)
        # Line buffered, so that the files can be watched and survive a crash.
        self.text = open(folder / "log.txt", "a", buffering=1)  # noqa: SIM115
        self.metrics = open(folder / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115

    def write(self, step: int, **values):
        """Add values to the record of a step. The training loss, which comes last, completes it."""
        if not self.rt.is_main:
            return
        # The values of a step come in several calls. A new step completes the last one.
        if step != self.record.get("step"):
            self.flush()
            self.record = dict(step=step)
        self.record |= finite_or_none(values)
        # log.txt has only the loss and the benchmarks, one value per line.
        for key, stream in STREAMS.items():
            if key in values:
                append(self.text, f"{step} {stream} {values[key]:.6f}\n")
        if "loss" in values:
            self.show(values)
            self.flush()

    def write_result(self, step: int, benchmark: str, result: dict):
        """Add all metrics of a benchmark to its own file, for example hellaswag_results.jsonl."""
        if self.rt.is_main:
            # Opened for each result: benchmarks are rare, and their names are not known before.
            with open(self.folder / f"{benchmark}_results.jsonl", "a") as file:
                append(file, json.dumps(dict(step=step) | result) + "\n")

    def flush(self):
        """Write the current record to metrics.jsonl."""
        if self.record:
            # A record is complete before it is written, because lines are never changed.
            append(self.metrics, json.dumps(self.record) + "\n")
            if self.tracker:
                # The tracker draws curves: texts, and values that were not finite, are not sent.
                numbers = {
                    name: value
                    for name, value in self.record.items()
                    if name != "step" and isinstance(value, int | float)
                }
                self.tracker.log(self.record["step"], numbers)
        self.record = {}

    def finish(self, step: int, pictures: list[Path]):
        """Send the pictures to the tracker, as those of this step, and end it."""
        self.flush()
        if self.tracker:
            self.tracker.log_pictures(step, pictures)
            self.tracker.finish()

    def show(self, values: dict):
        """Print the step, but at most one line per second, or per 10 seconds into a file.

        A skipped step is always printed.
        """
        if values.get("skipped"):
            self.rt.print(
                f"step {self.record['step']} | float16 overflow: the update is skipped, the loss "
                f"scale lowered to {values['loss_scale']:,.0f}"
            )
            return
        # Steps of a small model take milliseconds. All of them are in the files anyway.
        interval = 1 if sys.stderr.isatty() else 10
        if time.monotonic() - self.last_shown < interval:
            return
        self.last_shown = time.monotonic()

        parts = [
            f"step {self.record['step']}",
            f"loss {values['loss']:.4f}",
            f"lr {values['lr']:.2e}",
            f"norm {values['grad_norm']:.3f}",
            f"{values['ms']:.0f} ms",
            f"{values['tokens_per_sec']:,.0f} tok/s",
        ]
        # None on a device whose peak is unknown
        if values["mfu"]:
            parts.append(f"mfu {values['mfu']:.1%}")
        parts.append(f"{values['memory'] / 1e9:.2f} GB")
        self.rt.print(" | ".join(parts))

    def values(self, stream: str) -> list[float]:
        """All values of a stream of log.txt so far, on rank 0."""
        if not self.rt.is_main:
            return []
        self.flush()
        # The file also has the values from before a resume, which this object has never seen.
        lines = (line.split() for line in (self.folder / "log.txt").read_text().splitlines())
        return [float(value) for _, name, value in lines if name == stream]


def finite_or_none(record: dict) -> dict:
    """A record for a JSON file: JSON has no infinity and no NaN, so they become null."""
    result = {}
    for name, value in record.items():
        is_finite = not isinstance(value, float) or math.isfinite(value)
        result[name] = value if is_finite else None
    return result


def keep_lines(path: Path, is_kept: Callable[[str], bool]):
    """Remove the other lines of a file, and those that a crash cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if is_kept(line):
                kept.append(line + "\n")
        # A cut line raises ValueError; JSON that is no object, or has no proper step, the others.
        except (ValueError, AttributeError, TypeError):
            continue
    # Atomically: a crash at this point must not lose the log.
    write_text(path, "".join(kept))


def append(file: TextIO, line: str):
    """Add a line to an open file. Raises OSError that says what to do if the disk is full."""
    try:
        file.write(line)
    except OSError as error:
        raise OSError(
            f"{file.name} can't be written ({error.strerror}): make room, then --resume"
        ) from error
