"""Fantasy location descriptions for finetuning, from an OpenAI-compatible API or from a grammar of our own.

    python generate_finetune_data.py --dry_run                  # one prompt and what all of them would cost
    OPENAI_API_KEY=... python generate_finetune_data.py         # 1,000 descriptions by gpt-4.1
    OPENAI_API_KEY=none python generate_finetune_data.py --base_url http://localhost:8000/v1 --model NAME
    python generate_finetune_data.py --offline                  # the grammar: no network, no key

Each description is about another pair of place and culture, under a mood, a time and a weather. What is accepted goes
at once to out_dir/finetune_data.jsonl, a line each with its seed, tokens and model; out_dir/finetune_data.txt, the
text to train on in <LOC> blocks, is written from it at the end. Stopped at any moment and run again, it goes on where
it was. A jsonl of the grammar and one of a model can't be mixed.

An answer that is refused, empty, too short or too long, or cut off, that holds a delimiter, or of whose word 5-grams
0.3 or more are shared with an accepted one (Jaccard similarity), is asked for again.
"""

import asyncio
import os
import random
import re
import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import NamedTuple
from urllib.parse import urlsplit

from common.console import Progress, UserError, cli, say
from fantasy.descriptions import DELIMITER, OFFLINE, Dataset
from fantasy.grammar import as_text, describe
from fantasy.locations import PromptSeed, load_tables, prompt_seeds

ATTEMPTS = 6  # to get one description; then another seed takes its place
REJECTED_IN_A_ROW = 100  # answers, and the run ends instead of paying for more
LONGEST_WAIT = 600  # seconds that a server may ask to wait for
LONGEST_BACKOFF = 60  # seconds
REFUSAL = re.compile(r"(i['’]m|i am) (sorry|unable)|sorry,|i can(['’]t|not) |as an ai\b", re.I)
SYSTEM = (
    "You write descriptions of places for a book of fantasy locations. Each is continuous prose, atmospheric and "
    "concrete, with what can be seen, heard, smelled, touched and tasted there. No title, no headings, no lists, no "
    "markup, no address to the reader about the task: only the description."
)


@dataclass
class Config:
    num_samples: int = 1000  # descriptions in all, counting those already in out_dir
    model: str = "gpt-4.1"  # as the server names it
    base_url: str | None = None  # of any OpenAI-compatible server; None = OpenAI's
    concurrency: int = 16  # requests at a time, at most
    out_dir: str = "datasets"  # folder of finetune_data.jsonl and finetune_data.txt
    dry_run: bool = False  # only show one prompt and estimate the cost
    offline: bool = False  # descriptions from the grammar instead of a model
    seed: int = 0  # of the order of places and cultures, and of the grammar
    min_words: int = 150  # of a description
    max_words: int = 400  # of a description
    timeout: float = 120  # seconds for an answer
    max_retries: int = 8  # of a request that fails, in a row
    backoff: float = 1  # seconds before the first retry; doubled with each
    input_price: float = 2.0  # dollars per million prompt tokens (gpt-4.1's)
    output_price: float = 8.0  # dollars per million completion tokens (gpt-4.1's)

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        """In dollars."""
        return (prompt_tokens * self.input_price + completion_tokens * self.output_price) / 1e6


def main(config: Config):
    check(config)
    if config.dry_run:
        return dry_run(config)
    key = None if config.offline else api_key()
    with Dataset(config.out_dir, config.offline) as dataset:
        if have := len(dataset.records):
            say(f"going on after {have:,} descriptions in {dataset.path}")
        seeds = deque(
            s for s in prompt_seeds(config.seed) if (s.place, s.culture) not in dataset.pairs
        )
        if have + len(seeds) < config.num_samples:
            raise UserError(
                f"only {have + len(seeds):,} of {config.num_samples:,} samples have seeds of their own"
            )
        with Progress(
            total=max(have, config.num_samples), initial=have, unit="text", desc="descriptions"
        ) as bar:
            if config.offline:
                write_offline(config, dataset, seeds, bar)
            elif have < config.num_samples:
                generation = Generation(config, dataset, seeds, bar)
                try:
                    asyncio.run(generation.run(key))
                finally:
                    say(generation.summary())
        dataset.write_text()
        say(dataset.summary())


