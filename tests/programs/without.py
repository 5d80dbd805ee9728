"""What ``test_install.py`` and ``test_viz.py`` run: the package where another one, the argument, is not installed; prints the
error."""

import sys
from typing import Any


class Absent:
    """For ``sys.meta_path``: finds no package of this name."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, *_: Any) -> None:
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=self.package)


def triton() -> None:
    import torch

    from maskd_triton import functional as F

    student, teacher, tokens = torch.zeros(1, 4, 3, 3, requires_grad=True), torch.ones(1, 4, 3, 3), [torch.zeros(2, 4)]
    F.masked_distill_loss(student, teacher, tokens).backward()
    assert student.grad is not None
    assert abs(student.grad.sum().item() + 1) < 1e-6  # masks of a half: half of the MSE's -2
    assert "triton" not in sys.modules
    F.masked_distill_loss(student, teacher, tokens, impl="triton")


def matplotlib() -> None:
    import torch

    import maskd_triton

    assert "viz" in dir(maskd_triton)  # which does not import matplotlib
    maskd_triton.viz.plot_masks(torch.zeros(1, 3, 4, 4), [torch.zeros(1, 2, 4, 4)])


def main(package: str) -> None:
    sys.meta_path.insert(0, Absent(package))
    try:
        {"triton": triton, "matplotlib": matplotlib}[package]()
    except ModuleNotFoundError as error:
        print(error.name, error)


if __name__ == "__main__":
    main(*sys.argv[1:])
