"""The benchmarks: their figures against a plain loop over transformers' GPT-2, their data, and what can go wrong."""

import hashlib
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL_RUN, command, ok, one_line
from transformers import GPT2LMHeadModel

import cbt
import hellaswag
import lambada
from common import checkpoint, tasks
from common.console import UserError
from common.huggingface import save_pretrained, save_tokenizer
from common.runtime import Runtime
from common.tokenizer import tokenizer_to_text, train_tokenizer
from model import GPT, GPTConfig

CPU = Runtime(torch.device("cpu"), torch.float32)
TEXT = (ROOT / "README.md").read_text() + (ROOT / "model.py").read_text()
EXAMPLES = [
    dict(
        ind=n, activity_label="Cooking", ctx_a="A man [header] cuts bread.", ctx_b="he", ctx="A man cuts bread. he",
        label=n % 4, endings=["eats it" + " slowly" * n, "[title] sings  of the bread.", "eats a stone.", f"reads {n}"],
    )
    for n in range(12)
]  # fmt: skip
PASSAGES = [f"The model reads {n} tokens and then it writes a token of the {word}" for n in range(5) for word in
            ("model", "tokenizer", "the", "it's", "embedding,")]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model as a checkpoint and in Hugging Face's layout, with its tokenizer, and a little data for each."""
    folder = tmp_path_factory.mktemp("benchmarks")
    enc, _ = train_tokenizer([TEXT], 500)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=500, n_layer=2, n_head=2, n_embd=32, block_size=256))
    with torch.no_grad():
        model.wte.weight *= 20  # so that predictions differ
    save_pretrained(model, folder / "hf")
    save_tokenizer(enc, folder / "hf")
    checkpoint.save(
        folder / "model.pt",
        dict(
            model=model.state_dict(),
            config=model.config_dict(),
            tokenizer=tokenizer_to_text(enc),
            step=0,
        ),
    )
    (folder / "hellaswag.jsonl").write_text("".join(json.dumps(e) + "\n" for e in EXAMPLES))
    (folder / "lambada.jsonl").write_text(
        "".join(json.dumps(dict(text=p)) + "\n" for p in PASSAGES)
    )
    (folder / "cbtest_NE_test.txt").write_text(
        question_text("Mary", "Mary|John|Kitty|Mr|Jane|Anne|Tom|Sam|Ned|Eve") * 6
    )
    (folder / "cbtest_V_test.txt").write_text(
        question_text("said", "said|ran|'s|went|is|was|had|saw|ate|sat") * 2
    )
    return folder


def question_text(answer: str, candidates: str) -> str:
    sentences = [f"{n} `` It is n't {n} o'clock , '' said Mr. Brown 's dog ." for n in range(1, 21)]
    return "\n".join(
        [
            *sentences,
            f"21 `` Oh , XXXXX ! '' -LRB- said the boys ' aunt -RRB- .\t{answer}\t\t{candidates}\n\n",
        ]
    )


@torch.no_grad()
def plain_logprobs(hf: GPT2LMHeadModel, context: list[int], continuation: list[int]) -> np.ndarray:
    """Log-probability of each token of the continuation, in float64."""
    logits = hf.double()(torch.tensor([context + continuation[:-1]])).logits[0, len(context) - 1 :]
    return logits.log_softmax(-1)[torch.arange(len(continuation)), continuation].numpy()


def loaded(folder: Path):
    model, enc = checkpoint.load_model(folder / "hf")
    return model, enc, GPT2LMHeadModel.from_pretrained(folder / "hf").eval()


