"""Code shared by the benchmarks: their records, requests, and downloads."""

import hashlib
import importlib
import json
import math
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from small_benchmarks import CPU, TEXT, load_both, write_model_and_data

import cbt
import dclm_core
import evaluate
import hellaswag
import lambada
from common import tasks
from common.console import UserError
from common.published import PARAMETERS, REFERENCES
from common.tasks import Benchmark
from common.tokenizer import train_tokenizer
from model import GPT, OPENAI_MODELS, GPTConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model_and_data(tmp_path_factory.mktemp("benchmarks"))


# Records


def test_code_fingerprint_changes_with_the_code_but_not_with_comments(tmp_path, monkeypatch):
    codes = {
        "original": 'PREFIX = "a"\n\ndef load():\n    return PREFIX + " "\n',
        "commented": '# A comment\nPREFIX = "a"\ndef load():\n    return (PREFIX + " ")  # here\n',
        "documented": '"""A."""\nPREFIX = "a"\ndef load():\n    "B."\n    return PREFIX + " "\n',
        "changed": 'PREFIX = "b"\n\ndef load():\n    return PREFIX + " "\n',
    }
    fingerprints = {}
    for name, code in codes.items():
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        module = importlib.import_module(name)
        benchmark = Benchmark("name", REFERENCES["val"], module.load, None, None, None)
        fingerprints[name] = benchmark.code_fingerprint()
    assert fingerprints["original"] == fingerprints["commented"]
    assert fingerprints["original"] == fingerprints["documented"]
    assert fingerprints["original"] != fingerprints["changed"]


def test_references_name_the_metrics_that_are_computed(folder):
    """A misspelled metric would silently lose its published figures."""
    model, enc, _ = load_both(folder)
    data = dict(hellaswag="hellaswag.jsonl", lambada="lambada.jsonl", cbt="", core="eval_bundle")
    for benchmark in evaluate.BENCHMARKS:
        assert benchmark.reference is REFERENCES[benchmark.name]
        examples = benchmark.load(str(folder / data[benchmark.name]), 4)
        metrics, _ = benchmark.evaluate(model, enc, examples, CPU)
        names = {metric.name for metric in metrics}
        if benchmark.name == "cbt":
            names.add("paper CN")  # not in the small data
        if benchmark.name == "core":  # neither are these tasks
            names |= {"hellaswag_zeroshot", "hellaswag", "lambada_openai"}
            names |= {"piqa", "arc_easy", "arc_challenge"}
        assert benchmark.reference.figures.keys() <= names
        assert benchmark.headline(metrics).name == benchmark.reference.headline


def test_references_have_different_streams_and_known_models():
    streams = [reference.stream for reference in REFERENCES.values()]
    assert len(set(streams)) == len(streams)
    for reference in REFERENCES.values():
        for by_model in reference.figures.values():
            assert by_model.keys() <= PARAMETERS.keys()
    for name, shape in OPENAI_MODELS.items():
        with torch.device("meta"):
            assert GPT(GPTConfig(**shape)).num_params() == PARAMETERS[name]


# All benchmarks


@pytest.mark.parametrize("script", [hellaswag, lambada, cbt, dclm_core])
@pytest.mark.parametrize("limit", [0, -1])
def test_limits_below_one_are_rejected(script, limit):
    with pytest.raises(UserError, match=f"limit is {limit}, must be at least 1"):
        script.main(script.Config(limit=limit))


