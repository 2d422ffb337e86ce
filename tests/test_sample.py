"""Sampling and exporting, as a user does after training."""

import sys

import pytest
import torch
from conftest import SMALL_RUN, command, ok

import export
import sample
from common import checkpoint, console
from common.checkpoint import load_model

DASHES = "-" * 80 + "\n"


@pytest.fixture(scope="module")
def model(data_dir, tmp_path_factory):
    log_dir = tmp_path_factory.mktemp("run") / "log"
    words = [
        "train_gpt2.py",
        "--data_dir",
        data_dir,
        "--log_dir",
        log_dir,
        *SMALL_RUN,
        "--max_steps",
        40,
    ]
    ok(command(*words))
    return log_dir / "model_final.pt"


def run(module, *flags):
    sys.argv = [module.__name__, *map(str, flags)]
    console.cli(module.Config, module.main, module.__doc__)


def greedy(model, prompt: str, n: int) -> str:
    gpt, enc = load_model(model)
    (output,) = gpt.eval().generate(
        [enc.encode_ordinary(prompt)], n, stop_token=enc.eot_token, temperature=0
    )
    return prompt + enc.decode(output)


@pytest.mark.parametrize("how", [[], ["--stream"], ["--batch_size", "2"]])
def test_samples_of_several_prompts(model, tmp_path, capsys, how):
    prompts = ["import", "def main(", "The shards of a"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n\n")
    flags = [
        "--prompt_file",
        tmp_path / "prompts.txt",
        "--num_samples",
        1,
        "--temperature",
        0,
        "--max_tokens",
        20,
    ]
    run(sample, "--model", model, *flags, "--dtype", "float32", "--out", tmp_path / "out.txt", *how)
    expected = "".join(f"{greedy(model, prompt, 20)}\n{DASHES}" for prompt in prompts)
    assert (tmp_path / "out.txt").read_text() == expected
    assert expected in capsys.readouterr().out


def test_a_seed_gives_the_same_samples_and_another_others(model, capsys):
    texts = []
    for seed in (1, 1, 2):
        run(sample, "--model", model, "--seed", seed, "--num_samples", 2, "--max_tokens", 30)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    first, second, _ = texts[0].split(DASHES)
    assert first != second


@pytest.mark.parametrize("how", [["--batch_size", 1], ["--stream"]])
def test_neighbouring_seeds_share_no_samples(model, capsys, how):
    texts = []
    for seed in (1, 2):
        run(sample, "--model", model, "--seed", seed, "--num_samples", 3, "--max_tokens", 30, *how)
        texts += capsys.readouterr().out.split(DASHES)[:3]
    assert len(set(texts)) == 6


def test_an_export_samples_like_its_checkpoint(model, tmp_path, capsys):
    run(export, "--model", model, "--out", tmp_path / "hf")
    assert greedy(tmp_path / "hf", "def main(", 30) == greedy(model, "def main(", 30)


def test_characters_of_several_bytes_are_streamed_whole(model, capsys, monkeypatch):
    gpt, enc = load_model(model)
    tokens = enc.encode_ordinary("naïve → 日本")
    assert any(len(enc.decode_single_token_bytes(t)) < len("日".encode()) for t in tokens)
    monkeypatch.setattr(type(gpt), "stream", lambda *_, **__: iter([[t] for t in tokens]))
    sample.stream_to_screen(gpt, enc, "A ", [1], len(tokens), {})
    assert capsys.readouterr().out == f"A naïve → 日本\n{DASHES}"


def test_unconditional_samples(model, capsys):
    """Without a prompt, generation starts from the token that separates documents."""
    texts = []
    flags = ("--temperature", 0, "--num_samples", 1, "--max_tokens", 20, "--dtype", "float32")
    for prompt in ("", "<|endoftext|>"):
        run(sample, "--model", model, "--prompt", prompt, *flags)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    gpt, enc = load_model(model)
    (output,) = gpt.eval().generate([[enc.eot_token]], 20, stop_token=enc.eot_token, temperature=0)
    assert texts[0] == f"{enc.decode(output)}\n{DASHES}"


def test_a_prompt_file_has_one_prompt_per_line(model, tmp_path, capsys):
    """A byte-order mark is no part of a prompt; only newlines end one; long prompts are skipped."""
    prompts = ["import\u2028os", "a\fb", "x = 1; " * 40, "last"]
    file = tmp_path / "prompts.txt"
    file.write_bytes("\n".join(prompts).encode("utf-8-sig"))
    flags = ("--prompt_file", file, "--num_samples", 1, "--max_tokens", 5)
    with pytest.raises(SystemExit):
        run(sample, "--model", model, *flags)
    captured = capsys.readouterr()
    samples = captured.out.split(DASHES)[:-1]
    assert "skipped: a prompt of" in samples[0]
    starts = [prompts[0], prompts[1], prompts[3]]
    assert all(start in text for start, text in zip(starts, samples, strict=True))
    assert "1 prompts were too long" in captured.err


def test_prompts_from_standard_input(model):
    flags = ("--prompt_file", "-", "--num_samples", 1, "--max_tokens", 5)
    result = ok(command("sample.py", "--model", model, *flags, input="one\ntwo\n"))
    assert [text[:3] for text in result.stdout.split(DASHES)[:2]] == ["one", "two"]


def test_tiny_temperatures_are_greedy(model, capsys):
    texts = []
    for temperature in ("0", "1e-42"):
        flags = ("--temperature", temperature, "--num_samples", 1, "--max_tokens", 20)
        run(sample, "--model", model, *flags)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_a_model_with_nan_generates_nothing(model, tmp_path, capsys):
    broken = checkpoint.load(model)
    broken["model"]["h.1.mlp.c_fc.weight"][3, 4] = torch.nan
    checkpoint.save(tmp_path / "broken.pt", broken)
    with pytest.raises(SystemExit):
        run(sample, "--model", tmp_path / "broken.pt", "--prompt", "x", "--max_tokens", 5)
    error = capsys.readouterr().err
    assert f"{tmp_path}/broken.pt is broken: its tensor h.1.mlp.c_fc.weight" in error


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--temperature", "nan"], "temperature is nan"),
        (["--seed", "-1"], "seed is -1"),
        (["--prompt", "x = 1; " * 40], "do not fit the context of 64"),
        (["--max_tokens", "64"], "do not fit the context of 64"),
        (["--prompt_file", "no_such_file"], "no file no_such_file"),
        (["--model", "no_such_model"], "no model 'no_such_model'"),
        (["--model", "no_such.pt"], "no checkpoint no_such.pt"),
        (["--temperature", "-1"], "must be a number from 0 on"),
        (["--top_p", "1.5"], "top_p"),
        (["--top_k", "0"], "top_k"),
        (["--out", "/no/such/folder/out.txt", "--max_tokens", "1"], "/no/such/folder"),
    ],
)
def test_wrong_inputs_end_in_one_line(model, capsys, flags, expected):
    with pytest.raises(SystemExit) as stopped:
        run(sample, "--model", model, *flags)
    assert stopped.value.code in (1, 2)
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert expected in errors[0]
