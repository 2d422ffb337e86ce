"""The studies as a person runs them, in miniature; their definitions by hand; what they claim against the papers."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT, SMALL_RUN, TEXTS, command, ok, one_line

from common.console import UserError
from common.runtime import Runtime
from common.shards import shards_tokenizer
from common.tokenizer import load_tokenizer, train_tokenizer
from experiments import (
    fragmentation,
    head_study,
    norm_study,
    optimizer_study,
    sweep,
    tokenizer_study,
)
from model import GPT, GPTConfig

CPU = Runtime(torch.device("cpu"), torch.float32)
TINY = "--n_layer 2 --n_head 2 --n_embd 32 --device cpu --dtype float32".split()


# Pre-LN against Post-LN


def last_gradients(norm: str, depths: list[int]) -> list[float]:
    """Gradient norm of the last layer at Xavier's initialization, by depth: means over eight models and texts."""
    norms = []
    for depth in depths:
        found = []
        for seed in range(8):
            torch.manual_seed(seed)
            model = GPT(
                GPTConfig(
                    block_size=32, vocab_size=500, n_layer=depth, n_head=2, n_embd=64, norm=norm
                )
            )
            norm_study.init_xavier(model)
            idx = torch.randint(500, (4, 33))
            found.append(norm_study.layer_gradients(model, idx[:, :-1], idx[:, 1:], CPU)[-1])
        norms.append(np.mean(found))
    return norms


def test_gradients_at_initialization_are_those_of_xiong_et_al():
    """Theorem 1: near the output they do not depend on the depth with Post-LN, and fall as its root with Pre-LN."""
    depths = [2, 8, 32]
    post, pre = last_gradients("post", depths), last_gradients("pre", depths)
    assert max(post) / min(post) < 1.2
    slope = np.polyfit(np.log(depths), np.log(pre), 1)[0]
    assert -0.75 < slope < -0.4
    assert post[-1] > 2.5 * pre[-1]


