"""A run's logs: log.txt ("step stream value"), metrics.jsonl (one object per step), and lines on the screen."""

import json
import sys
import time
from pathlib import Path

from common.console import UserError, write_text
from common.runtime import Runtime


class RunLog:
    """Written by rank 0 alone; on the other ranks it does nothing.

    What a killed run logged after the checkpoint that it resumes from is dropped, so every step stands there once.
    """

    def __init__(self, folder: Path, start_step: int, rt: Runtime, use_wandb: bool):
        self.folder, self.rt = folder, rt
        self.record = {}
        self.last_line = 0.0
        self.wandb = None
        if not rt.is_main:
            return
        if use_wandb:
            try:
                import wandb
            except ImportError as error:
                raise UserError(
                    "wandb is not installed: pip install wandb, or leave --wandb away"
                ) from error
            try:
                self.wandb = wandb.init(project="gpt2", name=folder.name, dir=folder)
            except wandb.Error as error:  # not logged in, no network
                raise UserError(
                    f"wandb does not start: {error}; WANDB_MODE=offline needs no account"
                ) from error
        self._keep(
            "log.txt", lambda line: int(line.split()[0]) < start_step and len(line.split()) == 3
        )
        self._keep("metrics.jsonl", lambda line: json.loads(line)["step"] < start_step)
        self._keep(
            "hellaswag_results.jsonl", lambda line: json.loads(line).get("step", -1) < start_step
        )
        self.text = open(folder / "log.txt", "a", buffering=1)  # noqa: SIM115 - open as long as the run
        self.metrics = open(folder / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115

    def _keep(self, name: str, is_kept):
        path = self.folder / name
        if not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                if is_kept(line):
                    kept.append(line + "\n")
            except (ValueError, KeyError, IndexError):  # cut off by the crash
                continue
        write_text(path, "".join(kept))

    def write(self, step: int, **values):
        """Add values to the step's record. The training loss completes it."""
        if not self.rt.is_main:
            return
        if step != self.record.get("step"):
            self.flush()
            self.record = dict(step=step)
        self.record |= values
        for stream, key in (("train", "loss"), ("val", "val"), ("hella", "hella")):
            if key in values:
                append(self.text, f"{step} {stream} {values[key]:.6f}\n")
        if "loss" in values:
            self.show(values)
            self.flush()

    def write_hellaswag(self, step: int, result: dict):
        """Add a result on HellaSwag: its acc_norm is the stream `hella`."""
        self.write(step, hella=result["acc_norm"])
        if self.rt.is_main:
            with open(self.folder / "hellaswag_results.jsonl", "a") as file:
                file.write(json.dumps(dict(step=step) | result) + "\n")

    def flush(self):
        if self.record:
            append(self.metrics, json.dumps(self.record) + "\n")
            if self.wandb:
                self.wandb.log(
                    {k: v for k, v in self.record.items() if k != "samples"},
                    step=self.record["step"],
                )
        self.record = {}

    def show(self, v: dict):
        """The step on the screen; where steps are quick, one line a second, in a file one in ten."""
        now = time.monotonic()
        if now - self.last_line < (1 if sys.stderr.isatty() else 10):
            return
        self.last_line = now
        mfu = f" | mfu {100 * v['mfu']:.1f}%" if v["mfu"] else ""
        self.rt.print(
            f"step {self.record['step']} | loss {v['loss']:.4f} | lr {v['lr']:.2e} | norm {v['grad_norm']:.3f} | "
            f"{v['ms']:.0f} ms | {v['tokens_per_sec']:,.0f} tok/s{mfu} | {v['memory'] / 1e9:.2f} GB"
        )

    def values(self, stream: str) -> list[float]:
        """All values of a stream, on rank 0."""
        if not self.rt.is_main:
            return []
        self.flush()
        lines = (line.split() for line in (self.folder / "log.txt").read_text().splitlines())
        return [float(value) for _, name, value in lines if name == stream]


def append(file, line: str):
    try:
        file.write(line)
    except OSError as error:
        raise OSError(
            f"{file.name} can't be written ({error.strerror}): make room, then --resume"
        ) from error