def test_hellaswag_equals_a_plain_loop_over_transformers(folder):
    model, enc, hf = loaded(folder)
    metrics, lines = hellaswag.evaluate(model, enc, hellaswag.load(folder / "hellaswag.jsonl"), CPU)
    right = {metric.name: 0 for metric in metrics}
    for example, line in zip(EXAMPLES, lines):
        context = enc.encode_ordinary(example["ctx"])
        logprobs = [
            plain_logprobs(hf, context, enc.encode_ordinary(" " + e)) for e in example["endings"]
        ]
        assert line["sums"] == pytest.approx([x.sum() for x in logprobs], abs=1e-4)
        assert line["pred"] == np.argmax([x.sum() for x in logprobs])
        assert line["pred_norm"] == np.argmax([x.mean() for x in logprobs])

        context = enc.encode_ordinary("Cooking: A man  cuts bread. He".replace("  ", " "))
        endings = [
            e.replace("[title] sings  of", " sings of").replace("  ", " ")
            for e in example["endings"]
        ]
        sums = [plain_logprobs(hf, context, enc.encode_ordinary(" " + e)).sum() for e in endings]
        assert line["harness_sums"] == pytest.approx(sums, abs=1e-4)
        assert line["harness_pred_norm"] == np.argmax([s / len(e) for s, e in zip(sums, endings)])
        for name, key in (
            ("completion acc", "pred"), ("completion acc_norm", "pred_norm"),
            ("harness acc", "harness_pred"), ("harness acc_norm", "harness_pred_norm"),
        ):  # fmt: skip
            right[name] += line[key] == example["label"]
    assert {metric.name: metric.correct for metric in metrics} == right
    assert {metric.total for metric in metrics} == {12}


def test_lambada_equals_a_plain_loop_over_transformers(folder):
    model, enc, hf = loaded(folder)
    metrics, lines = lambada.evaluate(model, enc, lambada.load(folder / "lambada.jsonl"), CPU)
    sums, right, barred = [], 0, lambada.stop_tokens(enc)
    assert enc.decode(barred).split() >= ["and"]
    for passage, line in zip(PASSAGES, lines):
        context = enc.encode_ordinary(passage.rsplit(" ", 1)[0])
        word = enc.encode_ordinary(passage)[len(context) :]
        sums.append(plain_logprobs(hf, context, word).sum())
        with torch.no_grad():
            logits = hf(torch.tensor([context + word])).logits[0, len(context) - 1 : -1]
        right += logits.argmax(-1).tolist() == word
        logits[0, barred] = -torch.inf
        assert line["right_no_stop_words"] == (logits.argmax(-1).tolist() == word)
        assert line["word"] == passage.rsplit(" ", 1)[1]
    values = {metric.name: metric for metric in metrics}
    assert values["perplexity"].value == pytest.approx(math.exp(-np.mean(sums)), rel=1e-4)
    assert (values["accuracy"].correct, values["accuracy"].total) == (right, 25)
    assert values["accuracy, no stop words"].published["gpt2"] == 0.4599


def test_cbt_equals_a_plain_loop_over_transformers(folder):
    model, enc, hf = loaded(folder)
    questions = cbt.load(str(folder))
    assert [q.kind for q in questions] == ["NE"] * 6 + ["V"] * 2
    metrics, lines = cbt.evaluate(model, enc, questions, CPU)
    for question, line in list(zip(questions, lines))[5:7]:
        context = (
            " ".join(f"\"It isn't {n} o'clock,\" said Mr. Brown's dog." for n in range(1, 21))
            + ' "Oh,'
        )
        for candidate, given in zip(question.candidates, line["paper_scores"]):
            blank = "" if candidate == "'s" else " "
            whole = enc.encode_ordinary(f"{context}{blank}{candidate}!\" (said the boys' aunt).")
            ids = enc.encode_ordinary(context)
            both = (ids + whole[len(ids) :])[-257:]
            rest = whole[len(ids) :]
            assert given == pytest.approx(
                plain_logprobs(hf, both[: -len(rest)], rest).sum(), abs=1e-4
            )
        raw = f"{question.context} {question.query}"
        sequences = [
            enc.encode_ordinary(raw.replace("XXXXX", candidate))
            for candidate in question.candidates
        ]
        longest = max(map(len, sequences))
        for ids, given in zip(sequences, line["sequence_scores"]):
            ids = ids[longest - 256 :]
            assert given == pytest.approx(plain_logprobs(hf, ids[:1], ids[1:]).mean(), abs=1e-4)
    assert {m.name: m.total for m in metrics} == {
        "paper NE": 6, "paper V": 2, "paper all": 8, "sequence NE": 6, "sequence V": 2, "sequence all": 8,
    }  # fmt: skip


@pytest.mark.parametrize(
    "tokenized, text",
    [
        ("`` Oh , no ! '' cried he ; `` it is n't ! ''", '"Oh, no!" cried he; "it isn\'t!"'),
        (
            "they 'll -LRB- I 'm sure -RRB- see Mr. Brown 's hat .",
            "they'll (I'm sure) see Mr. Brown's hat.",
        ),
        ("the boys ' coats -- ` what ? '", "the boys' coats -- 'what?'"),
        ("it cost $ 5 , or 10 % : o'clock", "it cost $5, or 10%: o'clock"),
    ],
)
def test_the_tokenization_of_books_is_undone(tokenized, text):
    assert cbt.detokenize(tokenized) == text


