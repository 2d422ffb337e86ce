"""The settings that libgomp reads when torch is loaded: in every script, and under torchrun."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

# Imports each script, in a fork, up to the point at which torch would be loaded.
PROBE = """
import os, runpy, sys
import matplotlib.figure, numpy, pyarrow, tiktoken, tqdm, tyro

class Finder:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            print(script, os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)

sys.path.insert(0, "")
sys.meta_path.insert(0, Finder)
for script in sys.argv[1:]:
    if os.fork() == 0:
        runpy.run_module(script, run_name="imported")
        print(script, "torch is not needed", flush=True)
        os._exit(0)
    os.wait()
"""


def environment(**settings) -> dict:
    env = {name: value for name, value in os.environ.items() if not name.startswith("GOMP")}
    return env | settings


def test_every_script_that_loads_torch_makes_the_settings_first():
    files = [
        path for folder in (".", "experiments", "bench") for path in ROOT.glob(f"{folder}/*.py")
    ]
    scripts = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in files
        if '__name__ == "__main__"' in path.read_text()
    ]
    command = [sys.executable, "-c", PROBE, *scripts]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    found = dict(line.split(" ", 1) for line in result.stdout.splitlines())
    assert set(found) == set(scripts), result.stderr
    assert found["train_gpt2"] == found["sample"] == found["experiments.norm_study"] == "10000"
    assert set(found.values()) == {"10000", "torch is not needed"}


def spin_count(*command, **settings) -> set[str]:
    """What libgomp says it spins, when a command is run with these settings."""
    env = environment(OMP_DISPLAY_ENV="verbose", **settings)
    result = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True
    )
    counts = set(re.findall(r"GOMP_SPINCOUNT = '(.*)'", result.stderr))
    if not counts:
        pytest.skip("this build of torch does not use libgomp")
    return counts


# Only the library, because loading all of torch takes seconds.
LOAD_LIBGOMP = """
import common.before_torch
import ctypes, importlib.util, pathlib
folder = importlib.util.find_spec("torch").submodule_search_locations[0]
for library in pathlib.Path(folder).parent.glob("torch*/lib*/libgomp*.so*"):
    ctypes.CDLL(str(library))
"""


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "10000"),
        (dict(OMP_NUM_THREADS="2"), "10000"),  # says nothing about waiting
        (dict(GOMP_SPINCOUNT="77"), "77"),
        (dict(OMP_WAIT_POLICY="PASSIVE"), "0"),
    ],
)
def test_libgomp_receives_them_unless_the_user_has_decided(settings, expected):
    assert spin_count("-c", LOAD_LIBGOMP, **settings) == {expected}


@pytest.mark.slow
def test_workers_of_torchrun_too(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{LOAD_LIBGOMP}")
    counts = spin_count("-m", "torch.distributed.run", "--nproc_per_node=2", script)
    # The launcher itself, which computes nothing, has libgomp's default.
    assert "10000" in counts
