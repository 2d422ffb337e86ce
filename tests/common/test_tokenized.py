"""Shards that others have tokenized, downloaded from a local server that answers like the hub."""

import json
import os
import socket
import time
from collections import namedtuple

import httpx2
import numpy as np
import pytest
from conftest import command, ok, one_line
from hub_server import PAGE, REVISION, Handler, serve
from huggingface_hub import constants
from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter

from common import hub as hub_module
from common import shards as shards_module
from common.console import Progress, UserError
from common.shards import open_shards
from common.tokenized import download_shards

REPO = "kjj0/finewebedu10B-gpt2"
VAL = "finewebedu_val_000000.bin"
TRAIN = [f"finewebedu_train_{number:06d}.bin" for number in (1, 2, 3)]


def write_bin(path, tokens, magic=20240520, version=1, count=None):
    """As modded-nanogpt's data/fineweb.py writes it."""
    header = np.zeros(256, dtype=np.int32)
    header[0] = magic
    header[1] = version
    header[2] = len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype=np.uint16).tobytes())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A repository of 500 tokens for validation, and 500, 500 and 300 for training."""
    folder = tmp_path / "repository"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, length in zip([VAL, *TRAIN], [500, 500, 500, 300]):
        tokens = rng.integers(0, 50256, length)
        tokens[::100] = 50256  # five documents, or three
        write_bin(folder / name, tokens)
    with serve(REPO, folder) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE",
            server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )  # fmt: skip
        monkeypatch.setattr(time, "sleep", lambda _: None)
        yield server


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def downloaded(hub) -> list[str]:
    """The files of which a body was requested."""
    return [
        path.rsplit("/", 1)[1]
        for method, path, _ in hub.requests
        if method == "GET" and path.startswith("/datasets/")
    ]


def test_as_many_files_as_max_tokens_needs(hub, out, tmp_path):
    manifest = download_shards(REPO, out, 1000)
    assert names(out) == [TRAIN[0], VAL, "manifest.json"]
    assert downloaded(hub) == [VAL, TRAIN[0]]
    for name in (VAL, TRAIN[0]):
        assert (out / name).read_bytes() == (hub.folder / name).read_bytes()
    assert (manifest["tokens"], manifest["documents"], manifest["complete"]) == (1000, 10, True)
    assert (manifest["repo"], manifest["revision"]) == (REPO, REVISION)
    assert open_shards(out, "train").read(0, 0, 500).tolist() == (
        np.fromfile(hub.folder / TRAIN[0], np.uint16)[512:].tolist()
    )

    # One token more needs one file more. The others stay, and the result is that of one run.
    before = contents(out)
    hub.requests.clear()
    download_shards(REPO, out, 1001)
    assert downloaded(hub) == [TRAIN[1]]
    after = contents(out)
    assert {name: after[name] for name in (VAL, TRAIN[0])} == {
        name: before[name] for name in (VAL, TRAIN[0])
    }
    whole = tmp_path / "whole"
    whole.mkdir()
    download_shards(REPO, whole, 1001)
    assert contents(whole) == after

    # Without a limit, all; then nothing is requested any more, also for a lower limit.
    assert download_shards(REPO, out, None)["tokens"] == 1800
    hub.requests.clear()
    assert download_shards(REPO, out, None)["tokens"] == 1800
    assert download_shards(REPO, out, 700)["tokens"] == 1800
    assert hub.requests == []


def test_a_dropped_connection_is_resumed_where_it_broke(hub, out, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    hub.drops[TRAIN[0]] = 1300
    download_shards(REPO, out, 1000)
    assert (out / TRAIN[0]).read_bytes() == (hub.folder / TRAIN[0]).read_bytes()
    ranges = [header for _, path, header in hub.requests if path.endswith(TRAIN[0])]
    assert ranges[-1] == "bytes=1000-"


@pytest.mark.parametrize("error", [httpx2.ReadError, RuntimeError, ConnectionResetError])
def test_a_reset_connection_starts_the_file_again(error, hub, out, monkeypatch, capsys):
    """The client raises these losses. Bytes are counted once."""
    import huggingface_hub

    original = huggingface_hub.hf_hub_download
    attempts = []

    def fail_twice(repo, name, **options):
        attempts.append(name)
        if attempts.count(name) < 3:
            options["tqdm_class"]().update(700)
            raise error("reset by peer")
        return original(repo, name, **options)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail_twice)
    bars = []
    update = Progress.update

    def record(bar, count=1):
        if bar.desc and bar.desc.startswith("finewebedu"):
            bars.append(bar)
        return update(bar, count)

    monkeypatch.setattr(Progress, "update", record)
    download_shards(REPO, out, 1000)
    assert attempts == [VAL] * 3 + [TRAIN[0]] * 3
    assert capsys.readouterr().out.count(f"retrying ({error.__name__})") == 4
    assert bars[-1].n == bars[-1].total == 2 * (1024 + 1000)


def test_after_nine_losses_it_gives_up(hub, out, monkeypatch, capsys):
    import huggingface_hub

    def fail(*_, **__):
        raise RuntimeError("Network error: the connection was closed")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(OSError, match="check the network.*resume .Network error: the conn"):
        download_shards(REPO, out, 1000)
    assert capsys.readouterr().out.count("retrying") == 8


def test_after_a_lost_network_it_continues_with_the_first_missing_file(hub, out):
    hub.answers[TRAIN[1]] = 500
    with pytest.raises(OSError, match="check the network, then run the same command again"):
        download_shards(REPO, out, 1500)
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["tokens"], manifest["complete"]) == (1000, False)
    with pytest.raises(UserError, match="unfinished"):
        open_shards(out, "train")
    hub.answers.clear()
    hub.requests.clear()
    download_shards(REPO, out, 1500)
    assert downloaded(hub) == [TRAIN[1]]


def test_a_damaged_or_missing_shard_is_downloaded_again(hub, out, capsys):
    download_shards(REPO, out, None)
    before = contents(out)
    hub.requests.clear()
    (out / TRAIN[1]).write_bytes(before[TRAIN[1]][:-2])
    (out / VAL).unlink()
    download_shards(REPO, out, None)
    assert contents(out) == before
    assert sorted(downloaded(hub)) == [TRAIN[1], VAL]
    assert "missing or damaged" in capsys.readouterr().out


def test_files_that_another_program_downloaded_are_kept(hub, out):
    """modded-nanogpt's scripts leave the same files, without a manifest."""
    (out / VAL).write_bytes((hub.folder / VAL).read_bytes())
    download_shards(REPO, out, 1000)
    assert downloaded(hub) == [TRAIN[0]]


