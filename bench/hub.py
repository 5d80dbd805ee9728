"""Lay out `maskd_triton.functional` for Hugging Face's kernel-builder: ``python -m bench.hub --out FOLDER``.

The folder is a kernel project of the ``torch-noarch`` kind: Python and Triton only, so one build serves every torch and GPU.
What is in it:

* ``build.toml`` (edition 5), ``flake.nix`` and ``CARD.md``, the model card;
* ``torch-ext/maskd_triton``: `functional`, every module that it imports, and the kernels. All imports are relative, because a
  loaded kernel has a name of its own. Our package ``_ops`` is called ``_operators`` there, because the builder writes a file
  ``_ops.py``. It holds the operator namespace of the build, which our operators take;
* ``tests``: one test for the builder's ``ci-test``.

Building and publishing need Nix, kernel-builder and an account on the Hub; neither is done here. With them, in the folder:
``kernel-builder build-and-upload``.
"""

import argparse
import ast
import importlib.util
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import maskd_triton
from maskd_triton import functional

ROOT = Path(__file__).parents[1]
PACKAGE, KERNEL = "maskd_triton", "maskd-triton"
LOADED = ("kernels.distill", "kernels.learn", "kernels.pool", "kernels.autotune")  # by name, when an operator first runs

BUILD = f"""[general]
name = "{KERNEL}"
version = {maskd_triton.__version__.partition(".")[0]}
edition = 5
license = "Apache-2.0"
backends = ["cpu", "cuda", "rocm"]
{{hub}}
[torch-noarch]
pyext = ["json", "py"]
"""

FLAKE = """{
  description = "Masked distillation with receptive tokens (MasKD), in Triton";

  inputs.kernel-builder.url = "github:huggingface/kernels";

  outputs = { self, kernel-builder }: kernel-builder.lib.genKernelFlakeOutputs {
    inherit self;
    path = ./.;
  };
}
"""

CARD = f"""---
library_name: kernels
license: apache-2.0
tags:
- kernels
- knowledge-distillation
---

# {KERNEL}

The stateless functions of maskd_triton {maskd_triton.__version__}: masked distillation with receptive tokens
(MasKD, ICLR 2023, arXiv 2205.14589). Exact and fused, for float16, bfloat16, float32 and float64. The package itself also
learns tokens, reads files and finds features in models.

```python
import torch
from kernels import get_kernel

# the package `kernels` asks for trust_remote_code where it does not know the publisher
F = get_kernel("REPOSITORY", version={maskd_triton.__version__.partition(".")[0]}, trust_remote_code=True)
student, teacher = torch.randn(2, 256, 40, 40, requires_grad=True), torch.randn(2, 256, 40, 40)
tokens = [0.1 * torch.randn(6, 256)]
F.masked_distill_loss([student], [teacher], tokens).backward()
```

Functions: FUNCTIONS.

They need torch >= 2.9 and Python >= 3.10. CUDA tensors run Triton kernels, others plain torch. The kernels have not run on a
GPU yet.
"""

IMPORTS = "".join(f"    {name},\n" for name in functional.__all__)
EXPORTS = "".join(f'    "{name}",\n' for name in functional.__all__)
INIT = f'''"""Masked distillation with receptive tokens (MasKD): the functions of `maskd_triton.functional`."""

from .functional import (
{IMPORTS})

__all__ = [
{EXPORTS}]
'''

TEST = """import pytest
import torch

import maskd_triton


@pytest.mark.kernels_ci
def test_masks_of_a_half_give_half_the_mse():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student, teacher = torch.zeros(2, 16, 8, 8, device=device, requires_grad=True), torch.ones(2, 16, 8, 8, device=device)
    loss = maskd_triton.masked_distill_loss([student], [teacher], [torch.zeros(6, 16, device=device)])
    loss.backward()
    assert abs(loss.item() - 0.5) < 1e-6
    assert torch.allclose(student.grad, torch.full_like(student, -1 / student.numel()))
"""


def source_of(module: str) -> Path:
    """The file of a module of the package, by its name in it."""
    path = ROOT / Path(*module.split(".")) if module.startswith("kernels") else ROOT / PACKAGE / Path(*module.split("."))
    return path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"


def imported(module: str) -> set[str]:
    """The modules of the package that a module of it imports."""
    path = source_of(module)
    package = f"{PACKAGE}.{module}" if path.name == "__init__.py" else f"{PACKAGE}.{module}".rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
            found |= {name.removeprefix(f"{PACKAGE}.") for name in names if name != PACKAGE}
    return {name for name in found if source_of(name).exists()}


def needed() -> list[str]:
    """All modules that `functional` needs, with the packages that hold them."""
    found, left = set(), {"functional", *LOADED}
    while left:
        module = left.pop()
        found.add(module)
        holder = module.rpartition(".")[0]
        left |= (imported(module) | ({holder} if holder else set())) - found
    return sorted(found)


def rewritten(module: str, code: str) -> str:
    """A module's code with the names that it has in the project."""
    code = re.sub(r"^(from \.+)_ops\b", r"\1_operators", code, flags=re.M)
    if module != "_ops.library":
        return code
    start, end = re.split(r'^NAMESPACE = "maskd_triton".*\n', code, maxsplit=1, flags=re.M)
    first = start.index("\nImplementation = ")
    imports = "from .._ops import add_op_namespace_prefix\n"
    return f'{start[:first]}{imports}{start[first:]}NAMESPACE = add_op_namespace_prefix("").removesuffix("::")\n{end}'


def lay_out(out: Path, repo_id: str | None = None) -> list[Path]:
    """Write the project into the new folder ``out``; returns its files. FileExistsError for a folder that exists."""
    out.mkdir(parents=True)
    hub = f'\n[general.hub]\nrepo-id = "{repo_id}"\n' if repo_id else ""
    functions = ", ".join(f"`{name}`" for name in functional.__all__)
    texts = {
        "build.toml": BUILD.format(hub=hub),
        "flake.nix": FLAKE,
        "CARD.md": CARD.replace("FUNCTIONS", functions).replace("REPOSITORY", repo_id or f"OWNER/{KERNEL}"),
        f"tests/test_{PACKAGE}.py": TEST,
        f"torch-ext/{PACKAGE}/__init__.py": INIT,
    }
    for module in needed():
        source = source_of(module)
        inside = "/".join(module.replace("_ops", "_operators").split("."))
        name = f"{inside}/__init__.py" if source.name == "__init__.py" else f"{inside}.py"
        texts[f"torch-ext/{PACKAGE}/{name}"] = rewritten(module, source.read_text())
    for name, text in texts.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    shutil.copy(ROOT / "LICENSE", out / "LICENSE")
    for config in sorted((ROOT / "kernels/configs").glob("*.json")):
        target = out / "torch-ext" / PACKAGE / "kernels/configs" / config.name
        target.parent.mkdir(exist_ok=True)
        shutil.copy(config, target)
    return sorted(path for path in out.rglob("*") if path.is_file())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.hub", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the project")
    parser.add_argument("--repo-id", help="the kernel's repository on the Hub, OWNER/NAME")
    args = parser.parse_args(argv)
    for path in lay_out(args.out, args.repo_id):
        print(path.relative_to(args.out))


if __name__ == "__main__":
    main()
