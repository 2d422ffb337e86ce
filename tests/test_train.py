"""Pretraining as a person runs it: by command, in one process or several, killed and resumed."""

import json
import math
import os
import platform
import random
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL_RUN, command, ok, one_line

import train_gpt2
from common import checkpoint, console
from common.console import UserError
from common.runtime import StopSignal

STEPS = 30
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def arguments(data_dir, log_dir, *more) -> list:
    return [
        "train_gpt2.py",
        "--data_dir",
        data_dir,
        "--log_dir",
        log_dir,
        *SMALL_RUN,
        "--max_steps",
        STEPS,
        *more,
    ]


def train(data_dir, log_dir, *more, **kwargs) -> subprocess.CompletedProcess:
    return command(*arguments(data_dir, log_dir, *more), **kwargs)


def train_here(data_dir, log_dir, *more):
    """The same in this process: no seconds spent on starting another."""
    import tyro

    words = [str(word) for word in arguments(data_dir, log_dir, *more)[1:]]
    train_gpt2.main(tyro.cli(train_gpt2.Config, args=words))


def launch(words, launcher=(sys.executable,)) -> subprocess.Popen:
    return subprocess.Popen(
        [*launcher, *map(str, words)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for_step(log_dir: Path, step: int, process: subprocess.Popen):
    deadline = time.monotonic() + 60
    while not any(s >= step for s, _ in stream(log_dir, "train")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def stream(log_dir: Path, name: str) -> list[tuple[int, float]]:
    path = log_dir / "log.txt"
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return [(int(line[0]), float(line[2])) for line in lines if len(line) == 3 and line[1] == name]


def losses(log_dir: Path) -> list[float]:
    steps, values = zip(*stream(log_dir, "train"))
    assert list(steps) == list(range(len(steps))), "every step stands in the log once, in order"
    return list(values)


def weights(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def assert_same_bits(a: Path, b: Path):
    a, b = weights(a), weights(b)
    assert a["step"] == b["step"]
    for name in a["model"]:
        assert torch.equal(a["model"][name], b["model"][name]), name
    for key, state in a["optimizer"]["state"].items():
        for name, tensor in state.items():
            assert torch.equal(tensor, b["optimizer"]["state"][key][name]), (key, name)


@pytest.fixture(scope="module")
def reference(data_dir, tmp_path_factory) -> Path:
    """An undisturbed run of one process."""
    log_dir = tmp_path_factory.mktemp("reference") / "log"
    result = ok(
        train(
            data_dir, log_dir, "--sample_every", 15, "--checkpoint_every", 10, "--rolling_every", 4
        )
    )
    (log_dir / "screen.txt").write_text(result.stdout)
    return log_dir


def test_a_run_leaves_what_the_design_says(reference):
    names = {path.name for path in reference.iterdir()} - {"screen.txt", "lock"}
    logs = {"config.json", "log.txt", "metrics.jsonl"}
    assert names == logs | {"model_00010.pt", "model_00020.pt", "model_final.pt"}
    assert losses(reference)[-1] < losses(reference)[0] - 0.2
    assert [step for step, _ in stream(reference, "val")] == [0, 10, 20, 30]
    records = [json.loads(line) for line in (reference / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(STEPS + 1))
    assert {"loss", "lr", "grad_norm", "ms", "tokens_per_sec", "mfu", "memory"} <= records[3].keys()
    assert records[10]["val"] == pytest.approx(dict(stream(reference, "val"))[10], abs=1e-6)
    assert len(records[15]["samples"]) == 4
    config = json.loads((reference / "config.json").read_text())
    assert config["constants"]["max_lr"] == 1e-3
    assert config["data"]["source"] == "text"
    final = weights(reference / "model_final.pt")
    assert final["step"] == STEPS
    assert {"model", "config", "tokenizer", "step", "optimizer", "scaler", "run"} == final.keys()
    assert final["scaler"] == {}
    screen = (reference / "screen.txt").read_text()
    assert "> Hello, I'm a language model," in screen
    for word in ("tokens/s", "validation loss", "best", "model_final.pt", "metrics.jsonl"):
        assert word in screen.splitlines()[-2] + screen.splitlines()[-1]


def test_the_learning_rate_warms_up_and_follows_a_cosine(reference):
    rates = [
        json.loads(line).get("lr")
        for line in (reference / "metrics.jsonl").read_text().splitlines()
    ]
    assert rates[0] == pytest.approx(1e-3 / 4)
    assert rates[3] == pytest.approx(1e-3)
    halfway = 4 + (STEPS - 4) // 2
    assert rates[halfway] == pytest.approx((1e-3 + 1e-4) / 2)
    assert rates[29] == pytest.approx(
        1e-4 + 0.5 * (1e-3 - 1e-4) * (1 + math.cos(math.pi * 25 / 26))
    )


def test_the_learning_rate_may_fall_in_a_straight_line(data_dir, tmp_path):
    flags = ("--lr_decay", "linear", "--min_lr", "0", "--max_steps", "12")
    train_here(data_dir, tmp_path / "log", *flags)
    expected = [1e-3 * part for part in (1 / 4, 2 / 4, 3 / 4, 1)]  # warmup
    expected += [1e-3 * (8 - n) / 8 for n in range(8)]
    assert list(rates(tmp_path / "log").values()) == pytest.approx(expected)


@pytest.mark.parametrize("B", [8, 16])
def test_accumulation_does_not_change_the_losses(data_dir, tmp_path, reference, B):
    train_here(data_dir, tmp_path / "log", "--B", B)
    assert losses(tmp_path / "log") == pytest.approx(losses(reference), abs=1e-4)


def test_two_processes_draw_the_same_curve_as_one(data_dir, tmp_path, reference):
    process = launch(arguments(data_dir, tmp_path / "log"), TORCHRUN)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert losses(tmp_path / "log") == pytest.approx(losses(reference), abs=1e-4)
    val, expected = stream(tmp_path / "log", "val"), stream(reference, "val")
    assert [v for _, v in val] == pytest.approx([v for _, v in expected], abs=1e-4)
    assert out.count("step 0 | loss") == 1, "only rank 0 speaks"


def kill_and_resume(data_dir, log_dir, kills, seed, *more):
    """Kill -9 at random moments until enough; then let the run finish."""
    rng = random.Random(seed)
    arguments_ = arguments(
        data_dir, log_dir, "--rolling_every", 1, "--resume", "--max_steps", 120, *more
    )
    done = 0
    while done < kills:
        process = launch(arguments_)
        have = max((step for step, _ in stream(log_dir, "train")), default=-1)
        wait_for_step(log_dir, min(have + 1 + rng.randrange(6), 110), process)
        time.sleep(
            rng.random() * 0.05
        )  # at any place of the step, often while a checkpoint is written
        process.kill()
        process.communicate()
        done += 1
    ok(command(*arguments_))
    assert not list(log_dir.glob("*.tmp"))
    assert len(losses(log_dir)) == 120


@pytest.mark.parametrize(
    "kills, dtype",
    [
        (10, "float32"),
        (10, "bfloat16"),
        (10, "float16"),
    ],
)
@pytest.mark.slow
def test_killed_at_random_moments_the_weights_are_the_same_to_the_bit(
    data_dir, tmp_path, kills, dtype
):
    more = ["--dtype", dtype, "--dropout", 0.1]
    ok(train(data_dir, tmp_path / "whole", "--max_steps", 120, *more))
    kill_and_resume(data_dir, tmp_path / "killed", kills, kills, *more)
    assert_same_bits(tmp_path / "whole" / "model_final.pt", tmp_path / "killed" / "model_final.pt")
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")


def test_sigterm_writes_a_checkpoint_and_the_run_goes_on(data_dir, tmp_path, reference):
    log_dir = tmp_path / "log"
    more = ("--sample_every", 15, "--checkpoint_every", 10, "--rolling_every", 4)
    process = launch(arguments(data_dir, log_dir, *more))
    wait_for_step(log_dir, 5, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM, out + err
    assert "stopped: saved" in out
    assert "Traceback" not in err
    stopped_at = len(losses(log_dir))
    assert weights(log_dir / f"model_{stopped_at:05d}.pt")["step"] == stopped_at
    ok(train(data_dir, log_dir, "--resume", *more))
    assert_same_bits(reference / "model_final.pt", log_dir / "model_final.pt")
    assert stream(log_dir, "val") == stream(reference, "val")


@pytest.mark.slow
def test_sigterm_to_torchrun_stops_all_ranks_at_the_same_step(data_dir, tmp_path):
    log_dir = tmp_path / "log"
    process = launch(
        arguments(data_dir, log_dir, "--max_steps", 100000, "--val_every", 0), TORCHRUN
    )
    wait_for_step(log_dir, 5, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode != 0
    stopped_at = len(losses(log_dir))
    assert weights(log_dir / f"model_{stopped_at:05d}.pt")["step"] == stopped_at
    assert "error: " not in err


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_signals_that_ask_to_stop(name):
    number = getattr(signal, name)
    # A background process of a shell ignores SIGINT.
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), number)
            deadline = time.monotonic() + 10
            while not stop.number and time.monotonic() < deadline:
                time.sleep(0.01)
    finally:
        signal.signal(number, before)
    assert stop.number == number


def test_an_ignored_hangup_stays_ignored():
    """nohup starts its command with SIGHUP ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
        assert not stop.number
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_an_extended_run_resumes_from_its_highest_step(data_dir, tmp_path, capsys):
    log_dir = tmp_path / "log"
    short = ("--val_every", 0, "--rolling_every", 5)
    train_here(data_dir, log_dir, *short, "--max_steps", 20)
    process = launch(arguments(data_dir, log_dir, *short, "--max_steps", 6000, "--resume"))
    wait_for_step(log_dir, 31, process)
    process.kill()
    process.communicate()
    newest = max(int(path.stem[6:]) for path in log_dir.glob("model_0*.pt"))
    assert newest >= 25
    capsys.readouterr()
    train_here(data_dir, log_dir, *short, "--max_steps", newest + 5, "--resume")
    assert f"model_{newest:05d}.pt, step {newest}\n" in capsys.readouterr().out
    assert len(losses(log_dir)) == newest + 5
    assert weights(log_dir / "model_final.pt")["step"] == newest + 5


def rates(log_dir: Path) -> dict[int, float]:
    """The learning rate of each step."""
    lines = (log_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {record["step"]: record["lr"] for record in records if "lr" in record}


def test_a_finished_run_that_gets_more_steps_follows_their_schedule(data_dir, tmp_path, capsys):
    log_dir = tmp_path / "log"
    train_here(data_dir, log_dir, "--max_steps", 12)
    short = rates(log_dir)
    train_here(data_dir, log_dir, "--max_steps", 20, "--resume")
    assert "max_steps was 12, is 20" in capsys.readouterr().out
    assert len(losses(log_dir)) == 20
    assert weights(log_dir / "model_final.pt")["step"] == 20
    # The steps of the first part keep their rates; the others have those of a run of 20 steps.
    extended = rates(log_dir)
    assert {step: extended[step] for step in range(12)} == short
    for step in range(12, 20):
        cosine = 1 + math.cos(math.pi * (step - 4) / 16)
        assert extended[step] == pytest.approx(1e-4 + 0.45e-3 * cosine)
    assert extended[12] > 2 * extended[11], "the rate rises again where the run was extended"


def test_rolling_checkpoints_without_others(data_dir, tmp_path, monkeypatch):
    """A run that fails leaves the two newest; resumed to its end, only the final one."""
    log_dir = tmp_path / "log"
    flags = ("--checkpoint_every", 0, "--rolling_every", 2, "--max_steps", 12)
    with monkeypatch.context() as patch:

        def fail(run, step):
            if step == 10:
                raise OSError("no more")

        patch.setattr(train_gpt2, "validate", fail)
        with pytest.raises(OSError, match="no more"):
            train_here(data_dir, log_dir, *flags)
    names = [path.name for path in checkpoint.candidates(log_dir)]
    assert names == ["model_00010.pt", "model_00008.pt"]
    train_here(data_dir, log_dir, *flags, "--resume")
    assert [path.name for path in checkpoint.candidates(log_dir)] == ["model_final.pt"]
    assert len(losses(log_dir)) == 12


def test_a_run_without_intermediate_checkpoints(data_dir, tmp_path, monkeypatch):
    saved = []
    save = checkpoint.BackgroundSaver.save

    def note(self, path, *args, **kwargs):
        saved.append(path.name)
        save(self, path, *args, **kwargs)

    monkeypatch.setattr(checkpoint.BackgroundSaver, "save", note)
    flags = ("--checkpoint_every", 0, "--rolling_every", 0, "--max_steps", 4)
    train_here(data_dir, tmp_path / "log", *flags)
    assert saved == ["model_final.pt"]


def test_rotation_keeps_the_checkpoint_just_written(tmp_path):
    """Damaged files of higher steps, which a resumed run skipped, must not count as newer."""
    for step in (10, 12, 14, 90, 95):
        (tmp_path / f"model_{step:05d}.pt").touch()
    checkpoint.remove_rolling(tmp_path, step=14, checkpoint_every=0, keep=2)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [f"model_{step:05d}.pt" for step in (12, 14, 90, 95)]


@pytest.mark.slow
def test_a_folder_in_use_is_rejected(data_dir, tmp_path):
    log_dir = tmp_path / "log"
    process = launch(arguments(data_dir, log_dir, "--max_steps", 100000, "--val_every", 0))
    wait_for_step(log_dir, 1, process)
    line = one_line(train(data_dir, log_dir, "--resume"))
    assert f"is in use by process {process.pid} on {socket.gethostname()}" in line
    process.kill()
    process.communicate()
    # The lock is released when its process dies.
    ok(train(data_dir, log_dir, "--resume", "--max_steps", 4))


def test_the_final_checkpoint_is_saved_before_the_last_evaluation(data_dir, tmp_path, monkeypatch):
    def fail_at_the_end(run, step):
        if step == STEPS:
            raise RuntimeError("evaluation failed")

    monkeypatch.setattr(train_gpt2, "validate", fail_at_the_end)
    with pytest.raises(RuntimeError):
        train_here(data_dir, tmp_path / "log")
    assert weights(tmp_path / "log" / "model_final.pt")["step"] == STEPS


def test_what_is_only_displayed_does_not_end_a_run(data_dir, tmp_path):
    prompt = "\N{SNOWMAN} na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve"
    words = arguments(
        data_dir, tmp_path / "log", "--sample_every", 2, "--sample_prompt", prompt, "--max_steps", 9
    )
    # An output encoding without the snowman, and a reader that stops after the first line.
    command_line = shlex.join([sys.executable, *map(str, words)]) + " 2>&1 | head -n 1"
    env = os.environ | dict(PYTHONIOENCODING="latin-1")
    result = subprocess.run(command_line, shell=True, cwd=ROOT, env=env, capture_output=True)
    assert len(result.stdout.splitlines()) == 1
    assert len(losses(tmp_path / "log")) == 9
    assert weights(tmp_path / "log" / "model_final.pt")["step"] == 9


@pytest.mark.slow
@pytest.mark.parametrize("pause, ends", [(0.5, False), (5.5, True)])
def test_a_second_signal_after_five_seconds_ends_at_once(pause, ends):
    code = "import time\nfrom common.runtime import StopSignal\n"
    code += "with StopSignal():\n    print(1, flush=True)\n    time.sleep(60)"
    process = launch(["-c", code])
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    time.sleep(pause)
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert (process.poll() == 128 + signal.SIGTERM) == ends
    process.kill()
    process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(
    "first, then",
    [
        (TORCHRUN, (sys.executable,)),
        ((sys.executable,), TORCHRUN),
    ],
)
def test_a_run_goes_on_with_another_number_of_processes(data_dir, tmp_path, reference, first, then):
    log_dir = tmp_path / "log"
    process = launch(arguments(data_dir, log_dir, "--rolling_every", 1), first)
    wait_for_step(log_dir, 8, process)
    process.kill()
    process.communicate()
    time.sleep(3)  # its workers notice
    process = launch(arguments(data_dir, log_dir, "--resume"), then)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert "resuming from" in out
    assert losses(log_dir) == pytest.approx(losses(reference), abs=1e-4)


@pytest.mark.slow
def test_the_death_of_one_rank_ends_all_of_them(data_dir, tmp_path):
    process = launch(arguments(data_dir, tmp_path / "log", "--max_steps", 100000), TORCHRUN)
    wait_for_step(tmp_path / "log", 3, process)
    workers = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    assert len(workers) == 2
    os.kill(int(workers[1]), signal.SIGKILL)
    out, err = process.communicate(timeout=40)
    assert process.returncode != 0
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_a_damaged_newest_checkpoint_is_named_and_skipped(data_dir, tmp_path, reference, capsys):
    log_dir = tmp_path / "log"
    shutil.copytree(reference, log_dir)
    whole = (log_dir / "model_final.pt").read_bytes()
    (log_dir / "model_final.pt").write_bytes(whole[: len(whole) // 2])
    flipped = bytearray((log_dir / "model_00020.pt").read_bytes())
    middle = len(flipped) // 2
    flipped[middle : middle + 64] = bytes(64 * [255])
    (log_dir / "model_00020.pt").write_bytes(flipped)
    train_here(data_dir, log_dir, "--resume", "--checkpoint_every", 10)
    screen = capsys.readouterr().out
    assert "model_final.pt is truncated" in screen
    assert "model_00020.pt is truncated, corrupt" in screen
    assert "model_00010.pt, step 10\n" in screen
    assert_same_bits(reference / "model_final.pt", log_dir / "model_final.pt")


def test_a_run_whose_checkpoints_are_all_damaged_is_not_overwritten(data_dir, tmp_path):
    log_dir = tmp_path / "log"
    log_dir.mkdir()
    (log_dir / "model_final.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match="no checkpoint in .* is valid: remove them"):
        train_here(data_dir, log_dir, "--resume")
    assert (log_dir / "model_final.pt").read_bytes() == b"damaged"


def test_disk_full_during_a_checkpoint_keeps_the_old_one(data_dir, tmp_path, reference):
    log_dir = tmp_path / "log"
    log_dir.mkdir()
    shutil.copy(reference / "model_00010.pt", log_dir)
    before = (log_dir / "model_00010.pt").read_bytes()

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    result = train(data_dir, log_dir, "--resume", "--rolling_every", 5, preexec_fn=small_disk)
    assert "model_00015.pt can't be written" in one_line(result)
    assert (log_dir / "model_00010.pt").read_bytes() == before
    assert [p.name for p in log_dir.glob("model_*")] == ["model_00010.pt"]


def test_a_loss_that_is_not_finite_stops_the_run(data_dir, tmp_path):
    result = train(
        data_dir, tmp_path / "log", "--max_lr", "1e30", "--rolling_every", 1, "--grad_clip", 0
    )
    line = one_line(result)
    assert "step " in line
    saved = sorted((tmp_path / "log").glob("model_*.pt"))
    expected = "no checkpoint has been saved yet"
    if saved:
        expected = f"the last good checkpoint is {saved[-1]}"
    assert expected in line
    assert all(
        tensor.isfinite().all() for path in saved for tensor in weights(path)["model"].values()
    )
    assert not (tmp_path / "log" / "model_final.pt").exists()


def test_a_finished_run_is_not_done_again(data_dir, tmp_path, reference, capsys):
    log_dir = tmp_path / "log"
    shutil.copytree(reference, log_dir)
    before = {path.name: path.read_bytes() for path in log_dir.iterdir()}
    train_here(data_dir, log_dir, "--resume")
    assert "nothing to do" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in log_dir.iterdir()} == before


def test_settings_of_a_resumed_run(data_dir, tmp_path, reference, capsys):
    """Each is applied, or ignored with a message; config.json is true and keeps the history."""
    log_dir = tmp_path / "log"
    shutil.copytree(reference, log_dir)
    more = ("--resume", "--max_steps", STEPS + 2, "--weight_decay", 0.25, "--beta2", 0.99)
    train_here(data_dir, log_dir, *more, "--n_layer", 7)
    screen = capsys.readouterr().out
    assert "n_layer 7 is ignored: the loaded model has 2" in screen
    assert "weight_decay was 0.1, is 0.25" in screen
    groups = weights(log_dir / "model_final.pt")["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.25, 0.0]
    assert [tuple(group["betas"]) for group in groups] == [(0.9, 0.99)] * 2
    config = json.loads((log_dir / "config.json").read_text())
    assert config["constants"]["n_layer"] == 2
    assert config["constants"]["weight_decay"] == 0.25
    assert config["start_step"] == STEPS
    assert [record["constants"]["weight_decay"] for record in config["history"]] == [0.1]
    # Later, too, the settings are compared with those that the run was started with.
    train_here(data_dir, log_dir, *more[:2], STEPS + 3, "--weight_decay", 0.25)
    screen = capsys.readouterr().out
    assert "weight_decay was 0.1, is 0.25" in screen
    assert "beta2" not in screen
    # They are printed before the first step is taken.
    assert screen.index("weight_decay was") < screen.index(f"step {STEPS + 2} |")


def test_a_run_is_resumed_only_on_the_same_shards(
    data_dir, tmp_path, reference, monkeypatch, capsys
):
    """Whether fineweb.py was interrupted while it made them does not matter."""
    log_dir = tmp_path / "log"
    shutil.copytree(reference, log_dir)
    data = folder_with(data_dir, tmp_path / "data")
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["shards"][0]["next"]["position"]["state"] = {"another": 1}
    (data / "manifest.json").write_text(json.dumps(manifest))
    train_here(data, log_dir, "--resume", "--max_steps", STEPS + 1)
    capsys.readouterr()

    manifest["shards"][1]["sha256"] = "0" * 64
    (data / "manifest.json").write_text(json.dumps(manifest))
    words = arguments(data, log_dir, "--resume", "--max_steps", STEPS + 2)
    line = one_line_in_process(words, monkeypatch, capsys)
    assert f"was trained on other shards than those in {data} now" in line


def test_the_final_learning_rate_is_a_tenth(data_dir, tmp_path, capsys):
    flags = ("--max_lr", "1e-5", "--min_lr", "None", "--max_steps", 3, "--warmup_steps", 3)
    train_here(data_dir, tmp_path / "log", *flags)
    config = json.loads((tmp_path / "log" / "config.json").read_text())
    assert config["constants"]["min_lr"] == pytest.approx(1e-6)
    assert "warning: the warmup of 3 steps is not over" in capsys.readouterr().out


@pytest.mark.slow
def test_by_epochs(data_dir, tmp_path):
    manifest = json.loads((data_dir / "manifest.json").read_text())
    windows = sum((shard["tokens"] - 1) // 32 for shard in manifest["shards"][1:])
    train_here(
        data_dir,
        tmp_path / "log",
        "--max_steps",
        "None",
        "--num_epochs",
        1,
        "--total_batch_size",
        4096,
        "--B",
        32,
    )
    assert len(losses(tmp_path / "log")) == windows // 128


def test_starting_from_other_weights(data_dir, tmp_path, reference):
    train_here(
        data_dir, tmp_path / "log", "--init_from", reference / "model_final.pt", "--max_steps", 2
    )
    first = stream(tmp_path / "log", "val")[0][1]
    assert first == pytest.approx(stream(reference, "val")[-1][1], abs=1e-5)


@pytest.mark.slow
def test_compiled(data_dir, tmp_path, reference):
    """Validation and samples work with it on, and the curve is the same."""
    ok(train(data_dir, tmp_path / "log", "--compile", "on", "--sample_every", 15))
    assert losses(tmp_path / "log") == pytest.approx(losses(reference), abs=1e-3)


def folder_with(data_dir, folder: Path) -> Path:
    shutil.copytree(data_dir, folder)
    return folder


class RunsCode:
    def __reduce__(self):
        return (os.system, ("touch owned",))


def spoil(name: str, data_dir: Path, tmp_path: Path) -> tuple[list, str]:
    """A wrong input, made: the flags that lead to it, and what the error line must say."""
    data, log = tmp_path / "data", tmp_path / "log"
    flags = ["--data_dir", data]
    if name == "no folder":
        return flags, "data does not exist: make it with fineweb.py"
    if name == "only validation":
        data.mkdir()
        shutil.copy(data_dir / "text_val_000000.npy", data)
        return flags, "none of split 'train'"
    folder_with(data_dir, data)
    shard = data / "text_train_000001.npy"
    if name == "truncated shard":
        shard.write_bytes(shard.read_bytes()[:5000])
        return flags, "truncated"
    if name == "missing shard":
        shard.unlink()
        return flags, "missing"
    if name == "manifest disagrees":
        np.save(shard, np.load(shard)[:-1])
        return flags, "manifest says"
    if name == "dtype disagrees":
        np.save(shard, np.load(shard).astype(np.uint32))
        return flags, "dtype"
    if name == "damaged manifest":
        (data / "manifest.json").write_text("{")
        return flags, "manifest.json is damaged"
    if name == "unfinished shards":
        manifest = json.loads((data / "manifest.json").read_text())
        (data / "manifest.json").write_text(json.dumps(manifest | dict(complete=False)))
        return flags, "unfinished"
    if name == "ids outside the vocabulary":
        for shard in data.glob("*train*.npy"):
            np.save(shard, np.full_like(np.load(shard), 384))
        return flags, "outside the vocabulary"
    if name in ("two dimensions", "float shard"):
        (data / "manifest.json").unlink()
        tokens = np.load(shard)
        np.save(
            shard,
            tokens[:1000].reshape(10, 100)
            if name == "two dimensions"
            else tokens.astype(np.float32),
        )
        return flags, "one-dimensional, uint16 or uint32"
    if name == "other tokenizer":
        other = torch.load(tmp_path.parent / "reference.pt", weights_only=True)
        other["tokenizer"] = "".join(f"{line}\n" for line in other["tokenizer"].splitlines()[:-1])
        other["config"]["vocab_size"] -= 1
        torch.save(other, tmp_path / "other.pt")
        return ["--init_from", tmp_path / "other.pt"], "another tokenizer"
    if name == "foreign checkpoint":
        torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.pt")
        return [
            "--init_from",
            tmp_path / "foreign.pt",
        ], "not a checkpoint of this project, nanoGPT or"
    if name == "no checkpoint":
        (tmp_path / "text.pt").write_text("not a checkpoint")
        return ["--init_from", tmp_path / "text.pt"], "corrupt or not a checkpoint"
    if name == "checkpoint with code":
        torch.save({"model": RunsCode()}, tmp_path / "code.pt")
        return ["--init_from", tmp_path / "code.pt"], "could run code"
    if name == "held folder":
        log.mkdir()
        (log / "log.txt").write_text("0 train 1.0\n")
        return [], "already holds a run"
    if name == "folder is a file":
        log.write_text("")
        return [], "log"
    return {
        "more than there is": (["--total_batch_size", str(2**20)], "fewer than one batch"),
        "batch not divisible": (["--total_batch_size", "500"], "not divisible"),
        "T above block_size": (["--T", "128"], "above the model's block_size"),
        "n_embd not divisible": (["--n_embd", "33"], "not divisible by n_head"),
        "vocabulary too small": (["--padded_vocab_size", "100"], "below the tokenizer's 384"),
        "huge seed": (["--seed", str(2**64)], "must be below 2**63"),
        "not a number": (["--max_steps", "1e3"], "--max_steps: no type matching"),
        "steps and epochs": (["--num_epochs", "1"], "not both"),
        "negative": (["--val_every", "-1"], "must not be negative"),
        "negative seed": (["--seed", "-1"], "seed is -1, must not be negative"),
        "rising rate": (["--max_lr", "1e-5"], "min_lr is 0.0001, must be from 0 to max_lr 1e-05"),
        "momentum of AdamW": (
            ["--muon_momentum", "0.9"],
            "muon_momentum needs --optimizer muon",
        ),
        "endless average": (["--beta1", "1"], "beta1 is 1.0, must be from 0 to below 1"),
        "growing weights": (["--weight_decay", "-1"], "weight_decay is -1.0, must be finite"),
        "clipping at NaN": (["--grad_clip", "nan"], "grad_clip is nan, must be finite"),
        "no rows": (["--padded_vocab_size", "0"], "padded_vocab_size is 0, must be at least 1"),
        "empty prompt": (
            ["--sample_prompt", "", "--sample_every", "9"],
            "sample_prompt is empty",
        ),
        "momentum of 1": (
            ["--muon_momentum", "1"],
            "muon_momentum is 1.0, must be from 0",
        ),
        "no embeddings": (
            ["--embedding_lr_scale", "0"],
            "embedding_lr_scale is 0.0, must be",
        ),
        "no positions": (["--position_lr_scale", "-1"], "position_lr_scale is -1.0, must be"),
        "frequencies": (["--unigram_init", "--norm", "post"], "unigram_init is for new models"),
        "no such device": (["--device", "cuda:7"], "cuda"),
        "unknown device": (["--device", "abacus"], "abacus"),
        "no such weights": (["--init_from", "no_such_model"], "no model 'no_such_model'"),
        "no tracker": (["--tracker", "trackio"], "trackio is not installed: pip install trackio"),
    }[name]


WRONG = [
    "no folder",
    "only validation",
    "truncated shard",
    "missing shard",
    "manifest disagrees",
    "dtype disagrees",
    "damaged manifest",
    "unfinished shards",
    "ids outside the vocabulary",
    "two dimensions",
    "float shard",
    "other tokenizer",
    "foreign checkpoint",
    "no checkpoint",
    "checkpoint with code",
    "held folder",
    "folder is a file",
    "more than there is",
    "batch not divisible",
    "T above block_size",
    "n_embd not divisible",
    "vocabulary too small",
    "huge seed",
    "not a number",
    "steps and epochs",
    "negative",
    "negative seed",
    "rising rate",
    "momentum of AdamW",
    "endless average",
    "growing weights",
    "clipping at NaN",
    "no rows",
    "empty prompt",
    "momentum of 1",
    "no embeddings",
    "no positions",
    "frequencies",
    "no such device",
    "unknown device",
    "no such weights",
    "no tracker",
]


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs_end_in_one_line(name, data_dir, tmp_path, reference, monkeypatch, capsys):
    shutil.copy(reference / "model_final.pt", tmp_path.parent / "reference.pt")
    flags, expected = spoil(name, data_dir, tmp_path)
    line = one_line_in_process(arguments(data_dir, tmp_path / "log", *flags), monkeypatch, capsys)
    assert expected in line
    assert not (ROOT / "owned").exists()


def one_line_in_process(words, monkeypatch, capsys) -> str:
    """What `one_line` checks, without the seconds that it takes to start a process."""
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    monkeypatch.setitem(sys.modules, "trackio", None)  # as if it were not installed
    with pytest.raises(SystemExit) as stopped:
        console.run_script(
            train_gpt2.main, console.parse_flags(train_gpt2.Config, train_gpt2.__doc__)
        )
    assert stopped.value.code in (1, 2)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


@pytest.mark.parametrize(
    "flags", [["--no_such_flag", "3"], ["--B", "many"], ["--norm", "sideways"]]
)
def test_unknown_flags_and_wrong_types_are_refused(flags):
    result = command("train_gpt2.py", *flags)
    assert flags[0] in one_line(result)
    assert result.returncode == 2


def test_out_of_memory_says_which_constants_to_lower(monkeypatch, capsys, data_dir, tmp_path):
    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_gpt2, "train_step", no_memory)
    assert "lower B" in one_line_in_process(
        arguments(data_dir, tmp_path / "log"), monkeypatch, capsys
    )


def test_wrong_input_under_torchrun_is_said_once(data_dir, tmp_path):
    process = launch(arguments(tmp_path / "nothing", tmp_path / "log"), TORCHRUN)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert (out + err).count("nothing does not exist: make it") == 1


STEPS_ON_ONE_BATCH = """
import resource, torch
from common import runtime
from common.cpu import keep_freed_memory
from model import GPT, GPTConfig
from common.optim import make_adamw, train_step
rt = runtime.start("cpu", "float32")
keep_freed_memory(rt.device)
model = GPT(GPTConfig(block_size=64, n_layer=1, n_head=1, n_embd=64))
optimizer = make_adamw(model, 1e-3, 0.1, (0.9, 0.95), 1e-8)
x, y = torch.randint(50257, (2, 4, 64))
faults = []
for _ in range(8):
    train_step(model, optimizer, [(x, y)], 1e-3, 1.0, rt)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(min(after - before for before, after in zip(faults, faults[1:])) * resource.getpagesize())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to")
def test_a_step_reuses_the_memory_of_the_one_before():
    fresh = float(
        subprocess.check_output([sys.executable, "-c", STEPS_ON_ONE_BATCH], cwd=ROOT, text=True)
    )
    assert fresh < 10e6  # bytes of new pages in the best step; the logits alone are 51 MB
