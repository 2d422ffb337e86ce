"""generate_finetune_data.py with a local server that misbehaves on demand, and with the grammar."""

import json
import os
import random
import re
import resource
import signal
import socket
import ssl
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
    "not JSON, no choices"
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
        # Imitates another server: respond(handler, body) returns a body and a status.
        self.respond = None
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
        if self.server.respond:
            return self.imitate(body)
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

    def do_GET(self):  # after some redirects
        self.server.active += 1
        self.reply(b"<html><title>Welcome</title></html>", content_type="text/html")

    def imitate(self, body: dict):
        with self.server.lock:
            self.server.active += 1
            headers = {name.lower(): value for name, value in self.headers.items()}
            self.server.requests.append((self.path, headers, body))
            answer = self.server.respond(self, body)
        answer, status, headers = (*answer, {}) if len(answer) == 2 else answer
        if isinstance(answer, str):
            self.reply(answer.encode(), status, headers, content_type="text/html")
        else:
            self.reply(json.dumps(answer).encode(), status, headers)

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
        message = f"{kind}: what is this model? {self.headers['Authorization']}"
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
        "1 near-duplicate", "2 malformed",
    }  # fmt: skip
    retried = re.search("requests retried: (.*)", out)[1]
    assert set(retried.split(", ")) == {
        "1 rate limit (429)", "1 status 500", "1 status 503", "2 connection lost", "1 timeout",
        "1 web page",
    }  # fmt: skip
    assert out.count("warning: ") == 6, "one for each kind of failure"
    url = f"{server.url}/chat/completions"
    assert f"warning: {url}: rate limit (429): 429: what is this model? Bearer ***; a req" in out
    assert "a request is retried up to 20 times" in out
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
        ("quota", "the account's quota is used up (429: quota: what is", 4),
        ("429:5000", "rate limit (429); the server asks to wait (Retry-After: 5000)", 4),
        ("500", "status 500, after 2 retries: 500: what is this model?", 12),
        ("HTML", "a web page instead of JSON; check base_url", 4),
        ("not JSON", "5 answers in a row were rejected (5 malformed; the last one: it is not", 9),
        ("cut", "5 answers in a row were rejected (5 cut off): raise max_answer_tokens", 9),
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
    assert "connection refused: is the server running?, after 2 retries; 3 descriptions" in line
    assert "run again to resume" in line
    assert records(tmp_path) == before


def test_a_second_run_is_refused_and_ctrl_c_keeps_all_answers(serve, tmp_path):
    server = serve(lambda prompt, attempt: "good" if len(server.requests) < 20 else "late:60")
    process = start(server, tmp_path, "--num_samples", 100, "--concurrency", 4)
    wait_for(lambda: len(records(tmp_path)) == 20)
    assert "is in use by process" in one_line(generate(server, tmp_path))
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


@pytest.mark.slow
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
# Servers that are not quite like OpenAI's


def completion(body: dict, text: str | None = None, usage=None, finish="stop", **message) -> dict:
    """A chat completion of 200 random words, which are the same for the same prompt."""
    text = prose(str(body["messages"])) if text is None else text
    message = dict(role="assistant", content=text) | message
    choices = [dict(index=0, message=message, finish_reason=finish)]
    return dict(object="chat.completion", choices=choices, usage=usage)


@pytest.fixture
def imitate(serve, tmp_path, monkeypatch, capsys):
    """imitate(respond, ...) -> (server, output): a run in this process with a server's imitation.

    `output` is all that was printed, and the text of the error if there was one.
    """
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def run(respond, path="/v1", error=None, **settings):
        server = serve()
        server.respond = respond
        defaults = dict(num_samples=3, concurrency=2, out_dir=str(tmp_path))
        base_url = server.url.removesuffix("/v1") + path
        config = Config(**defaults | dict(base_url=base_url) | settings)
        if error is None:
            main(config)
            text = ""
        else:
            with pytest.raises(UserError) as raised:
                main(config)
            text = str(raised.value)
            assert error in text
            assert "\n" not in text
        output = text + "".join(capsys.readouterr())
        assert_no_key(tmp_path, output)
        return server, output

    return run


