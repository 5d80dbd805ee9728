"""mmengine, and detectors in mmdet 3's style: a hook for stage 1, one more entry in ``loss`` for stage 2. Extra: ``recipes``.

Nothing of mmcv or mmdet is imported: any detector with ``extract_feat(images)``, ``loss(images, samples)`` and a module whose
output is masked (``neck``) fits.

    python -m examples.recipes.mmdet_detector
"""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from examples.recipes import EXTRA, missing
from examples.recipes.tiny import Segmenter, batches, task_loss
from maskd_triton import FrozenTeacher, MaskedDistillLoss, MaskLearner
from maskd_triton.shapes import valid_pixels

try:
    from mmengine.hooks import Hook
    from mmengine.model import BaseModel
    from mmengine.runner import Runner
except ModuleNotFoundError as error:
    raise missing(error, EXTRA) from None


class Detector(BaseModel):
    """Stands for an mmdet 3 detector: ``neck``, ``extract_feat``, ``loss``, samples with ``metainfo``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = Segmenter(width)
        self.channels, self.neck = self.net.channels, self.net.backbone

    def extract_feat(self, batch_inputs: Tensor) -> tuple[Tensor, ...]:
        return self.neck(batch_inputs)

    def loss(self, batch_inputs: Tensor, batch_data_samples: list[Any]) -> dict[str, Tensor]:
        scores, _ = self.net(batch_inputs)
        return {"loss_cls": task_loss(scores, torch.stack([sample.gt for sample in batch_data_samples]))}

    def forward(self, inputs: Tensor, data_samples: list[Any], mode: str = "tensor") -> Any:
        return self.loss(inputs, data_samples) if mode == "loss" else self.extract_feat(inputs)


def valid_of(inputs: Tensor, data_samples: list[Any], mode: str = "tensor") -> Tensor:
    """The pixels of a batch that are no padding, from what ``forward`` is called with."""
    sizes = [tuple(sample.metainfo["img_shape"][:2]) for sample in data_samples]
    return valid_pixels(sizes, (inputs.shape[2], inputs.shape[3]), inputs.device)


class LearnTokens(Hook):
    """Stage 1: masks the output of ``module`` while the runner trains, and adds ``loss_dice`` to the detector's losses.

    The runner's optimiser must have the learner's parameters and no others.
    """

    priority = "HIGHEST"

    def __init__(self, learner: MaskLearner, module: str = "neck") -> None:
        self.learner, self.module, self.stack = learner, module, ExitStack()

    def before_train(self, runner: Runner) -> None:
        detector = runner.model
        self.stack.enter_context(self.learner.attach(detector, self.module, valid=valid_of))
        loss: Callable[..., dict[str, Tensor]] = detector.loss

        def with_dice(batch_inputs: Tensor, samples: list[Any]) -> dict[str, Tensor]:
            return loss(batch_inputs, samples) | {"loss_dice": self.learner.dice_loss()}

        detector.loss = with_dice
        self.stack.callback(detector.__dict__.pop, "loss")

    def after_train(self, runner: Runner) -> None:
        self.stack.close()


def distil(detector: Any, teacher: Any, criterion: MaskedDistillLoss) -> Any:
    """``detector``, whose ``loss`` has the entry ``loss_maskd`` from now on; mmengine adds up all that are called loss."""
    base = type(detector)

    class Distilled(base):  # type: ignore[misc, valid-type]
        def loss(self, batch_inputs: Tensor, batch_data_samples: list[Any]) -> dict[str, Tensor]:
            losses = super().loss(batch_inputs, batch_data_samples)
            valid = valid_of(batch_inputs, batch_data_samples)
            with torch.no_grad():
                targets = self.teacher.model.extract_feat(batch_inputs)
            losses["loss_maskd"] = self.criterion(self.extract_feat(batch_inputs), targets, valid=valid)
            return losses

    detector.__class__ = Distilled
    detector.teacher, detector.criterion = FrozenTeacher(teacher), criterion
    return detector


def data_of(steps: int) -> list[dict[str, Any]]:
    data = []
    for images, labels in batches(steps):
        samples = [SimpleNamespace(gt=label, metainfo={"img_shape": (32, 40)}) for label in labels]
        data.append({"inputs": images, "data_samples": samples})
    return data


def train(model: Any, steps: int, hooks: list[Hook], parameters: Any) -> list[float]:
    """Losses of a few steps under mmengine's Runner."""
    losses = []

    class Losses(Hook):
        def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
            losses.append(float(outputs["loss"].detach()))

    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(
            model, folder, train_dataloader=torch.utils.data.DataLoader(data_of(steps), collate_fn=lambda batch: batch[0]),
            train_cfg={"by_epoch": False, "max_iters": steps}, custom_hooks=[*hooks, Losses()], log_level="ERROR",
            optim_wrapper={"optimizer": torch.optim.AdamW(parameters, lr=0.01)},
            default_hooks={"checkpoint": None, "logger": None, "runtime_info": None},
            experiment_name=type(model).__name__,
        )  # fmt: skip
        runner.train()
    return losses


def main(steps: int = 6) -> list[float]:
    """Both stages; the losses of stage 2."""
    torch.manual_seed(0)
    teacher, student = Detector(16), Detector(8)
    learner = MaskLearner(teacher.channels, num_tokens=4, standardize=True)
    with learner.calibrate(teacher, "neck", valid=valid_of):  # mean and deviation of its channels; a few hundred images
        for batch in data_of(steps):
            teacher(**batch)
    train(teacher, steps, [LearnTokens(learner)], learner.parameters())
    criterion = MaskedDistillLoss(
        teacher.channels, 4, student_channels=student.channels, standardize=True, custom_mask_warmup=3, pretrained=learner
    )  # fmt: skip
    model = distil(student, teacher, criterion)
    return train(model, steps, [], [p for p in model.parameters() if p.requires_grad])


if __name__ == "__main__":
    print(main())
