"""The computed memory of training against measured peaks, free memory, and the choice of B."""

import os
import re

import pytest
import torch
from conftest import ROOT, SMALL_RUN, command, ok, one_line
from torch.profiler import ProfilerActivity, profile

from common import memory
from common.console import UserError
from common.memory import TrainingMemory, choose_B, container_memory
from common.optim import LossScaler, make_adamw, make_muon, train_step
from common.runtime import Runtime
from model import GPT, GPTConfig

TOLERANCE = 0.06  # of the computed bytes of tensors, relative to their measured peak
GB = 10**9


def runtime(dtype: torch.dtype = torch.float32, device: str = "cpu", world_size=1) -> Runtime:
    return Runtime(torch.device(device), dtype, world_size=world_size)


def num_bytes(state) -> int:
    """Bytes of the tensors in nested dicts and lists."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    if isinstance(state, dict):
        return sum(map(num_bytes, state.values()))
    return sum(map(num_bytes, state)) if isinstance(state, list | tuple) else 0


def measured_peak(model: GPT, batch: list, muon: bool, rt: Runtime) -> int:
    """Bytes of all tensors at the peak of the second step, as PyTorch's allocator reports them."""
    make = make_muon if muon else make_adamw
    optimizer = make(model, 1e-4, 0.1, (0.9, 0.95), 1e-8)
    scaler = LossScaler(rt)
    train_step(model, optimizer, batch, 1e-4, 1.0, rt, scaler=scaler)
    before = num_bytes(list(model.parameters())) + num_bytes(optimizer.state_dict())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train_step(model, optimizer, batch, 1e-4, 1.0, rt, scaler=scaler)
    events = profiler.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    size = peak = before
    for change in sorted(changes, key=lambda event: event.start_ns()):
        size += change.nbytes()
        peak = max(peak, size)
    return peak