def test_requests_are_tokenized_as_the_whole_text(shared_data):
    """The shortcut of encode_request changes nothing, whatever blanks the context has."""
    enc, _ = train_tokenizer([TEXT], 500)
    contexts = [
        line["ctx"] for line in map(json.loads, (shared_data / "hellaswag_val_2000.jsonl").open())
    ][:300]
    for context in [
        *contexts,
        "",
        "word",
        "a  b",
        "a\n b",
        " a",
        "a b  ",
        "end. ",
        "a \n",
        "it 's",
    ]:
        request = tasks.encode_request(enc, context, [" end", "x", "  two", "\n"])
        for continuation, ids in zip((" end", "x", "  two", "\n"), request.continuations):
            whole = enc.encode_ordinary(context + continuation)
            before = enc.encode_ordinary(context.rstrip())
            assert request.context == (before or [enc.eot_token])
            assert before + ids == before + whole[len(before) :]


# as commands


def run(folder: Path, script: str, *words, model="model.pt"):
    return command(script, "--model", folder / model, "--device", "cpu", *words)


def test_commands_print_tables_with_counts_and_published_figures(folder, tmp_path):
    results = tmp_path / "log" / "results.jsonl"
    words = [
        "--data",
        folder / "hellaswag.jsonl",
        "--results",
        results,
        "--save_predictions",
        tmp_path / "p.jsonl",
    ]
    out = ok(run(folder, "hellaswag.py", *words)).stdout
    assert "/12)" in out
    assert "29.55%" in out
    assert "31.14%" in out
    ok(run(folder, "hellaswag.py", *words, model="hf"))
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["total"] for line in lines] == [12, 12]
    assert lines[0]["acc"] == lines[0]["correct"] / 12
    assert lines[0] | {"model": ""} == lines[1] | {"model": ""}, (
        "a checkpoint and its export score the same"
    )
    predictions = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [line["ind"] for line in predictions] == list(range(12))
    assert {"label", "pred", "pred_norm", "sums"} <= predictions[0].keys()
    out = ok(run(folder, "lambada.py", "--data", folder / "lambada.jsonl", "--limit", 7)).stdout
    assert "/7)" in out
    assert "45.99%" in out
    out = ok(run(folder, "cbt.py", "--data", folder / "cbtest_NE_test.txt")).stdout
    assert "83.40%" in out
    assert "59.33%" in out


def test_two_processes_score_as_one(folder, tmp_path):
    words = [
        "--model",
        folder / "model.pt",
        "--data",
        folder / "hellaswag.jsonl",
        "--device",
        "cpu",
    ]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "hellaswag.py"]
    for name, start in (("one", ["hellaswag.py"]), ("two", launcher)):
        ok(
            command(
                *start,
                *words,
                "--save_predictions",
                tmp_path / name,
                "--results",
                tmp_path / "results.jsonl",
            )
        )
    assert (tmp_path / "one").read_text() == (tmp_path / "two").read_text()
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert lines[0] == lines[1]


