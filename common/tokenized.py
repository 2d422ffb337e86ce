"""Shards that others have tokenized with GPT-2's BPE, downloaded from the Hugging Face hub.

    download_shards("kjj0/finewebedu10B-gpt2", Path("datasets/finewebedu10B-gpt2"), 10**9)

The repository holds .bin files of llm.c's format with `val` and `train` in their names. They stay
as they are; next to them, a manifest records their checksums and the commit they came from. The
validation shards come first, then as many for training as are needed for max_tokens.

A file is downloaded into a subfolder, verified there and moved, so a file in the folder itself is
complete. A run that was interrupted continues with the first missing file, and one with a higher
max_tokens after the last.
"""

import json
import os
import shutil
from hashlib import sha256
from pathlib import Path

import numpy as np

from common.console import Progress, UserError, checksum, say, write_text
from common.hub import HubFile, download_file, list_dataset
from common.shards import (
    BIN_HEADER_BYTES,
    GPT2_VOCAB_SIZE,
    MANIFEST,
    check_disk,
    find_shards,
    map_shard,
    read_manifest,
    split_of,
)

# <|endoftext|> has the last of GPT-2's ids.
END_OF_TEXT_ID = GPT2_VOCAB_SIZE - 1
UNFINISHED = ".download"  # subfolder of files that are not complete or not verified
COUNT_TOKENS = 2**24  # tokens that are verified at a time, to keep memory small


def download_shards(repo: str, folder: Path, max_tokens: int | None) -> dict:
    """Download the shards of a dataset repository. Returns the manifest of the folder.

    max_tokens counts the validation shard too, and is rounded up to whole files; None = all. Files
    of an earlier run are verified and stay. Raises UserError if the folder holds other shards, or
    max_tokens leaves none for training; OSError if the hub can't be reached or the disk is full.
    """
    # Of an earlier run, keep the shards that are still what the manifest says.
    manifest = read_manifest(folder)
    if manifest and (manifest.get("source"), manifest.get("repo")) != ("tokenized", repo):
        raise UserError(
            f"{folder} holds shards of another source than {repo}: choose another out_dir"
        )
    verified = verify(folder, manifest["shards"]) if manifest else {}

    # A complete folder needs no network.
    if manifest and manifest["complete"] and len(verified) == len(manifest["shards"]):
        enough = manifest["available_tokens"]
        if max_tokens is not None:
            enough = min(max_tokens, enough)
        if manifest["tokens"] >= enough:
            return manifest

    # The same commit as earlier, so that all shards belong together.
    revision, files = list_dataset(repo, manifest["revision"] if manifest else None)
    shards = sort_shards(repo, files)
    check_names(repo, folder, shards)
    wanted = choose(shards, max_tokens)
    # A lower max_tokens than before removes nothing.
    if manifest:
        wanted = shards[: max(len(wanted), len(manifest["shards"]))]

    # The same fields as in fineweb.py's other manifests, as far as they apply
    header = dict(
        source="tokenized",
        repo=repo,
        revision=revision,
        available_tokens=sum(map(tokens_in, shards)),
        tokenizer="gpt2",
        tokenizer_sha256=sha256(b"gpt2").hexdigest(),
        vocab_size=GPT2_VOCAB_SIZE,
        end_of_text=END_OF_TEXT_ID,
        dtype="uint16",
    )
    fetch(repo, folder, header, wanted, verified)
    manifest = read_manifest(folder)
    assert manifest is not None
    return manifest


def fetch(repo: str, folder: Path, header: dict, wanted: list[HubFile], verified: dict[str, dict]):
    """Download the wanted files that are not verified yet, and write the manifest after each."""
    unfinished = folder / UNFINISHED
    # The client never resumes the unfinished files of a killed process, only complete ones stay.
    shutil.rmtree(unfinished / ".cache", ignore_errors=True)
    check_disk(folder, sum(file.size for file in wanted if file.name not in verified))

    # Each file ends up in the folder and in the manifest before the next one begins, so a run that
    # is killed loses at most one.
    entries = []
    total = sum(file.size for file in wanted)
    with Progress(total=total, unit="B", unit_scale=True, desc="downloading") as bar:
        for file in wanted:
            bar.set_description(file.name, refresh=False)
            start = bar.n
            entry = verified.get(file.name)
            if entry is None:
                path = folder / file.name
                # The file can be there already: a run that was killed between moving and the
                # manifest, or another program, has left it.
                if not is_same(path, file):
                    path = download_file(repo, header["revision"], file.name, unfinished, bar)
                entry = describe(path, file)
                move(path, folder / file.name)
                write_manifest(folder, header, [*entries, entry], complete=False)
            entries.append(entry)
            # Also if it was there already, or arrived compressed.
            bar.update(start + file.size - bar.n)
    write_manifest(folder, header, entries, complete=True)
    shutil.rmtree(unfinished, ignore_errors=True)


