"""What a user installs and imports: the built wheel, without triton, without a GPU, without side effects."""

import doctest
import importlib
import os
import pkgutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import maskd_triton

ROOT = Path(__file__).parents[1]
PROGRAMS = ROOT / "tests" / "programs"


def run_python(cwd: Path, *arguments: str | Path, **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    command = [sys.executable, "-W", "error", *arguments]
    result = subprocess.run(command, cwd=cwd, env=kept | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_works_without_triton(tmp_path: Path) -> None:
    assert 'impl="triton" needs the triton package' in run_python(tmp_path, PROGRAMS / "without.py", "triton")


@pytest.mark.slow
def test_triton_on_the_cpu_raises(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    message = run_python(tmp_path, PROGRAMS / "on_the_cpu.py")
    assert 'impl="triton"' in message
    assert "cpu" in message
    assert "TRITON_INTERPRET=1" in message


@pytest.mark.slow
def test_import_has_no_side_effects(tmp_path: Path) -> None:
    """No GPU or network is asked for, no process started, no kernel loaded, no global `kernels` appears, nothing is printed."""
    (seconds,) = run_python(tmp_path, PROGRAMS / "imports.py").split()
    assert float(seconds) < 2  # beside torch; measured: 0.1


@pytest.mark.slow
def test_sdist_and_wheel_hold_the_package_and_nothing_else(tmp_path: Path) -> None:
    """The wheel is built of the sdist; each is installed into an environment of its own."""
    pytest.importorskip("build", reason="needs the dev extra")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    for archive in (wheel, sdist):
        installed_alone(archive, tmp_path / f"environment-{archive.suffix[1:]}")
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    expected = {f"maskd_triton/{p.name}" for p in (ROOT / "maskd_triton").glob("*.py")} | {"maskd_triton/py.typed"}
    expected |= {f"maskd_triton/_ops/{p.name}" for p in (ROOT / "maskd_triton" / "_ops").glob("*.py")}
    expected |= {f"maskd_triton/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    assert names == expected
    target = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    where = run_python(tmp_path, "-c", "import maskd_triton; print(maskd_triton.__file__)", PYTHONPATH=str(target))
    assert Path(where.strip()) == target / "maskd_triton" / "__init__.py"
    help_of_the_search(tmp_path, PYTHONPATH=str(target))


def installed_alone(archive: Path, environment: Path) -> None:
    """Imported from another folder, where nothing but it and the packages it needs can be found."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "needed.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "--no-build-isolation"]
    result = subprocess.run([*pip, str(archive)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    code = "import maskd_triton, maskd_triton.kernels; print(maskd_triton.__file__)"
    found = subprocess.run([python, "-P", "-c", code], cwd=environment, capture_output=True, text=True)
    assert found.stdout.strip() == str(site / "maskd_triton" / "__init__.py"), found.stderr


def help_of_the_search(cwd: Path, **environment: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    text = run_python(cwd, "-m", "maskd_triton.kernels.autotune", "--help", **environment)
    assert text.startswith("usage: python -m maskd_triton.kernels.autotune")
    assert "--log2-pixels" in text


@pytest.mark.slow
def test_the_search_is_a_command_of_the_package(tmp_path: Path) -> None:
    help_of_the_search(tmp_path)


MODULES = [maskd_triton.__name__] + [
    f"maskd_triton.{m.name}" for m in pkgutil.iter_modules(maskd_triton.__path__) if m.name != "kernels"
]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore:MaskedDistillLoss without pretrained")
def test_examples_in_docstrings(name: str) -> None:
    if name == "maskd_triton.viz":
        pytest.importorskip("matplotlib", reason="needs the viz extra")
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_public_classes_have_examples() -> None:
    finder = doctest.DocTestFinder(recurse=False)
    for name in ("MaskedDistillLoss", "MaskLearner", "MaskModule"):
        assert finder.find(getattr(maskd_triton, name))[0].examples, name
    for name in maskd_triton.functional.__all__:
        assert finder.find(getattr(maskd_triton.functional, name))[0].examples, name
