"""What a process runs on: device, dtype, rank and world size; seeds, reductions, stop signals.

A stage that computes calls `start(device, dtype)` first. Under `torchrun` this also joins the
ranks: with NCCL on GPUs, with Gloo on CPUs.
"""

import atexit
import hashlib
import os
import signal
import socket
import sys
import threading
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

from common import nvidia
from common.console import Dtype, UserError, say

# Dense bf16 FLOP/s (float16 before Ampere) from the vendors' datasheets, by a part of the device's
# name. The first match counts, so more specific names come first.
PEAK_FLOPS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100-PCIE": 112e12,
    "V100-SXM2": 125e12,
    "Tesla T4": 65e12,
}


@dataclass
class Runtime:
    """The device, the dtype and the place of one process among the ranks."""

    device: torch.device
    dtype: torch.dtype  # of matrix products; weights and optimizer states are float32
    rank: int = 0
    local_rank: int = 0  # rank among the processes of this machine
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def dtype_name(self) -> str:
        """The name of the dtype as in Dtype, without "auto"."""
        # TF32 is no dtype of torch: `start` turns it on by this precision.
        is_tf32 = torch.get_float32_matmul_precision() == "high"
        if self.dtype == torch.float32 and self.device.type == "cuda" and is_tf32:
            return "tf32"
        return str(self.dtype).removeprefix("torch.")

    @property
    def runs_ahead(self) -> bool:
        """Whether Python can start more work on the device while it computes."""
        return self.device.type == "cuda"

    def autocast(self):
        """Context in which matrix products run in `dtype`."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def print(self, *words):
        """Print on rank 0 only, above the progress bar if there is one."""
        if self.is_main:
            say(*words)

    def sum(self, values: list[float] | torch.Tensor) -> torch.Tensor:
        """Sum a few numbers over the ranks, in float64 where the device has it."""
        # A float32 represents whole numbers exactly only up to 2**24, too few for counts of tokens.
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        total = torch.as_tensor(values, dtype=wide, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total

    def min(self, value: float) -> float:
        """The smallest of the ranks' values."""
        if self.world_size == 1:
            return value
        smallest = torch.tensor(value, dtype=torch.float32, device=self.device)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
        return float(smallest)

    def barrier(self):
        """Wait until all ranks have come to this point."""
        if self.world_size > 1:
            # On a GPU, a collective only joins the queue. Copying its result to the CPU waits for
            # it.
            self.sum([0.0]).cpu()

    def seed(self, *numbers: int):
        """Make the next random numbers a function of `numbers` and the rank alone."""
        torch.manual_seed(mixed_seed(*numbers, self.rank))

    def peak_flops(self) -> float | None:
        """Dense 16-bit FLOP/s of this rank's GPU by its datasheet; None if unknown."""
        if self.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.device)
        return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)

    def peak_memory(self) -> int:
        """Peak memory of this rank so far, in bytes: GPU memory, or resident memory on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            import resource
        except ImportError:  # on Windows
            memory = psutil.Process().memory_info()
            return getattr(memory, "peak_wset", memory.rss)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def mixed_seed(*numbers: int) -> int:
    """A seed of 63 bits for each sequence of integers: the beginning of its BLAKE2 digest.

    Sequences that differ at all have unrelated seeds, unlike sums (42 + 1 is also 41 + 2). The
    result does not depend on Python's version or platform, unlike hash().
    """
    text = " ".join(str(int(number)) for number in numbers)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    # 63 bits fit into a signed int64.
    return int.from_bytes(digest, "little") >> 1


# ---------------------------------------------------------------------------------------------
# Start and end of a process


def start(device: str = "auto", dtype: Dtype = "auto", timeout: float = 600) -> Runtime:
    """Choose device and dtype, and join the other ranks if `torchrun` started this process.

    `device` is "auto" or what torch.device accepts (cuda, cuda:1, mps, cpu). A rank that waits for
    another one longer than `timeout` seconds gives up.
    """
    # torchrun sets these variables. Without them, the process is alone.
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))

    # Running on the CPU next to a GPU is slow, and rarely what the user wants.
    chosen = choose_device(device, local_rank)
    if device == "auto" and chosen.type == "cpu" and rank == 0:
        reason = nvidia.why_unusable()
        if reason:
            say(f"warning: running on the CPU: {reason} (--device cpu silences this warning)")

    # NCCL uses the current device, and it must be this rank's before the ranks are joined.
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")

    # A process that calls `start` twice joins the others only once.
    if world_size > 1 and not dist.is_initialized():
        join(chosen, timeout)

    return Runtime(chosen, choose_dtype(chosen, dtype), rank, local_rank, world_size)


def join(device: torch.device, timeout: float):
    """Join the other ranks, by NCCL on GPUs and by gloo on CPUs. `timeout` as in `start`."""
    check_launcher()
    end_with_launcher()
    backend = "nccl" if device.type == "cuda" else "gloo"
    # gloo's threads end with the last reference to the process group. A rank whose threads outlive
    # the interpreter may abort although its work is done. DDP imports this module, whose functions
    # keep the group of that moment as a default argument: import it while there is none.
    from torch.distributed.nn import functional  # noqa: F401

    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    if backend == "gloo":
        # DDP's reference, in C++, holds Python's lock while it waits for the threads, and a thread
        # that is about to free a tensor waits for the lock: a deadlock. A reference in Python
        # releases the lock first, so the last one is this: `clear` drops it at exit, when the model
        # is gone.
        atexit.register([dist.group.WORLD].clear)


def leave():
    """End a run, all ranks together."""
    if dist.is_initialized():
        # A rank that ends early would break the connections that slower ranks still use.
        dist.barrier()
        dist.destroy_process_group()


def restarted() -> bool:
    """Whether `torchrun --max-restarts` started this process to replace a failed one."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def check_launcher():
    """Reject restarts that can't work.

    Restarted workers that share torchrun's store read the addresses of the dead workers, and hang.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if restarts and os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        raise UserError(
            "torchrun --max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment"
        )


def end_with_launcher():
    """End this process when `torchrun`, its parent, is gone.

    The ranks on other machines notice that, and can continue without this one.
    """
    launcher = os.getppid()

    # A process whose parent has ended gets another parent.
    def watch():
        while os.getppid() == launcher:
            time.sleep(1)
        print("error: torchrun is gone", file=sys.stderr, flush=True)
        # sys.exit would only end this thread.
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ---------------------------------------------------------------------------------------------
# Device and dtype


def choose_device(name: str, local_rank: int) -> torch.device:
    """The device of that name, or the first available of cuda, mps and cpu for "auto"."""
    # torch warns of an old driver itself, but only of that, and in several lines.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        has_cuda = torch.cuda.is_available()

    if name == "auto":
        if has_cuda:
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
        else:
            name = "cpu"

    # torch knows the syntax of device names, for example cuda:1.
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r} is unknown: use auto, cuda, mps or cpu") from error

    # Check that the device exists, and that this build of torch has kernels for it.
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device mps is not available on this machine")
    if device.type == "cuda":
        if not has_cuda:
            reason = nvidia.why_unusable() or "this machine has no NVIDIA GPU, or no driver for it"
            raise UserError(f"device cuda is not available: {reason}")
        # Each rank of a machine has a GPU of its own.
        if device.index is None:
            device = torch.device("cuda", local_rank)
        num_gpus = torch.cuda.device_count()
        if device.index >= num_gpus:
            raise UserError(f"{device} does not exist: {num_gpus} GPUs found; use fewer processes")
        too_old = nvidia.too_old_for_torch(device)
        if too_old:
            raise UserError(too_old)
    return device


def choose_dtype(device: torch.device, dtype: Dtype) -> torch.dtype:
    """The dtype of that name. For "auto": bfloat16 where the hardware is fast at it, float16 on
    older CUDA GPUs, else float32."""
    if dtype == "auto":
        if has_fast_bf16(device):
            return torch.bfloat16
        # float16 is the only fast type of these GPUs. It needs loss scaling.
        return torch.float16 if device.type == "cuda" else torch.float32
    return torch.float32 if dtype == "tf32" else getattr(torch, dtype)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether matrix products are faster in bfloat16 than in float32."""
    if device.type == "cuda":  # Ampere, and everything newer
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    # On CPUs: AMX, or AMD's AVX512_BF16. Intel's AVX512_BF16 alone is no faster than float32.
    cpu = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    is_amd = "AMD" in cpu.get("cpu_name", "")
    return bool(cpu.get("amx_bf16") or (cpu.get("avx512_bf16") and is_amd))


