"""The benchmark's commands run, and what they write can be believed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import measure

ROOT = Path(__file__).parents[1]


def run(*arguments: str, code: int = 0) -> str:
    result = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == code, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


def test_command(tmp_path: Path) -> None:
    shown = run("-m", "bench", "tiny", "--device", "cpu", "--seconds", "0.02", "--out", str(tmp_path / "out.json"))
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert results["command"].startswith("python -m bench tiny")
    assert {"date", "commit", "device", "threads", "left_out"} <= results.keys()
    rows = {(r["contender"], r["mode"]): r for r in results["rows"]}
    assert {c for c, _ in rows} == {"ours", "literal", "collapsed", "feature MSE"}
    for (contender, mode), row in rows.items():
        assert 0 < row["lower_ms"] <= row["median_ms"] <= row["upper_ms"]
        assert row["ideal_bytes"] == (3 if mode == "forward+backward" else 2) * 2 * 256 * 7 * 7 * 4
        assert f"{row['median_ms']:.3f}" in shown
        if contender in ("ours", "collapsed"):
            assert row["result_error"] < 1e-6
            assert row["gradient_error"] < 1e-6
    ours, literal = (rows[c, "forward+backward"]["peak_extra_bytes"] for c in ("ours", "literal"))
    gradient = 2 * 256 * 7 * 7 * 4
    assert gradient <= ours < literal / 4


def test_stage_1(tmp_path: Path) -> None:
    run("-m", "bench", "tiny", "--stage", "1", "--device", "cpu", "--seconds", "0.02", "--out", str(tmp_path / "out.json"))
    rows = {(r["contender"], r["mode"]): r for r in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert {c for c, _ in rows} == {"ours", "literal", "collapsed"}
    for (contender, mode), row in rows.items():
        assert row["workload"] == "stage 1: tiny N2 fp32 nchw"
        assert 0 < row["lower_ms"] <= row["median_ms"] <= row["upper_ms"]
        assert row["ideal_bytes"] == (4 if mode == "forward+backward" else 2) * 2 * 256 * 7 * 7 * 4
        assert row["result_error"] < 1e-6, contender
        assert row["gradient_error"] < 1e-5, contender
    ours, literal = (rows[c, "forward"]["peak_extra_bytes"] for c in ("ours", "literal"))
    assert 2 * 256 * 7 * 7 * 4 <= ours < literal


def test_unknown_workload() -> None:
    result = subprocess.run([sys.executable, "-m", "bench", "fpm"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "workloads: expected some of fpn," in result.stderr


def test_memory_is_counted_exactly() -> None:
    def call() -> torch.Tensor:
        a = torch.ones(1000, 250)
        b = a + 1
        del a
        return b * 2  # two arrays of a megabyte live at a time

    assert 2_000_000 <= measure.peak_bytes(call, torch.device("cpu")) < 2_001_000


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_gpu_visit_without_a_gpu(tmp_path: Path) -> None:
    assert "torch sees no GPU here" in run("-m", "bench.gpu_visit", "--out", str(tmp_path / "visit"), code=2)
    assert not (tmp_path / "visit").exists()


def test_host(tmp_path: Path) -> None:
    shown = run("-m", "bench.host", "--out", str(tmp_path / "host.json"))
    results = json.loads((tmp_path / "host.json").read_text())
    assert results["launches"] is torch.cuda.is_available()
    assert set(results["microseconds"]) == {"criterion", "criterion, unseen sizes", "two custom_op calls"}
    for name, value in results["microseconds"].items():
        assert f"{name:24s} {value:6.0f} us" in shown
        assert 10 < value < 1e5
    if not results["launches"]:  # measured equal; a shared machine is not quiet enough for more
        assert results["microseconds"]["criterion"] < 1.5 * results["microseconds"]["two custom_op calls"]
