"""Export a model for other programs: to Hugging Face's layout, or to a GGUF file for llama.cpp.

    python export.py --model log/model_final.pt --out exported
    python export.py --model log/model_final.pt --out exported --format gguf

The first loads in transformers (GPT2LMHeadModel and AutoTokenizer) and in every script here that
takes a model. The second writes exported/model.gguf in float32, for `llama-cli -m` and programs
that use llama.cpp; its llama-quantize makes the file smaller.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import common.before_torch

from common.console import parse_flags, run_script, say


@dataclass
class Config:
    # a checkpoint (also of nanoGPT, build-nanogpt or llm.c), a Hugging Face folder, or gpt2 ...
    model: str = "log/model_final.pt"
    out: str = "exported"  # folder to write
    # what to write: a folder for transformers, or model.gguf for llama.cpp
    format: Literal["huggingface", "gguf"] = "huggingface"


if __name__ == "__main__":
    config = parse_flags(Config, __doc__)  # before the slow imports: --help answers at once

from common.checkpoint import load_model
from common.gguf_file import save_gguf
from common.huggingface import save_pretrained, save_tokenizer


def main(config: Config):
    model, enc = load_model(config.model)
    out = Path(config.out)

    # A file for llama.cpp has a fixed name in the folder; the other format fills the folder itself.
    if config.format == "gguf":
        out = out / "model.gguf"
        save_gguf(model, enc, out)
    else:
        save_pretrained(model, out, end_of_text=enc.eot_token)
        # Texts longer than the context are cut only if a user of transformers asks for it.
        save_tokenizer(enc, out, max_length=model.config.block_size)
    num_params = model.num_params()
    say(f"{out}: {num_params:,} parameters and a tokenizer of {enc.n_vocab:,} tokens")


if __name__ == "__main__":
    run_script(main, config)
