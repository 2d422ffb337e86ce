"""Files of models and tokenizers on the Hugging Face hub, through its local cache."""

from pathlib import Path

WEIGHTS = ["config.json", "model*.safetensors", "model.safetensors.index.json"]
# Of repositories without safetensors.
OLD_WEIGHTS = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
# Beside byte-level BPE, the vocabularies of other kinds, so that they are recognized and rejected.
TOKENIZER = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.tiktoken",
    "vocab.txt",
    "*.model",
]


def download(repo: str, files: list[str]) -> Path:
    """The folder of a hub repository in the local cache; `files` (globs) are downloaded if missing.

    Raises OSError if the repository is not available.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise OSError(
            f"no model {repo!r}: it is not a local folder, and not available from the hub "
            f"({type(error).__name__}); check the name and the network, or set HF_HOME to a cache "
            "that holds it"
        ) from error
