"""What ``test_distributed.py`` runs: two processes against one with the joined batch."""

import copy
import itertools
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

from examples.recipes.tiny import Segmenter, batches
from maskd_triton import FrozenTeacher, MaskedDistillLoss, MaskLearner

STEPS = 4


class Distillation(nn.Module):
    """Stage 2: student and criterion as one module."""

    def __init__(self) -> None:
        super().__init__()
        teacher = Segmenter(8)
        self.student, self.teacher = Segmenter(6), FrozenTeacher(teacher)
        learner = MaskLearner(teacher.channels, 3)
        for module in learner.mask_modules:
            nn.init.normal_(module.mask_token)
        self.criterion = MaskedDistillLoss(
            teacher.channels, 3, student_channels=self.student.channels, custom_mask_warmup=2, pretrained=learner
        )

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        scores, levels = self.student(images)
        return cross_entropy(scores, labels) + self.criterion(levels, self.teacher(images)[1])


class Learning(nn.Module):
    """Stage 1: the teacher and the tokens it is masked with; the tokens alone are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = Segmenter(8).eval()
        self.learner = MaskLearner(self.teacher.channels, 3)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        with self.learner.attach(self.teacher, "backbone"):
            scores, _ = self.teacher(images)
            return cross_entropy(scores, labels) + self.learner.dice_loss()


def without_batch_statistics(module: nn.Module) -> None:
    """BatchNorm sees one half of the batch in each process, the whole in one: kept out of the comparison."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()


def full(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def calibrated(rank: int) -> None:
    """Statistics are those of all ranks' images, also where a rank has more than another, or none."""
    torch.manual_seed(0)
    teacher, batches = nn.Identity(), [torch.randn(3, 4, 5, 6).double() * (i + 1) + i for i in range(5)]
    parts = batches[2 * rank : 2 * rank + 2 + rank], batches if rank == 0 else []
    for own, kind in itertools.product(parts, ("channel", "isotropic")):
        learner = MaskLearner(4, 3, standardize=kind).double()
        with learner.calibrate(teacher, ""):
            for x in own:
                teacher(x)
        joined = torch.cat(batches)
        variance, mean = torch.var_mean(joined, (0, 2, 3), correction=0)
        square = variance + 1e-5 * variance.mean() if kind == "channel" else variance.mean().expand_as(variance)
        (module,) = learner.mask_modules
        torch.testing.assert_close(module.channel_mean, mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(module.channel_std, square.sqrt(), rtol=1e-12, atol=1e-12)
        assert module.pixels_seen == joined[:, 0].numel()


def main(mode: str) -> None:
    gpu = torch.cuda.is_available() and torch.cuda.device_count() >= 2
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(os.environ["STORE"], processes)
    dist.init_process_group("nccl" if gpu else "gloo", rank=rank, world_size=processes, store=store)
    device = torch.device(f"cuda:{rank}" if gpu else "cpu")
    if mode == "calibrate":
        calibrated(rank)
        if rank == 0:
            print(mode, "equal")
        return
    torch.manual_seed(0)
    single = (Learning() if mode == "learn" else Distillation()).double().to(device)
    if mode == "learn":
        single.teacher.requires_grad_(False)  # DDP takes what requires grad when it wraps
    module = copy.deepcopy(single)
    if mode == "fsdp":
        mesh = dist.device_mesh.init_device_mesh(device.type, (2,))
        for part in (module.student.backbone, module.student.head, module):
            fully_shard(part, mesh=mesh)
        wrapped: nn.Module = module
    else:
        wrapped = nn.parallel.DistributedDataParallel(module)  # no find_unused_parameters
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.05) for m in (wrapped, single)]
    for m in (wrapped, single):
        without_batch_statistics(m)
    for images, labels in batches(STEPS, images=4, size=(24, 32)):
        images, labels = images.double().to(device), labels.to(device)
        own = slice(2 * rank, 2 * rank + 2)
        losses = [wrapped(images[own], labels[own]), single(images, labels)]
        mean = losses[0].detach().clone()
        dist.all_reduce(mean)
        torch.testing.assert_close(mean / 2, losses[1].detach(), rtol=1e-10, atol=0)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
        for (name, p), q in zip(module.named_parameters(), single.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None) == (not p.requires_grad), name
            if p.grad is not None and q.grad is not None:
                scale = q.grad.abs().max() + 1e-30
                assert (full(p.grad) - q.grad).abs().max() <= 1e-9 * scale, name
        for optimizer in optimizers:
            optimizer.step()
    for (name, p), q in zip(module.named_parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(full(p.detach()), q.detach(), rtol=1e-8, atol=1e-10, msg=name)
    if mode != "learn":
        assert int(module.criterion.warmup_step) == STEPS
    if rank == 0:
        print(mode, "equal")


if __name__ == "__main__":
    main(sys.argv[1])
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)  # to take a group apart, torch's own threads now and then hang, or abort the process
