"""Descriptions of fantasy locations to finetune on, from a chat model or from a grammar.

    python generate_finetune_data.py --dry_run           # one prompt, and what all would cost
    OPENAI_API_KEY=... python generate_finetune_data.py  # 1,000 descriptions by gpt-4.1
    OPENAI_API_KEY=none python generate_finetune_data.py \\
        --base_url http://localhost:8000/v1 --model NAME # any OpenAI-compatible server
    python generate_finetune_data.py --offline           # by the grammar: no network, no key

Each description has a different pair of place and culture, and a mood, a time and the weather. An
accepted description is appended to out_dir/finetune_data.jsonl at once, with its seed, its tokens
and the model. At the end, out_dir/finetune_data.txt is made from all of them: the text to train on,
in <LOC> blocks. An interrupted run can be started again and resumes. Descriptions by the grammar
and by a model can't be mixed in one file.

The reasoning of a model, and a preamble, title or closing remark around a description, are removed.
The model is asked again if an answer is a refusal, empty, malformed, too short, too long or cut
off, if it contains a delimiter or markup, or if it nearly repeats an earlier one (a Jaccard
similarity of their word 5-grams of 0.3 or more).
"""

import asyncio
import json
import math
import os
import random
import re
from collections import Counter, deque
from dataclasses import dataclass
from urllib.parse import urlsplit

from common.console import Progress, UserError, parse_flags, run_script, say


@dataclass
class Config:
    num_samples: int = 1000  # number of descriptions, including those already in out_dir
    model: str = "gpt-4.1"  # name of the model on the server
    # URL of an OpenAI-compatible server; None = the environment's OPENAI_BASE_URL, or OpenAI
    base_url: str | None = None
    concurrency: int = 16  # maximum number of requests at the same time
    out_dir: str = "datasets"  # folder for finetune_data.jsonl and finetune_data.txt
    dry_run: bool = False  # only show one prompt and estimate the cost
    offline: bool = False  # write the descriptions with the grammar instead of a model
    seed: int = 0  # random seed for the order of places and cultures, and for the grammar
    min_words: int = 150  # minimum words per description
    max_words: int = 400  # maximum words per description
    # maximum tokens of an answer, reasoning included; None = 8 * max_words
    max_answer_tokens: int | None = None
    temperature: float | None = None  # sampling temperature; None = the server's default
    # additional HTTP headers, a JSON object; $OPENAI_API_KEY in a value stands for the key
    extra_headers: str = "{}"
    # additional fields of each request, a JSON object like {"reasoning_effort": "low"}
    extra_body: str = "{}"
    timeout: float = 120  # seconds without data from the server before a request is repeated
    # retries of a failed request, after waits of 0.5 to 8 s (together two minutes), or as long as
    # the server asks
    max_retries: int = 20
    input_price: float = 2.0  # dollars per million prompt tokens (default: gpt-4.1)
    output_price: float = 8.0  # dollars per million completion tokens (default: gpt-4.1)

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        """In dollars."""
        return (prompt_tokens * self.input_price + completion_tokens * self.output_price) / 1e6


if __name__ == "__main__":
    config = parse_flags(Config, __doc__)  # before the slow imports: --help answers at once

from fantasy.cleaning import MARKUP, PREAMBLE, without_frame
from fantasy.descriptions import DELIMITER, OFFLINE, DescriptionStore
from fantasy.grammar import as_text, describe
from fantasy.locations import PromptSeed, load_tables, prompt_seeds

# Limits on what a model that does not follow the prompt can cost.
MAX_ATTEMPTS = 6  # answers rejected for one seed before another seed takes its place
MAX_REJECTED_IN_A_ROW = 100  # rejected answers in a row before the run ends
# Answers that a wrong setting explains. As many of them at the start of a run end it.
HOPELESS = ("cut off", "only reasoning", "malformed")
MAX_HOPELESS = 5
TOKENS_PER_WORD = 4 / 3  # estimate for English
# How models begin an answer in which they decline, without marking it as a refusal.
# Matches "I'm sorry, but ..." and "As an AI language model, ..." at the start of an answer.
REFUSAL = re.compile(r"(i['’]m|i am) (sorry|unable)|sorry,|i can(['’]t|not) |as an ai\b", re.I)

