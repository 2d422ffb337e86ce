"""Checkpoints of other projects, read without running any code that they contain.

    model = read_llmc("gpt2_124M.bin")                      # llm.c
    content = load_pickle("ckpt.pt")                        # any file written by torch.save
    model = read_nanogpt(content, "ckpt.pt")                # nanoGPT or build-nanogpt
    model = make_model(config, tensors, "some/folder")      # any tensors with GPT-2's names

All of these are GPT-2, but differ in names, in the GELU, and in the rows of the vocabulary.
checkpoint.load_model recognizes the format of a file. Hugging Face's folders are read by
common/huggingface.py. docs/formats.md lists what is read.
"""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional as F

from common.console import UserError
from model import GPT, GPTConfig

GPT2_VOCAB_SIZES = (50257, 50304)  # GPT-2's tokens, without and with padding rows


# ---------------------------------------------------------------------------------------------
# Tensors under GPT-2's names

# Added by torch.compile, by DDP, and by models that keep the transformer apart from the head.
PREFIXES = ("_orig_mod.", "module.", "transformer.")
# Old versions store the causal mask of each layer.
CAUSAL_MASK = re.compile(r"h\.\d+\.attn\.(masked_)?bias")


def make_model(
    config: GPTConfig,
    tensors: Mapping[str, Any],
    source: str | Path,
    transposed: bool = False,
    has_biases: bool = True,
) -> GPT:
    """The model with these tensors, which may be in half precision.

    transposed: linear weights are (in, out), as in Hugging Face's files, instead of (out, in).
    has_biases: if false, biases may be absent. They are zero then.

    Raises UserError, which names `source`, if the tensors are not exactly those of a GPT-2.
    """
    # Reduce all names to this project's: drop the prefixes, and the stored causal masks.
    named = {}
    for name, tensor in tensors.items():
        while name.startswith(PREFIXES):
            name = name.split(".", 1)[1]
        if not CAUSAL_MASK.fullmatch(name):
            named[name] = tensor

    # The head is the embedding. Some files store it twice, some only under the head's name.
    head = named.pop("lm_head.weight", None)
    if head is not None and not equal(head, named.setdefault("wte.weight", head)):
        raise UserError(
            f"{source} differs from GPT-2: its head (lm_head.weight) is not the embedding "
            "(wte.weight)"
        )

    # The names must match exactly: one more tensor is a layer that GPT-2 does not have.
    model = GPT(config)  # its biases are zero
    state = model.state_dict()
    unknown = sorted(named.keys() - state.keys())
    missing = sorted(state.keys() - named.keys())
    if not has_biases:
        missing = [name for name in missing if not name.endswith(".bias")]
    if unknown:
        raise UserError(f"{source} differs from GPT-2: it has the tensors {first_of(unknown)}")
    if missing:
        raise UserError(f"{source} lacks the tensors {first_of(missing)}")

    # Copy tensor by tensor. `copy_` converts half precision to float32, and would broadcast a
    # tensor of a wrong shape, hence the check.
    for name, tensor in named.items():
        ours = state[name]
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise UserError(f"{source} differs from GPT-2: its {name} has no floating-point values")
        if transposed and is_transposed(name):
            tensor = tensor.t()
        if name == "wte.weight" and tensor.dim() == 2:
            # Without its own padding rows, it gets ours.
            is_unpadded = len(tensor) == config.vocab_size
            missing_rows = config.padded_vocab_size - len(tensor)
            tensor = F.pad(tensor, (0, 0, 0, missing_rows)) if is_unpadded else tensor
        if tensor.shape != ours.shape:
            shapes = f"{tuple(tensor.shape)}, expected {tuple(ours.shape)}"
            raise UserError(f"{source}: {name} is {shapes}")
        ours.copy_(tensor)
    model.source = str(source)
    return model


def equal(a: Any, b: Any) -> bool:
    """Whether two entries of a state dict are the same tensor."""
    return a is b or isinstance(a, torch.Tensor) and a.shape == b.shape and torch.equal(a, b)


def first_of(names: list[str]) -> str:
    """A few of the names."""
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def is_transposed(name: str) -> bool:
    """Whether Hugging Face stores this weight as (in, out); nn.Linear's are (out, in)."""
    return name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))


def make_config(source: str | Path, **fields: Any) -> GPTConfig:
    """GPTConfig with these fields; a shape that is impossible is a UserError naming `source`."""
    try:
        return GPTConfig(**fields)
    except (ValueError, TypeError) as error:
        raise UserError(f"{source}: {error}") from error


# ---------------------------------------------------------------------------------------------
# Files written by torch.save


