"""A checkpoint -> a folder that transformers' GPT2LMHeadModel and AutoTokenizer read.

python export.py --model log/model_final.pt --out gpt2_ours
"""

from dataclasses import dataclass

import tokenizer
from checkpoint import load_model
from console import cli, say


@dataclass
class Config:
    model: str = "log/model_final.pt"  # a checkpoint
    out: str = "exported"  # folder to write


def main(config: Config):
    model, enc = load_model(config.model)
    model.save_pretrained(config.out)
    tokenizer.save_pretrained(enc, config.out)
    say(f"{config.out}: {model.num_params():,} parameters and a tokenizer of {enc.n_vocab:,} tokens")


if __name__ == "__main__":
    cli(Config, main, __doc__)
