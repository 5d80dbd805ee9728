"""README's figures are those of the committed results, its commands exist, and the guide's code runs."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

from bench.workloads import GROWTH
from maskd_triton._hooks import Where
from maskd_triton.diagnostics import gradient_ratio
from tests.helpers import program

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = README + (ROOT / "docs/performance.md").read_text()
SPEED = {name: json.loads((ROOT / f"bench/results/{name}.json").read_text()) for name in ("cpu-fpn", "cpu-fpn-stage1")}
DEMO = json.loads((ROOT / "bench/results/cpu-demo.json").read_text())
MODE = "forward+backward"


@pytest.mark.parametrize("name", SPEED)
def test_speed(name: str) -> None:
    results = SPEED[name]
    rows = {r["contender"]: r for r in results["rows"] if r["mode"] == MODE}
    ours = rows["ours"]
    for contender, row in rows.items():
        error = "-" if row["gradient_error"] is None else f"{row['gradient_error']:.0e}"
        line = (
            f"| {contender} | {row['median_ms']:.0f} | {row['median_ms'] / ours['median_ms']:.1f} "
            f"| {row['peak_extra_bytes'] / 2**20:.0f} | {error} |"
        )
        assert line in README
    version, date = results["packages"]["torch"], results["date"][:10]
    assert f"{results['device']}, {results['threads']} threads,\ntorch {version}, {date}." in README
    assert f"[{name}.json]" in README


def test_claim_of_the_first_screen() -> None:
    rows = {r["contender"]: r for r in SPEED["cpu-fpn"]["rows"] if r["mode"] == MODE}
    faster = rows["literal"]["median_ms"] / rows["ours"]["median_ms"]
    smaller = rows["literal"]["peak_extra_bytes"] / rows["ours"]["peak_extra_bytes"]
    assert f"{faster:.0f} times faster" in README
    assert f"{smaller:.0f} times less memory" in README
    assert faster >= 8  # the goals on two CPU cores
    assert smaller >= 10


def test_workloads() -> None:
    results = json.loads((ROOT / "bench/results/cpu-workloads.json").read_text())
    times = {(r["workload"], r["contender"]): r["median_ms"] for r in results["rows"] if r["mode"] == MODE}
    for workload in {name for name, _ in times}:
        row = (f"{times[workload, c]:.1f}" for c in ("ours", "literal", "collapsed", "feature MSE"))
        assert f"| {workload} | {' | '.join(row)} |" in README
    assert results["device"] == SPEED["cpu-fpn"]["device"]


def test_share() -> None:
    share = json.loads((ROOT / "bench/results/cpu-share.json").read_text())
    for name, row in share["steps"].items():
        assert f"| {name} | {row['median_ms']:.0f} | {row['share_percent']:.1f} |" in README
    settings = share["settings"]
    assert f"{settings['batch']} images of {settings['side']}x{settings['side']}" in README
    assert share["device"] == SPEED["cpu-fpn"]["device"]


def test_growth_is_what_the_picture_shows() -> None:
    growth = json.loads((ROOT / "bench/results/cpu-growth.json").read_text())
    assert growth["command"] in README.replace("`", "") or growth["command"].startswith("python -m bench --growth")
    rows = {(r["curve"], r["size"], r["contender"]) for r in growth["rows"]}
    sizes = {(curve, size) for curve, workloads in GROWTH.items() for size in workloads}
    assert rows == {(*size, contender) for size in sizes for contender in ("ours", "literal", "collapsed", "feature MSE")}


def test_host() -> None:
    for name, value in json.loads((ROOT / "bench/results/cpu-host.json").read_text())["microseconds"].items():
        assert f"| {name} | {value:.0f} |" in PAGES


def test_demo() -> None:
    for name, scores in DEMO["test_miou"].items():
        plus = "+" if "paired" in name else ""
        assert f"| {name} | {scores['mean']:{plus}.3f} ± {scores['std']:.3f} |" in README
    assert f"| teacher | {DEMO['teacher_miou']['test']:.3f} |" in README
    assert f"{DEMO['settings']['student_steps']} steps" in README
    assert f"{DEMO['settings']['seeds']} seeds" in README


def test_commands_and_files_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for name in set(re.findall(r"^make (\w+)", README, re.M)):
        assert re.search(rf"^{name}:", makefile, re.M), name
    for module in set(re.findall(r"`python -m ([\w.]+)", PAGES)):
        spec = importlib.util.find_spec(module)
        assert spec, module
        assert not spec.submodule_search_locations or importlib.util.find_spec(f"{module}.__main__"), module
    for path in set(re.findall(r"\]\(((?!http|#)[^)]+)\)", README)) | set(re.findall(r"`((?:tests|kernels)/\w+\.py)`", PAGES)):
        assert (ROOT / path).exists(), path


def test_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = program("two-stages.md")
    assert names["learner"].mask_modules[0].mask_token.abs().max() > 0.01  # they have moved
    assert names["criterion"].warmup_step.item() == len(names["batches"])
    assert names["loss"].isfinite()
    assert 0 < names["levels"][0].coverage.min()


def test_integrations_run() -> None:
    names = program("integrations.md")
    assert names["loss"].isfinite()
    assert set(names["student_alone"]) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert names["weight"] == pytest.approx(0.3 / 0.7 / 2.05)
    features, target = names["features"], names["teacher"][0](names["images"]).detach()
    ratio = gradient_ratio(names["task_loss"], names["criterion"](features, target), features)
    assert ratio.item() == pytest.approx(0.1 / 0.9, rel=1e-5)  # a tenth of the norms
    recipes = {path.name for path in (ROOT / "examples/recipes").glob("*.py")} - {"__init__.py", "tiny.py"}
    page = (ROOT / "docs/integrations.md").read_text()
    assert set(re.findall(r"\(\.\./examples/recipes/(\w+\.py)\)", page)) == recipes
    assert all((ROOT / path).exists() for path in re.findall(r"`(tests/\w+\.py)`", page))


def test_reaching_into_models() -> None:
    names = program("reaching-into-models.md")
    assert [len(levels) for levels in (names["students"], names["teachers"])] == [2, 2]
    assert all(module.mask_token.grad is not None for module in names["learner"].mask_modules)
    page = (ROOT / "docs/reaching-into-models.md").read_text()
    rows = re.findall(r"^  \| `(.*)` \| (.*) \| `(.*)` \|$", page, re.M)
    tensors = {name: torch.zeros(1, 1, 1, i) for i, name in enumerate(("features", "p2", "p3", "p4", "p6", "mask", "loss"))}
    assert len(rows) == 4
    for returned, levels, output in rows:
        _, found, _ = Where(("",), output=eval(output)).find(eval(returned, tensors), "output")
        assert [x.shape[3] for x in found] == [tensors[name].shape[3] for name in re.findall(r"`(\w+)`", levels)]
