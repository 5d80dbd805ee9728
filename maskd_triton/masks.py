"""Stage 1: receptive tokens and mask weights, learned on a frozen teacher."""

import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import _checks as check
from . import functional as F
from ._eager import acc_dtype
from ._levels import Levels, as_list, labels, like, per_level, valid_of_levels
from ._outputs import find_module, refuse_compiled, replace_levels
from ._statistics import ChannelStatistics
from .checkpoints import Source, load_masks, save_masks
from .diagnostics import LevelDiagnostics, collapsed, describe
from .tables import CONVOLUTIONS, MaskLevel, Tables, compose
from .teacher import FrozenTeacher, named_modules


class MaskModule(MaskLevel):
    r"""Receptive tokens of one feature level: T masks of every image, their weights, and the masked features.

    .. math::
        m = \sigma(E x), \quad w = \mathrm{softmax}_t(\mathrm{conv}_{1\times1}(\mathrm{avgpool}(\mathrm{conv}_{3\times3}(x)))),
        \quad y = x \sum_t w_t m_t

    Args:
        channels: C, channels of the teacher's features.
        num_tokens: T, number of receptive tokens (6 for detection, 8 for segmentation as published).
        weight_mask: weigh the masks per image; False sums them without weights.
        standardize: masks and weights see ``(x - channel_mean) / channel_std`` instead of ``x``; ``y`` is of ``x`` itself.
        impl: ``"auto"``, ``"triton"`` or ``"eager"``, as in :class:`MaskedDistillLoss`; concerns ``forward``.

    Shape:
        ``x [N, C, H, W]``; ``masks(x) [N, T, H, W]`` and ``weights(x) [N, T]`` in float32 (float64 for float64 ``x``);
        ``forward(x, valid=None)`` gives the masked features in the shape and dtype of ``x`` and the scalar Dice loss, of the
        valid pixels of a padded batch, if given (:func:`functional.masked_distill_loss` says in which forms).

    Parameters are ``mask_token [T, C]`` (initialised N(0, 0.01^2)) and the mask weighting module ``prob``
    (conv3x3, pool, conv1x1; N(0, 2 / fan_out), bias 0), named and initialised as in the official implementation.
    With ``standardize``, the buffers ``channel_mean [C]``, ``channel_std [C]`` and ``pixels_seen`` hold the statistics
    (:meth:`MaskLearner.calibrate`); until they are gathered, mean 0 and deviation 1.

    Raises ValueError for sizes that are not positive ints, and for features with other channels.

    Example:
        >>> import torch
        >>> from maskd_triton import MaskModule
        >>> masked, dice = MaskModule(16, num_tokens=6)(torch.randn(2, 16, 8, 8))
        >>> masked.shape, dice.shape
        (torch.Size([2, 16, 8, 8]), torch.Size([]))
    """

    channel_mean: Tensor
    channel_std: Tensor
    pixels_seen: Tensor

    def __init__(
        self,
        channels: int,
        num_tokens: int = 6,
        weight_mask: bool = True,
        *,
        standardize: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__(channels, num_tokens, weight_mask, standardize)
        check.choice(impl, "impl", F.IMPLS)
        self.impl = impl
        self.mask_token = nn.Parameter(torch.randn(self.num_tokens, self.channels) * 0.01)
        if weight_mask:
            conv3, conv1 = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, num_tokens, 1)
            for conv in (conv3, conv1):
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            self.prob = nn.Sequential(conv3, nn.AdaptiveAvgPool2d(1), conv1)
        if standardize:
            self.register_buffer("channel_mean", torch.zeros(channels))
            self.register_buffer("channel_std", torch.ones(channels))
            self.register_buffer("pixels_seen", torch.zeros((), dtype=torch.int64))

    def weighting(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight and bias of the 3x3 and of the 1x1 convolution of the mask weighting module."""
        if not self.weight_mask:
            raise ValueError("weight_mask=False: this module has no mask weights")
        conv3, conv1 = self.prob[0], self.prob[2]
        return conv3.weight, conv3.bias, conv1.weight, conv1.bias  # type: ignore[return-value]

    def tables(self, dtype: torch.dtype) -> Tables:
        """Composed in ``dtype`` of the present parameters, differentiable in them."""
        level: dict[str, Tensor] = {"mask_token": self.mask_token}
        if self.weight_mask:
            level |= dict(zip(CONVOLUTIONS, self.weighting(), strict=True))
        if self.standardize:
            level |= {"channel_mean": self.channel_mean, "channel_std": self.channel_std}
        return compose(level, dtype)

    def forward(self, x: Tensor, valid: Any = None) -> tuple[Tensor, Tensor]:
        check.features(x, "x", self.channels)
        (masked,), dice, _ = _learn([self], [x], valid, self.impl)
        return masked, dice[0]


def _learn(
    modules: Sequence[MaskModule], features: Sequence[Tensor], valid: Any, impl: str
) -> tuple[list[Tensor], Tensor, list[tuple[Tensor, Tensor, Tensor | None]]]:
    """:func:`functional.learn` with the parameters of every level's module."""
    acc = acc_dtype(features[0].dtype)
    levels = [module.tables(acc) for module in modules]
    standards = [level.standardization for level in levels if level.standardization is not None]
    weightings = [level.weighting for level in levels if level.weighting is not None]
    return F.learn(
        features,
        [s.tokens for s in standards] or [level.tokens for level in levels],
        weightings or None,
        [s.token_bias for s in standards] or None,
        valid,
        impl,
    )


class MaskLearner(nn.Module):
    """Stage 1 for all feature levels of a frozen teacher: replaces its features by masked ones, keeps the Dice loss.

    Args:
        channels: channels of each level, an int for a single level.
        num_tokens: T, receptive tokens per level.
        weight_mask: weigh the masks per image.
        standardize: masks and weights see every channel of the teacher's features with mean 0 and deviation 1, by statistics
            that :meth:`calibrate` gathers once; what the teacher's heads see stays un-standardised. On raw features the
            weighted masks tend to collapse: one token on everywhere, the others empty. Give the same to
            :class:`MaskedDistillLoss`. Off by default, as published.
        pretrained: learned tokens to start from: a path, a state dict, a ``MaskLearner``; see
            :func:`maskd_triton.checkpoints.mask_state`. None: tokens as initialised in :class:`MaskModule`.
        impl: ``"auto"``, ``"triton"`` or ``"eager"``, as in :class:`MaskedDistillLoss`.

    Shape:
        ``forward(features, valid=None)`` takes and gives a tensor, sequence or mapping of levels ``[N, C_i, H_i, W_i]``;
        ``valid`` are the pixels that count in a padded batch (:meth:`set_valid`). :meth:`dice_loss` is then the sum of the
        levels' Dice losses of that call.

    The learner's parameters are the only ones to train; put ``learner.parameters()`` into the optimizer.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from maskd_triton import MaskLearner
        >>> teacher = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 5, 1))
        >>> learner = MaskLearner(16, num_tokens=4)
        >>> with learner.attach(teacher, "0"):
        ...     loss = teacher(torch.randn(2, 3, 8, 8)).square().mean() + learner.dice_loss()
        >>> loss.backward()
        >>> learner.mask_modules[0].mask_token.grad.shape, teacher[1].weight.grad
        (torch.Size([4, 16]), None)
    """

    def __init__(
        self,
        channels: int | Sequence[int],
        num_tokens: int = 6,
        weight_mask: bool = True,
        *,
        standardize: bool = False,
        pretrained: Source | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        check.choice(impl, "impl", F.IMPLS)
        self.impl = impl
        self.channels = per_level(channels, "channels")
        self.standardize = standardize
        self.mask_modules = nn.ModuleList(
            MaskModule(c, num_tokens, weight_mask, standardize=standardize, impl=impl) for c in self.channels
        )
        if pretrained is not None:
            load_masks(self.mask_modules, pretrained)
        self.weight_mask = weight_mask
        self._dice: Tensor | None = None
        # masks, weights and valid pixels of the latest forward
        self._seen: dict[Any, tuple[Tensor, Tensor, Tensor | None]] | None = None
        self._valid: Any = None
        self._warned: set[Any] = set()
        self._attached = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy is a learner that no teacher is attached to and that has seen nothing."""
        return self.__dict__ | {"_dice": None, "_seen": None, "_valid": None, "_attached": False}

    def forward(self, features: Levels, valid: Any = None) -> Levels:
        return self._mask(features, "features", valid)

    def set_valid(self, valid: Any) -> None:
        """Inside an ``attach`` or ``calibrate`` block: the valid pixels of the padded batch that the teacher sees next.

        They stay until they are set again, so set them for every batch; None: all pixels. Padding then counts neither in the
        masks, their Dice loss and weights nor in the statistics. ``valid``: bool or integer ``[N, H0, W0]`` (transformers'
        ``pixel_mask``), or an object with ``tensors`` and ``image_sizes`` (torchvision's ``ImageList``); errors are raised
        when the teacher runs. RuntimeError outside a block.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from maskd_triton import MaskLearner
            >>> teacher, learner = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 5, 1)), MaskLearner(16, 4)
            >>> images, pixel_mask = torch.randn(2, 3, 8, 8), torch.ones(2, 8, 8, dtype=torch.bool)
            >>> pixel_mask[1, :, 4:] = False  # the second image is 8 by 4
            >>> with learner.attach(teacher, "0"):
            ...     learner.set_valid(pixel_mask)
            ...     loss = teacher(images).mean() + learner.dice_loss()
        """
        if not self._attached:
            raise RuntimeError("set_valid: the learner is not attached; call it inside the block, for every batch")
        self._valid = valid

    def _mask(self, features: Levels, name: str, valid: Any = None) -> Levels:
        tensors, keys = self._checked(features, name)
        masked, dice, seen = _learn(self._modules_of_levels(), tensors, valid, self.impl)
        self._dice = dice.sum()
        self._seen = dict(zip(keys or range(len(seen)), seen, strict=True))
        return like(features, masked, keys)

    def _checked(self, features: Levels, name: str) -> tuple[list[Tensor], list[Any] | None]:
        """The levels and, of a mapping, their keys; ValueError or TypeError where they do not fit the learner."""
        tensors, keys = as_list(features, name)
        if len(tensors) != len(self.mask_modules):
            raise ValueError(f"{name}: expected {len(self.mask_modules)} levels, got {len(tensors)}")
        for x, c, label in zip(tensors, self.channels, labels(len(tensors), keys), strict=True):
            check.features(x, f"{name}{label}", c)
        return tensors, keys

    def _modules_of_levels(self) -> list[MaskModule]:
        return [module for module in self.mask_modules if isinstance(module, MaskModule)]

    def dice_loss(self) -> Tensor:
        """Sum over levels of the Dice losses of the latest forward; RuntimeError before it, and after an ``attach`` block."""
        if self._dice is None:
            raise RuntimeError(
                "dice_loss: no features seen yet in this block; run the teacher inside `with learner.attach(...)`"
            )
        return self._dice

    def diagnostics(self) -> dict[Any, LevelDiagnostics]:
        """Coverage, pairwise Dice, weights and their entropy of the latest forward's masks, for every level.

        Levels go by their key, or by their index in a sequence. Warns (UserWarning, naming level and tokens), once per level,
        when masks have collapsed in a way that the losses do not show: on everywhere, empty, or one with all the weight
        (:func:`maskd_triton.diagnostics.collapsed`). Values stay on the device, but the check waits for it: call this now and
        then, not in every step. :meth:`save` calls it, too.

        Returns :class:`maskd_triton.diagnostics.LevelDiagnostics` by level. RuntimeError before the first forward.

        Example:
            >>> import torch
            >>> from maskd_triton import MaskLearner
            >>> learner = MaskLearner([16, 16], num_tokens=4)
            >>> _ = learner([torch.zeros(2, 16, 8, 8), torch.zeros(2, 16, 4, 4)])
            >>> learner.diagnostics()[1].coverage
            tensor([0.5000, 0.5000, 0.5000, 0.5000])
        """
        if self._seen is None:
            raise RuntimeError("diagnostics: no features seen yet; run the teacher inside `with learner.attach(...)` first")
        levels = {name: describe(m, w if self.weight_mask else None, v) for name, (m, w, v) in self._seen.items()}
        for name, level in levels.items():
            reasons = collapsed(level, overlap=False) if name not in self._warned else []
            if reasons:
                self._warned.add(name)
                advice = "" if self.standardize else "; standardize=True usually prevents it"
                warnings.warn(f"MaskLearner, level {name!r}: masks have collapsed: {'; '.join(reasons)}{advice}", stacklevel=2)
        return levels

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tokens for ``pretrained=``; see :func:`maskd_triton.checkpoints.save_masks` for formats and errors.

        Warns as :meth:`diagnostics` does if the latest masks have collapsed.

        Example:
            >>> import os, tempfile
            >>> from maskd_triton import MaskedDistillLoss, MaskLearner
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     MaskLearner([16, 16]).save(os.path.join(folder, "tokens.pt"))
            ...     criterion = MaskedDistillLoss([16, 16], pretrained=os.path.join(folder, "tokens.pt"))
        """
        if self._seen is not None:
            self.diagnostics()
        save_masks(self.mask_modules, path)

    @contextmanager
    def attach(self, teacher: nn.Module, name: str, *, output: str | None = None) -> Iterator["MaskLearner"]:
        """Mask the output of ``teacher``'s module ``name`` while the block lasts.

        Inside the block all parameters of the teacher are frozen, and its normalisation, attention and drop layers (dropout,
        drop path, stochastic depth) are in eval mode, also if the teacher is switched to train mode, which torchvision's
        detectors need to return losses. Where a module with children is itself random in train mode, call
        ``teacher.eval()``. On exit, also by an exception, ``requires_grad``, training flags, hooks and buffers (statistics of
        other layers, vectors of spectral norm) are as they were.

        Args:
            teacher: the frozen model, on the learner's device; not yet compiled: ``torch.compile`` it inside the block.
            name: dotted name of the module whose output is masked: a tensor, sequence or mapping of levels, or a
                dataclass like transformers' ``BackboneOutput``.
            output: field of that dataclass (or mapping) that holds the levels; None: ``"feature_maps"``.

        Raises:
            AttributeError: the teacher has no such module; the message lists near matches.
            RuntimeError: the learner is attached already, or another one to the same module; the learner standardises and has
                no statistics yet.
            ValueError: the teacher is compiled; and, when it runs, levels, channels or fields that do not fit.
        """
        if self.standardize and any(module.pixels_seen == 0 for module in self._modules_of_levels()):
            raise RuntimeError(
                "attach: standardize=True, but no statistics yet: run a few batches inside "
                "`with learner.calibrate(teacher, name):` first"
            )
        with self._hooked("attach", teacher, name, output, lambda x, given: self._mask(x, given, self._valid)):
            yield self

    @contextmanager
    def calibrate(self, teacher: nn.Module, name: str, *, output: str | None = None) -> Iterator["MaskLearner"]:
        """Gather the statistics of ``standardize=True``: mean and deviation of every channel over all pixels of the block.

        Run the teacher on some batches inside the block, as with :meth:`attach`; a few hundred images are plenty. Nothing is
        masked and no gradient is kept. The statistics replace earlier ones at the end of the block; a block that raises
        leaves those. ``channel_std`` is ``sqrt(var + 1e-5 mean(var))``, so that channels that never move stay finite.
        Under DDP, calibrate before wrapping: rank 0's buffers are the ones that all processes get.

        Args: as for :meth:`attach`.

        Raises:
            AttributeError, ValueError: as for :meth:`attach`.
            RuntimeError: ``standardize=False``; attached already, this learner or another; no batch was run; features all
                constant, or not finite.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from maskd_triton import MaskLearner
            >>> teacher = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 5, 1))
            >>> learner = MaskLearner(16, num_tokens=4, standardize=True)
            >>> with learner.calibrate(teacher, "0"):
            ...     for _ in range(2):
            ...         scores = teacher(torch.randn(2, 3, 8, 8))
            >>> learner.mask_modules[0].pixels_seen
            tensor(256)
        """
        if not self.standardize:
            raise RuntimeError("calibrate: this learner has standardize=False, so no statistics to gather")
        statistics = [ChannelStatistics() for _ in self.channels]

        def watch(features: Levels, given: str) -> Levels:
            levels = self._checked(features, given)[0]
            for i, (level, x) in enumerate(zip(statistics, levels, strict=True)):
                level.add(x, valid_of_levels(self._valid, levels)[i] if self._valid is not None else None)
            return features

        with self._hooked("calibrate", teacher, name, output, watch), torch.no_grad():
            yield self
        for i, level in enumerate(statistics):
            level.check(f"calibrate: level {i}")
        for module, level in zip(self._modules_of_levels(), statistics, strict=True):
            module.channel_mean.copy_(level.mean)
            module.channel_std.copy_(level.std())
            module.pixels_seen.fill_(level.pixels)

    @contextmanager
    def _hooked(
        self, caller: str, teacher: nn.Module, name: str, output: str | None, change: Callable[[Levels, str], Levels]
    ) -> Iterator[None]:
        """``teacher`` frozen, with the levels of one module's output replaced by ``change`` of them."""
        if self._attached:
            raise RuntimeError(f"{caller}: this learner is attached already; leave that block first")
        refuse_compiled(teacher, caller)
        target = find_module(teacher, name, caller)
        if any(isinstance(hook, _ReplaceOutput) for hook in target._forward_hooks.values()):
            raise RuntimeError(f"{caller}: another learner is attached to the teacher's {name!r}; leave that block first")
        modules = list(dict.fromkeys(module for _, module in named_modules(teacher)))
        holders = [(m, m.with_gradient) for m in modules if isinstance(m, FrozenTeacher)]
        training = [(m, m.training) for m in modules]
        frozen = [(p, p.requires_grad) for m in modules for p in m._parameters.values() if p is not None]
        buffers = [(m, m._buffers.copy()) for m in modules]
        values = [
            (b, b.clone(), b._version) for m in modules for b in m._buffers.values() if b is not None and not b.is_inference()
        ]
        fixed = [m for m in modules if isinstance(m, _FIXED) or _RANDOM.search(type(m).__name__)]
        hooks = [m.register_forward_pre_hook(_to_eval) for m in fixed]
        hooks.append(target.register_forward_hook(_ReplaceOutput(change, name, output)))
        self._attached, self._dice, self._seen, self._valid = True, None, None, None
        try:
            for parameter, _ in frozen:
                parameter.requires_grad_(False)
            for layer in fixed:
                layer.training = False
            for holder, _ in holders:
                holder.with_gradient = True
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for parameter, flag in frozen:
                parameter.requires_grad_(flag)
            for holder, flag in holders:
                holder.with_gradient = flag
            for module, flag in training:
                module.training = flag
            for module, held in buffers:
                module._buffers.update(held)
            with torch.no_grad():
                for buffer, value, version in values:
                    if buffer._version != version:  # a backward pass after the block may need the others untouched
                        buffer.copy_(value)
            self._attached, self._dice, self._valid = False, None, None


_FIXED = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd, nn.MultiheadAttention)
_RANDOM = re.compile(r"Drop(?:Path|Block|out)|StochasticDepth")  # timm's, transformers' and torchvision's, by their names


def _to_eval(module: nn.Module, _inputs: Any) -> None:
    module.training = False


class _ReplaceOutput:
    """Forward hook: the levels in a module's output, changed."""

    def __init__(self, change: Callable[[Levels, str], Levels], module: str, field: str | None) -> None:
        self.change, self.name, self.field = change, f"output of the teacher's {module!r}", field

    def __call__(self, _module: nn.Module, _inputs: Any, result: Any) -> Any:
        return replace_levels(result, self.field, self.name, lambda levels: self.change(levels, self.name))
