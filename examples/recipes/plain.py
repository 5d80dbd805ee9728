"""Plain PyTorch: mixed precision, gradient accumulation, a checkpoint that resumes, the student alone at the end.

python -m examples.recipes.plain
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from examples.recipes.tiny import Segmenter, batches, learn_tokens, task_loss
from maskd_triton import FrozenTeacher, MaskedDistillLoss

ACCUMULATE = 2


class Distillation(nn.Module):
    """Student and criterion as one module: what an optimiser, DDP, FSDP and torch.compile see is all that trains.

    The align convolutions inside the criterion are trained with the student, so they must be inside the wrapped module.
    """

    def __init__(self, student: Segmenter, teacher: Segmenter, criterion: MaskedDistillLoss) -> None:
        super().__init__()
        self.student, self.criterion = student, criterion
        self.teacher = FrozenTeacher(teacher)  # no parameters, no state dict, stays in eval mode

    def forward(self, images: Tensor, labels: Tensor, advance: bool = True) -> Tensor:
        scores, levels = self.student(images)
        _, targets = self.teacher(images)
        return task_loss(scores, labels) + self.criterion(levels, targets, advance=advance)


def build(seed: int = 0) -> Distillation:
    """A student of half the teacher's channels; tokens learned on the teacher."""
    torch.manual_seed(seed)
    student, teacher = Segmenter(8), Segmenter(16)
    criterion = MaskedDistillLoss(
        teacher.channels, 4, student_channels=student.channels, standardize=True, custom_mask_warmup=3,
        pretrained=learn_tokens(teacher),
    )  # fmt: skip
    return Distillation(student, teacher, criterion)


def main(steps: int = 6) -> list[float]:
    """Train, save and resume half-way; the losses of every step."""
    model = build()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    trained = [p for p in model.parameters() if p.requires_grad]  # tokens and mask weights are frozen
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    losses = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "checkpoint.pt")
        for step in range(steps):
            if step == steps // 2:  # as after a restart
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)
                state = torch.load(checkpoint, weights_only=True)
                model.load_state_dict(state["model"])  # holds the warm-up counter, too
                optimizer.load_state_dict(state["optimizer"])
            total = 0.0
            for i, (images, labels) in enumerate(batches(ACCUMULATE, seed=step)):
                with torch.autocast(device.type, torch.bfloat16):
                    loss = model(images.to(device), labels.to(device), advance=i == ACCUMULATE - 1)
                (loss / ACCUMULATE).backward()
                total += float(loss.detach()) / ACCUMULATE
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
        torch.save(model.student.state_dict(), Path(folder, "student.pt"))  # export: the student alone
    return losses


if __name__ == "__main__":
    print(main())
