"""The study: a run that was killed leaves the same results as another, students are paired, and losses are the known ones."""

import json
import math
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import close
from torch import Tensor
from torch.nn.functional import kl_div

pytest.importorskip("sklearn", reason="needs the demo extra")
pytest.importorskip("matplotlib", reason="needs the demo extra")

from examples import digits_tasks, digits_training
from examples.digits_data import DENSE, SPARSE, Kind, make_scenes
from examples.study import losses
from examples.study.plan import ALONE, CORE, VARIANTS, Job, Settings, Tokens, jobs, tokens_of, variants
from examples.study.results import Results, is_run, key, read
from examples.study.runs import Runner
from examples.study.schedule import Clock, Study, needs

ROOT = Path(__file__).parents[1]
TINY = Settings(
    scenes=(32, 8, 8),
    teachers=1,
    seeds=2,
    teacher_steps=1,
    token_steps=1,
    schedules=(1, 2),
    cells=("centres, sparse",),
    full=(),
    tries=(1.0, 3.0),
    tuning_seeds=(100,),
    points=1,
)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def silent(line: str) -> None:
    pass


def run(path: Path, settings: Settings = TINY, say: Any = silent, workers: int = 1) -> list[dict[str, Any]]:
    assert Study(settings, Results(path, settings), path.with_suffix(""), workers).run(600, say)
    return read(path)


