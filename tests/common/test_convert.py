"""Checkpoints of other projects, compared with transformers' model of the same weights.

The writers below follow the formats' descriptions. With the folders of those projects in $NANOGPT,
$BUILD_NANOGPT and $LLMC, the slow tests write with the projects' own code.
"""

import os
import pickle
import struct
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command, ok, one_line
from reference import random_tokens, shake
from transformers import GPT2Config, GPT2LMHeadModel

from common import checkpoint
from common.console import UserError
from common.tokenizer import load_gpt2

SIZES = dict(n_layer=2, n_head=2, n_embd=16, block_size=32)
VOCAB = 50257


@pytest.fixture(scope="module", autouse=True)
def gpt2_vocabulary():
    try:
        load_gpt2()
    except OSError:
        pytest.skip("GPT-2's vocabulary is not available")


def make_reference(activation="gelu", vocab_size=VOCAB) -> GPT2LMHeadModel:
    sizes = {"n_positions" if name == "block_size" else name: n for name, n in SIZES.items()}
    config = GPT2Config(**sizes, vocab_size=vocab_size, activation_function=activation)
    torch.manual_seed(0)
    model = shake(GPT2LMHeadModel(config))
    with torch.no_grad():  # strong enough that the two GELUs differ visibly
        for block in model.transformer.h:
            block.mlp.c_fc.weight *= 5
    return model


def named_tensors(reference) -> dict[str, torch.Tensor]:
    """The state dict with (out, in) weights, as nanoGPT and its descendants have it."""
    state = {}
    for name, tensor in reference.state_dict().items():
        is_conv1d = ".h." in name and name.endswith(("c_attn.weight", "c_proj.weight", "fc.weight"))
        state[name] = tensor.t().contiguous() if is_conv1d else tensor
    return state


def nanogpt_content(reference, **settings) -> dict:
    model_args = SIZES | dict(vocab_size=VOCAB, bias=True, dropout=0.1) | settings
    return dict(
        model=named_tensors(reference),
        optimizer=dict(state={0: dict(step=torch.tensor(1.0))}, param_groups=[dict(lr=6e-4)]),
        model_args=model_args,
        iter_num=2000,
        best_val_loss=torch.tensor(3.1),
        config=dict(dataset="openwebtext", batch_size=12, compile=True),
    )


def write_llmc(path, reference, version=3, magic=20240326, vocab_size=VOCAB, rows=50304):
    """As llm.c's C code reads it: each kind of tensor for all layers before the next kind."""
    state = named_tensors(reference)
    padding = torch.zeros(50304 - VOCAB, SIZES["n_embd"])
    tensors = [torch.cat([state["transformer.wte.weight"], padding])]
    tensors.append(state["transformer.wpe.weight"])
    kinds = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    for kind in kinds:
        for suffix in ("weight", "bias"):
            for layer in range(SIZES["n_layer"]):
                tensors.append(state[f"transformer.h.{layer}.{kind}.{suffix}"])
    tensors += [state["transformer.ln_f.weight"], state["transformer.ln_f.bias"]]
    sizes = (SIZES["block_size"], vocab_size, SIZES["n_layer"], SIZES["n_head"], SIZES["n_embd"])
    header = struct.pack("<256i", magic, version, *sizes, rows, *[0] * 248)
    values = torch.cat([tensor.flatten() for tensor in tensors])
    if version == 5:  # bfloat16 is the upper half of a float32
        bits = values.bfloat16().float().numpy().view(np.uint32) >> 16
        body = bits.astype("<u2").tobytes()
    else:
        body = values.numpy().tobytes()
    path.write_bytes(header + body)


def difference(path, reference) -> float:
    """Largest difference of the logits of the model in `path` and those of the reference."""
    model, enc = checkpoint.load_model(path)
    assert enc.name == "gpt2"
    idx = random_tokens(2, 32, vocab_size=VOCAB)
    with torch.no_grad():
        logits = model.eval()(idx)
        expected = reference(idx).logits[..., :VOCAB].float()
    assert logits.shape == expected.shape and expected.std() > 0.3
    return (logits - expected).abs().max().item()


def refused(path) -> str:
    with pytest.raises(UserError) as info:
        checkpoint.load_model(path)
    message = str(info.value)
    assert str(path) in message and "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------
# nanoGPT


@pytest.mark.parametrize("rows", [50257, 50304])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
def test_nanogpt(tmp_path, rows, prefix):
    reference = make_reference(vocab_size=rows)
    content = nanogpt_content(reference, vocab_size=rows)
    content["model"] = {prefix + name: tensor for name, tensor in content["model"].items()}
    torch.save(content, tmp_path / "ckpt.pt")
    assert difference(tmp_path / "ckpt.pt", reference) < 1e-4


