"""transformers' Trainer with a SegFormer student: ``compute_loss`` adds the distillation loss. Extra: ``recipes``.

python -m examples.recipes.hf_trainer
"""

import tempfile
from typing import Any

import torch
from torch import Tensor, nn

from examples.recipes import EXTRA, missing
from maskd_triton import FrozenTeacher, MaskedDistillLoss, MaskLearner

try:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, Trainer, TrainerCallback, TrainingArguments
except ModuleNotFoundError as error:
    raise missing(error, EXTRA) from None

LABELS = 5


def segformer(width: int) -> SegformerForSemanticSegmentation:
    """Randomly initialised; in practice ``from_pretrained``."""
    config = SegformerConfig(
        num_labels=LABELS, hidden_sizes=[width, 2 * width, 4 * width, 8 * width], depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 4], decoder_hidden_size=4 * width,
    )  # fmt: skip
    return SegformerForSemanticSegmentation(config)


def examples(count: int = 12, side: int = 64) -> list[dict[str, Tensor]]:
    """Random images, and labels that follow from their colours."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, side, side, generator=generator)
    labels = (images.sum(1) + LABELS / 2).long().clamp(0, LABELS - 1)
    return [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)]


class Distilled(nn.Module):
    """The model that the Trainer trains, saves and wraps: student and criterion."""

    def __init__(self, student: nn.Module, teacher: nn.Module, criterion: MaskedDistillLoss) -> None:
        super().__init__()
        self.student, self.teacher, self.criterion = student, FrozenTeacher(teacher), criterion

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        result = self.student(pixel_values=pixel_values, labels=labels, output_hidden_states=True)
        targets = self.teacher(pixel_values=pixel_values, output_hidden_states=True).hidden_states
        return {"loss": result.loss + self.criterion(result.hidden_states, targets), "logits": result.logits}


def learn_tokens(teacher: nn.Module, data: list[dict[str, Tensor]], channels: list[int]) -> MaskLearner:
    """Stage 1: the hidden states of all stages are masked, and the teacher's own head sees them."""
    learner = MaskLearner(channels, num_tokens=4, standardize=True)
    batches = [
        {name: torch.stack([example[name] for example in data[i : i + 4]]) for name in data[0]} for i in range(0, len(data), 4)
    ]
    with learner.calibrate(teacher, "segformer", output="hidden_states"):
        for batch in batches:
            teacher(**batch)
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.01)
    with learner.attach(teacher, "segformer", output="hidden_states"):
        for batch in batches:
            loss = teacher(**batch).loss + learner.dice_loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return learner


class Losses(TrainerCallback):
    """Keeps what the Trainer logs."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def main(steps: int = 6) -> list[float]:
    """Train for so many steps; the losses."""
    torch.manual_seed(0)
    data, seen = examples(), Losses()
    student, teacher = segformer(8), segformer(16)
    criterion = MaskedDistillLoss(
        teacher.config.hidden_sizes, 4, student_channels=student.config.hidden_sizes, standardize=True, custom_mask_warmup=3,
        pretrained=learn_tokens(teacher, data, teacher.config.hidden_sizes),
    )  # fmt: skip
    model = Distilled(student, teacher, criterion)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=4, learning_rate=3e-3, logging_steps=1, report_to=[],
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=data, callbacks=[seen]).train()  # type: ignore[arg-type]
        model.student.save_pretrained(folder)  # export: the student alone, to be loaded as any SegFormer
    return seen.losses


if __name__ == "__main__":
    print(main())
