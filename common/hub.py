"""Files on the Hugging Face hub: models and tokenizers, through its local cache, and datasets.

HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE work as in every program that uses the hub.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from common.console import Progress, UserError, cannot_write, say

# Globs for `download`. A large model has several files of weights, and an index that lists them.
WEIGHTS = ["config.json", "model*.safetensors", "model.safetensors.index.json"]
# Weights in repositories without safetensors
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
    # Imported late, because it is slow and most runs do not need it.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=files))
    except Exception as error:
        # ValueError: the name is not valid, or the answer is not JSON.
        is_hub_error = is_connection_error(error) or is_temporary(error)
        if not is_hub_error and not isinstance(error, ValueError):
            raise
        raise OSError(
            f"no model {repo!r}: it is not a local folder, and not available from the hub "
            f"({type(error).__name__}); check the name and the network, or set HF_HOME to a cache "
            "that holds it"
        ) from error


# ---------------------------------------------------------------------------------------------
# Datasets


class HubFile(NamedTuple):
    name: str
    size: int  # in bytes
    sha256: str | None  # None for small files, of which the hub knows another checksum


def list_dataset(repo: str, revision: str | None = None) -> tuple[str, list[HubFile]]:
    """A dataset repository's revision (a commit; by default the newest) and its files.

    Raises OSError if the hub can't be reached or refuses, UserError if there is no such dataset.
    """
    from huggingface_hub import HfApi

    with explained_errors(f"the dataset {repo!r}"):
        info = HfApi().dataset_info(repo, revision=revision, files_metadata=True)
        files = []
        for file in info.siblings or ():
            # The hub knows the sha256 of large files only, which are stored apart from the Git
            # repository.
            sha256 = file.lfs.sha256 if file.lfs else None
            files.append(HubFile(file.rfilename, file.size or 0, sha256))
        return str(info.sha), files


def download_file(repo: str, revision: str, name: str, folder: Path, bar: Progress) -> Path:
    """Download a file of a dataset repository into a folder and count its bytes in `bar`.

    A dropped connection is resumed. Raises OSError if that fails repeatedly, or the disk is full.
    """
    from huggingface_hub import hf_hub_download

    # Where the bar stood before this file
    start = bar.n
    num_failures = 0
    while True:
        try:
            path = hf_hub_download(
                repo,
                name,
                repo_type="dataset",
                revision=revision,
                local_dir=folder,
                tqdm_class=file_bar(bar),
            )
            return Path(path)
        except Exception as error:
            # The client resumes after most losses itself. After the others it begins again.
            num_failures += 1
            if not is_temporary(error) or num_failures > MAX_RETRIES:
                with explained_errors(f"{name} of {repo}"):
                    raise
            say(f"connection lost in {name}, retrying ({type(error).__name__})")
            bar.update(start - bar.n)
            time.sleep(retry_delay(num_failures))


def file_bar(bar: Progress) -> type:
    """The class that huggingface_hub uses as the progress bar of a file. It counts in `bar`.

    The client calls `update` with the bytes that are on the disk, and `update_transfer` with those
    that came over the network, which can be fewer.
    """

    # The methods that the client calls on its bars
    class FileBar:
        def __init__(self, **_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, num_bytes: int):
            bar.update(num_bytes)

        def update_transfer(self, num_bytes: int):
            pass

        def set_postfix_str(self, *_, **__):
            pass

        def set_transfer_postfix_str(self, *_, **__):
            pass

    return FileBar


# ---------------------------------------------------------------------------------------------
# Errors

# the HTTP libraries of `datasets` and `huggingface_hub`, whose errors share no base class
HTTP_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2", "aiohttp", "requests", "urllib3")
MAX_RETRIES = 8  # consecutive attempts to resume after a lost connection


def retry_delay(num_failures: int) -> int:
    """Seconds to wait after a lost connection: 2, 4, 8 ... 60."""
    return min(60, 2**num_failures)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, its cause, the cause's cause and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def library_of(error: BaseException) -> str:
    return type(error).__module__.split(".")[0]


def is_connection_error(error: BaseException) -> bool:
    """Whether an error was caused by the network."""
    # Look at the causes too: the libraries wrap each other's errors.
    return any(
        isinstance(cause, OSError) or library_of(cause) in HTTP_LIBRARIES for cause in causes(error)
    )


def http_status(error: BaseException) -> int | None:
    """The status with which the hub refused a request; None if the error has another cause."""
    for cause in causes(error):
        # The HTTP libraries' errors carry the response, if there was one.
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status is not None:
            return status
    return None


def is_temporary(error: BaseException) -> bool:
    """Whether an attempt to download might succeed later: a lost connection, or a failing hub."""
    status = http_status(error)
    # From 500 on, the server is at fault. A refusal, below 500, would only be repeated.
    if status is not None:
        return status >= 500
    # hf_xet, which downloads large files, raises these three.
    lost = (ConnectionError, TimeoutError, RuntimeError)
    return any(
        isinstance(cause, lost) or library_of(cause) in HTTP_LIBRARIES for cause in causes(error)
    )


@contextmanager
def explained_errors(what: str) -> Iterator[None]:
    """Turn the client's errors about `what` into a UserError or OSError that says what to do."""
    try:
        yield
    except Exception as error:
        raise explain(error, what) from error


def explain(error: Exception, what: str) -> Exception:
    """The error that tells the user the cause of `error` and a remedy; `error` if it is unknown."""
    from huggingface_hub import constants
    from huggingface_hub.errors import FileMetadataError, HFValidationError

    # The hub has answered, but refuses.
    hub = constants.ENDPOINT
    status = http_status(error)
    if status == 404:
        return UserError(f"{what} does not exist on {hub} (404): check --repo")
    if status in (401, 403):
        # The hub answers 401 for repositories that do not exist, too.
        return UserError(
            f"{hub} refuses access to {what} ({status}): check --repo; if it is not public, set "
            "HF_TOKEN to a token that may read it"
        )
    if status == 429:
        return OSError(
            f"{hub} refuses {what} after too many requests (429): wait a few minutes, then run the "
            "same command again to resume; the limit is higher with HF_TOKEN"
        )

    # The name, or what answered, is wrong. These errors are subclasses of ValueError or OSError, so
    # they are looked for first.
    if isinstance(error, HFValidationError):
        return UserError(f"{what}: a repository is named owner/name ({error})")
    is_no_hub = any(isinstance(cause, FileMetadataError) for cause in causes(error))
    if is_no_hub or isinstance(error, (ValueError, KeyError, TypeError)):
        return OSError(
            f"{hub} sent something other than the hub's answer for {what}: check HF_ENDPOINT, and "
            "whether the network requires a login in a browser"
        )

    # The disk, or the network. Both have errors from the system, with an errno.
    is_network = isinstance(error, (ConnectionError, TimeoutError))
    if isinstance(error, OSError) and error.errno and not is_network:
        return OSError(cannot_write(what, error))
    if constants.is_offline_mode():
        return OSError(f"{what} can't be downloaded: HF_HUB_OFFLINE is set")
    if is_connection_error(error) or is_temporary(error):
        reason = str(error).split("\n")[0] or type(error).__name__
        return OSError(
            f"{what} can't be downloaded from {hub}: check the network, then run the same command "
            f"again to resume ({reason})"
        )
    return error
