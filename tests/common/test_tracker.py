"""Trackers, with the real packages. Those that are not installed are skipped."""

import json
import shutil
import sqlite3
import struct
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imsave
from test_train import train_here

import train_gpt2
from common.console import UserError
from common.tracker import check_installed, start_tracker

# The learning rate is constant, so that it does not depend on max_steps.
FLAGS = "--val_every 5 --checkpoint_every 4 --rolling_every 0 --min_lr 1e-3".split()


def needs(package: str):
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


@pytest.fixture
def run_twice(data_dir, tmp_path, monkeypatch):
    """A function that trains for 10 steps, then again from step 8 to 14, as if it had been killed.

    It returns the points of the streams train and val of the whole run.
    """

    def draw_pictures(run) -> list[Path]:  # the real one takes seconds
        imsave(run.folder / "log_plot.png", np.ones((30, 50, 3)))
        return [run.folder / "log_plot.png"]

    def train_twice(tracker: str) -> dict[str, list[tuple[int, float]]]:
        log_dir = tmp_path / "my_run"
        flags = (*FLAGS, "--tracker", tracker)
        with monkeypatch.context() as patch:
            patch.setattr(train_gpt2, "draw_pictures", draw_pictures)
            train_here(data_dir, log_dir, *flags, "--max_steps", 10)
            (log_dir / "model_final.pt").unlink()
            train_here(data_dir, log_dir, *flags, "--max_steps", 14, "--resume")
        points: dict[str, list[tuple[int, float]]] = {}
        for line in (log_dir / "log.txt").read_text().splitlines():
            step, name, value = line.split()
            points.setdefault(name, []).append((int(step), pytest.approx(float(value), abs=1e-5)))
        assert [step for step, _ in points["train"]] == list(range(14))
        return points

    return train_twice


@needs("tensorboard")
def test_tensorboard_shows_one_curve(run_twice, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_dir = tmp_path / "my_run"
    expected = run_twice("tensorboard")
    events = EventAccumulator(str(log_dir), size_guidance=dict(scalars=0, images=0, tensors=0))
    events.Reload()
    for name, stream in (("loss", "train"), ("val", "val")):
        assert [(event.step, event.value) for event in events.Scalars(name)] == expected[stream]
    assert {"lr", "grad_norm", "tokens_per_sec"} <= set(events.Tags()["scalars"])
    # The run of 10 steps had a picture at step 10, which was purged; 14 is the last step.
    (picture,) = events.Images("log_plot")
    assert picture.step == 14
    assert (picture.width, picture.height) == (50, 30)
    settings = events.Tensors("settings/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "| total_batch_size" in settings and "| 512" in settings


def wandb_records(path: Path) -> list:
    """The records of an offline run: a log in LevelDB's format, of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    records = []
    position = 7  # after the header of the file
    message = b""
    while position + 7 <= len(data):
        room = 32768 - position % 32768
        if room < 7:  # the rest of a block is padding
            position += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += 7
        message += data[position : position + length]
        position += length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(message))
            message = b""
    return records


@needs("wandb")
def test_wandb_has_one_curve(run_twice, tmp_path, monkeypatch):
    """Offline: each process leaves a file for `wandb sync`, both of the same run."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    log_dir = tmp_path / "my_run"
    expected = run_twice("wandb")
    history = {"loss": [], "val": [], "log_plot": []}
    for path in sorted(log_dir.glob("wandb/offline-run-*/*.wandb")):
        records = wandb_records(path)
        (run,) = [record.run for record in records if record.HasField("run")]
        assert run.run_id == (log_dir / "tracker_id.txt").read_text().strip()
        assert (run.project, run.display_name) == ("gpt2", "my_run")
        settings = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert settings["total_batch_size"] == 512
        for record in records:
            if record.HasField("history"):
                items = {
                    item.key or item.nested_key[0]: json.loads(item.value_json)
                    for item in record.history.item
                }
                for name in history.keys() & items.keys():
                    history[name].append((record.history.step.num, items[name]))
    assert settings["max_steps"] == 14
    # Step 10 ended the first run: it had been sent, without a loss.
    expected["train"] = [point for point in expected["train"] if point[0] != 10]
    assert history["loss"] == expected["train"]
    assert history["val"] == expected["val"]
    assert [step for step, _ in history["log_plot"]] == [10, 14]


@needs("trackio")
def test_trackio_has_one_curve(run_twice, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    log_dir = tmp_path / "my_run"
    expected = run_twice("trackio")
    database = sqlite3.connect(tmp_path / "trackio" / "gpt2.db")
    name = "my_run-" + (log_dir / "tracker_id.txt").read_text().strip()
    assert database.execute("select distinct run_name from metrics").fetchall() == [(name,)]
    rows = database.execute("select step, metrics from metrics order by id").fetchall()
    history = {"loss": [], "val": [], "log_plot": []}
    for step, text in rows:
        for key, value in json.loads(text).items():
            history.get(key, []).append((step, value))
    expected["train"] = [point for point in expected["train"] if point[0] != 10]
    assert history["loss"] == expected["train"]
    assert history["val"] == expected["val"]
    assert [step for step, _ in history["log_plot"]] == [10, 14]
    (settings,) = [json.loads(text) for (text,) in database.execute("select config from configs")]
    assert settings["total_batch_size"] == 512


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    check_installed("none")
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match="trackio is not installed: pip install trackio"):
        check_installed("trackio")


@pytest.mark.skipif(find_spec("trackio") is not None, reason="trackio is installed")
def test_a_folder_named_like_a_package_is_not_the_package(monkeypatch, tmp_path):
    """wandb, for example, leaves one in the current folder."""
    (tmp_path / "trackio").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="trackio is not installed"):
        check_installed("trackio")


def test_a_tracker_that_does_not_start(monkeypatch, tmp_path):
    """One line of error, and nothing that stops the next try."""
    package = type("wandb", (), dict(init=lambda **_: 1 / 0))
    monkeypatch.setitem(sys.modules, "wandb", package)
    with pytest.raises(UserError, match="wandb does not start: division by zero; WANDB_MODE"):
        start_tracker("wandb", tmp_path, "log", 0, {})


def test_a_new_run_in_an_old_folder_has_a_new_identity(monkeypatch, tmp_path):
    started = []

    def init(**options):
        started.append(options["id"])

    package = type("wandb", (), dict(init=staticmethod(init)))
    monkeypatch.setitem(sys.modules, "wandb", package)
    for _ in range(2):
        start_tracker("wandb", tmp_path, "log", 0, {})
        (tmp_path / "metrics.jsonl").write_text('{"step": 7, "loss": 2.5}\n{"step": 8, "lo')
        assert start_tracker("wandb", tmp_path, "log", 5, {}).last_step == 7
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
    assert started[0] == started[1] != started[2] == started[3]


@pytest.mark.slow
def test_the_pictures_are_those_of_plot_py(data_dir, tmp_path):
    sent = []

    class Package:
        @staticmethod
        def start(*_, **__):
            return Package()

        def log(self, step, values):
            pass

        def log_pictures(self, step, paths):
            sent.extend((step, path.name) for path in paths)

        def finish(self):
            sent.append("finished")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.runlog.start_tracker", Package.start)
        train_here(data_dir, tmp_path / "log", "--tracker", "tensorboard", "--max_steps", 3)
    assert (3, "log_plot.png") in sent and (3, "learning_rate.png") in sent
    assert sent[-1] == "finished"
