"""Imports go one way: a module imports only what stands before it in ORDER, also inside functions. So there is no circle, and
each can be read without those after it."""

import ast
import fnmatch
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ORDER = """
    _checks _memo _records _distributed shapes _levels
    _eager reference
    kernels kernels.tiles kernels.tuning kernels.launch kernels.pool kernels.distill kernels.learn kernels.autotune
    _ops _ops.library _ops.pool _ops.distill _ops.learn
    functional
    teacher _hooks capture
    tables checkpoints _statistics diagnostics viz
    masks losses
"""


def source_files() -> dict[str, Path]:
    """The files of the installed package by the names of their modules."""
    files = {}
    for folder, package in (("maskd_triton", "maskd_triton"), ("kernels", "maskd_triton.kernels")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            files[".".join([package, *parts]).removesuffix(".__init__")] = path
    return files


FILES = source_files()
RANKS = {name: i for i, name in enumerate([*(f"maskd_triton.{name}" for name in ORDER.split()), "maskd_triton"])}


def imported(code: str, package: str) -> Iterator[str]:
    """The modules of FILES that ``code`` in ``package`` imports, with every one that a call of ``import_module`` could mean."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from FILES.keys() & {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                name = f"{source}.{alias.name}"
                yield from FILES.keys() & {name if name in FILES else source}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            parts = node.args[0].values if isinstance(node.args[0], ast.JoinedStr) else [node.args[0]]
            name = "".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in parts)
            yield from fnmatch.filter(FILES, importlib.util.resolve_name(name, package))


def test_every_module_has_its_place() -> None:
    assert RANKS.keys() == FILES.keys()


@pytest.mark.parametrize("module", FILES)
def test_imports_go_one_way(module: str) -> None:
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    found = set(imported(FILES[module].read_text(), package))
    assert not [name for name in found if RANKS[name] >= RANKS[module]]


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from . import tuning, autotune", {"tuning", "autotune"}),
        ("def f():\n    from .tuning import Key", {"tuning"}),
        ("import maskd_triton.kernels.tuning, os", {"tuning"}),
        ("from maskd_triton.kernels import learn as x", {"learn"}),
        ("importlib.import_module('..kernels.learn', __package__)", {"learn"}),
        ("import_module(f'..kernels.{name}', __package__)", {name.rpartition(".")[2] for name in FILES if ".kernels." in name}),
        ("from os import path\nimport torch", set()),
    ],
)
def test_every_kind_of_import_is_found(code: str, found: set[str]) -> None:
    assert set(imported(code, "maskd_triton.kernels")) == {f"maskd_triton.kernels.{name}" for name in found}