# What all descriptions have in common. build_prompt adds what differs.
SYSTEM_PROMPT = (
    "You write descriptions of places for a book of fantasy locations. Each is continuous prose, "
    "atmospheric and concrete, with what can be seen, heard, smelled, touched and tasted there. No "
    "title, no headings, no lists, no markup, no address to the reader about the task: only the "
    "description."
)


def main(config: Config):
    """Write descriptions until the folder holds num_samples of them, then the text file."""
    check(config)
    if config.dry_run:
        show_dry_run(config)
        return
    # Read before the files are touched, so that a missing key or a wrong URL changes nothing.
    key = ""
    if not config.offline:
        key = read_api_key()
        read_base_url(config)

    # The store holds the descriptions of earlier runs, and locks the folder.
    with DescriptionStore(config.out_dir, config.offline) as store:
        stored = len(store.records)
        if stored:
            say(f"resuming after {stored:,} descriptions in {store.path}")
        seeds = unused_seeds(config, store)
        # A file may hold more than this run asks for. They all stay.
        total = max(stored, config.num_samples)
        with Progress(total=total, initial=stored, unit="text", desc="descriptions") as bar:
            if config.offline:
                write_with_grammar(config, store, seeds, bar)
            elif stored < config.num_samples:
                write_with_model(config, store, seeds, bar, key)

        # The text file is made from all descriptions, those of earlier runs included.
        store.write_text()
        say(store.summary())


def check(config: Config):
    """Raise UserError if the settings make no sense."""
    check_range("seed", config.seed, 0)
    # There are as many seeds as pairs of place and culture.
    check_range("num_samples", config.num_samples, 1, len(prompt_seeds(config.seed)))

    # Requests and answers
    check_range("concurrency", config.concurrency, 1)
    check_range("min_words", config.min_words, 1)
    if config.max_words <= config.min_words:
        raise UserError(
            f"max_words is {config.max_words}, must be greater than min_words ({config.min_words})"
        )
    if config.max_answer_tokens is not None:
        check_range("max_answer_tokens", config.max_answer_tokens, 1)
    if config.temperature is not None:
        check_range("temperature", config.temperature, 0)
    if not 0 < config.timeout < math.inf:
        raise UserError(f"timeout is {config.timeout}, must be greater than 0 and finite")
    check_range("max_retries", config.max_retries, 0)
    check_range("input_price", config.input_price, 0)
    check_range("output_price", config.output_price, 0)

    # The model's name is recorded with each description, where this one stands for the grammar.
    if config.model == OFFLINE:
        raise UserError(f"a model can't be called {OFFLINE}: for the grammar, give --{OFFLINE}")
    if not config.model.strip():
        raise UserError("model is empty: give the name of a model on the server")
    if config.dry_run and config.offline:
        raise UserError("dry_run and offline exclude each other: offline costs nothing")
    if config.base_url is not None:
        check_url("base_url", config.base_url)

    # Read only for their errors: the values are read again when the client is created.
    read_headers(config)
    read_body(config)


def check_range(name: str, value: float, low: float, high: float = math.inf):
    """Raise UserError unless a flag is from low to high, both included, and finite."""
    # A comparison with NaN is false.
    if low <= value <= high and value < math.inf:
        return
    wanted = f"at least {low}" if high == math.inf else f"between {low} and {high:,}"
    raise UserError(f"{name} is {value}, must be {wanted}")


def check_url(name: str, text: str):
    """Raise UserError unless a text is an http or https URL that can be sent as it is."""
    try:
        url = urlsplit(text)
        is_valid = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # unbalanced brackets, or a port that is not a number below 65,536
        is_valid = False
    # Blanks and the like can't be sent. A password or a key in the URL is not quoted.
    if not is_valid or not re.fullmatch(r"[!-~]+", text):
        quoted = "" if "@" in text or "?" in text else f", not {text!r}"
        raise UserError(f"{name} must be like http://localhost:8000/v1{quoted}")


def read_base_url(config: Config) -> str:
    """The URL of the server, from the flag or the environment."""
    if config.base_url is not None:
        return config.base_url
    from fantasy.failures import OPENAI_URL

    # An empty variable counts as none.
    url = os.environ.get("OPENAI_BASE_URL", "").strip() or OPENAI_URL
    check_url("OPENAI_BASE_URL (an environment variable)", url)
    return url


