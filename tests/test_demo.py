"""The demo runs from start to end, with few steps, so that its figures mean nothing."""

import json
import re
import statistics
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def demo_extra() -> None:
    for package in ("sklearn", "matplotlib", "tqdm", "PIL"):
        pytest.importorskip(package, reason="needs the demo extra")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:MaskLearner, level")
def test_demo_quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from matplotlib import image

    from examples import digits

    fewer = digits.Settings(scenes=(96, 32, 32), teacher_steps=8, token_steps=8, student_steps=4, seeds=2)
    monkeypatch.setattr(digits, "QUICK", fewer)
    digits.main(["--quick", "--out", str(tmp_path), "--device", "cpu"])
    printed = capsys.readouterr().out
    assert re.search(r"\d+ of \d+ threads: about \d+ minutes in all", printed)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["test_miou"].keys() == {"student alone", "plain feature MSE", "MasKD", "MasKD - MSE, paired"}
    for name, scores in results["test_miou"].items():
        assert len(scores["per_seed"]) == 2
        assert scores["mean"] == statistics.mean(scores["per_seed"])
        assert f"{scores['mean']:.3f}" in next(line for line in printed.splitlines() if line.strip().startswith(name))
    assert results["stage1"]["dice"][-1] < results["stage1"]["dice"][0]  # the masks have begun to differ
    for name in ("students.png", "masks.png", "curves.png"):
        picture = image.imread(tmp_path / name)
        assert min(picture.shape[:2]) > 300
        assert picture[..., :3].std() > 0.1  # something is drawn


@pytest.mark.slow
def test_time_of_stage_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from examples import stage1_time

    monkeypatch.setattr(stage1_time, "ROUNDS", 1)
    threads = torch.get_num_threads()
    stage1_time.main()
    torch.set_num_threads(threads)
    rows = capsys.readouterr().out.splitlines()[1:]
    assert len(rows) == 3
    assert all(float(row.split()[-1]) > 0 for row in rows)


def test_the_page_has_the_table_of_layers() -> None:
    from examples import layers

    results = json.loads(layers.FILE.read_text())
    assert results["settings"] == layers.SETTINGS.__dict__ | {"scenes": list(layers.SETTINGS.scenes)}
    page = (layers.FILE.parents[2] / "docs/demo.md").read_text()
    assert f"<!-- layers -->\n\n{layers.table(results['runs'], results['settings']['seeds'])}\n\n<!-- end -->" in page
    assert f"test mIoU {results['teacher']['test']:.3f})" in page


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:MaskLearner, level", "ignore:pretrained")
def test_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every layer is captured in both models; what a file holds is not run again."""
    from examples import layers

    fewer = layers.Settings(scenes=(64, 32, 32), teacher_steps=2, token_steps=2, student_steps=2, seeds=2)
    monkeypatch.setattr(layers, "WEIGHTS", (10,))
    layers.main(["--out", str(tmp_path / "layers.json")], fewer)
    rows = re.findall(r"^\| (.+?) \| \d+ \| 0\.\d+ ± 0\.\d+ \|", capsys.readouterr().out, re.M)
    assert rows == [layers.ALONE, *layers.LAYERS]
    runs = json.loads((tmp_path / "layers.json").read_text())["runs"]
    assert len(runs) == 3 * len(rows)
    monkeypatch.setattr(layers, "train_student", None)
    layers.main(["--out", str(tmp_path / "layers.json")], fewer)
