"""Stage 2: the distillation loss."""

import functools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import _checks as check
from . import functional
from ._eager import resized_valid
from ._levels import Levels, Matched, in_order, labels, match, named, per_level, unpack, valid_of_levels
from ._ops import customised
from ._options import Check, Options
from ._records import DistillOptions, DistillTables, Latest
from ._torch import graph_task, outside_transforms, tracing
from ._warn import warn
from .checkpoints import Source, load_masks
from .diagnostics import DistillDiagnostics, describe
from .tables import LevelTables, of_levels

__all__ = ["MaskedDistillLoss"]

STILL = 100  # training calls after which an align that has gradients, but never moved, is not in the optimizer


class MaskedDistillLoss(Options):
    r"""Masked distillation loss (stage 2 of MasKD): the distance of student and teacher features, weighted by learned masks.

    $$
    \mathcal{L} = \lambda \sum_{levels} \frac{1}{N} \sum_n \sum_t w_{nt}
    \frac{\sum_p m_{ntp}^2 \sum_c (s_{ncp} - t_{ncp})^2}{C\,(\sum_p m_{ntp} + \epsilon)}
    $$

    for the student's features ``s`` and the teacher's ``t``, with sums over images n, tokens t, pixels p and channels c, and
    ``loss_weight`` as lambda. A level is one feature map. The masks are ``m = sigmoid(E t)`` for the learned tokens
    ``E [T, C]``. A small learned head, the *mask weighting*, gives each image a softmax weight ``w`` for every mask. After the
    warm-up masks are customised, that is, multiplied by the student's own: ``m = sigmoid(E t) * sigmoid(E s)``. No gradient
    goes through ``m``. Huang et al., ICLR 2023, arXiv 2205.14589.

    Args:
        channels: channels of the teacher's features, one per level; an int means a single level. A mapping ``{name: C}`` names
            the levels: a mapping of features, ``masks=``, ``student_channels`` or ``align`` must then have these names, in any
            order. State dicts number the levels in all cases.
        num_tokens: T, receptive tokens per level, at most 32; None: no tokens, ``masks=`` come with every call.
        student_channels: channels of the student's features, if they are to be aligned. The criterion then has a biased 1x1
            convolution per level, ``align.{i}``, among its parameters, which you train with the student. None: no align;
            channels must be equal.
        align: your own modules instead of these convolutions, ``[N, C', H, W]`` to ``[N, C, H, W]``, trained with the student:
            one per level as a sequence or ``ModuleList``, or one module for a single level. They are called, so hooks,
            adapters, pruning and FSDP per module work; half-precision features run under autocast of their dtype. A module that
            mixes pixels (a 3x3 convolution, a BatchNorm) also mixes the padding of a batch into the pixels of ``valid=``.
        weight_mask: weight each image's masks with the softmax learned in stage 1; False: every token counts ``1 / T``.
        standardize: the student reconstructs ``(t - mean) / std`` of every channel, by the statistics that the learner gathered
            and ``pretrained`` holds; masks and weights see the same, and so does ``masks=``, whose target is standardised, too.
            Must be the value used for the learner: ``"channel"`` (or True) or ``"isotropic"``. Off by default, as published.
        custom_mask: customise masks once the warm-up is over.
        custom_mask_warmup: training-mode calls before masks are customised (5000 to 8500 as published); those with
            ``advance=False`` do not count.
        loss_weight: factor on the loss, a number or a scalar tensor without gradient. With ``standardize``, try 3, 10 and 30
            on validation. Published for raw features: 1 for two-stage detectors, 7 for RetinaNet, 10 for FCOS and RepPoints,
            0.5 for segmentation. ``criterion.loss_weight = x`` changes it at any time, also of a compiled criterion. No state
            dict holds it.
        eps: added to the mask areas. 1e-5 reproduces the official segmentation code, 0 the detection code, in which
            an empty mask of the tokens gives NaN; one that ``masks=`` gives counts nothing.
        pretrained: learned tokens: a path, a state dict, a ``MaskLearner``; see `maskd_triton.checkpoints.mask_state`.
            None warns: until a state dict is loaded, tokens of 0 give masks of 0.5 everywhere, and the loss is half of a plain
            MSE.
        mask_power: power of the mask in front of the distance: 2 as published, or 1.
        distance: between the features of a pixel: ``"squared"`` as published, ``"smooth_l1"`` or ``"cosine"``; formulas at
            `maskd_triton.functional.masked_distill_loss`.
        beta: where ``"smooth_l1"`` turns from squares to absolute values, from 1e-30 to 1e30.
        resize: what to do if a level has another height or width in the student than in the teacher: ``"student"`` resizes the
            student's features to the teacher's size (bilinear), ``"teacher"`` the teacher's to the student's; None raises. With
            ``valid=``, the valid rectangle of each image is resized by itself.
        impl: ``"auto"`` (CUDA tensors: Triton; others: eager), ``"triton"`` (Triton or an error; CPU tensors under
            ``TRITON_INTERPRET=1``) or ``"eager"``.

    Shape:
        ``student`` and ``teacher`` are levels ``[N, C_i, H_i, W_i]``: a tensor, a sequence in the order of ``channels``, or a
        mapping. The levels of a mapping are those of ``channels`` in the order of the *teacher's* mapping, unless ``channels``
        names them; the student's are matched by key. ``valid`` is ``[N, H0, W0]``. The result is a float32 scalar (float64 for
        float64 features), or ``[levels]`` for ``reduction="none"``. Features are summed in float32.

    Options may be assigned later (``criterion.eps = 1e-5``) and are checked as in the constructor. ``channels``,
    ``num_tokens``, ``weight_mask`` and ``standardize`` are fixed. Tokens and mask weighting are frozen. ``mask_modules`` holds
    their tables, a `maskd_triton.tables.LevelTables` per level: what the kernels read, in buffers, computed in float64 when
    tokens are loaded. They stay in float32 when the module is cast to half precision. A state dict holds these tables; loading
    also takes a learner's state dict. ``warmup_step`` counts calls in training mode and is saved in the state dict. Comparing
    it with the warm-up never waits for the GPU. A call that an activation checkpoint repeats in the backward pass counts once,
    unless the criterion itself was compiled.

    Raises:
        ValueError, TypeError: arguments or levels that do not fit, named; a teacher that requires grad.
        RuntimeError: ``impl="triton"`` on CPU tensors without ``TRITON_INTERPRET=1``.

    Examples:
        >>> import torch
        >>> from maskd_triton import MaskedDistillLoss, MaskLearner
        >>> learner = MaskLearner([16, 16])  # after stage 1
        >>> criterion = MaskedDistillLoss([16, 16], student_channels=[8, 8], pretrained=learner)
        >>> student = [torch.randn(2, 8, s, s, requires_grad=True) for s in (8, 4)]
        >>> teacher = [torch.randn(2, 16, s, s) for s in (8, 4)]
        >>> criterion(student, teacher).backward()
        >>> criterion(student, teacher, reduction="none").shape
        torch.Size([2])
    """

    warmup_step: Tensor
    loss_weight: float | Tensor
    mask_modules: nn.ModuleList
    align: nn.ModuleList | None

    CHECKS: ClassVar[dict[str, Check]] = {
        "weight_mask": check.flag,
        "standardize": check.standardize,
        "custom_mask": check.flag,
        "custom_mask_warmup": check.count,
        "loss_weight": check.constant_loss_weight,
        "warmup_step": check.counter,
        "eps": check.eps,
        "mask_power": check.mask_power,
        "distance": functional.check_distance,
        "beta": check.positive,
        "resize": check.resize,
        "impl": check.impl,
    }
    FIXED = frozenset(("channels", "names", "num_tokens", "weight_mask", "standardize"))
    USED_UP = frozenset(("student_channels", "pretrained"))

    def __init__(
        self,
        channels: int | Sequence[int] | Mapping[Any, int],
        num_tokens: int | None = 6,
        *,
        student_channels: int | Sequence[int] | Mapping[Any, int] | None = None,
        align: nn.Module | Sequence[nn.Module] | Mapping[Any, nn.Module] | None = None,
        weight_mask: bool = True,
        standardize: bool | str = False,
        custom_mask: bool = True,
        custom_mask_warmup: int = 1000,
        loss_weight: float | Tensor = 1.0,
        eps: float = 1e-12,
        pretrained: Source | None = None,
        mask_power: int = 2,
        distance: str = "squared",
        beta: float = 1.0,
        resize: str | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.channels, self.names = named(channels)
        self.num_tokens = None if num_tokens is None else check.num_tokens(num_tokens)
        self.weight_mask = weight_mask
        self.standardize = standardize
        self.custom_mask = custom_mask
        self.custom_mask_warmup = custom_mask_warmup
        self.loss_weight = loss_weight
        self.eps = eps
        self.mask_power = mask_power
        self.distance = distance
        self.beta = beta
        self.resize = resize
        self.impl = impl
        if num_tokens is None and (standardize or pretrained is not None):
            raise ValueError(
                "num_tokens: num_tokens=None takes its masks from masks= in every call; it cannot be combined with pretrained= "
                "or standardize="
            )
        if align is not None and student_channels is not None:
            raise ValueError("align and student_channels: expected at most one of them; student_channels builds an align")
        self.align = align if student_channels is None else self._convolutions(student_channels)  # type: ignore[assignment]
        levels = self.channels if self.num_tokens is not None else []
        self.mask_modules = nn.ModuleList(LevelTables(c, num_tokens or 0, weight_mask, standardize) for c in levels)
        at = "cpu" if torch.get_default_device().type == "meta" else None  # a number, which no state dict need bring back
        with torch.inference_mode(False):  # also when it is made inside of such a block, a training step counts
            self.register_buffer("warmup_step", torch.zeros((), dtype=torch.int64, device=at))
        if pretrained is not None:
            load_masks(self.mask_modules, pretrained)
        elif self.num_tokens is not None:
            warn(
                "MaskedDistillLoss without pretrained=: it has no tokens, so every mask is 0.5 and the loss is half a plain "
                "feature MSE; learn tokens with MaskLearner and pass them as pretrained=, or load a state dict"
            )
        self._warned = False  # of a student without gradient
        self._align_watch = _AlignWatch()
        self._latest: Latest | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, self._by_level(value) if name == "align" else value)

    def _by_level(self, align: Any) -> nn.ModuleList | None:
        """The modules of ``align=`` in the order of the levels."""
        if align is None:
            return None
        if isinstance(align, nn.ModuleDict):
            align = dict(align.items())
        elif isinstance(align, nn.Module):
            align = list(align) if isinstance(align, nn.ModuleList) else [align]
        modules = in_order(align, "align", self.names, len(self.channels))
        for i, module in enumerate(modules):
            if not isinstance(module, nn.Module):
                raise TypeError(f"align[{i}]: expected an nn.Module, got {type(module).__name__}")
        return nn.ModuleList(modules)

    def _convolutions(self, student_channels: Any) -> list[nn.Module]:
        levels = len(self.channels)
        if isinstance(student_channels, Mapping):
            student_channels = in_order(student_channels, "student_channels", self.names, levels)
        narrow = per_level(student_channels, "student_channels", levels)
        return [nn.Conv2d(s, c, 1) for s, c in zip(narrow, self.channels, strict=True)]

    def __getstate__(self) -> dict[str, Any]:
        """A copy has seen nothing."""
        return super().__getstate__() | {"_latest": None, "_align_watch": _AlignWatch()}

    def _apply(self, fn: Any, recurse: bool = True) -> "MaskedDistillLoss":
        """``to_empty`` does not change the number of calls."""
        before = self.warmup_step
        super()._apply(fn, recurse)
        if self.warmup_step is not before and not (self.warmup_step.is_meta or before.is_meta):
            self.warmup_step.copy_(before)
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        *others: Any,
    ) -> None:
        """A learner's state dict counts no calls: the present number stays."""
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *others)
        missing_keys[:] = [key for key in missing_keys if key != f"{prefix}warmup_step"]

    def extra_repr(self) -> str:
        shown = ("num_tokens", "weight_mask", "standardize", *(name for name in self.CHECKS if name not in self.FIXED))
        return ", ".join([str(self.channels), *(f"{name}={getattr(self, name)!r}" for name in shown)])

    def forward(
        self,
        student: Levels,
        teacher: Levels,
        *,
        valid: Any = None,
        masks: Levels | None = None,
        mask_weights: Levels | None = None,
        advance: bool = True,
        reduction: str = "sum",
    ) -> Tensor:
        """The loss; see the class.

        Args:
            student: the student's features.
            teacher: the teacher's features, without gradient.
            valid: the pixels that count in a padded batch, as in `functional.masked_distill_loss`.
            masks: masks to use instead of the tokens', not customised, as in `functional.masked_distill_loss`.
            mask_weights: weights to use instead of the tokens', as in `functional.masked_distill_loss`.
            advance: whether this call counts for the warm-up. With gradient accumulation, pass False for every batch but the
                last before an optimiser step.
            reduction: ``"sum"`` over levels, or ``"none"`` for one value per level.
        """
        if masks is None and self.num_tokens is None:
            raise ValueError("masks: expected masks with every call, because num_tokens=None")
        levels = match(student, teacher, self.names)
        check.level_count(levels.teachers, "teacher", self.channels)
        counts, compiling = self.training and advance, torch.compiler.is_compiling()
        # activation checkpointing repeats a call, and a trace computes nothing: neither counts, nor is kept
        repeated = graph_task() != -1 or tracing(levels.students[0]) or tracing(levels.teachers[0])
        prepared, pixels = self._prepared(levels, valid)
        custom = self.custom_mask and masks is None
        options = DistillOptions(
            tables=self._tables(levels.students[0].device, masks is None, mask_weights is None),
            valid=pixels,
            custom_mask=custom,
            customised=customised(self.warmup_step, self.custom_mask_warmup, counts) if custom else None,
            mask_power=self.mask_power,
            distance=self.distance,
            beta=self.beta,
            eps=self.eps,
        )
        if not repeated:
            object.__setattr__(self, "_latest", None)  # what it holds is free for this call
        loss, latest = functional.distill(
            prepared, options, masks, mask_weights, self.loss_weight, reduction, self.impl, self.channels
        )
        if not (compiling or repeated):
            self.__dict__["_latest"] = latest
            if self.training and torch.is_grad_enabled():
                self._warn_without_gradient(levels)
                if advance and self.align is not None:
                    self._align_watch.see(self.align, prepared.students)
        if counts and not repeated:
            with outside_transforms():
                self.warmup_step.add_(1)
        return loss

    def masks(self, features: Levels) -> Levels:
        """The masks ``sigmoid(E t)`` of a teacher's features.

        Args:
            features: levels ``[N, C_i, H_i, W_i]``.

        Returns:
            Masks ``[N, T, H_i, W_i]`` in the same container.

        Raises:
            TypeError, ValueError: levels that do not fit.
            RuntimeError: a criterion with ``num_tokens=None``.

        Examples:
            >>> import torch
            >>> from maskd_triton import MaskedDistillLoss, MaskLearner
            >>> criterion = MaskedDistillLoss([16, 16], 4, pretrained=MaskLearner([16, 16], 4))
            >>> [m.shape for m in criterion.masks([torch.zeros(2, 16, 8, 8), torch.zeros(2, 16, 4, 4)])]
            [torch.Size([2, 4, 8, 8]), torch.Size([2, 4, 4, 4])]
        """
        if self.num_tokens is None:
            raise RuntimeError("masks: this criterion has no tokens (num_tokens=None)")
        levels = unpack(features, "features", self.names)
        check.levels(levels.tensors, "features", labels(len(levels.tensors), levels.keys), self.channels)
        with torch.no_grad():
            return levels.rebuild([level.masks(x) for level, x in zip(self._levels, levels.tensors, strict=True)])

    def diagnostics(self) -> dict[Any, DistillDiagnostics]:
        """Loss and mask statistics of the latest call: coverage, pairwise Dice, weights, their entropy, and focus.

        They come from what that call kept, its masks but no features. So this costs next to nothing, and nothing waits for the
        device until you read a value. Masks are those that the loss used: customised ones once the warm-up is over.

        Returns:
            `maskd_triton.diagnostics.DistillDiagnostics` of every level, by its key, or by its index in a sequence.

        Raises:
            RuntimeError: there was no call yet, or the latest was inside ``torch.compile``, which keeps nothing.

        Examples:
            >>> import torch
            >>> from maskd_triton import MaskedDistillLoss, MaskLearner
            >>> criterion = MaskedDistillLoss(16, 4, pretrained=MaskLearner(16, 4))
            >>> loss = criterion(torch.zeros(2, 16, 8, 8, requires_grad=True), torch.zeros(2, 16, 8, 8))
            >>> criterion.diagnostics()[0].coverage
            tensor([0.5000, 0.5000, 0.5000, 0.5000])
        """
        if self._latest is None:
            raise RuntimeError("diagnostics: no call to look at; call the criterion first, outside torch.compile")
        losses = self._latest.outputs.per_image.sum(1)
        return {
            name: DistillDiagnostics(**vars(describe(*seen)), loss=loss)
            for (name, seen), loss in zip(self._latest.levels().items(), losses, strict=True)
        }

    @property
    def _levels(self) -> list[LevelTables]:
        return list(self.mask_modules)  # type: ignore[arg-type]

    def _check_given(self, levels: Matched) -> None:
        """Errors for levels before they are aligned and resized. A lazy align, or one of the user's own, says itself what it
        takes."""
        for i, (s, t, label) in enumerate(zip(levels.students, levels.teachers, levels.labels, strict=True)):
            c = self.channels[i]
            check.features(t, f"teacher{label}", c, check.swapped(s, t, c))
            check.constant_teacher(s, t, f"teacher{label}")
            if self.align is None:
                check.features(s, f"student{label}", c, "; give student_channels= and the criterion aligns them")
            else:
                check.features(
                    s, f"student{label}", _in_channels(self.align[i]), "; that is what student_channels= or align= said"
                )

    def _warn_without_gradient(self, levels: Matched) -> None:
        if self._warned or all(s.requires_grad for s in levels.students):
            return
        without = [f"student{label}" for s, label in zip(levels.students, levels.labels, strict=True) if not s.requires_grad]
        self._warned = True
        warn(
            f"{', '.join(without)}: no gradient, so the student does not learn from the distillation; usual causes are a "
            "detach(), torch.no_grad(), or a reentrant activation checkpoint around the module (use_reentrant=False)",
        )

    def _prepared(self, levels: Matched, valid: Any) -> tuple[Matched, list[Tensor]]:
        """Levels aligned and resized, and their valid pixels."""
        students, teachers = levels.students, levels.teachers
        if not (valid is None and self.resize is None and self.align is None):
            self._check_given(levels)
        if self.align is not None:
            if valid is not None:
                students = _without_padding(students, valid)
            students = [_aligned(*level) for level in zip(self.align, students, self.channels, levels.labels, strict=True)]
        if self.resize is not None and any(s.shape[2:] != t.shape[2:] for s, t in zip(students, teachers, strict=True)):
            moved, fixed = (students, teachers) if self.resize == "student" else (teachers, students)
            resized, pixels = _resized(moved, fixed, valid)
            students, teachers = (resized, teachers) if self.resize == "student" else (students, resized)
        else:
            pixels = valid_of_levels(valid, teachers)
        return levels._replace(students=students, teachers=teachers), pixels

    def _tables(self, device: torch.device, with_tokens: bool, weighted: bool) -> DistillTables:
        """Every level's, for features on ``device``: with given masks the statistics alone, which the target needs."""
        tables = of_levels([level.tables(device=device) for level in self._levels])
        if not with_tokens:
            return DistillTables(statistics=tables.statistics)
        return tables if weighted else tables._replace(pool_rows=(), pool_bias=())


