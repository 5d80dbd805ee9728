"""The recipes of ``examples/recipes`` run as they stand, and what they train gets better."""

import importlib
import math

import pytest

RECIPES = {
    "plain": None,
    "lightning_module": "lightning",
    "accelerate_loop": "accelerate",
    "hf_trainer": "transformers",
    "torchvision_detector": "torchvision",
    "mmdet_detector": "mmengine",
}


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
