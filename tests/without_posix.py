"""Runs scripts in a Python that lacks what Windows or macOS lack; a helper of test_portability.py.

python tests/without_posix.py modules            # import every module of the repository
python tests/without_posix.py sample.py --help   # run a script
"""

import builtins
import errno
import importlib
import os
import runpy
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

MISSING_MODULES = ("fcntl", "resource", "pwd", "grp", "termios")
MISSING = {
    os: "sched_getaffinity killpg getpgid setsid fork O_DIRECTORY set_blocking".split(),
    signal: "pthread_sigmask SIGHUP SIGUSR1 SIGUSR2 SIGKILL alarm".split(),
}


def remove_posix():
    """Our modules cannot import MISSING_MODULES, nothing has the attributes in MISSING, and folders
    cannot be opened, so not flushed either."""
    system_import = builtins.__import__

    def import_module(name, globals=None, *more, **options):
        # The libraries decide by sys.platform what to import. That is their business.
        path = Path((globals or {}).get("__file__") or "/")
        if name in MISSING_MODULES and path.is_relative_to(ROOT) and ".venv" not in path.parts:
            raise ModuleNotFoundError(f"{path} imports {name}, which this system lacks")
        return system_import(name, globals, *more, **options)

    builtins.__import__ = import_module
    for module, names in MISSING.items():
        for name in names:
            delattr(module, name)

    system_open = os.open

    def open_file(path, flags, *more, **options):
        if isinstance(path, (str, os.PathLike)) and os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return system_open(path, flags, *more, **options)

    os.open = open_file


def modules() -> list[str]:
    """The names of all modules of the repository, except tests."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/*.py")]
    names = []
    for path in paths:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] != "tests" and (ROOT / parts[0] / "__init__.py").exists() or len(parts) == 1:
            names.append(".".join(parts).removesuffix(".__init__"))
    return sorted(names)


if __name__ == "__main__":
    remove_posix()
    sys.path.insert(0, str(ROOT))
    sys.argv = sys.argv[1:]
    if sys.argv == ["modules"]:
        for name in modules():
            importlib.import_module(name)
            print(name)
    else:
        runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
