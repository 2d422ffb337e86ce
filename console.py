"""How a stage speaks with whoever runs it: flags, progress, and one line instead of a traceback.

Every stage is started by `cli(Config, main, __doc__)`. Nothing here needs torch, so that `--help` is quick.
"""

import os
import signal
import sys
import traceback

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


def cli(config_class, main, doc: str):
    """Run a stage: the fields of its Config are the flags, and what the user can mend ends as one line.

    ValueError and OSError are what our own checks raise; set TRACEBACK=1 to see where.
    """
    import tyro  # late: the worker processes of a stage import this file too

    config = tyro.cli(config_class, description=doc, use_underscores=True, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        main(config)
    except KeyboardInterrupt:
        fail("interrupted", 128 + signal.SIGINT)
    except (ValueError, OSError) as error:
        fail(str(error) or type(error).__name__)
    except (MemoryError, RuntimeError) as error:
        kind = type(error).__name__
        if kind in ("MemoryError", "OutOfMemoryError") or "can't allocate memory" in str(error):
            fail("out of memory: lower B (the global batch stays as it is), then T, n_layer or n_embd")
        if kind.startswith("Dist") or "gloo" in str(error):
            fail("lost the connection to another process; its own message says why")
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            raise
        traceback.print_exc()
        fail(str(error))


def fail(message: str, code: int = 1):
    """End this process with one line. Under torchrun at once, without a clean-up that would wait for other ranks."""
    if os.environ.get("TRACEBACK") and sys.exc_info()[0]:
        traceback.print_exc()
    distributed = int(os.environ.get("WORLD_SIZE", 1)) > 1
    rank = f"rank {os.environ['RANK']}: " if distributed else ""
    print(f"{rank}error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    if distributed:
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
