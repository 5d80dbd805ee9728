"""The benchmark's commands run, and what they write can be believed."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import __main__ as bench
from bench import gpu_visit, measure, official, plots
from bench import workloads as workloads_module

ROOT = Path(__file__).parents[1]


def run(*arguments: str, code: int = 0) -> str:
    result = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == code, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


@pytest.mark.slow
def test_command(tmp_path: Path) -> None:
    shown = run("-m", "bench", "tiny", "--device", "cpu", "--seconds", "0.02", "--out", str(tmp_path / "out.json"))
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert results["command"].startswith("python -m bench tiny")
    assert {"date", "commit", "device", "threads", "left_out"} <= results.keys()
    assert 0.1 < results["copy_gb_per_s"] < 1e5
    assert f"copy: {results['copy_gb_per_s']:.1f} GB/s" in shown
    rows = {(r["contender"], r["mode"]): r for r in results["rows"]}
    assert {c for c, _ in rows} == {"ours", "literal", "plain", "feature MSE"}
    for (contender, mode), row in rows.items():
        assert 0 < row["lower_ms"] <= row["median_ms"] <= row["upper_ms"]
        assert row["ideal_bytes"] == (3 if mode == "forward+backward" else 2) * 2 * 256 * 7 * 7 * 4
        assert f"{row['median_ms']:.3f}" in shown
        if contender in ("ours", "plain"):
            assert row["result_error"] < 1e-6
            assert row["gradient_error"] < 1e-6
    ours, literal = (rows[c, "forward+backward"]["peak_extra_bytes"] for c in ("ours", "literal"))
    gradient = 2 * 256 * 7 * 7 * 4
    assert gradient <= ours < literal / 4


@pytest.mark.slow
def test_stage_1(tmp_path: Path) -> None:
    run("-m", "bench", "tiny", "--stage", "1", "--device", "cpu", "--seconds", "0.02", "--out", str(tmp_path / "out.json"))
    rows = {(r["contender"], r["mode"]): r for r in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert {c for c, _ in rows} == {"ours", "literal", "plain"}
    for (contender, mode), row in rows.items():
        assert row["workload"] == "stage 1: tiny N2 fp32 nchw"
        assert 0 < row["lower_ms"] <= row["median_ms"] <= row["upper_ms"]
        assert row["ideal_bytes"] == (4 if mode == "forward+backward" else 2) * 2 * 256 * 7 * 7 * 4
        assert row["result_error"] < 1e-6, contender
        assert row["gradient_error"] < 1e-5, contender
    ours, literal = (rows[c, "forward"]["peak_extra_bytes"] for c in ("ours", "literal"))
    assert 2 * 256 * 7 * 7 * 4 <= ours < literal


@pytest.mark.slow
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


def test_memory_of_a_step_does_not_depend_on_the_one_before() -> None:
    """The gradient of an earlier call, freed within the next one, once halved the figure, or not, by chance."""
    inputs = workloads_module.make_inputs(workloads_module.WORKLOADS["tiny"], torch.device("cpu"))
    gradient = 2 * 256 * 7 * 7 * 4
    call = functools.partial(bench.step, bench.chosen(2, torch.device("cpu"), False)[0]["feature MSE"], inputs, True)
    peaks = [measure.peak_bytes(call, torch.device("cpu"), inputs.forget) for _ in range(4)]
    assert len(set(peaks)) == 1
    assert 2 * gradient <= peaks[0] < 3 * gradient  # gradient and difference


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_gpu_visit_without_a_gpu() -> None:
    assert "torch sees no GPU here" in run("-m", "bench.gpu_visit", code=2)


def test_a_visit_in_order(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A part that fails or takes too long does not keep the others from running."""
    commands: list[list[str]] = []

    def execute(command: list[str], timeout: int, **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command[2:])
        if len(commands) == 2:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, len(commands) == 1)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(subprocess, "run", execute)
    assert gpu_visit.main(["--only", "tests", "fpn-n2", "fpn-n16"]) == 1
    assert [command[0] for command in commands] == ["pytest", "bench", "bench"]
    assert commands[2][-1] == str(ROOT / "bench/results/gpu-NVIDIA_H200-fpn-n16.json")
    assert capsys.readouterr().out.splitlines()[-1] == "failed: tests, fpn-n2"


