"""docs/choosing.md does what it says: teachers without a head, several teachers, views, cached features, class tokens."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from maskd_triton import MaskLearner
from tests.helpers import DOCS, program

TEXT = (DOCS / "choosing.md").read_text()
ULPS = 16  # float64: sums over images in another order


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    return program("choosing.md")


def test_the_page(page: dict[str, Any]) -> None:
    for path in re.findall(r"\]\(((?!http)[^)#]+)", re.sub(r"^```.*?^```", "", TEXT, flags=re.M | re.S)):
        assert (DOCS / path).exists(), path
    assert all(page[name].isfinite() for name in ("loss", "class_loss"))
    for learner in (page["learner"], page["together"]):
        assert learner.mask_modules[0].mask_token.abs().max() > 0.03  # initialised with a deviation of 0.01
    assert all(p.grad is None for p in page["vit"].parameters())


@pytest.mark.parametrize("way", ["head first", "together"])
def test_teacher_without_a_task_head(page: dict[str, Any], way: str) -> None:
    """Task and Dice losses fall both ways; the teacher stays as it was, and the head where it was trained first."""
    torch.manual_seed(0)
    teacher, head = page["ViT"](), nn.Conv2d(32, 5, 1)
    images = torch.rand(4, 3, 32, 32)
    labels = (
        (torch.nn.functional.avg_pool2d(images, 8).mean(1) * 40)
        .long()
        .remainder(5)
        .repeat_interleave(8, 1)
        .repeat_interleave(8, 2)
    )
    before = copy.deepcopy(teacher.state_dict())

    def train(parameters: Any, loss: Callable[[], Tensor], steps: int) -> list[float]:
        optimizer, losses = torch.optim.Adam(parameters, lr=0.02), []
        for _ in range(steps):
            optimizer.zero_grad()
            value = loss()
            value.backward()
            optimizer.step()
            losses.append(float(value.detach()))
        return losses

    if way == "head first":
        with torch.no_grad():
            tokens = teacher(images)
        losses = train(head.parameters(), lambda: page["task_loss"](head, tokens, labels), 30)
        assert losses[-1] < losses[0]
    learner = MaskLearner(32, num_tokens=4, standardize=True)
    with learner.calibrate(teacher, "norm", **page["where"]):
        teacher(images)
    trained = [*learner.parameters(), *(head.parameters() if way == "together" else [])]
    head_before = copy.deepcopy(head.state_dict())
    tasks, dices = [], []

    def stage_1() -> Tensor:
        task = page["task_loss"](head, teacher(images), labels)
        tasks.append(float(task.detach()))
        dices.append(float(learner.dice_loss().detach()))
        return task + learner.dice_loss()

    with learner.attach(teacher, "norm", **page["where"]):
        train(trained, stage_1, 30)
    assert tasks[-1] < tasks[0]
    assert dices[-1] < dices[0]
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    moved = any(not torch.equal(x, head_before[name]) for name, x in head.state_dict().items())
    assert moved == (way == "together")


@pytest.fixture
def problem(page: dict[str, Any]) -> tuple[nn.ModuleDict, dict[str, Any], Tensor, Tensor]:
    """Criteria and teachers of the page in float64, the student's features and images."""
    teachers = {"vit": copy.deepcopy(page["vit"]).double(), "cnn": copy.deepcopy(page["cnn"]).double()}
    calls = {"vit": lambda x: teachers["vit"](x).detach()[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)}
    calls["cnn"] = lambda x: teachers["cnn"](x).detach()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 32, 32, generator=generator, dtype=torch.float64)
    features = torch.randn(4, 16, 8, 8, generator=generator, dtype=torch.float64, requires_grad=True)  # resized to 4x4
    return copy.deepcopy(page["criteria"]).double(), calls, features, images


def gradients(loss: Tensor, criterion: nn.Module, features: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [features, *criterion.align.parameters()]))


