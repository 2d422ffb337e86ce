"""Answers from a chat model behind an OpenAI-compatible server.

    async with ChatClient(server, request, max_retries, on_retry) as chat:
        answer = await chat.ask([{"role": "user", "content": "Describe a place."}])

Servers differ in what they call compatible. The differences are handled here:

- `ChatClient` finds the path and the name of the token limit that the server knows.
- `read_reply` reads answers in which any part may be missing.
- `Connection` controls which requests are repeated and when; fantasy/failures.py finds the causes.

OpenAI's client does the retries. It repeats a request after a connection error, a timeout, or the
status 408, 409, 429 or 5xx, up to max_retries times. First it waits as long as the server asks in
Retry-After (up to ten minutes), or else 0.5, 1, 2, 4, 8, 8, ... seconds, minus a random part of up
to a quarter.
"""

import asyncio
import re
from collections.abc import Callable
from os import environ
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

import openai

from common.console import UserError, say
from fantasy.cleaning import without_reasoning
from fantasy.failures import (
    Mask,
    Server,
    diagnose,
    hidden_error,
    is_out_of_quota,
    is_transient,
    proxy_variables,
    requested_wait,
    retry_count,
    server_message,
    shown,
    status_name,
)

# Two names of the limit of an answer's tokens. OpenAI's newer models know only the first one,
# Mistral and many other servers only the second.
LIMIT_NAMES = ("max_completion_tokens", "max_tokens")
# Error codes of Azure and others for a prompt or an answer that their filter rejects.
FILTERED = ("content_filter", "content_policy_violation")
# Values of finish_reason, in lower case.
CUT_OFF = ("length", "max_tokens", "model_length", "max_output_tokens")
REFUSED = ("content_filter", "refusal", "safety", "recitation", "prohibited_content", "blocklist")

# Times, and numbers of retries
CONNECT_TIMEOUT = 10  # seconds, if the timeout of a request is longer
# Retries of a request that did not reach a chat model, before the first answer of a run. Later, the
# settings are known to be right, and the failure may pass.
EARLY_RETRIES = 3
CLIENT_WAIT = 120  # seconds; OpenAI's client gives up if Retry-After is longer
LONGEST_WAIT = 600  # seconds; this module gives up if Retry-After is longer


class Request(NamedTuple):
    """What all requests have in common."""

    model: str
    max_tokens: int  # limit of one answer
    timeout: float  # seconds
    temperature: float | None = None  # None = the server's default
    extra_body: dict = {}  # additional fields


class Dialect(NamedTuple):
    """The request settings that differ between servers."""

    base_url: str
    limit_name: str


class Answer(NamedTuple):
    """The model's answer. `problem` says why the server did not complete it, None if it did."""

    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    # "refusal", "cut off", "only reasoning" (no text after it), "server error" or "malformed"
    problem: str | None = None
    detail: str = ""  # what is wrong with a malformed answer


