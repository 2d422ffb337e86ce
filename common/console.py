"""How a stage speaks with whoever runs it: flags, progress, and one line instead of a traceback.

Every stage is started by `cli(Config, main, __doc__)`. Nothing here needs torch, so that `--help` is quick.
"""

import io
import os
import re
import signal
import sys
import time
import traceback
from contextlib import redirect_stderr

from tqdm import tqdm


class Progress(tqdm):
    """A progress bar on a terminal; a plain line now and then where the output is a file. Only rank 0 shows it."""

    def __init__(self, *args, **kwargs):
        tty = sys.stderr.isatty()
        kwargs.setdefault("disable", int(os.environ.get("RANK", 0)) != 0)
        kwargs.setdefault("leave", tty)
        pace = dict(mininterval=0.2) if tty else dict(mininterval=15, maxinterval=60, delay=1)
        super().__init__(*args, dynamic_ncols=tty, **pace, **kwargs)

    @staticmethod
    def status_printer(file):
        if file.isatty():
            return tqdm.status_printer(file)

        def print_line(text: str):
            if text.strip():
                print(text, file=file, flush=True)

        return print_line


def say(*words):
    """Print a line above the progress bar, if there is one."""
    text = " ".join(map(str, words))
    tqdm.write(text) if sys.stderr.isatty() else print(text, flush=True)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table that is aligned to be read as it is."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    lines = [head, tuple("-" * width for width in widths), *rows]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def cli(config_class, main, doc: str):
    """Run a stage: the fields of its Config are the flags, and what the user can mend ends as one line.

    ValueError and OSError are what our own checks raise; set TRACEBACK=1 to see where.
    """
    try:
        main(parse(config_class, doc))
    except KeyboardInterrupt:
        fail("interrupted", 128 + signal.SIGINT)
    except (ValueError, OSError) as error:
        fail(str(error) or type(error).__name__)
    except (MemoryError, RuntimeError) as error:
        kind = type(error).__name__
        if kind in ("MemoryError", "OutOfMemoryError") or "can't allocate memory" in str(error):
            fail(
                "out of memory: lower B (the global batch stays as it is), then T, n_layer or n_embd"
            )
        if kind.startswith("Dist") or "gloo" in str(error):
            fail("lost the connection to another process; its own message says why")
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            raise
        traceback.print_exc()
        fail(str(error))


def parse(config_class, doc: str):
    """The Config that the command line asks for. A wrong flag ends as one line, too, with exit code 2."""
    import tyro  # late: the worker processes of a stage import this file too

    screen = io.StringIO()
    try:
        with redirect_stderr(screen):
            return tyro.cli(
                config_class,
                description=doc,
                use_underscores=True,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stopped:
        if not stopped.code:
            raise
        # tyro draws a box in colors: a title, what is wrong, and advice, with rules between them.
        plain = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯]", "", screen.getvalue())
        _, wrong, *advice = filter(
            None, (" ".join(part.split()) for part in re.split(r"[─-]{5,}|\n\s*\n", plain))
        )
        similar = re.search(r"you meant: (--\w+)", " ".join(advice))
        hint = f" (perhaps {similar[1]}?)" if similar else ""
        fail(f"{wrong}{hint}; see --help", 2)


def fail(message: str, code: int = 1):
    """End this process with one line. Under torchrun at once, without a clean-up that would wait for other ranks."""
    if os.environ.get("TRACEBACK") and sys.exc_info()[0]:
        traceback.print_exc()
    distributed = int(os.environ.get("WORLD_SIZE", 1)) > 1
    rank = f"rank {os.environ['RANK']}: " if distributed else ""
    if distributed and os.environ["RANK"] != "0":
        time.sleep(
            2
        )  # what rank 0 says too need not be said again: torchrun ends this process before
    print(f"{rank}error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    if distributed:
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
