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

import maskd_triton

ROOT = Path(__file__).parents[1]


def run_python(code: str, cwd: Path, **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, cwd=cwd, env=kept | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


WITHOUT_TRITON = """
import sys
class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name="triton")
sys.meta_path.insert(0, NoTriton())
import torch
from maskd_triton import MaskedDistillLoss, MaskLearner
torch.manual_seed(0)
learner = MaskLearner(4)
x = torch.ones(1, 4, 3, 3)
student = torch.zeros(1, 4, 3, 3, requires_grad=True)
MaskedDistillLoss(4, pretrained=learner)(student, x).backward()
assert abs(student.grad.sum().item() + 1) < 1e-2  # masks of about a half: half of the MSE's -2
assert "triton" not in sys.modules
try:
    MaskedDistillLoss(4, pretrained=learner, impl="triton")(student, x)
except ModuleNotFoundError as error:
    print(error)
"""


def test_works_without_triton(tmp_path: Path) -> None:
    assert 'impl="triton" needs the triton package' in run_python(WITHOUT_TRITON, tmp_path)


ON_THE_CPU = """
import torch
from maskd_triton import MaskedDistillLoss, MaskLearner
x = torch.ones(1, 4, 3, 3)
try:
    MaskedDistillLoss(4, pretrained=MaskLearner(4), impl="triton")(x.clone().requires_grad_(), x)
except RuntimeError as error:
    print(error)
"""


def test_triton_on_the_cpu_raises(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    message = run_python(ON_THE_CPU, tmp_path)
    assert 'impl="triton"' in message
    assert "cpu" in message
    assert "TRITON_INTERPRET=1" in message


def test_import_has_no_side_effects(tmp_path: Path) -> None:
    """No GPU is asked for, no kernel is loaded, no global `kernels` appears, nothing is printed."""
    code = (
        "import os; before = dict(os.environ); import sys, torch, maskd_triton;"
        "assert not torch.cuda.is_initialized(); assert dict(os.environ) == before;"
        "assert not {'kernels', 'maskd_triton.kernels'} & set(sys.modules)"
    )
    assert run_python(code, tmp_path) == ""


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("build", reason="needs the dev extra")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    expected = {f"maskd_triton/{p.name}" for p in (ROOT / "maskd_triton").glob("*.py")} | {"maskd_triton/py.typed"}
    expected |= {f"maskd_triton/_ops/{p.name}" for p in (ROOT / "maskd_triton" / "_ops").glob("*.py")}
    expected |= {f"maskd_triton/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    assert names == expected
    target = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    where = run_python("import maskd_triton; print(maskd_triton.__file__)", tmp_path, PYTHONPATH=str(target))
    assert Path(where.strip()) == target / "maskd_triton" / "__init__.py"
    help_of_the_search(tmp_path, PYTHONPATH=str(target))


def help_of_the_search(cwd: Path, **environment: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    name = "maskd_triton.kernels.autotune"
    code = f"import runpy, sys; sys.argv = ['autotune', '--help']; runpy.run_module({name!r}, run_name='__main__')"
    text = run_python(code, cwd, **environment)
    assert text.startswith(f"usage: python -m {name}")
    assert "--log2-pixels" in text


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
