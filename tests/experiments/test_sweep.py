"""Code shared by the studies: runs in parallel, results that survive a stop, wrong flags.

The runs are small scripts in place of train_gpt2.py, so that these tests take little time.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from common.console import UserError, lock_folder
from common.optim import Diverged
from common.shards import Shards
from experiments import sweep
from experiments.flags import SweepConfig
from experiments.sweep import Run, StudyFolder


@pytest.fixture
def study(tmp_path) -> StudyFolder:
    return StudyFolder(tmp_path / "study", dict(T=64))


def make_run(study: StudyFolder, name: str, code: str) -> Run:
    """A run of a script with this code, in a folder of its own with a checkpoint."""
    folder = study.path / "runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "script.py").write_text(code)
    (folder / "model_00001.pt").write_text("a checkpoint")
    return Run(name, [folder / "script.py", "--x", 1], folder / "output.txt")


def run_all(study: StudyFolder, *runs: Run, num_parallel: int = 2, read=None):
    read = read or (lambda run, diverged: dict(diverged=diverged is not None))
    study.run_all(list(runs), read, "cpu", num_parallel, "test")


def test_results_are_saved_and_checkpoints_removed(study):
    runs = [make_run(study, name, "print('hello')") for name in ("a", "b", "c")]
    run_all(study, *runs)
    saved = json.loads((study.path / "results.json").read_text())
    assert saved == dict(settings=dict(T=64)) | {name: dict(diverged=False) for name in "abc"}
    assert not list(study.path.rglob("*.pt"))
    command, output = (study.path / "runs" / "a" / "output.txt").read_text().splitlines()
    assert command.startswith("$ ") and command.endswith("script.py --x 1")
    assert output == "hello"


def test_finished_runs_are_not_repeated(study):
    """But their checkpoints are removed: the study may have been killed before it did so."""
    study.results["a"] = "known"
    run_all(study, make_run(study, "a", "exit(1)"), make_run(study, "b", ""))
    assert study.results["a"] == "known"
    assert study.results["b"] == dict(diverged=False)
    assert not list(study.path.rglob("*.pt"))


def test_divergence_is_recognized_by_the_exit_code(study):
    code = "import sys; print('error: anything', file=sys.stderr); sys.exit(3)"
    errors = {}

    def read(run: Run, diverged: Diverged | None) -> dict:
        errors[run.name] = diverged
        return {}

    run_all(study, make_run(study, "bad", code), make_run(study, "good", ""), read=read)
    assert errors["good"] is None
    assert isinstance(errors["bad"], Diverged)
    assert "failed: anything; its output is in" in str(errors["bad"])


def test_a_failing_run_ends_the_study_with_its_last_error(study):
    failing = make_run(study, "failing", "print('error: first'); print('error: second'); exit(1)")
    failing.log.write_text("error: of an earlier attempt\n")
    with pytest.raises(UserError, match="script.py failed: second; its output is in .*output.txt"):
        run_all(study, failing)
    silent = make_run(study, "silent", "exit(7)")
    with pytest.raises(UserError, match="failed: exit code 7"):
        run_all(study, silent)
    assert study.results.keys() == {"settings"}
    # The checkpoints of runs that are not finished stay.
    assert len(list(study.path.rglob("*.pt"))) == 2


# Writes a file when it is ready, and another one when it gets SIGTERM.
WAITING = """
import pathlib, signal, sys, time
folder = pathlib.Path(__file__).parent
def stop(*_):
    (folder / "stopped").touch()
    sys.exit(1)
signal.signal(signal.SIGTERM, stop)
(folder / "ready").touch()
time.sleep(60)
"""
# Ends when the two waiting scripts are ready.
AFTER_THE_OTHERS = """
import pathlib, time
runs = pathlib.Path(__file__).parent.parent
while len(list(runs.glob("*/ready"))) < 2:
    time.sleep(0.05)
