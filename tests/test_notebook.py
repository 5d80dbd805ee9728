"""The notebook's cells run, in their order, in one namespace: with fewer steps than it takes, and without Jupyter.

What it shows was stored by a full run in Jupyter; here only few steps are taken, so that the scores mean nothing.
"""

import base64
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
CELLS = json.loads((ROOT / "examples/quickstart.ipynb").read_text())["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_it_has_ten_cells_with_pictures() -> None:
    assert len(CODE) == 10
    outputs = [output for cell in CELLS for output in cell.get("outputs", [])]
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 3
    assert sum(len(base64.b64decode(picture)) for picture in pictures) < 600_000
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert [cell["execution_count"] for cell in CELLS if cell["cell_type"] == "code"] == list(range(1, 11))


@pytest.mark.slow
def test_its_cells_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="needs the demo extra")
    pytest.importorskip("sklearn", reason="needs the demo extra")
    pyplot.switch_backend("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the first cell adds to it
    names: dict[str, Any] = {}
    before = torch.random.get_rng_state()
    for code in CODE:
        few, count = re.subn(r"steps=\d+", "steps=3", code)
        assert count == ("fit(" in code and "def fit" not in code)
        exec(re.sub(r'make_scenes\("(\w+)", \d+\)', r'make_scenes("\1", 40)', few), names)
    torch.random.set_rng_state(before)
    pyplot.close("all")
    assert (tmp_path / "tokens.pt").exists()
    assert all(len(names[losses]) == 3 for losses in ("losses", "distilled_losses", "alone_losses"))
    assert names["criterion"].warmup_step == 3
