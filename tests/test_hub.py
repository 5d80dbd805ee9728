"""The project for Hugging Face's kernel-builder: its package, loaded beside ours, gives the same numbers."""

import ast
import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import hub
from maskd_triton import functional as F

# What the builder writes into the package, a namespace for each build
OPS = """import torch

ops = torch.ops.{namespace}


def add_op_namespace_prefix(op_name):
    return f"{namespace}::{{op_name}}"
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "project"
    hub.lay_out(out, "someone/maskd-triton")
    return out


@pytest.fixture(scope="module")
def builds(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ModuleType]]:
    """Two builds, loaded as the `kernels` package does: under names of their own, from outside of sys.path."""
    loaded = []
    for build in ("a1", "b2"):
        package = tmp_path_factory.mktemp("builds") / build
        shutil.copytree(project / "torch-ext/maskd_triton", package)
        (package / "_ops.py").write_text(OPS.format(namespace=f"_maskd_triton_cpu_{build}"))
        name = f"maskd_triton_{build}"
        spec = importlib.util.spec_from_file_location(name, package / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        loaded.append(module)
    yield loaded
    for name in [name for name in sys.modules if name.startswith(("maskd_triton_a1", "maskd_triton_b2"))]:
        del sys.modules[name]


def test_the_project_is_complete(project: Path) -> None:
    build = (project / "build.toml").read_text()
    for line in ('name = "maskd-triton"', "edition = 5", "[torch-noarch]", 'repo-id = "someone/maskd-triton"'):
        assert line in build.splitlines()
    card = (project / "CARD.md").read_text()
    assert card.startswith("---\nlibrary_name: kernels\n")
    assert 'get_kernel("someone/maskd-triton", version=0, trust_remote_code=True)' in card
    assert all(f"`{name}`" in card for name in F.__all__)
    for name in ("flake.nix", "LICENSE", "tests/test_maskd_triton.py"):
        assert (project / name).stat().st_size > 100
    assert not (project / "torch-ext/maskd_triton/_ops").exists()  # the builder writes _ops.py there


def test_imports_are_relative_or_torch_s(project: Path) -> None:
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    for path in (project / "torch-ext").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert {name.partition(".")[0] for name in names} <= allowed, path


def results(functions: Any, impl: str) -> list[Tensor]:
    """Losses, masks, weights and gradients of both stages."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    student = [draw(2, 16, s, s).requires_grad_() for s in (8, 5)]
    teacher, tokens = [draw(2, 16, s, s) for s in (8, 5)], [0.3 * draw(4, 16) for _ in range(2)]
    weighting = [functions.compose_weighting(draw(16, 16, 3, 3), draw(16), draw(4, 16, 1, 1), draw(4)) for _ in range(2)]
    valid = torch.ones(2, 16, 16, dtype=torch.bool)
    valid[1, :, 9:] = False
    options = {"custom_mask": True, "valid": valid, "impl": impl}
    loss = functions.masked_distill_loss(student, teacher, tokens, weighting, **options)
    cosine = functions.masked_distill_loss(student, teacher, tokens, distance="cosine", impl=impl)
    (loss + cosine).backward()
    learned = [e.clone().requires_grad_() for e in tokens]
    masked, dice = functions.masked_features_and_dice(teacher, learned, weighting, impl=impl)
    (sum(y.square().mean() for y in masked) + dice.sum()).backward()
    masks = functions.receptive_masks(teacher[0], tokens[0])
    weights = functions.mask_weights(teacher[0], *weighting[0])
    return [loss, cosine, dice, masks, weights, functions.dice_loss(masks), *masked, *(x.grad for x in (*student, *learned))]


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_same_numbers_beside_the_installed_package(builds: list[ModuleType], impl: str) -> None:
    if impl == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    expected = results(F, impl)
    for build in builds:
        assert all(torch.equal(got, want) for got, want in zip(results(build, impl), expected, strict=True))


def test_operators_have_the_namespace_of_the_build(builds: list[ModuleType]) -> None:
    operators = [sys.modules[f"{build.__name__}._operators.distill"].distill.name() for build in builds]
    assert operators == ["_maskd_triton_cpu_a1::distill", "_maskd_triton_cpu_b2::distill"]
    student = torch.randn(1, 8, 4, 4, requires_grad=True)
    teacher, tokens = torch.randn(1, 8, 4, 4), [torch.randn(2, 8)]
    compiled = torch.compile(builds[0].masked_distill_loss, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(student, teacher, tokens), F.masked_distill_loss(student, teacher, tokens))


def test_the_command_lists_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.main(["--out", str(tmp_path / "project")])
    assert "torch-ext/maskd_triton/_operators/library.py" in capsys.readouterr().out.splitlines()
    assert "[general.hub]" not in (tmp_path / "project/build.toml").read_text()  # no repository is made up
    with pytest.raises(FileExistsError):
        hub.lay_out(tmp_path / "project")
