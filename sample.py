"""Generate text from a checkpoint, a Hugging Face folder, or OpenAI's weights by name.

    python sample.py                                                  # log/model_final.pt
    python sample.py --model gpt2 --prompt "The meaning of life is" --num_samples 5
    python sample.py --model log/model_05000.pt --stream --temperature 0.8 --top_p 0.95
    python sample.py --prompt_file prompts.txt --out samples.txt      # one prompt per line

A sample ends after max_tokens, or where the model ends its text.
"""

import codecs
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import tiktoken

from common import runtime
from common.checkpoint import load_model
from common.console import Progress, UserError, cli, say, write_text
from common.cpu import can_pack, pack_weights
from model import GPT

SEPARATOR = "-" * 80


@dataclass
class Config:
    # a checkpoint, a Hugging Face folder, or gpt2 ... gpt2-xl
    model: str = "log/model_final.pt"
    prompt: str = "Hello, I'm a language model,"  # text to continue
    prompt_file: str | None = None  # a file with one prompt per line, instead of prompt
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
    # dtype of matrix products; auto = bfloat16 where the hardware is fast at it, else float32
    dtype: runtime.Dtype = "auto"

    def __post_init__(self):
        if self.num_samples < 1 or self.max_tokens < 1 or self.batch_size < 1:
            raise UserError("num_samples, max_tokens and batch_size must be at least 1")
        if self.temperature < 0:
            raise UserError(f"temperature is {self.temperature}, must not be negative")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}, must be at least 1, or None for no limit")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}, must be above 0 and at most 1")


def main(config: Config):
    prompts = read_prompts(config)
    rt = runtime.start(config.device, config.dtype)
    model, enc = load_model(config.model)
    model.to(rt.device).eval()
    encoded = [encode_prompt(enc, prompt, model, config.max_tokens) for prompt in prompts]

    # On CPUs, packed weights are faster, and they need no autocast.
    autocast = rt.autocast()
    if can_pack(rt.device, rt.dtype):
        model = pack_weights(model, rt.dtype)
        autocast = nullcontext()

    jobs = [job for job in zip(prompts, encoded) for _ in range(config.num_samples)]
    batch_size = 1 if config.stream else config.batch_size
    samples = []
    bar = Progress(total=len(jobs), desc="sampling", unit="sample", disable=config.stream)
    with bar, autocast:
        for first in range(0, len(jobs), batch_size):
            batch = jobs[first : first + batch_size]
            for sample in draw(model, enc, batch, config, seed=config.seed + first):
                samples.append(sample)
                if not config.stream:
                    say(f"{sample}\n{SEPARATOR}")
            bar.update(len(batch))
    if config.out:
        write_text(config.out, "".join(f"{sample}\n{SEPARATOR}\n" for sample in samples))
        say(f"{len(samples)} samples: {config.out}")


def read_prompts(config: Config) -> list[str]:
    prompts = [config.prompt]
    if config.prompt_file:
        path = Path(config.prompt_file)
        if not path.is_file():
            raise FileNotFoundError(f"no prompt file {path}")
        prompts = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
        if not prompts:
            raise UserError(f"{path} holds no prompts: write one per line")
    if not all(prompts):
        raise UserError("the prompt is empty: give some text to continue")
    return prompts


def encode_prompt(enc: tiktoken.Encoding, prompt: str, model: GPT, max_tokens: int) -> list[int]:
    """Token ids of a prompt. Raises UserError if it leaves no room for max_tokens new ones."""
    ids = enc.encode_ordinary(prompt)
    block_size = model.config.block_size
    if len(ids) + max_tokens > block_size:
        raise UserError(
            f"a prompt of {len(ids)} tokens and {max_tokens} new ones do not fit the context of "
            f"{block_size} tokens: shorten the prompt or lower max_tokens"
        )
    return ids


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
