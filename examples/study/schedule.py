"""Runs the plan, on several processes at a time: a job starts when what it needs is done."""

import os
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context, parent_process
from pathlib import Path

import torch

from bench import environment

from .plan import ALONE, VARIANTS, Job, Settings, jobs
from .results import Line, Results
from .runs import Runner

FINAL = ("student", "timing")  # with the loss weight that was chosen
PACKAGES = ("torch", "triton", "numpy", "scikit-learn")


class Study:
    """The jobs of the plan that the results lack.

    Args:
        settings: of the plan.
        results: each job's line is appended to them once it is done.
        folder: for teachers and tokens.
        workers: processes; 1: all runs in this one.
    """

    def __init__(self, settings: Settings, results: Results, folder: Path, workers: int = 1) -> None:
        self.settings, self.results, self.folder, self.workers = settings, results, folder, workers

    def run(self, budget: float, say: Callable[[str], object] = print) -> bool:
        """Starts what is left until ``budget`` seconds are over; whether nothing is left."""
        end = time.perf_counter() + budget
        plan = list(jobs(self.settings))
        left = [job for job in plan if job.key not in self.results.done]
        if not left:
            return True
        described = environment.describe(torch.device("cpu"), PACKAGES)
        self.results.append({"what": "session", "workers": self.workers, **described})
        clock = Clock(plan, self.results.done, self.workers)
        running: dict[Future[Line], Job] = {}
        with _executor(self.settings, self.folder, self.workers) as executor:
            while True:
                while len(running) < self.workers and time.perf_counter() < end and (job := self._next(left, running.values())):
                    weight = self.loss_weight(job.cell, job.variant) if job.what in FINAL else 0.0
                    future = executor.submit(_run, job, weight, self._unmeasured(job, running.values()))
                    running[future] = job
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    left.remove(job)
                    found = future.result()
                    self.results.add(job, found)
                    clock.took(job, found["wall_seconds"])
                    score = found.get("test", found.get("validation"))
                    shown = "" if score is None else f" {score:.3f}"
                    times = f"{found['wall_seconds']:.1f} s; {clock.left(left) / 60:.0f} minutes left"
                    say(f"[{len(plan) - len(left)}/{len(plan)}] {job}:{shown} ({times})")
        if left:
            say(f"stopped after {budget / 60:.0f} minutes with {len(left)} of {len(plan)} runs left")
        return not left

    def _next(self, left: Sequence[Job], running: Iterable[Job]) -> Job | None:
        """The first job whose needs are done. What is timed runs alone, and last."""
        started = set(running)
        if any(job.what == "timing" for job in started):
            return None
        waiting = (job for job in left if job not in started)
        found = next((job for job in waiting if not any(needs(job, other) for other in left)), None)
        alone = all(job.what == "timing" for job in left)
        return None if found and found.what == "timing" and not alone else found

    def _unmeasured(self, job: Job, running: Iterable[Job]) -> bool:
        """Whether no student of the cell and variant has its memory measured."""
        lines = (line for line in self.results.done.values() if line.get("peak_extra_bytes") is not None)
        measured = {(line["cell"], line["variant"]) for line in lines}
        measured |= {(other.cell, other.variant) for other in running if other.what == job.what}
        return (job.cell, job.variant) not in measured

    def loss_weight(self, cell: str, variant: str) -> float:
        """The one with the best mean over the tuning seeds on validation; the smallest of equals."""
        if variant == ALONE:
            return 0.0
        found: dict[float, list[float]] = {}
        for line in self.results.done.values():
            if line["what"] == "tuning" and (line["cell"], line["variant"]) == (cell, variant):
                found.setdefault(line["weight"], []).append(line["validation"])
        return max(sorted(found), key=lambda weight: statistics.mean(found[weight]))


def needs(job: Job, other: Job) -> bool:
    """Whether ``job`` can start only after ``other``."""
    if job.cell != other.cell:
        return False
    if other.what == "teacher":
        return job.what != "teacher" and job.teacher == other.teacher
    if other.what == "tokens":
        return job.variant is not None and job.teacher == other.teacher and VARIANTS[job.variant].tokens.name == other.tokens
    return other.what == "tuning" and job.what in FINAL and job.variant == other.variant


class Clock:
    """Guesses the time left from the runs so far: a step of each kind of run, or of any, if there is none yet."""

    def __init__(self, plan: Iterable[Job], done: dict[str, Line], workers: int = 1) -> None:
        self.workers = workers
        self.seconds: dict[str, list[float]] = {}
        for job in plan:
            if job.key in done:
                self.took(job, done[job.key]["wall_seconds"])

    def took(self, job: Job, seconds: float) -> None:
        self.seconds.setdefault(job.what, []).append(seconds / job.steps)

    def left(self, jobs: Iterable[Job]) -> float:
        means = {what: statistics.mean(values) for what, values in self.seconds.items()}
        return sum(job.steps * means.get(job.what, statistics.mean(means.values())) for job in jobs) / self.workers


class _Here(Executor):
    """Runs at once, in this process."""

    def submit(self, function: Callable[..., Line], /, *arguments: object, **options: object) -> "Future[Line]":
        future: Future[Line] = Future()
        future.set_result(function(*arguments, **options))
        return future


_runner: Runner | None = None


def _executor(settings: Settings, folder: Path, workers: int) -> Executor:
    threads = torch.get_num_threads()
    if workers == 1:
        _begin(settings, folder, threads)
        return _Here()
    # spawned: the threads of torch do not survive a fork
    return ProcessPoolExecutor(workers, get_context("spawn"), _begin, (settings, folder, threads))


def _begin(settings: Settings, folder: Path, threads: int) -> None:
    global _runner
    _runner = Runner(settings, folder)
    torch.set_num_threads(threads)
    parent = parent_process()
    if parent is not None:  # a worker whose study was killed would wait for ever
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _run(job: Job, loss_weight: float, measure: bool) -> Line:
    assert _runner is not None
    return _runner.run(job, loss_weight, measure)
