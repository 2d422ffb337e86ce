"""Generate text from a checkpoint, a Hugging Face folder, or OpenAI's weights by name.

    python sample.py                                                  # log/model_final.pt
    python sample.py --model gpt2 --prompt "The meaning of life is" --num_samples 5
    python sample.py --model log/model_05000.pt --stream --temperature 0.8 --top_p 0.95
    python sample.py --prompt_file prompts.txt --out samples.txt      # one prompt per line
    python sample.py --interactive                                    # type prompts

A sample ends after max_tokens, or where the model ends its text. It may be longer than the model's
context: when the context is full, the model forgets the older half of it, reads the rest once more
at its new positions and continues. With a context of 1024 tokens this happens every 512 tokens, and
each token is drawn with 512 to 1024 tokens in view.

With --interactive, each line of input is a prompt. Ctrl-C stops the text; Ctrl-D or an empty line
ends the program. A line like "/temperature 0.8" changes a setting: temperature, top_k, top_p,
max_tokens or seed. Each text has its own seed, one above that of the text before.
"""

import codecs
import io
import math
import sys
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from textwrap import shorten
from typing import Any

import common.before_torch

from common.console import (
    Dtype,
    Progress,
    UserError,
    check_output,
    parse_flags,
    read_lines,
    run_script,
    say,
    write_text,
)


@dataclass
class Config:
    # a checkpoint, a Hugging Face folder, or gpt2 ... gpt2-xl
    model: str = "log/model_final.pt"
    # text to continue; "" = none, the model begins a text of its own
    prompt: str = "Hello, I'm a language model,"
    # a file with one prompt per line, instead of prompt; - = standard input
    prompt_file: str | None = None
    num_samples: int = 4  # samples per prompt
    # largest number of new tokens per sample; with the prompt, they may exceed the context
    max_tokens: int = 100
    # below 1 favors likely tokens, above 1 unlikely ones; 0 = always the most likely token
    temperature: float = 1.0
    top_k: int | None = 50  # draw from the k most likely tokens only; None = from all
    # draw from the most likely tokens that together reach this probability; None = from all
    top_p: float | None = None
    seed: int = 42  # seed of the random draws
    stream: bool = False  # print the samples one after another, token by token
    # read prompts from the terminal (or a pipe), one per line, and continue each token by token;
    # prompt, num_samples and batch_size are not used
    interactive: bool = False
    out: str | None = None  # also write the samples to this file
    batch_size: int = 16  # samples generated at a time
    device: str = "auto"  # cuda, mps or cpu; auto = the first available of these
    # dtype of matrix products; auto = the fastest of bfloat16, float16 and float32 on this hardware
    dtype: Dtype = "auto"

    def __post_init__(self):
        if self.num_samples < 1 or self.max_tokens < 1 or self.batch_size < 1:
            raise UserError("num_samples, max_tokens and batch_size must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}, must be a number from 0 on")
        # Several samples have seeds above this one, and torch's seeds have 64 bits.
        if not 0 <= self.seed <= 2**62:
            raise UserError(f"seed is {self.seed}, must be from 0 to 2**62")

        # None, and only None, stands for no limit: 0 is an error.
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}, must be at least 1, or None for no limit")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}, must be above 0 and at most 1")

        # Flags that --interactive would ignore
        if self.interactive and (self.prompt_file or self.out):
            raise UserError(
                "interactive reads prompts from the terminal and writes no file: "
                "leave out prompt_file and out"
            )


if __name__ == "__main__":
    config = parse_flags(Config, __doc__)  # before the slow imports: --help answers at once

import tiktoken

from common import runtime
from common.checkpoint import load_model, not_finite_error
from common.cpu import can_pack, for_generation
from common.tokenizer import END_OF_TEXT
from model import GPT

SEPARATOR = "-" * 80
# Settings that a line of --interactive can change, and their types. top_k and top_p may be none.
COMMANDS = {"temperature": float, "top_k": int, "top_p": float, "max_tokens": int, "seed": int}


def main(config: Config):
    """Draw the samples, or answer the lines of the terminal."""
    # Before the model is loaded: a missing file should show at once.
    prompts = [] if config.interactive else read_prompts(config)
    check_output(config.out)
    rt = runtime.start(config.device, config.dtype)
    model, enc = load_model(config.model)
    model.to(rt.device).eval()

    # On CPUs, a copy with faster products. It needs no autocast.
    replica = model
    autocast = rt.autocast()
    if can_pack(rt.device, rt.dtype):
        one_by_one = config.interactive or config.stream
        num_texts = 1 if one_by_one else min(config.batch_size, len(prompts) * config.num_samples)
        replica = for_generation(model, rt.dtype, num_texts)
        autocast = nullcontext()

    try:
        with autocast:
            if config.interactive:
                interact(replica, enc, config)
                return
            samples = draw_all(replica, enc, prompts, config)
    except FloatingPointError as error:
        raise not_finite_error(model) from error

    if config.out:
        write_text(config.out, "".join(f"{sample}\n{SEPARATOR}\n" for sample in samples))
        say(f"{len(samples)} samples: {config.out}")


def read_prompts(config: Config) -> list[str]:
    """The prompts of the file, or the one of the flag."""
    if config.prompt_file is None:
        return [config.prompt]
    prompts = [line for line in read_lines(config.prompt_file) if line.strip()]
    if not prompts:
        raise UserError(f"{config.prompt_file} holds no prompts: write one per line")
    return prompts


