"""Which layer to distil, on the demo's task: `python -m examples.layers`, 20 minutes on one idle core.

One token is learned on each layer of the demo's teacher, and a student is distilled from the same layer. Loss weights are
chosen on validation, by a seed that is not reported. The file holds every run; what it holds is not run again.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bench import environment
from maskd_triton import MaskedDistillLoss, MaskLearner
from maskd_triton.capture import call

from .digits import Settings
from .digits_data import SPLITS, Scenes, make_scenes
from .digits_models import PyramidNet, make_student
from .digits_tasks import mean_iou, task_loss
from .digits_training import STUDENT_LR, TOKEN_LR, WEIGHT_DECAY, batches, train_teacher
from .intervals import interval
from .optimising import adamw, take_step

Runs = dict[str, dict[str, float]]  # scores on validation and test

ALONE, NECK = "student alone", "neck, three levels"
LAYERS: dict[str, str | list[str]] = {
    NECK: "neck",
    "neck, finest level alone": "neck.smooth.0",
    "backbone, three stages": "backbone",
    "backbone, last stage alone": "backbone.stages.2",
    "head's convolutions, before the norm": [f"head.convs.{i}.0" for i in range(3)],
    "head's convolutions, after the norm": [f"head.convs.{i}.1" for i in range(3)],
    "head's convolutions, after the ReLU": [f"head.convs.{i}" for i in range(3)],
}
WEIGHTS = (0.1, 0.3, 1, 3, 10, 30, 100)
TUNING_SEED = 100
SETTINGS = Settings(seeds=4)
FILE = Path(__file__).parents[1] / "bench/results/cpu-layers.json"


class Study:
    def __init__(self, settings: Settings, file: Path) -> None:
        self.settings, self.file = settings, file
        self.runs: Runs = json.loads(file.read_text())["runs"] if file.exists() else {}
        self.scenes = {split: make_scenes(split, n) for split, n in zip(SPLITS, settings.scenes, strict=True)}
        self.teacher = captured(train_teacher(self.scenes["train"], settings.teacher_steps, lambda: None))

    def all_layers(self) -> None:
        steps = 1 + len(LAYERS) * (len(WEIGHTS) + self.settings.seeds)
        with tqdm(total=steps, mininterval=10) as bar:
            for layer in (ALONE, *LAYERS):
                self.layer(layer, bar)

    def layer(self, layer: str, bar: tqdm) -> None:
        """Chooses the weight, and trains the students."""
        stage1 = None if layer == ALONE else learn(self.teacher, LAYERS[layer], self.scenes["train"], self.settings.token_steps)
        tries = [0] if layer == ALONE else WEIGHTS
        for weight in tries:
            self.run(layer, weight, TUNING_SEED, stage1)
            bar.update()
        weight = best_weight(self.runs, layer)
        for seed in range(self.settings.seeds):
            self.run(layer, weight, seed, stage1)
            bar.update()

    def run(self, layer: str, weight: float, seed: int, stage1: tuple[MaskLearner, list[Tensor]] | None) -> None:
        key = f"{layer}, weight {weight:g}, seed {seed}"
        if key not in self.runs:
            student = train_student(
                self.scenes["train"], LAYERS.get(layer, ()), stage1, weight, seed, self.settings.student_steps
            )
            self.runs[key] = {split: mean_iou(student, self.scenes[split]) for split in ("validation", "test")}
            self.write()

    def write(self) -> None:
        teacher = {split: mean_iou(self.teacher, self.scenes[split]) for split in ("validation", "test")}
        everything: dict[str, Any] = {"settings": vars(self.settings), "teacher": teacher, "runs": self.runs}
        self.file.write_text(json.dumps(everything | environment.describe(torch.device("cpu")), indent=1) + "\n")


def best_weight(runs: Runs, layer: str) -> float:
    """The best on validation of those that were tried."""
    tried = {w: runs.get(f"{layer}, weight {w:g}, seed {TUNING_SEED}") for w in (0, *WEIGHTS)}
    return max((w for w, run in tried.items() if run), key=lambda w: tried[w]["validation"])  # type: ignore[index]


def scores(runs: Runs, layer: str, seeds: int) -> list[float]:
    """Of the students at the best weight, on test."""
    weight = best_weight(runs, layer)
    return [runs[f"{layer}, weight {weight:g}, seed {seed}"]["test"] for seed in range(seeds)]


def table(runs: Runs, seeds: int) -> str:
    lines = ["| layer | weight | test mIoU | minus student alone | minus the neck |", "|---|---|---|---|---|"]
    alone, neck = scores(runs, ALONE, seeds), scores(runs, NECK, seeds)
    for layer in (ALONE, *LAYERS):
        own = scores(runs, layer, seeds)
        on_both = " | ".join("" if own == other else interval(differences(own, other)) for other in (alone, neck))
        shown = f"{statistics.mean(own):.3f} ± {statistics.stdev(own):.3f}"
        lines.append(f"| {layer} | {best_weight(runs, layer):g} | {shown} | {on_both} |")
    return "\n".join(lines)


def differences(own: list[float], other: list[float]) -> list[float]:
    return [a - b for a, b in zip(own, other, strict=True)]


def captured(net: PyramidNet) -> PyramidNet:
    """With ReLUs that leave the norm's output alone, which one may then distil."""
    for module in net.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return net