@pytest.mark.parametrize("customised", [False, True])
@pytest.mark.parametrize("name", ["vit", "cnn"])
def test_weight_of_a_teacher_for_an_image(page: dict[str, Any], problem: Any, name: str, customised: bool) -> None:
    """Loss and gradients are the weighted mean of those of the images alone; a dropped teacher gives exactly none."""
    criteria, teachers, features, images = problem
    criterion = criteria[name].eval()
    criterion.custom_mask_warmup = 0 if customised else 1
    keep = {"vit": torch.tensor([1.0, 0.0, 0.25, 1.0]).double(), "cnn": torch.tensor([0.0, 1.0, 1.0, 0.5]).double()}
    loss = page["several"](criteria, teachers, features, images, keep)[name]
    alone = [criterion(features[n : n + 1], teachers[name](images[n : n + 1])) for n in range(4)]
    want = sum(k * x for k, x in zip(keep[name], alone, strict=True)) / 4
    bound = ULPS * torch.finfo(torch.float64).eps
    assert want > 1e-3
    torch.testing.assert_close(loss, want, rtol=bound, atol=0)
    got, expected = gradients(loss, criterion, features), gradients(want, criterion, features)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=bound * float(b.abs().max()))
    dropped = keep[name] == 0
    assert torch.equal(got[0][dropped], torch.zeros_like(got[0][dropped]))
    assert (got[0][~dropped].abs().amax((1, 2, 3)) > 0).all()


@pytest.mark.parametrize("name", ["vit", "cnn"])
def test_dropped_by_valid_pixels(page: dict[str, Any], problem: Any, name: str) -> None:
    """The same without weights, also where what is dropped is not finite."""
    criteria, teachers, features, images = problem
    criterion = criteria[name].eval()
    keep = torch.tensor([True, False, True, True])
    (line,) = re.findall(r"`criterion\((.*?), valid=keep\[name\]\.bool\(\)\[:, None, None\]\)`", TEXT)
    assert line == "features, target"
    target = teachers[name](images)
    target[~keep] = float("nan")
    loss = criterion(features, target, valid=keep[:, None, None])
    want = criterion(features[keep], target[keep]) * 3 / 4
    bound = ULPS * torch.finfo(torch.float64).eps
    torch.testing.assert_close(loss, want, rtol=bound, atol=0)
    got, expected = gradients(loss, criterion, features), gradients(want, criterion, features)
    assert torch.equal(got[0][1], torch.zeros_like(got[0][1]))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=bound * float(b.abs().max()))


def test_the_check_of_the_teachers_normalisation(page: dict[str, Any]) -> None:
    """It fails for every other way to give the same pictures to the teacher."""
    (lines,) = re.findall(r"^# the check.*\n(.+\ntorch\.testing\.assert_close\(.*\))$", TEXT, re.M)
    right = page["to_teacher"]
    wrong = {
        "the student's own": lambda x: x,
        "none": lambda x: (x + 1) / 2,
        "of [0, 255]": lambda x: right(x) * 255,
        "BGR": lambda x: right(x).flip(1),
        "twice": lambda x: right(2 * right(x) - 1),
    }
    exec(lines, dict(page))
    for other in wrong.values():
        with pytest.raises(AssertionError, match="close"):
            exec(lines, page | {"to_teacher": other})


def test_cached_features(page: dict[str, Any]) -> None:
    maps, pictures = page["maps"], page["pictures"]
    assert page["mirrored"] < 0.9  # of a ViT with positions
    assert len(page["cache"]) == 2 * len(pictures)
    for (index, flipped), cached in page["cache"].items():
        view = pictures[index].flip(2) if flipped else pictures[index]
        want = maps(view[None])[0]
        torch.testing.assert_close(cached.float(), want, rtol=2**-8, atol=1e-6)  # rounded to bfloat16
        assert cosine_similarity(cached.float().flip(2).flatten(), want.flatten(), dim=0) < 0.99


def test_class_token_beside_the_map(page: dict[str, Any]) -> None:
    """The student and the projection learn from them, the teacher does not."""
    code = re.findall(r"^project = .*\npooled = .*\nclass_loss = .*$", TEXT, re.M)
    assert len(code) == 1
    names = dict(page)
    exec(code[0], names)
    student, project = names["student"], names["project"]
    for module in (student, project):
        module.zero_grad()
    names["class_loss"].backward()
    assert all(p.grad.abs().max() > 0 for p in [*student.parameters(), *project.parameters()])
    assert all(p.grad is None for p in page["vit"].parameters())
    pooled, token = project(student(page["images"]).mean((2, 3))), page["vit"](page["images"])[:, 0]
    cosine = (pooled * token).sum(1) / (pooled.norm(dim=1) * token.norm(dim=1))
    torch.testing.assert_close(names["class_loss"], 1 - cosine.mean())
