"""What this process runs on: device, dtype, rank and world size; reductions over the ranks, seeds, stop signals.

A stage that computes calls `start(device, dtype)` first. Under `torchrun` the ranks find each other, NCCL on GPUs and
Gloo on CPUs.
"""

import os
import signal
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from common.console import UserError, say

Device = str  # "auto", or what torch.device takes: cuda, cuda:1, mps, cpu
Dtype = Literal[
    "auto", "float32", "tf32", "bfloat16"
]  # tf32: float32 that NVIDIA GPUs multiply in TF32
# Dense bf16 FLOP/s from the vendors' datasheets, by a part of the device's name. More special names come first.
PEAK_FLOPS = {
    "GB200": 2.5e15, "B200": 2.25e15, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "A100": 312e12, "A10G": 70e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


@dataclass
class Runtime:
    device: torch.device
    dtype: torch.dtype  # of matrix products; weights and optimizer states are float32
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self):
        """Context in which matrix products run in `dtype`."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def print(self, *words):
        """Print once, whatever the number of ranks, and above the progress bar if there is one."""
        if self.is_main:
            say(*words)

    def sum(self, values: list[float] | torch.Tensor) -> torch.Tensor:
        """Sum over the ranks of a few numbers, in float64 where the device has it."""
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        total = torch.as_tensor(values, dtype=wide, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total

    def barrier(self):
        if self.world_size > 1:
            self.sum([0.0]).cpu()

    def seed(self, *numbers: int):
        """Make the random numbers that follow a function of these numbers and the rank alone."""
        torch.manual_seed(hash((*numbers, self.rank)) % 2**63)

    def peak_flops(self) -> float | None:
        """Dense bf16 FLOP/s of this rank's GPU by its datasheet, None where it is not known."""
        if self.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.device)
        return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)

    def peak_memory(self) -> int:
        """Most bytes that this rank has held so far: of GPU memory, on a CPU of resident memory."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def start(device: Device = "auto", dtype: Dtype = "auto", timeout: float = 600) -> Runtime:
    """Choose device and dtype, and join the other ranks if `torchrun` started this process.

    A rank that another one keeps waiting for `timeout` seconds gives up.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    chosen = choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    if world_size > 1 and not dist.is_initialized():
        check_launcher()
        end_with_launcher()
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    return Runtime(
        chosen, choose_dtype(chosen, dtype), int(os.environ.get("RANK", 0)), local_rank, world_size
    )


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def check_launcher():
    """Refuse restarts that can't work: workers that share torchrun's store read the addresses of those before them."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if restarts and os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        raise UserError(
            "torchrun --max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment"
        )


def end_with_launcher():
    """End this process when `torchrun`, which watches over it, is gone: the others notice, and go on without it."""
    launcher = os.getppid()

    def watch():
        while os.getppid() == launcher:
            time.sleep(1)
        print("error: torchrun is gone", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def restarted() -> bool:
    """Whether `torchrun --max-restarts` started this process in place of one that failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def choose_device(name: Device, local_rank: int) -> torch.device:
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r} is unknown: auto, cuda, mps or cpu") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "device cuda is not available: no NVIDIA GPU, no driver, or a CPU build of torch"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device mps is not available here")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local_rank)
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise UserError(
            f"{device} does not exist: there are {torch.cuda.device_count()} GPUs; start fewer processes"
        )
    return device


def choose_dtype(device: torch.device, dtype: Dtype) -> torch.dtype:
    if dtype == "auto":
        dtype = "bfloat16" if has_fast_bf16(device) else "float32"
    return torch.bfloat16 if dtype == "bfloat16" else torch.float32


def has_fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    # AMX, or AMD's AVX512_BF16; Intel's AVX512_BF16 alone is no faster than float32.
    cpu = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(
        cpu.get("amx_bf16") or (cpu.get("avx512_bf16") and "AMD" in cpu.get("cpu_name", ""))
    )


class StopSignal:
    """SIGTERM and Ctrl-C as a wish to stop after this step; a second one, more than 5 s later, ends the process.

    `torchrun` forwards a Ctrl-C that its children have already had from the terminal, hence the 5 s. The signal is
    noticed by a thread, so that this works while the main thread waits inside a kernel or a collective.
    """

    def __enter__(self):
        self.number = 0  # the signal that asked, 0 for none
        reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        self.former = {
            n: signal.signal(n, lambda *_: None) for n in (signal.SIGTERM, signal.SIGINT)
        }
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()
        return self

    def __exit__(self, *_):
        for number, handler in self.former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        os.close(self.writer)

    def _watch(self, reader: int):
        first = 0.0
        while numbers := os.read(reader, 16):
            for number in numbers:
                if not self.number:
                    first = time.monotonic()
                    self.number = number
                elif time.monotonic() - first > 5:
                    os._exit(128 + number)
        os.close(reader)


def leave():
    """The end of a run, all ranks together."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