@pytest.mark.parametrize("block_size", [1, 8, 32, 64])
def test_a_small_context_is_enough_for_every_benchmark(folder, block_size, capsys):
    """Contexts and long endings are truncated; the model is one of chance level."""
    _, enc, _ = load_both(folder)
    shape = dict(n_layer=1, n_head=1, n_embd=8, block_size=block_size)
    model = GPT(GPTConfig(vocab_size=500, **shape))
    data = dict(hellaswag="hellaswag.jsonl", lambada="lambada.jsonl", cbt="", core="eval_bundle")
    for benchmark in evaluate.BENCHMARKS:
        examples = benchmark.load(str(folder / data[benchmark.name]), 4)
        if benchmark.name == "hellaswag":
            examples[0]["endings"][1] = "and so on " * 40
        for _ in range(2):
            metrics, _ = benchmark.evaluate(model, enc, examples, CPU)
            assert math.isfinite(benchmark.headline(metrics).value)
    printed = capsys.readouterr().out.splitlines()
    assert len([line for line in printed if line.startswith("HellaSwag, harness: ")]) == 1
    assert len(set(printed)) == len(printed), "each report only once"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_data_may_begin_with_a_byte_order_mark(folder, tmp_path, encoding):
    data = dict(hellaswag="hellaswag.jsonl", lambada="lambada.jsonl", cbt="cbtest_NE_test.txt")
    for benchmark in evaluate.BENCHMARKS:
        name = data.get(benchmark.name)
        if name:
            path = tmp_path / name
            path.write_text((folder / name).read_text(), encoding)
            assert benchmark.load(str(path), None) == benchmark.load(str(folder / name), None)
    # CORE's data is a folder.
    bundle = shutil.copytree(folder / "eval_bundle", tmp_path / "eval_bundle")
    for path in bundle.rglob("*.*"):
        path.write_text(path.read_text(), encoding)
    assert dclm_core.load(bundle) == dclm_core.load(folder / "eval_bundle")


def test_data_that_is_not_text_is_an_error_that_names_the_line(folder, tmp_path):
    data = dict(hellaswag="hellaswag.jsonl", lambada="lambada.jsonl", cbt="cbtest_NE_test.txt")
    for benchmark in evaluate.BENCHMARKS:
        if benchmark.name not in data:
            continue
        path = tmp_path / data[benchmark.name]
        path.write_bytes((folder / path.name).read_bytes().replace(b"\n", b"\n\xe9", 1))
        with pytest.raises(UserError, match=f"{path}, line 2, is not UTF-8"):
            benchmark.load(str(path), None)
    # CORE's data is a folder.
    bundle = shutil.copytree(folder / "eval_bundle", tmp_path / "eval_bundle")
    path = bundle / "eval_data" / "small" / "schema.jsonl"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\n\xe9", 1))
    with pytest.raises(UserError, match=f"{path}, line 2, is not UTF-8"):
        dclm_core.load(bundle)


# Requests


def test_requests_have_the_tokens_of_the_whole_text(shared_data):
    """The shortcut of encode_request changes nothing, whatever blanks the context has."""
    enc, _ = train_tokenizer([TEXT], 500)
    with (shared_data / "hellaswag_val_2000.jsonl").open() as file:
        contexts = [json.loads(line)["ctx"] for line in file][:300]
    contexts += ["", "word", "model", "the", "a  b", "a\n b", " a", "a b  ", "end. ", "a \n"]
    contexts += ["it 's"]
    continuations = [" end", "x", "  two", "\n"]
    for context in contexts:
        request = tasks.encode_request(enc, context, continuations)
        before = enc.encode_ordinary(context.rstrip())
        assert request.context == (before or [enc.eot_token])
        for continuation, ids in zip(continuations, request.continuations):
            whole = enc.encode_ordinary(context + continuation)
            assert before + ids == before + whole[len(before) :]


# Downloads, from a server that misbehaves


class Server(BaseHTTPRequestHandler):
    content = b'{"text": "two words"}\n' * 5000

    def do_GET(self):
        if self.path == "/missing":
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content[: 50_000 if self.path == "/cut" else None])

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_download_is_complete_and_happens_once(server, tmp_path):
    sha256 = hashlib.sha256(Server.content).hexdigest()
    path = tasks.fetch(server + "/whole", tmp_path / "new" / "data.jsonl", sha256)
    assert path.read_bytes() == Server.content
    assert tasks.fetch("http://127.0.0.1:9/gone", path, sha256) == path


@pytest.mark.parametrize("page", ["/cut", "/missing", "/whole"])
def test_a_failed_download_is_an_error_and_leaves_nothing(server, tmp_path, page):
    with pytest.raises(OSError, match="put the file there yourself"):
        tasks.fetch(server + page, tmp_path / "data.jsonl", "0" * 64)
    assert not list(tmp_path.iterdir())
