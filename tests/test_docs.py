"""The reference lists every public name; every docstring says what each argument is, and its examples run."""

import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest

import maskd_triton

LISTED = re.findall(r"^::: (\S+)$", (Path(__file__).parents[1] / "docs/api.md").read_text(), re.M)
MODULES = [module.name for module in pkgutil.iter_modules(maskd_triton.__path__) if not module.ispkg]


def module(name: str) -> Any:
    if name == "viz":
        pytest.importorskip("matplotlib", reason="needs the viz extra")
    return importlib.import_module(f"maskd_triton.{name}")


def test_the_reference_is_complete() -> None:
    package = {name for name in maskd_triton.__all__ if name not in MODULES}
    public = {f"maskd_triton.{name}" for name in package}
    for name in MODULES:
        if not name.startswith("_"):
            public |= {f"maskd_triton.{name}.{each}" for each in module(name).__all__ if each not in package}
    assert sorted(LISTED) == sorted(public)


def documented(name: str) -> dict[str, Any]:
    """What a full name means and, of a class, its public methods."""
    first, _, rest = name.removeprefix("maskd_triton.").partition(".")
    value = getattr(module(first), rest) if rest else getattr(maskd_triton, first)
    members = vars(value) if inspect.isclass(value) and not issubclass(value, tuple) else {}
    return {name: value} | {k: v for k, v in members.items() if inspect.isfunction(v) and not k.startswith("_") and v.__doc__}


# the reference module states formulas, whose letters are its arguments
@pytest.mark.parametrize("listed", [name for name in LISTED if ".reference." not in name])
def test_docstrings(listed: str) -> None:
    for name, value in documented(listed).items():
        docstring = inspect.getdoc(value) or ""
        is_record = dataclasses.is_dataclass(value) or (inspect.isclass(value) and issubclass(value, tuple))
        if is_record:
            expected = list(vars(value)["__annotations__"])
        else:
            expected = [name for name in inspect.signature(value).parameters if name not in ("self", "args", "kwargs")]
        section = re.search(rf"^{'Attributes' if is_record else 'Args'}:\n((?:    .*\n|\n)*)", docstring + "\n", re.M)
        assert (re.findall(r"^    (\w+):", section[1], re.M) if section else []) == expected, name
        if name == listed and not is_record:
            assert re.search(r"^Examples:\n    >>> ", docstring, re.M), name


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore:MaskedDistillLoss without pretrained")
def test_examples_in_docstrings(name: str) -> None:
    assert doctest.testmod(module(name)).failed == 0