def test_the_gelu_of_nanogpt_is_exact(tmp_path):
    """With GPT-2's approximation, the logits would be wrong: the test above could tell."""
    reference = make_reference()
    content = nanogpt_content(reference)
    torch.save(content, tmp_path / "ckpt.pt")
    model, _ = checkpoint.load_model(tmp_path / "ckpt.pt")
    assert model.config.activation == "gelu"
    checkpoint.save(tmp_path / "ours.pt", checkpoint.build(model, load_gpt2(), 1))
    assert difference(tmp_path / "ours.pt", reference) < 3e-5
    # The first versions had no `bias`, and the approximation.
    del content["model_args"]["bias"]
    torch.save(content, tmp_path / "old.pt")
    assert difference(tmp_path / "old.pt", reference) > 1e-4
    assert difference(tmp_path / "old.pt", use_gelu_new(reference)) < 3e-5


def use_gelu_new(reference):
    for block in reference.transformer.h:
        block.mlp.act = torch.nn.GELU(approximate="tanh")
    return reference


def test_nanogpt_without_biases(tmp_path):
    reference = make_reference()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
    content = nanogpt_content(reference, bias=False)
    content["model"] = {k: v for k, v in content["model"].items() if not k.endswith(".bias")}
    torch.save(content, tmp_path / "ckpt.pt")
    assert difference(tmp_path / "ckpt.pt", reference) < 1e-4
    # Without `bias=False` their absence is an error.
    content["model_args"]["bias"] = True
    torch.save(content, tmp_path / "ckpt.pt")
    assert "lacks the tensors h.0.attn.c_attn.bias" in refused(tmp_path / "ckpt.pt")


def test_nanogpt_with_unknown_tensors(tmp_path):
    content = nanogpt_content(make_reference())
    content["model"]["transformer.h.0.attn.rotary.inv_freq"] = torch.ones(4)
    torch.save(content, tmp_path / "ckpt.pt")
    assert "it has the tensors h.0.attn.rotary.inv_freq" in refused(tmp_path / "ckpt.pt")


def test_nanogpt_with_unknown_settings(tmp_path):
    torch.save(nanogpt_content(make_reference(), n_kv_head=1), tmp_path / "ckpt.pt")
    assert "its settings have n_kv_head" in refused(tmp_path / "ckpt.pt")


def test_nanogpt_of_characters(tmp_path):
    content = nanogpt_content(make_reference(vocab_size=65), vocab_size=65)
    content["config"]["dataset"] = "shakespeare_char"
    torch.save(content, tmp_path / "ckpt.pt")
    message = refused(tmp_path / "ckpt.pt")
    assert "65 tokens (data set shakespeare_char), not GPT-2's 50257" in message


@pytest.mark.parametrize(
    "settings",
    [dict(n_head=3), dict(n_layer=0), dict(n_embd="16"), dict(block_size=None), dict(n_embd=32)],
    ids=str,
)
def test_impossible_settings(tmp_path, settings):
    torch.save(nanogpt_content(make_reference(), **settings), tmp_path / "ckpt.pt")
    refused(tmp_path / "ckpt.pt")


def test_an_untied_head(tmp_path):
    content = nanogpt_content(make_reference())
    content["model"]["lm_head.weight"] = content["model"]["lm_head.weight"] + 1e-3
    torch.save(content, tmp_path / "ckpt.pt")
    assert "its head (lm_head.weight) is not the embedding" in refused(tmp_path / "ckpt.pt")


@pytest.mark.parametrize(
    "content",
    [
        dict(model_args=dict(n_layer=1)),
        dict(model_args=dict(n_layer=1), model={}),
        dict(model=3, model_args=3),
        dict(weights=torch.ones(3)),
        [1, 2],
        torch.ones(3),
        None,
    ],
    ids=str,
)
def test_other_contents(tmp_path, content):
    torch.save(content, tmp_path / "ckpt.pt")
    refused(tmp_path / "ckpt.pt")


@pytest.mark.parametrize("kept", [0, 1000, 0.5, 0.999])
@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_files_of_torch(tmp_path, kept, legacy):
    path = tmp_path / "ckpt.pt"
    content = nanogpt_content(make_reference())
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    if legacy:
        assert difference(path, make_reference()) < 1e-4
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if kept < 1 else kept])
    refused(path)


# ---------------------------------------------------------------------------------------------
# build-nanogpt


@pytest.fixture
def pickled_config(monkeypatch):
    """A class that pickle finds as __main__.GPTConfig while a test writes its checkpoint."""

    @dataclass
    class GPTConfig:
        block_size: int = 1024
        vocab_size: int = 50257
        n_layer: int = 12
        n_head: int = 12
        n_embd: int = 768

    GPTConfig.__module__ = "__main__"
    GPTConfig.__qualname__ = "GPTConfig"
    monkeypatch.setattr(sys.modules["__main__"], "GPTConfig", GPTConfig, raising=False)
    return GPTConfig


