"""Attaching a learner: which level a call gives, the teacher as it was, gradients through checkpoints, valid pixels."""

import contextlib
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from maskd_triton import FrozenTeacher, MaskLearner, shapes
from tests.teachers import IMAGES, Checkpointed, NestedTensor, SharedHead, Yolo, gradients, learner_of, no_hooks, seeded

MASK = torch.ones(2, 8, 12, dtype=torch.bool)
MASK[1, :, 5:] = False


# Which level


@pytest.mark.parametrize("names", [["p3", "p4"], ["p4", "p3"]])
def test_several_modules(names: list[str]) -> None:
    teacher, channels = seeded(Yolo), {"p3": 4, "p4": 6}
    learner = learner_of(*(channels[name] for name in names))
    modules = dict(zip(names, learner.mask_modules, strict=True))
    p3, dice3 = modules["p3"](teacher.p3(IMAGES))
    p4, dice4 = modules["p4"](teacher.p4(p3))
    with learner.attach(teacher, names):
        found = teacher(IMAGES)
        dice = learner.dice_loss()
        assert sorted(learner.diagnostics()) == [0, 1]
    assert torch.equal(found[0], p3)
    assert torch.equal(found[1], p4)
    want = torch.autograd.grad(p3.mean() + p4.mean() + dice3 + dice4, list(learner.parameters()))
    got = torch.autograd.grad(found[0].mean() + found[1].mean() + dice, list(learner.parameters()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)

    standard = learner_of(*(channels[name] for name in names), standardize=True)
    with standard.calibrate(teacher, names):
        teacher(IMAGES)
    plain = dict(zip(("p3", "p4"), teacher(IMAGES), strict=True))
    for name, module in zip(names, standard.mask_modules, strict=True):
        torch.testing.assert_close(module.channel_mean, plain[name].mean((0, 2, 3)))
        assert module.pixels_seen == plain[name][:, 0].numel()


def test_calls_of_a_shared_head() -> None:
    teacher, learner = seeded(SharedHead), learner_of(4, 4)
    plain = teacher(IMAGES)
    want = [module(x) for module, x in zip(learner.mask_modules, plain, strict=True)]
    with learner.attach(teacher, "tower"):
        for run in (teacher, teacher, teacher.extract_feat):  # the last is no call of the teacher: levels begin anew
            found = run(IMAGES)
            assert len(learner.diagnostics()) == 2
            assert all(torch.equal(y, masked) for y, (masked, _) in zip(found, want, strict=True))
            torch.testing.assert_close(learner.dice_loss(), sum(dice for _, dice in want))


def test_mappings_of_single_levels() -> None:
    """Equal keys of several modules, or of several calls, name no levels."""
    teacher = seeded(lambda: nn.ModuleDict({"a": nn.Conv2d(3, 4, 1), "b": nn.Conv2d(4, 4, 1), "pack": nn.Identity()}))
    teacher.forward = lambda x: teacher["pack"]({"0": teacher["b"](teacher["pack"]({"0": teacher["a"](x)})["0"])})
    learner = learner_of(4, 4)
    with learner.attach(teacher, "pack"):
        gradients(learner, teacher(IMAGES)["0"].mean() + learner.dice_loss())
        assert list(learner.diagnostics()) == [0, 1]


def test_mappings_of_named_levels() -> None:
    """Every module's levels by the names that are its own."""

    class Neck(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {name: x for name in self.names}

    teacher = nn.ModuleDict({"fine": Neck(), "coarse": Neck()})
    teacher["fine"].names, teacher["coarse"].names = ("p4", "p3"), ("p6", "p5")
    teacher.forward = lambda x: [teacher[name](x) for name in teacher]
    learner = MaskLearner({"p3": 3, "p4": 3, "p5": 3, "p6": 3}, 2)
    with learner.attach(teacher, ["fine", "coarse"]):
        fine, coarse = teacher(IMAGES)
    for module, x in zip(learner.mask_modules, (fine["p3"], fine["p4"], coarse["p5"], coarse["p6"]), strict=True):
        assert torch.equal(x, module(IMAGES)[0])
    teacher["coarse"].names = ("p3", "p4")
    with (
        pytest.raises(ValueError, match=r"'coarse': expected the levels \['p5', 'p6'\]"),
        learner.attach(teacher, list(teacher)),
    ):
        teacher(IMAGES)


WRONG: list[tuple[list[int], Any, type[Exception], str]] = [
    ([4], "tower", ValueError, "output of the teacher's 'tower': expected 1 level, got 2 in one pass"),
    ([4, 4, 4], "tower", ValueError, "output of the teacher's 'tower': expected 3 levels, got 2 in one pass"),
    ([4, 4, 4], ["tower", "body"], ValueError, "3 levels cannot be divided among 2 modules, ['tower', 'body']"),
    ([4, 4], ["tower", "tower"], ValueError, "names: expected every module once"),
    ([4, 5], "tower", ValueError, "output of the teacher's 'tower'[0]: expected 5 channels, got 4"),
]


@pytest.mark.parametrize(("channels", "names", "error", "sentence"), WRONG)
def test_levels_that_do_not_fit(channels: list[int], names: Any, error: type[Exception], sentence: str) -> None:
    teacher, learner = seeded(SharedHead), learner_of(*channels)
    with pytest.raises(error) as caught, learner.attach(teacher, names):
        teacher(IMAGES)
    assert sentence in str(caught.value)
    assert no_hooks(teacher)
    assert all(p.requires_grad for p in teacher.parameters())


def test_a_part_of_the_levels() -> None:
    teacher, learner = seeded(Yolo), learner_of(4, 6)
    with learner.attach(teacher, ["p3", "p4"]):
        teacher.p3(IMAGES)
        with pytest.raises(RuntimeError, match="dice_loss: expected 2 levels of the teacher, got 1; run the teacher inside"):
            learner.dice_loss()


def test_a_shared_module_by_any_of_its_names() -> None:
    teacher, learner, results = seeded(lambda: nn.ModuleDict({"net": nn.Sequential(nn.Conv2d(3, 4, 1))})), learner_of(4), []
    teacher["neck"] = teacher["net"][0]
    teacher.forward = lambda x: teacher["neck"](x)
    for name in ("neck", "net.0"):
        with learner.attach(teacher, name):
            results.append(teacher(IMAGES))
    assert torch.equal(*results)
    assert not torch.allclose(results[0], teacher(IMAGES))


def test_other_hooks_see_masked_features() -> None:
    """As those by which transformers collects hidden states: they were set before, and stay."""
    teacher, learner, seen = seeded(Yolo), learner_of(4), []
    teacher.p3.register_forward_hook(lambda _module, _inputs, x: seen.append(x))
    with learner.attach(teacher, "p3"):
        masked, _ = teacher(IMAGES)
    assert seen[0] is masked


# The teacher as it was


class DropPath(nn.Module):
    """Random in train mode, by the name that timm, transformers and others give it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(x.shape[0], 1, 1, 1) > 0.5) * 2 if self.training else x


RANDOM = [nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout, DropPath]


@pytest.mark.parametrize("layer", [nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d, *RANDOM])
@pytest.mark.parametrize("direct", [False, True])
def test_norm_and_dropout_stay_in_eval_mode(layer: type[nn.Module], direct: bool) -> None:
    """Although the teacher is switched to train mode, as torchvision's detectors must be; and as it was after the block."""
    fixed = layer() if layer in RANDOM else layer(4, track_running_stats=True)
    teacher = seeded(lambda: nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), fixed), nn.Identity(), nn.Conv2d(4, 2, 1))).train()
    teacher[1].eval()
    teacher[2].bias.requires_grad_(False)
    before = [p.requires_grad for p in teacher.parameters()], [m.training for m in teacher.modules()]
    buffers, learner = [b.clone() for b in teacher.buffers()], learner_of(4)
    run = teacher[0] if direct else teacher
    with contextlib.suppress(KeyError), learner.attach(teacher, "0"):
        expected = run(IMAGES)
        for _ in range(3):
            teacher.train()
            assert torch.equal(run(IMAGES), expected)
            assert teacher.training
            assert not any(p.requires_grad for p in teacher.parameters())
        gradients(learner, run(IMAGES).square().mean() + learner.dice_loss())
        raise KeyError
    assert before == ([p.requires_grad for p in teacher.parameters()], [m.training for m in teacher.modules()])
    assert all(torch.equal(a, b) for a, b in zip(teacher.buffers(), buffers, strict=True))
    assert all(p.grad is None for p in teacher.parameters())
    assert no_hooks(teacher)


