"""The names of all flags.

Users have them in their scripts, so adding, renaming or removing a flag is a decision: change it
here too, and mention it in the pull request.
"""

import dataclasses
import importlib
import subprocess
import sys

import pytest
from conftest import ROOT

import sample
from common import console

FLAGS = {
    "fineweb": """
        source subset repo max_tokens data_files text_column out_dir shard_size tokenizer
        train_tokenizer train_tokenizer_chars num_workers
    """,
    "train_gpt2": """
        data_dir log_dir
        B T total_batch_size max_steps num_epochs
        optimizer muon_momentum embedding_lr_scale position_lr_scale
        warmup_steps max_lr lr_decay min_lr weight_decay
        beta1 beta2 eps grad_clip shard_optimizer
        n_layer n_head n_embd block_size padded_vocab_size norm dropout activation_checkpointing
        unigram_init init_from resume seed device dtype compile timeout deterministic
        val_every val_tokens hellaswag_every hellaswag_data core_every core_data
        sample_every sample_prompt checkpoint_every rolling_every tracker
    """,
    "hellaswag": "model data limit device dtype save_predictions results",
    "lambada": "model data limit device dtype save_predictions",
    "cbt": "model data limit device dtype save_predictions",
    "dclm_core": "model data limit device dtype save_predictions plot",
    "evaluate": """
        models benchmarks hellaswag_data lambada_data cbt_data core_data val_data val_tokens limit B
        out_dir device dtype
    """,
    "generate_finetune_data": """
        num_samples model base_url concurrency out_dir dry_run offline seed min_words max_words
        timeout max_retries input_price output_price
        max_answer_tokens temperature extra_headers extra_body
    """,
    "finetune": """
        init_from data out_dir B T total_batch_size learning_rates search_epochs num_epochs patience
        warmup_fraction weight_decay grad_clip dropout lora_rank resume seed device dtype compile
        num_samples general_data general_tokens
        text_column separator tracker
    """,
    "sample": """
        model prompt prompt_file num_samples max_tokens temperature top_k top_p seed stream
        interactive out batch_size device dtype
    """,
    "export": "model out format",
    "plot": "runs out_dir size",
    "bench.__main__": """
        rows skip nanogpt build_nanogpt nanochat rounds hellaswag_data hellaswag_limit core_limit
        data_files device out
    """,
    "bench.time_to_loss": """
        candidates data_dir out_dir nanogpt build_nanogpt learning_rates seeds step_fractions
        position_lr_scale fast_fractions
        n_layer n_head n_embd B T total_batch_size max_steps warmup_steps val_every val_tokens
        device dtype compile num_parallel
    """,
    "bench.gpu_check": "nanogpt B minutes device small out",
    "experiments.norm_study": """
        data_dir out_dir learning_rates warmup_steps_grid seeds depths gradients_every
        n_layer n_head n_embd B T total_batch_size max_steps val_tokens
        device dtype compile num_parallel
    """,
    "experiments.recipe_study": """
        rows data_dir out_dir max_lr seeds n_layer n_head n_embd B T total_batch_size max_steps
        val_tokens device dtype compile num_parallel
    """,
    "experiments.head_study": """
        model data_dir out_dir T B num_sequences prune_fractions random_orders val_tokens
        hellaswag_data hellaswag_limit device dtype
    """,
    "experiments.tokenizer_study": """
        source data_files out_dir vocab_sizes learn_bytes held_out_bytes terms seeds
        n_layer n_head n_embd context_bytes sequences B max_steps max_lr
        device dtype compile num_parallel
    """,
    "experiments.optimizer_study": """
        data_dir out_dir learning_rates seeds step_fractions
        n_layer n_head n_embd B T total_batch_size max_steps warmup_steps val_every val_tokens
        device dtype compile num_parallel
    """,
}


@pytest.mark.parametrize("script", FLAGS)
def test_flags_keep_their_names(script):
    fields = dataclasses.fields(importlib.import_module(script).Config)
    actual = {field.name for field in fields}
    expected = set(FLAGS[script].split())
    assert actual == expected, (
        f"the flags of {script} have changed: new are {sorted(actual - expected)}, gone are "
        f"{sorted(expected - actual)}; if that is intended, update FLAGS in tests/test_flags.py"
    )


def test_every_script_is_listed():
    paths = [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/*.py")]
    scripts = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in paths
        if "\n    config = parse_flags(Config, __doc__)" in path.read_text()
    }
    assert scripts == set(FLAGS), "list the flags of each script in FLAGS in tests/test_flags.py"


# Starts each script with --help, in a fork, and prints what is slow to import and was imported.
HELP_PROBE = """
import contextlib, io, os, runpy, sys
import tqdm, tyro

sys.path.insert(0, "")
for script in sys.argv[1:]:
    if os.fork() == 0:
        sys.argv = [script, "--help"]
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        packages = {"torch", "numpy", "matplotlib", "pyarrow", "tiktoken", "datasets", "openai"}
        found = " ".join([script, *sorted(packages & set(sys.modules))])
        os.write(1, f"{found}\\n".encode())  # in one piece, as the forks run at the same time
        os._exit(0)
for _ in sys.argv[1:]:
    os.wait()
"""


def test_help_imports_nothing_slow():
    command = [sys.executable, "-c", HELP_PROBE, *FLAGS]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert sorted(result.stdout.splitlines()) == sorted(FLAGS), result.stderr


@pytest.mark.parametrize("script", FLAGS)
def test_help_describes_the_script_and_every_flag(script, monkeypatch, capsys):
    module = importlib.import_module(script)
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as stopped:
        console.parse_flags(module.Config, module.__doc__)
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    start = f"-m {script.removesuffix('.__main__')}" if "." in script else f"{script}.py"
    assert f"python {start}" in text
    for name in FLAGS[script].split():
        assert f"--{name}" in text or name == "runs", (script, name)


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--promt x", "unrecognized options: --promt x (perhaps --prompt?); see --help"),
        ("--num_samples many", "--num_samples: invalid literal for int()"),
        ("--top_k", "--top_k needs a value"),
        (
            "--dtype float8",
            "--dtype is 'float8', must be one of auto, float32, tf32, bfloat16, float16",
        ),
    ],
)
def test_wrong_flags_end_in_one_line(flags, expected, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sample.py", *flags.split()])
    with pytest.raises(SystemExit) as stopped:
        console.parse_flags(sample.Config, sample.__doc__)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {expected}")
    assert error.count("\n") == 1