# ---------------------------------------------------------------------------------------------
# Which files


def tokens_in(file: HubFile) -> int:
    """Number of tokens in a shard, by its size: 2 bytes each, after the header."""
    return (file.size - BIN_HEADER_BYTES) // 2


def sort_shards(repo: str, files: list[HubFile]) -> list[HubFile]:
    """The shards of a repository: those for validation, then those for training, each by name."""
    splits = {"val": [], "train": []}
    for file in sorted(files):
        split = split_of(Path(file.name))
        # Files in folders belong to something else.
        if split and file.name.endswith(".bin") and "/" not in file.name:
            splits[split].append(file)
    # Training needs both splits.
    for split, found in splits.items():
        if not found:
            raise UserError(
                f"{repo} has no .bin file with {split!r} in its name: it holds no shards in "
                "llm.c's format, choose another --repo"
            )
    return splits["val"] + splits["train"]


def choose(shards: list[HubFile], max_tokens: int | None) -> list[HubFile]:
    """The first shards that hold max_tokens together; all of them if they hold fewer."""
    if max_tokens is None:
        return shards
    # At least one training shard must be among them, and those for validation come first.
    num_val = sum(tokens_in(file) for file in shards if split_of(Path(file.name)) == "val")
    if max_tokens <= num_val:
        raise UserError(
            f"max_tokens is {max_tokens:,}, must be above the {num_val:,} of the validation shard"
        )
    chosen = []
    num_tokens = 0
    for file in shards:
        if num_tokens >= max_tokens:
            break
        chosen.append(file)
        num_tokens += tokens_in(file)
    return chosen


def check_names(repo: str, folder: Path, shards: list[HubFile]):
    """Raise UserError if the folder holds shards that are not from this repository."""
    names = {file.name for file in shards}
    for path in find_shards(folder):
        if path.name not in names:
            raise UserError(f"{path} is not from {repo}: choose another out_dir")


# ---------------------------------------------------------------------------------------------
# On disk


def verify(folder: Path, entries: list[dict]) -> dict[str, dict]:
    """The manifest's entries whose files have the right checksum, by name."""
    verified = {}
    for entry in Progress(entries, desc="verifying", unit="shard"):
        path = folder / entry["name"]
        if path.exists() and checksum(path) == entry["sha256"]:
            verified[path.name] = entry
        else:
            say(f"{path} is missing or damaged, downloading it again")
    return verified


def is_same(path: Path, file: HubFile) -> bool:
    """Whether a file is there already, for example from another program."""
    return path.exists() and file.sha256 is not None and checksum(path) == file.sha256


def describe(path: Path, file: HubFile) -> dict:
    """Verify a downloaded shard. Returns its entry in the manifest.

    Raises UserError if it is not what the hub announced, or has an id outside GPT-2's vocabulary.
    """
    digest = checksum(path)
    # Small files have no checksum to compare with.
    if file.sha256 not in (None, digest):
        path.unlink()
        raise UserError(
            f"{file.name} arrived damaged, its checksum is wrong: run the same command again"
        )
    # Look at every token: training would only notice a wrong one when it comes to it.
    tokens = map_shard(path)
    num_documents = 0
    for start in range(0, len(tokens), COUNT_TOKENS):
        part = tokens[start : start + COUNT_TOKENS]
        if part.max() >= GPT2_VOCAB_SIZE:
            raise UserError(
                f"{file.name} contains the id {part.max()}, outside GPT-2's vocabulary of "
                f"{GPT2_VOCAB_SIZE}: choose another --repo"
            )
        num_documents += int(np.count_nonzero(part == END_OF_TEXT_ID))
    return dict(
        name=file.name, tokens=len(tokens), sha256=digest, documents=num_documents, next=None
    )


def move(path: Path, target: Path):
    """Move a file within a file system, atomically, after it has reached the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    os.replace(path, target)


def write_manifest(folder: Path, header: dict, entries: list[dict], complete: bool):
    """Write the manifest of the folder, with the counts of these shards."""
    counts = dict(
        complete=complete,
        documents=sum(entry["documents"] for entry in entries),
        empty_documents=0,
        tokens=sum(entry["tokens"] for entry in entries),
        shards=entries,
    )
    write_text(folder / MANIFEST, json.dumps(header | counts, indent=1) + "\n")