FRAMES = [
    "<think>They want a place.\n\n# A plan\n- salt\n</think>\n\n{}",
    "They want a place. Word count?\n</think>\n\n{}",
    "[THINK]Hm.[/THINK]{}",
    "Sure! Here is the description you asked for:\n\n{}",
    "Certainly. Here's a 200-word description: {}",
    "# The Salt Tower\n\n{}",
    "**The Salt Tower**\n\n{}\n\nLet me know if you'd like another one!",
    "<think>\n</think>\n\nOf course!\n\n---\n\n## The Salt Tower\n\n{}\n\n---\n\n(Word count: 200)",
]


def test_reasoning_preambles_and_titles_are_not_in_the_data(imitate, tmp_path):
    frames = iter(FRAMES)

    def respond(handler, body):
        return completion(body, next(frames).format(prose(str(body["messages"])))), 200

    server, output = imitate(respond, num_samples=len(FRAMES), concurrency=1)
    assert "answers rejected: none" in output
    sent = [prose(str(body["messages"])) for _, _, body in server.requests]
    assert blocks(tmp_path) == [record["text"] for record in records(tmp_path)] == sent


@pytest.mark.parametrize(
    "form, reason",
    [
        ("Sure! {}", "preamble"),
        ("{}\n\n- salt\n- stone\n", "markup"),
        ("{}\n\n## The Gate\n\nMore.", "markup"),
        ("{} <b>bold</b> <|im_start|>", "markup"),
        ("<think>{}", "only reasoning"),
    ],
)
def test_a_frame_that_cannot_be_removed_is_rejected(imitate, form, reason):
    number = iter(range(100))

    def respond(handler, body):
        text = prose(str(body["messages"]))
        return completion(body, text if next(number) else form.format(text)), 200

    _, output = imitate(respond)
    assert f"answers rejected: 1 {reason};" in output


def test_content_in_parts_and_reasoning_in_another_field(imitate, tmp_path):
    def respond(handler, body):
        text = prose(str(body["messages"]))
        thinking = dict(type="thinking", thinking=[dict(type="text", text="Hm.")])
        parts = [thinking, dict(type="text", text=text)]
        return completion(body, parts, reasoning_content="Hm."), 200

    imitate(respond)
    assert all(record["text"].endswith(".") for record in records(tmp_path))
    assert not any("Hm" in record["text"] for record in records(tmp_path))


MISTRAL = dict(
    type="extra_forbidden", loc=["body", "max_completion_tokens"], msg="Extra inputs not permitted"
)


@pytest.mark.parametrize(
    "error, status",
    [
        (dict(object="error", message=dict(detail=[MISTRAL])), 422),
        (dict(object="error", message=str([MISTRAL]), code=400), 400),
        (dict(error=dict(message="Unrecognized request argument: max_completion_tokens")), 400),
        (dict(error=dict(message="unsupported: max_completion_tokens", code=400)), 200),
    ],
)
def test_a_server_that_only_knows_max_tokens(imitate, tmp_path, error, status):
    def respond(handler, body):
        return (error, status) if "max_completion_tokens" in body else (completion(body), 200)

    server, output = imitate(respond, num_samples=20, max_answer_tokens=900)
    assert output.count("does not know max_completion_tokens: sending max_tokens instead") == 1
    bodies = [body for *_, body in server.requests]
    assert [body.get("max_tokens", 900) for body in bodies] == [900] * len(bodies)
    assert sum("max_completion_tokens" in body for body in bodies) <= 2
    assert len(records(tmp_path)) == 20


def test_a_token_limit_that_is_too_large_is_shown_with_the_first_error(imitate):
    def respond(handler, body):
        if "max_tokens" in body:
            return dict(error=dict(message="max_tokens: use max_completion_tokens instead")), 400
        return dict(error=dict(message="max_completion_tokens: at most 2048, not 3200")), 400

    server, output = imitate(respond, error="at most 2048, not 3200: lower max_answer_tokens")
    assert "sending max_tokens" not in output
    assert len(server.requests) <= 4


