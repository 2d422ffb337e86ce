"""Answers from a chat model behind an OpenAI-compatible server.

    async with ChatClient(key, base_url, model, max_tokens, timeout, max_retries, on_retry) as chat:
        answer = await chat.ask([{"role": "user", "content": "Describe a place."}])

OpenAI's client does the retries. It repeats a request after a connection error, a timeout, or the
status 408, 409, 429 or 5xx, up to max_retries times. First it waits as long as the server asks in
Retry-After (it gives up if that is more than two minutes), or else 0.5, 1, 2, 4, 8, 8, ... seconds,
minus a random part of up to a quarter. `Connection` adds what the client lacks.
"""

import asyncio
from collections.abc import Callable
from typing import NamedTuple

import openai

from common.console import UserError

# Error code of a 429 that waiting does not help against: the account has no money left.
QUOTA = "insufficient_quota"
# Error codes of Azure and others for a prompt or an answer that their filter rejects.
FILTERED = ("content_filter", "content_policy_violation")


class Answer(NamedTuple):
    """The model's answer. `problem` says why the server did not complete it, None if it did."""

    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    problem: str | None = None  # "refusal", "cut off" or "malformed"


class ChatClient:
    """Sends requests to one model.

    on_retry(failure, wait) is called when an attempt fails and may be repeated. `failure` is a
    short name, such as "timeout", and `wait` the server's Retry-After header, "" without one.
    """

    def __init__(
        self,
        key: str,
        base_url: str | None,  # None = OpenAI
        model: str,
        max_tokens: int,  # limit of one answer
        timeout: float,  # seconds
        max_retries: int,  # of one request
        on_retry: Callable[[str, str], None],
    ):
        self.key = key
        self.model = model
        self.max_tokens = max_tokens
        self.connection = Connection(on_retry)
        self.client = openai.AsyncOpenAI(
            api_key=key,
            base_url=base_url,
            timeout=timeout,
            max_retries=max_retries,
            http_client=self.connection,
        )
        self.url = str(self.client.base_url)

    async def __aenter__(self) -> "ChatClient":
        return self

    async def __aexit__(self, *_):
        await self.client.close()

    async def ask(self, messages: list[dict]) -> Answer:
        """The answer to `messages`. Raises UserError when retries do not help or are used up."""
        try:
            reply = await self.client.chat.completions.create(**self.build_request(messages))
        except (openai.APIConnectionError, openai.APIStatusError) as error:
            # Other servers answer with finish_reason "content_filter"; read_reply handles those.
            if error.code in FILTERED:
                return Answer(problem="refusal")
            # Without the original exception, because its text may contain the key.
            raise UserError(self.explain(error)) from None
        except (openai.APIError, ValueError):  # not a chat completion, not JSON or not UTF-8
            return Answer(problem="malformed")
        finally:
            self.connection.forget(this_task())
        return read_reply(reply)

    def build_request(self, messages: list[dict]) -> dict:
        """The fields of a chat completion request."""
        return dict(model=self.model, messages=messages, max_completion_tokens=self.max_tokens)

    def explain(self, error: openai.APIConnectionError | openai.APIStatusError) -> str:
        """What went wrong, once OpenAI's client has given up, and what to do about it."""
        # OpenAI's client counts the retries of a request in this header.
        retries = int(error.request.headers.get("x-stainless-retry-count", 0))
        after = f", after {retries} retries" if retries else ""
        if isinstance(error, openai.APITimeoutError):
            return f"{self.url}: timeout{after}"
        if isinstance(error, openai.APIConnectionError):
            return f"{self.url}: no connection{after}"

        # Errors that come back whenever the same request is sent.
        status = error.status_code
        if status == 401:
            return f"{self.url} refuses the key (401): check OPENAI_API_KEY"
        if status == 404:
            return f"{self.url} has no model {self.model!r} (404): {self.message(error)}"
        if error.code == QUOTA:
            return f"{self.url}: the account's quota is used up"

        # Errors that might pass, but did not before the retries were used up, or whose wait is too
        # long for OpenAI's client.
        if is_transient(status):
            wait = error.response.headers.get("retry-after")
            asked = f"; the server asks to wait (Retry-After: {wait})" if wait else ""
            return f"{self.url}: {status_name(status)}{after}{asked}"
        return f"{self.url} refuses the request ({status}): {self.message(error)}"

    def message(self, error: openai.APIStatusError) -> str:
        """What the server says, on one line and without the key, which some servers quote."""
        return " ".join(error.message.replace(self.key, "***").split())[:300]

    def stop(self):
        """End the tasks that wait to send a request. Answers that are on their way still arrive."""
        self.connection.stop()


