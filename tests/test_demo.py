"""The demo runs from start to end; a smoke run, whose figures mean nothing."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_demo_quick(tmp_path: Path) -> None:
    for package in ("sklearn", "matplotlib", "tqdm", "PIL"):
        pytest.importorskip(package, reason="needs the demo extra")
    command = [sys.executable, "-m", "examples.digits", "--quick", "--out", str(tmp_path), "--device", "cpu"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["test_miou"].keys() == {"student alone", "plain feature MSE", "MasKD", "MasKD - MSE, paired"}
    for name, scores in results["test_miou"].items():
        assert len(scores["per_seed"]) == 2
        assert scores["mean"] == statistics.mean(scores["per_seed"])
        assert f"{scores['mean']:.3f}" in next(line for line in run.stdout.splitlines() if line.strip().startswith(name))
    assert all(0 < score < 1 for name in ("student alone", "MasKD") for score in results["test_miou"][name]["per_seed"])
    assert results["stage1"]["dice"][-1] < results["stage1"]["dice"][0]  # the masks have begun to differ
    plots = pytest.importorskip("matplotlib.image")
    for name in ("masks.png", "curves.png"):
        picture = plots.imread(tmp_path / name)
        assert min(picture.shape[:2]) > 300
        assert picture[..., :3].std() > 0.1  # something is drawn
