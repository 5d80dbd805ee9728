"""Stage 2: the distillation loss."""

import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from . import _checks as check
from ._distributed import is_dtensor
from ._eager import acc_dtype
from ._hooks import warn_without_gradient
from ._levels import (
    Levels,
    Matched,
    as_list,
    container,
    in_order,
    like,
    match,
    members,
    named,
    per_level,
    usual,
    without_padding,
)
from ._ops.distill import count
from ._ops.library import graph_task
from ._records import DistillOptions, DistillTables, Latest
from .checkpoints import Source, load_masks
from .diagnostics import DistillDiagnostics, describe
from .functional import IMPLS, Given, check_distance, check_power, distill, distill_tables
from .masks import MaskModule
from .tables import LevelTables, MaskLevel, fitting

__all__ = ["MaskedDistillLoss"]

_OF_DTYPES = re.compile(r"\b(?:dtype|datatype|scalar type|Input type)\b")  # in what torch says of operands that do not match


class MaskedDistillLoss(nn.Module):
    r"""Masked distillation loss (stage 2 of MasKD): the distance of student and teacher features, weighted by learned masks.

    $$
    \mathcal{L} = \lambda \sum_{levels} \frac{1}{N} \sum_n \sum_t w_{nt}
    \frac{\sum_p m_{ntp}^2 \sum_c (s_{ncp} - t_{ncp})^2}{C\,(\sum_p m_{ntp} + \epsilon)}
    $$

    for the student's features ``s`` and the teacher's ``t``, with sums over images n, tokens t, pixels p and channels c, and
    ``loss_weight`` as lambda. A level is one feature map. The learned tokens ``E [T, C]`` give the masks ``m = sigmoid(E t)``,
    the mask weighting an image's softmax weights ``w``. After the warm-up masks are customised, that is, multiplied by the
    student's own: ``m = sigmoid(E t) * sigmoid(E s)``. No gradient goes through ``m``. Huang et al., ICLR 2023,
    arXiv 2205.14589.

    Args:
        channels: channels of the teacher's features, one per level; an int means a single level. A mapping ``{name: C}`` names
            the levels: then features, ``masks=``, ``student_channels`` and ``align`` may be mappings in any order, and the
            state dict says ``mask_modules.{name}``.
        num_tokens: T, receptive tokens per level; None: no tokens, ``masks=`` come with every call.
        student_channels: channels of the student's features, if they are to be aligned. The criterion then has a biased 1x1
            convolution per level, ``align.{i}``, among its parameters: train them with the student. None: no align; channels
            must be equal.
        align: your own modules instead of these convolutions, ``[N, C', H, W]`` to ``[N, C, H, W]``, trained with the student:
            one per level as a sequence or ``ModuleList``, or one module for a single level. They are called, so hooks,
            adapters, pruning and FSDP per module work; half-precision features run under autocast of their dtype.
        weight_mask: weigh the masks of every image, as stage 1 has learned it; False: all tokens weigh ``1 / T``.
        standardize: the student reconstructs ``(t - mean) / std`` of every channel, by the statistics that the learner gathered
            and ``pretrained`` holds; masks and weights see the same. Give what the learner had: ``"channel"`` (or True) or
            ``"isotropic"``. Off by default, as published.
        custom_mask: customise masks once the warm-up is over.
        custom_mask_warmup: training-mode calls before masks are customised (5000 to 8500 as published); those with
            ``advance=False`` do not count.
        loss_weight: factor on the loss. As published: 1 for two-stage detectors, 7 for RetinaNet, 10 for FCOS and RepPoints,
            0.5 for segmentation. ``criterion.loss_weight = x``, a number or scalar tensor, changes it at any time, also of a
            compiled criterion. Reading it gives the buffer, so nothing waits for the device.
        eps: added to the mask areas. 1e-5 reproduces the official segmentation code, 0 the detection code, which divides 0 by 0
            where a mask is empty.
        pretrained: learned tokens: a path, a state dict, a ``MaskLearner``; see `maskd_triton.checkpoints.mask_state`.
            None warns: until a state dict is loaded, untrained tokens give masks of about 0.5 everywhere, and the loss is about
            half of a plain MSE.
        mask_power: power of the mask in front of the distance: 2 as published, or 1.
        distance: between the features of a pixel: ``"squared"`` as published, ``"smooth_l1"`` or ``"cosine"``; formulas at
            `maskd_triton.functional.masked_distill_loss`.
        beta: where ``"smooth_l1"`` turns from squares to absolute values, from 1e-30 to 1e30.
        resize: what to do if a level has another height or width in the student than in the teacher: ``"student"`` resizes the
            student's features to the teacher's size (bilinear), ``"teacher"`` the teacher's to the student's; None raises.
        impl: ``"auto"`` (CUDA tensors: Triton; others: eager), ``"triton"`` (Triton or an error; CPU tensors under
            ``TRITON_INTERPRET=1``) or ``"eager"``.

    Shape:
        ``student`` and ``teacher`` are levels ``[N, C_i, H_i, W_i]``: a tensor, a sequence in the order of ``channels``, or a
        mapping. A mapping may come in any order if the levels have names; otherwise its order in the first call is that of
        ``channels``. ``valid`` is ``[N, H0, W0]``. The result is a float32 scalar (float64 for float64 features), or
        ``[levels]`` for ``reduction="none"``. Features are summed in float32.

    Tokens and mask weighting are frozen. ``mask_modules`` holds their tables, a `maskd_triton.tables.LevelTables` per level:
    what the kernels read, in buffers of the default dtype, computed in float64 when tokens are loaded. A state dict holds these
    tables; loading also takes a learner's state dict. ``loss_weight`` and ``warmup_step``, the number of training-mode calls so
    far, are buffers, and whether masks are customised is decided on the device. A call that activation checkpointing repeats
    in the backward pass counts once.

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
    loss_weight: Tensor

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
        loss_weight: float = 1.0,
        eps: float = 1e-12,
        pretrained: Source | None = None,
        mask_power: int = 2,
        distance: str = "squared",
        beta: float = 1.0,
        resize: str | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        check.choice(impl, "impl", IMPLS)
        if resize is not None:
            check.choice(resize, "resize", ("student", "teacher"))
        if num_tokens is None and (standardize or pretrained is not None):
            raise ValueError("num_tokens: None means masks given with every call, without pretrained= and standardize=True")
        self.resize = resize
        self.mask_power = check_power(mask_power)
        self.distance = check_distance(distance)
        self.beta = check.positive(beta, "beta")
        self.channels, self.names = named(channels)
        self.num_tokens = None if num_tokens is None else check.positive_int(num_tokens, "num_tokens")
        self.weight_mask = check.flag(weight_mask, "weight_mask") and num_tokens is not None
        self.standardize = check.standardize(standardize)
        self.custom_mask = check.flag(custom_mask, "custom_mask") and num_tokens is not None
        self.custom_mask_warmup = check.count(custom_mask_warmup, "custom_mask_warmup")
        self.eps = check.amount(eps, "eps", 1e30)
        self.impl = impl
        tables = [] if num_tokens is None else [LevelTables(c, num_tokens, weight_mask, standardize) for c in self.channels]
        self.mask_modules = container(tables, self.names if tables else None)
        if align is not None and student_channels is not None:
            raise ValueError("align and student_channels: expected at most one of them; student_channels builds an align")
        self.align: nn.ModuleList | nn.ModuleDict | None = None
        if align is not None:
            names = self.names
            if isinstance(align, nn.ModuleDict):  # its keys are strings
                align, names = dict(align.items()), names and [str(name) for name in names]
            self.align = container(_modules(in_order(align, "align", names), len(self.channels)), self.names)
        elif student_channels is not None:
            given = in_order(student_channels, "student_channels", self.names)
            narrow = per_level(given, "student_channels", len(self.channels))
            self.align = container([nn.Conv2d(s, c, 1) for s, c in zip(narrow, self.channels, strict=True)], self.names)
        at = "cpu" if torch.get_default_device().type == "meta" else None  # numbers, which no state dict need bring back
        with torch.inference_mode(False):  # also when it is made inside of such a block, a training step counts
            self.register_buffer("warmup_step", torch.zeros((), dtype=torch.int64, device=at))
            self.register_buffer("loss_weight", torch.ones((), device=at))
        self.loss_weight = loss_weight  # type: ignore[assignment]
        if pretrained is not None:
            load_masks(self.mask_modules, pretrained)
        elif self.num_tokens is not None:
            warnings.warn(
                "MaskedDistillLoss without pretrained=: its receptive tokens are untrained, so every mask is about 0.5 and "
                "the loss is half a plain feature MSE; learn tokens with MaskLearner and pass them as pretrained=",
                stacklevel=2,
            )
            for level, c in zip(tables, self.channels, strict=True):
                learned = MaskModule(c, self.num_tokens, weight_mask, standardize=standardize)
                if not learned.mask_token.is_meta:
                    level.load_state_dict(learned.state_dict())
        self._warned: set[str] = set()
        self._latest: Latest | None = None
        self._order: list[Any] | None = None  # of the levels in the first mapping: later ones may come in another

    def __getstate__(self) -> dict[str, Any]:
        """A copy has seen nothing."""
        return super().__getstate__() | {"_latest": None}

    def __setattr__(self, name: str, value: Any) -> None:
        """A new ``loss_weight`` is written into the buffer: a compiled or captured step reads it there."""
        buffer = self._buffers["loss_weight"] if name == "loss_weight" and "loss_weight" in self._buffers else None
        if buffer is None:
            return super().__setattr__(name, value)
        value = check.scale(value, name)
        if not isinstance(value, Tensor) and value > torch.finfo(buffer.dtype).max:
            raise ValueError(f"{name}: expected a number that {buffer.dtype} can hold, got {value!r}")
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(f"{name}: requires grad, but is written into a buffer; to learn it, multiply the loss by it")
        if buffer.is_meta and isinstance(value, Tensor):  # load_state_dict(assign=True)
            self._buffers[name] = value
            return None
        with torch.no_grad():  # fill_ would be compiled for every number anew
            buffer.copy_(value if isinstance(value, Tensor) else torch.ones_like(buffer) * value)
        return None

    def _apply(self, fn: Any, recurse: bool = True) -> "MaskedDistillLoss":
        """``to_empty`` leaves the numbers as they are."""
        before = self.warmup_step, self.loss_weight
        super()._apply(fn, recurse)
        for old, new in zip(before, (self.warmup_step, self.loss_weight), strict=True):
            if new is not old and not (new.is_meta or old.is_meta):
                new.copy_(old)
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
        """State dicts without a ``loss_weight`` leave the present one."""
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *others)
        missing_keys[:] = [key for key in missing_keys if key != f"{prefix}loss_weight"]
        if not self.loss_weight.is_meta:  # beside the other number, which assign=True may have replaced
            self._buffers["loss_weight"] = self.loss_weight.to(self.warmup_step.device)

    def extra_repr(self) -> str:
        loss_weight = "meta" if self.loss_weight.is_meta else float(f"{self.loss_weight.item():.6g}")
        return (
            f"{self.channels}, num_tokens={self.num_tokens}, weight_mask={self.weight_mask}, standardize={self.standardize!r}, "
            f"custom_mask={self.custom_mask}, custom_mask_warmup={self.custom_mask_warmup}, "
            f"loss_weight={loss_weight}, eps={self.eps}, mask_power={self.mask_power}, distance={self.distance!r}, "
            f"beta={self.beta}, resize={self.resize!r}, impl={self.impl!r}"
        )

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
        again = graph_task() != -1  # activation checkpointing repeats a call
        counts, compiling, step = self.training and advance, torch.compiler.is_compiling(), self.warmup_step
        levels = match(student, teacher, self.names, self._order)
        if len(levels.teachers) != len(self.channels):
            raise ValueError(f"teacher: expected {len(self.channels)} levels, got {len(levels.teachers)}")
        if masks is None and self.num_tokens is None:
            raise ValueError("masks: expected masks with every call, because num_tokens=None")
        if self.training and torch.is_grad_enabled() and not compiling:
            warn_without_gradient(levels.students, levels.keys, self._warned, stacklevel=4)  # through nn.Module's two functions
        if levels.by_key and levels.keys != self._order:
            _keep(self, "_order", levels.keys)
        levels = self._prepared(levels, valid)
        options = DistillOptions(
            tables=self._tables(levels.students[0].dtype, mask_weights is None) if masks is None else DistillTables(),
            customised=step >= min(self.custom_mask_warmup + (counts and again), 2**63 - 1),  # a repeated call was counted
            custom_mask=self.custom_mask and masks is None,
            mask_power=self.mask_power,
            distance=self.distance,
            beta=self.beta,
            eps=self.eps,
        )
        if not again:
            _keep(self, "_latest", None)  # what it holds is free for this call
        loss, latest = distill(
            levels,
            self.channels,
            options,
            Given(valid, masks, mask_weights),
            loss_weight=self.loss_weight,
            reduction=reduction,
            impl=self.impl,
        )
        if not again and not compiling:
            _keep(self, "_latest", latest)
        if counts:
            count(step)
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
        order = usual(features, self._order) if isinstance(features, Mapping) else None
        tensors, keys = as_list(features, "features", self.names or order)
        if self.names is None and order is not None:
            _keep(self, "_order", order)
        if len(tensors) != len(self.channels):
            raise ValueError(f"features: expected {len(self.channels)} levels, got {len(tensors)}")
        with torch.no_grad():
            return like(features, [level.masks(x) for level, x in zip(self._levels(), tensors, strict=True)], keys)

    def diagnostics(self) -> dict[Any, DistillDiagnostics]:
        """Loss and mask statistics of the latest call: coverage, pairwise Dice, weights and their entropy.

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
        losses = (self._latest.outputs.per_image * self._latest.scale).sum(1)
        return {
            name: DistillDiagnostics(**vars(describe(*seen)), loss=loss)
            for (name, seen), loss in zip(self._latest.levels().items(), losses, strict=True)
        }

    def _prepared(self, levels: Matched, valid: Any) -> Matched:
        """Levels aligned and resized; where that mixes pixels, those of the padding are 0 beforehand."""
        if self.align is None and self.resize is None:
            return levels
        students, teachers = levels.students, levels.teachers
        if valid is not None and (self.align is not None or self.resize == "student"):
            students = without_padding(students, valid)
        if valid is not None and self.resize == "teacher":
            teachers = without_padding(teachers, valid)
        if self.align is not None:
            students = self._aligned(students, levels.labels)
        if self.resize is not None:
            students, teachers = self._resized(students, teachers, levels.labels)
        return levels._replace(students=students, teachers=teachers)

    def _aligned(self, students: list[Tensor], labels: list[str]) -> list[Tensor]:
        """Every level's module called as it is; half features may have left the autocast region that their student ran in."""
        assert self.align is not None
        outputs = []
        modules = members(self.align, "align", self.names, len(self.channels))
        for module, x, c, label in zip(modules, students, self.channels, labels, strict=True):
            narrow = module.in_channels if isinstance(module, nn.Conv2d) else 0  # a lazy one has 0, too
            check.features(x, f"student{label}", narrow or None)
            half = x.dtype.itemsize == 2 and torch.amp.is_autocast_available(x.device.type)
            try:
                with torch.autocast(x.device.type, x.dtype) if half else nullcontext():
                    y = module(x)
            except RuntimeError as error:
                if "DTensor" in str(error) and is_dtensor(x) and not any(map(is_dtensor, module.parameters())):
                    raise TypeError(
                        f"align{label}: its parameters are plain tensors, the student's features DTensors; pass the criterion "
                        "through torch.distributed.tensor.distribute_module"
                    ) from error
                dtypes = {p.dtype for p in module.parameters()}
                if not dtypes or x.dtype in dtypes or not _OF_DTYPES.search(str(error)):
                    raise  # a device's errors, among others
                names = ", ".join(sorted(map(str, dtypes)))
                raise TypeError(
                    f"align{label}: its parameters are {names}, the student's features {x.dtype}; cast one of them, or call "
                    "the criterion under torch.autocast"
                ) from error
            if not isinstance(y, Tensor) or y.dim() != 4 or y.shape[1] != c:
                got = f"shape {list(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
                raise ValueError(f"align{label}: expected an output [N, {c}, H, W], got {got}")
            outputs.append(y)
        return outputs

    def _resized(self, students: list[Tensor], teachers: list[Tensor], labels: list[str]) -> tuple[list[Tensor], list[Tensor]]:
        students, teachers = list(students), list(teachers)
        for i, (s, t, label) in enumerate(zip(students, teachers, labels, strict=True)):
            check.features(t, f"teacher{label}")
            check.features(s, f"student{label}")
            if s.shape[2:] != t.shape[2:] and self.resize == "student":
                students[i] = nn.functional.interpolate(s, t.shape[2:], mode="bilinear")
            elif s.shape[2:] != t.shape[2:]:
                teachers[i] = nn.functional.interpolate(t, s.shape[2:], mode="bilinear")
        return students, teachers

    def _tables(self, dtype: torch.dtype, weigh: bool) -> DistillTables:
        """Every level's, frozen also where a user put a level in training (a ``MaskModule``) in a level's place."""
        acc = acc_dtype(dtype)
        tokens, weighting, standardization = zip(*(level.tables(acc) for level in self._levels()), strict=True)
        weigh = weigh and self.weight_mask
        return distill_tables(tokens, weighting if weigh else None, standardization if self.standardize else None)

    def _levels(self) -> list[MaskLevel]:
        """The ``mask_modules``; a user may have put others in their place."""
        levels = members(self.mask_modules, "mask_modules", self.names, len(self.channels))
        return fitting(levels, MaskLevel, self.channels, self.num_tokens or 0, self.weight_mask, self.standardize)


def _keep(criterion: MaskedDistillLoss, name: str, value: Any) -> None:
    object.__setattr__(criterion, name, value)  # nn.Module's takes 3 us


def _modules(align: Any, levels: int) -> list[nn.Module]:
    """``align=`` as one module per level."""
    sequence = isinstance(align, nn.ModuleList) or not isinstance(align, nn.Module)
    if sequence and (isinstance(align, str) or not isinstance(align, Sequence | nn.ModuleList)):
        raise TypeError(f"align: expected an nn.Module per level, got {type(align).__name__}")
    modules = list(align) if sequence else [align]
    if len(modules) != levels:
        raise ValueError(f"align: expected one module for each of the {levels} levels, got {len(modules)}")
    for i, module in enumerate(modules):
        if not isinstance(module, nn.Module):
            raise TypeError(f"align[{i}]: expected an nn.Module, got {type(module).__name__}")
    return modules
