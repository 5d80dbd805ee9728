"""The study of tokens: it runs and goes on where it stopped, its teachers are what they say, and its page has its figures."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn", reason="needs the demo extra")
pytest.importorskip("pycocotools", reason="needs the test extra")

from examples import tokens, tokens_report, tokens_study
from examples.digits_data import make_scenes
from examples.intervals import interval
from examples.real.centres import average_precision
from examples.tokens_teachers import (
    Detector,
    boxes_of,
    focal,
    iou,
    objects_of,
    student_of,
    targets,
    teacher_of,
    truth,
    without_copies,
)
from maskd_triton import MaskModule
from tests import test_real

camvid, bccd = test_real.camvid, test_real.bccd  # fixtures
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results/cpu-tokens.jsonl"


@pytest.mark.slow
def test_a_small_run_and_a_second_one(tmp_path: Path, camvid: Path, bccd: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the demo extra")
    from examples.real.models import make_teacher

    for name, outputs in (("camvid", 11), ("bccd", 7)):
        (tmp_path / name).mkdir()
        torch.save(make_teacher(outputs).state_dict(), tmp_path / name / "teacher.pt")
    real: dict[str, Any] = {"folders": {"camvid": camvid, "bccd": bccd}, "teachers": tmp_path}
    settings = tokens.Settings((24, 8, 8), 32, (1, 1, 1), 16, 1, 1, 2, images=3)
    names = ("channel: as published", "channel: one token", "channel: unweighted", "raw: as published for segmentation")
    ways = {name: tokens.WAYS[name] for name in (*names, "channel: weighting slower", "channel: balanced weights")}
    tokens.run(settings, tmp_path, dict(list(ways.items())[:2]), ("feature MSE",))
    before = (tmp_path / "runs.jsonl").read_text()
    (tmp_path / "masks.png").unlink()
    students = ("feature MSE", "alone", "true boxes", "random masks", *names[:3])
    tokens.run(settings, tmp_path, ways, students, **real)
    after = (tmp_path / "runs.jsonl").read_text()
    assert after.startswith(before)
    lines = tokens_report.read(tmp_path / "runs.jsonl")
    assert [line["teacher"] for line in lines if line["run"] == "teacher"] == [*tokens.LR, "camvid", "bccd"]
    left_out = len(ways.keys() & tokens.LEFT_OUT)  # by the detector
    assert len(lines) == 2 + 5 * (1 + len(ways) + len(tokens.GIVEN)) + 3 * 2 * len(students) - left_out
    assert len({json.dumps([line.get(key) for key in ("run", "teacher", "name", "seed", "date")]) for line in lines}) == len(
        lines
    )
    verdicts = [level["verdict"] for line in lines if line["run"] == "tokens" for level in line["levels"]]
    assert verdicts
    assert all(verdict.startswith(("selective: ", "plain MSE: ", "background: ")) for verdict in verdicts)
    assert "| standardised, one token |" in "\n".join(tokens_report.tables(lines))
    assert (tmp_path / "masks.png").exists()


def test_a_teacher_that_is_missing(tmp_path: Path, camvid: Path) -> None:
    from examples.tokens_real import real_study

    journal = tokens.Journal(tmp_path / "runs.jsonl")
    with pytest.raises(SystemExit, match=r"teacher.pt: not found; `python -m examples.real --task camvid .*` trains it"):
        real_study("camvid", camvid, tmp_path, tokens.QUICK, tmp_path, journal)


def test_what_slows_the_weighting() -> None:
    """Each way changes what its name says, and nothing else."""
    modules = [MaskModule(8, 3)]
    before = modules[0].prob[2].weight.detach().clone()
    plain, slow, alone, small = (
        tokens_study.optimizer_of(modules, tokens.WAYS[f"channel: {name}"])
        for name in ("as published", "weighting slower", "weight decay 0.1, weighting only", "weighting smaller at the start")
    )
    assert [group["lr"] for group in plain.param_groups] == [0.01] * 5
    assert [group["lr"] for group in slow.param_groups] == [0.01, 0.01 / 72, 0.01, 0.01 / 8, 0.01]
    assert [group["weight_decay"] for group in alone.param_groups] == [0] + [0.1] * 4
    assert len(small.param_groups) == 5
    torch.testing.assert_close(modules[0].prob[2].weight.detach(), 0.01 * before)


def test_boxes_and_targets() -> None:
    scenes = make_scenes("train", 4)
    classes, boxes = boxes_of(scenes.labels)
    inside = objects_of(scenes.labels)
    for n, label in enumerate(scenes.labels):
        found = [q for q in range(4) if classes[n, q]]
        assert sorted(classes[n, found].tolist()) == sorted(
            {int(part.max()) for half in label.split(20) for part in half.split(20, 1)} - {0}
        ) or len(set(classes[n, found].tolist())) < len(found)
        for q in found:
            top, left, bottom, right = boxes[n, q].tolist()
            digit = label[top:bottom, left:right] == classes[n, q]
            assert digit.any(0)[[0, -1]].all()
            assert digit.any(1)[[0, -1]].all()
            assert inside[n, top:bottom, left:right].all()
        assert (label > 0).sum() == ((label > 0) & inside[n]).sum()
        assert inside[n].sum() == sum((b - t) * (r - le) for t, le, b, r in boxes[n, found].tolist())
    kinds, sides, hit = targets(classes, boxes, 10)
    assert torch.equal(kinds.amax(1) > 0, hit)
    assert (sides[hit] > 0).all()
    n, y, x = (i[0].item() for i in hit.nonzero(as_tuple=True))
    top, left, bottom, right = (8 * sides[n, y, x] * torch.tensor([-1, -1, 1, 1]) + torch.tensor([y, x, y, x]) * 4 + 2).tolist()
    assert [top, left, bottom, right] in boxes[n].tolist()


def test_losses_of_the_detector() -> None:
    logits, target = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.0])
    p = logits.sigmoid()
    want = -0.25 * (1 - p[0]) ** 2 * p[0].log() - 0.75 * p[1] ** 2 * (1 - p[1]).log()
    torch.testing.assert_close(focal(logits, target), want)
    one, other = torch.tensor([[1.0, 1, 1, 1]]), torch.tensor([[1.0, 1, 3, 1]])
    assert iou(one, other).item() == pytest.approx(0.5)


@pytest.mark.parametrize("kind", tokens.LR)
def test_student_and_teacher_have_levels_of_the_same_size(kind: str) -> None:
    scenes = make_scenes("train", 2)
    with torch.no_grad():
        levels, others = (net.eval().features(scenes.images) for net in (teacher_of(kind), student_of(kind)))
        assert [x.shape[2:] for x in levels] == [x.shape[2:] for x in others]
        assert [x.shape[1] for x in levels] == teacher_of(kind).channels
        assert student_of(kind).eval().score(scenes) <= 1
    assert teacher_of(kind).metric == student_of(kind).metric


def test_interval() -> None:
    assert interval([1.0, 2.0, 3.0, 4.0]) == "+2.500 ± 2.054"  # 3.182 * 1.291 / 2


def test_masks_against_the_truth() -> None:
    left, right = torch.tensor([1.0, 1, 0, 0]).expand(1, 4, 4), torch.tensor([0.0, 0, 1, 1]).expand(1, 4, 4)
    half = torch.tensor([1.0, 0, 0, 0]).expand(1, 4, 4)
    found = tokens_study.truth(torch.stack([half, right], 1), left, {"half": half, "none": torch.zeros(1, 4, 4)})
    assert found == {"iou_boxes": 0.5, "iou_background": 1, "iou_classes": {"half": 1, "none": 0}}


def test_detector_learns_boxes_on_every_level() -> None:
    torch.manual_seed(0)
    net, scenes = Detector((4, 4, 4), 4), make_scenes("train", 2)
    net.loss(net.features(scenes.images), scenes.labels).backward()
    assert all(conv.weight.grad.abs().max() > 0 for conv in net.neck.smooth)


def test_detections_of_the_detector() -> None:
    """Boxes around their places, each class by itself, without copies."""
    net, scenes = Detector((4, 4, 4), 4).eval(), make_scenes("train", 2)
    for conv in (net.cls, net.reg):
        torch.nn.init.zeros_(conv.weight)
    torch.nn.init.constant_(net.reg.bias, math.log(math.e - 1))  # 8 pixels to each side
    with torch.no_grad():
        net.cls.bias[3] = 5
        rows = net.detections(scenes.images)[0]
    assert rows[:, 5].eq(3).all()
    assert rows[:, 4].eq(torch.tensor(5.0).sigmoid()).all()
    torch.testing.assert_close(rows[:, 2:4] - rows[:, :2], torch.full((len(rows), 2), 16.0))
    assert rows[0, :2].tolist() in [[x - 8, y - 8] for x in range(1, 40, 2) for y in range(1, 40, 2)]
    assert 1 < len(rows) < 25  # of 50 candidates
    assert without_copies(rows[None]).all()


def test_average_precision_of_the_truth() -> None:
    """It is 1, also with worse copies, which are left out, and less if every box is moved."""
    labels = make_scenes("test", 4).labels
    objects = truth(labels)
    assert [len(x.boxes) for x in objects] == [int((boxes_of(labels)[0][n] > 0).sum()) for n in range(4)]
    found = []
    for x in objects:
        sure = torch.cat([x.boxes, torch.full((len(x.boxes), 1), 0.9), x.classes[:, None]], 1)
        copies = sure + torch.tensor([1.0, 0, 1, 0, -0.4, 0])
        both = torch.cat([sure, copies])
        found.append(both[without_copies(both[None])[0]])
        assert torch.equal(found[-1], sure)
    assert average_precision(found, objects, 10)["mAP"] == pytest.approx(1)
    moved = [rows + torch.tensor([4.0, 0, 4, 0, 0, 0]) for rows in found]
    assert average_precision(moved, objects, 10)["mAP"] < 0.5


def page() -> tuple[str, list[dict[str, Any]]]:
    return (ROOT / "docs/tokens.md").read_text(), tokens_report.read(RESULTS)


def test_the_page_has_the_figures_of_the_results() -> None:
    text, lines = page()
    assert tokens_report.with_tables(text, lines) == text, "run python -m examples.tokens_report"
    missing = [row for row in tokens_report.tables(lines) if row not in text]
    assert not missing
