"""Why torch cannot use this machine's NVIDIA GPU, and what to do about it.

A wheel of torch contains CUDA, but not the driver, which belongs to the system:

    wheel                      driver         GPUs
    torch from PyPI (cu130)    580 or newer   Turing (T4, RTX 20xx) and newer
    cu126                      525 or newer   Maxwell to Hopper (V100, P100, GTX 10xx, ... H100)

Sources: the metadata of torch 2.13.0 on PyPI; NVIDIA, "CUDA Compatibility", table 1; PyTorch's
release matrix (pytorch/pytorch#190355).
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import torch

# Oldest driver for a major version of CUDA, and a wheel that contains that version.
OLDEST_DRIVER = {13: 580, 12: 525}
WHEELS = {13: "cu130", 12: "cu126"}

# The version of the kernel's driver. Containers see this file even if they have no GPUs.
DRIVER_VERSION = Path("/proc/driver/nvidia/version")


def why_unusable() -> str | None:
    """What to tell the user if this machine has an NVIDIA GPU but torch.cuda is not available.

    None if there is no such GPU, or if CUDA_VISIBLE_DEVICES hides all of them.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    gpu = find_gpu()
    if gpu is None:
        return None
    name, driver = gpu
    return f"this machine has {name}, but torch cannot use it: {explain(driver)}"


def find_gpu() -> tuple[str, int | None] | None:
    """A GPU's name and the major version of its driver, None if unknown. None if there is no GPU.

    nvidia-smi knows both. Without it, the kernel's driver shows that there is one.
    """
    if shutil.which("nvidia-smi"):
        # A line per GPU: NVIDIA H100 80GB HBM3, 550.54.15
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        try:
            # With a faulty driver or GPU, nvidia-smi can hang.
            result = subprocess.run(query, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return "an NVIDIA driver", None
        if "No devices" in result.stdout:
            return None
        fields = result.stdout.split("\n")[0].split(", ")
        if result.returncode == 0 and len(fields) == 2:
            return fields[0], leading_number(fields[1])
        return "an NVIDIA driver", None  # which does not answer
    if device_files() or DRIVER_VERSION.exists():
        # NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024
        text = DRIVER_VERSION.read_text() if DRIVER_VERSION.exists() else ""
        version = re.search(r"Module.*?\s(\d+)\.\d", text)
        return "an NVIDIA GPU", int(version[1]) if version else None
    return None


def device_files() -> list[Path]:
    """The device files of the GPUs, like /dev/nvidia0."""
    return list(Path("/dev").glob("nvidia[0-9]*"))


def explain(driver: int | None) -> str:
    """Cause and remedy, for a driver of this major version."""
    # The causes that can be recognized come first: the wheel, the driver's age, the container. For
    # all others, CUDA itself says what is wrong.
    cuda = torch.version.cuda
    if cuda is None:
        return f"torch {torch.__version__} is a build without CUDA; {install_for(driver)}"
    needed = OLDEST_DRIVER.get(leading_number(cuda) or 0, 0)
    if driver and driver < needed:
        return (
            f"its driver {driver} is older than {needed}, which torch's CUDA {cuda} needs; "
            f"update the driver, or {install_for(driver)}"
        )
    if DRIVER_VERSION.exists() and not device_files():
        return "it is not visible here; start the container with its GPUs (docker run --gpus all)"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"{str(error).splitlines()[0]}; see what nvidia-smi says"
    return "its driver finds no GPU; see what nvidia-smi says"


def install_for(driver: int | None) -> str:
    """The command that installs this version of torch for a driver."""
    # 2.13.0+cpu -> 2.13.0
    version = torch.__version__.split("+")[0]
    # The newest CUDA comes first. An unknown driver is taken to be new.
    for cuda, oldest in OLDEST_DRIVER.items():
        if driver is None or driver >= oldest:
            index = f"https://download.pytorch.org/whl/{WHEELS[cuda]}"
            return f"pip install --force-reinstall torch=={version} --index-url {index}"
    return f"update the driver to {OLDEST_DRIVER[13]} or newer"


def too_old_for_torch(device: torch.device) -> str | None:
    """What to tell the user if torch has no kernels for a GPU as old as this one."""
    # For example ["sm_75", "sm_80", "sm_90"]; a ROCm build has other names.
    architectures = [re.fullmatch(r"sm_(\d+)a?", name) for name in torch.cuda.get_arch_list()]
    supported = [int(found[1]) for found in architectures if found]
    major, minor = torch.cuda.get_device_capability(device)
    # sm_75 is compute capability 7.5. Newer GPUs can run the kernels of older ones, so only the
    # lower bound is checked.
    if not supported or 10 * major + minor >= min(supported):
        return None
    return (
        f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, but torch's "
        f"CUDA {torch.version.cuda} has no kernels below {min(supported) / 10}; "
        f"{install_for(OLDEST_DRIVER[12])}"
    )


def leading_number(text: str) -> int | None:
    """550 for "550.54.15"."""
    found = re.match(r"\s*(\d+)", text)
    return int(found[1]) if found else None