WRONG = {
    "not JSON": ("hellaswag.py", lambda text: text.replace('"label"', "label", 1), "line 1, is not JSON"),
    "no field": ("hellaswag.py", lambda text: text.replace('"ctx_b"', '"x"', 1), "line 1, has no field 'ctx_b'"),
    "label": ("hellaswag.py", lambda text: text.replace('"label": 2', '"label": 4', 1), "line 3: the label is 4"),
    "endings": ("hellaswag.py", lambda text: text.replace(', "reads 1"', "", 1), "line 2: endings must be four"),
    "empty": ("hellaswag.py", lambda text: "\n", "holds no examples"),
    "one word": ("lambada.py", lambda text: text + '{"text": "word"}\n', "line 26: the text must have two words"),
    "a list": ("lambada.py", lambda text: "[1]\n" + text, "line 1: "),
    "no text": ("lambada.py", lambda text: '{"body": 1}\n', "line 1, has no field 'text'"),
    "candidates": ("cbt.py", lambda text: text.replace("Mary|John", "Marie|John", 1), "line 21: the answer 'Mary'"),
    "blank": ("cbt.py", lambda text: text.replace("XXXXX", "it", 1), "line 21: the query must have one XXXXX"),
    "sentence": ("cbt.py", lambda text: text.replace("\n7 ", "\n8 ", 1), "line 7: it must begin with 7"),
    "cut off": ("cbt.py", lambda text: text[:700], "the file ends after"),
    "missing query": ("cbt.py", lambda text: text.replace("\n21", "\n\n21", 1), "line 21: the question ends after 20"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_data_is_one_line_that_names_the_place(folder, tmp_path, name):
    script, spoil, expected = WRONG[name]
    source = {
        "hellaswag.py": "hellaswag.jsonl",
        "lambada.py": "lambada.jsonl",
        "cbt.py": "cbtest_NE_test.txt",
    }[script]
    (tmp_path / source).write_text(spoil((folder / source).read_text()))
    module = {"hellaswag.py": hellaswag, "lambada.py": lambada, "cbt.py": cbt}[script]
    with pytest.raises(UserError, match=source) as raised:
        module.load(str(tmp_path / source))
    assert expected in str(raised.value)


def test_what_can_not_be_had_is_one_line(folder, tmp_path, monkeypatch):
    assert "no file" in one_line(run(folder, "hellaswag.py", "--data", tmp_path / "none.jsonl"))
    assert "no checkpoint" in one_line(
        run(tmp_path, "lambada.py", "--data", folder / "lambada.jsonl")
    )
    assert "no file" in one_line(run(folder, "cbt.py", "--data", tmp_path / "none_*.txt"))
    assert "check the network" in one_line(run(folder, "cbt.py"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nothing answers there
    if not (ROOT / hellaswag.PATH).exists():
        assert "give --data FILE" in one_line(run(folder, "hellaswag.py"))


# downloads, from a server that misbehaves


class Server(BaseHTTPRequestHandler):
    content = b'{"text": "two words"}\n' * 5000

    def do_GET(self):
        if self.path == "/missing":
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content[: 50_000 if self.path == "/cut" else None])

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_download_is_whole_and_happens_once(server, tmp_path):
    sha256 = hashlib.sha256(Server.content).hexdigest()
    path = tasks.fetch(server + "/whole", tmp_path / "new" / "data.jsonl", sha256)
    assert path.read_bytes() == Server.content
    assert tasks.fetch("http://127.0.0.1:9/gone", path, sha256) == path


@pytest.mark.parametrize("page", ["/cut", "/missing", "/whole"])
def test_a_failed_download_is_an_error_and_leaves_nothing(server, tmp_path, page):
    with pytest.raises(OSError, match="give --data FILE"):
        tasks.fetch(server + page, tmp_path / "data.jsonl", "0" * 64)
    assert not list(tmp_path.iterdir())


# in training


def train(
    data_dir: Path,
    folder: Path,
    log_dir: Path,
    *words,
    start=("train_gpt2.py",),
    data="hellaswag.jsonl",
):
    flags = [
        "--data_dir",
        data_dir,
        "--log_dir",
        log_dir,
        "--hellaswag_data",
        folder / data,
        "--hellaswag_every",
        4,
    ]
    return command(*start, *SMALL_RUN, *flags, *words)


def stream(log_dir: Path, name: str) -> list[tuple[int, float]]:
    lines = [line.split() for line in (log_dir / "log.txt").read_text().splitlines()]
    return [(int(step), float(value)) for step, stream, value in lines if stream == name]


@pytest.mark.slow
def test_training_evaluates_alike_whatever_the_number_of_processes(data_dir, folder, tmp_path):
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_gpt2.py"]
    ok(train(data_dir, folder, tmp_path / "one", "--max_steps", 6))
    ok(train(data_dir, folder, tmp_path / "two", "--max_steps", 6, start=two))
    assert [step for step, _ in stream(tmp_path / "one", "hella")] == [0, 4, 6]
    assert stream(tmp_path / "one", "hella") == stream(tmp_path / "two", "hella")
    results = [
        json.loads(line)
        for line in (tmp_path / "one" / "hellaswag_results.jsonl").read_text().splitlines()
    ]
    assert [(r["step"], r["acc_norm"]) for r in results] == [
        (step, pytest.approx(value, abs=1e-6)) for step, value in stream(tmp_path / "one", "hella")
    ]
    model = [
        "--model",
        tmp_path / "one" / "model_final.pt",
        "--data",
        folder / "hellaswag.jsonl",
        "--device",
        "cpu",
    ]
    ok(command("hellaswag.py", *model, "--results", tmp_path / "after.jsonl"))
    after = json.loads((tmp_path / "after.jsonl").read_text())
    assert after["correct_norm"] == results[-1]["correct_norm"]


def test_a_resumed_run_has_every_result_once(data_dir, folder, tmp_path):
    ok(train(data_dir, folder, tmp_path, "--max_steps", 4))
    ok(train(data_dir, folder, tmp_path, "--max_steps", 10, "--resume"))
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "hellaswag_results.jsonl").read_text().splitlines()
    ]
    assert steps == [0, 4, 8, 10] == [step for step, _ in stream(tmp_path, "hella")]


def test_training_goes_on_without_the_data(data_dir, folder, tmp_path):
    result = ok(train(data_dir, folder, tmp_path, "--max_steps", 2, data="none.jsonl"))
    assert result.stdout.count("warning: training without HellaSwag") == 1
    assert not stream(tmp_path, "hella")


@pytest.mark.slow
def test_training_evaluates_under_compile(data_dir, folder, tmp_path):
    ok(train(data_dir, folder, tmp_path / "eager", "--max_steps", 2))
    ok(train(data_dir, folder, tmp_path / "compiled", "--max_steps", 2, "--compile", "on"))
    assert stream(tmp_path / "eager", "hella") == stream(tmp_path / "compiled", "hella")


# evaluate.py


def test_evaluate_is_one_table_and_computes_nothing_twice(data_dir, folder, tmp_path):
    data = [
        "--hellaswag_data",
        folder / "hellaswag.jsonl",
        "--lambada_data",
        tmp_path / "none.jsonl",
    ]
    data += [
        "--cbt_data",
        folder,
        "--val_data",
        data_dir,
        "--val_tokens",
        500,
        "--out_dir",
        tmp_path / "out",
    ]
    words = ["evaluate.py", *data, "--device", "cpu"]
    words += ["--models", folder / "model.pt", tmp_path / "none.pt", folder / "hf"]
    out = ok(command(*words)).stdout
    table = (tmp_path / "out" / "evaluation.md").read_text()
    assert table in out
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]
    ]
    cells = {
        (model.rsplit("/")[-1], title, metric): figure for model, title, metric, figure, *_ in rows
    }
    assert (
        cells["model.pt", "hellaswag", "completion acc_norm"]
        == cells["hf", "hellaswag", "completion acc_norm"]
    )
    assert cells["model.pt", "val", "bits per byte"] == cells["hf", "val", "bits per byte"]
    assert "no file" in cells["hf", "lambada", "not available"]
    assert "no file" in cells["none.pt", "cbt", "not available"]
    results = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert len(results) == 6
    again = ok(command(*words)).stdout
    assert again.count("computed before") == 6
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == results
    changed = ok(command(*words, "--limit", 3)).stdout
    assert changed.count("computed before") == 2, (
        "only the validation loss does not depend on limit"
    )
    (tmp_path / "out" / "evaluation.json").write_text("[")
    assert "evaluation.json is damaged" in one_line(command(*words))


def test_bits_per_byte_by_hand_under_either_vocabulary(data_dir, folder, tmp_path):
    """A model that gives every token the same probability: bits per byte are tokens per byte times log2 of theirs."""
    import evaluate
    from common.shards import open_shards
    from common.tokenizer import load_tokenizer

    shard = open_shards(data_dir, "val")
    tokens = shard.read(0, 0, 400)
    own = load_tokenizer(data_dir / "vocab.tiktoken")
    text = own.decode([t for t in tokens.tolist() if t != own.eot_token])
    other, _ = train_tokenizer([TEXT], 300)
    for enc, count in ((own, 400), (other, len(other.encode_ordinary(text)) + 1)):
        model = GPT(GPTConfig(vocab_size=enc.n_vocab, n_layer=1, n_head=1, n_embd=8, block_size=32))
        torch.nn.init.zeros_(model.wte.weight)
        config = evaluate.Config(val_data=str(data_dir), val_tokens=399, device="cpu")
        loss, bits = evaluate.validation(model, enc, config, CPU)
        assert loss.value == pytest.approx(math.log(enc.n_vocab), abs=1e-5)
        assert bits.value == pytest.approx(
            (count - 1) * math.log2(enc.n_vocab) / len(text.encode()), rel=1e-5
        )
