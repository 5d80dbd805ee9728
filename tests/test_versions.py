"""What holds on every Triton of the window, and how the tests say that they do not know a newer one."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import require_private

from tests import grid

triton = pytest.importorskip("triton", reason="triton is not installed")


def test_a_patch_that_does_not_fit_names_the_attribute() -> None:
    interpreter = SimpleNamespace(__name__="triton.runtime.interpreter", _patch_lang=None)
    require_private(interpreter, "_patch_lang")
    sentence = f"the tests patch triton.runtime.interpreter._implicit_cvt, which Triton {triton.__version__} does not have"
    with pytest.raises(RuntimeError, match=re.escape(sentence)):
        require_private(interpreter, "_patch_lang", "_implicit_cvt")


def test_the_grid_holds_the_oldest_and_the_pinned_versions() -> None:
    root = Path(__file__).parents[1]
    pinned = dict(re.findall(r"^(torch|triton)==(\S+)", (root / "constraints.txt").read_text(), re.M))
    oldest = dict(re.findall(r'"(torch|triton)>=([\d.]+)', (root / "pyproject.toml").read_text()))
    assert f"triton=={pinned['triton']}" in grid.TORCHES[pinned["torch"]]
    torch = min(grid.TORCHES, key=lambda version: [int(part) for part in version.split(".")])
    assert torch.startswith(f"{oldest['torch']}.")
    assert any(wanted.startswith(f"triton=={oldest['triton']}.") for wanted in grid.TORCHES[torch])