def _without_padding(levels: Sequence[Tensor], valid: Any) -> list[Tensor]:
    """``levels`` with 0 where pixels do not count: layers that have gradients of their own would keep a NaN."""
    pixels = valid_of_levels(valid, levels)
    return [x.masked_fill((v == 0).view(len(x), 1, *x.shape[2:]), 0) for x, v in zip(levels, pixels, strict=True)]


def _in_channels(module: nn.Module) -> int | None:
    """Input channels of the convolution that it is, or begins with; None: unknown."""
    while isinstance(module, nn.Sequential) and len(module):
        module = module[0]
    return (module.in_channels or None) if isinstance(module, nn.Conv2d) else None


def _aligned(module: nn.Module, x: Tensor, channels: int, label: str) -> Tensor:
    """Call the module. Half features may have left the autocast region that their student ran in."""
    half = x.dtype.itemsize == 2 and torch.amp.is_autocast_available(x.device.type)
    weight = getattr(module, "weight", None)
    if not half and isinstance(weight, Tensor) and weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"align{label}: its parameters are {weight.dtype}, the student's features {x.dtype}; cast one of them, or call the "
            "criterion under torch.autocast"
        )
    with torch.autocast(x.device.type, x.dtype) if half else nullcontext():
        y = module(x)
    if not isinstance(y, Tensor) or y.dim() != 4 or y.shape[1] != channels:
        got = f"shape {list(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"align{label}: expected an output [N, {channels}, H, W], got {got}")
    return y