class ChatClient:
    """Sends requests to one model.

    on_retry(failure, message) is called when an attempt fails and may be repeated. `failure` is a
    short name, such as "timeout", and `message` describes the failure in one line.

    Raises UserError if the proxy settings in the environment can't be used.
    """

    def __init__(
        self,
        server: Server,
        request: Request,
        max_retries: int,  # retries of one request
        on_retry: Callable[[str, str], None],
    ):
        self.request = request
        self.hide = Mask(server)
        base_url, query = split_url(server.base_url)
        self.dialect = Dialect(base_url, LIMIT_NAMES[0])
        self.connection = Connection(max_retries, self.hide, on_retry)

        headers = dict(server.headers)
        # Azure's older API takes the key from another header.
        if "api-version" in query:
            headers.setdefault("api-key", server.key)

        # A server that is not there should be noticed soon, although an answer may take long to
        # begin.
        self.client = openai.AsyncOpenAI(
            api_key=server.key,
            base_url=base_url,
            default_query=query,
            default_headers=headers,
            timeout=openai.Timeout(request.timeout, connect=min(request.timeout, CONNECT_TIMEOUT)),
            max_retries=max_retries,
            http_client=self.connection,
        )

    async def __aenter__(self) -> "ChatClient":
        return self

    async def __aexit__(self, *_):
        await self.client.close()

    async def ask(self, messages: list[dict]) -> Answer:
        """The answer to `messages`. Raises UserError when retries do not help or are used up."""
        try:
            reply = await self.complete(messages)
        except (openai.APIConnectionError, openai.APIStatusError) as error:
            # Other servers answer with finish_reason "content_filter"; read_reply handles those.
            if error.code in FILTERED:
                return Answer(problem="refusal")
            # Without the original exception, because its text may contain the key.
            raise UserError(self.explain(error)) from None
        except (openai.APIError, ValueError):  # not a chat completion, not JSON or not UTF-8
            return Answer(problem="malformed", detail="it is not JSON")
        finally:
            # Also after an error, or the requests that this one holds back would wait forever.
            self.connection.forget(this_task())
        answer = read_reply(reply, self.request.max_tokens)
        return answer._replace(detail=self.hide(answer.detail))

    async def complete(self, messages: list[dict]):
        """A chat completion, in the server's dialect. Raises exceptions of OpenAI's client.

        If the server does not know the path or the token limit, another one is tried. The dialect
        that works is kept for the run.
        """
        dialect = self.dialect
        first_error = None
        while True:
            # A copy of the client, which shares its connections.
            client = self.client.with_options(base_url=dialect.base_url)
            try:
                reply = await client.chat.completions.create(
                    **self.build_request(messages, dialect)
                )
                break
            except openai.APIStatusError as error:
                other = other_dialect(dialect, error.response)
                if other is None:
                    # If nothing else helped either, the first error belongs to the user's settings.
                    if first_error and is_same_problem(first_error.response, error.response):
                        raise first_error from None
                    raise
                # Each failure rules out a dialect, so the loop ends: the name changes once, and /v1
                # is added once.
                dialect = other
                first_error = first_error or error
        # Other requests may have found the same in the meantime.
        if dialect.base_url != self.dialect.base_url:
            say(f"the server's API is at {shown(dialect.base_url)}: use that as base_url")
        if dialect.limit_name != self.dialect.limit_name:
            say(f"the server does not know {LIMIT_NAMES[0]}: sending {LIMIT_NAMES[1]} instead")
        self.dialect = dialect
        return reply

    def build_request(self, messages: list[dict], dialect: Dialect) -> dict:
        """The fields of a chat completion request."""
        fields: dict = dict(model=self.request.model, messages=messages)
        # A limit in extra_body replaces this one.
        if not any(name in self.request.extra_body for name in LIMIT_NAMES):
            fields[dialect.limit_name] = self.request.max_tokens
        if self.request.temperature is not None:
            fields["temperature"] = self.request.temperature
        return dict(fields, extra_body=self.request.extra_body)

    def explain(self, error: openai.APIConnectionError | openai.APIStatusError) -> str:
        """What went wrong, once OpenAI's client has given up, and what to do about it."""
        url = shown(error.request.url)
        retries = retry_count(error.request)
        after = ""
        if retries:
            after = ", after 1 retry" if retries == 1 else f", after {retries} retries"
        if isinstance(error, openai.APIConnectionError):
            # No response: the exception below says why.
            cause = error.__cause__ or error
            return f"{url}: {self.hide(diagnose(cause, error.request).message)}{after}"

        # Errors that come back whenever the same request is sent.
        response = error.response
        status = error.status_code
        said = self.hide(server_message(response))
        shown_status = response.extensions.get("name", status)
        if status == 401:
            return f"{url} refuses the key (401): check OPENAI_API_KEY; the server says: {said}"
        if status == 402 or is_out_of_quota(response):
            return f"{url}: the account's quota is used up ({status}: {said})"
        if is_path_missing(response):
            return (
                f"{url} is not a path for chat completions ({shown_status}): {said}; "
                "check base_url, which often ends in /v1"
            )
        if status == 404:
            return f"{url} has no model {self.request.model!r} (404): {said}"

        # Errors that might pass, but did not before the retries were used up, or whose wait is too
        # long.
        if is_transient(status):
            wait = response.headers.get("retry-after")
            asked = f"; the server asks to wait (Retry-After: {wait})" if wait else ""
            return f"{url}: {status_name(response)}{after}{asked}: {said}"

        # Errors in the request itself, perhaps a limit that is too high for the model.
        advice = ""
        if re.search(r"max_(completion_)?tokens|context.{,3}(length|window|size)", said):
            advice = ": lower max_answer_tokens"
        return f"{url} refuses the request ({shown_status}): {said}{advice}"

    def stop(self):
        """End the tasks that wait to send a request. Answers that are on their way still arrive."""
        self.connection.stop()