"""


def test_an_interrupted_study_stops_its_runs(study):
    def interrupt(run: Run, diverged: Diverged | None) -> dict:
        raise KeyboardInterrupt

    runs = [make_run(study, f"waiting_{n}", WAITING) for n in range(2)]
    runs.append(make_run(study, "quick", AFTER_THE_OTHERS))
    never = make_run(study, "never", "")  # all three places are taken
    with pytest.raises(KeyboardInterrupt):
        run_all(study, *runs, never, num_parallel=3, read=interrupt)
    assert len(list(study.path.rglob("stopped"))) == 2
    assert study.results.keys() == {"settings"}


def test_a_folder_in_use_is_refused(study):
    with pytest.raises(UserError, match="study is in use by process"):
        StudyFolder(study.path, dict(T=64))
    study.lock.close()
    StudyFolder(study.path, dict(T=64))


def test_a_run_that_outlived_its_study_is_not_repeated(study, data_dir):
    """It holds the lock of its own folder, so the next study stops with its name."""
    flags = dict(n_layer=1, n_head=1, n_embd=8, B=1, max_steps=1, device="cpu", seeds=(1,))
    config = SweepConfig(out_dir=str(study.path), **flags)
    run = sweep.train_run(config, "a", data_dir, T=8, total_batch_size=8, max_lr=1e-3, seed=1)
    run.folder.mkdir(parents=True)
    expected = "train_gpt2.py failed: .*runs/a is in use by process"
    with lock_folder(run.folder), pytest.raises(UserError, match=expected):
        run_all(study, run)


def test_files_of_a_stopped_study_are_not_taken_for_those_of_another(study):
    """The settings are saved at the beginning, not with the first result."""
    study.lock.close()
    with pytest.raises(UserError, match="holds a study with T=64, not 128: choose another"):
        StudyFolder(study.path, dict(T=128))


@pytest.mark.parametrize("text", ["{", "[1]", '{"settings": 1}'])
def test_a_damaged_file_is_refused(study, text):
    study.lock.close()
    study.file.write_text(text)
    with pytest.raises(UserError, match="results.json is damaged"):
        StudyFolder(study.path, dict(T=64))


def test_once_computes_only_what_is_not_known(study):
    study.once("x", lambda: 1)
    assert study.once("x", lambda: 2) == 1
    assert json.loads(study.file.read_text())["x"] == 1


def test_cores_are_divided_between_runs(monkeypatch):
    monkeypatch.setattr(sweep, "num_cores", lambda: 8)
    assert sweep.device_envs(3, "cpu") == [dict(OMP_NUM_THREADS="2")] * 3
    assert sweep.device_envs(0, "cpu") == [dict(OMP_NUM_THREADS="1")] * 8


def test_gpus_are_shared_in_turn(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def gpus(num_parallel: int, device: str) -> list[str]:
        envs = sweep.device_envs(num_parallel, device)
        return [env["CUDA_VISIBLE_DEVICES"] for env in envs]

    assert gpus(0, "auto") == ["0", "1"]
    assert gpus(3, "cuda") == ["0", "1", "0"]
    assert gpus(0, "cuda:1") == ["1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert gpus(0, "cuda:1") == ["7"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(n_head=3, n_embd=32), "n_embd 32 is not divisible by n_head 3"),
        (dict(seeds=()), "seeds is .* all different"),
        (dict(learning_rates=(1e-3, 1e-3)), "learning_rates is .* all different"),
        (dict(learning_rates=(0.0,)), "give finite values above 0"),
        (dict(learning_rates=(float("nan"),)), "give finite values above 0"),
        (dict(seeds=(1, -1)), "seeds is .* must be at least 0"),
        (dict(max_steps=0), "max_steps is 0, must be at least 1"),
    ],
)
def test_wrong_flags_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        SweepConfig(**flags)


def test_read_stream_ignores_half_a_line(tmp_path):
    (tmp_path / "log.txt").write_text("0 val 6.5\n1 train 6.0\n2 val 5.5\n3 val")
    assert sweep.read_stream(tmp_path, "val") == ([0, 2], [6.5, 5.5])
    assert sweep.read_stream(tmp_path / "none", "val") == ([], [])


def make_shards(folder: Path, *lengths: int) -> Shards:
    """Shards that contain the numbers 0, 1, 2, ..., one after the other."""
    paths = [folder / f"val_{n}.npy" for n in range(len(lengths))]
    ends = np.cumsum(lengths)
    for path, length, end in zip(paths, lengths, ends):
        np.save(path, np.arange(end - length, end, dtype=np.uint16))
    return Shards("val", paths, list(lengths), vocab_size=100)


def test_windows_are_spread_over_a_shard(tmp_path):
    shards = make_shards(tmp_path, 12)
    x, y = sweep.read_windows(shards, count=3, T=3)
    assert x.tolist() == [[0, 1, 2], [4, 5, 6], [8, 9, 10]]
    assert y.tolist() == [[1, 2, 3], [5, 6, 7], [9, 10, 11]]
    with pytest.raises(UserError, match="lower T"):
        sweep.read_windows(shards, count=3, T=12)


def test_windows_are_spread_over_all_shards(tmp_path):
    """Also if some are too short for a window; none spans two shards."""
    shards = make_shards(tmp_path, 2, 12, 3, 12)
    x, _ = sweep.read_windows(shards, count=4, T=3)
    assert x[:, 0].tolist() == [2, 7, 19, 25]
    every, _ = sweep.read_windows(shards, count=18, T=3)
    assert every[:, 0].tolist() == [*range(2, 11), *range(17, 26)]


def test_mean_and_deviation():
    assert sweep.mean_and_deviation([1.0, 3.0]) == "2.000 ± 1.414"
    assert sweep.mean_and_deviation([1.0], digits=1) == "1.0 ± 0.0"
