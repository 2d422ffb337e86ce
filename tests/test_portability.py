"""The scripts without what Windows and macOS lack: fcntl, resource, some signals, and more.

This is no test on these systems, but it finds what would not even start there.
"""

import pytest
from conftest import SMALL_RUN, command, ok


def without_posix(*words) -> str:
    return ok(command("tests/without_posix.py", *words)).stdout


def test_every_module_can_be_imported():
    imported = without_posix("modules").split()
    assert {"train_gpt2", "fineweb", "common.runtime", "experiments.sweep"} <= set(imported)
    assert len(imported) > 40


@pytest.mark.slow
def test_training_and_sampling_work(data_dir, tmp_path):
    log_dir = tmp_path / "log"
    train = ["train_gpt2.py", "--data_dir", data_dir, "--log_dir", log_dir, *SMALL_RUN]
    assert "done: 3 steps" in without_posix(*train, "--max_steps", 3)
    model = ["--model", log_dir / "model_final.pt", "--dtype", "float32"]
    assert "def" in without_posix("sample.py", *model, "--prompt", "def", "--max_tokens", 5)