@pytest.mark.parametrize("form", ["null", "empty", "field", "length", "unclosed"])
def test_a_model_that_spends_the_limit_on_reasoning_ends_the_run_early(imitate, form):
    details = dict(reasoning_tokens=3200)
    usage = dict(prompt_tokens=100, completion_tokens=3200, completion_tokens_details=details)

    def respond(handler, body):
        text = {"null": None, "unclosed": "<think>Hm."}.get(form, "")
        reasoning = dict(reasoning_content="Hm.") if form == "field" else {}
        finish = "length" if form == "length" else "stop"
        answer = completion(body, text or "", usage, finish, **reasoning)
        answer["choices"][0]["message"]["content"] = text
        return answer, 200

    error = "5 answers in a row were rejected (5 only reasoning): raise max_answer_tokens (it is 3,"
    server, output = imitate(respond, error=error, num_samples=100)
    assert len(server.requests) <= 6
    assert "--extra_body" in output
    # They are paid for, so they are counted.
    assert re.search(r"this run: [56]00 \+ 1[69],[02]00 tokens", output)


def test_flags_for_limit_temperature_headers_and_body_are_sent(imitate):
    headers = {"X-Title": "tower", "x-api-key": "$OPENAI_API_KEY"}
    server, _ = imitate(
        lambda handler, body: (completion(body), 200),
        max_answer_tokens=1234,
        temperature=0.7,
        extra_headers=json.dumps(headers),
        extra_body='{"reasoning_effort": "low", "provider": {"only": ["x"]}}',
    )
    for _, sent, body in server.requests:
        assert sent["x-title"] == "tower"
        assert sent["x-api-key"] == KEY
        assert sent["authorization"] == f"Bearer {KEY}"
        assert body["max_completion_tokens"] == 1234
        assert body["temperature"] == 0.7
        assert body["reasoning_effort"] == "low"
        assert body["provider"] == {"only": ["x"]}


def test_nothing_is_sent_for_flags_that_are_not_given(imitate):
    server, _ = imitate(lambda handler, body: (completion(body), 200))
    assert {*server.requests[0][2]} == {"model", "messages", "max_completion_tokens"}
    server, _ = imitate(
        lambda handler, body: (completion(body), 200), num_samples=6, extra_body='{"max_tokens": 9}'
    )
    assert {*server.requests[0][2]} == {"model", "messages", "max_tokens"}


@pytest.mark.parametrize(
    "usage, counts",
    [
        (None, (0, 0)),
        ({}, (0, 0)),
        (dict(prompt_tokens=7), (7, 0)),
        (dict(prompt_tokens=7, completion_tokens=None, total_tokens=9), (7, 0)),
        (dict(prompt_tokens=7.0, completion_tokens="8"), (7, 8)),
        (dict(prompt_tokens="many", completion_tokens=-1), (0, 0)),
        (dict(prompt_tokens=7, completion_tokens=8, completion_tokens_details=None), (7, 8)),
        ([1, 2], (0, 0)),
        ("none", (0, 0)),
    ],
)
def test_partial_token_counts_do_not_matter(imitate, tmp_path, usage, counts):
    _, output = imitate(lambda handler, body: (completion(body, usage=usage), 200))
    assert "answers rejected: none" in output
    for record in records(tmp_path):
        assert (record["prompt_tokens"], record["completion_tokens"]) == counts


@pytest.mark.parametrize(
    "answer, expected, requests",
    [
        (
            dict(error=dict(message="no such key", code=401)),
            "OPENAI_API_KEY; the server says: no such key",
            2,
        ),
        (dict(error=dict(message="model x not found", code=404)), "has no model 'gpt-4.1'", 2),
        (dict(error=dict(message="bad", type="invalid_request_error")), "in status 200): bad", 2),
        (dict(error=dict(message="you owe us", code="insufficient_quota")), "quota is used up", 2),
        (dict(error="the GPU is on fire"), "error in status 200, after 1 retry: the GPU is", 4),
        (dict(error=dict(message="busy", code=503)), "after 1 retry: busy", 4),
        (dict(detail="Internal trouble"), "Internal trouble", 4),
        ("<html><title>Open\n WebUI</title></html>", "a web page titled 'Open WebUI' instead", 2),
        ("<!DOCTYPE html><html></html>", "a web page instead of JSON", 2),
        ("data: {}", "(5 malformed; the last one: data: {})", 6),
        ("", "5 malformed", 6),
        ([], "5 malformed", 6),
        (None, "5 malformed", 6),
        (dict(choices=[]), "5 malformed; the last one: it has no choices", 6),
        (dict(choices=[dict(text="of another API")]), "5 malformed; the last one: it has no", 6),
    ],
)
def test_an_error_in_status_200_is_shown(imitate, answer, expected, requests):
    settings = dict(error=expected, num_samples=50, max_retries=1)
    server, _ = imitate(lambda handler, body: (answer, 200), **settings)
    assert len(server.requests) <= requests