def test_attention_stays_in_eval_mode() -> None:
    attention = seeded(lambda: nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True))
    teacher = nn.ModuleDict({"attention": attention, "neck": nn.Identity()}).train()
    teacher.forward = lambda x: teacher["neck"](attention(x, x, x)[0].transpose(1, 2).unflatten(2, (4, 4)))
    x = torch.randn(3, 16, 4)
    with learner_of(4).attach(teacher, "neck"):
        expected = teacher(x)
        teacher.train()
        assert torch.equal(teacher(x), expected)
    assert attention.training


def test_parameters_of_inference_mode() -> None:
    """Their gradients are switched off and on again, too."""
    with torch.inference_mode():
        norm = nn.BatchNorm2d(3)
    teacher, learner = nn.Sequential(norm, nn.Conv2d(3, 4, 1)), learner_of(4)
    with learner.attach(teacher, "1"):
        gradients(learner, teacher(IMAGES).mean() + learner.dice_loss())
    assert norm.weight.requires_grad


def test_two_learners_on_one_teacher() -> None:
    teacher, first, second = seeded(Yolo), learner_of(4), learner_of(6)
    with first.attach(teacher, "p3"), second.attach(teacher, "p4"):
        with pytest.raises(RuntimeError, match="attach: this learner is attached already"), first.attach(teacher, "p3"):
            pass
        (teacher(IMAGES)[1].mean() + first.dice_loss() + second.dice_loss()).backward()
    assert all(p.grad is not None for learner in (first, second) for p in learner.parameters())
    assert all(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("stage", [1, 2])
def test_nothing_stays_alive(stage: int) -> None:
    """Neither features nor the teacher, also without the garbage collector."""
    import gc

    alive: list[weakref.ref[Any]] = []
    teacher, learner = seeded(Yolo), learner_of(4, standardize=stage == 2)
    teacher.p3.register_forward_hook(lambda _module, _inputs, x: alive.append(weakref.ref(x)))
    alive.append(weakref.ref(teacher))
    gc.collect()
    gc.disable()
    try:
        with learner.calibrate(teacher, "p3") if stage == 2 else learner.attach(teacher, "p3"):
            teacher(IMAGES)
        del teacher
        assert [ref() for ref in alive] == [None, None]
    finally:
        gc.enable()


# Gradients


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_a_checkpointed_teacher(kind: str, head: bool) -> None:
    """Inside the block: the gradients of the teacher without checkpoints, whichever part is checkpointed."""
    results = []
    for how in (None, kind):
        teacher, learner = seeded(lambda how=how: Checkpointed(how, head)), learner_of(6)
        x = IMAGES.clone().requires_grad_()
        with learner.attach(teacher, "block"):
            loss = teacher(x).square().mean()
            if how == "reentrant" and not head:
                with pytest.raises(RuntimeError, match=r"the teacher ran without gradients .* \(use_reentrant=False\)"):
                    learner.dice_loss()
            elif kind == "non-reentrant" or head:
                loss = loss + learner.dice_loss()
            results.append([*gradients(learner, loss), x.grad])
            assert list(learner.diagnostics()) == [0]
        assert no_hooks(teacher)
        assert all(p.grad is None for p in teacher.parameters())
        assert not teacher.norm.running_mean.any()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_backward_after_the_block() -> None:
    """Right without checkpoints; with them torch's error, or a warning and no Dice loss, but never a silent wrong gradient."""
    results = []
    for inside in (True, False):
        teacher, learner = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), learner_of(4)
        torch.nn.init.constant_(teacher[0].weight, 0.1)
        torch.nn.init.zeros_(teacher[0].bias)
        with learner.attach(teacher, "0"):
            loss = teacher(IMAGES).square().mean() + learner.dice_loss()
            if inside:
                results.append(gradients(learner, loss))
        if not inside:
            results.append(gradients(learner, loss))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    teacher, learner = seeded(lambda: Checkpointed("non-reentrant")), learner_of(6)
    with learner.attach(teacher, "block"):
        loss = teacher(IMAGES).square().mean() + learner.dice_loss()
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        loss.backward()
    teacher = seeded(lambda: Checkpointed("reentrant"))
    with (
        pytest.warns(UserWarning, match="attach: the teacher ran only without gradients in this block"),
        learner.attach(teacher, "block"),
    ):
        teacher(IMAGES.clone().requires_grad_())