class PickledConfig:
    """Stands in for the class GPTConfig that build-nanogpt pickles; it only takes the fields."""


# build-nanogpt's class under the names it gets when its script runs, or is imported.
CONFIG_CLASSES: list[Any] = [
    (PickledConfig, "__main__.GPTConfig"),
    (PickledConfig, "train_gpt2.GPTConfig"),
]


def load_pickle(path: str | Path) -> Any:
    """The content of a file that torch.save wrote, in host memory. No code in it is run.

    Raises UserError if the file is damaged, or wants to use anything besides tensors, plain values
    and build-nanogpt's configuration.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        # torch.load does not compare the checksums that the file contains.
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise ValueError("wrong checksum")
        # weights_only=True rejects every class that is neither a tensor, a plain value nor listed.
        with torch.serialization.safe_globals(CONFIG_CLASSES):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch names what it rejected: "Unsupported global: GLOBAL posix.system was not ..."
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise UserError(f"{path} is truncated, corrupt or not a checkpoint") from error
        raise UserError(
            f"{path} holds more than tensors and plain values, and loading it could run code "
            f"({code[1]}): save its tensors alone, with the program that wrote it"
        ) from error
    except (
        *(RuntimeError, EOFError, OSError, KeyError, ValueError, zipfile.BadZipFile),
        *(TypeError, AttributeError, IndexError, AssertionError),  # torch, for a wrong pickle
    ) as error:
        raise UserError(f"{path} is truncated, corrupt or not a checkpoint") from error


def read_nanogpt(content: Any, path: str | Path, dropout: float = 0.0) -> GPT:
    """The model of a checkpoint of nanoGPT or build-nanogpt, as load_pickle returned it.

    Rows of the embedding beyond GPT-2's 50,257 tokens become padding. Raises UserError if it is
    another checkpoint, or has another vocabulary.
    """
    # nanoGPT stores its settings as the dict `model_args`, build-nanogpt as the object `config`.
    is_mapping = isinstance(content, Mapping)
    settings = content.get("model_args") if is_mapping else None
    if is_mapping and isinstance(content.get("config"), PickledConfig):
        settings = vars(content["config"])
    if not isinstance(settings, Mapping) or not isinstance(content.get("model"), Mapping):
        # Tensors at the top level: a bare state dict, such as Hugging Face's pytorch_model.bin.
        hint = ""
        if is_mapping and any(isinstance(value, torch.Tensor) for value in content.values()):
            hint = "; for Hugging Face's files, name the folder that also holds config.json"
        raise UserError(
            f"{path} is not a checkpoint of this project, nanoGPT or build-nanogpt{hint}"
        )

    # Reject unknown settings: they could change what the model computes.
    sizes = {"block_size", "vocab_size", "n_layer", "n_head", "n_embd"}
    unknown = sorted(map(str, settings.keys() - sizes - {"bias", "dropout"}))
    absent = sorted(sizes - settings.keys())
    if unknown:
        raise UserError(f"{path} differs from GPT-2: its settings have {first_of(unknown)}")
    if absent:
        raise UserError(f"{path} is not a checkpoint of nanoGPT: its settings lack {absent[0]}")
    check_vocabulary(settings["vocab_size"], path, content)

    # nanoGPT has the exact GELU; its first versions, which had no `bias` yet, and build-nanogpt
    # have GPT-2's approximation.
    activation: Literal["gelu", "gelu_tanh"] = "gelu" if "bias" in settings else "gelu_tanh"
    shape = {size: settings[size] for size in sizes - {"vocab_size"}}
    config = make_config(path, **shape, activation=activation, dropout=dropout)
    # nanoGPT can train without biases; make_model then leaves them at zero.
    has_biases = bool(settings.get("bias", True))
    return make_model(config, content["model"], path, has_biases=has_biases)


def check_vocabulary(vocab_size: Any, path: str | Path, content: Mapping = {}):
    """Raise UserError unless a model that comes without a tokenizer has GPT-2's vocabulary."""
    if vocab_size in GPT2_VOCAB_SIZES:
        return
    # nanoGPT's `config` holds the flags of the run, among them the name of the data set.
    settings = content.get("config")
    dataset = settings.get("dataset") if isinstance(settings, Mapping) else None
    raise UserError(
        f"{path} has a vocabulary of {vocab_size} tokens"
        + (f" (data set {dataset})" if dataset else "")
        + ", not GPT-2's 50257 (50304 with padding), and does not contain its tokenizer: such "
        "models can't be read"
    )


# ---------------------------------------------------------------------------------------------
# llm.c

