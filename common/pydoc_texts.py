"""Python's own documentation as texts: enough for a small model, and on every machine."""

import ast
import sysconfig
from functools import lru_cache
from pathlib import Path

# Folders below the library that hold packages installed later, tests, and old or generated code
SKIPPED_FOLDERS = set(
    "site-packages dist-packages test tests idle_test lib2to3 pydoc_data __pycache__".split()
)


@lru_cache
def pydoc_texts() -> list[str]:
    """Python's help topics and the docstrings of the standard library, sorted by name; 2 MB.

    A document is a topic, or all docstrings of a module. Modules are parsed, never imported.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    topics = help_topics(library)
    # Path below the library -> file, for example "json/decoder.py"
    modules = {}
    for path in library.rglob("*.py"):
        relative = path.relative_to(library)
        if not SKIPPED_FOLDERS & set(relative.parts):
            modules[relative.as_posix()] = path

    # Sorted, because rglob's order depends on the file system.
    texts = []
    for name in sorted([*modules, *topics], key=str.lower):
        text = docstrings(modules[name]) if name in modules else topics[name].strip()
        if text:
            texts.append(text)
    return texts


def help_topics(library: Path) -> dict[str, str]:
    """The topics of Python's `help()`: name -> text."""
    path = library / "pydoc_data" / "topics.py"
    # Minimal installations of Python can lack the topics.
    if not path.exists():
        return {}
    # The file is one assignment of a dict.
    statements = ast.parse(path.read_text("utf-8")).body
    assignment = next(s for s in statements if isinstance(s, ast.Assign))
    return ast.literal_eval(assignment.value)


def docstrings(path: Path) -> str:
    """The docstrings of a module, its classes and its functions."""
    # Not every file there is valid Python for this version.
    try:
        # Bytes, because a file can declare its own encoding in its first lines.
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return ""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(tree) if isinstance(node, documented))
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))
