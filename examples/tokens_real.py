"""The teachers of the real tasks (`examples.real`), as `examples.tokens` takes them."""

from pathlib import Path
from typing import ClassVar

from torch import Tensor

from .real.data import CELLS
from .real.models import Net as RealNet
from .real.pictures import STREETS
from .real.tasks import Split, Task, load_task, objects_in
from .real.training import evaluate, features_of, load_teacher
from .tokens_study import Journal, Seen, Settings, Study
from .tokens_teachers import Net

CLASSES = {"camvid": STREETS[:-1], "bccd": CELLS}


class Teacher(Net):
    """A teacher of a real task; images are uint8."""

    metric: ClassVar[str] = "of the task"

    def __init__(self, net: RealNet, task: Task) -> None:
        super().__init__()
        self.net, self.task, self.channels = net, task, [net.width]

    def features(self, images: Tensor) -> list[Tensor]:
        return [features_of(self.net.features, images)]

    def loss(self, levels: list[Tensor], labels: Tensor) -> Tensor:
        return self.task.loss(self.net.head(levels[0]), labels)


def real_study(name: str, folder: Path, teachers: Path, settings: Settings, out: Path, journal: Journal) -> Study:
    """Of the task ``name`` in ``folder``, and of its teacher in ``teachers``, where `examples.real` has written it."""
    path = teachers / name / "teacher.pt"
    if not path.exists():
        raise SystemExit(
            f"{path}: not found; `python -m examples.real --task {name} --data {folder} --out {teachers}` trains it"
        )
    task = load_task(name, folder, settings.images)
    net = load_teacher(task, path).requires_grad_(False)
    size = list(task.val.images.shape[2:])
    journal.once(
        {"run": "teacher", "teacher": name},
        lambda: {"metric": task.metric, "test": evaluate(net, task, task.test)[task.metric], "images": size},
    )
    teacher = Teacher(net, task)
    return Study(name, teacher, *(seen_by(teacher, split) for split in (task.train, task.val)), settings, out)


def seen_by(teacher: Teacher, split: Split) -> Seen:
    classes = dict(zip(CLASSES[teacher.task.name], split.masks.unbind(1), strict=True))
    objects = objects_in(teacher.task, split)
    return Seen(split.images[:4] / 255, teacher.features(split.images), split.targets, objects, classes)
