"""config.json in a run folder: everything needed to know how the run was made.

{
 "constants": {"data_dir": "datasets/edu_fineweb10B", "B": 64, ...},     the flags
 "start_step": 5000,
 "command": ["python", "train_gpt2.py", "--resume"],
 "commit": "52996c6-dirty",                 of this repository; -dirty: with local changes
 "versions": {"python": "3.11.2", "torch": "2.13.0"},
 "device": ..., "world_size": 8, "dtype": "torch.bfloat16",
 "data": {"source": ..., "tokenizer": ..., "fingerprint": ...},
 "history": [...]                           the records before each resume, oldest first
}
"""

import json
import platform
import subprocess
import sys
from pathlib import Path
from shutil import which

import torch

from common.console import write_text
from common.machine import cpu_name
from common.runtime import Runtime
from common.shards import read_manifest


def write_run_record(folder: Path, constants: dict, start_step: int, fingerprint: str, rt: Runtime):
    """Write config.json, on rank 0.

    constants: the settings of the run; "data_dir" is the folder of its shards.
    start_step: steps taken before this process. Above 0, the record of the process before moves to
        the "history", and settings that have changed are printed.
    fingerprint: that of the shards.
    """
    if not rt.is_main:
        return
    # Folders of other projects' shards have no manifest.
    manifest = read_manifest(constants["data_dir"]) or {}
    device = cpu_name()
    if rt.device.type == "cuda":
        device = torch.cuda.get_device_name()

    record: dict = dict(
        constants=constants,
        start_step=start_step,
        command=[sys.executable, *sys.argv],
        commit=describe_commit(),
        versions=dict(python=platform.python_version(), torch=torch.__version__),
        device=device,
        world_size=rt.world_size,
        dtype=str(rt.dtype),
        data=dict(
            source=manifest.get("source"),
            tokenizer=manifest.get("tokenizer"),
            fingerprint=fingerprint,
        ),
    )

    # Compare with the first record, not with the newest: a setting that was changed and changed
    # back is as it was.
    path = folder / "config.json"
    earlier = read_earlier_record(path) if start_step else None
    if earlier:
        history = [*earlier.pop("history", []), earlier]
        print_changes(history[0].get("constants", {}), constants, rt)
        record["history"] = history
    write_text(path, json.dumps(record, indent=2) + "\n")


def read_earlier_record(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):  # none, or damaged
        return None


def print_changes(first: dict, constants: dict, rt: Runtime):
    """Print the settings that differ from those that the run was started with."""
    for name, value in constants.items():
        before = first.get(name, value)
        # Tuples come back from JSON as lists, so compare what JSON makes of the value.
        if name != "resume" and before != json.loads(json.dumps(value)):
            rt.print(f"changed since the run was started: {name} was {before}, is {value}")


def describe_commit() -> str | None:
    """The commit of this repository, marked if there are local changes; None without git."""
    if not which("git"):
        return None
    repository = Path(__file__).parent.parent
    command = ["git", "-C", str(repository), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
