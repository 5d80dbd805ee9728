"""README and docs: their code runs, their commands and files exist, and README's figures are those of the committed results."""

import importlib.util
import json
import re
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR

import maskd_triton

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (*ROOT.glob("*.md"), *sorted(ROOT.glob("docs/*.md")))}
PROGRAMS = [Path(name).name for name, page in PAGES.items() if name.startswith("docs/") and "```python\n" in page]


class Segmenter(nn.Module):
    """README's reader's: returns scores, and has a module ``neck``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.neck, self.head = nn.Conv2d(3, width, 4, 4), nn.Conv2d(width, 5, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.neck(images))


def test_example_of_the_first_screen_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what README says that the reader has."""
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    losses = []

    def update(loss: torch.Tensor, optimizer: torch.optim.Optimizer, schedule: CosineAnnealingLR | None = None) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if schedule:
            schedule.step()
        losses.append(loss)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = Segmenter(64)
        batches = [(torch.randn(2, 3, 64, 64), torch.randint(5, (2, 16, 16))) for _ in range(4)]
        names: dict[str, Any] = {"teacher": Segmenter(256).eval(), "student": student, "batches": batches}
        names |= {"update": update, "cross_entropy": cross_entropy, "CosineAnnealingLR": CosineAnnealingLR}
        exec(code, names | {"Adam": torch.optim.Adam, "SGD": torch.optim.SGD}, names)
    assert torch.stack(losses).isfinite().all()
    assert len(losses) == 2 * len(batches)
    assert student.neck.weight.grad.abs().max() > 0
    assert names["criterion"].align[0].weight.grad.abs().max() > 0


def test_badges() -> None:
    badges = dict(re.findall(r"^!\[(Python|Licence|Version) (.+?)\]\(https://img\.shields\.io/badge/\S+\)$", README, re.M))
    project = (ROOT / "pyproject.toml").read_text()
    for name, badge in (("requires-python", badges["Python"].replace(" ", "")), ("license", badges["Licence"])):
        assert f'\n{name} = "{badge}"\n' in project
    assert badges["Version"] == maskd_triton.__version__
    for name, value in badges.items():
        quoted = urllib.parse.quote(value.replace("-", "--"))
        assert f"/{name}-{quoted}-blue)" in README


def test_what_it_costs() -> None:
    results = json.loads((ROOT / "bench/results/cpu-fpn.json").read_text())
    rows = {row["contender"]: row for row in results["rows"] if row["mode"] == "forward+backward"}
    rows["plain"] = rows.pop("collapsed")
    page, ours = PAGES["docs/performance.md"], rows["ours"]
    times = {contender: row["median_ms"] / ours["median_ms"] for contender, row in rows.items()}
    for contender, row in rows.items():
        memory = row["peak_extra_bytes"]
        assert f"| {contender} | {row['median_ms']:.0f} | {times[contender]:.1f} | {memory / 2**20:.0f} |" in page
        assert memory >= ours["peak_extra_bytes"]
    assert f"{results['device']}, {results['threads']} threads, torch {results['packages']['torch']}" in " ".join(page.split())
    assert f"{times['plain']:.1f}" == "2.0"
    said = (
        f"{ours['median_ms']:.0f} ms: 1/{times['literal']:.0f} of the formulas as published, half of the same algebra in plain"
    )
    assert f"{said} PyTorch, and {1 / times['feature MSE']:.1f} times a plain feature MSE" in " ".join(README.split())


def test_figures_of_the_demo() -> None:
    results = json.loads((ROOT / "bench/results/cpu-demo.json").read_text())
    assert f"| teacher | {results['teacher_miou']['test']:.3f} |" in PAGES["docs/demo.md"]
    for name, score in results["test_miou"].items():
        sign = "+" if "paired" in name else ""
        assert f"| {name} | {score['mean']:{sign}.3f} ± {score['std']:.3f} |" in PAGES["docs/demo.md"]
    alone, mse, ours = (results["test_miou"][name]["mean"] for name in ("student alone", "plain feature MSE", "MasKD"))
    assert f"{alone:.3f} alone, {mse:.3f} with a plain feature MSE and {ours:.3f} with MasKD" in README


def test_messages_of_the_guide() -> None:
    """Errors and warnings that the guide quotes are in the code."""
    code = "".join(path.read_text() for path in sorted((ROOT / "maskd_triton").glob("*.py")))
    joined = re.sub(r'"\s*\n\s*f?"', "", code)
    quoted = re.findall(r"^\| `(.+?)` \|", PAGES["docs/guide.md"].partition("## Which errors")[2], re.M)
    assert len(quoted) > 5
    for message in quoted:
        assert message in joined, message


@pytest.mark.parametrize("name", PAGES)
def test_commands_and_files_exist(name: str) -> None:
    """Links are held by ``make docs``, which takes a broken one for an error."""
    text, makefile = re.sub(r"^```python\n.*?^```", "", PAGES[name], flags=re.M | re.S), (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:^|`|https\S+ )make ([\w-]+)", text, re.M)):
        assert re.search(rf"^{target}:", makefile, re.M), target
    for module in set(re.findall(r"\bpython -m ([\w.]+)", text)):
        spec = importlib.util.find_spec(module)
        assert spec, module
        assert not spec.submodule_search_locations or importlib.util.find_spec(f"{module}.__main__"), module
    for path in set(re.findall(r"`((?:maskd_triton|tests|kernels|bench|examples|docs)/[\w/-]+\.\w+)(?::\w+)?`", text)):
        assert (ROOT / path).exists(), path


def test_environment_variables_stand_on_one_page() -> None:
    code = "".join(path.read_text() for folder in ("maskd_triton", "kernels") for path in (ROOT / folder).rglob("*.py"))
    assert set(re.findall(r"\bMASKD_\w+", code)) == set(re.findall(r"^\| `(MASKD_\w+)` \|", PAGES["docs/environment.md"], re.M))