def split_url(url: str) -> tuple[str, dict]:
    """The base URL and the query in what a user gives, perhaps the full URL of a request."""
    parts = urlsplit(url)
    # https://host/v1/chat/completions?api-version=1 -> https://host/v1, and the query
    path = re.sub(r"/(chat(/completions)?|completions|responses|models)/?$", "", parts.path)
    base_url = parts._replace(path=path.rstrip("/"), query="", fragment="").geturl()
    query = parse_qs(parts.query, keep_blank_values=True)
    return base_url, {name: values[-1] for name, values in query.items()}


def other_dialect(dialect: Dialect, response) -> Dialect | None:
    """What to try after the server has rejected a request, None if nothing is left to try."""
    # One change at a time: the name of the limit, or the path. A path that already ends in a
    # version, such as /v1 or /v1beta, stays.
    old_name = LIMIT_NAMES[0]
    if dialect.limit_name == old_name and names_limit(response, old_name):
        return dialect._replace(limit_name=LIMIT_NAMES[1])
    if is_path_missing(response) and not re.search(r"/v\d\w*$", dialect.base_url):
        return dialect._replace(base_url=dialect.base_url + "/v1")
    return None


def names_limit(response, name: str) -> bool:
    """Does the server reject a request because of its token limit?"""
    # 401 and 403 are about the key, 429 about the rate. Their texts may mention tokens as well.
    is_rejected = 400 <= response.status_code < 500 and response.status_code not in (401, 403, 429)
    return is_rejected and name in response.text


def is_path_missing(response) -> bool:
    """Is it the URL that the server does not know, and not the model?"""
    if response.extensions.get("name") == "web page":
        return True
    # 405: the path exists, but not for POST.
    if response.status_code not in (404, 405):
        return False
    # A server that knows the path but not the model also answers 404, and names it.
    return not re.search("model|deployment", server_message(response), re.I)


def is_same_problem(first, second) -> bool:
    """Whether the second attempt failed like the first: no such path, or no such token limit."""
    if is_path_missing(first):
        return is_path_missing(second)
    return names_limit(first, LIMIT_NAMES[0]) and names_limit(second, LIMIT_NAMES[1])


# ---------------------------------------------------------------------------------------------
# Answers


