"""What holds on every Triton of the window, and how the tests say that they do not know a newer one."""

import re
from types import SimpleNamespace

import pytest
from helpers import require_private

triton = pytest.importorskip("triton", reason="triton is not installed")


def test_a_patch_that_does_not_fit_names_the_attribute() -> None:
    interpreter = SimpleNamespace(__name__="triton.runtime.interpreter", _patch_lang=None)
    require_private(interpreter, "_patch_lang")
    sentence = f"the tests patch triton.runtime.interpreter._implicit_cvt, which Triton {triton.__version__} does not have"
    with pytest.raises(RuntimeError, match=re.escape(sentence)):
        require_private(interpreter, "_patch_lang", "_implicit_cvt")
