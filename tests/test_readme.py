"""README and docs: their code runs, their commands and files exist, and README's table is that of the committed results."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import program

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (*ROOT.glob("*.md"), *sorted(ROOT.glob("docs/*.md")))}
PROGRAMS = [Path(name).name for name, page in PAGES.items() if name.startswith("docs/") and "```python\n" in page]


def test_example_of_the_first_screen_runs() -> None:
    code = re.search(r"^```python\n(.*?)^```", README, re.M | re.S)
    assert code is not None
    names: dict[str, Any] = {}
    before = torch.random.get_rng_state()
    exec(code[1], names)
    torch.random.set_rng_state(before)
    assert names["loss"].isfinite()
    assert names["student"].weight.grad.abs().max() > 0
    assert names["criterion"].align[0].weight.grad.abs().max() > 0


@pytest.mark.parametrize("page", PROGRAMS)
def test_code_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = program(page)
    assert names["loss"].isfinite()
    if page == "two-stages.md":
        assert names["learner"].mask_modules[0].mask_token.abs().max() > 0.01  # they have moved
        assert names["criterion"].warmup_step.item() == len(names["batches"])


def test_table_of_the_first_page() -> None:
    results = json.loads((ROOT / "bench/results/cpu-fpn.json").read_text())
    rows = {row["contender"]: row for row in results["rows"] if row["mode"] == "forward+backward"}
    for contender, row in rows.items():
        times, memory = row["median_ms"] / rows["ours"]["median_ms"], row["peak_extra_bytes"] / 2**20
        assert f"| {contender} | {row['median_ms']:.0f} | {times:.1f} | {memory:.0f} |" in README
    assert f"{results['device']}, {results['threads']} threads, torch {results['packages']['torch']}" in " ".join(
        README.split()
    )


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
