"""Attaching a learner to what models return, to compiled models and to models under DDP."""

import contextlib
import dataclasses
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskd_triton import MaskLearner

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@dataclasses.dataclass
class Output:
    """A model output as transformers has them: levels beside other things."""

    feature_maps: Any = None
    hidden_states: Any = None
    loss: Any = None


class Neck(nn.Module):
    """Two levels in a container of choice."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.fine, self.coarse = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 3, stride=2)

    def forward(self, x: Tensor) -> Any:
        fine, coarse = self.fine(x), self.coarse(x)
        return {
            "list": lambda: [fine, coarse],
            "mapping": lambda: OrderedDict(p3=fine, p4=coarse),
            "output": lambda: Output((fine, coarse), hidden_states=(x, fine)),
            "hidden": lambda: Output(hidden_states=[fine, coarse]),
            "entries": lambda: {"levels": [fine, coarse], "size": 8},
            "number": lambda: 3,
        }[self.kind]()


class Teacher(nn.Module):
    def __init__(self, kind: str = "list") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.ModuleDict({"neck": Neck(kind)})
        self.head = nn.Conv2d(4, 2, 1)

    def levels(self, images: Tensor) -> Any:
        return self.body["neck"](images)

    def forward(self, images: Tensor) -> Tensor:
        fine, coarse = self.levels(images)
        return self.head(fine).mean() + coarse.square().mean()


def learner_of(**options: Any) -> MaskLearner:
    torch.manual_seed(1)
    learner = MaskLearner([4, 6], num_tokens=3, **options)
    with torch.no_grad():
        for module in learner.mask_modules:
            module.mask_token.mul_(100)
    return learner


CONTAINERS = [("output", None, "feature_maps"), ("hidden", "hidden_states", "hidden_states"), ("entries", "levels", "levels")]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "output", "field"), CONTAINERS)
def test_levels_inside_an_output(kind: str, output: str | None, field: str) -> None:
    teacher, learner = Teacher(kind), learner_of()
    plain = teacher.levels(IMAGES)
    as_dict = (lambda x: dict(vars(x))) if dataclasses.is_dataclass(plain) else dict
    want = learner(as_dict(plain)[field])
    with learner.attach(teacher, "body.neck", output=output):
        masked = teacher.levels(IMAGES)
    assert type(masked) is type(plain)
    before, after = as_dict(plain), as_dict(masked)
    assert before.keys() == after.keys()
    assert type(after[field]) is type(before[field])
    for a, b in zip(after.pop(field), want, strict=True):
        assert torch.equal(a, b)
    del before[field]
    assert str(after) == str(before)  # all else is passed through


WRONG: list[tuple[str, str | None, type[Exception], str]] = [
    ("hidden", None, ValueError, "in the field 'feature_maps' (output=) of Output, got 'feature_maps' (NoneType), 'hidden_states' (list)"),
    ("output", "maps", ValueError, "in the field 'maps' (output=) of Output, got 'feature_maps' (tuple)"),
    ("output", "hidden_states", ValueError, "output of the teacher's 'body.neck'[0]: expected 4 channels, got 3"),
    ("entries", "features", ValueError, "in the field 'features' (output=) of dict, got 'levels' (list), 'size' (int)"),
    ("entries", None, TypeError, "output of the teacher's 'body.neck'['levels']: expected a tensor, got list"),
    ("list", "levels", TypeError, "expected a mapping or dataclass with the field 'levels', got list"),
    ("number", None, TypeError, "output of the teacher's 'body.neck': expected a tensor, or a sequence or mapping of tensors, got int"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "output", "error", "sentence"), WRONG)
def test_outputs_that_do_not_fit(kind: str, output: str | None, error: type[Exception], sentence: str) -> None:
    teacher, learner = Teacher(kind), learner_of()
    with learner.attach(teacher, "body.neck", output=output), pytest.raises(error) as caught:
        teacher.levels(IMAGES)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("neck", "the teacher Teacher has no module 'neck'; did you mean 'body.neck'"),
        ("body.nek", "did you mean 'body.neck'"),
        ("zzz", "has no module 'zzz'; it has ['body', 'head']"),
    ],
)
def test_near_matches(name: str, sentence: str) -> None:
    with pytest.raises(AttributeError) as caught, learner_of().attach(Teacher(), name):
        pass
    assert sentence in str(caught.value)


def gradients(learner: MaskLearner, loss: Tensor) -> list[Tensor]:
    learner.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in learner.parameters()]


class Restless(nn.Module):
    """Buffers that a forward pass in train mode changes: spectral norm's, a count in place, an average put anew."""

    def __init__(self) -> None:
        super().__init__()
        self.neck = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3, padding=1))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("average", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count.add_(1)
            self.average = 0.9 * self.average + 0.1 * x.mean((0, 2, 3))
        return self.neck(x).square().mean()


@pytest.mark.parametrize("raises", [False, True])
def test_buffers_are_restored(raises: bool) -> None:
    teacher, learner = Restless(), MaskLearner(4, num_tokens=3)
    held, values = list(teacher.buffers()), [b.clone() for b in teacher.buffers()]
    with contextlib.suppress(KeyError), learner.attach(teacher, "neck"):
        loss = teacher(IMAGES) + learner.dice_loss()
        assert teacher.count == 1
        if raises:
            raise KeyError
    loss.backward()
    assert learner.mask_modules[0].mask_token.grad is not None
    assert all(now is then for now, then in zip(teacher.buffers(), held, strict=True))
    assert all(torch.equal(now, then) for now, then in zip(held, values, strict=True))


def test_backward_after_the_block_through_batch_norm() -> None:
    """Restoring must not touch what the backward pass holds."""
    teacher, learner = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), MaskLearner(4, num_tokens=3)
    with learner.attach(teacher, "0"):
        loss = teacher(IMAGES).square().mean()
    loss.backward()
    assert learner.mask_modules[0].mask_token.grad.abs().max() > 0