def comparable(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what is measured, and how often the study was started."""
    measured = {"wall_seconds", "step_ms", "peak_extra_bytes"}
    runs = [line for line in lines if line["what"] != "session"]
    return [{k: v if k not in measured else v is None for k, v in line.items()} for line in runs]


def begin(path: Path, workers: int) -> "subprocess.Popen[bytes]":
    """The tiny study in a process of its own."""
    program = f"""
import torch
from pathlib import Path
from examples.study.plan import Settings
from examples.study.results import Results
from examples.study.schedule import Study
torch.set_num_threads(1)
settings = Settings(**{asdict(TINY)!r})
path = Path({str(path)!r})
Study(settings, Results(path, settings), path.with_suffix(""), {workers}).run(600)
"""
    return subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux")
def test_workers_end_with_their_study(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    process = begin(path, workers=2)
    while not path.exists() or len(path.read_text().splitlines()) < 3:  # a run is done
        assert process.poll() is None
        time.sleep(0.01)
    children = [Path("/proc") / pid for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    workers = [child for child in children if b"spawn_main" in (child / "cmdline").read_bytes()]
    assert workers
    process.kill()
    process.wait()
    end = time.monotonic() + 60
    while any(worker.exists() and "State:\tZ" not in (worker / "status").read_text() for worker in workers):
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
def test_a_killed_study_goes_on(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole.jsonl")
    broken = tmp_path / "broken.jsonl"
    process = begin(broken, workers=1)
    while not broken.exists() or len(broken.read_text().splitlines()) < 14:  # some students are trained
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = read(broken)
    assert 14 <= len(before) < len(whole)
    with broken.open("a") as file:
        file.write('{"what": "stu')  # killed within a line
    (tmp_path / "broken" / "centres-sparse-teacher_0.pt").unlink()  # is trained anew
    after = run(broken)
    assert after[: len(before)] == before
    assert comparable(after) == comparable(whole)
    assert [line["what"] for line in after].count("session") == 2
    assert run(broken) == after  # nothing is left

    several = comparable(run(tmp_path / "several.jsonl", workers=2))  # finished in another order
    assert sorted(several[1:], key=key) == sorted(comparable(whole)[1:], key=key)


def test_results_of_other_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    Results(path, TINY)
    with pytest.raises(ValueError, match="give another --out"):
        Results(path, Settings())
    path.write_text(path.read_text() + "no JSON\n{}\n")
    with pytest.raises(ValueError, match=r"line 2: expected a JSON object, got 'no JSON'"):
        read(path)


def test_budget(tmp_path: Path) -> None:
    path, said = tmp_path / "results.jsonl", []
    study = Study(TINY, Results(path, TINY), path.with_suffix(""))
    assert not study.run(0, said.append)
    plan = len(list(jobs(TINY)))
    assert said == [f"stopped after 0 minutes with {plan} of {plan} runs left"]


@pytest.mark.slow
def test_every_variant_runs(tmp_path: Path) -> None:
    settings = Settings(**asdict(TINY) | {"seeds": 1, "schedules": (1,), "tries": (1.0,), "full": TINY.cells})
    said: list[str] = []
    lines = run(tmp_path / "results.jsonl", settings, said.append)
    assert set(lines[1]) >= {"command", "date", "commit", "packages", "device"}  # the session
    students = {line["variant"]: line for line in lines if line["what"] == "student"}
    assert students.keys() == VARIANTS.keys()
    for line in students.values():
        assert 0 <= line["test"] <= 1
        assert [step for step, _ in line["curve"]] == [1]
        assert line["step_ms"] > 0
        assert (line["variant"] == ALONE) == (line["peak_extra_bytes"] is None)
    tokens = {line["tokens"]: line for line in lines if line["what"] == "tokens"}
    assert tokens.keys() == tokens_of(settings, TINY.cells[0]).keys() >= {"6 tokens, weighted, raw"}
    assert all(len(line["levels"]) == 3 for line in tokens.values())
    runs = [line for line in lines if is_run(line)]
    assert [key(line) for line in runs] == [job.key for job in jobs(settings)]
    assert len(said) == len(runs)
    assert all("minutes left)" in line for line in said)
    timed = {line["variant"]: line["step_ms"] for line in lines if line["what"] == "timing"}
    assert timed.keys() == VARIANTS.keys()
    assert min(timed.values()) > 0


def test_order_of_the_runs() -> None:
    """Whenever the study stops, all variants of a teacher and a seed are there, but for the last one's."""
    plan = list(jobs(Settings()))
    assert len({job.key for job in plan}) == len(plan)
    students = [job for job in plan if job.what == "student"]
    place = {cell: i for i, cell in enumerate(Settings().cells)}
    groups = [(job.steps, place[job.cell], job.seed, job.teacher) for job in students]
    assert groups == sorted(groups)
    done: set[Any] = set()
    for job in plan:  # what a run needs comes before it
        own = (job.cell, job.teacher)
        if job.what in ("tuning", "student"):
            assert ("tokens", *own, VARIANTS[str(job.variant)].tokens.name) in done
            assert needs(job, Job("teacher", *own))
            assert needs(job, Job("tokens", *own, VARIANTS[str(job.variant)].tokens.name))
            assert not needs(job, Job("teacher", job.cell, job.teacher + 1))
            assert needs(job, Job("tuning", job.cell, 0, variant=job.variant)) == (job.what == "student")
            assert not any(needs(job, other) for other in (job, Job("tuning", job.cell, 0, variant="another")))
        if job.what == "student" and job.variant != ALONE:
            assert ("tuning", job.cell, job.variant) in done
        done |= {(job.what, *own, job.tokens), ("tuning", job.cell, job.variant)} if job.what != "student" else set()


def test_times_are_taken_alone(tmp_path: Path) -> None:
    """Nothing is timed before all else is done, and nothing starts meanwhile."""
    settings = Settings(**asdict(TINY) | {"seeds": 1, "schedules": (1,)})
    study = Study(settings, Results(tmp_path / "results.jsonl", settings), tmp_path / "files", workers=2)
    timed = [job for job in jobs(settings) if job.what == "timing"]
    student = next(job for job in jobs(settings) if job.what == "student" and job.variant == ALONE)
    assert study._next(timed, []) == timed[0]
    assert study._next(timed, timed[:1]) is None
    assert study._next([student, *timed], [student]) is None
    assert study._next([student, *timed], []) == student


def test_plan_is_fair() -> None:
    settings = Settings()
    plan = list(jobs(settings))
    for cell in settings.cells:
        tried = [job for job in plan if job.what == "tuning" and job.cell == cell]
        for variant in variants(settings, cell, settings.schedules[0]):
            own = [(job.weight, job.seed) for job in tried if job.variant == variant]
            wanted = [] if variant == ALONE else [(w, s) for w in settings.tries for s in settings.tuning_seeds]
            assert own == wanted
    assert not set(settings.tuning_seeds) & set(range(settings.seeds))
    assert set(CORE) <= VARIANTS.keys()
    assert (settings.teachers, settings.seeds, len(settings.schedules)) == (2, 4, 3)


def test_loss_weight_is_the_best_on_validation(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.jsonl", TINY)
    study = Study(TINY, results, tmp_path / "files")
    scores = {(1.0, 100): 0.2, (1.0, 101): 0.4, (3.0, 100): 0.1, (3.0, 101): 0.6, (10.0, 100): 0.3, (10.0, 101): 0.4}
    for (weight, seed), score in scores.items():
        for variant, sign in (("cosine", 1), ("CWD", -1)):
            job = Job("tuning", "centres, sparse", 0, variant=variant, weight=weight, seed=seed, steps=1)
            results.add(job, {"validation": sign * score})
    assert study.loss_weight("centres, sparse", "cosine") == 3.0  # of .3, .35 and .35 the smaller weight
    assert study.loss_weight("centres, sparse", "CWD") == 1.0
    assert study.loss_weight("centres, sparse", ALONE) == 0


def test_time_left() -> None:
    plan = [Job("student", "x", 0, variant=ALONE, seed=seed, steps=10) for seed in range(4)]
    clock = Clock(plan, {plan[0].key: {"wall_seconds": 5.0}})
    assert clock.left(plan[1:]) == 15
    clock.took(plan[1], 15)
    assert clock.left(plan[2:]) == 20
    assert clock.left([]) == 0


@pytest.mark.slow
def test_students_of_a_seed_are_paired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All variants begin with the same student and the same aligns, and see the same batches."""
    settings = Settings(**asdict(TINY) | {"full": TINY.cells})
    study = Runner(settings, tmp_path)
    seen: list[tuple[list[Tensor], list[Tensor]]] = []
    drawn: list[Tensor] = []
    adamw, batches = digits_training._adamw, digits_training.batches

    def watched_adamw(parameters: Any, *others: Any) -> Any:
        parameters = list(parameters)
        seen.append(([p.detach().clone() for p in parameters], drawn))
        return adamw(parameters, *others)

    def watched_batches(*arguments: Any) -> Any:
        for batch in batches(*arguments):
            drawn.append(batch)
            yield batch

    study.levels(TINY.cells[0], 0)
    for variant in VARIANTS.values():
        study.learner(TINY.cells[0], 0, variant.tokens.name)
    monkeypatch.setattr(digits_training, "_adamw", watched_adamw)
    monkeypatch.setattr(digits_training, "batches", watched_batches)
    for seed in (0, 1):
        for variant in VARIANTS:
            drawn = []
            study._distil(Job("student", TINY.cells[0], 0, variant=variant, seed=seed, steps=2), 1.0)
    first, second = seen[: len(VARIANTS)], seen[len(VARIANTS) :]
    for runs in (first, second):
        alone, (longest, _) = runs[0], runs[1]
        for parameters, order in runs:
            assert len(order) == 2
            assert all(torch.equal(a, b) for a, b in zip(order, alone[1], strict=True))
            assert all(torch.equal(a, b) for a, b in zip(parameters, longest, strict=False))
            assert len(parameters) in (len(alone[0]), len(longest))
    assert not torch.equal(first[0][0][0], second[0][0][0])
    assert not torch.equal(first[0][1][0], second[0][1][0])


def test_losses_are_the_known_ones() -> None:
    torch.manual_seed(0)
    s, t = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    unit = s / s.norm(dim=1, keepdim=True), t / t.norm(dim=1, keepdim=True)
    close(losses.cosine_distance(s, t), 1 - (unit[0] * unit[1]).sum(1).mean(), 1e-6)
    rows = [(x.reshape(6, 20) / 4).log_softmax(1) for x in (s, t)]
    close(losses.channel_wise_divergence(s, t), 16 * kl_div(*rows, reduction="batchmean", log_target=True), 1e-6)


def test_losses_under_given_and_random_masks() -> None:
    torch.manual_seed(0)
    learner = losses.MaskLearner([4, 4], 3, False, standardize="channel")
    random = losses.with_random_tokens(learner, seed=5)
    for before, after in zip(learner.mask_modules, random.mask_modules, strict=True):
        close(after.mask_token.norm(dim=1), before.mask_token.norm(dim=1), 1e-6)
        assert torch.nn.functional.cosine_similarity(after.mask_token, before.mask_token).abs().min() < 0.9
    assert torch.equal(losses.with_random_tokens(learner, 5).mask_modules[1].mask_token, random.mask_modules[1].mask_token)

    labels = torch.zeros(2, 8, 8, dtype=torch.int64)
    labels[0, :4, :6] = 3
    teacher = [torch.randn(2, 4, side, side) for side in (4, 2)]
    student = [torch.randn(2, 2, side, side) for side in (4, 2)]
    masks = losses.truth_masks(labels, teacher)
    assert masks[0][0, 0].tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert masks[1][0, 0].tolist() == [[1, 0.5], [0, 0]]
    criterion = losses.TruthMasks(learner, [2, 2], loss_weight=2)
    want = torch.zeros(())
    for conv, s, t, m in zip(criterion.align, student, teacher, masks, strict=True):
        squares = m**2 * (conv(s) - t).square().mean(1, keepdim=True)
        want = want + 2 * (squares.sum((1, 2, 3)) / (m.sum((1, 2, 3)) + 1e-12)).mean()
    close(criterion(student, [*teacher, *masks]), want, 1e-6)


def test_names_of_tokens() -> None:
    assert Tokens().name == "6 tokens, weighted, channel"
    assert Tokens(1, False, False, False).name == "1 token, unweighted, raw, without Dice"


@pytest.mark.parametrize("kind", [DENSE, SPARSE])
def test_scenes(kind: Kind) -> None:
    """Every digit is where the scene says, and its middle is the one peak of the heat map."""
    scenes = make_scenes("test", 40, kind=kind)
    there = scenes.digits[..., 2] >= 0
    assert set(there.sum(1).tolist()) == set(range(kind.least, kind.most + 1))
    heat = digits_tasks.heat_maps(scenes.digits)
    assert heat.shape == (40, 10, 20, 20)
    assert (heat == 1).sum() == there.sum()
    reach = math.ceil(kind.sizes[-1] / 2)
    for n, k in there.nonzero().tolist():
        row, column, digit = scenes.digits[n, k].tolist()
        assert heat[n, int(digit), int(row) // 2, int(column) // 2] == 1
        top, left = max(int(row) - reach, 0), max(int(column) - reach, 0)
        around = scenes.labels[n, top : int(row) + reach, left : int(column) + reach]
        assert (around == 1 + digit).any()
    counted = {1 + int(d) for d in scenes.digits[..., 2][there].unique()}
    assert set(scenes.labels.unique().tolist()) == {0, *counted}
    assert len(scenes[:7]) == 7
    assert [len(part) for part in scenes.split(15)] == [15, 15, 10]


def test_heat_loss_is_the_focal_loss() -> None:
    scenes = make_scenes("test", 4)
    torch.manual_seed(0)
    scores = torch.randn(4, 10, 20, 20, dtype=torch.float64)
    p, y = scores.sigmoid(), digits_tasks.heat_maps(scenes.digits).double()
    each = torch.where(y == 1, (1 - p) ** 2 * p.log(), (1 - y) ** 4 * p**2 * (1 - p).log())
    want = -each.sum() / (scenes.digits[..., 2] >= 0).sum()
    close(digits_tasks.heat_loss(scores, scenes), want, 1e-6)


def average(candidates: list[list[tuple[float, int, float, float]]], digits: list[list[tuple[float, float, int]]]) -> float:
    found = torch.tensor(candidates)
    return digits_tasks.average_precision(found[..., 0], found[..., 1].long(), found[..., 2:], torch.tensor(digits).float())


def test_average_precision() -> None:
    there = [[(5.0, 5.0, 3), (20.0, 20.0, 3)]]
    right, other = (0.9, 3, 6.0, 6.0), (0.8, 3, 20.0, 22.9)
    assert average([[right, other]], there) == 1
    assert average([[right, (0.8, 3, 20.0, 23.1)]], there) == 0.5  # too far away
    assert average([[right, (0.8, 4, 20.0, 20.0)]], there) == 0.5  # another class
    assert average([[right, (0.8, 3, 5.0, 5.0)]], there) == 0.5  # found twice
    assert average([[(0.95, 3, 30.0, 5.0), other]], there) == 0.25  # half of the digits, at a precision of one half
    assert average([[right, (-math.inf, 3, 20.0, 20.0)]], there) == 0.5  # no candidate
    classes = [[(5.0, 5.0, 3), (20.0, 20.0, 4)]]
    assert average([[right, (0.8, 3, 20.0, 20.0)]], classes) == 0.5  # mean over classes
    assert average([[right], [other]], [[(5.0, 5.0, 3)], [(20.0, 20.0, 3)]]) == 1


def test_a_perfect_net_has_both_metrics_1() -> None:
    scenes = make_scenes("test", 10)

    class Heat(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return digits_tasks.heat_maps(scenes.digits)

    assert digits_tasks.mean_average_precision(Heat(), scenes) == 1  # type: ignore[arg-type]


@pytest.mark.slow
def test_command(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps({"what": "settings", "settings": {}}) + "\n")
    command = [sys.executable, "-m", "examples.study", "--quick", "--out", str(path)]
    failed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode == 1
    assert "give another --out" in failed.stderr