def test_recomputed_levels_of_a_shared_head() -> None:
    """Segments are recomputed from the last to the first; levels go by their shapes."""
    results = []
    for reentrant in (None, False):
        teacher, learner = seeded(lambda reentrant=reentrant: SharedHead(reentrant)), learner_of(4, 4)
        with learner.attach(teacher, "tower"):
            loss = sum(x.relu().square().mean() for x in teacher(IMAGES)) + learner.dice_loss()
            results.append(gradients(learner, loss))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    teacher.pool = 1
    with learner.attach(teacher, "tower"), pytest.raises(RuntimeError, match="recomputes 'tower', which ran several times"):
        sum(x.mean() for x in teacher(IMAGES)).backward()
    teacher.pool = 2
    with learner.attach(teacher, "tower"), pytest.raises(RuntimeError, match="recomputes one of 2 passes, and it is not known"):
        sum(x.mean() for images in (IMAGES, IMAGES[:, :, :4, :6]) for x in teacher(images)).backward()


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "inside"])
def test_without_gradients(how: str) -> None:
    class Inner(Yolo):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Any:
            return super().forward(x)

    teacher, learner = seeded(Inner if how == "inside" else Yolo), learner_of(4)
    modes = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "inside": contextlib.nullcontext}

    def block() -> None:
        with learner.attach(teacher, "p3"):
            with modes[how]():
                teacher(IMAGES)
            with pytest.raises(RuntimeError, match=r"dice_loss: the teacher ran without gradients .* torch\.no_grad\(\)"):
                learner.dice_loss()
            with torch.no_grad():
                assert learner.dice_loss().isfinite()

    with pytest.warns(UserWarning, match=r"teacher ran only without gradients in this block.*learner\.eval\(\)") as seen:
        block()
    assert seen[0].filename == __file__
    with warnings.catch_warnings(), learner.eval().attach(teacher, "p3"), torch.no_grad():
        warnings.simplefilter("error")
        teacher(IMAGES)
        learner.dice_loss()