def _resized(levels: Sequence[Tensor], like: Sequence[Tensor], valid: Any) -> tuple[list[Tensor], list[Tensor]]:
    """``levels`` in the sizes of ``like`` (bilinear), and the valid pixels of these sizes."""
    sizes = [x.shape[2:] for x in like]
    if valid is None:
        return [
            x if x.shape[2:] == size else nn.functional.interpolate(x, size, mode="bilinear")
            for x, size in zip(levels, sizes, strict=True)
        ], []
    resized, pixels = [], []
    for x, size, source, goal in zip(levels, sizes, valid_of_levels(valid, levels), valid_of_levels(valid, like), strict=True):
        if x.shape[2:] != size:
            x, goal = resized_valid(x, source.unflatten(1, x.shape[2:]), goal.unflatten(1, size))
        resized.append(x)
        pixels.append(goal.flatten(1))
    return resized, pixels


class _AlignWatch:
    """Warns once of a level's align that gets gradients, but that no optimizer moves.

    Its values are compared, because fused optimizers do not change the versions, once and on the device: the answer is read
    when it has arrived, so nothing waits.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.start: list[list[tuple[nn.Parameter, Tensor]]] = []  # of every level: parameters, and their values at first
        self.taught: set[int] = set()  # levels whose align got a gradient
        self.moved: tuple[Tensor, torch.cuda.Event | None] | None = None

    def see(self, align: nn.ModuleList, aligned: Sequence[Tensor]) -> None:
        """A training call of the criterion."""
        self.calls += 1
        if self.calls == 1:
            self.start = [[(p, p.detach().clone()) for p in module.parameters() if p.requires_grad] for module in align]
        elif self.calls == STILL:
            for i, x in enumerate(aligned):
                if x.requires_grad:
                    x.register_hook(functools.partial(self._teach, i))
        elif self.calls == STILL + 1 and not (aligned[0].is_cuda and torch.cuda.is_current_stream_capturing()):
            self.moved, self.start = self._compare(aligned[0]), []
        if self.moved is not None and (self.moved[1] is None or self.moved[1].query()):
            still = [i for i, moved in enumerate(self.moved[0].tolist()) if i in self.taught and not moved]
            self.moved = None
            if still:
                warn(
                    f"align: the parameters of level {', '.join(map(str, still))} get gradients, but have not changed in "
                    f"{STILL} training calls, so the student is held against a random projection; give criterion.parameters() "
                    "to the optimizer",
                )

    def _teach(self, level: int, _: Tensor) -> None:
        self.taught.add(level)

    def _compare(self, like: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """Whether parameters of each level have moved, in memory of the host, and the event after which it is there."""
        nothing = [torch.ones((), dtype=torch.bool, device=like.device)]  # to move
        moved = [torch.stack([(p != v.to(p.device)).any() for p, v in level] or nothing).any() for level in self.start]
        found = torch.empty(len(moved), dtype=torch.bool, pin_memory=like.is_cuda)
        found.copy_(torch.stack(moved), non_blocking=True)
        if not like.is_cuda:
            return found, None
        event = torch.cuda.Event()
        event.record()
        return found, event