def learn(teacher: PyramidNet, names: str | list[str], train: Scenes, steps: int) -> tuple[MaskLearner, list[Tensor]]:
    """Stage 1 with one token, and the layer's features of all scenes."""
    with torch.no_grad():
        chunks = [call(teacher, names, images)[1] for images in train.images.split(200)]
    levels = [torch.cat(level) for level in zip(*chunks, strict=True)]
    torch.manual_seed(0)
    learner = MaskLearner([level.shape[1] for level in levels], num_tokens=1, standardize=True)
    with learner.calibrate(teacher, names):
        for images in train.images[:600].split(200):
            teacher(images)
    optimizer = torch.optim.Adam(learner.parameters(), TOKEN_LR, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-6)
    with learner.attach(teacher, names):
        for batch in batches(len(train), steps, seed=0):
            scenes = train[batch]
            take_step(task_loss(teacher(scenes.images), scenes.labels) + learner.dice_loss(), optimizer, schedule)
    print(learner.diagnostics())
    return learner, levels


def train_student(
    train: Scenes,
    names: Sequence[str],
    stage1: tuple[MaskLearner, list[Tensor]] | None,
    weight: float,
    seed: int,
    steps: int,
) -> PyramidNet:
    torch.manual_seed(seed)
    student = captured(make_student())
    trained = list(student.parameters())
    if stage1:
        learner, levels = stage1
        own = [level.shape[1] for level in call(student, names, train.images[:2])[1]]
        options = {"student_channels": own, "standardize": True, "custom_mask_warmup": steps // 4}
        criterion = MaskedDistillLoss(learner.channels, 1, loss_weight=weight, pretrained=learner, **options)
        trained += criterion.parameters()
    optimizer, schedule = adamw(trained, STUDENT_LR, WEIGHT_DECAY, steps)
    for batch in batches(len(train), steps, seed):
        scenes = train[batch]
        if stage1:
            scores, features = call(student, names, scenes.images)
            loss = task_loss(scores, scenes.labels) + criterion(features, [level[batch] for level in levels])
        else:
            loss = task_loss(student(scenes.images), scenes.labels)
        take_step(loss, optimizer, schedule)
    return student.eval()


def main(argv: Sequence[str] | None = None, settings: Settings = SETTINGS) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FILE, help="the file of results")
    study = Study(settings, parser.parse_args(argv).out)
    study.all_layers()
    print(table(study.runs, study.settings.seeds))


if __name__ == "__main__":
    main()
