"""Stage 2: the distillation loss."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import _checks as check
from . import functional as F
from ._eager import acc_dtype
from ._levels import Levels, match, per_level, valid_of_levels
from ._ops import Distilled, distill_loss
from .checkpoints import Source, load_masks
from .diagnostics import DistillDiagnostics, describe
from .masks import MaskModule


class MaskedDistillLoss(nn.Module):
    r"""Masked distillation with receptive tokens: the student reconstructs the teacher's features where masks say so.

    .. math::
        \mathcal{L} = \lambda \sum_{levels} \frac{1}{N} \sum_n \sum_t w_{nt}
        \frac{\sum_p m_{ntp}^2 \sum_c (s_{ncp} - t_{ncp})^2}{C\,(\sum_p m_{ntp} + \epsilon)}

    with masks ``m = sigmoid(E t)`` and softmax weights ``w`` of the frozen teacher features ``t``; after the warm-up
    ``m = sigmoid(E t) * sigmoid(E s)``, no gradient through ``m``. Huang et al., ICLR 2023, arXiv 2205.14589.

    Args:
        channels: channels of the teacher's features, one per level; an int means a single level.
        num_tokens: T, receptive tokens per level; None: no tokens, ``masks=`` come with every call.
        student_channels: channels of the student's features if it needs aligning: then a biased 1x1 convolution per
            level, ``align.{i}``, belongs to the criterion's parameters and must be trained with the student. None: no
            align, equal channels required.
        weight_mask: weigh masks per image by the mask weighting module; False: a mean over tokens.
        standardize: the student reconstructs ``(t - mean) / std`` of every channel, by the statistics that the learner gathered
            and ``pretrained`` holds; masks and weights see the same. Off by default, as published.
        custom_mask: customise masks with the student's own once the warm-up is over.
        custom_mask_warmup: training-mode calls before masks are customised (5000 to 8500 as published); those with
            ``advance=False`` do not count.
        loss_weight: factor on the loss (1 for two-stage detectors, 7 RetinaNet, 10 FCOS and RepPoints; 0.5 reproduces
            the segmentation code).
        eps: added to the mask areas (1e-5 reproduces the segmentation code, 0 the detection code with its 0/0).
        pretrained: learned tokens: a path, a state dict, a ``MaskLearner``; see :func:`maskd_triton.checkpoints.mask_state`.
            None warns: untrained tokens give masks of about 0.5 everywhere, half of a plain MSE (unless a state dict is
            loaded afterwards).
        mask_power: power of the mask in front of ``(s - t)^2``: 2 as published, or 1.
        resize: where a level's height and width differ between the two, ``"student"`` resizes the student's features to the
            teacher's size, ``"teacher"`` the teacher's to the student's (bilinear); None raises.
        impl: ``"auto"`` (CUDA tensors: Triton; others: eager), ``"triton"`` (Triton or an error; CPU tensors under
            ``TRITON_INTERPRET=1``) or ``"eager"``.

    Shape:
        ``student`` and ``teacher``: levels ``[N, C_i, H_i, W_i]``, a tensor, a sequence (matched by position) or a mapping
        (matched by key, in the teacher's order); ``valid [N, H0, W0]``. Returns a float32 scalar (float64
        for float64 features), or ``[levels]`` for ``reduction="none"``.

    Tokens and mask weights are frozen (``requires_grad=False``). ``warmup_step``, the number of training-mode calls so far,
    is a buffer in the state dict; whether masks are customised is decided on the device. Edit tokens or weighting in place
    under ``torch.no_grad()``, not through ``.data`` and not inside a compiled graph: what is composed of them would not follow.
    Features are summed in float32; ``align`` runs in the student's dtype, as a convolution under autocast would.

    Raises:
        ValueError, TypeError: arguments or levels that do not fit, named; a teacher that requires grad.
        RuntimeError: ``impl="triton"`` on CPU tensors without ``TRITON_INTERPRET=1``.

    Example:
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

    def __init__(
        self,
        channels: int | Sequence[int],
        num_tokens: int | None = 6,
        *,
        student_channels: int | Sequence[int] | None = None,
        weight_mask: bool = True,
        standardize: bool = False,
        custom_mask: bool = True,
        custom_mask_warmup: int = 1000,
        loss_weight: float = 1.0,
        eps: float = 1e-12,
        pretrained: Source | None = None,
        mask_power: int = 2,
        resize: str | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        check.choice(impl, "impl", F.IMPLS)
        if resize is not None:
            check.choice(resize, "resize", ("student", "teacher"))
        if num_tokens is None and (standardize or pretrained is not None):
            raise ValueError("num_tokens: None means masks given with every call, without pretrained= and standardize=True")
        self.resize = resize
        self.mask_power = F.check_power(mask_power)
        self.channels = per_level(channels, "channels")
        self.num_tokens = num_tokens
        self.weight_mask = weight_mask and num_tokens is not None
        self.standardize = standardize
        self.custom_mask = custom_mask and num_tokens is not None
        self.custom_mask_warmup = check.count(custom_mask_warmup, "custom_mask_warmup")
        self.loss_weight = check.amount(loss_weight, "loss_weight")
        self.eps = check.amount(eps, "eps")
        self.impl = impl
        self.mask_modules = nn.ModuleList()
        if num_tokens is not None:
            self.mask_modules.extend(MaskModule(c, num_tokens, weight_mask, standardize=standardize) for c in self.channels)
        self.mask_modules.requires_grad_(False)
        self.student_channels = self.channels
        self.align: nn.ModuleList | None = None
        if student_channels is not None:
            self.student_channels = per_level(student_channels, "student_channels", len(self.channels))
            pairs = zip(self.student_channels, self.channels, strict=True)
            self.align = nn.ModuleList(nn.Conv2d(s, c, 1) for s, c in pairs)
        self.register_buffer("warmup_step", torch.zeros((), dtype=torch.int64))
        if pretrained is not None:
            load_masks(self.mask_modules, pretrained)
        elif num_tokens is not None:
            warnings.warn(
                "MaskedDistillLoss without pretrained=: its receptive tokens are untrained, so every mask is about 0.5 and "
                "the loss is half a plain feature MSE; learn tokens with MaskLearner and pass them as pretrained=",
                stacklevel=2,
            )
        self._fitting: set[Any] = set()
        self._seen: tuple[Distilled, list[torch.Size], list[Any] | None, list[Tensor], bool] | None = None  # of the latest call
        self._owned = self._sources()
        self._composed_from: list[int] = []
        self._compose()
        self.register_load_state_dict_post_hook(_recompose)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has seen nothing."""
        return self.__dict__ | {"_seen": None}

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, num_tokens={self.num_tokens}, weight_mask={self.weight_mask}, standardize={self.standardize}, "
            f"custom_mask={self.custom_mask}, custom_mask_warmup={self.custom_mask_warmup}, "
            f"loss_weight={self.loss_weight}, eps={self.eps}, mask_power={self.mask_power}, resize={self.resize!r}, "
            f"impl={self.impl!r}"
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
        """The loss; see the class. ``reduction="none"`` gives one value per level.

        ``valid``: the pixels that count in a padded batch, ``masks`` and ``mask_weights``: those to use instead of the tokens'
        (not customised), all as in :func:`functional.masked_distill_loss`. ``advance=False``: this call does not count for the
        warm-up; with gradient accumulation, pass it for every batch but the last before an optimiser step.
        """
        check.choice(reduction, "reduction", F.REDUCTIONS)
        check.amount(self.loss_weight, "loss_weight")
        students, teachers, labels = match(student, teacher)
        keys = list(teacher) if isinstance(teacher, Mapping) else None
        if len(teachers) != len(self.channels):
            raise ValueError(f"teacher: expected {len(self.channels)} levels, got {len(teachers)}")
        if self.align is not None:
            for s, narrow, label in zip(students, self.student_channels, labels, strict=True):
                check.features(s, f"student{label}", narrow)
            students = [_align(conv, s) for conv, s in zip(self.align, students, strict=True)]
        if self.resize is not None:
            students, teachers = self._resized(students, teachers, labels)
        self._check_levels(students, teachers, labels)
        device = students[0].device
        if not torch.compiler.is_compiling() and self._composed_from != self._versions():
            self._compose()
        if masks is None and self.num_tokens is None:
            raise ValueError("masks: expected masks with every call, because num_tokens=None")
        own = self._modules_of_levels() if masks is None else ()
        tokens = [module.mask_token.detach() for module in own]  # also after model.requires_grad_()
        for token in tokens:
            check.on_device(token, "tokens", device)
        check.on_device(self.warmup_step, "warmup_step", device)
        self._seen = None  # what it holds is free for this call
        weighting = self._weighting() if masks is None and mask_weights is None else None
        pixels = valid_of_levels(valid, teachers) if valid is not None else []
        given: tuple[list[Tensor], Tensor | None] = ([], None)
        if masks is not None or mask_weights is not None:
            given = F.given_levels(masks, mask_weights, tokens, teachers, teacher)
        loss, distilled = distill_loss(
            students, teachers, tokens, weighting, self._standardization(), pixels, *given,
            self.custom_mask and masks is None, self.warmup_step, self.custom_mask_warmup, self.mask_power, self.loss_weight,
            self.eps, reduction, F.resolve_impl(self.impl, device),
        )  # fmt: skip
        if not torch.compiler.is_compiling():
            weighed = weighting is not None or mask_weights is not None
            self._seen = distilled, [t.shape for t in teachers], keys, pixels, weighed
        if self.training and advance:
            self.warmup_step.add_(1)
        return loss

    def diagnostics(self) -> dict[Any, DistillDiagnostics]:
        """Loss, coverage of the masks, pairwise Dice, weights and their entropy of every level of the latest call.

        Levels go by their key, or by their index in a sequence. Made of what that call kept (its masks, no features), so it
        costs next to nothing, and nothing waits for the device until a value is read. Masks are those that the loss used:
        customised ones once the warm-up is over.

        Returns :class:`maskd_triton.diagnostics.DistillDiagnostics` by level.
        Raises RuntimeError before the first call, and after one inside ``torch.compile``, which keeps nothing.

        Example:
            >>> import torch
            >>> from maskd_triton import MaskedDistillLoss, MaskLearner
            >>> criterion = MaskedDistillLoss(16, 4, pretrained=MaskLearner(16, 4))
            >>> loss = criterion(torch.zeros(2, 16, 8, 8), torch.zeros(2, 16, 8, 8))
            >>> criterion.diagnostics()[0].coverage
            tensor([0.5000, 0.5000, 0.5000, 0.5000])
        """
        if self._seen is None:
            raise RuntimeError("diagnostics: no call to look at; call the criterion first, outside torch.compile")
        distilled, shapes, keys, valid, weighed = self._seen
        num_tokens = distilled.coefficients.shape[2]
        sizes = [n * num_tokens * h * w for n, _, h, w in shapes]
        result = {}
        for i, (masks, (n, _, h, w)) in enumerate(zip(distilled.level_masks(sizes), shapes, strict=True)):
            m = masks.view(n, num_tokens, h, w)
            weights = distilled.coefficients[i] * (m.sum((2, 3)) + self.eps)
            weights = weights / weights.sum(1, keepdim=True)
            level = describe(m, weights if weighed else None, valid[i].view(n, h, w) if valid else None)
            result[keys[i] if keys else i] = DistillDiagnostics(**vars(level), loss=distilled.per_image[i].sum())
        return result

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

    def _check_levels(self, students: list[Tensor], teachers: list[Tensor], labels: list[str]) -> None:
        """Errors for levels that do not fit; those that look like earlier ones are not looked at again."""
        compiling = torch.compiler.is_compiling()
        if not compiling:
            looks: list[Any] = [(x.shape, x.dtype, x.device, x.requires_grad, x.is_inference()) for x in students + teachers]
            seen = (torch.is_grad_enabled(), *looks)
            if seen in self._fitting:
                return
        for s, t, channels, label in zip(students, teachers, self.channels, labels, strict=True):
            check.features(t, f"teacher{label}", channels)
            check.features(s, f"student{label}", channels)
            check.pair(s, t, (f"student{label}", f"teacher{label}"), students[0], f"student{labels[0]}")
        if not compiling:
            if len(self._fitting) >= 4096:  # endless new sizes must not fill the memory
                self._fitting.clear()
            self._fitting.add(seen)

    def _modules_of_levels(self) -> Iterator[MaskModule]:
        return (module for module in self.mask_modules if isinstance(module, MaskModule))

    # In stage 2 tokens and mask weighting are frozen, so what the operator needs is composed from them once (non-persistent
    # buffers) whenever they may have changed: here, on load, on a move or cast, and, outside torch.compile, when a version
    # counter says so.
    def _weighting(self) -> list[tuple[Tensor, Tensor]] | None:
        return list(zip(*self._composed("pool_rows", "pool_bias"), strict=True)) if self.weight_mask else None

    def _standardization(self) -> list[F.Standardization] | None:
        if not self.standardize:
            return None
        return [F.Standardization(*level) for level in zip(*self._composed(*_STANDARDIZATION), strict=True)]

    def _composed(self, *names: str) -> list[list[Any]]:
        return [[self._buffers[f"{name}_{i}"] for i in range(len(self.channels))] for name in names]

    def _compose(self) -> None:
        with torch.no_grad():
            for i, module in enumerate(self._modules_of_levels()):
                standard, weighting = module.composed(acc_dtype(module.mask_token.dtype))
                names = ("pool_rows", "pool_bias") * (weighting is not None) + _STANDARDIZATION * (standard is not None)
                for name, value in zip(names, (*(weighting or ()), *(standard or ())), strict=True):
                    self.register_buffer(f"{name}_{i}", value, persistent=False)
        self._composed_from = self._versions()

    def _sources(self) -> list[dict[str, Any]]:
        """Where modules keep the tensors that are composed."""
        if not (self.weight_mask or self.standardize):
            return []
        owners = [m for module in self._modules_of_levels() for m in (module, *(module.prob if module.weight_mask else ()))]
        return [owned for owner in owners for owned in (owner._parameters, owner._buffers) if owned]

    def _versions(self) -> list[int]:
        tensors = [x for owned in self._owned for x in owned.values() if x is not None]  # .parameters() takes ten times as long
        try:
            return [x.data_ptr() for x in tensors] + [x._version for x in tensors]
        except RuntimeError:  # tensors made under inference_mode do not count versions
            return [x.data_ptr() for x in tensors] + [0 if x.is_inference() else x._version for x in tensors]

    def _apply(self, fn: Any, recurse: bool = True) -> "MaskedDistillLoss":
        super()._apply(fn, recurse)
        self._compose()
        return self


_STANDARDIZATION = ("raw_tokens", "raw_bias", "affine")  # buffers that hold a Standardization per level


def _recompose(criterion: Any, _incompatible_keys: object) -> None:
    """A function of the module, not a lambda: a criterion can be pickled."""
    criterion._compose()


def _align(conv: Any, x: Tensor) -> Tensor:
    """The 1x1 convolution in the dtype of ``x``, as autocast would run it: features may leave an autocast region in half."""
    weight, bias = conv.weight.to(x.dtype), conv.bias.to(x.dtype)
    return nn.functional.conv2d(x, weight, bias)