@pytest.mark.parametrize(
    "answer, message",
    [
        (401, "refuses access to .*HF_TOKEN"),
        (403, "refuses access to .*HF_TOKEN"),
        (404, "does not exist.*--repo"),
        (429, "too many requests .429.: wait"),
        (503, "check the network, then run the same command again"),
        ("html", "something other than the hub's answer.*HF_ENDPOINT"),
    ],
)
@pytest.mark.parametrize("place", ["/api/datasets/", f"/resolve/{REVISION}/{TRAIN[0]}"])
def test_what_the_hub_refuses_is_explained(answer, message, place, hub, out):
    hub.answers[place] = answer
    with pytest.raises((OSError, UserError), match=message):
        download_shards(REPO, out, None)
    assert not (out / TRAIN[0]).exists()


def test_a_page_instead_of_a_file_is_not_taken_for_it(hub, out, monkeypatch):
    """The hub announces the file, and something between answers the download."""
    monkeypatch.setattr(
        Handler, "send_file",
        lambda self, file, with_body: self.reply(
            200, PAGE if with_body else file.read_bytes(), with_body,
            ETag='"x"', X_Repo_Commit=REVISION,
        ),
    )  # fmt: skip
    with pytest.raises(OSError, match=f"{VAL} of .* can't be downloaded"):
        download_shards(REPO, out, None)
    assert not list(out.glob("*.bin"))


@pytest.mark.parametrize("answer", [401, 404, 429, "html"])
def test_a_model_that_the_hub_refuses_is_explained(answer, hub):
    hub.answers["/api/models/"] = answer
    with pytest.raises(OSError, match="no model 'a/b'.*not available from the hub"):
        hub_module.download("a/b", ["config.json"])


def test_nobody_answers(hub, out, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(OSError, match="can't be downloaded from .*check the network"):
            download_shards(REPO, out, None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="HF_HUB_OFFLINE is set"):
        download_shards(REPO, out, None)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(magic=20240801), "does not begin with 20240520"),
        (dict(version=2), "of version 2, only version 1"),
        (dict(count=501), "has 2,024 bytes, with the 501 tokens.*2,026: it is truncated"),
        (dict(tokens=np.full(500, 50257)), "contains the id 50257"),
    ],
)
def test_a_file_that_is_no_shard_is_rejected(options, message, hub, out):
    write_bin(hub.folder / TRAIN[0], **dict(tokens=np.zeros(500)) | options)
    with pytest.raises(UserError, match=message):
        download_shards(REPO, out, None)
    assert names(out / ".download") and not (out / TRAIN[0]).exists()
    assert not json.loads((out / "manifest.json").read_text())["complete"]


