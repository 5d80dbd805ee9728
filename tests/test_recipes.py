"""The recipes of ``examples/recipes`` run as they stand, and what they train gets better."""

import importlib
import importlib.util
import math
import sys
from pathlib import Path

import pytest

RECIPES = {
    "plain": None,
    "lightning_module": "lightning",
    "accelerate_loop": "accelerate",
    "hf_trainer": "transformers",
    "vit_teacher": "transformers",
    "torchvision_detector": "torchvision",
    "mmdet_detector": "mmengine",
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the frameworks' own
@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name: str) -> None:
    needs = RECIPES[name]
    if needs is not None:
        pytest.importorskip(needs, reason=f"{needs} is not installed")
    losses = importlib.import_module(f"examples.recipes.{name}").main(6)
    assert len(losses) == 6
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_everything_that_vit_teacher_trains_gets_better(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    importlib.import_module("examples.recipes.vit_teacher").main(picture=str(tmp_path / "masks.png"))
    *lines, drawn = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "head",
        "tokens and Dice",
        "student's task",
        "student's masked cosine",
    ]
    for line in lines:
        losses = list(map(float, line.partition(": ")[2].split()))
        assert losses[0] > losses[len(losses) // 2] > losses[-1], line
    if importlib.util.find_spec("matplotlib"):
        assert drawn == f"masks: {tmp_path / 'masks.png'}"
        assert (tmp_path / "masks.png").stat().st_size > 10_000
    else:
        assert "needs matplotlib" in drawn


@pytest.mark.parametrize("name", [name for name, needs in RECIPES.items() if needs])
def test_missing_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says what to install."""
    for loaded in [m for m in sys.modules if m.split(".")[0] == RECIPES[name]]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, RECIPES[name], None)
    monkeypatch.delitem(sys.modules, f"examples.recipes.{name}", raising=False)
    with pytest.raises(ModuleNotFoundError, match=rf"this recipe needs {RECIPES[name]}[\w.]*: pip install "):
        importlib.import_module(f"examples.recipes.{name}")
