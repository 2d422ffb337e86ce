"""Export a checkpoint to a folder in Hugging Face's layout.

    python export.py --model log/model_final.pt --out exported

The folder loads in transformers (GPT2LMHeadModel and AutoTokenizer) and in every script here that
takes a model.
"""

from dataclasses import dataclass

import common.before_torch

from common.checkpoint import load_model
from common.console import cli, say
from common.huggingface import save_pretrained, save_tokenizer


@dataclass
class Config:
    model: str = "log/model_final.pt"  # checkpoint to export
    out: str = "exported"  # folder to write


def main(config: Config):
    model, enc = load_model(config.model)
    save_pretrained(model, config.out, end_of_text=enc.eot_token)
    save_tokenizer(enc, config.out, max_length=model.config.block_size)
    num_params = model.num_params()
    say(f"{config.out}: {num_params:,} parameters and a tokenizer of {enc.n_vocab:,} tokens")


if __name__ == "__main__":
    cli(Config, main, __doc__)
