"""Registration: opcheck, gradcheck and torch.compile."""

import pytest
import torch
from torch import Tensor

from maskd_triton import _ops


def arguments(layout: str, weighted: bool, impl: str, device: str, dtype: torch.dtype = torch.float32) -> tuple:
    """Arguments of the forward op: two levels of different sizes and channels."""
    torch.manual_seed(0)

    def features(c: int, p: int, grad: bool) -> Tensor:
        x = torch.randn(2, p, c).transpose(1, 2) if layout == "nlc" else torch.randn(2, c, p)
        return x.to(device, dtype).requires_grad_(grad)

    def frozen(*shape: int) -> Tensor:
        return torch.randn(*shape).to(device, dtype)

    student, teacher = ([features(5, 12, grad), features(7, 6, grad)] for grad in (True, False))
    rows, bias = ([frozen(9, 3, 5), frozen(9, 3, 7)], [frozen(3), frozen(3)]) if weighted else ([], [])
    tokens = [frozen(3, 5), frozen(3, 7)]
    step = torch.tensor(5, device=device)
    return student, teacher, tokens, rows, bias, [3, 2], True, step, 3, 1.5, 1e-12, impl


@pytest.mark.parametrize("layout", ["ncl", "nlc"])
@pytest.mark.parametrize("weighted", [True, False])
def test_opcheck(layout: str, weighted: bool, target: tuple[str, str]) -> None:
    args = arguments(layout, weighted, *target)
    torch.library.opcheck(_ops.distill, args)
    loss, masks, coefficients = (x.detach() for x in _ops.distill(*args))
    student = [s.detach() for s in args[0]]
    torch.library.opcheck(_ops.distill_backward, (torch.rand_like(loss), student, args[1], masks, coefficients, target[0]))


@pytest.mark.parametrize("weighted", [True, False])
def test_gradcheck(weighted: bool, target: tuple[str, str]) -> None:
    student, teacher, tokens, rows, bias, heights, _, *rest = arguments("ncl", weighted, *target, torch.float64)

    def loss(*levels: Tensor) -> Tensor:
        # masks that follow the student are constants for the gradient, so only uncustomised ones can be checked
        return _ops.distill(list(levels), teacher, tokens, rows, bias, heights, False, *rest)[0]

    assert torch.autograd.gradcheck(loss, student)
