"""The reference lists every public name."""

import importlib
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


def test_the_reference_is_complete() -> None:
    package = set(maskd_triton.__all__) - {"functional"}
    public = {f"maskd_triton.{name}" for name in package}
    for name in MODULES:
        public |= {f"maskd_triton.{name}.{each}" for each in module(name).__all__ if each not in package}
    assert sorted(LISTED) == sorted(public)