def test_a_level_without_gradients() -> None:
    """The others learn, so the sum of the losses does not tell."""

    class Partly(Yolo):
        def forward(self, x: Tensor) -> Any:
            p3 = self.p3(x)
            return p3, checkpoint(self.p4, p3, use_reentrant=True)

    teacher, learner = seeded(Partly), learner_of(4, 6)
    with learner.attach(teacher, ["p3", "p4"]):
        teacher(IMAGES)
        with pytest.raises(RuntimeError, match=r"so the tokens of levels \[1\] get none.*use_reentrant=False"):
            learner.dice_loss()
        learner.mask_modules[1].requires_grad_(False)
        assert learner.dice_loss().requires_grad


def test_masked_features_before_an_in_place_layer() -> None:
    results = []
    for inplace in (False, True):
        teacher = seeded(lambda inplace=inplace: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=inplace)))
        learner = learner_of(4, standardize=True)
        with learner.calibrate(teacher, "1"):
            teacher(IMAGES)
        with learner.attach(teacher, "1"):
            found = gradients(learner, teacher(IMAGES).mean() + learner.dice_loss())
        results.append([learner.mask_modules[0].channel_mean, *found])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


class Stage1(nn.Module):
    """What DDP wraps: one forward gives the whole loss."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.learner = seeded(Yolo).requires_grad_(False), learner_of(4)

    def forward(self, images: Tensor) -> Tensor:
        with self.learner.attach(self.teacher, "p3"):
            return self.teacher(images)[1].square().mean() + self.learner.dice_loss()


def _worker(rank: int, store: Path, results: Any) -> None:
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    stage = Stage1()
    parallel = nn.parallel.DistributedDataParallel(stage)
    parallel(IMAGES[rank : rank + 1]).backward()
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
    for a, b, want in zip(first, second, gradients(stage.learner, stage(IMAGES)), strict=True):
        assert (a == b).all()
        assert (torch.from_numpy(a) - want).abs().max() <= 1e-5 * want.abs().max()


# Valid pixels


class Masked(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.body, self.checkpointed = nn.Conv2d(3, 4, 1), checkpointed

    def forward(self, images: Any, pixel_mask: Any = MASK) -> Tensor:
        images = getattr(images, "tensors", images)
        return checkpoint(self.body, images, use_reentrant=False) if self.checkpointed else self.body(images)


class Wrapped(nn.Module):
    """As DDP: it does not say which arguments it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.module = Masked()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.module(*args, **kwargs)


