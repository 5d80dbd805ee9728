"""What the picture of the masks shows: the masks themselves, their numbers, and text that stays inside and apart."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from maskd_triton.diagnostics import describe

pytest.importorskip("matplotlib", reason="needs the viz extra")
from maskd_triton.viz import plot_masks

PROGRAMS = Path(__file__).parent / "programs"


def drawn(n: int = 2, tokens: int = 3, sides: tuple[tuple[int, int], ...] = ((6, 8), (3, 4))) -> dict[str, Any]:
    g = torch.Generator().manual_seed(n + tokens)
    return {
        "images": torch.rand(n, 3, 24, 32, generator=g),
        "masks": [torch.rand(n, tokens, h, w, generator=g) for h, w in sides],
        "weights": [torch.rand(n, tokens, generator=g).softmax(1) for _ in sides],
    }


def parts(figure: Any, n: int, tokens: int, levels: int) -> tuple[list[list[Any]], list[Any], Any]:
    """The axes: for each level and image the image and its masks; the Dice matrix of each level, if there are several tokens;
    the colour bar."""
    axes = iter(figure.axes)
    rows, dice = [], []
    for _ in range(levels):
        rows += [[next(axes) for _ in range(1 + tokens)] for _ in range(n)]
        dice += [next(axes)] if tokens > 1 else []
    bar = next(axes)
    assert not list(axes)
    return rows, dice, bar


def shown(axis: Any) -> np.ndarray:
    """The data of the image that lies on top."""
    return np.asarray(axis.images[-1].get_array())


@pytest.mark.slow
@pytest.mark.parametrize(("n", "tokens"), [(1, 1), (2, 3), (2, 13)])
def test_shows_images_masks_and_numbers(n: int, tokens: int) -> None:
    given = drawn(n, tokens)
    figure = plot_masks(**given)
    rows, dice, bar = parts(figure, n, tokens, levels=2)
    assert bar.get_ylabel() == "mask value"
    for level, (masks, weights) in enumerate(zip(given["masks"], given["weights"], strict=True)):
        for i in range(n):
            picture, *tiles = rows[level * n + i]
            assert picture.get_title() == f"image {i}"
            assert picture.get_ylabel() == f"level {level}: " + ("6x8", "3x4")[level]
            np.testing.assert_array_equal(shown(picture), given["images"][i].permute(1, 2, 0))
            for t, axis in enumerate(tiles):
                grey, overlay = axis.images
                np.testing.assert_allclose(np.asarray(grey.get_array()), given["images"][i].mean(0), rtol=1e-6)
                np.testing.assert_array_equal(shown(axis), masks[i, t])
                assert tuple(overlay.get_extent()) == (0, 32, 24, 0)
                assert overlay.get_clim() == (0, 1)
                assert axis.get_title() == f"token {t}\nw {weights[i, t].item():.2f}   c {masks[i, t].mean().item():.2f}"
            lefts = [axis.get_position().x0 for axis in rows[level * n + i]]
            assert lefts == sorted(lefts)
            bold = [axis.title.get_fontweight() == "bold" for axis in tiles]
            assert bold == [t == weights[i].argmax() for t in range(tokens)]
        if tokens == 1:
            assert not dice
            continue
        expected = describe(masks).dice
        np.testing.assert_array_equal(shown(dice[level]), expected)
        numbers = {text.get_position(): text.get_text() for text in dice[level].texts}
        assert len(numbers) == (tokens**2 if tokens <= 12 else 0)
        for (j, i), number in numbers.items():
            assert abs(float(number) - expected[i, j].item()) < 0.00501


def test_without_weights() -> None:
    given = drawn() | {"weights": None}
    rows, _, _ = parts(figure := plot_masks(**given), n=2, tokens=3, levels=2)
    assert rows[0][1].get_title() == f"token 0\nc {given['masks'][0][0, 0].mean().item():.2f}"
    assert not any(axis.title.get_fontweight() == "bold" for axis in figure.axes)
    assert "weight" not in figure.texts[0].get_text()


def test_normalised_images() -> None:
    given = drawn()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    shift, scale = (torch.tensor(v)[:, None, None] for v in (mean, std))
    figure = plot_masks(**given | {"images": (given["images"] - shift) / scale}, mean=mean, std=std)
    np.testing.assert_allclose(shown(figure.axes[0]), given["images"][0].permute(1, 2, 0), atol=1e-6)


def test_names_and_levels_with_different_numbers_of_tokens() -> None:
    images, masks = torch.rand(1, 3, 8, 8), [torch.rand(1, 5, 4, 4), torch.rand(1, 2, 2, 2)]
    figure = plot_masks(images, masks, names=["p3", "p4"])
    assert [a.get_ylabel() for a in figure.axes if "p" in a.get_ylabel()] == ["p3: 4x4", "p4: 2x2"]
    assert len(figure.axes) == (1 + 5 + 1) + (1 + 2 + 1) + 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_and_gradients(dtype: torch.dtype) -> None:
    given = drawn()

    def cast(x: Tensor) -> Tensor:
        return x.to(dtype).requires_grad_()

    masks = [cast(m) for m in given["masks"]]
    figure = plot_masks(cast(given["images"]), masks, [cast(w) for w in given["weights"]])
    rows, _, _ = parts(figure, n=2, tokens=3, levels=2)
    np.testing.assert_array_equal(shown(rows[3][2]), masks[1][1, 1].detach().double())


LAYOUTS = {
    "demo": drawn(2, 6, ((20, 20), (10, 10), (5, 5))),
    "one_token": drawn(1, 1, ((6, 8),)),
    "many_tokens": drawn(2, 19, ((6, 8),)),
    "tall": drawn(2, 4) | {"images": torch.rand(2, 3, 64, 16)},
}


@pytest.mark.slow
@pytest.mark.parametrize("given", LAYOUTS.values(), ids=LAYOUTS)
def test_nothing_is_clipped_and_no_text_overlaps(given: dict[str, Any]) -> None:
    figure = plot_masks(**given)
    figure.set_dpi(1200 / figure.get_figwidth())
    figure.draw_without_rendering()
    whole = figure.bbox
    pictures = [axis.get_window_extent() for axis in figure.axes]
    texts = [*figure.texts, *(axis.title for axis in figure.axes), *(axis.yaxis.label for axis in figure.axes)]
    for axis in figure.axes:
        texts += [*axis.texts, *axis.get_xticklabels(), *axis.get_yticklabels()]
    texts = [text for text in texts if text.get_text()]
    boxes = [text.get_window_extent() for text in texts]
    assert len(boxes) > 5
    for box in boxes + pictures:
        assert whole.x0 <= box.x0 < box.x1 <= whole.x1
        assert whole.y0 <= box.y0 < box.y1 <= whole.y1
    for a in range(len(boxes)):
        for b in range(a):
            assert not overlap(boxes[a], boxes[b]), (texts[a].get_text(), texts[b].get_text())
    assert not any(overlap(pictures[a], pictures[b]) for a in range(len(pictures)) for b in range(a))


def overlap(a: Any, b: Any) -> bool:
    """More than touching: a pixel in both directions."""
    return min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no_batch": ({"images": torch.rand(3, 8, 8)}, r"images: expected \[N, 3, H, W\].*\[3, 8, 8\]"),
    "normalised": ({"images": torch.full((2, 3, 8, 8), -1.5)}, r"values in \[0, 1\], got -1\.50 to -1\.50; give the mean="),
    "bytes": ({"images": torch.full((2, 3, 8, 8), 255)}, r"values in \[0, 1\], got 255"),
    "wrong_mean": ({"mean": (9.0,) * 3, "std": (1.0,) * 3}, r"values in \[0, 1\] after mean= and std="),
    "mean_alone": ({"mean": (0.5,) * 3}, "mean and std: expected both"),
    "two_numbers": ({"mean": (0.5,) * 2, "std": (0.5,) * 2}, "mean and std: expected three numbers each"),
    "no_level": ({"masks": []}, "masks: expected at least one level"),
    "other_batch": ({"masks": [torch.rand(1, 3, 4, 4)] * 2}, r"masks\[0\]: expected .* for 2 images, got shape \[1, 3, 4, 4\]"),
    "levels": ({"weights": [torch.rand(2, 3)]}, "weights: expected one for each of the 2 levels, got 1"),
    "names": ({"names": ["a"]}, "names: expected one for each of the 2 levels, got 1"),
    "weights": ({"weights": [torch.rand(2, 3), torch.rand(2, 4)]}, r"weights\[1\]: expected shape \[2, 3\], as masks\[1\]"),
}


@pytest.mark.parametrize(("changed", "sentence"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(changed: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        plot_masks(**drawn() | changed)


@pytest.mark.slow
def test_neither_pyplot_nor_a_backend_is_touched(tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAMS / "picture.py"), str(tmp_path / "masks.png")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "masks.png").stat().st_size > 5000


@pytest.mark.slow
def test_without_matplotlib() -> None:
    command = [sys.executable, str(PROGRAMS / "without.py"), "matplotlib"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    sentence = "plot_masks needs matplotlib, which is not installed: pip install matplotlib"
    assert result.stdout.strip() == f"matplotlib {sentence}"