def read_reply(reply, max_tokens: int) -> Answer:
    """The parts of a chat completion that are used here.

    Servers of all kinds claim to be compatible, so any part may be missing or have another type.
    """
    # `reply` is a plain string if the server did not send JSON, and any JSON value if it did.
    # Some servers do not count tokens. The costs that are shown are then too low.
    usage = getattr(reply, "usage", None)
    prompt_tokens = count(usage, "prompt_tokens")
    completion_tokens = count(usage, "completion_tokens")
    answer = Answer("", prompt_tokens, completion_tokens)
    try:
        choice = reply.choices[0]
        message = choice.message
        content = text_of(message.content)
        # Half of a surrogate pair is valid JSON, but can't be written to a file: ValueError.
        content.encode()
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        excerpt = reply[:200] if isinstance(reply, str) else "it has no choices with a message"
        return answer._replace(problem="malformed", detail=excerpt)

    # Reasoning may be in the text, in a field of its own, or only counted.
    text = without_reasoning(content)
    finish_reason = str(getattr(choice, "finish_reason", "")).lower()
    details = getattr(usage, "completion_tokens_details", None)
    has_reasoning = (
        bool(content.strip() and not text)
        or bool(getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None))
        or count(details, "reasoning_tokens") > 0
    )

    # The more specific problems come first: an answer that is cut off may have nothing but
    # reasoning.
    problem = None
    if getattr(message, "refusal", None) or finish_reason in REFUSED:
        problem = "refusal"
    elif finish_reason == "error":
        problem = "server error"
    elif not text and has_reasoning:
        problem = "only reasoning"
    elif finish_reason in CUT_OFF or (not text and completion_tokens >= max_tokens):
        problem = "cut off"
    return answer._replace(text=text, problem=problem)


def count(usage, name: str) -> int:
    """A number of tokens, 0 if the server does not say it."""
    value = usage.get(name) if isinstance(usage, dict) else getattr(usage, name, None)
    try:
        return max(0, int(value))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return 0


