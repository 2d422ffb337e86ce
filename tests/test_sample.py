"""Sampling and exporting, as a user does after training."""

import fcntl
import io
import os
import select
import signal
import subprocess
import sys
import termios
import time

import pytest
import torch
from conftest import ROOT, SMALL_RUN, command, ok

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
    console.run_script(module.main, console.parse_flags(module.Config, module.__doc__))


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
    sample.stream_to_screen(gpt, enc, "A ", [1], sample.Config(), seed=1)
    assert capsys.readouterr().out == "A naïve → 日本\n"


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
    """A byte-order mark is no part of a prompt, and only newlines end one."""
    prompts = ["import\u2028os", "a\fb", "last"]
    file = tmp_path / "prompts.txt"
    file.write_bytes("\n".join(prompts).encode("utf-8-sig"))
    run(sample, "--model", model, "--prompt_file", file, "--num_samples", 1, "--max_tokens", 5)
    samples = capsys.readouterr().out.split(DASHES)[:-1]
    assert all(text.startswith(start) for start, text in zip(prompts, samples, strict=True))


def greedy_from_scratch(path, prompt: str, n: int) -> str:
    """Greedy text, each token from a pass over the last 33 to 64 tokens: a context of 64."""
    gpt, enc = load_model(path)
    ids = enc.encode_ordinary(prompt)
    num_prompt = len(ids)
    while len(ids) < num_prompt + n:
        start = max(0, -(-(len(ids) - 64) // 32) * 32)
        with torch.no_grad():
            ids.append(int(gpt.eval()(torch.tensor([ids[start:]]))[0, -1].argmax()))
    return prompt + enc.decode(ids[num_prompt:])


@pytest.mark.parametrize("how", [[], ["--stream"]])
def test_samples_are_longer_than_the_context(model, tmp_path, capsys, how):
    prompts = ["import", "x = 1; " * 40]  # the second is longer by itself
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    flags = ("--num_samples", 1, "--temperature", 0, "--max_tokens", 150, "--dtype", "float32")
    out = tmp_path / "out.txt"
    run(
        *(sample, "--model", model, "--prompt_file", tmp_path / "prompts.txt"),
        *(*flags, "--out", out, *how),
    )
    expected = [greedy_from_scratch(model, prompt, 150) for prompt in prompts]
    assert out.read_text() == "".join(f"{text}\n{DASHES}" for text in expected)
    assert "longer than the context of 64: the model sees its last" in capsys.readouterr().out


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
        (["--interactive", "--prompt_file", "-"], "leave out prompt_file"),
        (["--interactive", "--out", "out.txt"], "leave out prompt_file and out"),
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


# Interactive


def answers(model, monkeypatch, capsys, *lines, **config) -> str:
    """What --interactive prints if these lines come through a pipe."""
    gpt, enc = load_model(model)
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    sample.interact(gpt.eval(), enc, sample.Config(interactive=True, **config))
    return capsys.readouterr().out


def test_each_line_is_a_prompt(model, monkeypatch, capsys):
    """Without a terminal nothing else is printed, and an empty line or the end of the pipe ends."""
    for end in ([], ["", "never read"]):
        out = answers(
            *(model, monkeypatch, capsys, "import", "<|endoftext|>def main(", *end),
            temperature=0,
            max_tokens=20,
        )
        first = greedy(model, "import", 20)
        gpt, enc = load_model(model)
        ids = [enc.eot_token, *enc.encode_ordinary("def main(")]
        (second,) = gpt.eval().generate([ids], 20, stop_token=enc.eot_token, temperature=0)
        assert out == f"{first}\ndef main({enc.decode(second)}\n"


def test_settings_change_between_prompts(model, monkeypatch, capsys):
    lines = ["/temperature 0", "/max_tokens 7", "/top_k none", "/top_p 0.5", "import"]
    out = answers(model, monkeypatch, capsys, *lines).splitlines()
    assert out[3] == "/temperature 0.0   /top_k None   /top_p 0.5   /max_tokens 7   /seed 42"
    assert "\n".join(out[4:]) == greedy(model, "import", 7)


def test_wrong_settings_change_nothing(model, monkeypatch, capsys):
    lines = ["/temperature -1", "/top_k many", "/temperature none", "/top_p 2"]
    lines += [f"/seed {2**64}", "/volume 11", "/"]
    out = answers(model, monkeypatch, capsys, *lines).splitlines()
    assert out[0] == "temperature is unchanged: temperature is -1.0, must be a number from 0 on"
    names = ("temperature", "top_k", "temperature", "top_p", "seed")
    assert [line.split(":")[0] for line in out[:5]] == [f"{name} is unchanged" for name in names]
    settings = "/temperature 1.0   /top_k 50   /top_p None   /max_tokens 100   /seed 42"
    assert out[5:] == ["there is no setting 'volume'", settings, settings]


def test_each_text_has_a_seed_of_its_own(model, monkeypatch, capsys):
    lines = ("import", "import", "/seed 42", "import")
    several = answers(model, monkeypatch, capsys, *lines)
    first, second = (answers(model, monkeypatch, capsys, "import", seed=seed) for seed in (42, 43))
    settings = sample.describe_settings(sample.Config())
    assert first != second
    assert several == f"{first}{second}{settings}\n{first}"


def test_ctrl_c_stops_the_text_but_not_the_program(model):
    """In a terminal: also while a prompt is typed. Ctrl-D ends the program."""
    words = ["sample.py", "--model", model, "--interactive", "--max_tokens", 10**9, "--seed", 1]
    terminal, inside = os.openpty()

    def start_in_terminal():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        # A shell that runs the tests in the background makes them ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        stdin=inside,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
        preexec_fn=start_in_terminal,
    )
    os.close(inside)
    screen = ""

    def wait_for(text: str):
        nonlocal screen
        deadline = time.monotonic() + 60
        while text not in screen:
            assert time.monotonic() < deadline and process.poll() is None, screen
            if select.select([terminal], [], [], 1)[0]:
                screen += os.read(terminal, 4096).decode("utf-8", "replace")
        screen = screen.split(text, 1)[1]

    try:
        wait_for("/seed 1")
        wait_for("> ")
        # Python loses a Ctrl-C between the display of the prompt and its wait for a key.
        time.sleep(0.3)
        os.write(terminal, b"a half-typed pro\x03")
        wait_for("(stopped")
        wait_for("> ")
        os.write(terminal, b"import\n")
        wait_for("import")
        time.sleep(0.3)  # the text has no end
        os.write(terminal, b"\x03")
        wait_for("(stopped")
        wait_for("> ")
        os.write(terminal, b"/max_tokens 3\n")
        wait_for("/max_tokens 3   /seed 2")
        wait_for("> ")
        os.write(terminal, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        os.close(terminal)
