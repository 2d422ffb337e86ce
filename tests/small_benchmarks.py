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

# CORE's three types of tasks: shots, percent of right guesses, examples. Most have blanks where
# they matter, and one text of each type is longer than the small model's context.
LONG = "The model reads a token and writes a token. " * 25
CORE_TASKS = {
    "multiple_choice": (
        2,
        25.0,
        [
            dict(query=f"What is {n}? ", choices=[f"{n}", f" {n} models ", "a token"], gold=n % 3)
            for n in range(6)
        ]
        + [
            dict(query="Equal", choices=["the model", "the model"], gold=1),
            dict(query="Begins with the other", choices=["the model", "the model reads"], gold=0),
            dict(query=LONG + "What?", choices=["the model", "a token is read"], gold=1),
        ],
    ),
    "schema": (
        1,
        50.0,
        [
            dict(
                context_options=[f"Ann {n} saw the model ", f"Bob saw {n}"],
                continuation="and read it. ",
                gold=n % 2,
            )
            for n in range(5)
        ]
        + [
            dict(context_options=["Same", "Same"], continuation="end", gold=0),
            dict(context_options=[LONG, LONG + "It"], continuation="and read it", gold=0),
        ],
    ),
    "language_modeling": (
        3,
        0.0,
        [
            dict(context=f" The model reads {n} " + "\n" * (n % 2), continuation="tokens")
            for n in range(6)
        ]
        + [
            dict(context="It", continuation="is a model "),
            dict(context=LONG + "The model", continuation="reads a token"),
        ],
    ),
}


def write_bundle(folder: Path) -> Path:
    """A bundle like that of CORE, with a task of each type."""
    (folder / "eval_data" / "small").mkdir(parents=True)
    entries = []
    chances = ["Eval Task,Task Category,Random baseline"]
    for kind, (shots, chance, examples) in CORE_TASKS.items():
        uri = f"small/{kind}.jsonl"
        lines = [json.dumps(example) + "\n" for example in examples]
        (folder / "eval_data" / uri).write_text("".join(lines))
        # JSON is YAML.
        entries.append(
            dict(label=f"my_{kind}", dataset_uri=uri, num_fewshot=[shots], icl_task_type=kind)
        )
        chances.append(f"my_{kind},any,{chance}")
    entries[0]["continuation_delimiter"] = "\nAnswer: "
    (folder / "core.yaml").write_text(json.dumps(dict(icl_tasks=entries)))
    (folder / "eval_meta_data.csv").write_text("\n".join(chances) + "\n")
    return folder


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
    write_bundle(folder / "eval_bundle")
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
