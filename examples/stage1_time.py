"""How many forward passes of the teacher a step of stage 1 takes, in CPU time: `python -m examples.stage1_time`."""

import time
from collections.abc import Callable

import torch
from torch import nn

from maskd_triton import MaskLearner

from .digits_data import NUM_CLASSES, SIZE, make_scenes
from .digits_tasks import task_loss
from .real.models import make_teacher
from .tokens_teachers import Segmenter, ViT, teacher_of

ROUNDS = 12


def seconds(work: Callable[[], object]) -> float:
    """Of CPU time, the median of the rounds."""
    times = []
    for _ in range(ROUNDS):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return sorted(times)[ROUNDS // 2]


def measure(
    teacher: nn.Module, name: str, channels: list[int], images: torch.Tensor, labels: torch.Tensor
) -> tuple[float, float]:
    """Seconds of a forward pass, and of a step of stage 1 on the output of the module called ``name``."""
    teacher.eval()
    learner = MaskLearner(channels)
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.01, weight_decay=1e-3)

    def forward() -> None:
        with torch.no_grad():
            teacher(images)

    def step() -> None:
        optimizer.zero_grad()
        (task_loss(teacher(images), labels) + learner.dice_loss()).backward()
        optimizer.step()

    passed = seconds(forward)
    with learner.attach(teacher, name, layout="tokens" if isinstance(teacher, ViT) else None):
        return passed, seconds(step)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    scenes = make_scenes("train", 16)
    segmenter, vit = teacher_of("segmenter"), teacher_of("vit")
    assert isinstance(segmenter, Segmenter)
    pictures, classes = torch.randn(4, 3, 8 * SIZE, 8 * SIZE), torch.randint(NUM_CLASSES, (4, SIZE, SIZE))
    print(f"{'teacher':32}{'forward pass, ms':>18}{'step, ms':>12}{'passes a step':>16}")
    for what, teacher, name, channels, images, labels in (
        ("segmenter, neck", segmenter.net, "neck", segmenter.channels, scenes.images, scenes.labels),
        ("ViT, last norm", vit, "norm", vit.channels, scenes.images, scenes.labels),
        ("EfficientNet-Lite2, pyramid", make_teacher(NUM_CLASSES), "neck", [128], pictures, classes),
    ):
        forward, step = measure(teacher, name, channels, images, labels)
        print(f"{what:32}{1000 * forward:>18.1f}{1000 * step:>12.1f}{step / forward:>16.1f}")


if __name__ == "__main__":
    main()
