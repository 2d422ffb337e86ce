"""How a stage talks to its user: flags, progress bars, one-line errors; files written atomically.

A script reads its flags before it imports what is slow to import, torch above all. So `--help` and
wrong flags answer at once:

    @dataclass
    class Config: ...

    if __name__ == "__main__":
        config = parse_flags(Config, __doc__)

    import torch

    def main(config: Config): ...

    if __name__ == "__main__":
        run_script(main, config)

For the same reason, nothing here needs torch or numpy.
"""

import codecs
import dataclasses
import difflib
import errno
import hashlib
import io
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

from tqdm import tqdm

# The flag for the dtype of matrix products. tf32 is float32 whose matrix products run in TF32 on
# NVIDIA GPUs.
Dtype = Literal["auto", "float32", "tf32", "bfloat16", "float16"]


class UserError(Exception):
    """An error that the user can fix. Its message is printed as one line, without a traceback.

    The message says what is wrong, where, and what to do. Raise it where the input is read; all
    other exceptions, except the system's OSError, are bugs and keep their traceback.
    """

    exit_code = 1


def parse_flags(config_class: type, doc: str | None) -> Any:
    """The Config that the command line describes, an instance of `config_class`.

    `--help` ends this process, and so does a wrong flag: with one line, and exit code 2.
    """
    # Imported here, because the worker processes of a stage import this module too. tyro's hook for
    # errors is not yet part of its stable interface, hence the exact version in requirements.txt.
    import tyro
    from tyro import _errors, _resolver

    # With this function tyro compares defaults with their types, in order to warn. It imports
    # typeguard for that, which takes longer than tyro itself; and mypy has compared ours.
    _resolver.is_instance = lambda typ, value: True

    # tyro calls this with the error that it has found.
    def report(event: _errors.ParseErrorEvent):
        if isinstance(event, _errors.UnrecognizedArgs):
            wrong = f"unrecognized options: {' '.join(event.tokens)}"
            flags = [f"--{field.name}" for field in dataclasses.fields(config_class)]
            similar = difflib.get_close_matches(event.tokens[0], flags, n=1)
            if similar:
                wrong += f" (perhaps {similar[0]}?)"
        elif isinstance(event, _errors.InvalidChoice):
            name = event.argument.display_name()
            wrong = f"{name} is {event.value!r}, must be one of {', '.join(event.choices)}"
        elif isinstance(event, _errors.BadValue):
            name = event.argument.display_name()
            wrong = f"{name} needs a value (if that begins with a hyphen: {name}=-...)"
        elif isinstance(event, _errors.InstantiationFailure):
            # What follows says the same in the words of Python.
            wrong = event.message.partition("Got errors:")[0].strip(". \n")
            if event.argument:
                wrong = f"{event.argument.display_name()}: {wrong}"
        else:
            return  # tyro prints it, in a box of several lines
        # Exit code 2 is the convention for wrong flags, as in argparse.
        fail(f"{wrong}; see --help", 2)

    # One flag per boolean: --name, or --no_name if the default is True.
    markers = (tyro.conf.FlagCreatePairsOff,)
    with errors_in_one_line(), _errors.on_parse_error(report):
        return tyro.cli(config_class, description=doc, use_underscores=True, config=markers)


def run_script(main: Callable[[Any], None], config: Any):
    """Run the `main` of a script."""
    with errors_in_one_line():
        main(config)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """A UserError or an OSError inside ends this process with one line.

    With TRACEBACK=1 in the environment the traceback comes first.
    """
    # Generated text may hold characters that the terminal's encoding lacks: show their codes.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except KeyboardInterrupt:
        # The shells' exit code for a program that a signal has ended.
        fail("interrupted", 128 + signal.SIGINT)
    except UserError as error:
        fail(str(error), error.exit_code)
    except BrokenPipeError:  # whoever read our output has seen enough, for example `head`
        discard_broken_output()
        sys.exit(1)
    except OSError as error:
        fail(in_plain_words(error))
    except (MemoryError, RuntimeError) as error:
        # torch's errors are recognized by their names and texts, because this module does not
        # import torch.
        kind = type(error).__name__
        if kind in ("MemoryError", "OutOfMemoryError") or "can't allocate memory" in str(error):
            fail("out of memory: lower B (the result does not change), then T, n_layer or n_embd")
        # NCCL and the store raise DistBackendError, DistNetworkError and so on. Gloo raises plain
        # RuntimeErrors that name its source files.
        if kind.startswith("Dist") or "gloo" in str(error):
            fail("lost the connection to another process; see that process's own error message")
        # Anything else is a bug. A single process keeps its traceback. One of several ranks must
        # end through `fail`, because Python's own exit could wait for the other ranks.
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            raise
        traceback.print_exc()
        fail(str(error))