def test_errors_in_status_200_are_retried_once_the_server_has_answered(imitate, tmp_path):
    bad = iter(["<html></html>", dict(error="overloaded"), dict(error=dict(code=429, message="x"))])
    number = iter(range(100))

    def respond(handler, body):
        return (next(bad), 200) if next(number) in (1, 3, 5) else (completion(body), 200)

    _, output = imitate(respond, num_samples=6, concurrency=1)
    assert "requests retried: 2 error in status 200, 1 web page" in output
    assert len(records(tmp_path)) == 6


@pytest.mark.parametrize(
    "answer, status, expected",
    [
        (dict(error=dict(message="the model 'x' does not exist")), 404, "has no model 'gpt-4.1'"),
        (dict(detail="Not Found"), 404, "not a path for chat completions (404): Not Found; check"),
        ("<html><title>404</title></html>", 405, "(405): a web page titled '404' instead"),
        (dict(error=dict(message="no credit")), 402, "quota is used up (402: no credit)"),
        (dict(error="not here"), 501, "refuses the request (501): not here"),
        (dict(message="no\x1b[2J access"), 403, "refuses the request (403): no [2J access"),
        (dict(error=dict(message="needs 40 GiB")), 500, "status 500, after 1 retry: needs 40"),
        (
            dict(error=dict(message="Provider error", metadata=dict(raw="context too long"))),
            400,
            "Provider error context too long",
        ),
    ],
)
def test_the_servers_reason_is_shown(imitate, answer, status, expected):
    imitate(lambda handler, body: (answer, status), error=expected, max_retries=1)


def test_a_redirect_is_shown(imitate):
    def respond(handler, body):
        return {}, 301, {"Location": "/elsewhere?key=secret-of-the-user"}

    _, output = imitate(respond, error="/elsewhere; check base_url")
    assert "secret-of-the-user" not in output


@pytest.mark.parametrize(
    "given, path",
    [
        ("", "/v1/chat/completions"),
        ("/", "/v1/chat/completions"),
        ("/v1/", "/v1/chat/completions"),
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/models", "/v1/chat/completions"),
        ("/api/v1/chat/completions/", "/api/v1/chat/completions"),
        ("/openai", "/openai/v1/chat/completions"),
        ("/root", "/root/chat/completions"),
        (
            "/openai/deployments/x?api-version=2024-10-21",
            "/openai/deployments/x/chat/completions?api-version=2024-10-21",
        ),
        (
            "/openai/deployments/x/chat/completions?api-version=2024-10-21",
            "/openai/deployments/x/chat/completions?api-version=2024-10-21",
        ),
    ],
)
@pytest.mark.parametrize("missing", ["404", "page", "LM Studio"])
def test_base_urls_of_all_kinds(imitate, tmp_path, given, path, missing):
    def respond(handler, body):
        if handler.path == path:
            return completion(body), 200
        if missing == "page":
            return "<html></html>", 200
        if missing == "LM Studio":
            return dict(error="Unexpected endpoint or method. (POST /chat/completions)"), 200
        return dict(detail="Not Found"), 404

    server, output = imitate(respond, path=given)
    assert len(records(tmp_path)) == 3
    adds_v1 = given in ("", "/", "/openai")
    assert output.count("use that as base_url") == adds_v1
    if "api-version" in given:
        assert {headers["api-key"] for _, headers, _ in server.requests} == {KEY}


