"""The reference lists every public name, and every docstring says what each argument is and shows an example."""

import dataclasses
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest

import maskd_triton

ROOT = Path(__file__).parents[1]
LISTED = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), re.M)
MODULES = [m.name for m in pkgutil.iter_modules(maskd_triton.__path__) if not m.name.startswith("_") and m.name != "kernels"]


def module(name: str) -> Any:
    if name == "viz":
        pytest.importorskip("matplotlib", reason="needs the viz extra")
    return importlib.import_module(f"maskd_triton.{name}")


def found(name: str) -> Any:
    """What a full name means."""
    first, _, rest = name.removeprefix("maskd_triton.").partition(".")
    return getattr(module(first), rest) if rest else getattr(maskd_triton, first)


def test_a_broken_link_fails_the_build() -> None:
    settings = (ROOT / "mkdocs.yml").read_text()
    assert re.search(r"^strict: true$", settings, re.M)
    assert re.search(r"^  links: \{not_found: warn, anchors: warn", settings, re.M)
    build = re.search(r"mkdocs build.*", (ROOT / "Makefile").read_text())
    assert build is not None
    assert build[0] == "mkdocs build"  # --quiet would hide warnings from strict


def test_the_reference_is_complete() -> None:
    package = set(maskd_triton.__all__) - {"functional"}
    public = {f"maskd_triton.{name}" for name in package}
    for name in MODULES:
        public |= {f"maskd_triton.{name}.{each}" for each in module(name).__all__ if each not in package}
    assert sorted(LISTED) == sorted(public)


def public_methods(name: str) -> list[tuple[str, Any]]:
    value = found(name)
    members = vars(value).items() if inspect.isclass(value) and not issubclass(value, tuple) else ()
    shown = [(f"{name}.{k}", v) for k, v in members if inspect.isfunction(v) and not k.startswith("_") and v.__doc__]
    return [(name, value), *shown]


# the reference module states formulas, whose letters are its arguments
DESCRIBED = [name for name in LISTED if ".reference." not in name]


@pytest.mark.parametrize("name", DESCRIBED)
def test_docstrings_name_every_argument(name: str) -> None:
    for full_name, value in public_methods(name):
        docstring = inspect.getdoc(value)
        assert docstring, full_name
        if dataclasses.is_dataclass(value) or (inspect.isclass(value) and issubclass(value, tuple)):
            section, expected = "Attributes", list(vars(value)["__annotations__"])
        else:
            section = "Args"
            expected = [name for name in inspect.signature(value).parameters if name not in ("self", "args", "kwargs")]
        block = re.search(rf"^{section}:\n((?:    .*\n|\n)*)", docstring + "\n", re.M)
        listed = re.findall(r"^    (\w+):", block[1], re.M) if block else []
        assert listed == expected, full_name


@pytest.mark.parametrize("name", DESCRIBED)
def test_docstrings_show_an_example(name: str) -> None:
    value = found(name)
    if not dataclasses.is_dataclass(value):
        assert re.search(r"^Examples:\n    >>> ", inspect.getdoc(value) or "", re.M)


def test_docstrings_are_google_s() -> None:
    """Sections stand on lines of their own, and names in backticks, without Sphinx's roles, in private modules, too."""
    for path in (ROOT / "maskd_triton").rglob("*.py"):
        assert not re.search(r":(func|class|meth|data|attr|mod):`", path.read_text()), path
    for name in LISTED:
        for full_name, value in public_methods(name):
            docstring = inspect.getdoc(value) or ""
            assert not re.search(r"^(Args|Returns|Raises)(:| ).*\S$(?<!:)", docstring, re.M), full_name
