"""What ``test_transforms.py`` runs: the package imported three times, as notebooks and reloaders do; criteria of every import
compute the same, also compiled."""

import gc
import importlib
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def problem(package: ModuleType) -> tuple[Any, Tensor, Tensor]:
    torch.manual_seed(0)
    criterion = package.MaskedDistillLoss(8, 4, pretrained=package.MaskLearner(8, 4)).eval()
    return criterion, torch.randn(2, 8, 4, 4, requires_grad=True), torch.randn(2, 8, 4, 4)


def run(criterion: Any, student: Tensor, teacher: Tensor) -> list[Tensor]:
    torch._dynamo.reset()
    results = []
    for function in (criterion, torch.compile(criterion, fullgraph=True, backend="aot_eager")):
        loss = function(student, teacher)
        results += [loss.detach(), *torch.autograd.grad(loss, student)]
    return results


def main() -> None:
    problems, want = [], None
    for _ in range(3):
        for name in [name for name in sys.modules if name.split(".")[0] == "maskd_triton"]:
            del sys.modules[name]
        gc.collect()
        problems.append(problem(importlib.import_module("maskd_triton")))
        for arguments in problems:
            got = run(*arguments)
            want = want or got
            assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(got, want, strict=True))
    print("computed")


if __name__ == "__main__":
    main()