def test_the_wrong_path_is_not_retried_when_another_request_has_found_the_right_one(imitate):
    """Of two parallel requests, one is answered with a page after the other one has succeeded."""
    answered = threading.Event()

    def respond(handler, body):
        if handler.path == "/v1/chat/completions":
            answered.set()
            return completion(body), 200
        if requests:
            held_back.append(handler)
        requests.append(handler)
        return "<html></html>", 200

    requests = []
    held_back = []
    reply = Handler.reply

    def reply_late(handler, *args, **kwargs):
        if handler in held_back:
            assert answered.wait(30)
            time.sleep(0.3)  # until the client has read the answer
        reply(handler, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Handler, "reply", reply_late)
        server, _ = imitate(respond, path="")
    assert len(held_back) == 1
    assert [path for path, _, _ in server.requests].count("/chat/completions") == 2


def test_a_path_that_does_not_exist_with_v1_either(imitate):
    error = "/nowhere/chat/completions is not a path for chat completions (404): Not Found; check"
    server, output = imitate(
        lambda handler, body: (dict(detail="Not Found"), 404), path="/nowhere", error=error
    )
    assert "check base_url, which often ends in /v1" in output
    assert len(server.requests) <= 4


def test_causes_of_failed_connections_are_shown_soon(imitate, serve, tmp_path):
    started = time.monotonic()
    _, output = imitate(None, base_url="http://127.0.0.1:9/v1", error="connection refused")
    assert "a request is retried up to 3 times" in output
    for url, cause in {
        "http://no-such-host.invalid/v1": "the host name no-such-host.invalid is unknown",
        "http://localhost:9/v1": "connection refused: is the server running?, after 3 retries",
    }.items():
        imitate(None, base_url=url, error=cause)
    # TLS without TLS, and with a certificate that nobody knows
    server = serve()
    url = server.url.replace("http:", "https:")
    imitate(None, base_url=url, error="perhaps the server speaks http, not https")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=x",
         "-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    server = serve()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    url = server.url.replace("http:", "https:")
    imitate(None, base_url=url, error="the TLS certificate is not trusted (self")
    assert time.monotonic() - started < 30


def test_connections_are_retried_longer_once_the_server_has_answered(imitate, monkeypatch):
    """A name that can't be resolved for a moment, in the middle of a run, does not end it."""
    from httpx2 import ConnectError

    from fantasy import chat

    number = iter(range(100))
    send = chat.openai.DefaultAsyncHttpxClient.send

    async def flaky(self, request, **kwargs):
        if next(number) == 2:
            raise ConnectError("x") from socket.gaierror(socket.EAI_NONAME, "unknown")
        return await send(self, request, **kwargs)

    monkeypatch.setattr(chat.openai.DefaultAsyncHttpxClient, "send", flaky)
    _, output = imitate(lambda handler, body: (completion(body), 200), concurrency=1)
    assert "requests retried: 1 unknown host" in output


def test_a_long_retry_after_is_waited_for(imitate, monkeypatch, tmp_path):
    """With limits of 0.3 s instead of two minutes, the server asks for 1 s."""
    from openai import _base_client

    from fantasy import chat

    monkeypatch.setattr(_base_client, "MAX_RETRY_AFTER_DELAY", 0.3)
    monkeypatch.setattr(chat, "CLIENT_WAIT", 0.3)
    times = []

    def respond(handler, body):
        times.append(time.monotonic())
        if len(times) == 3:
            return dict(error="slow down"), 429, {"Retry-After": "1"}
        return completion(body), 200

    imitate(respond, num_samples=6)
    # Requests that were on their way arrive, then all wait.
    assert max(b - a for a, b in zip(times, times[1:])) > 0.95
    assert len(records(tmp_path)) == 6