@pytest.mark.parametrize("rows", [50257, 50304])
def test_build_nanogpt(tmp_path, pickled_config, monkeypatch, rows):
    reference = make_reference("gelu_new", vocab_size=rows)
    content = dict(
        model=named_tensors(reference),
        config=pickled_config(**SIZES, vocab_size=rows),
        step=19072,
        val_loss=3.07,
    )
    torch.save(content, tmp_path / "model_19072.pt")
    monkeypatch.delattr(sys.modules["__main__"], "GPTConfig")  # its code is not needed
    assert difference(tmp_path / "model_19072.pt", reference) < 1e-4
    # It looks like a checkpoint of ours, but a run can't be resumed from it.
    with pytest.raises(UserError, match="not written by this project"):
        checkpoint.load(tmp_path / "model_19072.pt")


def test_a_config_that_is_no_config(tmp_path, pickled_config):
    config = pickled_config(**SIZES)
    config.__dict__ = {"rope": True}
    content = dict(model=named_tensors(make_reference()), config=config)
    torch.save(content, tmp_path / "model.pt")
    assert "its settings have rope" in refused(tmp_path / "model.pt")


class Attack:
    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("place", ["model_args", "config", "model", "everything"])
@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_not_run(tmp_path, place, legacy):
    victim = tmp_path / "victim"
    attack = Attack(os.system, f"touch {victim}")
    content = nanogpt_content(make_reference())
    content[place] = attack
    path = tmp_path / "ckpt.pt"
    torch.save(
        attack if place == "everything" else content,
        path,
        _use_new_zipfile_serialization=not legacy,
    )
    assert "could run code (posix.system)" in refused(path)
    assert not victim.exists()
    pickle.loads(pickle.dumps(attack))
    assert victim.exists()  # the attack works


def test_only_the_config_class_is_known_by_its_name(tmp_path, monkeypatch):
    """A name in __main__ does not make a class harmless, and arguments do not reach one."""
    for name, function in (("GPTConfig", "wrong arguments"), ("Other", "class")):
        made = type(name, (), {"__module__": "__main__"})
        monkeypatch.setattr(sys.modules["__main__"], name, made, raising=False)
        content = dict(model={}, config=Attack(made, *[3] * (function == "wrong arguments")))
        torch.save(content, tmp_path / "model.pt")
        refused(tmp_path / "model.pt")


# ---------------------------------------------------------------------------------------------
# llm.c


def test_llmc_float32(tmp_path):
    reference = make_reference("gelu_new")
    write_llmc(tmp_path / "gpt2_124M.bin", reference)
    assert difference(tmp_path / "gpt2_124M.bin", reference) < 1e-4
    # Any name will do.
    (tmp_path / "gpt2_124M.bin").rename(tmp_path / "model_00000010")
    assert difference(tmp_path / "model_00000010", reference) < 1e-4


def test_llmc_bfloat16(tmp_path):
    reference = make_reference("gelu_new")
    write_llmc(tmp_path / "gpt2_124M_bf16.bin", reference, version=5)
    assert difference(tmp_path / "gpt2_124M_bf16.bin", reference) > 1e-3
    assert difference(tmp_path / "gpt2_124M_bf16.bin", reference.bfloat16().float()) < 1e-4


@pytest.mark.parametrize("size", [0, 3, 4, 1023, 1024, 5000, -1])
def test_truncated_llmc(tmp_path, size):
    path = tmp_path / "model.bin"
    write_llmc(path, make_reference())
    path.write_bytes(path.read_bytes()[:size])
    message = refused(path)
    assert "truncated" in message or size < 4


def test_llmc_that_is_too_long(tmp_path):
    write_llmc(tmp_path / "model.bin", make_reference())
    with open(tmp_path / "model.bin", "ab") as file:
        file.write(b"\0\0\0\0")
    assert "damaged" in refused(tmp_path / "model.bin")


@pytest.mark.parametrize(
    "magic, kind",
    [
        (20240520, "a shard of tokens"),
        (20240328, "a tokenizer"),
        (20240527, "an optimizer state"),
        (20240803, "a Llama 3"),
        (7, "no file of llm.c (magic number 7)"),
        (-1, "no file of llm.c"),
    ],
)
def test_other_files_of_llmc(tmp_path, magic, kind):
    write_llmc(tmp_path / "model.bin", make_reference(), magic=magic)
    assert kind in refused(tmp_path / "model.bin")


@pytest.mark.parametrize("version", [0, 1, 2, 4, 6])
def test_other_versions_of_llmc(tmp_path, version):
    write_llmc(tmp_path / "model.bin", make_reference(), version)
    assert f"format {version}: only 3 (float32) and 5" in refused(tmp_path / "model.bin")