def read_reply(reply) -> Answer:
    """The parts of a chat completion that are used here.

    Servers of all kinds claim to be compatible, so any part may be missing or have another type.
    """
    try:
        # `reply` is a plain string if the server sent HTML, and `choices` may be empty.
        choice = reply.choices[0]
        text = (choice.message.content or "").strip()
        # Half of a surrogate pair is valid JSON, but can't be written to a file: ValueError.
        text.encode()
        # Some servers do not count tokens. The costs that are shown are then too low.
        prompt_tokens = completion_tokens = 0
        if reply.usage:
            prompt_tokens = int(reply.usage.prompt_tokens)
            completion_tokens = int(reply.usage.completion_tokens)

        problem = None
        if choice.message.refusal or choice.finish_reason == "content_filter":
            problem = "refusal"
        elif choice.finish_reason == "length":
            problem = "cut off"
    except (AttributeError, IndexError, TypeError, ValueError):
        return Answer(problem="malformed")
    return Answer(text, prompt_tokens, completion_tokens, problem)


class Connection(openai.DefaultAsyncHttpxClient):
    """The HTTP client below OpenAI's client, which calls `send` for every attempt of a request.

    It adds to the client's retries:

    - it reports every failure when it happens, because the waits can be minutes;
    - an exhausted quota is not retried, although its status is 429;
    - a rate limit stops all requests, not only the one that met it. That one waits and is repeated
      as OpenAI's client sees fit; the others follow when it has passed:

          request A   send  429  wait for Retry-After  send  200
          request B         ....... held back ........       send  200

    - `stop` ends the waits, so that an error that ends the run is reported at once.
    """

    def __init__(self, on_retry: Callable[[str, str], None]):
        super().__init__()
        self.on_retry = on_retry
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
            # Recognized by name, to avoid importing the HTTP library that OpenAI's client uses.
            is_timeout = "Timeout" in type(error).__name__
            self.failed(task, "timeout" if is_timeout else "no connection", "")
            raise

        # A 429 is retried unless the server forbids it, which some forget for an exhausted quota.
        status = response.status_code
        if status == 429 and QUOTA in response.text:
            response.headers["x-should-retry"] = "false"  # OpenAI's client obeys this header
            return response

        # The first request that meets the limit tries when it has passed. Any other answer to its
        # retry, even an error, shows that it has.
        if status == 429 and self.limited is None:
            self.limited = task
            self.limit_passed.clear()
        if status != 429:
            self.release(task)
        if is_transient(status):
            self.failed(task, status_name(status), response.headers.get("retry-after", ""))
        return response

    def failed(self, task: asyncio.Task, failure: str, wait: str):
        """Report a failed attempt, after which OpenAI's client waits or gives up."""
        self.on_retry(failure, wait)
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
        self.stopped = True
        for task in self.waiting:
            task.cancel()


def this_task() -> asyncio.Task:
    task = asyncio.current_task()
    assert task, "called outside a coroutine"
    return task


def is_transient(status: int) -> bool:
    """Does OpenAI's client repeat a request with this HTTP status?"""
    return status in (408, 409, 429) or status >= 500


def status_name(status: int) -> str:
    return "rate limit (429)" if status == 429 else f"status {status}"