# The magic number of a model. llm.c uses dates as magic numbers.
LLMC_MODEL = 20240326
# The first int32 of llm.c's files.
LLMC_FILES = {
    LLMC_MODEL: "a GPT-2",
    20240327: "a reference output for tests",
    20240328: "a tokenizer",
    20240520: "a shard of tokens",
    20240522: "a benchmark",
    20240527: "an optimizer state",
    20240801: "a shard of Llama 3's tokens",
    20240803: "a Llama 3",
}
LLMC_DTYPES = {3: torch.float32, 5: torch.bfloat16}  # by version
LLMC_HEADER = 256  # int32
# Each of these is stored for all layers before the next one.
LLMC_LAYER_TENSORS = """
    ln_1.weight ln_1.bias attn.c_attn.weight attn.c_attn.bias attn.c_proj.weight attn.c_proj.bias
    ln_2.weight ln_2.bias mlp.c_fc.weight mlp.c_fc.bias mlp.c_proj.weight mlp.c_proj.bias
""".split()


def is_llmc(path: str | Path) -> bool:
    """Whether a file is llm.c's: it has a magic number, or is a .bin file but not torch's."""
    with open(path, "rb") as file:
        start = file.read(4)
    is_torch = start.startswith((b"PK", b"\x80"))  # a zip archive, or an old plain pickle
    # A .bin file with a wrong number counts as llm.c's: read_llmc then reports what it found.
    is_other_bin = Path(path).suffix == ".bin" and not is_torch
    return int.from_bytes(start, "little") in LLMC_FILES or is_other_bin


def read_llmc(path: str | Path, dropout: float = 0.0) -> GPT:
    """The model of an llm.c checkpoint: a header of 256 int32, then all tensors without gaps.

    The header is: magic number, version, block_size, vocab_size, n_layer, n_head, n_embd,
    padded_vocab_size, zeros. Raises UserError if the file is anything else.
    """
    # The header: what kind of file this is, whether it is long enough, and its version.
    path = Path(path)
    header = np.fromfile(path, "<i4", LLMC_HEADER).tolist()
    magic = header[0] if header else 0
    if magic != LLMC_MODEL:
        found = LLMC_FILES.get(magic, f"no file of llm.c (magic number {magic})")
        raise UserError(f"{path} is {found}, not a GPT-2 of llm.c (magic number {LLMC_MODEL})")
    if len(header) < LLMC_HEADER:
        raise UserError(f"{path} is truncated: its header has {len(header)} of 256 numbers")
    version, block_size, vocab_size, n_layer, n_head, n_embd, rows = header[1:8]
    if version not in LLMC_DTYPES:
        raise UserError(
            f"{path} has llm.c's format {version}: only 3 (float32) and 5 (bfloat16) can be read; "
            "write it again with a newer llm.c"
        )
    dtype = LLMC_DTYPES[version]
    check_vocabulary(vocab_size, path)
    config = make_config(
        path,
        block_size=block_size,
        vocab_size=vocab_size,
        padded_vocab_size=rows,
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        dropout=dropout,
    )

    # Compare the size first: a damaged header could ask for any amount of memory. Per layer:
    # weights of 3 + 1 + 4 + 4 squares; biases of 3 + 1 + 4 + 1 and LayerNorms of 2 + 2 widths.
    # Outside of the layers: both embeddings, and the weight and bias of ln_f.
    per_layer = 12 * n_embd**2 + 13 * n_embd
    count = (rows + block_size + 2) * n_embd + n_layer * per_layer
    expected = 4 * LLMC_HEADER + count * dtype.itemsize
    actual = path.stat().st_size
    if actual != expected:
        problem = "truncated" if actual < expected else "damaged"
        raise UserError(f"{path} is {problem}: it has {actual:,} bytes, expected {expected:,}")

    # NumPy has no bfloat16: read its bits.
    bits = np.dtype("<f4" if dtype == torch.float32 else "<i2")
    values = torch.from_numpy(np.fromfile(path, bits, offset=4 * LLMC_HEADER)).view(dtype)
    # The order of the tensors in the file
    names = ["wte.weight", "wpe.weight"]
    names += [f"h.{layer}.{name}" for name in LLMC_LAYER_TENSORS for layer in range(n_layer)]
    names += ["ln_f.weight", "ln_f.bias"]
    # Cut the values into tensors. These are views: nothing is copied before make_model.
    with torch.device("meta"):  # shapes only
        shapes = {name: tensor.shape for name, tensor in GPT(config).state_dict().items()}
    parts = values.split([shapes[name].numel() for name in names])
    tensors = {name: part.view(shapes[name]) for name, part in zip(names, parts)}
    return make_model(config, tensors, path)
