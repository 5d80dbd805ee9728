"""What is written in two places says the same: versions and pins."""

import re
from pathlib import Path

import pytest

import maskd_triton

ROOT = Path(__file__).parents[1]
PINS = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))


def read(name: str) -> str:
    return (ROOT / name).read_text()


def test_the_version_is_one() -> None:
    assert re.search(r'^version = \{ attr = "maskd_triton.__version__" \}$', read("pyproject.toml"), re.M)
    first, latest, *_ = re.findall(r"^## (.+)$", read("CHANGELOG.md"), re.M)
    assert first == "Unreleased"
    cited = dict(re.findall(r"^(version|date-released): (\S+)$", read("CITATION.cff"), re.M))
    assert latest == f"{maskd_triton.__version__} - {cited['date-released']}"
    assert cited["version"] == maskd_triton.__version__


def test_pre_commit_runs_what_ci_runs() -> None:
    hooks = read(".pre-commit-config.yaml")
    assert re.findall(r"additional_dependencies: \[(\w+)==([\d.]+)\]", hooks) == [("ruff", PINS["ruff"])] * 2
    assert "entry: .venv/bin/mypy" in hooks  # which make installs by the pin
    assert "mypy" in PINS


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda path: path.stem)
def test_actions_are_pinned_by_hash(path: Path) -> None:
    for action in re.findall(r"uses: *(.*)", path.read_text()):
        assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", action), action


def test_workflows_test_the_versions_of_the_classifiers() -> None:
    promised = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', read("pyproject.toml"))
    quoted = ", ".join(f'"{version}"' for version in promised)
    assert f"python: [{quoted}]" in read(".github/workflows/ci.yml")
    assert f"(tested on {', '.join(promised)})" in read("README.md")