def in_plain_words(error: OSError) -> str:
    """The message of an OSError, without the number that Python puts before it."""
    if isinstance(error, FileExistsError | NotADirectoryError):
        return f"{error.filename} is a file, a folder is needed: choose another name"
    if isinstance(error, IsADirectoryError):
        return f"{error.filename} is a folder, a file is needed"
    if error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def check_at_least(config: Any, least: float, *names: str):
    """Raise UserError if a flag, or one of its values, is too small. None is allowed."""
    for name in names:
        value = getattr(config, name)
        # Some flags take several values: check each of them.
        for single in value if isinstance(value, tuple) else (value,):
            if single is not None and not single >= least:  # NaN is not
                raise UserError(f"{name} is {value}, must be at least {least}")


def check_known(kind: str, names: Collection[str], known: Collection[str]):
    """Raise UserError if one of the names of this kind, given by the user, does not exist."""
    for name in names:
        if name not in known:
            raise UserError(f"there is no {kind} {name!r}: choose from {', '.join(known)}")


def fail(message: str, code: int = 1):
    """End this process with one line on stderr.

    Under torchrun it ends at once: a clean exit would wait for the other ranks.
    """
    # The traceback exists only if the caller is handling an exception.
    if os.environ.get("TRACEBACK") and sys.exc_info()[0]:
        traceback.print_exc()
    # torchrun sets WORLD_SIZE and RANK.
    distributed = int(os.environ.get("WORLD_SIZE", 1)) > 1
    rank = ""
    if distributed:
        rank = f"rank {os.environ['RANK']}: "
        if os.environ["RANK"] != "0":
            # Rank 0 usually fails with the same message, and torchrun then ends this process.
            time.sleep(2)

    # Messages of libraries can have several lines: join them.
    print(f"{rank}error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    if distributed:
        # _exit skips all cleanup, so the output must be flushed first.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


# ---------------------------------------------------------------------------------------------
# Output


class Progress(tqdm):
    """A progress bar on a terminal, an occasional line where the output is a file. Rank 0 only."""

    def __init__(self, *args, **kwargs):
        tty = sys.stderr.isatty()
        kwargs.setdefault("disable", int(os.environ.get("RANK", 0)) != 0)
        # A finished bar stays on a terminal, but adds no last line to a file.
        kwargs.setdefault("leave", tty)
        # In a file, each update is a line of its own: one per 15 seconds is enough, and a bar that
        # takes less than a second prints none.
        pace = dict(mininterval=0.2) if tty else dict(mininterval=15, maxinterval=60, delay=1)
        super().__init__(*args, dynamic_ncols=tty, **pace, **kwargs)

    def display(self, *args, **kwargs):
        with unless_pipe_is_closed():
            return super().display(*args, **kwargs)

    def close(self):
        with unless_pipe_is_closed():
            super().close()

    @staticmethod
    def status_printer(file):
        if file.isatty():
            return tqdm.status_printer(file)

        # tqdm redraws its line with carriage returns, which clutter a file.
        def print_line(text: str):
            if text.strip():
                print(text, file=file, flush=True)

        return print_line


def say(*words):
    """Print a line, above the progress bar if there is one.

    Nothing that is only displayed may end a run: a closed pipe is ignored.
    """
    # On a terminal, tqdm.write clears the bar, prints, and draws the bar again.
    text = " ".join(map(str, words))
    with unless_pipe_is_closed():
        if sys.stderr.isatty():
            tqdm.write(text)
        else:
            print(text, flush=True)


@contextmanager
def unless_pipe_is_closed() -> Iterator[None]:
    """Print inside this block; if the reader of a pipe is gone, all further output is discarded."""
    try:
        yield
    except BrokenPipeError:
        discard_broken_output()


def discard_broken_output():
    """Connect stdout and stderr to /dev/null if they are pipes that nobody reads any more."""
    # Otherwise Python would fail again when it flushes these streams at exit.
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table whose columns are aligned, so that it also reads well as plain text."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    lines = [head, tuple("-" * width for width in widths), *rows]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


# ---------------------------------------------------------------------------------------------
# Files


@contextmanager
def write_atomically(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a binary file that appears under its name only when it is complete.

    It is written under another name, flushed to the disk and renamed, so a crash leaves the old
    file or the new one. Raises OSError if the disk is full or the folder is not writable; the old
    file is then untouched.
    """
    path = Path(path)
    # In the same folder, because a rename is atomic only within one file system.
    temporary = path.with_name(path.name + ".tmp")
    try:
        # The data must be on the disk before the rename: the new name could otherwise survive a
        # power cut that the data did not survive.
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_folder(path.parent)
    except OSError as error:
        # If the folder does not exist, neither does the file.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(cannot_write(path, error)) from error
    except BaseException:
        # Any other end of the block, Ctrl-C for example, also leaves no unfinished file.
        temporary.unlink(missing_ok=True)
        raise


def check_output(path: str | None):
    """Raise UserError if no file can be written there, before the work whose result it is to hold.

    None is allowed: there is nothing to write.
    """
    if path is None:
        return
    file = Path(path)
    if file.is_dir():
        raise UserError(f"{file} is a folder: name a file")
    if not file.parent.is_dir():
        raise UserError(f"there is no folder {file.parent} for {file.name}: make it first")


def cannot_write(path: str | Path, error: BaseException) -> str:
    """The message for a file that can't be written, with what to do about it."""
    reason = getattr(error, "strerror", None) or error
    # A full disk, or a quota (which Windows does not have). torch hides the reason.
    is_full = getattr(error, "errno", None) in (errno.ENOSPC, getattr(errno, "EDQUOT", None))
    what_to_do = "make room, then run again" if is_full else "choose another path"
    return f"{path} can't be written ({reason}): {what_to_do}"


def flush_folder(folder: Path):
    """Flush a folder to the disk, so that a rename in it survives a power cut.

    Does nothing where the system cannot do that: Windows opens no folders, and some network file
    systems refuse to flush them.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def read_text(path: str | Path) -> str:
    """Text of a UTF-8 file, or of standard input for "-"; a byte-order mark is dropped.

    UTF-16 with a byte-order mark, as PowerShell writes it, is read too. Raises UserError if the
    file is not text, FileNotFoundError if it does not exist.
    """
    if str(path) == "-":
        # The path only appears in error messages.
        path = Path("/dev/stdin")
        data = sys.stdin.buffer.read()
    elif not Path(path).exists():
        raise FileNotFoundError(f"no file {path}")
    else:
        data = Path(path).read_bytes()
    try:
        return data.decode(encoding_of_text(data))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}, is not UTF-8: convert the file") from error


def encoding_of_text(start: bytes) -> str:
    """The encoding of a text by its first bytes: utf-8-sig, or utf-16 after its byte-order mark."""
    is_utf16 = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return "utf-16" if is_utf16 else "utf-8-sig"


def read_lines(path: str | Path) -> list[str]:
    """Lines of a text file. Unlike str.splitlines, this does not split at form feeds and U+2028."""
    return [line.removesuffix("\r") for line in read_text(path).split("\n")]


def write_text(path: str | Path, text: str):
    """Write a UTF-8 file atomically."""
    with write_atomically(path) as file:
        file.write(text.encode())


def checksum(path: str | Path) -> str:
    """sha256 of a file, in hexadecimal."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def lock_folder(folder: str | Path, wait: float = 0) -> Iterator[None]:
    """Hold the lock of a folder into which only one process may write.

    The system releases it when this process dies, also on network file systems with locks. Raises
    UserError, which names the holder, if the lock is not free within `wait` seconds.
    """
    # The lock itself says nothing about its holder. A second file does, for the error message only.
    from filelock import FileLock, Timeout  # few commands need it, and it imports asyncio

    lock = FileLock(Path(folder) / "lock")
    holder = Path(folder) / "lock_holder.json"
    try:
        lock.acquire(timeout=wait)
    except Timeout as error:
        try:
            owner = "process {pid} on {host}".format(**json.loads(holder.read_text()))
        except (OSError, ValueError, KeyError):  # it has the lock, but has not written this yet
            owner = "another process"
        raise UserError(
            f"{folder} is in use by {owner}: wait for it, or use another one"
        ) from error
    try:
        write_text(holder, json.dumps(dict(host=socket.gethostname(), pid=os.getpid())) + "\n")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()