def read_object(name: str, text: str) -> dict:
    """The JSON object in a flag. Errors do not quote it, because it may contain a key."""
    example = '{"name": "value"}'
    try:
        value = json.loads(text)
    except ValueError as error:
        # `from None`: the original exception holds the text, and perhaps a key, in its `doc`.
        raise UserError(f"{name} is not JSON ({error}): give an object like {example}") from None
    if not isinstance(value, dict):
        raise UserError(f"{name} is not a JSON object like {example}")
    return value


def read_headers(config: Config, key: str = "") -> dict[str, str]:
    """The additional HTTP headers, with the key in place of $OPENAI_API_KEY."""
    headers = {}
    for name, value in read_object("extra_headers", config.extra_headers).items():
        # The characters of a token in RFC 9110. Any others would be an error of the HTTP library,
        # whose message quotes the header.
        if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
            raise UserError(f"extra_headers: {name!r} is not a name of an HTTP header")
        if not isinstance(value, str) or not re.fullmatch(r"[ -~]*", value):
            raise UserError(f"extra_headers: the value of {name} must be a string of ASCII")
        headers[name] = value.replace("$OPENAI_API_KEY", key)
    return headers


def read_body(config: Config) -> dict:
    """The additional fields of each request, which must not replace those that ChatClient sets."""
    body = read_object("extra_body", config.extra_body)
    for name in ("model", "messages", "stream"):
        if name in body:
            raise UserError(f"extra_body must not contain {name}")
    return body


