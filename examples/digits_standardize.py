"""Which tokens collapse on raw, standardised and isotropic features: `python -m examples.digits --standardize`."""

import copy
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from maskd_triton import MaskLearner
from maskd_triton.diagnostics import ALL_WEIGHT, EMPTY, EVERYWHERE

from .digits_data import Scenes
from .digits_models import PyramidNet
from .digits_tasks import task_loss
from .digits_training import Tick, learn_tokens

KINDS = {"raw": False, '"channel"': "channel", '"isotropic"': "isotropic"}


@dataclass(frozen=True)
class TokensRun:
    """One stage 1, judged on the validation scenes.

    Attributes:
        channels: of the teacher: "as trained", or "100 : 1" apart.
        standardize: a key of `KINDS`.
        lost: tokens that are empty or on everywhere, over all levels.
        ruled: levels in which one token has all the weight.
        entropy: of the mask weights, mean over levels.
        task_loss: on masked features.
    """

    channels: str
    standardize: str
    seed: int
    lost: int
    ruled: int
    entropy: float
    task_loss: float
    coverage: list[list[float]]
    weight: list[list[float]]


def teachers(teacher: PyramidNet) -> dict[str, PyramidNet]:
    """The teacher, and the same function with feature channels of very different sizes: the head undoes the neck's factors."""
    apart = copy.deepcopy(teacher)
    with torch.no_grad():
        for smooth, conv in zip(apart.neck.smooth, apart.head.convs, strict=True):
            factor = torch.logspace(-1, 1, smooth.out_channels, device=smooth.weight.device)
            smooth.weight *= factor[:, None, None, None]
            smooth.bias *= factor
            conv[0].weight /= factor[:, None, None]
    return {"as trained": teacher, "100 : 1": apart}


def compare(
    teacher: PyramidNet, train: Scenes, validation: Scenes, steps: int, seeds: int, tick: Callable[[str], Tick]
) -> list[TokensRun]:
    """Every kind of features of both teachers, with the same seeds."""
    runs = []
    for channels, model in teachers(teacher).items():
        for kind, standardize in KINDS.items():
            for seed in range(seeds):
                ticking = tick(f"{channels}, {kind}, seed {seed}")
                learner, _ = learn_tokens(model, train, steps, ticking, standardize, seed)
                runs.append(judge(model, learner, validation, channels, kind, seed))
    return runs


@torch.no_grad()
def judge(teacher: PyramidNet, learner: MaskLearner, scenes: Scenes, channels: str, kind: str, seed: int) -> TokensRun:
    masked = learner(teacher.features(scenes.images))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of masks that are of no use: they are what is counted here
        levels = learner.diagnostics().values()
    coverage, weight = [x.coverage.tolist() for x in levels], [x.weight.tolist() for x in levels]
    return TokensRun(
        channels,
        kind,
        seed,
        lost=sum(not EMPTY <= value <= EVERYWHERE for level in coverage for value in level),
        ruled=sum(max(level) > ALL_WEIGHT for level in weight),
        entropy=statistics.mean(float(x.entropy) for x in levels),
        task_loss=float(task_loss(teacher.scores(masked), scenes.labels)),
        coverage=coverage,
        weight=weight,
    )


def table(runs: Sequence[TokensRun], unmasked: float) -> list[str]:
    """Rows of a Markdown table, sums and means over seeds."""
    rows = [
        "| teacher's channels | features | tokens lost | levels that one token rules | entropy of the weights | task loss |",
        "|---|---|---|---|---|---|",
        f"| | not masked | | | | {unmasked:.3f} |",
    ]
    for channels, kind in dict.fromkeys((run.channels, run.standardize) for run in runs):
        own = [run for run in runs if (run.channels, run.standardize) == (channels, kind)]
        tokens, levels = (sum(len(x) for run in own for x in run.coverage), sum(len(run.coverage) for run in own))
        entropy, loss = (statistics.mean(getattr(run, name) for run in own) for name in ("entropy", "task_loss"))
        lost, ruled = sum(run.lost for run in own), sum(run.ruled for run in own)
        rows.append(f"| {channels} | {kind} | {lost} of {tokens} | {ruled} of {levels} | {entropy:.2f} | {loss:.3f} |")
    return rows
