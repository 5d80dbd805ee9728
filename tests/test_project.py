"""What is written in two places says the same: versions, pins, the map of the code."""

import re
from pathlib import Path

import pytest

import maskd_triton

ROOT = Path(__file__).parents[1]
PINS = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def read(name: str) -> str:
    return (ROOT / name).read_text()


def test_the_version_is_one() -> None:
    assert re.search(r'^version = \{ attr = "maskd_triton.__version__" \}$', read("pyproject.toml"), re.M)
    changelog = re.findall(r"^## (.+)$", read("CHANGELOG.md"), re.M)
    assert changelog[0] == "Unreleased"
    releases = [re.fullmatch(r"(\d+\.\d+\.\d+) - (\d{4}-\d{2}-\d{2})", line) for line in changelog[1:]]
    assert all(releases)
    latest = releases[0]
    assert latest is not None
    cited = dict(re.findall(r"^(version|date-released): (\S+)$", read("CITATION.cff"), re.M))
    assert latest.groups() == (maskd_triton.__version__, cited["date-released"])
    assert cited["version"] == maskd_triton.__version__


def test_pre_commit_runs_what_ci_runs() -> None:
    hooks = read(".pre-commit-config.yaml")
    pins = re.findall(r"additional_dependencies: \[(\w+)==([\d.]+)\]", hooks)
    assert pins == [("ruff", PINS["ruff"])] * 2
    assert "entry: .venv/bin/mypy" in hooks  # which make installs by the pin
    assert "mypy" in PINS
    assert "$(BIN)/mypy" in read("Makefile")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_by_hash(path: Path) -> None:
    actions = re.findall(r"uses: *(.*)", path.read_text())
    assert actions
    for action in actions:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", action), action


def test_workflows_test_the_versions_of_the_classifiers() -> None:
    promised = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', read("pyproject.toml"))
    tested = re.search(r"python: \[(.*?)\]", read(".github/workflows/ci.yml"))
    assert tested is not None
    assert re.findall(r'"(.*?)"', tested[1]) == promised
    assert f"(tested on {', '.join(promised)})" in read("README.md")


def test_names_in_the_guide_exist() -> None:
    page = read("CONTRIBUTING.md")
    code = "".join(path.read_text() for folder in ("maskd_triton", "kernels") for path in (ROOT / folder).rglob("*.py"))
    for title in ("How a level flows", "Add a distance"):
        section = page.split(f"## {title}")[1].split("\n## ")[0]
        names = re.findall(r"`(?:[\w/.]+[.:])?(\w+)`", re.sub(r"`[\w/.]+\.(py|md)`|`git .*?`", "", section))
        assert len(names) > 8
        for name in names:
            assert re.search(rf"\b{name}\b", code), name


def test_every_folder_and_module_is_on_the_map() -> None:
    page = read("CONTRIBUTING.md")
    table = page.split("## The map of the house")[1].split("\n## ")[0]
    private = {"_statistics.py", "__init__.py"}  # a helper of one module
    for path in (ROOT / "maskd_triton").iterdir():
        if (path.suffix == ".py" and path.name not in private) or (path.is_dir() and (path / "__init__.py").exists()):
            assert path.name in table, path.name
