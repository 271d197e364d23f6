"""The house rules that can be read off the source: imports point down, files and functions stay small."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "openelm"
ROWS = (
    ("cli",),
    ("release", "lab", "bench", "vllm"),
    ("serve", "evaluate", "train", "convert"),
    ("generate",),
    ("data", "optim", "adapters"),
    ("model",),
    ("kernels", "text"),
    ("config", "files"),
    ("huggingface",),  # for transformers; it imports nothing of ours
    ("errors", "openelm"),  # what everything may use: the errors, and the package itself for its version
)
ROW = {room: row for row, rooms in enumerate(ROWS) for room in rooms}
TORCH_FREE = ("config", "files", "errors", "openelm", "text", "data")
EXEMPT: dict[tuple[str, str], str] = {}
"""(importing room, imported room) -> why this one import breaks the order."""

FILES = sorted(PACKAGE.rglob("*.py"))
FILE_LINES, FUNCTION_LINES = 400, 60


@functools.cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_bytes(), filename=str(file))


def room_of(file: Path) -> str:
    first = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return {"__init__": "openelm", "__main__": "cli"}.get(first, first)


def imported(node: ast.AST, file: Path) -> Iterator[str]:
    """Yield the full dotted names that one statement imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        package = ("openelm", *file.relative_to(PACKAGE).parts[:-1])
        base = package[: len(package) - node.level + 1] if node.level else ()
        module = ".".join((*base, *filter(None, [node.module])))
        yield from (f"{module}.{alias.name}" for alias in node.names)


def rooms_used(file: Path, module: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(module):
        for name in imported(node, file):
            first, *rest = name.split(".")
            if first == "openelm":
                is_module = rest and ((PACKAGE / rest[0]).is_dir() or (PACKAGE / f"{rest[0]}.py").is_file())
                yield node.lineno, rest[0] if is_module else "openelm"  # type: ignore[attr-defined]


def breaks(file: Path, module: ast.Module) -> list[str]:
    room = room_of(file)
    if room not in ROW:
        return [f"{file}: the room {room!r} is not in the plan of the house"]
    return [
        f"{file}:{line}: {room} imports {used}"
        for line, used in rooms_used(file, module)
        if used != room and (used not in ROW or ROW[used] <= ROW[room]) and (room, used) not in EXEMPT
    ]


def names(files: list[Path]) -> list[str]:
    return [str(file.relative_to(PACKAGE)) for file in files]


def test_there_is_something_to_check() -> None:
    assert {"errors", "model", "cli", "openelm"} <= {room_of(file) for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=names(FILES))
def test_imports_point_down(file: Path) -> None:
    assert breaks(file, tree(file)) == []


@pytest.mark.parametrize(
    ("room", "statement", "allowed"),
    [
        ("model", "from openelm.kernels.linear import linear", True),
        ("model", "from openelm.model.plan import LayerPlan", True),
        ("model", "from .plan import LayerPlan", True),
        ("model", "import openelm.data.stream", False),
        ("model", "from openelm import data", False),
        ("model", "from ..data import stream", False),
        ("model", "from .. import data", False),
        ("evaluate", "from openelm.data.manifest import SourceConfig", True),
        ("evaluate", "from openelm.train.run import Run", False),
        ("optim", "def f():\n    from openelm.data import stream", False),
        ("kernels", "from openelm.text import base", False),
        ("cli", "from openelm import __version__", True),
        ("config", "from openelm.errors import ConfigError", True),
        ("config", "from openelm.files.hashes import sha256_bytes", False),
        ("errors", "from openelm.config import Config", False),
        ("attic", "import json", False),
    ],
)
def test_the_check_itself_sees_every_form_of_import(room: str, statement: str, allowed: bool) -> None:
    assert (breaks(PACKAGE / room / "made_up.py", ast.parse(statement)) == []) == allowed


def test_no_exemption_is_stale() -> None:
    used = {(room_of(file), room) for file in FILES for _, room in rooms_used(file, tree(file))}
    assert set(EXEMPT) <= used


@pytest.mark.parametrize("file", FILES, ids=names(FILES))
def test_a_file_can_be_read_in_one_sitting(file: Path) -> None:
    assert len(file.read_text("utf-8").splitlines()) <= FILE_LINES
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(tree(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > FUNCTION_LINES
    ]
    assert long == []


LIGHT_FILES = [file for file in FILES if room_of(file) in TORCH_FREE]


@pytest.mark.parametrize("file", LIGHT_FILES, ids=names(LIGHT_FILES))
def test_light_rooms_do_not_import_torch_at_any_level(file: Path) -> None:
    used = {name.split(".")[0] for node in ast.walk(tree(file)) for name in imported(node, file)}
    assert "torch" not in used


QUIET_FILES = [file for file in FILES if room_of(file) != "cli"]


@pytest.mark.parametrize("file", QUIET_FILES, ids=names(QUIET_FILES))
def test_only_the_command_line_prints_and_exits(file: Path) -> None:
    calls = {ast.unparse(node.func) for node in ast.walk(tree(file)) if isinstance(node, ast.Call)}
    raised = {ast.unparse(node) for node in ast.walk(tree(file)) if isinstance(node, ast.Raise)}
    assert calls.isdisjoint({"print", "exit", "quit", "sys.exit", "os._exit", "SystemExit"})
    assert not any("SystemExit" in text for text in raised)


PICKLE = {"convert/unpickle.py": {"torch.load"}, "convert/corenet.py": {"torch.save"}}
"""Apple's checkpoints are pickles: a child process reads them, and one target is such a file."""


@pytest.mark.parametrize("file", FILES, ids=names(FILES))
def test_nothing_is_pickled_or_executed(file: Path) -> None:
    used = {name.split(".")[0] for node in ast.walk(tree(file)) for name in imported(node, file)}
    assert used.isdisjoint({"pickle", "dill", "cloudpickle", "shelve", "marshal"})
    calls = {ast.unparse(node.func) for node in ast.walk(tree(file)) if isinstance(node, ast.Call)}
    found = calls & {"eval", "exec", "torch.save", "torch.load"}
    assert found == PICKLE.get(str(file.relative_to(PACKAGE)), set())


HEAVY_AFTER = """
import sys
{action}
print(sorted({{"torch", "numpy", "pyarrow", "tokenizers"}} & set(sys.modules)), file=sys.stderr)
"""
HELP = """
from openelm.cli import main
try:
    main(["--help"])
except SystemExit as end:
    assert not end.code
"""


@pytest.mark.parametrize("action", ["import openelm.cli", HELP], ids=["import", "--help"])
def test_the_command_line_starts_without_torch(action: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HEAVY_AFTER.format(action=action)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]"