def test_valid_by_the_name_of_an_argument() -> None:
    teacher, learner = seeded(Masked), learner_of(4)
    plain = teacher(IMAGES)
    with learner.attach(teacher, "body", valid="pixel_mask"):
        for found in (teacher(IMAGES, MASK), teacher(IMAGES, pixel_mask=MASK), teacher(IMAGES)):  # the last is its default
            assert torch.equal(found, learner(plain, MASK))
        assert torch.equal(teacher(IMAGES, None), learner(plain))
    nested = NestedTensor(IMAGES, ~MASK)
    with learner.attach(teacher, "body", valid="images"):
        assert torch.equal(teacher(nested), learner(plain, MASK))
    standard, wrapped = learner_of(4, standardize=True), seeded(Wrapped)
    with standard.calibrate(wrapped, "module.body", valid="pixel_mask"):
        with pytest.raises(ValueError, match="valid: the Wrapped was called without 'pixel_mask'; give it by keyword, None"):
            wrapped(IMAGES, MASK)
        wrapped(IMAGES, pixel_mask=MASK)
    assert standard.mask_modules[0].pixels_seen == MASK.sum()


class Transform(nn.Module):
    """As torchvision's: images of any size in, a padded batch and the targets out."""

    def forward(self, images: list[Tensor], targets: Any = None) -> tuple[Any, Any]:
        sizes = [(x.shape[1], x.shape[2]) for x in images]
        height, width = (max(side) for side in zip(*sizes, strict=True))
        batch = NestedTensor(torch.stack([pad(x, (0, width - x.shape[2], 0, height - x.shape[1])) for x in images]))
        batch.image_sizes = sizes
        return batch, targets


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transform, self.backbone = Transform(), nn.Conv2d(3, 4, 1)

    def forward(self, images: list[Tensor]) -> Tensor:
        batch, _ = self.transform(images)
        return self.backbone(batch.tensors)


