"""A checkpoint -> a folder in Hugging Face's layout.

    python export.py --model log/model_final.pt --out exported

transformers' GPT2LMHeadModel and AutoTokenizer read it, and so does every stage here that takes a model.
"""

from dataclasses import dataclass

from common.checkpoint import load_model
from common.console import cli, say
from common.huggingface import save_pretrained, save_tokenizer


@dataclass
class Config:
    model: str = "log/model_final.pt"  # a checkpoint
    out: str = "exported"  # folder to write


def main(config: Config):
    model, enc = load_model(config.model)
    save_pretrained(model, config.out)
    save_tokenizer(enc, config.out)
    say(
        f"{config.out}: {model.num_params():,} parameters and a tokenizer of {enc.n_vocab:,} tokens"
    )


if __name__ == "__main__":
    cli(Config, main, __doc__)
