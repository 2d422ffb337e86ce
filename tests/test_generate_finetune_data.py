"""generate_finetune_data.py with a local server that misbehaves on demand, and with the grammar."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT, command, ok, one_line

from common.console import UserError
from fantasy.grammar import as_text, describe
from fantasy.locations import prompt_seeds
from generate_finetune_data import Config, main

KEY = "sk-test-4815162342-never-to-be-seen"
ENV = dict(os.environ, OPENAI_API_KEY=KEY, NO_PROXY="*")
VOCABULARY = [
    a + b
    for a in "stone river lamp salt moth grey tower ash bell reed".split()
    for b in "s ed ing er ly".split()
]
# Answers that are rejected, and failures after which OpenAI's client repeats the request.
REJECTED = (
    "refusal, polite refusal, filtered, empty, null, short, long, cut, delimiter, duplicate, "
    "not JSON, no choices, HTML"
).split(", ")
FAILED = ["429", "500", "503", "dropped", "truncated"]
DELIMITERS = ["<LOC>", "</LOC>", "<|endoftext|>"]


def prose(seed: str, words: int = 200) -> str:
    return " ".join(random.Random(seed).choices(VOCABULARY, k=words)).capitalize() + "."


class Server(ThreadingHTTPServer):
    """A server of chat completions. `plan(prompt, attempt)` returns "good" or a kind from above."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, plan):
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan = plan
        self.lock = threading.Lock()
        self.attempts = Counter()  # by prompt
        self.requests = []  # (time, kind, prompt)
        self.good = {}  # text -> time at which it was completely sent
        self.active = self.peak = 0
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, *_):
        pass  # the client is gone


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        with server.lock:
            server.active += 1
            server.peak = max(server.peak, server.active)
            server.attempts[prompt] += 1
            attempt = server.attempts[prompt]
            kind = server.plan(prompt, attempt)
            server.requests.append((time.time(), kind, prompt))
        if self.path != "/v1/chat/completions" or self.headers["Authorization"] != f"Bearer {KEY}":
            kind = "401"
        kind, _, argument = kind.partition(":")
        if kind == "late":
            time.sleep(float(argument))
            kind = "good"
        if kind == "silent":
            self.done()
            time.sleep(float(argument))
            self.close_connection = True
            return
        if kind in ("401", "404", "400", "429", "500", "503", "quota", "policy"):
            return self.fail(kind, argument)
        text = prose(f"{prompt} {attempt}")
        if kind == "good":
            time.sleep(0.02 * random.random())
            self.reply(self.completion(text))
            with server.lock:
                server.good[text] = time.time()
            return
        finish = {"cut": "length", "filtered": "content_filter"}.get(kind, "stop")
        refusal = "I can't help with that." if kind == "refusal" else None
        bad_texts = {
            "refusal": None,
            "polite refusal": "I’m sorry, but I can't. " + text,
            "empty": " \n",
            "null": None,
            "short": prose(prompt, 149),
            "long": prose(prompt, 401),
            "delimiter": text + random.choice(DELIMITERS),
            "duplicate": next(iter(server.good), "") + " And more.",
        }
        text = bad_texts.get(kind, text)
        data = self.completion(text, finish, refusal)
        if kind == "not JSON":
            data = data[: len(data) // 2]
        if kind == "no choices":
            data = b'{"object": "chat.completion", "choices": []}'
        if kind == "HTML":
            return self.reply(b"<html>hello</html>", content_type="text/html")
        if kind in ("dropped", "truncated"):
            self.close_connection = True
            self.done()
            if kind == "truncated":
                self.head(200, len(data))
                self.wfile.write(data[: len(data) // 2])
            return
        self.reply(data)

    def completion(self, text, finish="stop", refusal=None) -> bytes:
        message = dict(role="assistant", content=text, refusal=refusal)
        usage = dict(prompt_tokens=100, completion_tokens=250, total_tokens=350)
        choices = [dict(index=0, message=message, finish_reason=finish)]
        reply = dict(id="x", object="chat.completion", created=1, model="served")
        return json.dumps(dict(reply, choices=choices, usage=usage)).encode()

    def fail(self, kind: str, argument: str):
        status = {"quota": 429, "policy": 400}.get(kind) or int(kind)
        codes = dict(quota="insufficient_quota", policy="content_filter")
        codes["401"] = "invalid_api_key"
        # Some servers quote the key. It must not reach the terminal or a file.
        message = f"{kind}: what is this? {self.headers['Authorization']}"
        error = dict(message=message, type="x", code=codes.get(kind))
        body = json.dumps(dict(error=error)).encode()
        self.reply(body, status, headers={"Retry-After": argument} if argument else {})

    def reply(self, data: bytes, status=200, headers=(), content_type="application/json"):
        # Before the last byte, because the client's next request may arrive before the next line.
        self.done()
        self.head(status, len(data), headers, content_type)
        self.wfile.write(data)
        self.wfile.flush()

    def head(self, status, length, headers=(), content_type="application/json"):
        self.send_response(status)
        headers = dict(headers) | {"Content-Type": content_type, "Content-Length": length}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def done(self):
        with self.server.lock:
            self.server.active -= 1

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(plan=lambda prompt, attempt: "good") -> Server:
        servers.append(Server(plan))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def flags(server: Server, folder: Path, *words) -> list[str]:
    words = ["--base_url", server.url, "--out_dir", folder, *words]
    return ["generate_finetune_data.py", *map(str, words)]


def generate(server: Server, folder: Path, *words, **kwargs) -> subprocess.CompletedProcess:
    result = command(*flags(server, folder, *words), env=ENV, **kwargs)
    assert_no_key(folder, result.stdout + result.stderr)
    return result


def assert_no_key(folder: Path, output: str):
    assert KEY not in output
    for path in folder.rglob("*"):
        assert not path.is_file() or KEY not in path.read_text()


def start(server: Server, folder: Path, *words) -> subprocess.Popen:
    words = [sys.executable, *flags(server, folder, *words)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def enable_ctrl_c():  # a shell disables it for processes in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(words, cwd=ROOT, env=ENV, preexec_fn=enable_ctrl_c, **pipes)


def wait_for(condition):
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)


def records(folder: Path) -> list[dict]:
    """The complete lines of the jsonl file."""
    path = folder / "finetune_data.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def blocks(folder: Path) -> list[str]:
    text = (folder / "finetune_data.txt").read_text()
    found = re.findall(r"^<LOC>\n(.*?)\n</LOC>$", text, re.S | re.M)
    assert text == "\n".join(f"<LOC>\n{block}\n</LOC>\n" for block in found)
    return found


def killed_and_run_again(serve, folder: Path, samples: int, kills: int):
    """A run that is ended `kills` times with kill -9 while 30% of its requests go wrong."""

    def plan(prompt, attempt):
        rng = random.Random(f"{prompt} {attempt}")
        if attempt > 4 or rng.random() > 0.3:
            return "good"
        if rng.random() < 0.02:
            return "silent:4"
        kind = rng.choice(REJECTED + FAILED)
        return "429:0.02" if kind == "429" else kind

    server, concurrency = serve(plan), 12
    words = ["--num_samples", samples, "--concurrency", concurrency, "--timeout", 2]
    output, lost = "", set()
    for goal in [samples * (n + 1) // (kills + 1) for n in range(kills)]:
        process = start(server, folder, *words)
        wait_for(lambda: len(server.good) >= goal)  # noqa: B023
        process.kill()
        output += "".join(process.communicate())
        wait_for(lambda: server.active == 0)
        kept = {record["text"] for record in records(folder)}
        last_write = (folder / "finetune_data.jsonl").stat().st_mtime
        missing = server.good.keys() - kept - lost
        assert len(missing) <= concurrency
        # Only answers of the last moment may be missing: each is written as soon as it arrives.
        assert all(server.good[text] > last_write - 0.5 for text in missing)
        lost |= missing
    result = ok(generate(server, folder, *words))
    assert_no_key(folder, output)

    lines = records(folder)
    assert len(lines) == samples
    assert len({(line["seed"]["place"], line["seed"]["culture"]) for line in lines}) == samples
    assert len({line["text"] for line in lines}) == samples
    assert {line["text"] for line in lines} <= server.good.keys()
    assert len(server.good) <= samples + kills * concurrency, "answers were thrown away"
    assert blocks(folder) == [line["text"] for line in lines]
    for line in lines:
        assert line["model"] == "gpt-4.1"
        assert (line["prompt_tokens"], line["completion_tokens"]) == (100, 250)
    assert 4 < server.peak <= concurrency
    bad = sum(kind != "good" for _, kind, _ in server.requests) / len(server.requests)
    assert 0.2 < bad < 0.4
    assert f"{samples:,} descriptions ({samples:,} by gpt-4.1)" in result.stdout
    assert "near-duplicates (Jaccard similarity of word 5-grams of 0.3 or more): 0" in result.stdout
    again = ok(generate(server, folder, *words))
    assert records(folder) == lines
    assert "resuming after" in again.stdout


def test_descriptions_are_complete_although_requests_fail_and_the_run_is_killed(serve, tmp_path):
    killed_and_run_again(serve, tmp_path, samples=150, kills=1)


@pytest.mark.slow
def test_a_thousand_descriptions_are_complete_although_the_run_is_killed_thrice(serve, tmp_path):
    killed_and_run_again(serve, tmp_path, samples=1000, kills=3)


def test_each_failure_is_requested_again_and_counted(serve, tmp_path):
    # A seed is given up after six rejected answers. Failures are spread over the attempts, because
    # the client doubles its waits only while a request fails repeatedly.
    scripts = [
        ["refusal", "429", "polite refusal", "500", "filtered", "503", "empty", "dropped", "null"],
        ["truncated", "short", "silent:2", "long", "cut", "delimiter", "duplicate"],
        ["not JSON", "no choices", "HTML"],
    ]
    prompts = {}

    def plan(prompt, attempt):
        if prompt not in prompts:
            prompts[prompt] = iter(scripts.pop(0))
        return next(prompts[prompt], "good")

    server = serve(plan)
    words = ["--num_samples", 3, "--concurrency", 1, "--timeout", 1]
    out = ok(generate(server, tmp_path, *words)).stdout
    rejected = re.search("answers rejected: (.*); requests", out)[1]
    assert set(rejected.split(", ")) == {
        "3 refusal", "2 empty", "1 too short", "1 too long", "1 cut off", "1 delimiter",
        "1 near-duplicate", "3 malformed",
    }  # fmt: skip
    retried = re.search("requests retried: (.*)", out)[1]
    assert set(retried.split(", ")) == {
        "1 rate limit (429)", "1 status 500", "1 status 503", "2 no connection", "1 timeout"
    }  # fmt: skip
    assert out.count("warning: ") == 5, "one for each kind of failure"
    assert f"warning: {server.url}/: rate limit (429); a request is retried up to 20 times" in out
    answers = 10 + 3  # with token counts
    cost = (answers * 100 * 2 + answers * 250 * 8) / 1e6
    assert f"{answers * 100:,} + {answers * 250:,} tokens, ${cost:.2f}" in out
    assert len(blocks(tmp_path)) == 3


def test_prompts_contain_their_seeds_and_five_are_sent_at_a_time(serve, tmp_path):
    """The first one is always refused, so another seed takes its place in the end."""
    refused = []

    def plan(prompt, attempt):
        if not refused:
            refused.append(prompt)
        return "refusal" if prompt in refused else "late:0.1"

    server = serve(plan)
    out = ok(generate(server, tmp_path, "--num_samples", 20, "--concurrency", 5)).stdout
    assert server.peak == 5
    prompts = [prompt for *_, prompt in server.requests]
    assert len(prompts) == 20 + 6
    assert len(set(prompts)) == 20 + 1
    assert "6 refusal" in out
    by_text = {prose(f"{prompt} 1"): prompt for prompt in prompts}
    assert len(records(tmp_path)) == 20
    for record in records(tmp_path):
        assert set(record["seed"]) == {"place", "mood", "culture", "time", "weather"}
        assert all(word in by_text[record["text"]] for word in record["seed"].values())


@pytest.mark.parametrize("date", [False, True])
def test_retry_after_delays_all_requests(serve, tmp_path, date):
    limited = []  # time of the 429

    def plan(prompt, attempt):
        if len(server.requests) < 8 or limited:
            return "good"
        limited.append(time.time())
        return "429:" + (formatdate(limited[0] + 2, usegmt=True) if date else "1")

    server = serve(plan)
    out = ok(generate(server, tmp_path, "--num_samples", 30, "--concurrency", 4)).stdout
    times = [moment for moment, *_ in server.requests]
    assert not [moment for moment in times if limited[0] + 0.3 < moment < limited[0] + 0.99]
    assert len(records(tmp_path)) == 30
    assert "rate limit (429) (Retry-After: " in out


def test_an_error_ends_the_run_and_keeps_all_paid_answers(serve, tmp_path):
    """The key becomes invalid during the run. Requests sent earlier arrive and are kept."""

    def plan(prompt, attempt):
        number = len(server.requests)
        if number < 5:
            return "good"
        return "late:0.5" if number < 8 else "401"

    server = serve(plan)
    line = one_line(generate(server, tmp_path, "--num_samples", 500, "--concurrency", 4))
    assert "refuses the key (401)" in line
    assert "8 descriptions are kept in" in line
    assert len(records(tmp_path)) == len(server.good) == 8
    server.plan = lambda prompt, attempt: "good"
    ok(generate(server, tmp_path, "--num_samples", 20))
    assert server.good.keys() == set(blocks(tmp_path))


@pytest.mark.parametrize("waiting", ["429:60", "503:60"])
def test_an_error_ends_the_waits_of_other_requests(serve, tmp_path, waiting):
    """With 429, all but one request are held back, and that one's retry gets the 401."""

    def plan(prompt, attempt):
        number = len(server.requests)
        if number < 2:
            return waiting
        return "late:0.5" if number == 2 else "401"

    server = serve(plan)
    started = time.monotonic()
    line = one_line(generate(server, tmp_path, "--num_samples", 500, "--concurrency", 4))
    assert time.monotonic() - started < 30
    assert "refuses the key (401)" in line
    assert len(records(tmp_path)) == len(server.good) == 1


@pytest.mark.parametrize(
    "kind, expected, requests",
    [
        ("401", "refuses the key (401): check OPENAI_API_KEY", 4),
        ("404", "has no model 'gpt-4.1' (404)", 4),
        ("400", "refuses the request (400)", 4),
        ("policy", "100 answers in a row were rejected (100 refusal)", 104),
        ("quota", "the account's quota is used up", 4),
        ("429:5000", "rate limit (429); the server asks to wait (Retry-After: 5000)", 4),
        ("500", "status 500, after 2 retries; 0 descriptions are kept", 12),
        ("HTML", "100 answers in a row were rejected (100 malformed): check base_url", 104),
        ("short", "100 answers in a row were rejected (100 too short)", 104),
    ],
)
def test_a_permanent_failure_ends_the_run(
    serve, tmp_path, kind, expected, requests, monkeypatch, capsys
):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "*")
    server = serve(lambda prompt, attempt: kind)
    config = Config(base_url=server.url, out_dir=str(tmp_path), concurrency=4, max_retries=2)
    with pytest.raises(UserError) as raised:
        main(config)
    assert expected in str(raised.value)
    assert len(server.requests) <= requests
    assert not (tmp_path / "finetune_data.txt").exists()
    assert_no_key(tmp_path, str(raised.value) + "".join(capsys.readouterr()))


def test_an_unreachable_server_is_a_one_line_error_and_keeps_the_file(serve, tmp_path):
    server = serve()
    ok(generate(server, tmp_path, "--num_samples", 3))
    before = records(tmp_path)
    server.url = "http://127.0.0.1:9/v1"  # nothing listens at this port
    line = one_line(generate(server, tmp_path, "--num_samples", 9, "--max_retries", 2))
    assert "no connection, after 2 retries; 3 descriptions are kept in" in line
    assert "run again to resume" in line
    assert records(tmp_path) == before


def test_a_second_run_is_refused_and_ctrl_c_keeps_all_answers(serve, tmp_path):
    server = serve(lambda prompt, attempt: "good" if len(server.requests) < 20 else "late:60")
    process = start(server, tmp_path, "--num_samples", 100, "--concurrency", 4)
    wait_for(lambda: len(records(tmp_path)) == 20)
    assert "another run is writing" in one_line(generate(server, tmp_path))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert err.strip().splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in out + err
    assert len(records(tmp_path)) == 20


def test_ctrl_c_ends_the_wait_for_a_rate_limit(serve, tmp_path):
    server = serve(lambda prompt, attempt: "good" if len(server.requests) < 5 else "429:100")
    process = start(server, tmp_path, "--num_samples", 100, "--concurrency", 4)
    wait_for(lambda: len(server.requests) > 5 and len(records(tmp_path)) == 5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert err.strip().splitlines()[-1] == "error: interrupted"
    assert len(records(tmp_path)) == 5


def test_a_full_disk_is_a_one_line_error_and_loses_nothing(serve, tmp_path):
    server = serve()
    words = ["--num_samples", 30, "--concurrency", 1]

    def limit_file_size():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    line = one_line(generate(server, tmp_path, *words, preexec_fn=limit_file_size))
    assert "make room, then run again" in line
    data = (tmp_path / "finetune_data.jsonl").read_bytes()
    assert 7_000 < len(data) <= 10_000
    assert data.endswith(b"\n")
    ok(generate(server, tmp_path, *words))
    assert (tmp_path / "finetune_data.jsonl").read_bytes().startswith(data)
    assert len(blocks(tmp_path)) == 30


# ---------------------------------------------------------------------------------------------
# Without a server


def offline(folder: Path, *words) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    return command("generate_finetune_data.py", "--offline", "--out_dir", folder, *words, env=env)


@pytest.fixture(scope="module")
def thousand(tmp_path_factory) -> Path:
    """The folder of a run with --offline and the default settings."""
    folder = tmp_path_factory.mktemp("offline")
    out = ok(offline(folder)).stdout
    assert "1,000 descriptions (1,000 by offline)" in out
    assert "vocabulary" in out
    assert "5-grams of 0.3 or more): 0;" in out
    return folder


def test_offline_writes_a_thousand_descriptions_of_the_grammar(thousand):
    lines = records(thousand)
    texts = [line["text"] for line in lines]
    assert texts == blocks(thousand)
    assert texts == [as_text(describe(seed, 0, 150, 400)) for seed in prompt_seeds(0)[:1000]]
    assert [tuple(line["seed"].values()) for line in lines] == prompt_seeds(0)[:1000]
    assert {line["model"] for line in lines} == {"offline"}


def test_offline_gives_the_same_descriptions_even_if_interrupted(thousand, tmp_path):
    ok(offline(tmp_path, "--num_samples", 40))
    path = tmp_path / "finetune_data.jsonl"
    path.write_bytes(path.read_bytes()[:-100])
    ok(offline(tmp_path, "--num_samples", 60))
    assert path.read_text() == "".join((thousand / path.name).open().readlines()[:60])
    ok(offline(tmp_path / "other", "--num_samples", 60, "--seed", 1))
    other_texts = {record["text"] for record in records(tmp_path / "other")}
    assert not other_texts & {record["text"] for record in records(tmp_path)}


def test_offline_and_a_model_do_not_mix(serve, tmp_path):
    server = serve()
    ok(generate(server, tmp_path / "model", "--num_samples", 2))
    ok(offline(tmp_path / "grammar", "--num_samples", 2))
    before = [records(tmp_path / name) for name in ("model", "grammar")]
    line = one_line(generate(server, tmp_path / "grammar"))
    assert "by the grammar, which does not mix with a model: run with --offline" in line
    line = one_line(offline(tmp_path / "model"))
    assert "by a model, which does not mix with the grammar: run without --offline" in line
    assert [records(tmp_path / name) for name in ("model", "grammar")] == before


def test_dry_run_shows_a_prompt_and_the_cost_without_key_or_network(tmp_path):
    unset = ("OPENAI_API_KEY", "TIKTOKEN_CACHE_DIR")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    words = ["--dry_run", "--base_url", "http://127.0.0.1:9", "--out_dir", tmp_path / "new"]
    out = ok(command("generate_finetune_data.py", *words, env=env)).stdout
    assert all(word in out for word in prompt_seeds(0)[0])
    cost = float(re.search(r"\$(\d+\.\d+) at", out)[1])
    assert 2 < cost < 5
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--num_samples", 0], "num_samples and concurrency must be at least 1"),
        (["--concurrency", 0], "num_samples and concurrency must be at least 1"),
        (["--num_samples", 10**6], "num_samples must be at most 2,400"),
        (["--min_words", 300, "--max_words", 200], "max_words greater than min_words"),
        (["--min_words", 300, "--max_words", 310, "--offline"], "max_words must be at least"),
        (["--base_url", "localhost:8000"], "base_url must be like http"),
        (["--base_url", "http://host:80000/v1"], "base_url must be like http"),
        (["--out_dir", ROOT / "README.md", "--offline"], "can't be written"),
        (["--offline", "--dry_run"], "exclude each other"),
        ([], "no API key: set OPENAI_API_KEY"),
    ],
)
def test_wrong_input_is_a_one_line_error(tmp_path, words, expected):
    env = dict(ENV, OPENAI_API_KEY=" ")
    result = command("generate_finetune_data.py", "--out_dir", tmp_path, *words, env=env)
    assert expected in one_line(result)
    assert not [path for path in tmp_path.iterdir() if path.stat().st_size]


def test_an_invalid_key_is_not_shown(tmp_path):
    env = dict(ENV, OPENAI_API_KEY=KEY + "\n" + KEY)
    result = command("generate_finetune_data.py", "--out_dir", tmp_path, env=env)
    assert "characters that no key has" in one_line(result)
    assert_no_key(tmp_path, result.stdout + result.stderr)