def results_of() -> dict:
    """Results with a row for each contender; ours takes 10 ms and 100 bytes."""
    row = {"workload": "w", "curve": None, "size": None, "mode": "forward+backward", "ideal_bytes": 10**8}
    row |= {"median_ms": 10.0, "lower_ms": 9.0, "upper_ms": 11.0, "peak_extra_bytes": 100, "gradient_error": None}
    rows = [row | {"contender": "ours"}, row | {"contender": "literal", "median_ms": 50.0}]
    return {"device": "cpu", "threads": 2, "commit": "abc", "date": "2026-11-24T00:00", "copy_gb_per_s": 20.0, "rows": rows}


@pytest.mark.slow
def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    results = results_of()
    assert [path.name for path in plots.draw(results, tmp_path)] == ["bandwidth.png"]
    for size in (8, 64):
        results["rows"] += [row | {"curve": "pixels", "size": size} for row in results_of()["rows"]]
    drawn = plots.draw(results, tmp_path)
    assert [path.name for path in drawn] == ["bandwidth.png", "growth.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in drawn)
    (axes,) = plots._bandwidth(results["rows"][:2], results).axes
    assert [bar.get_width() for bar in axes.patches] == [10.0, 2.0]  # 1e8 bytes in 10 and in 50 ms
    assert axes.lines[0].get_xdata()[0] == 20.0
    growth = plots._growth(results["rows"][2:]).axes
    assert [list(line.get_xdata()) for line in growth[0].lines] == [[8, 64]] * 2


def test_growth_changes_one_thing_at_a_time() -> None:
    kept = {"pixels": 64 * 64, "channels": 256, "tokens": 6, "images": 2}
    for curve, workloads in workloads_module.GROWTH.items():
        assert len({str(w) for w in workloads.values()}) == len(workloads)
        for size, w in workloads.items():
            ((c, h, width),) = w.levels
            found = {"pixels": h * width, "channels": c, "tokens": w.tokens, "images": w.batch}
            assert found == kept | {curve: size}


@pytest.mark.slow
def test_compiled_contenders() -> None:
    runs, left_out = bench.chosen(2, torch.device("cpu"), compiled=True)
    names = [f"{name}, {how}" for name in ("literal", "plain") for how in ("compiled", "max-autotune")]
    assert list(runs) == ["ours", "literal", "plain", "feature MSE", *names]
    assert list(left_out) == ["ours, impl=eager"]


THEIRS = """
from mmcv.runner.checkpoint import _load_checkpoint
from ..builder import LOSSES

import torch
from torch import nn


class Level(nn.Module):
    def __init__(self, channels, num_tokens):
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(num_tokens, channels))
        self.prob = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, num_tokens, 1)
        )


@LOSSES.register_module()
class MasKDLoss(nn.Module):
    def __init__(self, channels, num_tokens, custom_mask_warmup):
        super().__init__()
        self.mask_modules = nn.ModuleList(Level(c, num_tokens) for c in channels)

    def forward(self, students, teachers):
        return sum((s - t).square().mean() for s, t in zip(students, teachers))
"""


def test_official(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a file of ours that has the form of theirs: every contender is timed, and another loss is seen."""
    path = tmp_path / official.FILE
    path.parent.mkdir(parents=True)
    path.write_text(THEIRS)
    threads = torch.get_num_threads()
    official.main([str(tmp_path), "--workload", "tiny", "--rounds", "1", "--out", str(tmp_path / "times.json")])
    torch.set_num_threads(threads)
    lines = dict(re.findall(r"^(\w.*?) +\d+ ms .* by (\S+)$", capsys.readouterr().out, re.M))
    assert set(lines) == {"ours", "official", "official, tokens frozen", "literal"}
    assert json.loads((tmp_path / "times.json").read_text())["milliseconds"].keys() == set(lines)
    assert float(lines["ours"]) < 1e-5 < float(lines["official"])
    with pytest.raises(SystemExit, match="give a clone"):
        official.main([str(tmp_path / "other")])


def test_pages_give_the_measured_time_of_the_official_module() -> None:
    times = json.loads((official.environment.ROOT / "bench/results/cpu-official.json").read_text())["milliseconds"]
    ratio = f"{times['official, tokens frozen'] / times['ours']:.0f}"
    for page, sentence in (
        ("README.md", f"own module takes {ratio} times our CPU time"),
        ("docs/performance.md", f"takes {ratio} times as long"),
    ):
        assert sentence in " ".join((official.environment.ROOT / page).read_text().split())
