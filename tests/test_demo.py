"""The demo runs from start to end; a smoke run, whose figures mean nothing."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def quick(folder: Path, *options: str) -> str:
    """What a smoke run prints."""
    for package in ("sklearn", "matplotlib", "tqdm", "PIL"):
        pytest.importorskip(package, reason="needs the demo extra")
    command = [sys.executable, "-m", "examples.digits", "--quick", "--out", str(folder), "--device", "cpu", *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout


@pytest.mark.slow
def test_demo_quick(tmp_path: Path) -> None:
    printed = quick(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["test_miou"].keys() == {"student alone", "plain feature MSE", "MasKD", "MasKD - MSE, paired"}
    for name, scores in results["test_miou"].items():
        assert len(scores["per_seed"]) == 2
        assert scores["mean"] == statistics.mean(scores["per_seed"])
        assert f"{scores['mean']:.3f}" in next(line for line in printed.splitlines() if line.strip().startswith(name))
    assert all(0 < score < 1 for name in ("student alone", "MasKD") for score in results["test_miou"][name]["per_seed"])
    assert results["stage1"]["dice"][-1] < results["stage1"]["dice"][0]  # the masks have begun to differ
    plots = pytest.importorskip("matplotlib.image")
    for name in ("masks.png", "curves.png"):
        picture = plots.imread(tmp_path / name)
        assert min(picture.shape[:2]) > 300
        assert picture[..., :3].std() > 0.1  # something is drawn


@pytest.mark.slow
def test_standardizations_quick(tmp_path: Path) -> None:
    """Every kind of features of both teachers, which are one function."""
    printed = quick(tmp_path, "--standardize").splitlines()
    results = json.loads((tmp_path / "standardize.json").read_text())
    runs = results["runs"]
    assert len({(run["channels"], run["standardize"], run["seed"]) for run in runs}) == len(runs) == 2 * 3 * 2
    for run in runs:
        assert 0 <= run["lost"] <= 18
        assert 0 <= run["ruled"] <= 3
        assert run["task_loss"] > 0
    assert sum(line.startswith(("| as trained |", "| 100 : 1 |")) for line in printed) == 6
    # once standardised per channel, both teachers have the same features
    per_channel = [run for run in runs if run["standardize"] == '"channel"']
    for one, other in zip(per_channel[:2], per_channel[2:], strict=True):
        assert one["task_loss"] == pytest.approx(other["task_loss"], rel=0.05)