def test_valid_by_a_function() -> None:
    """Of the arguments; it is called when the first level arrives, so a model that pads by itself can say what it did."""
    teacher, learner, padded = seeded(Detector), learner_of(4), {}
    teacher.transform.register_forward_hook(lambda _module, _inputs, result: padded.update(batch=result[0]))
    with learner.attach(teacher, "backbone", valid=lambda *_: padded["batch"]):
        for images in ([IMAGES[0], IMAGES[1, :, :4]], [IMAGES[0, :, :, :5], IMAGES[1]]):
            found = teacher(images)
            batch, _ = Transform()(images)
            valid = shapes.valid_pixels(batch.image_sizes, (8, 12))
            assert torch.equal(found, learner(teacher.backbone.forward(batch.tensors), valid))
    with learner.attach(teacher, "backbone", valid=lambda images: shapes.valid_pixels([x.shape[1:] for x in images], (8, 12))):
        assert torch.equal(teacher(images), found)


def test_valid_pixels_of_recomputations() -> None:
    masks = [torch.rand(2, 8, 12, generator=torch.Generator().manual_seed(i)) > 0.4 for i in range(2)]
    results: list[Tensor] = []
    for checkpointed in (False, True):
        teacher, learner = seeded(lambda checkpointed=checkpointed: Masked(checkpointed)), learner_of(4)
        with learner.attach(teacher, "body", valid="pixel_mask"):
            for mask in masks:
                results += gradients(learner, teacher(IMAGES, mask).square().mean() + learner.dice_loss())
    for a, b in zip(results[: len(results) // 2], results[len(results) // 2 :], strict=True):
        torch.testing.assert_close(a, b)
    with learner.attach(teacher, "body", valid="pixel_mask"):
        losses = [teacher(IMAGES, mask).square().mean() for mask in masks]
        with pytest.raises(RuntimeError, match="recomputes one of 2 passes, and it is not known which; call backward"):
            sum(losses).backward()


@pytest.mark.parametrize(
    ("valid", "error", "sentence"),
    [
        ("mask", ValueError, r"valid: Masked\.forward has no argument 'mask'; it has \['images', 'pixel_mask'\]"),
        (MASK, TypeError, r"valid: expected the name of an argument of forward, or a function of its arguments, got Tensor"),
        (lambda *_: MASK[:1], ValueError, "valid: expected shape"),
    ],
)
def test_wrong_valid(valid: Any, error: type[Exception], sentence: str) -> None:
    teacher = Masked()
    with pytest.raises(error, match=sentence), learner_of(4).attach(teacher, "body", valid=valid):
        teacher(IMAGES)


def test_valid_needs_a_call_of_the_model() -> None:
    teacher, learner = Masked(), learner_of(4)
    with (
        learner.attach(teacher, "body", valid="pixel_mask"),
        pytest.raises(RuntimeError, match="valid= is read in a call of the teacher, but 'body' ran outside of one"),
    ):
        teacher.body(IMAGES)


@pytest.mark.parametrize("held", [False, True])
def test_a_frozen_teacher_is_looked_through(held: bool) -> None:
    net, learner = seeded(Yolo), MaskLearner(4, 3, standardize=True)
    frozen = FrozenTeacher(net)
    teacher = nn.ModuleDict({"teacher": frozen, "other": nn.Conv2d(3, 3, 1)}) if held else frozen
    name = "teacher.p3" if held else "p3"
    with learner.calibrate(teacher, name):
        frozen(IMAGES)
    torch.testing.assert_close(learner.mask_modules[0].channel_mean, net.p3(IMAGES).mean((0, 2, 3)))
    net.requires_grad_(True)
    with learner.attach(teacher, name):
        gradients(learner, frozen(IMAGES)[1].mean() + learner.dice_loss())
        with torch.no_grad():
            assert not frozen(IMAGES)[1].requires_grad
    assert all(p.grad is None for p in net.parameters())
    assert not frozen(IMAGES)[1].requires_grad
