"""Prompts -> text, from a checkpoint, a folder in Hugging Face's layout, or OpenAI's weights by name.

    python sample.py                                                  # log/model_final.pt
    python sample.py --model gpt2 --prompt "The meaning of life is" --num_samples 5
    python sample.py --model log/model_05000.pt --stream --temperature 0.8 --top_p 0.95
    python sample.py --prompt_file prompts.txt --out samples.txt      # a prompt a line

A sample ends after max_tokens, or where the model ends its text.
"""

import codecs
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from common import runtime
from common.checkpoint import load_model
from common.console import Progress, UserError, cli, say, write_text
from common.cpu import can_pack, pack_weights


@dataclass
class Config:
    model: str = "log/model_final.pt"  # a checkpoint, a Hugging Face folder, or gpt2 ... gpt2-xl
    prompt: str = "Hello, I'm a language model,"  # the text to go on from
    prompt_file: str | None = None  # a file with a prompt a line, instead of prompt
    num_samples: int = 4  # per prompt
    max_tokens: int = 100  # new tokens per sample
    temperature: float = (
        1.0  # below 1 likelier tokens, above 1 stranger ones; 0 = always the likeliest
    )
    top_k: int | None = 50  # draw from the k likeliest tokens only; None = from all
    top_p: float | None = (
        None  # draw from the likeliest tokens that together reach this probability
    )
    seed: int = 42  # of the draws
    stream: bool = False  # show the samples one after the other, token by token
    out: str | None = None  # write the samples to this file, too
    batch_size: int = 16  # samples drawn at a time
    device: str = "auto"  # cuda, mps or cpu; auto takes the first there is
    dtype: runtime.Dtype = (
        "auto"  # of matrix products; auto = bfloat16 where the hardware is fast at it
    )

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
    autocast = rt.autocast()
    if can_pack(rt.device, rt.dtype):
        model, autocast = pack_weights(model, rt.dtype), nullcontext()
    sampling = dict(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
    jobs = [
        (prompt, enc.encode_ordinary(prompt))
        for prompt in prompts
        for _ in range(config.num_samples)
    ]
    batch_size = 1 if config.stream else config.batch_size
    samples = []
    with (
        Progress(total=len(jobs), desc="sampling", unit="sample", disable=config.stream) as bar,
        autocast,
    ):
        for first in range(0, len(jobs), batch_size):
            batch = jobs[first : first + batch_size]
            ids = [tokens for _, tokens in batch]
            options = sampling | dict(seed=config.seed + first)
            if config.stream:
                outputs = [stream_to_screen(model, enc, *batch[0], config.max_tokens, options)]
            else:
                outputs = model.generate(
                    ids, config.max_tokens, stop_token=enc.eot_token, **options
                )
            for (prompt, _), output in zip(batch, outputs):
                samples.append(prompt + enc.decode(output))
                if not config.stream:
                    say(f"{samples[-1]}\n{'-' * 80}")
            bar.update(len(batch))
    if config.out:
        write_text(config.out, "".join(f"{sample}\n{'-' * 80}\n" for sample in samples))
        say(f"{len(samples)} samples: {config.out}")


def read_prompts(config: Config) -> list[str]:
    prompts = [config.prompt]
    if config.prompt_file:
        path = Path(config.prompt_file)
        if not path.is_file():
            raise FileNotFoundError(f"no prompt file {path}")
        prompts = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
        if not prompts:
            raise UserError(f"{path} holds no prompts: write one a line")
    if not all(prompts):
        raise UserError("the prompt is empty: give some text to go on from")
    return prompts


def stream_to_screen(
    model, enc, prompt: str, tokens: list[int], max_tokens: int, sampling: dict
) -> list[int]:
    """Print a sample as it is drawn. A character may be spread over several tokens: it is shown when it is whole."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    output = []
    sys.stdout.write(prompt)
    for (token,) in model.stream([tokens], max_tokens, **sampling):
        if token == enc.eot_token:
            break
        output.append(token)
        sys.stdout.write(decoder.decode(enc.decode_single_token_bytes(token)))
        sys.stdout.flush()
    print(decoder.decode(b"", final=True), "-" * 80, sep="\n")
    return output


if __name__ == "__main__":
    cli(Config, main, __doc__)