def text_of(content) -> str:
    """The text of a message, whose content is a string, None or a list of parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content.strip()
    # Other parts, of type "thinking" for example, have no text of the answer.
    return "".join(part["text"] for part in content if part.get("type") == "text").strip()


# ---------------------------------------------------------------------------------------------
# Requests


class Connection(openai.DefaultAsyncHttpxClient):
    """The HTTP client below OpenAI's client, which calls `send` for every attempt of a request.

    It adds to the client's retries:

    - it reports every failure when it happens, because the waits can be minutes;
    - failures that do not pass are not retried: an exhausted quota, although its status is 429, or
      an unknown host;
    - an error or a web page with status 200 gets the status that it should have;
    - it waits up to ten minutes if the server asks for it, not only two;
    - a rate limit stops all requests, not only the one that met it. That one waits and is repeated
      as OpenAI's client sees fit; the others follow when it has passed:

          request A   send  429  wait for Retry-After  send  200
          request B         ....... held back ........       send  200

    - `stop` ends the waits, so that an error that ends the run is reported at once.
    """

    def __init__(self, max_retries: int, hide: Mask, on_retry: Callable[[str, str], None]):
        try:
            super().__init__()
        except ImportError as error:
            raise UserError(
                f"{' or '.join(proxy_variables())} names a SOCKS proxy: for this, pip install "
                "socksio; or unset the variable"
            ) from error
        except OSError as error:  # no such file, or no certificates in it
            variables = [name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if environ.get(name)]
            raise UserError(
                f"{' or '.join(variables) or 'TLS'} is not valid ({error.strerror or error})"
            ) from error
        except Exception as error:
            # Without the value, which may contain a password.
            if not proxy_variables():
                raise
            raise UserError(
                f"{' or '.join(proxy_variables())} is not valid: give a proxy like http://host:8080"
            ) from error

        # State that the requests share. They run in one thread, as tasks, so it needs no lock.
        self.max_retries = max_retries
        self.hide = hide
        self.on_retry = on_retry
        # Paths at which there has been a chat completion. Parallel requests try several at first.
        self.answered_paths: set[str] = set()
        self.limited: asyncio.Task | None = None  # the task whose request met the rate limit
        self.limit_passed = asyncio.Event()
        self.waiting: set[asyncio.Task] = set()  # tasks with no request on its way
        self.stopped = False

    async def send(self, request, **kwargs):
        # One request of a task is sent at a time, so the task identifies the request.
        task = this_task()
        self.waiting.add(task)
        # After the wait another request may meet the next limit, hence a loop.
        while self.limited not in (None, task):
            await self.limit_passed.wait()
        self.waiting.discard(task)

        try:
            response = await super().send(request, **kwargs)
        except Exception as error:
            failure = diagnose(error, request)
            # OpenAI's client repeats a request after all errors but those of its type.
            if not self.is_worth_a_retry(request, failure.may_pass):
                raise openai.APIConnectionError(request=request) from error
            self.failed(task, request, failure.name, failure.message)
            raise

        if response.is_success:
            self.unmask(request, response)
        await self.handle_status(task, request, response)
        return response

    def unmask(self, request, response):
        """Give an error that hides behind status 200 the status that it should have."""
        path = request.url.path
        # Maintenance pages look like pages of a wrong path. Whether the path has answered before
        # tells them apart.
        hidden = hidden_error(response, path in self.answered_paths)
        if hidden:
            response.status_code, response.extensions["name"] = hidden
        else:
            self.answered_paths.add(path)

    async def handle_status(self, task: asyncio.Task, request, response):
        """Decide whether the request is repeated, report it, and hold back others if necessary."""
        status = response.status_code
        # OpenAI's client obeys this header. A hidden error is retried as if there were no answer.
        may_pass = is_transient(status) and not is_out_of_quota(response)
        is_hidden = "name" in response.extensions
        if not may_pass or (is_hidden and not self.is_worth_a_retry(request, may_pass)):
            response.headers["x-should-retry"] = "false"
            self.release(task)
            return

        # The first request that meets the limit tries when it has passed. Any other answer to its
        # retry, even an error, shows that it has.
        if status == 429 and self.limited is None:
            self.limited = task
            self.limit_passed.clear()
        if status != 429:
            self.release(task)
        asked = response.headers.get("retry-after", "")
        self.failed(task, request, status_name(response), server_message(response), asked)

        # OpenAI's client would refuse a longer wait, so the first part of it is spent here.
        wait = requested_wait(response)
        if CLIENT_WAIT < wait <= LONGEST_WAIT and retry_count(request) < self.max_retries:
            await asyncio.sleep(wait - CLIENT_WAIT)
            response.headers["retry-after"] = str(CLIENT_WAIT)

    def is_worth_a_retry(self, request, may_pass: bool) -> bool:
        """Is a request repeated that did not reach a chat model?"""
        return bool(self.answered_paths) or (may_pass and retry_count(request) < EARLY_RETRIES)

    def failed(self, task: asyncio.Task, request, name: str, message: str, asked: str = ""):
        """Report a failed attempt, after which OpenAI's client waits or gives up."""
        wait = f" (Retry-After: {asked})" if asked else ""
        # Until a chat model has answered, only failures with an error status get all retries.
        is_early = not self.answered_paths and not re.search("status [45]|rate limit", name)
        retries = min(EARLY_RETRIES, self.max_retries) if is_early else self.max_retries
        said = self.hide(message)
        details = "" if said == name else f": {said}"
        self.on_retry(
            name,
            f"{shown(request.url)}: {name}{wait}{details}; a request is retried up to "
            f"{retries} times",
        )

        self.waiting.add(task)
        # `stop` could not cancel this task while its request was on its way.
        if self.stopped:
            raise asyncio.CancelledError

    def release(self, task: asyncio.Task):
        """Let the others send again if this task's request met the rate limit."""
        if self.limited is task:
            self.limited = None
            self.limit_passed.set()

    def forget(self, task: asyncio.Task):
        """The task's request has ended, with or without an answer."""
        self.waiting.discard(task)
        self.release(task)

    def stop(self):
        """Cancel the tasks that wait, and those whose request fails from now on."""
        self.stopped = True
        for task in self.waiting:
            task.cancel()


def this_task() -> asyncio.Task:
    task = asyncio.current_task()
    assert task, "called outside a coroutine"
    return task
