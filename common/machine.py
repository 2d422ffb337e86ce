"""What the machine offers to this process. Nothing here needs torch."""

import os
import platform
from pathlib import Path


def num_cores() -> int:
    """Number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """The model of the CPU, or at least its architecture."""
    # Only Linux has this file; elsewhere Python knows at least the architecture.
    path = Path("/proc/cpuinfo")
    # Its lines are `name : value`, one block for each core.
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()