CASES = {
    "small": {},
    "deep": dict(n_layer=6),
    "wide, B 1": dict(n_embd=384, B=1),
    "wide, B 4": dict(n_embd=384),
    "large vocabulary": dict(vocab_size=20000),
    "many tokens": dict(vocab_size=4000, B=16),
    "short sequences": dict(T=64, B=32),
    "two micro-batches": dict(micro_steps=2),
    "bfloat16": dict(dtype=torch.bfloat16),
    "bfloat16, large vocabulary": dict(dtype=torch.bfloat16, vocab_size=4000, B=9),
    "bfloat16, dropout": dict(dtype=torch.bfloat16, dropout=0.1),
    "float16, two micro-batches": dict(dtype=torch.float16, micro_steps=2),
    "muon": dict(muon=True, n_embd=128, B=1),
    "activation checkpointing": dict(checkpointing=True, n_layer=8, n_embd=128),
    "dropout": dict(dropout=0.1),
    "post-norm": dict(norm="post"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_computed_memory_is_the_measured_peak(name):
    case = dict(B=4, T=256, micro_steps=1, dtype=torch.float32, muon=False, checkpointing=False)
    case |= dict(n_layer=2, n_head=4, n_embd=64, vocab_size=1000, block_size=256) | CASES[name]
    shape = {key: value for key, value in case.items() if key in GPTConfig.__dataclass_fields__}
    model = GPT(GPTConfig(**shape))
    model.activation_checkpointing = case["checkpointing"]
    rt = runtime(case["dtype"])
    tokens = torch.randint(0, case["vocab_size"], (case["micro_steps"], case["B"], case["T"]))
    measured = measured_peak(model, [(micro, micro) for micro in tokens], case["muon"], rt)
    estimate = TrainingMemory(
        model,
        case["T"],
        case["B"] * case["micro_steps"],
        rt,
        muon=case["muon"],
        activation_checkpointing=case["checkpointing"],
    )
    computed = estimate.permanent() + estimate.step(case["B"])
    assert computed == pytest.approx(measured, rel=TOLERANCE), (computed, measured)


@pytest.fixture(scope="module")
def gpt2() -> GPT:
    with torch.device("meta"):
        return GPT(GPTConfig())


def test_ranks_share_optimizer_states_but_not_weights_and_gradients(gpt2):
    num_params = sum(p.numel() for p in gpt2.parameters())
    alone = TrainingMemory(gpt2, 1024, 512, runtime())
    ranks = TrainingMemory(gpt2, 1024, 64, runtime(world_size=8), sharded=True)
    assert alone.step(8) == ranks.step(8)
    assert alone.permanent() - ranks.permanent() == pytest.approx(8 * num_params * 7 / 8)
    copying = TrainingMemory(gpt2, 1024, 512, runtime(), saves_during_training=True)
    assert copying.permanent() - alone.permanent() == 12 * num_params
    on_gpu = TrainingMemory(gpt2, 1024, 512, runtime(device="cuda"), saves_during_training=True)
    assert on_gpu.permanent() == alone.permanent(), "the copy is in host memory"


def test_the_largest_B_that_fits_is_chosen_or_named(gpt2):
    estimate = TrainingMemory(gpt2, 1024, 48, runtime())
    needs = {B: estimate.need(B) for B in (1, 2, 3, 4, 6, 8, 12, 16, 24, 48)}
    assert list(needs.values()) == sorted(needs.values())
    for B, need in needs.items():
        assert choose_B(0, need, estimate) == choose_B(B, need, estimate) == B
    assert choose_B(0, 10**15, estimate) == 48
    with pytest.raises(UserError, match=r"B 12 needs about .* GB .* largest B that fits is 8 \("):
        choose_B(12, needs[12] - 1, estimate)
    for B in (0, 1, 48):
        with pytest.raises(UserError, match="not even B 1 fits: lower T.*activation_checkpoint"):
            choose_B(B, needs[1] - 1, estimate)


# ---------------------------------------------------------------------------------------------
# Free memory


def write_group(folder, version: int, limit, usage: int, inactive: int, active: int = 0):
    folder.mkdir(parents=True, exist_ok=True)
    limit_name, usage_name, prefix = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        2: ("memory.max", "memory.current", ""),
    }[version]
    (folder / limit_name).write_text(f"{limit}\n")
    (folder / usage_name).write_text(f"{usage}\n")
    stat = f"anon 5\n{prefix}inactive_file {inactive}\n{prefix}active_file {active}\n"
    (folder / "memory.stat").write_text(stat)


def test_the_limit_of_a_container_counts(tmp_path):
    proc, sys = tmp_path / "proc", tmp_path / "sys"
    assert container_memory(proc, sys) == float("inf"), "not Linux"

    # Version 2: the group above has the lower limit; half of its use is cache.
    (proc / "self").mkdir(parents=True)
    (proc / "self/cgroup").write_text("0::/slurm/job_7/step_0\n")
    root = sys / "fs/cgroup"
    assert container_memory(proc, sys) == float("inf"), "no files"
    write_group(root / "slurm/job_7/step_0", 2, "max", 6 * GB, 3 * GB)
    write_group(root / "slurm/job_7", 2, 8 * GB, 6 * GB, 2 * GB, 1 * GB)
    assert container_memory(proc, sys) == 5 * GB
    write_group(root / "slurm/job_7", 2, 1 * GB, 6 * GB, 0)
    assert container_memory(proc, sys) == 0

    # Version 1, in a container whose path is that outside of it.
    (proc / "self/cgroup").write_text("7:cpu:/\n4:hugetlb,memory:/docker/7f3a\n0::/\n")
    write_group(root / "memory", 1, 4 * GB, 1 * GB, GB // 2)
    assert container_memory(proc, sys) == 3.5 * GB


def test_processes_of_a_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(memory, "container_memory", lambda: 8 * GB)
    available = type("Memory", (), dict(available=20 * GB))
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: available)
    assert memory.free_memory(runtime()) == 8 * GB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.free_memory(runtime()) == 2 * GB


# ---------------------------------------------------------------------------------------------
# train_gpt2.py


# Trains, and prints the resident memory that the run took in addition, and what was computed. The
# peak is not ru_maxrss, which a process inherits from the one that starts it.
MEASURE = """
import re, sys, psutil
from pathlib import Path
from common import console, memory
import train_gpt2

def remember(name, function, value):
    def wrapped(*args):
        seen[name] = value(*args)
        return function(*args)
    return wrapped

seen = {}
rss = lambda rt: psutil.Process().memory_info().rss
memory.free_memory = remember("before", memory.free_memory, rss)
memory.choose_B = remember("need", memory.choose_B, lambda B, free, estimate: estimate.need(B))
console.run_script(train_gpt2.main, console.parse_flags(train_gpt2.Config, ""))
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
print(f"measured {peak - seen['before']} computed {seen['need']}")
"""


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", "--activation_checkpointing", "--dropout 0.1"])
def test_the_allowance_covers_resident_memory(data_dir, tmp_path, more):
    (tmp_path / "measure.py").write_text(MEASURE)
    shape = "--n_layer 4 --n_head 4 --n_embd 256 --block_size 256 --T 256 --B 16"
    flags = f"{shape} --total_batch_size 8192 --max_steps 2 {more}".split()
    folders = ["--data_dir", data_dir, "--log_dir", tmp_path / "log"]
    script = [tmp_path / "measure.py", *folders, *SMALL_RUN, *flags]
    result = ok(command(*script, env=os.environ | dict(PYTHONPATH=str(ROOT))))
    found = re.search(r"measured (\d+) computed (\d+)", result.stdout)
    assert found
    measured, computed = map(int, found.groups())
    assert measured < computed < 1.6 * measured


@pytest.mark.slow
def test_a_run_that_does_not_fit_ends_before_it_starts(data_dir, tmp_path):
    """A model of 161 billion parameters: its weights alone would be 644 GB."""
    log_dir = tmp_path / "log"
    flags = ["--data_dir", data_dir, "--log_dir", log_dir, *SMALL_RUN]
    result = command("train_gpt2.py", *flags, "--n_embd", 8192, "--n_layer", 200)
    assert "B 4 needs about" in one_line(result)
    assert not (log_dir / "log.txt").exists()


@pytest.mark.slow
def test_B_0_chooses_a_micro_batch_and_resumes_with_it(data_dir, tmp_path):
    runs = {}
    for name, B in (("given", 16), ("chosen", 0)):
        log_dir = tmp_path / name
        flags = ["--data_dir", data_dir, "--log_dir", log_dir, *SMALL_RUN, "--B", B]
        result = ok(command("train_gpt2.py", *flags, "--max_steps", 2))
        runs[name] = torch.load(log_dir / "model_final.pt")
        assert re.search(
            "memory: B 16 needs about 0.3 GB per process, .* GB are free", result.stdout
        )
    assert runs["chosen"]["run"]["B"] == 16
    for key, tensor in runs["given"]["model"].items():
        assert torch.equal(tensor, runs["chosen"]["model"][key])

    # Twice as much would fit, but the numbers of another B differ in the last digits.
    flags = ["--data_dir", data_dir, "--log_dir", tmp_path / "resumed", *SMALL_RUN]
    ok(command("train_gpt2.py", *flags, "--B", 8, "--max_steps", 2))
    ok(command("train_gpt2.py", *flags, "--B", 0, "--max_steps", 3, "--resume"))
    assert torch.load(tmp_path / "resumed" / "model_final.pt")["run"]["B"] == 8
