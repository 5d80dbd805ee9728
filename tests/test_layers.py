"""Imports go one way, also inside functions: there is no circle, so each module can be read without those that need it."""

import ast
import fnmatch
import graphlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


def source_files() -> dict[str, Path]:
    """The files of the installed package by the names of their modules."""
    files = {}
    for folder, package in (("maskd_triton", "maskd_triton"), ("kernels", "maskd_triton.kernels")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            files[".".join([package, *parts]).removesuffix(".__init__")] = path
    return files


FILES = source_files()


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


def test_imports_go_one_way() -> None:
    graph = {}
    for module, path in FILES.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        graph[module] = set(imported(path.read_text(), package)) - {module}
    assert graph["maskd_triton"] >= {"maskd_triton.losses", "maskd_triton.masks"}  # imports are found
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which shows the circle
