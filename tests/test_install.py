"""What a user installs and imports: the built wheel, without triton, without a GPU, without side effects."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = ROOT / "tests" / "programs"


def run_python(cwd: Path, *arguments: str | Path, **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    command = [sys.executable, "-W", "error", *arguments]
    result = subprocess.run(command, cwd=cwd, env=kept | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_the_wheel(tmp_path: Path) -> None:
    """Built of the sdist, it holds the package and nothing else, and works from another folder."""
    pytest.importorskip("build", reason="needs the dev extra")
    pytest.importorskip("triton", reason="triton is not installed")
    run_python(tmp_path, "-W", "default", "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT))
    (wheel,), site = tmp_path.glob("*.whl"), tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    for folder, source in (("maskd_triton", ROOT / "maskd_triton"), ("maskd_triton/kernels", ROOT / "kernels")):
        held = {path.name for path in (site / folder).iterdir()} - {"kernels", "__pycache__"}
        assert held == {path.name for path in source.iterdir()} - {"__pycache__"}
    assert {path.name.split("-")[0] for path in site.iterdir()} == {"maskd_triton"}

    printed = run_python(tmp_path, PROGRAMS / "imports.py", PYTHONPATH=str(site)).splitlines()
    assert printed[0] == str(site / "maskd_triton" / "__init__.py")
    assert all(word in printed[1] for word in ('impl="triton"', "cpu", "TRITON_INTERPRET=1"))
    helped = run_python(tmp_path, "-m", "maskd_triton.kernels.autotune", "--help", PYTHONPATH=str(site))
    assert helped.startswith("usage: python -m maskd_triton.kernels.autotune")


@pytest.mark.slow
def test_works_without_triton(tmp_path: Path) -> None:
    assert 'impl="triton" needs the triton package' in run_python(tmp_path, PROGRAMS / "without.py", "triton")
