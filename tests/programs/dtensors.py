"""What ``test_distributed.py`` runs with one process and with two: DTensor features, against plain ones of the whole batch."""

import os
import sys
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor

from maskd_triton import MaskedDistillLoss, MaskLearner
from maskd_triton import functional as F


def full(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def close(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(full(a), b, rtol=1e-10, atol=1e-12)


def main() -> None:
    dist.init_process_group("gloo")
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    learner = MaskLearner([5, 4], 3).double()
    criterion = MaskedDistillLoss([5, 4], 3, pretrained=learner, loss_weight=0.5, custom_mask_warmup=1, eps=0.0).double()
    student, teacher = ([torch.randn(3, 5, 4, 6).double(), torch.randn(3, 4, 2, 3).double()] for _ in range(2))
    valid, weights = torch.rand(3, 8, 12) > 0.4, [torch.rand(3, 3).double() for _ in range(2)]
    valid[0] = False
    for placement in (Shard(0), Replicate()):

        def spread(x: Tensor, placement: Shard | Replicate = placement) -> DTensor:
            return distribute_tensor(x, mesh, [placement])

        def stage_2(place: Callable[[Tensor], Tensor], module: MaskedDistillLoss = criterion) -> list[Tensor]:
            found = []
            for reduction, options in (
                ("none", {}),
                ("sum", {"valid": place(valid)}),
                ("sum", {"mask_weights": [place(w) for w in weights]}),
                ("sum", {"masks": [place(torch.sigmoid(x[:, :2])) for x in student]}),
            ):
                levels = [place(x).requires_grad_() for x in student]
                loss = module(levels, [place(x) for x in teacher], reduction=reduction, **options)
                found += [loss.detach(), *torch.autograd.grad(loss.sum() * 3, levels)]
            return found

        def stage_1(place: Callable[[Tensor], Tensor], module: MaskLearner) -> list[Tensor]:
            levels = [place(x).requires_grad_() for x in teacher]
            found = []
            for padded in (None, place(valid)):
                ys = module(levels, valid=padded)
                loss = sum(y.square().sum() for y in ys) + module.dice_loss() * 5
                found += [loss.detach(), *ys, *torch.autograd.grad(loss, [*levels, *module.parameters()])]
            return found

        criterion.warmup_step.zero_()
        want = stage_2(lambda x: x.clone())
        criterion.warmup_step.zero_()
        got = stage_2(spread)
        close(got, want)
        assert got[0].placements == (Replicate(),)
        assert got[1].placements == (placement,)
        level = criterion.diagnostics()[1]  # of this rank's images
        assert level.coverage.isfinite().all()
        assert not isinstance(level.coverage, DTensor)
        want = stage_1(lambda x: x.clone(), learner)
        shared = MaskLearner([5, 4], 3, pretrained=learner).double()
        close(stage_1(spread, distribute_module(shared, mesh)), want)
    sharded = [distribute_tensor(x, mesh, [Shard(1)]) for x in student]
    with pytest.raises(ValueError, match="student and teacher: expected DTensors that are sharded along the batch"):
        criterion(sharded, [distribute_tensor(x, mesh, [Shard(0)]) for x in teacher])
    whole = [distribute_tensor(x, mesh, [Shard(0)]) for x in student]
    with pytest.raises(TypeError, match=r"teacher\[0\]: expected a DTensor with the placements of the features, .*got Tensor"):
        criterion(whole, teacher)
    with pytest.raises(ValueError, match=r"teacher\[0\]: expected the placements of the features, \(Shard\(dim=0\),\)"):
        criterion(whole, [distribute_tensor(x, mesh, [Replicate()]) for x in teacher])
    with pytest.raises(TypeError, match=r"valid: expected a DTensor with the placements of the features"):
        criterion(whole, [distribute_tensor(x, mesh, [Shard(0)]) for x in teacher], valid=valid)
    with pytest.raises(TypeError, match=r"mask_token: expected a DTensor, because features are DTensors"):
        learner(whole)
    tables = [level.mask_token for level in criterion.mask_modules]
    loss = F.masked_distill_loss(whole, [distribute_tensor(x, mesh, [Shard(0)]) for x in teacher], tables)
    close([loss], [F.masked_distill_loss(student, teacher, tables)])
    aligned = MaskedDistillLoss([5, 4], 3, student_channels=2, pretrained=learner).double().eval()
    narrow = [x[:, :2].clone() for x in student]
    plain = aligned(narrow, teacher)
    want = [plain.detach(), *torch.autograd.grad(plain, list(aligned.parameters()))]
    batch = [[distribute_tensor(x, mesh, [Shard(0)]) for x in maps] for maps in (narrow, teacher)]
    with pytest.raises(TypeError, match=r"align\[0\]: its parameters are plain tensors, the student's features DTensors"):
        aligned(*batch)
    loss = distribute_module(aligned, mesh)(*batch)
    close([loss.detach(), *torch.autograd.grad(loss, list(aligned.parameters()))], want)
    dist.destroy_process_group()
    print("equal")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # torch's own threads now and then abort a process of a group while it shuts down