@pytest.mark.parametrize("field", range(2, 8))
@pytest.mark.parametrize("value", [-1, 0, 2**31 - 1])
def test_damaged_headers_of_llmc(tmp_path, field, value):
    """Also those that ask for more memory than there is."""
    path = tmp_path / "model.bin"
    write_llmc(path, make_reference())
    data = bytearray(path.read_bytes())
    struct.pack_into("<i", data, 4 * field, value)
    path.write_bytes(data)
    if (field, value) != (7, 0):  # 0 rows: the usual number, which is right
        refused(path)


# ---------------------------------------------------------------------------------------------
# The stages


@pytest.mark.slow
def test_the_stages_read_them(tmp_path):
    """Greedy text of sample.py and of transformers, from a file that only llm.c writes."""
    reference = make_reference("gelu_new")
    write_llmc(tmp_path / "model.bin", reference)
    enc = load_gpt2()
    flags = "--temperature 0 --num_samples 1 --max_tokens 12 --device cpu --dtype float32".split()
    result = ok(command("sample.py", "--model", tmp_path / "model.bin", "--prompt", "A", *flags))
    with torch.no_grad():
        tokens = reference.generate(
            torch.tensor([enc.encode("A")]), do_sample=False, max_new_tokens=12, pad_token_id=0
        )
    assert enc.decode(tokens[0].tolist()) in result.stdout

    export = ("export.py", "--model", tmp_path / "model.bin", "--out", tmp_path / "out")
    ok(command(*export))
    exported = GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    idx = random_tokens(1, 9)
    with torch.no_grad():
        assert torch.equal(exported(idx).logits, reference(idx).logits)


@pytest.mark.slow
def test_errors_are_one_line(tmp_path):
    torch.save(nanogpt_content(make_reference(), vocab_size=65), tmp_path / "ckpt.pt")
    (tmp_path / "text.txt").write_text("a\n\nb")
    data = ("--data", tmp_path / "text.txt", "--separator", "\n\n", "--out_dir", tmp_path / "o")
    result = command("finetune.py", "--init_from", tmp_path / "ckpt.pt", *data)
    assert "65 tokens" in one_line(result)
    assert "no checkpoint" in one_line(command("sample.py", "--model", tmp_path / "absent.bin"))


# ---------------------------------------------------------------------------------------------
# The projects' own code


def run_until(variable: str, file: str, end: str | None, module: str, monkeypatch):
    """A module from a project's script, up to the line that starts with `end`."""
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} is not set")
    code = (Path(folder) / file).read_text()
    if end:
        code = code[: code.index(end)]
    code = code.replace("from hellaswag import", "from math import nan #")
    namespace = sys.modules.get(module) or types.ModuleType(module)
    namespace.__dict__["__file__"] = str(Path(folder) / file)
    monkeypatch.setitem(sys.modules, module, namespace)
    exec(compile(code, file, "exec"), namespace.__dict__)
    return namespace


class LogitsOf:
    """A model that is called as transformers' is."""

    def __init__(self, model):
        self.model = model

    def __call__(self, idx):
        # Without targets, nanoGPT computes the last position only.
        return types.SimpleNamespace(logits=self.model(idx, idx)[0])


@pytest.mark.slow
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [50257, 50304])
def test_nanogpts_own_code(tmp_path, monkeypatch, bias, rows):
    theirs = run_until("NANOGPT", "model.py", None, "nanogpt_model", monkeypatch)
    settings = SIZES | dict(bias=bias, vocab_size=rows, dropout=0.0)
    model = shake(theirs.GPT(theirs.GPTConfig(**settings)))
    content = nanogpt_content(make_reference(), **settings) | dict(model=model.state_dict())
    torch.save(content, tmp_path / "ckpt.pt")
    assert difference(tmp_path / "ckpt.pt", LogitsOf(model)) < 1e-5


@pytest.mark.slow
def test_build_nanogpts_own_code(tmp_path, monkeypatch):
    module = run_until("BUILD_NANOGPT", "train_gpt2.py", "import tiktoken", "__main__", monkeypatch)
    model = shake(module.GPT(module.GPTConfig(**SIZES, vocab_size=50304)))
    content = dict(model=model.state_dict(), config=model.config, step=1, val_loss=3.0)
    torch.save(content, tmp_path / "model_00001.pt")
    assert difference(tmp_path / "model_00001.pt", LogitsOf(model)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_llmcs_own_code(tmp_path, monkeypatch, dtype):
    theirs = run_until("LLMC", "train_gpt2.py", "if __name__ ==", "llmc_train", monkeypatch)
    model = shake(theirs.GPT(theirs.GPTConfig(**SIZES)))
    theirs.write_model(model, str(tmp_path / "model.bin"), dtype=dtype)
    if dtype == "bfloat16":
        model = model.bfloat16().float()
    assert difference(tmp_path / "model.bin", LogitsOf(model)) < 1e-4
