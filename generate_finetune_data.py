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

The model is asked again if an answer is a refusal, empty, malformed, too short, too long or cut
off, if it contains a delimiter, or if it nearly repeats an earlier one (a Jaccard similarity of
their word 5-grams of 0.3 or more).
"""

import asyncio
import os
import random
import re
from collections import Counter, deque
from dataclasses import dataclass
from urllib.parse import urlsplit

from common.console import Progress, UserError, cli, say
from fantasy.descriptions import DELIMITER, OFFLINE, DescriptionStore
from fantasy.grammar import as_text, describe
from fantasy.locations import PromptSeed, load_tables, prompt_seeds

# Limits on what a model that does not follow the prompt can cost.
MAX_ATTEMPTS = 6  # answers rejected for one seed before another seed takes its place
MAX_REJECTED_IN_A_ROW = 100  # rejected answers in a row before the run ends
TOKENS_PER_WORD = 4 / 3  # estimate for English
# How models begin an answer in which they decline, without marking it as a refusal.
REFUSAL = re.compile(r"(i['’]m|i am) (sorry|unable)|sorry,|i can(['’]t|not) |as an ai\b", re.I)
SYSTEM_PROMPT = (
    "You write descriptions of places for a book of fantasy locations. Each is continuous prose, "
    "atmospheric and concrete, with what can be seen, heard, smelled, touched and tasted there. No "
    "title, no headings, no lists, no markup, no address to the reader about the task: only the "
    "description."
)


@dataclass
class Config:
    num_samples: int = 1000  # number of descriptions, including those already in out_dir
    model: str = "gpt-4.1"  # name of the model on the server
    base_url: str | None = None  # URL of an OpenAI-compatible server; None = OpenAI
    concurrency: int = 16  # maximum number of requests at the same time
    out_dir: str = "datasets"  # folder for finetune_data.jsonl and finetune_data.txt
    dry_run: bool = False  # only show one prompt and estimate the cost
    offline: bool = False  # write the descriptions with the grammar instead of a model
    seed: int = 0  # random seed for the order of places and cultures, and for the grammar
    min_words: int = 150  # minimum words per description
    max_words: int = 400  # maximum words per description
    timeout: float = 120  # seconds without data from the server before a request is repeated
    # retries of a failed request, after waits of 0.5 to 8 s (together two minutes), or as long as
    # the server asks
    max_retries: int = 20
    input_price: float = 2.0  # dollars per million prompt tokens (default: gpt-4.1)
    output_price: float = 8.0  # dollars per million completion tokens (default: gpt-4.1)

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        """In dollars."""
        return (prompt_tokens * self.input_price + completion_tokens * self.output_price) / 1e6


def main(config: Config):
    check(config)
    if config.dry_run:
        show_dry_run(config)
        return
    # Read before the files are touched, so that a missing key changes nothing.
    key = "" if config.offline else read_api_key()
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
        store.write_text()
        say(store.summary())


def check(config: Config):
    """Raise UserError if the settings make no sense."""
    num_seeds = len(prompt_seeds(config.seed))
    if config.num_samples < 1 or config.concurrency < 1:
        raise UserError("num_samples and concurrency must be at least 1")
    if config.num_samples > num_seeds:
        raise UserError(
            f"num_samples must be at most {num_seeds:,}, the number of pairs of place and culture"
        )
    if not 1 <= config.min_words < config.max_words:
        raise UserError("min_words must be at least 1, and max_words greater than min_words")
    if config.timeout <= 0 or config.max_retries < 0:
        raise UserError("timeout must be greater than 0, and max_retries at least 0")
    if config.model == OFFLINE:
        raise UserError(f"a model can't be called {OFFLINE}: for the grammar, give --{OFFLINE}")
    if config.dry_run and config.offline:
        raise UserError("dry_run and offline exclude each other: offline costs nothing")
    if config.base_url is not None and not is_url(config.base_url):
        raise UserError(f"base_url must be like http://localhost:8000/v1, not {config.base_url!r}")


def is_url(text: str) -> bool:
    try:
        url = urlsplit(text)
        return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # unbalanced brackets, or a port that is not a number below 65,536
        return False


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
    while len(store.records) < config.num_samples:
        # This can happen if near-duplicates use up more seeds than there are to spare.
        if not seeds:
            raise UserError("all seeds are used up")
        about = seeds.popleft()
        text = as_text(describe(about, config.seed, config.min_words, config.max_words))
        if not store.is_near_duplicate(text):
            store.add(about, text, prompt_tokens=0, completion_tokens=0, model=OFFLINE)
            bar.update()


def write_with_model(
    config: Config, store: DescriptionStore, seeds: deque[PromptSeed], bar: Progress, key: str
):
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
        from fantasy.chat import ChatClient

        self.config = config
        self.store = store
        self.seeds = seeds
        self.bar = bar
        self.chat = ChatClient(
            key,
            config.base_url,
            config.model,
            # An acceptable answer is never as long. The limit stops a model that does not end.
            max_tokens=8 * config.max_words,
            timeout=config.timeout,
            max_retries=config.max_retries,
            on_retry=self.on_retry,
        )
        # Descriptions that no worker is working on yet.
        self.num_missing = config.num_samples - len(store.records)
        self.error: Exception | None = None  # the error that ends the run
        self.rejected: Counter[str] = Counter()  # reason -> number of answers
        self.rejected_in_a_row = 0
        self.retried: Counter[str] = Counter()  # kind of failure -> number of requests
        self.prompt_tokens = 0
        self.completion_tokens = 0

    async def run(self):
        """Ask until num_samples descriptions are stored.

        Raises UserError or OSError. Requests that are on their way then finish first, because they
        are paid for. Ctrl-C cancels them.
        """
        async with self.chat:
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
            reason = self.reason_to_reject(answer)
            if reason is None:
                # No await since the answer arrived, so nothing can cancel this worker before the
                # answer is in the file.
                self.store.add(
                    about,
                    answer.text,
                    answer.prompt_tokens,
                    answer.completion_tokens,
                    self.config.model,
                )
                self.rejected_in_a_row = 0
                self.show_progress()
                return True
            self.reject(reason)
        return False

    def reason_to_reject(self, answer) -> str | None:
        """Why an answer can't be accepted, None if it can."""
        # What the server reports comes first: a text that was cut off may also look too short.
        if answer.problem:
            return answer.problem
        num_words = len(answer.text.split())
        if num_words == 0:
            return "empty"
        if REFUSAL.match(answer.text):
            return "refusal"
        if DELIMITER.search(answer.text):
            return "delimiter"
        if num_words > self.config.max_words:
            return "too long"
        if num_words < self.config.min_words:
            return "too short"
        if self.store.is_near_duplicate(answer.text):
            return "near-duplicate"
        return None

    def reject(self, reason: str):
        """Count a rejected answer. Raises UserError if there were too many in a row."""
        self.rejected[reason] += 1
        self.rejected_in_a_row += 1
        self.show_progress()
        if self.rejected_in_a_row >= MAX_REJECTED_IN_A_ROW:
            raise UserError(
                f"{MAX_REJECTED_IN_A_ROW} answers in a row were rejected "
                f"({format_counts(self.rejected)}): check base_url, or try another model or other "
                "min_words and max_words"
            )

    def on_retry(self, failure: str, wait: str):
        """Count a failed attempt, and tell the user about the first of its kind."""
        if not self.retried[failure]:
            asked = f" (Retry-After: {wait})" if wait else ""
            say(
                f"warning: {self.chat.url}: {failure}{asked}; a request is retried up to "
                f"{self.config.max_retries} times"
            )
        self.retried[failure] += 1
        self.show_progress()

    def cost(self) -> str:
        return f"${self.config.cost(self.prompt_tokens, self.completion_tokens):.2f}"

    def show_progress(self):
        accepted = len(self.store.records)
        tokens = self.prompt_tokens + self.completion_tokens
        self.bar.set_postfix_str(
            f"accepted {accepted:,}, rejected {self.rejected.total():,}, "
            f"retried {self.retried.total():,}, {tokens:,} tokens, {self.cost()}",
            refresh=False,
        )
        self.bar.update(accepted - self.bar.n)

    def summary(self) -> str:
        return (
            f"this run: {self.prompt_tokens:,} + {self.completion_tokens:,} tokens, {self.cost()}; "
            f"answers rejected: {format_counts(self.rejected)}; "
            f"requests retried: {format_counts(self.retried)}"
        )


def format_counts(counts: Counter) -> str:
    """For example "3 refusal, 1 too long"."""
    return ", ".join(f"{number:,} {kind}" for kind, number in counts.most_common()) or "none"


if __name__ == "__main__":
    cli(Config, main, __doc__)
