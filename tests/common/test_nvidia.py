"""What is said about an NVIDIA GPU that torch cannot use, with an nvidia-smi made for the test."""

import os

import pytest
import torch
from conftest import command, one_line

from common import nvidia, runtime
from common.console import UserError

VERSION = torch.__version__.split("+")[0]
CU126 = f"torch=={VERSION} --index-url https://download.pytorch.org/whl/cu126"
CU130 = f"torch=={VERSION} --index-url https://download.pytorch.org/whl/cu130"


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A function that puts a program of this name, which prints `output`, on the PATH."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(nvidia, "DRIVER_VERSION", tmp_path / "version")

    def install(output: str, code: int = 0):
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\necho '{output}'\nexit {code}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    return install


@pytest.mark.parametrize(
    "cuda, driver, expected",
    [
        (None, "580.65.06", f"is a build without CUDA; pip install --force-reinstall {CU130}"),
        (None, "550.54.15", f"is a build without CUDA; pip install --force-reinstall {CU126}"),
        (None, "470.82.01", "is a build without CUDA; update the driver to 580 or newer"),
        ("13.0", "550.54.15", f"its driver 550 is older than 580.*or pip install .*{CU126}"),
        ("12.6", "470.82.01", "its driver 470 is older than 525, .*; update the driver"),
    ],
)
def test_the_remedy_fits_the_driver(nvidia_smi, monkeypatch, cuda, driver, expected):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    nvidia_smi(f"NVIDIA GeForce RTX 3090, {driver}")
    with pytest.raises(UserError, match=f"has NVIDIA GeForce RTX 3090, but .*{expected}"):
        runtime.choose_device("cuda", 0)


def test_other_causes_are_those_of_torch(nvidia_smi, monkeypatch):
    def init():
        raise RuntimeError("Unexpected error from cudaGetDeviceCount()\nmore lines")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    nvidia_smi("NVIDIA H100, 580.65.06")
    reason = nvidia.why_unusable()
    assert reason and "Unexpected error from cudaGetDeviceCount(); see what nvidia-smi" in reason
    nvidia_smi("Failed to initialize NVML: Driver/library version mismatch", code=18)
    assert "has an NVIDIA driver, but" in (nvidia.why_unusable() or "")


def test_a_gpu_without_nvidia_smi_is_found_by_its_driver(nvidia_smi, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(nvidia.shutil, "which", lambda name: None)
    assert nvidia.why_unusable() is None
    for kind in ("NVIDIA UNIX x86_64 Kernel Module ", "NVIDIA UNIX Open Kernel Module for x86_64"):
        nvidia.DRIVER_VERSION.write_text(f"NVRM version: {kind} 550.54.15  Tue Mar  5 22:23:56\n")
        assert nvidia.find_gpu() == ("an NVIDIA GPU", 550)
    nvidia.DRIVER_VERSION.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.1  Tue\n")
    assert "not visible here; start the container" in (nvidia.why_unusable() or "")


def test_no_gpu_and_hidden_gpus_are_not_mentioned(nvidia_smi, monkeypatch):
    nvidia_smi("No devices were found", code=6)
    assert nvidia.why_unusable() is None
    nvidia_smi("NVIDIA H100, 580.65.06")
    assert nvidia.why_unusable()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert nvidia.why_unusable() is None


@pytest.mark.parametrize("device, warnings", [("auto", 1), ("cpu", 0)])
def test_auto_warns_before_it_uses_the_cpu(nvidia_smi, tmp_path, device, warnings):
    nvidia_smi("Tesla T4, 550.54.15")
    folders = ["--data_dir", tmp_path, "--log_dir", tmp_path / "log"]
    result = command("train_gpt2.py", *folders, "--device", device)
    assert "holds no shards" in one_line(result)
    lines = [line for line in result.stdout.splitlines() if "running on the CPU" in line]
    assert len(lines) == warnings
    if lines:
        assert lines[0].startswith("warning: running on the CPU: this machine has Tesla T4, but ")
        assert CU126 in lines[0]


@pytest.mark.parametrize(
    "capability, expected",
    [
        ((7, 0), f"compute capability 7.0, .*no kernels below 7.5; pip install .*{CU126}"),
        ((7, 5), ""),
    ],
)
def test_a_gpu_that_torch_has_no_kernels_for_is_an_error(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90a"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100-SXM2-16GB")
    if expected:
        with pytest.raises(UserError, match=f"Tesla V100-SXM2-16GB has {expected}"):
            runtime.choose_device("auto", 0)
    else:
        assert runtime.choose_device("auto", 0) == torch.device("cuda", 0)