@pytest.mark.parametrize(
    "environment, expected",
    [
        (dict(OPENAI_BASE_URL="localhost:8000"), "OPENAI_BASE_URL (an environment variable) must"),
        (dict(OPENAI_BASE_URL="http://me:secret@:1"), "OPENAI_BASE_URL (an environment variable)"),
        (dict(ALL_PROXY="socks5://me:secret@127.0.0.1:1"), "ALL_PROXY names a SOCKS proxy"),
        (dict(all_proxy="socks://me:secret@127.0.0.1:1"), "all_proxy is not valid"),
        (dict(HTTPS_PROXY="me:secret"), "HTTPS_PROXY is not valid"),
        (dict(SSL_CERT_FILE="/nowhere"), "SSL_CERT_FILE is not valid"),
    ],
)
def test_wrong_settings_in_the_environment_are_named(imitate, monkeypatch, environment, expected):
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = dict(base_url=None) if "OPENAI_BASE_URL" in environment else {}
    _, output = imitate(None, error=expected, **settings)
    assert "secret" not in output


def test_the_url_may_come_from_the_environment(imitate, serve, monkeypatch, tmp_path):
    server = serve()
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    imitate(None, base_url=None)
    assert len(server.requests) == len(records(tmp_path)) == 3


@pytest.mark.parametrize("key", ["a", "none", "EMPTY"])
def test_a_short_key_does_not_mask_words(imitate, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)

    def respond(handler, body):
        return dict(error=f"a bad mark, none or EMPTY: {handler.headers['Authorization']}"), 400

    _, output = imitate(respond, error="a bad mark, none or EMPTY: Bearer ***;")
    assert f"Bearer {key}" not in output


def test_keys_in_url_and_headers_are_not_shown(imitate):
    def respond(handler, body):
        sent = f"{handler.path} {handler.headers['X-Auth-Token']}"
        return dict(error=f"{sent} {handler.headers['X-Title']}"), 400

    path = "/v1?key=secret-in-url&version=2024-10-21"
    headers = '{"X-Auth-Token": "secret-in-header", "X-Title": "our-tower"}'
    _, output = imitate(respond, path=path, extra_headers=headers, error="our-tower")
    assert "secret" not in output


@pytest.mark.parametrize(
    "settings, expected",
    [
        (dict(seed=-1), "seed is -1, must be at least 0"),
        (dict(concurrency=0), "concurrency is 0, must be at least 1"),
        (dict(num_samples=-1), "num_samples is -1, must be between 1 and 2,400"),
        (dict(min_words=0), "min_words is 0, must be at least 1"),
        (dict(max_words=-1), "max_words is -1, must be greater than min_words (150)"),
        (dict(max_answer_tokens=0), "max_answer_tokens is 0, must be at least 1"),
        (dict(temperature=-0.1), "temperature is -0.1, must be at least 0"),
        (dict(temperature=float("nan")), "temperature is nan, must be at least 0"),
        (dict(timeout=float("nan")), "timeout is nan, must be greater than 0"),
        (dict(timeout=0), "timeout is 0, must be greater than 0"),
        (dict(max_retries=-1), "max_retries is -1, must be at least 0"),
        (dict(input_price=-1), "input_price is -1, must be at least 0"),
        (dict(output_price=float("inf")), "output_price is inf, must be at least 0"),
        (dict(model=" "), "model is empty"),
        (dict(extra_headers="x"), "extra_headers is not JSON"),
        (dict(extra_headers='["x"]'), "extra_headers is not a JSON object"),
        (dict(extra_headers='{"a b": "x"}'), "'a b' is not a name of an HTTP header"),
        (dict(extra_headers='{"a": 1}'), "the value of a must be a string"),
        (dict(extra_headers='{"a": "b\\nc"}'), "the value of a must be a string"),
        (dict(extra_body="{"), "extra_body is not JSON"),
        (dict(extra_body='{"stream": true}'), "extra_body must not contain stream"),
        (dict(base_url="http://a b/v1"), "base_url must be like http"),
    ],
)
def test_settings_out_of_range_are_named(settings, expected):
    with pytest.raises(UserError) as raised:
        main(Config(**settings))
    assert expected in str(raised.value)


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


@pytest.mark.slow
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
        (["--num_samples", 0], "num_samples is 0, must be between 1 and 2,400"),
        (["--num_samples", 10**6], "num_samples is 1000000, must be between 1 and 2,400"),
        (["--min_words", 300, "--max_words", 200], "must be greater than min_words (300)"),
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