def read_api_key() -> str:
    """The key in the environment variable OPENAI_API_KEY. Errors do not show it."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key:
        raise UserError(
            "no API key: set OPENAI_API_KEY (to any word, if the server needs none), or use "
            "--offline"
        )
    # Other characters can't be in an HTTP header, and the error about it would quote the key.
    if not re.fullmatch(r"[!-~]+", key):
        raise UserError("OPENAI_API_KEY contains blanks or other characters that no key has")
    return key


def unused_seeds(config: Config, store: DescriptionStore) -> deque[PromptSeed]:
    """The seeds whose pair of place and culture has no description yet."""
    seeds = prompt_seeds(config.seed)
    unused = deque(seed for seed in seeds if (seed.place, seed.culture) not in store.pairs)
    # Too few are left if locations.toml has become shorter since the stored ones were written.
    possible = len(store.records) + len(unused)
    if possible < config.num_samples:
        raise UserError(f"there are seeds for only {possible:,} of {config.num_samples:,} samples")
    return unused


def build_prompt(about: PromptSeed, config: Config) -> list[dict]:
    """The messages that ask a chat model for one description."""
    # Models miss a requested length by about a fifth, so ask for one in the middle of the range.
    # It depends on the seed alone: a prompt that is repeated stays the same.
    margin = (config.max_words - config.min_words) // 4
    rng = random.Random(str(about))
    words = rng.randint(config.min_words + margin, config.max_words - margin)

    # The seed in words. The custom says more about a culture than its invented name.
    custom = load_tables()["culture"][about.culture]["custom"]
    request = (
        f"Describe this location in about {round(words, -1)} words; "
        f"never fewer than {config.min_words} or more than {config.max_words}.\n\n"
        f"Place: {about.place}\n"
        f"Mood: {about.mood}\n"
        f"Culture: the {about.culture}, who {custom}\n"
        f"Time: {about.time}\n"
        f"Weather: {about.weather}"
    )
    return [dict(role="system", content=SYSTEM_PROMPT), dict(role="user", content=request)]


def show_dry_run(config: Config):
    """Print one prompt, and estimates of tokens and cost."""
    messages = build_prompt(prompt_seeds(config.seed)[0], config)
    for message in messages:
        say(f"{message['role']}: {message['content']}\n")
    # Words are counted instead of tokens, because a tokenizer might have to be downloaded.
    words_in = sum(len(message["content"].split()) for message in messages)
    words_out = (config.min_words + config.max_words) / 2
    tokens_in = config.num_samples * words_in * TOKENS_PER_WORD
    tokens_out = config.num_samples * words_out * TOKENS_PER_WORD
    say(
        f"{config.num_samples:,} descriptions by {config.model}: about {tokens_in:,.0f} tokens of "
        f"prompts and {tokens_out:,.0f} of answers, ${config.cost(tokens_in, tokens_out):.2f} at "
        f"${config.input_price:g} and ${config.output_price:g} per million; rejected answers cost "
        "extra"
    )


def write_with_grammar(
    config: Config, store: DescriptionStore, seeds: deque[PromptSeed], bar: Progress
):
    """Store a description by the grammar for one seed after another."""
    while len(store.records) < config.num_samples:
        # This can happen if near-duplicates use up more seeds than there are to spare.
        if not seeds:
            raise UserError("all seeds are used up")
        about = seeds.popleft()
        text = as_text(describe(about, config.seed, config.min_words, config.max_words))
        # A near-duplicate costs its seed. Another attempt would give the same text.
        if not store.is_near_duplicate(text):
            store.add(about, text, prompt_tokens=0, completion_tokens=0, model=OFFLINE)
            bar.update()


def write_with_model(
    config: Config, store: DescriptionStore, seeds: deque[PromptSeed], bar: Progress, key: str
):
    """Store descriptions by the model, with several requests at the same time."""
    generation = Generation(config, store, seeds, bar, key)
    # What the run cost is shown even if it ends with an error or Ctrl-C.
    try:
        asyncio.run(generation.run())
    finally:
        say(generation.summary())


# ---------------------------------------------------------------------------------------------
# Descriptions by a model


class Generation:
    """The requests of one run: `concurrency` workers, each with one request at a time."""

    def __init__(
        self,
        config: Config,
        store: DescriptionStore,
        seeds: deque[PromptSeed],
        bar: Progress,
        key: str,
    ):
        # Imported here, because it takes a second that --help and --offline do not need.
        from fantasy.chat import ChatClient, Request
        from fantasy.failures import Server

        self.config = config
        self.store = store
        self.seeds = seeds
        self.bar = bar
        # By default, an acceptable answer is never as long. The limit stops a model that does not
        # end.
        self.max_answer_tokens = config.max_answer_tokens or 8 * config.max_words

        # The client repeats failed requests itself; Generation repeats rejected answers.
        self.chat = ChatClient(
            Server(key, read_base_url(config), read_headers(config, key)),
            Request(
                config.model,
                self.max_answer_tokens,
                config.timeout,
                config.temperature,
                read_body(config),
            ),
            max_retries=config.max_retries,
            on_retry=self.on_retry,
        )
        # Descriptions that no worker is working on yet.
        self.num_missing = config.num_samples - len(store.records)

        # Counts for the progress bar, the summary and the decision to give up
        self.error: Exception | None = None  # the error that ends the run
        self.rejected: Counter[str] = Counter()  # reason -> number of answers
        self.rejected_in_a_row = 0
        self.num_accepted = 0
        self.retried: Counter[str] = Counter()  # kind of failure -> number of requests
        self.prompt_tokens = 0
        self.completion_tokens = 0

    async def run(self):
        """Ask until num_samples descriptions are stored.

        Raises UserError or OSError. Requests that are on their way then finish first, because they
        are paid for. Ctrl-C cancels them.
        """
        async with self.chat:
            # Each worker needs at least one description to write.
            num_workers = min(self.config.concurrency, self.num_missing)
            await asyncio.gather(*(self.work() for _ in range(num_workers)))
        # An OSError comes from the store, and says already how many are kept.
        if isinstance(self.error, UserError):
            raise UserError(
                f"{self.error}; {len(self.store.records):,} descriptions are kept in "
                f"{self.store.path}, run again to resume"
            )
        if self.error:
            raise self.error

    async def work(self):
        """Describe one seed after another until enough are described or an error ends the run."""
        try:
            while self.num_missing > 0 and not self.error:
                if not self.seeds:
                    raise UserError(
                        "no seeds are left to replace those whose answers were rejected"
                    )
                # Counted before the request, so that the workers together ask for the right number.
                self.num_missing -= 1
                # A seed whose answers were all rejected gives its place to the next one.
                if not await self.describe(self.seeds.popleft()):
                    self.num_missing += 1
        except (UserError, OSError) as error:
            # The other workers often meet the same error a moment later. The first one is shown.
            self.error = self.error or error
            self.chat.stop()
        except asyncio.CancelledError:
            # Without an error, it was not chat.stop that cancelled this worker but Ctrl-C.
            if not self.error:
                raise

    async def describe(self, about: PromptSeed) -> bool:
        """Ask for a description until one is accepted and stored. False after MAX_ATTEMPTS."""
        messages = build_prompt(about, self.config)
        for _ in range(MAX_ATTEMPTS):
            answer = await self.chat.ask(messages)
            # Rejected answers cost money too.
            self.prompt_tokens += answer.prompt_tokens
            self.completion_tokens += answer.completion_tokens
            # What surrounds the description is removed. A delimiter in it must still be noticed.
            text = answer.text
            if not DELIMITER.search(text):
                text = without_frame(text)
            reason = self.reason_to_reject(answer, text)
            if reason is None:
                # No await since the answer arrived, so nothing can cancel this worker before the
                # answer is in the file.
                self.store.add(
                    about,
                    text,
                    answer.prompt_tokens,
                    answer.completion_tokens,
                    self.config.model,
                )
                self.rejected_in_a_row = 0
                self.num_accepted += 1
                self.show_progress()
                return True
            self.reject(reason, answer.detail)
        return False

    def reason_to_reject(self, answer, text: str) -> str | None:
        """Why an answer, with this text, can't be accepted; None if it can."""
        # What the server reports comes first: a text that was cut off may also look too short.
        if answer.problem:
            return answer.problem
        num_words = len(text.split())
        if num_words == 0:
            return "empty"
        # Checks of the text alone come before the comparison with the stored descriptions.
        if REFUSAL.match(text):
            return "refusal"
        if DELIMITER.search(text):
            return "delimiter"
        if PREAMBLE.match(text):
            return "preamble"
        if MARKUP.search(text):
            return "markup"
        if num_words > self.config.max_words:
            return "too long"
        if num_words < self.config.min_words:
            return "too short"
        if self.store.is_near_duplicate(text):
            return "near-duplicate"
        return None

    def reject(self, reason: str, detail: str):
        """Count a rejected answer. Raises UserError if there were too many in a row."""
        self.rejected[reason] += 1
        self.rejected_in_a_row += 1
        self.show_progress()
        # Some answers of any model are cut off. If the first ones are, then all will be.
        is_hopeless = not self.num_accepted and set(self.rejected) <= set(HOPELESS)
        limit = MAX_HOPELESS if is_hopeless else MAX_REJECTED_IN_A_ROW
        if self.rejected_in_a_row >= limit:
            last = f"; the last one: {detail}" if detail else ""
            raise UserError(
                f"{self.rejected_in_a_row} answers in a row were rejected "
                f"({format_counts(self.rejected)}{last}): {self.advice(reason)}"
            )

    def advice(self, reason: str) -> str:
        """What to do if answers are rejected for this reason again and again."""
        limit = f"max_answer_tokens (it is {self.max_answer_tokens:,})"
        if reason == "cut off":
            return f"raise {limit}, or choose another model"
        if reason == "only reasoning":
            return (
                f"raise {limit}, or let the model think less, often with "
                '--extra_body \'{"reasoning_effort": "low"}\''
            )
        return "check base_url, or try another model or other min_words and max_words"

    def on_retry(self, failure: str, message: str):
        """Count a failed attempt, and tell the user about the first of its kind."""
        # One line per kind: the number of retries is in the progress bar.
        if not self.retried[failure]:
            say(f"warning: {message}")
        self.retried[failure] += 1
        self.show_progress()

    def cost(self) -> str:
        """What the answers of this run cost so far, in dollars."""
        return f"${self.config.cost(self.prompt_tokens, self.completion_tokens):.2f}"

    def show_progress(self):
        """Update the counts in the progress bar, and its length."""
        accepted = len(self.store.records)
        tokens = self.prompt_tokens + self.completion_tokens
        self.bar.set_postfix_str(
            f"accepted {accepted:,}, rejected {self.rejected.total():,}, "
            f"retried {self.retried.total():,}, {tokens:,} tokens, {self.cost()}",
            refresh=False,
        )
        # The bar counts accepted descriptions only. Rejected answers move nothing but the counts.
        self.bar.update(accepted - self.bar.n)

    def summary(self) -> str:
        """What this run used, and which answers and requests failed."""
        return (
            f"this run: {self.prompt_tokens:,} + {self.completion_tokens:,} tokens, {self.cost()}; "
            f"answers rejected: {format_counts(self.rejected)}; "
            f"requests retried: {format_counts(self.retried)}"
        )


def format_counts(counts: Counter) -> str:
    """For example "3 refusal, 1 too long"."""
    return ", ".join(f"{number:,} {kind}" for kind, number in counts.most_common()) or "none"


if __name__ == "__main__":
    run_script(main, config)