def test_a_wrong_checksum_is_rejected(hub, out, monkeypatch):
    listing = hub.listing()
    listing["siblings"][2]["lfs"]["sha256"] = "0" * 64
    monkeypatch.setattr(hub, "listing", lambda: listing)
    with pytest.raises(UserError, match="arrived damaged"):
        download_shards(REPO, out, None)


def test_wrong_repositories_and_folders(hub, out, tmp_path):
    with pytest.raises(UserError, match="max_tokens is 500, must be above the 500 of the valid"):
        download_shards(REPO, out, 500)
    with pytest.raises(UserError, match="a repository is named owner/name"):
        download_shards("a/b/c", out, None)
    with pytest.raises(UserError, match="'a/b' does not exist"):
        download_shards("a/b", out, None)
    np.save(out / "x_train_1.npy", np.zeros(9, np.uint16))
    with pytest.raises(UserError, match="x_train_1.npy is not from kjj0"):
        download_shards(REPO, out, None)
    (out / "x_train_1.npy").unlink()
    download_shards(REPO, out, None)
    with pytest.raises(UserError, match="another source than kjj0/fineweb10B-gpt2"):
        download_shards("kjj0/fineweb10B-gpt2", out, None)
    for name in TRAIN:
        (hub.folder / name).unlink()
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="no .bin file with 'train' in its name"):
        download_shards(REPO, tmp_path / "other", None)


def test_a_full_disk(hub, out, monkeypatch):
    usage = namedtuple("usage", "total used free")
    disk_usage = shards_module.shutil.disk_usage
    monkeypatch.setattr(shards_module.shutil, "disk_usage", lambda _: usage(10, 10, 10))
    with pytest.raises(OSError, match="make room"):
        download_shards(REPO, out, None)
    assert downloaded(hub) == []

    # It becomes full during the download.
    monkeypatch.setattr(shards_module.shutil, "disk_usage", disk_usage)
    import huggingface_hub

    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_space)
    with pytest.raises(OSError, match="can't be written .No space left on device.: make room"):
        download_shards(REPO, out, None)


def test_bytes_over_xet_are_counted_once():
    """The client's other way to download, which needs servers that we do not imitate."""
    report = namedtuple(
        "report",
        "total_bytes_completed total_transfer_bytes_completed total_bytes "
        "total_bytes_completion_rate total_transfer_bytes_completion_rate",
    )
    with Progress(total=100, disable=True) as bar:
        bar.n = 10
        bar.update = lambda count: setattr(bar, "n", bar.n + count)
        reporter = XetDownloadProgressReporter(
            reconstruction_desc="", total=90, log_level=20, tqdm_class=hub_module.file_bar(bar)
        )
        with reporter:
            reporter.update_progress(report(20, 60, 90, 1.0, 1.0))
            reporter.update_progress(report(90, 70, 90, 1.0, 1.0))
        assert bar.n == 100


@pytest.mark.slow
def test_a_newcomer_downloads_and_trains(hub, tmp_path, shared_data):
    """The commands of the README, at small scale, against the server named by HF_ENDPOINT."""
    out = tmp_path / "shards"
    hub.drops[TRAIN[0]] = 1300
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
    del environment["HF_HUB_OFFLINE"]
    download = ["fineweb.py", "--source", "tokenized", "--repo", REPO, "--out_dir", out]
    result = ok(command(*download, "--max_tokens", "1.8K", env=environment))
    assert f"{out}: 1,800 tokens of 18 documents in 4 shards" in result.stdout
    hub.answers["/api/datasets"] = 429
    (out / VAL).unlink()
    assert "too many requests" in one_line(command(*download, env=environment))
    (out / VAL).write_bytes((hub.folder / VAL).read_bytes())

    shape = "--n_layer 1 --n_head 1 --n_embd 8 --block_size 32 --T 32 --B 4 --total_batch_size 128"
    train = "--max_steps 3 --warmup_steps 1 --val_tokens 400 --sample_every 0 --hellaswag_every 0"
    log = tmp_path / "log"
    ok(
        command(
            "train_gpt2.py", "--data_dir", out, "--log_dir", log, *shape.split(), *train.split()
        )
    )
    assert (log / "model_final.pt").exists()
