"""Files that are there whole, or not at all."""

import hashlib
import os
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def write_whole(path: str | Path):
    """Open a file to be written under another name; at the end flush it to the disk and rename it.

    A crash leaves the old file or the new one. Raises OSError if the disk is full or the folder not writable; the old
    file is still there then, and nothing beside it.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the rename, too, survives a power cut
        os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"{path} can't be written ({error.strerror or error}): make room, then run again"
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str):
    with write_whole(path) as file:
        file.write(text.encode())


def checksum(path: str | Path) -> str:
    """sha256 of a file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
