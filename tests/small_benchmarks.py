"""A small model, small data and a plain scoring loop, for the tests of the benchmarks."""

import json
from pathlib import Path

import numpy as np
import torch
from conftest import ROOT, command
from transformers import GPT2LMHeadModel

from common import checkpoint
from common.huggingface import save_pretrained, save_tokenizer
from common.runtime import Runtime
from common.tokenizer import train_tokenizer
from model import GPT, GPTConfig

CPU = Runtime(torch.device("cpu"), torch.float32)
TEXT = (ROOT / "README.md").read_text() + (ROOT / "model.py").read_text()
EXAMPLES = [
    dict(
        ind=n,
        activity_label="Cooking",
        ctx_a="A man [header] cuts bread.",
        ctx_b="he",
        ctx="A man cuts bread. he",
        label=n % 4,
        endings=[
            "eats it" + " slowly" * n,
            "[title] sings  of the bread.",
            "eats a stone.",
            f"reads {n}",
        ],
    )
    for n in range(12)
]
LAST_WORDS = ("model", "tokenizer", "the", "it's", "embedding,")
PASSAGES = [
    f"The model reads {n} tokens and then it writes a token of the {word}"
    for n in range(5)
    for word in LAST_WORDS
]


def question_text(answer: str, candidates: str) -> str:
    """A question of the Children's Book Test in the format of its files."""
    lines = [f"{n} `` It is n't {n} o'clock , '' said Mr. Brown 's dog ." for n in range(1, 21)]
    query = "21 `` Oh , XXXXX ! '' -LRB- said the boys ' aunt -RRB- ."
    return "\n".join([*lines, f"{query}\t{answer}\t\t{candidates}\n\n"])


def write_model_and_data(folder: Path) -> Path:
    """Write a model, as a checkpoint and in Hugging Face's layout, and data for each benchmark."""
    enc, _ = train_tokenizer([TEXT], 500)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=500, n_layer=2, n_head=2, n_embd=32, block_size=256))
    with torch.no_grad():
        model.wte.weight *= 20  # so that predictions differ
    save_pretrained(model, folder / "hf")
    save_tokenizer(enc, folder / "hf")
    checkpoint.save(folder / "model.pt", checkpoint.build(model, enc, step=0))
    hellaswag = [json.dumps(example) + "\n" for example in EXAMPLES]
    (folder / "hellaswag.jsonl").write_text("".join(hellaswag))
    lambada = [json.dumps(dict(text=passage)) + "\n" for passage in PASSAGES]
    (folder / "lambada.jsonl").write_text("".join(lambada))
    names = question_text("Mary", "Mary|John|Kitty|Mr|Jane|Anne|Tom|Sam|Ned|Eve")
    (folder / "cbtest_NE_test.txt").write_text(names * 6)
    verbs = question_text("said", "said|ran|'s|went|is|was|had|saw|ate|sat")
    (folder / "cbtest_V_test.txt").write_text(verbs * 2)
    return folder


def load_both(folder: Path):
    """The small model as ours, its tokenizer, and the same model as transformers' GPT-2."""
    model, enc = checkpoint.load_model(folder / "hf")
    return model, enc, GPT2LMHeadModel.from_pretrained(folder / "hf").eval()


@torch.no_grad()
def plain_logprobs(hf: GPT2LMHeadModel, context: list[int], continuation: list[int]) -> np.ndarray:
    """Log-probability of each token of the continuation, by a forward pass of its own, float64."""
    logits = hf.double()(torch.tensor([context + continuation[:-1]])).logits[0, len(context) - 1 :]
    return logits.log_softmax(-1)[torch.arange(len(continuation)), continuation].numpy()


def run(folder: Path, script: str, *words, model: str = "model.pt"):
    """Run a benchmark's command on the small model."""
    return command(script, "--model", folder / model, "--device", "cpu", *words)
