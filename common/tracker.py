"""Sends a run's figures and pictures to Weights & Biases, Trackio or TensorBoard.

    tracker = start_tracker("wandb", folder, name="log", start_step=0, settings=dict(B=64))
    tracker.log(100, dict(loss=3.21, lr=6e-4))
    tracker.log_pictures(100, [folder / "log_plot.png"])
    tracker.finish()

All three are optional packages. A resumed run continues its curve: the identity of the curve is in
the run folder (tracker_id.txt). A run that was killed may have sent steps after its newest
checkpoint, which it now takes again. TensorBoard hides those that were written first. The others
can't take back a step, so it is not sent a second time.
"""

import json
import secrets
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from common.console import UserError, say, table, write_text

TrackerName = Literal["none", "wandb", "trackio", "tensorboard"]
PROJECT = "gpt2"  # what wandb and Trackio file the runs under


def check_installed(name: TrackerName):
    """Raise UserError if the package of a tracker is missing."""
    if name == "none":
        return
    spec = find_spec(name)
    # A folder of that name, which wandb leaves behind, is no package: it has no origin.
    if spec is None or spec.origin is None:
        raise UserError(f"{name} is not installed: pip install {name}, or leave out --tracker")


def start_tracker(
    name: TrackerName, folder: Path, run_name: str, start_step: int, settings: dict
) -> "Dashboard | TensorBoard":
    """Begin to track the run in `folder`, or continue at start_step.

    Call it before the steps from start_step on are removed from metrics.jsonl. Raises UserError if
    the tracker does not start.
    """
    try:
        if name == "tensorboard":
            return TensorBoard(folder, start_step, settings)
        return Dashboard(name, folder, run_name, settings)
    except Exception as error:  # each package has its own types
        remedy = "; WANDB_MODE=offline needs no account" if name == "wandb" else ""
        raise UserError(f"{name} does not start: {error}{remedy}") from error


class Dashboard:
    """A run in wandb, or in Trackio, whose functions have the same names."""

    def __init__(self, name: TrackerName, folder: Path, run_name: str, settings: dict):
        # A new run gets a new identity, also in the folder of an earlier one whose logs are gone.
        metrics = folder / "metrics.jsonl"
        identity = folder / "tracker_id.txt"
        if not (identity.exists() and metrics.exists()):
            write_text(identity, secrets.token_hex(4) + "\n")
        run_id = identity.read_text().strip()
        self.last_step = last_step(metrics)

        # Both packages have `init`, but find an earlier run in different ways.
        self.package = import_module(name)
        # "allow" continues the run if it exists, and begins it otherwise.
        options: dict[str, Any] = dict(project=PROJECT, config=settings, resume="allow")
        if name == "wandb":
            # A resumed run may have other settings, which wandb refuses by default.
            options |= dict(id=run_id, name=run_name, dir=folder, allow_val_change=True)
        else:
            # Trackio finds a run by its name, so that has to be unique.
            options |= dict(name=f"{run_name}-{run_id}", embed=False)
        self.run = self.package.init(**options)

    def log(self, step: int, values: dict[str, float]):
        # A run that was killed has sent these steps before.
        if step > self.last_step:
            self.run.log(values, step=step)

    def log_pictures(self, step: int, paths: list[Path]):
        self.run.log({path.stem: self.package.Image(str(path)) for path in paths}, step=step)

    def finish(self):
        self.run.finish()


class TensorBoard:
    """Event files in the run folder, which is thereby a run of `tensorboard --logdir`."""

    def __init__(self, folder: Path, start_step: int, settings: dict):
        # Imported here, because it is optional.
        from torch.utils.tensorboard import SummaryWriter

        # Of earlier event files, the steps from purge_step on are not shown.
        self.writer = SummaryWriter(folder, purge_step=start_step)
        # TensorBoard renders text as Markdown.
        rows = [(name, str(value)) for name, value in settings.items()]
        self.writer.add_text("settings", table(("setting", "value"), rows), start_step)
        say(f"TensorBoard: tensorboard --logdir {folder}")

    def log(self, step: int, values: dict[str, float]):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # a killed process loses nothing

    def log_pictures(self, step: int, paths: list[Path]):
        # Imported late, because matplotlib is slow to import and only the last step needs it.
        from matplotlib.image import imread

        for path in paths:
            pixels = imread(path)  # (height, width, 4), from 0 to 1
            self.writer.add_image(path.stem, pixels, step, dataformats="HWC")

    def finish(self):
        self.writer.close()


def last_step(metrics: Path) -> int:
    """The last step in metrics.jsonl; -1 without one."""
    steps = [-1]
    # Not simply the last line: that can be cut off.
    for line in metrics.read_text().splitlines() if metrics.exists() else []:
        try:
            steps.append(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):  # a crash cut the line off
            continue
    return max(steps)