def check(config: Config):
    most = len(prompt_seeds(config.seed))
    if config.num_samples < 1 or config.concurrency < 1:
        raise UserError("num_samples and concurrency must be at least 1")
    if config.num_samples > most:
        raise UserError(
            f"num_samples must be at most {most:,}: there are no more seeds, pairs of place and culture"
        )
    if not 1 <= config.min_words < config.max_words:
        raise UserError("min_words must be at least 1, and max_words more than min_words")
    if config.timeout <= 0 or config.max_retries < 0 or config.backoff < 0:
        raise UserError("timeout must be more than 0, max_retries and backoff not less")
    if config.model == OFFLINE:
        raise UserError(f"{OFFLINE} is what the grammar is called: give --{OFFLINE} to use it")
    if config.dry_run and config.offline:
        raise UserError("dry_run and offline exclude each other: offline costs nothing")
    if config.base_url is not None and not is_url(config.base_url):
        raise UserError(f"base_url must be like http://localhost:8000/v1, not {config.base_url!r}")


def is_url(text: str) -> bool:
    try:
        url = urlsplit(text)
        return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # of brackets, or a port that is none
        return False


def api_key() -> str:
    """From the environment, nowhere else. Raises ValueError, which does not show it, if it can't be one."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key:
        raise UserError(
            "no API key: set OPENAI_API_KEY (to any word, for a server that asks for none), or --offline"
        )
    if not re.fullmatch(
        r"[!-~]+", key
    ):  # as an HTTP header it would fail, with an error that quotes it
        raise UserError("OPENAI_API_KEY holds blanks or other characters that no key has")
    return key


def prompt(about: PromptSeed, config: Config) -> list[dict]:
    """The messages to a chat model."""
    custom = load_tables()["culture"][about.culture]["custom"]
    span = config.max_words - config.min_words  # aim at the middle: models miss lengths by a fifth
    words = random.Random(str(about)).randint(
        config.min_words + span // 4, config.max_words - span // 4
    )
    ask = (
        f"Describe this location in about {round(words, -1)} words; never fewer than {config.min_words} or more than "
        f"{config.max_words}.\n\nPlace: {about.place}\nMood: {about.mood}\nCulture: the {about.culture}, who {custom}\n"
        f"Time: {about.time}\nWeather: {about.weather}"
    )
    return [dict(role="system", content=SYSTEM), dict(role="user", content=ask)]


def dry_run(config: Config):
    """Tokens are estimated as four thirds of the words: counting them would take a vocabulary, perhaps a download."""
    messages = prompt(prompt_seeds(config.seed)[0], config)
    for message in messages:
        say(f"{message['role']}: {message['content']}\n")
    inward = (
        config.num_samples * sum(len(message["content"].split()) for message in messages) * 4 / 3
    )
    outward = config.num_samples * (config.min_words + config.max_words) / 2 * 4 / 3
    say(
        f"{config.num_samples:,} descriptions by {config.model}: about {inward:,.0f} tokens of prompts and "
        f"{outward:,.0f} of answers, ${config.cost(inward, outward):.2f} at ${config.input_price:g} and "
        f"${config.output_price:g} per million; rejected answers cost extra"
    )


def write_offline(config: Config, dataset: Dataset, seeds: deque[PromptSeed], bar: Progress):
    while len(dataset.records) < config.num_samples:
        if not seeds:
            raise UserError("the seeds are used up")
        about = seeds.popleft()
        text = as_text(describe(about, config.seed, config.min_words, config.max_words))
        if not dataset.near_duplicate(text):
            dataset.add(about, text, 0, 0, OFFLINE)
            bar.update()


class Answer(NamedTuple):
    text: str
    refused: bool
    cut: bool  # at the limit of tokens
    prompt_tokens: int
    completion_tokens: int


class Failed(Exception):
    """A request without an answer, to be tried again: its kind, and the seconds that the server asks to wait."""

    def __init__(self, kind: str, wait: float = 0):
        super().__init__(kind)
        self.wait = wait


class Stopped(Exception):
    """Another request met an error that ends the run."""


class Generation:
    """The requests of one run: `concurrency` workers, each with one request at a time."""

    def __init__(self, config: Config, dataset: Dataset, seeds: deque[PromptSeed], bar: Progress):
        self.config, self.dataset, self.seeds, self.bar = config, dataset, seeds, bar
        self.wanted = config.num_samples - len(dataset.records)
        self.rejected, self.failed = Counter(), Counter()
        self.rejected_in_a_row = 0
        self.prompt_tokens = self.completion_tokens = 0
        self.pause_until = 0.0  # on the monotonic clock
        self.stop = asyncio.Event()  # set by an error that ends the run
        self.error = None

    async def run(self, key: str):
        """Raises ValueError or OSError, which say what to do. Ctrl-C cancels requests under way; an error lets them
        arrive first, for they are paid."""
        from openai import AsyncOpenAI  # late: takes a second, and --offline needs none of it

        self.key = key
        # Retries are ours, so that they can be counted, and wait as long as the server asks.
        async with AsyncOpenAI(
            api_key=key, base_url=self.config.base_url, max_retries=0, timeout=None
        ) as client:
            self.client, self.url = client, str(client.base_url)
            await asyncio.gather(
                *(self.work() for _ in range(min(self.config.concurrency, self.wanted)))
            )
        if self.error:
            raise self.error

    async def work(self):
        try:
            while self.wanted > 0 and not self.stop.is_set():
                if not self.seeds:
                    raise UserError(
                        "no seeds are left to replace those whose answers were all rejected"
                    )
                self.wanted -= 1
                if not await self.describe(self.seeds.popleft()):
                    self.wanted += 1
        except Stopped:
            pass
        except (UserError, OSError) as error:
            self.error = self.error or error
            self.stop.set()

    async def describe(self, about: PromptSeed) -> bool:
        """Ask until an answer is accepted, and write it. False if none of the ATTEMPTS is."""
        for _ in range(ATTEMPTS):
            answer = await self.ask(prompt(about, self.config))
            flaw = self.flaw(answer)
            if not flaw:
                tokens = answer.prompt_tokens, answer.completion_tokens
                self.dataset.add(about, answer.text, *tokens, self.config.model)
            self.prompt_tokens += answer.prompt_tokens
            self.completion_tokens += answer.completion_tokens
            self.rejected.update([flaw] if flaw else [])
            self.rejected_in_a_row = self.rejected_in_a_row + 1 if flaw else 0
            self.show()
            if not flaw:
                return True
            if self.rejected_in_a_row >= REJECTED_IN_A_ROW:
                raise UserError(
                    f"{REJECTED_IN_A_ROW} answers in a row were rejected ({counts(self.rejected)}): try another model, "
                    f"or other min_words and max_words; {self.kept()}"
                )
        return False

    def flaw(self, answer: Answer) -> str | None:
        """Why an answer can't be accepted, None if it can."""
        words = len(answer.text.split())
        if answer.refused or REFUSAL.match(answer.text):
            return "refusal"
        if not words:
            return "empty"
        if DELIMITER.search(answer.text):
            return "delimiter"
        if answer.cut or words > self.config.max_words:
            return "too long"
        if words < self.config.min_words:
            return "too short"
        return "near-duplicate" if self.dataset.near_duplicate(answer.text) else None

    async def ask(self, messages: list[dict]) -> Answer:
        """An answer, after as many retries as it takes. Raises Stopped, or an error that ends the run."""
        for attempt in range(self.config.max_retries + 1):
            await self.wait_until(self.pause_until)
            try:
                return await self.request(messages)
            except Failed as failure:
                kind, wait = str(failure), failure.wait
            if not self.failed:
                say(
                    f"warning: {self.url}: {kind}; trying again, up to {self.config.max_retries} times"
                )
            self.failed[kind] += 1
            self.show()
            if wait > LONGEST_WAIT:
                raise OSError(
                    f"{self.url} asks to wait for {wait:,.0f} seconds ({kind}); {self.kept()}"
                )
            self.pause_until = max(
                self.pause_until, time.monotonic() + wait
            )  # a rate limit is for all workers
            if attempt < self.config.max_retries:
                delay = min(LONGEST_BACKOFF, self.config.backoff * 2**attempt)
                await self.wait_until(time.monotonic() + delay * random.uniform(0.5, 1))
        raise OSError(f"{self.url}: {kind}, after {self.config.max_retries} retries; {self.kept()}")

    async def wait_until(self, moment: float):
        """Until then, or later if all must pause meanwhile. Raises Stopped if the run ends first."""
        while (
            left := max(moment, self.pause_until) - time.monotonic()
        ) > 0 and not self.stop.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self.stop.wait(), left)
        if self.stop.is_set():
            raise Stopped

    async def request(self, messages: list[dict]) -> Answer:
        """One request. Raises Failed if trying again may help, else ValueError or OSError."""
        import openai

        limit = (
            8 * self.config.max_words
        )  # tokens: nothing good is longer, and a model that runs on costs money
        try:
            async with asyncio.timeout(self.config.timeout):
                reply = await self.client.chat.completions.create(
                    model=self.config.model, messages=messages, max_completion_tokens=limit
                )
            choice, usage = (
                reply.choices[0],
                reply.usage,
            )  # servers of all kinds: any of it may be missing
            text = (choice.message.content or "").strip()
            text.encode()  # half of a surrogate pair could not be written
            refused = bool(choice.message.refusal) or choice.finish_reason == "content_filter"
            tokens = (int(usage.prompt_tokens), int(usage.completion_tokens)) if usage else (0, 0)
            return Answer(text, refused, choice.finish_reason == "length", *tokens)
        except (TimeoutError, openai.APITimeoutError):
            raise Failed("timeout") from None
        except openai.APIConnectionError:
            raise Failed("no connection") from None
        except openai.APIStatusError as error:
            if error.code in (
                "content_filter",
                "content_policy_violation",
            ):  # Azure and others refuse like this
                return Answer("", True, False, 0, 0)
            raise self.status_error(error) from None
        except (openai.APIError, ValueError, AttributeError, TypeError, IndexError):
            raise Failed("malformed answer") from None

    def status_error(self, error) -> Exception:
        """What to make of an HTTP status: Failed if trying again may help."""
        status, code = error.status_code, error.code
        # A server may quote the key.
        message = " ".join(error.message.replace(self.key, "***").split())[:300]
        if status == 401:
            return ValueError(
                f"{self.url} refuses the key (401): check OPENAI_API_KEY; {self.kept()}"
            )
        if status == 404:
            return ValueError(
                f"{self.url} has no model {self.config.model!r} (404): {message}; {self.kept()}"
            )
        if code == "insufficient_quota":
            return OSError(f"{self.url}: the account's quota is used up; {self.kept()}")
        if status in (408, 409, 429) or status >= 500:
            return Failed(
                "rate limit (429)" if status == 429 else f"status {status}",
                retry_after(error.response),
            )
        return ValueError(f"{self.url} refuses the request ({status}): {message}; {self.kept()}")

    def kept(self) -> str:
        return f"{len(self.dataset.records):,} descriptions are kept in {self.dataset.path}, run again to go on"

    def cost(self) -> str:
        return f"${self.config.cost(self.prompt_tokens, self.completion_tokens):.2f}"

    def show(self):
        tokens = self.prompt_tokens + self.completion_tokens
        figures = f"rejected {self.rejected.total():,}, {tokens:,} tokens, {self.cost()}"
        accepted = len(self.dataset.records)
        self.bar.set_postfix_str(f"accepted {accepted:,}, {figures}", refresh=False)
        self.bar.update(accepted - self.bar.n)

    def summary(self) -> str:
        return (
            f"this run: {self.prompt_tokens:,} + {self.completion_tokens:,} tokens, {self.cost()}; "
            f"answers rejected: {counts(self.rejected)}; requests tried again: {counts(self.failed)}"
        )


def retry_after(response) -> float:
    """Seconds that the server asks to wait, as a number or as a date; 0 if it does not."""
    headers = response.headers
    value = headers.get("retry-after", "")
    for parse in (
        lambda: float(headers["retry-after-ms"]) / 1000,
        lambda: float(value),
        lambda: parsedate_to_datetime(value).timestamp() - time.time(),
    ):
        with suppress(KeyError, TypeError, ValueError):
            return max(0.0, parse())
    return 0.0


def counts(kinds: Counter) -> str:
    return ", ".join(f"{number:,} {kind}" for kind, number in kinds.most_common()) or "none"


if __name__ == "__main__":
    cli(Config, main, __doc__)