def test_one_learner_to_a_module() -> None:
    teacher, first, second = Teacher(), learner_of(), learner_of()
    with first.attach(teacher, "body.neck"):
        with pytest.raises(RuntimeError, match=r"attach: another learner is attached to the teacher's 'body\.neck'"):
            second.attach(teacher, "body.neck").__enter__()
        teacher(IMAGES).backward()
    with second.attach(teacher, "body.neck"):
        teacher(IMAGES)


@pytest.mark.slow
def test_compiled_inside_the_block() -> None:
    torch._dynamo.reset()
    teacher, learner = Teacher().train(), learner_of()
    with learner.attach(teacher, "body.neck"):
        want = gradients(learner, teacher(IMAGES) + learner.dice_loss())
        compiled = torch.compile(teacher, fullgraph=True, backend="aot_eager")
        got = gradients(learner, compiled(IMAGES) + learner.dice_loss())
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)
    assert all(p.grad is None for p in teacher.parameters())


def test_compiled_before_is_refused() -> None:
    in_place = Teacher()
    in_place.body["neck"].compile()
    for teacher in (torch.compile(Teacher()), in_place):
        with pytest.raises(ValueError, match="compile it inside the block"), learner_of().attach(teacher, "body.neck"):
            pass


class Stage1(nn.Module):
    """What DDP wraps: one forward gives the whole loss."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.learner = Teacher(), learner_of()

    def forward(self, images: Tensor) -> Tensor:
        with self.learner.attach(self.teacher, "body.neck"):
            return self.teacher(images) + self.learner.dice_loss()


def _worker(rank: int, store: Path, results: Any) -> None:
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    stage = Stage1()
    stage.teacher.requires_grad_(False)  # before DDP looks: only tokens and mask weights are to be reduced
    parallel = nn.parallel.DistributedDataParallel(stage)
    for _ in range(2):
        parallel.zero_grad()
        parallel(IMAGES[2 * rank : 2 * rank + 2]).backward()
    results[rank] = [p.grad.numpy() for p in stage.learner.parameters()]
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ddp_equals_one_process_on_the_joined_batch(tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_worker, (tmp_path / "store", results), nprocs=2)
        first, second = results[0], results[1]
    stage = Stage1()
    stage.teacher.requires_grad_(False)
    want = gradients(stage.learner, stage(IMAGES))
    assert [n for n, p in stage.named_parameters() if p.requires_grad and not n.startswith("learner.")] == []
    for a, b, w in zip(first, second, want, strict=True):
        assert (a == b).all()
        assert (torch.from_numpy(a) - w).abs().max() <= 1e-5 * w.abs().max()


def test_shared_module_by_any_of_its_names() -> None:
    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 4, 1))
            self.neck = self.net[0]

        def forward(self, x: Tensor) -> Tensor:
            return self.neck(x)

    teacher, learner = Aliased(), MaskLearner(4, 3)
    x = torch.randn(2, 3, 4, 4)
    results = []
    for name in ("neck", "net.0"):
        with learner.attach(teacher, name):
            results.append(teacher(x))
    assert torch.equal(*results)
    assert not torch.allclose(results[0], teacher(x))