def test_layer_gradients_are_those_of_backward():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=3, n_head=2, n_embd=32))
    idx = torch.randint(50, (2, 17))
    found = norm_study.layer_gradients(model, idx[:, :-1], idx[:, 1:], CPU)
    torch.nn.functional.cross_entropy(
        model(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten()
    ).backward()
    expected = [float(block.mlp.c_proj.weight.grad.norm()) for block in model.h]
    assert found == pytest.approx(expected, rel=1e-4)


def test_pictures_of_any_number_of_measurements(norm_folder):
    """Shades of grey from light to black, which rounding must not push below zero."""
    out, _, _ = norm_folder
    results = json.loads((out / "results.json").read_text())
    config = norm_study.Config(
        learning_rates=(1e-3,), warmups=(4,), seeds=(1,), n_layer=2, T=32, out_dir=str(out)
    )
    for count in (1, 3, 6, 12, 48):
        for norm in ("pre", "post"):
            results[norm_study.run_name(norm, 1e-3, 4, 1)]["gradients"] = [
                (n, [1.0, 2.0]) for n in range(1, count + 1)
            ]
        drawn = sweep.Results.__new__(sweep.Results)
        drawn.update(results)
        drawn.save_picture = lambda name, figure: None
        norm_study.draw_gradients(config, drawn)


def test_spikes_by_hand():
    calm = [3.0 + 0.01 * (n % 3) for n in range(60)]
    assert norm_study.find_spikes(calm) == []
    one = calm.copy()
    one[30:33] = [4.0, 5.0, 3.5]  # one spike of three steps, the median before it is 3.01
    one[50] = 3.4
    assert norm_study.find_spikes(one) == pytest.approx([1.99, 0.39], abs=0.02)
    small = calm.copy()
    small[40] = 3.19  # many deviations, but below 0.2 nats
    assert norm_study.find_spikes(small) == []
    assert norm_study.find_spikes([10.0 - 0.1 * n for n in range(60)]) == []


def test_survival_by_hand():
    good, stuck, diverged = dict(val=6.5), dict(val=6.65), dict(val=None)
    assert norm_study.survived([good, good], unigram=6.6)
    assert not norm_study.survived([good, stuck], unigram=6.6)
    assert not norm_study.survived([good, diverged], unigram=6.6)


def test_unigram_loss_by_hand(tmp_path):
    np.save(tmp_path / "x_train_0.npy", np.array([0, 0, 0, 1, 2], dtype=np.uint16))
    np.save(tmp_path / "x_val_0.npy", np.array([0, 2, 3, 3], dtype=np.uint16))
    config = norm_study.Config(data_dir=str(tmp_path), val_tokens=3)
    expected = (
        -(math.log(4 / 9) + math.log(2 / 9) + math.log(1 / 9)) / 3
    )  # of nine counts, one added to each of four
    assert norm_study.unigram_loss(config, vocab_size=4) == pytest.approx(expected)


NORM_RUN = [
    *TINY,
    *"--B 4 --T 32 --total_batch_size 128 --max_steps 12 --gradients_every 6 --val_tokens 1000".split(),
]
NORM_RUN += "--warmups 4 --depths 2 4 --seeds 1 --num_parallel 2".split()


@pytest.fixture(scope="module")
def norm_folder(data_dir, tmp_path_factory):
    """A study in which one learning rate learns and one destroys."""
    out = tmp_path_factory.mktemp("norm") / "study"
    words = ["-m", "experiments.norm_study", "--data_dir", data_dir, "--out_dir", out, *NORM_RUN]
    return out, words, ok(command(*words, "--learning_rates", "1e-3", "1e30"))


def test_norm_study_reports_curves_gradients_and_divergence(norm_folder):
    out, _, result = norm_folder
    results = json.loads((out / "results.json").read_text())
    fine, broken = results["pre_lr_0.001_warmup_4_seed_1"], results["pre_lr_1e+30_warmup_4_seed_1"]
    assert fine["diverged"] is None
    assert fine["val"] == pytest.approx(
        float((out / "runs/pre_lr_0.001_warmup_4_seed_1/log.txt").read_text().split()[-1])
    )
    assert [step for step, _ in fine["gradients"]] == [6, 12]
    assert all(len(norms) == 2 for _, norms in fine["gradients"])
    assert broken["diverged"] >= 1
    assert broken["val"] is None
    report = (out / "report.md").read_text()
    assert "| pre, warmup 4  | 1e+30         | none finite     | 1 of 1   |" in report
    assert report in result.stdout
    for name in ("loss_curves", "learning_rates", "gradients_at_init", "gradients_in_training"):
        assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(out.rglob("*.pt"))
    assert not list(out.rglob("*.tmp"))


@pytest.mark.slow
def test_a_finished_study_is_not_done_again_and_a_larger_grid_goes_on(norm_folder):
    out, words, _ = norm_folder
    before = {path: path.stat().st_mtime for path in out.rglob("log.txt")}
    ok(command(*words, "--learning_rates", "1e-3", "2e-3", "1e30"))
    assert all(path.stat().st_mtime == time for path, time in before.items())
    assert len(list(out.rglob("log.txt"))) == len(before) + 2


def test_other_settings_are_refused(norm_folder):
    _, words, _ = norm_folder
    error = one_line(command(*words, "--max_steps", 13))
    assert "holds a study with max_steps=12, not 13: choose another --out_dir" in error


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_stopped_study_takes_its_runs_along_and_goes_on(data_dir, tmp_path, number):
    words = [
        "-m",
        "experiments.norm_study",
        "--data_dir",
        data_dir,
        "--out_dir",
        tmp_path,
        *NORM_RUN,
        "--learning_rates",
        "1e-3",
    ]
    words += ["--max_steps", "100000"]
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 - a shell in the background ignores it
    words = list(map(str, words))
    process = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=heed
    )
    try:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.rglob("log.txt"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert "is in use by a study" in one_line(command(*words))
        process.send_signal(number)
        assert "error: interrupted" in process.communicate(timeout=60)[1]
        assert process.returncode == 130
    finally:
        subprocess.run(
            ["pkill", "-KILL", "-f", str(tmp_path)]
        )  # its runs, if the study left them behind
    outputs = [path.read_text() for path in tmp_path.rglob("output.txt")]
    assert len(outputs) == 2
    assert all("stopped: saved" in output for output in outputs)


@pytest.mark.slow
def test_what_was_trained_but_not_yet_read_is_not_trained_again(norm_folder):
    out, words, _ = norm_folder
    path = out / "results.json"
    results = json.loads(path.read_text())
    del results["post_lr_0.001_warmup_4_seed_1"]
    path.write_text(json.dumps(results))
    folder = out / "runs" / "post_lr_0.001_warmup_4_seed_1"
    shutil.rmtree(folder)
    command_line = (
        (out / "runs" / "pre_lr_0.001_warmup_4_seed_1" / "output.txt").read_text().splitlines()[0]
    )
    run = (
        command_line.replace("$ ", "")
        .replace("--norm pre", "--norm post")
        .replace("/pre_lr", "/post_lr")
        .split()[1:]
    )
    ok(command(*run))
    before = (folder / "log.txt").stat().st_mtime
    ok(command(*words, "--learning_rates", "1e-3"))
    assert (folder / "log.txt").stat().st_mtime == before
    again = json.loads(path.read_text())["post_lr_0.001_warmup_4_seed_1"]
    assert [step for step, _ in again["gradients"]] == [6, 12]
    assert not list(out.rglob("*.pt"))


def test_a_failing_run_ends_the_study_with_its_own_error(data_dir, tmp_path):
    words = [
        "-m",
        "experiments.norm_study",
        "--data_dir",
        data_dir,
        "--out_dir",
        tmp_path,
        *NORM_RUN,
        "--total_batch_size",
        100,
    ]
    error = one_line(command(*words))
    assert "total_batch_size 100 is not divisible by" in error
    assert "output.txt" in error


def test_files_of_a_stopped_study_are_not_taken_for_those_of_another(tmp_path):
    """The settings are known from the beginning, not from the first result on."""
    sweep.Results(tmp_path, dict(T=64)).lock.close()
    with pytest.raises(UserError, match="holds a study with T=64, not 128"):
        sweep.Results(tmp_path, dict(T=128))


# Redundant heads


@pytest.fixture(scope="module")
def model_file(data_dir, tmp_path_factory) -> Path:
    """A model that has learned a little, on the tokenizer of the shards."""
    folder = tmp_path_factory.mktemp("model")
    words = ["--n_head", 4, "--max_steps", 30, "--data_dir", data_dir, "--log_dir", folder]
    ok(command("train_gpt2.py", *SMALL_RUN, *words))
    return folder / "model_final.pt"


HEAD_RUN = "--B 4 --num_sequences 4 --shares 0.25 0.5 --random_orders 2 --val_tokens 1500 --device cpu".split()


def test_head_study(data_dir, model_file, tmp_path):
    examples = [
        dict(ind=n, activity_label="Reading", ctx_a="A file is", ctx_b="read", ctx=f"A file is read {n}", label=n % 4,
             endings=["line by line.", "at once.", "never.", "and then closed."])
        for n in range(6)
    ]  # fmt: skip
    (tmp_path / "hellaswag.jsonl").write_text(
        "".join(json.dumps(example) + "\n" for example in examples)
    )
    words = [
        "-m",
        "experiments.head_study",
        "--model",
        model_file,
        "--data_dir",
        data_dir,
        "--out_dir",
        tmp_path / "study",
        *HEAD_RUN,
    ]
    words += ["--hellaswag_data", tmp_path / "hellaswag.jsonl"]
    output = ok(command(*words)).stdout
    path = tmp_path / "study" / "results.json"
    results = json.loads(path.read_text())
    assert np.diag(np.load(tmp_path / "study" / "similarity.npy")) == pytest.approx(
        [1] * 8, abs=1e-5
    )
    assert (
        len(results) == 3 + 1 + 2 * 4
    )  # settings, importance, speed; the whole model; shares and orders
    whole, half = results["whole model"], results["importance 0.5"]
    evaluate = [
        "evaluate.py",
        "--models",
        model_file,
        "--benchmarks",
        "val",
        "--val_data",
        data_dir,
    ]
    evaluate += ["--val_tokens", 1500, "--out_dir", tmp_path / "evaluation", "--device", "cpu"]
    ok(command(*evaluate))
    evaluation = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert whole["loss"] == pytest.approx(evaluation[0]["metrics"][0]["value"], abs=1e-6)
    assert sum(half["heads"]) == 4
    assert whole["parameters"] - half["parameters"] == 4 * (3 * (32 * 8 + 8) + 8 * 32)
    assert 0 <= half["hellaswag"] <= 1
    assert "largest share that costs less than 5% of perplexity" in output
    for name in ("patterns", "similarity_by_layer", "similarity", "pruning"):
        assert (tmp_path / "study" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"

    # what is missing is done again, and nothing else
    results["random 1 0.5"]["loss"] = "known"
    del results["redundancy 0.25"]
    path.write_text(json.dumps(results))
    ok(command(*words))
    again = json.loads(path.read_text())
    assert again["random 1 0.5"]["loss"] == "known"
    assert again["redundancy 0.25"]["perplexity"] > 1
    path.write_text("{")
    assert "results.json is damaged" in one_line(command(*words))


def test_head_study_refuses(data_dir, model_file, tmp_path):
    words = [
        "--data_dir",
        data_dir,
        "--out_dir",
        tmp_path / "study",
        *HEAD_RUN,
        "--hellaswag_limit",
        0,
    ]
    with pytest.raises(OSError, match="no checkpoint"):
        here(head_study, *words, "--model", tmp_path / "model.pt")
    words += ["--model", model_file]
    with pytest.raises(UserError, match="leaves layers of .* without a head"):
        here(head_study, *words, "--shares", 0.9)
    with pytest.raises(UserError, match="are not one"):
        here(head_study, *words, "--shares", 0.01)
    with pytest.raises(UserError, match="lower T"):
        here(
            head_study, *words, "--data_dir", shards_of(np.zeros(50), tmp_path / "short", data_dir)
        )
    with pytest.raises(UserError, match="shares must"):
        head_study.Config(shares=(1.5,))


def shards_of(tokens: np.ndarray, folder: Path, like: Path) -> Path:
    """Shards of the same tokens for both splits, with the tokenizer of other ones."""
    folder.mkdir()
    for split in ("train", "val"):
        np.save(folder / f"x_{split}_0.npy", tokens.astype(np.uint16))
    manifest = json.loads((like / "manifest.json").read_text())
    shards = [dict(name=f"x_{split}_0.npy", tokens=len(tokens)) for split in ("train", "val")]
    (folder / "manifest.json").write_text(json.dumps(manifest | dict(shards=shards)))
    (folder / manifest["tokenizer"]).write_text((like / manifest["tokenizer"]).read_text())
    return folder


def here(module, *words):
    """A study in this process: no seconds spent on starting another."""
    module.main(tyro.cli(module.Config, args=[str(word) for word in words]))


# AdamW against Muon


def test_what_muon_needs_by_hand():
    shares = [0.25, 0.5, 1.0]
    assert (
        optimizer_study.needed_share(shares, [3.0, 2.0, 1.0], 2.5) == "0.35"
    )  # halfway between 1/4 and 1/2, as powers
    assert optimizer_study.needed_share(shares, [3.0, 2.0, 1.0], 2.0) == "0.50"
    assert optimizer_study.needed_share(shares, [3.0, 2.0, 1.0], 3.5) == "at most 0.25"
    assert optimizer_study.needed_share(shares, [3.0, 2.0, 1.0], 0.5) == "more than 1.00"


def test_optimizer_study(data_dir, tmp_path):
    words = [
        "-m",
        "experiments.optimizer_study",
        "--data_dir",
        data_dir,
        "--out_dir",
        tmp_path,
        *TINY,
        "--learning_rates",
        "1e-3",
    ]
    words += "--seeds 1 --shares 0.5 --B 4 --T 32 --total_batch_size 128 --max_steps 12 --warmup_steps 4".split()
    words += "--val_every 6 --val_tokens 1000 --num_parallel 2".split()
    output = ok(command(*words)).stdout
    results = json.loads((tmp_path / "results.json").read_text())
    half = results["muon_lr_0.001_share_0.5_seed_1"]
    assert half["steps"] == [0, 6]
    settings = json.loads(
        (tmp_path / "runs" / "muon_lr_0.001_share_0.5_seed_1" / "config.json").read_text()
    )["constants"]
    assert (settings["optimizer"], settings["max_steps"], settings["warmup_steps"]) == (
        "muon",
        6,
        2,
    )
    assert results["adamw_lr_0.001_share_1_seed_1"]["steps"] == [0, 6, 12]
    assert half["val"] == half["vals"][-1]
    assert (tmp_path / "report.md").read_text() in output
    assert "muon's best learning rate is at the end of the grid: widen it" in output
    assert (tmp_path / "optimizers.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(tmp_path.rglob("*.pt"))


# Vocabulary size


def test_smaller_vocabularies_are_the_beginnings_of_larger_ones():
    texts = list(TEXTS)
    large, small = train_tokenizer(texts, 1500)[0], train_tokenizer(texts, 700)[0]
    first = {token: rank for token, rank in large._mergeable_ranks.items() if rank < 699}
    assert small._mergeable_ranks == first


def test_terms_by_hand():
    text = 'The os.path module (see utf8 and file_name, or camelCase) is a well-known "abstraction-layer"; the modules'
    more = "the Implementations. The other see, e.g. U.S. McDonald in the 1990s"
    known = fragmentation.count_words(
        ["module see see-see, see! and the other", "other: other, other"]
    )
    assert known == dict(module=1, see=4, other=4, the=1) | {"and": 1}
    words, terms = fragmentation.find_terms([text, more], known, count=100)
    assert set(terms["code-like"]) == {"os.path", "utf8", "file_name", "camelCase"}
    assert set(terms["compound"]) == {"well-known", "abstraction-layer"}
    assert terms["long"] == ["Implementations"]
    assert set(terms["rare"]) == {"module", "modules", "McDonald"}
    assert (words["see"], words["the"], words["The"]) == (2, 3, 2)


TOKENIZER_RUN = [*TINY, *"--context_bytes 64 --sequences 4 --B 4 --max_steps 12 --seeds 1".split()]
TOKENIZER_RUN += "--vocab_sizes 300 600 --num_parallel 2".split()


def test_tokenizer_study(tmp_path):
    text = "\n".join(TEXTS) + "Ünïcödé " * 50
    (tmp_path / "text.txt").write_text(text)
    out = tmp_path / "study"
    words = [
        "-m",
        "experiments.tokenizer_study",
        "--source",
        "text",
        "--data_files",
        tmp_path / "text.txt",
        "--out_dir",
        out,
    ]
    words += TOKENIZER_RUN
    output = ok(command(*words)).stdout
    results = json.loads((out / "results.json").read_text())
    size = len(text.encode())
    assert results["text"] == dict(tokens=size + 1, documents=1)

    # what is held out lies before the training text of every vocabulary, and none has seen it
    config = tokenizer_study.Config(source="text", out_dir=str(out), vocab_sizes=(300, 600))
    names = [path.name for path in (out / "shards").iterdir() if path.is_dir()]
    (held_out,) = tokenizer_study.held_out(config, out, names)
    assert text.startswith(held_out)
    assert 0.05 * size < len(held_out.encode()) <= 0.1 * size
    learned_from = "".join(tokenizer_study.training_texts(config, out / "text", "reading"))
    assert text.endswith(learned_from)
    assert len(held_out) + len(learned_from) <= len(text)

    for name in ("300", "600"):
        found, enc = results[f"vocabulary {name}"], load_tokenizer(out / f"vocab_{name}.tiktoken")
        tokens = len(enc.encode_ordinary(text))
        assert found["vocab_size"] == enc.n_vocab == int(name)
        assert results[f"shards/{name}"]["tokens"] == tokens + 1
        assert found["T"] == round(64 * (tokens + 1) / size)  # all models read as many bytes
        assert found["bytes_per_token"] == pytest.approx(
            len(held_out.encode()) / len(enc.encode_ordinary(held_out)), rel=1e-9
        )
        settings = json.loads((out / "runs" / f"{name}_seed_1" / "config.json").read_text())[
            "constants"
        ]
        assert settings["total_batch_size"] == 4 * found["T"]
        assert 1 < results[f"{name} seed 1"]["bits_per_byte"] < 8
    assert (
        results["vocabulary 600"]["tokens_per_word"] < results["vocabulary 300"]["tokens_per_word"]
    )
    assert (out / "tradeoff.png").read_bytes()[:4] == b"\x89PNG"
    assert (out / "report.md").read_text() in output + "\n"
    before = {path: path.stat().st_mtime for path in out.rglob("*.npy")}
    ok(command(*words))
    assert all(path.stat().st_mtime == time for path, time in before.items())


def test_bits_per_byte_by_hand(data_dir, tmp_path):
    """A model that has learned nothing gives every token the same probability."""
    enc = shards_tokenizer(data_dir)
    texts = ["import os\n", "and Ünïcode"]
    model = GPT(GPTConfig(block_size=8, vocab_size=enc.n_vocab, n_layer=1, n_head=1, n_embd=8))
    with torch.no_grad():
        model.wte.weight.zero_()
    count = (
        sum(1 + len(enc.encode_ordinary(text)) for text in texts) - 1
    )  # all but the first end-of-text token
    expected = count * math.log2(enc.n_vocab) / sum(len(text.encode()) for text in texts)
    assert tokenizer_study.bits_per_byte(model, enc, texts, 4, 8, CPU)[1] == pytest.approx(
        expected, rel=1e-5
    )


def test_tokenizer_study_refuses(tmp_path):
    (tmp_path / "text.txt").write_text("too little text " * 40)
    words = [
        "-m",
        "experiments.tokenizer_study",
        "--source",
        "text",
        "--data_files",
        tmp_path / "text.txt",
        *TOKENIZER_RUN,
    ]
    words += ["--out_dir", tmp_path / "study"]
    assert "the texts give only" in one_line(command(*words))
    with pytest.raises(UserError, match="sequences 4 is not divisible by B 3"):
        tokenizer_study.Config(sequences=4, B=3)
    missing = [*words[:5], tmp_path / "no.txt", *words[6:-1], tmp_path / "other"]
    assert "no file matches" in one_line(command(*missing))