# ---------------------------------------------------------------------------------------------
# Stop signals


class StopSignal:
    """Turns a signal to stop into a request to stop after the current step.

    Such signals are Ctrl-C, SIGTERM, SIGHUP (the terminal was closed) and SIGUSR1 (a scheduler's
    warning). One that the parent told us to ignore, as nohup does with SIGHUP, stays ignored.

        with StopSignal() as stop:
            while not stop.number: ...      # the signal's number, 0 if none has come

    A second signal more than 5 seconds later ends the process at once. (`torchrun` forwards a
    Ctrl-C that the workers have already received from the terminal, hence the 5 seconds.)

    Python runs signal handlers in the main thread, between two bytecodes: too late if that thread
    waits inside a kernel or a collective. So Python's C handler writes the signal's number into a
    socket (on Windows it cannot write into a pipe), and a thread reads it from there.
    """

    def __enter__(self):
        self.number = 0
        reader, self.writer = socket.socketpair()
        # Python demands a non-blocking socket: a signal handler must never wait.
        self.writer.setblocking(False)
        signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)

        # The C handler writes only for signals that have a handler in Python, hence one that does
        # nothing. It also replaces the default reactions: KeyboardInterrupt, or the end of the
        # process.
        self.old_handlers = {}
        for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
            number = getattr(signal, name, None)  # Windows lacks the last two
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                self.old_handlers[number] = signal.signal(number, lambda *_: None)
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()
        return self

    def __exit__(self, *_):
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
        # A closed writer ends the thread: its `recv` then returns no bytes.
        signal.set_wakeup_fd(-1)
        self.writer.close()

    def _watch(self, reader: socket.socket):
        # Each byte is the number of a signal.
        first_time = 0.0
        while numbers := reader.recv(16):
            for number in numbers:
                if not self.number:
                    first_time = time.monotonic()
                    self.number = number
                elif time.monotonic() - first_time > 5:
                    # The shells' exit code for a program that a signal has ended.
                    os._exit(128 + number)
        reader.close()
