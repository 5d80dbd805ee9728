"""CUDA graphs: a captured step replays with the results of eager steps, across the warm-up switch. Needs a GPU."""

import copy

import pytest
import torch
from torch import Tensor

from maskd_triton import MaskedDistillLoss, MaskLearner

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
SIZES = ((2, 16, 24, 32), (2, 16, 13, 21), (2, 16, 7, 11))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_step_replays(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    learner = MaskLearner([16] * len(SIZES), 6)
    criterion = MaskedDistillLoss([16] * len(SIZES), 6, pretrained=learner, custom_mask_warmup=3).cuda()
    eager = copy.deepcopy(criterion)
    student = [torch.randn(size, device="cuda", dtype=dtype).requires_grad_() for size in SIZES]
    teacher = [torch.randn(size, device="cuda", dtype=dtype) for size in SIZES]

    def step(of: MaskedDistillLoss) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = of(student, teacher)
        return loss.detach(), torch.autograd.grad(loss, student)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(criterion)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grads = step(criterion)
    criterion.warmup_step.zero_()
    for i in range(6):
        with torch.no_grad():
            for x in (*student, *teacher):
                x.normal_()
        graph.replay()
        want_loss, want_grads = step(eager)
        assert torch.equal(loss, want_loss), i
        assert all(torch.equal(g, w) for g, w in zip(grads, want_grads, strict=True)), i
        assert torch.equal(criterion.warmup_step, eager.warmup_step)