def draw_all(model: GPT, enc: tiktoken.Encoding, prompts: list[str], config: Config) -> list[str]:
    """num_samples samples for each prompt, printed as they are drawn."""
    # A job for each sample: the prompt as it is shown, and its token ids.
    jobs: list[tuple[str, list[int]]] = []
    for prompt in prompts:
        # One list of tokens for all samples of a prompt: the model works on copies.
        jobs += [encode_prompt(prompt, model, enc)] * config.num_samples

    # Several texts can't be printed token by token in the same place.
    batch_size = 1 if config.stream else config.batch_size
    samples = []
    with Progress(total=len(jobs), desc="sampling", unit="sample", disable=config.stream) as bar:
        for first in range(0, len(jobs), batch_size):
            batch = jobs[first : first + batch_size]
            # With config.seed + first, the second batch would be the first one of seed + 1.
            seed = runtime.mixed_seed(config.seed, first)
            for sample in draw(model, enc, batch, config, seed):
                samples.append(sample)
                # A streamed sample is already on the screen.
                say(SEPARATOR if config.stream else f"{sample}\n{SEPARATOR}")
            bar.update(len(batch))
    return samples


def encode_prompt(prompt: str, model: GPT, enc: tiktoken.Encoding) -> tuple[str, list[int]]:
    """The prompt as it is shown, and its token ids."""
    # Special tokens in a prompt are tokens: <|endoftext|>, which separates documents in training,
    # and those of the model's tokenizer.
    ids = enc.encode(prompt, allowed_special="all") or [enc.eot_token]

    # The window of a long prompt begins behind its first tokens.
    num_unseen = model.window_start(len(ids))
    if num_unseen:
        say(
            f"a prompt of {len(ids)} tokens is longer than the context of "
            f"{model.config.block_size}: the model sees its last {len(ids) - num_unseen} "
            f"tokens: {shorten(prompt, 60)}"
        )
    # The token separates documents, and is no text to show.
    return prompt.replace(END_OF_TEXT, ""), ids


def draw(
    model: GPT,
    enc: tiktoken.Encoding,
    batch: list[tuple[str, list[int]]],
    config: Config,
    seed: int,
) -> list[str]:
    """A sample for each (prompt, its token ids) of the batch: the prompt and its continuation."""
    if config.stream:
        # draw_all makes batches of one sample for --stream.
        [(prompt, ids)] = batch
        outputs = [stream_to_screen(model, enc, prompt, ids, config, seed)]
    else:
        encoded = [ids for _, ids in batch]
        outputs = model.generate(
            encoded, config.max_tokens, stop_token=enc.eot_token, **sampling(config, seed)
        )
    return [prompt + enc.decode(output) for (prompt, _), output in zip(batch, outputs)]


def sampling(config: Config, seed: int) -> dict:
    """The arguments of model.stream that say how tokens are drawn."""
    return dict(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, seed=seed)


def stream_to_screen(
    model: GPT, enc: tiktoken.Encoding, prompt: str, ids: list[int], config: Config, seed: int
) -> list[int]:
    """Print a sample token by token; return its new token ids."""
    # A character may consist of several tokens: the decoder holds back its bytes until the last.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    output = []

    # Flushed after each token, or the terminal would show whole lines only.
    sys.stdout.write(prompt)
    sys.stdout.flush()
    for (token,) in model.stream([ids], config.max_tokens, **sampling(config, seed)):
        if token == enc.eot_token:
            break
        output.append(token)
        sys.stdout.write(decoder.decode(enc.decode_single_token_bytes(token)))
        sys.stdout.flush()
    # Bytes of a character that was never completed are shown as U+FFFD.
    print(decoder.decode(b"", final=True), flush=True)
    return output


# ---------------------------------------------------------------------------------------------
# Interactive


def interact(model: GPT, enc: tiktoken.Encoding, config: Config):
    """Continue each line of standard input, until it ends or a line is empty."""
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        with suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  # input() then has a history and can be edited
        say("Type a text to continue. Ctrl-C stops the model, Ctrl-D or an empty line ends.")
        say(describe_settings(config))
    if isinstance(sys.stdin, io.TextIOWrapper):
        # A pipe may hold bytes that are not UTF-8: replaced, not a crash.
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            line = input("> " if is_terminal else "")
            if not line.strip():
                break
            if line.startswith("/"):
                config = change_setting(config, line)
                continue
            prompt, ids = encode_prompt(line, model, enc)
            # With the same seed, the same line would be continued in the same way each time.
            seed = config.seed
            config = replace(config, seed=seed + 1)
            stream_to_screen(model, enc, prompt, ids, config, seed)
        except EOFError:
            break
        except KeyboardInterrupt:
            # Ctrl-C may come in the middle of a text: the message begins on a new line.
            say("\n(stopped; Ctrl-D or an empty line ends)")


def change_setting(config: Config, line: str) -> Config:
    """The settings after a line like "/top_k 40". It is answered with all of them."""
    name, _, value = line[1:].strip().partition(" ")
    value = value.strip()
    if name in COMMANDS and value:
        try:
            # The value is checked twice: COMMANDS converts it, Config tests its range.
            is_none = value.lower() == "none" and name in ("top_k", "top_p")
            change: dict[str, Any] = {name: None if is_none else COMMANDS[name](value)}
            config = replace(config, **change)
        except (UserError, ValueError) as error:
            say(f"{name} is unchanged: {error}")
            return config
    elif name not in COMMANDS and name:
        say(f"there is no setting {name!r}")
    # Also after a line like "/", which only asks for the settings.
    say(describe_settings(config))
    return config


def describe_settings(config: Config) -> str:
    """The settings, as the lines that would set them."""
    return "   ".join(f"/{name} {getattr(config, name)}" for name in COMMANDS)


if __name__ == "__main__":
    run_script(main, config)
