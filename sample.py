"""Generate text from a checkpoint, a Hugging Face folder, or OpenAI's weights by name.

    python sample.py                                                  # log/model_final.pt
    python sample.py --model gpt2 --prompt "The meaning of life is" --num_samples 5
    python sample.py --model log/model_05000.pt --stream --temperature 0.8 --top_p 0.95
    python sample.py --prompt_file prompts.txt --out samples.txt      # one prompt per line

A sample ends after max_tokens, or where the model ends its text.
"""

import codecs
import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from textwrap import shorten

import common.before_torch

import tiktoken

from common import runtime
from common.checkpoint import load_model, not_finite_error
from common.console import Progress, UserError, cli, read_lines, say, write_text
from common.cpu import can_pack, pack_weights
from common.tokenizer import END_OF_TEXT
from model import GPT

SEPARATOR = "-" * 80


@dataclass
class Config:
    # a checkpoint, a Hugging Face folder, or gpt2 ... gpt2-xl
    model: str = "log/model_final.pt"
    # text to continue; "" = none, the model begins a text of its own
    prompt: str = "Hello, I'm a language model,"
    # a file with one prompt per line, instead of prompt; - = standard input
    prompt_file: str | None = None
    num_samples: int = 4  # samples per prompt
    max_tokens: int = 100  # largest number of new tokens per sample
    # below 1 favours likely tokens, above 1 unlikely ones; 0 = always the most likely token
    temperature: float = 1.0
    top_k: int | None = 50  # draw from the k most likely tokens only; None = from all
    # draw from the most likely tokens that together reach this probability; None = from all
    top_p: float | None = None
    seed: int = 42  # seed of the random draws
    stream: bool = False  # print the samples one after another, token by token
    out: str | None = None  # also write the samples to this file
    batch_size: int = 16  # samples generated at a time
    device: str = "auto"  # cuda, mps or cpu; auto = the first available of these
    # dtype of matrix products; auto = the fastest of bfloat16, float16 and float32 on this hardware
    dtype: runtime.Dtype = "auto"

    def __post_init__(self):
        if self.num_samples < 1 or self.max_tokens < 1 or self.batch_size < 1:
            raise UserError("num_samples, max_tokens and batch_size must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}, must be a number from 0 on")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}, must not be negative")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}, must be at least 1, or None for no limit")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}, must be above 0 and at most 1")


def main(config: Config):
    prompts = read_prompts(config)
    rt = runtime.start(config.device, config.dtype)
    model, enc = load_model(config.model)
    model.to(rt.device).eval()
    jobs, num_too_long = encode_prompts(prompts, model, enc, config)

    # On CPUs, packed weights are faster, and they need no autocast.
    packed = model
    autocast = rt.autocast()
    if can_pack(rt.device, rt.dtype):
        packed = pack_weights(model, rt.dtype)
        autocast = nullcontext()

    batch_size = 1 if config.stream else config.batch_size
    samples = []
    bar = Progress(total=len(jobs), desc="sampling", unit="sample", disable=config.stream)
    with bar, autocast:
        for first in range(0, len(jobs), batch_size):
            batch = jobs[first : first + batch_size]
            try:
                drawn = draw(packed, enc, batch, config, seed=config.seed + first)
            except FloatingPointError as error:
                raise not_finite_error(model) from error
            for sample in drawn:
                samples.append(sample)
                if not config.stream:
                    say(f"{sample}\n{SEPARATOR}")
            bar.update(len(batch))
    if config.out:
        write_text(config.out, "".join(f"{sample}\n{SEPARATOR}\n" for sample in samples))
        say(f"{len(samples)} samples: {config.out}")
    if num_too_long:
        raise UserError(f"{num_too_long} prompts were too long and have no samples, see above")


def read_prompts(config: Config) -> list[str]:
    if config.prompt_file is None:
        return [config.prompt]
    prompts = [line for line in read_lines(config.prompt_file) if line.strip()]
    if not prompts:
        raise UserError(f"{config.prompt_file} holds no prompts: write one per line")
    return prompts


def encode_prompts(
    prompts: list[str], model: GPT, enc: tiktoken.Encoding, config: Config
) -> tuple[list[tuple[str, list[int]]], int]:
    """A job (prompt, its token ids) for each sample, and the number of prompts that are too long.

    Raises UserError if no prompt leaves room for max_tokens new tokens.
    """
    jobs = []
    num_too_long = 0
    for prompt in prompts:
        # Special tokens in a prompt are tokens: <|endoftext|>, which separates documents in
        # training, and those of the model's tokenizer.
        ids = enc.encode(prompt, allowed_special="all") or [enc.eot_token]
        if len(ids) + config.max_tokens <= model.config.block_size:
            jobs += [(prompt.replace(END_OF_TEXT, ""), ids)] * config.num_samples
            continue
        num_too_long += 1
        message = (
            f"a prompt of {len(ids)} tokens and {config.max_tokens} new ones do not fit the "
            f"context of {model.config.block_size} tokens: shorten the prompt or lower max_tokens"
        )
        if len(prompts) == 1:
            raise UserError(message)
        say(f"skipped: {message}: {shorten(prompt, 60)}")
    return jobs, num_too_long


def draw(
    model: GPT,
    enc: tiktoken.Encoding,
    batch: list[tuple[str, list[int]]],
    config: Config,
    seed: int,
) -> list[str]:
    """A sample for each (prompt, its token ids) of the batch: the prompt and its continuation."""
    sampling = dict(
        temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, seed=seed
    )
    if config.stream:
        [(prompt, ids)] = batch
        outputs = [stream_to_screen(model, enc, prompt, ids, config.max_tokens, sampling)]
    else:
        encoded = [ids for _, ids in batch]
        outputs = model.generate(encoded, config.max_tokens, stop_token=enc.eot_token, **sampling)
    return [prompt + enc.decode(output) for (prompt, _), output in zip(batch, outputs)]


def stream_to_screen(
    model: GPT,
    enc: tiktoken.Encoding,
    prompt: str,
    ids: list[int],
    max_tokens: int,
    sampling: dict,
) -> list[int]:
    """Print a sample token by token; return its new token ids."""
    # A character may consist of several tokens: the decoder holds back its bytes until the last.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    output = []
    sys.stdout.write(prompt)
    for (token,) in model.stream([ids], max_tokens, **sampling):
        if token == enc.eot_token:
            break
        output.append(token)
        sys.stdout.write(decoder.decode(enc.decode_single_token_bytes(token)))
        sys.stdout.flush()
    print(decoder.decode(b"", final=True))
    print(SEPARATOR)
    return output


if __name__ == "__main__":
    cli(Config, main, __doc__)
