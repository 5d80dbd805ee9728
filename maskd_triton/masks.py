"""Stage 1: receptive tokens and mask weights, learned on a frozen teacher."""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _checks as check

from ._eager import acc_dtype
from ._hooks import UNREAD, Hooked, Output, Target, Valid, Where, frozen, names_of
from ._levels_old import Levels, as_list, container, labels, like, members, named, usual, valid_of_levels
from ._records import LearnTables, Seen
from ._statistics import ChannelStatistics
from .checkpoints import Source, load_masks, save_masks
from .diagnostics import LevelDiagnostics, collapsed, describe
from ._checks import IMPLS
from .functional import learn
from .tables import CONVOLUTIONS, MaskLevel, Tables, buffer_dtype, compose, fitting

__all__ = ["MaskLearner", "MaskModule"]


class MaskModule(MaskLevel):
    r"""Receptive tokens of one feature level: T masks of every image, their weights, and the masked features.

    $$
    m = \sigma(E x), \quad w = \mathrm{softmax}_t(\mathrm{conv}_{1\times1}(\mathrm{avgpool}(\mathrm{conv}_{3\times3}(x)))),
    \quad y = x \sum_t w_t m_t
    $$

    Args:
        channels: C, channels of the teacher's features.
        num_tokens: T, number of receptive tokens (6 for detection, 8 for segmentation as published).
        weight_mask: weigh the masks per image; False sums them without weights.
        standardize: masks and weights see ``(x - channel_mean) / channel_std`` instead of ``x``, while ``y`` is made of ``x``
            itself. See `MaskLearner`.
        impl: ``"auto"``, ``"triton"`` or ``"eager"``, as in `MaskedDistillLoss`; concerns ``forward``.

    Shape:
        ``masks(x)`` and ``weights(x)`` of features ``x [N, C, H, W]`` are ``[N, T, H, W]`` and ``[N, T]``, in float32 (float64
        for float64 ``x``). ``forward(x, valid=None)`` gives the masked features, in the shape and dtype of ``x``, and the
        scalar Dice loss. ``valid`` are the pixels of a padded batch that count, as in `functional.masked_distill_loss`.

    Parameters are ``mask_token [T, C]`` (initialised N(0, 0.01^2)) and the mask weighting module ``prob``
    (conv3x3, pool, conv1x1; N(0, 2 / fan_out), bias 0), named and initialised as in the official implementation.
    With ``standardize``, the buffers ``channel_mean [C]``, ``channel_std [C]`` and ``pixels_seen`` hold the statistics
    (`MaskLearner.calibrate`). Until they are gathered, they are mean 0 and deviation 1.

    Raises:
        TypeError, ValueError: sizes that are not positive ints; features with other channels.

    Examples:
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
        standardize: bool | str = False,
        impl: str = "auto",
    ) -> None:
        super().__init__(channels, num_tokens, weight_mask, standardize)
        check.choice(impl, "impl", IMPLS)
        self.impl = impl
        self.mask_token = nn.Parameter(torch.randn(self.num_tokens, self.channels) * 0.01)
        if weight_mask:
            conv3, conv1 = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, num_tokens, 1)
            for conv in (conv3, conv1):
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            self.prob = nn.Sequential(conv3, nn.AdaptiveAvgPool2d(1), conv1)
        if standardize:
            self.register_buffer("channel_mean", torch.zeros(channels, dtype=buffer_dtype()))
            self.register_buffer("channel_std", torch.ones(channels, dtype=buffer_dtype()))
            self.register_buffer("pixels_seen", torch.zeros((), dtype=torch.int64))

    def weighting(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight and bias of the 3x3 and of the 1x1 convolution of the mask weighting module."""
        if not self.weight_mask:
            raise ValueError("weight_mask=False: this module has no mask weights")
        conv3, conv1 = self.prob[0], self.prob[2]
        return conv3.weight, conv3.bias, conv1.weight, conv1.bias  # type: ignore[return-value]

    def tables(self, dtype: torch.dtype) -> Tables:
        """The tables that the operators take, composed in ``dtype`` of the present parameters and differentiable in them."""
        self.check_buffers()
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
) -> tuple[list[Tensor], Tensor, list[Seen]]:
    """`functional.learn` with the parameters of every level's module."""

    levels = [module.tables(acc_dtype(features[0].dtype)) for module in modules]
    standards = [level.standardization for level in levels if level.standardization is not None]
    weightings = [level.weighting for level in levels if level.weighting is not None]
    tables = LearnTables(
        [s.tokens for s in standards] or [level.tokens for level in levels],
        [s.token_bias for s in standards],
        *(zip(*weightings, strict=True) if weightings else ((), ())),
    )
    return learn(features, tables, valid, impl)


Use = Callable[[int, list[Tensor], Any], tuple[list[Tensor], Tensor, Sequence[Seen]] | None]


class _Call(NamedTuple):
    """What one call of a teacher's module gave: levels from ``first`` on, none where it is left alone."""

    first: int | None
    levels: int
    shapes: tuple[torch.Size, ...]
    dice: Tensor | None
    seen: dict[Any, Seen]


class _Pass(NamedTuple):
    """What a call of the learner itself gave: the same attribute as a teacher's `Target`."""

    parts: list[_Call]


class MaskLearner(nn.Module):
    """Stage 1: learns receptive tokens for all levels (feature maps) of a frozen teacher.

    It masks the teacher's features (`attach`), and the teacher must solve its task on them. `dice_loss` makes the masks differ.

    Args:
        channels: channels of each level, an int for a single level, or a mapping ``{name: C}``, which names the levels: then
            features may be mappings in any order.
        num_tokens: T, receptive tokens per level.
        weight_mask: weigh the masks per image.
        standardize: masks and weights see standardised features of the teacher, by statistics that `calibrate` gathers once.
            The teacher's heads still see features as they are. ``"channel"`` (or True): every channel with mean 0 and
            deviation 1. ``"isotropic"``: every channel with mean 0, and one scale for all, the root of their mean variance.
            With a linear align that equals PHI-S (RADIO, arXiv 2410.01680): tokens and align absorb its rotation. On raw
            features weighted masks tend to collapse: one is on everywhere, the others are empty. Give `MaskedDistillLoss` the
            same value. Off by default, as published.
        pretrained: learned tokens to start from: a path, a state dict, a ``MaskLearner``; see
            `maskd_triton.checkpoints.mask_state`. None: tokens as initialised in `MaskModule`.
        impl: ``"auto"``, ``"triton"`` or ``"eager"``, as in `MaskedDistillLoss`.

    Shape:
        ``forward(features, valid=None)`` takes and gives a tensor, sequence or mapping of levels ``[N, C_i, H_i, W_i]``.
        ``valid`` are the pixels that count in a padded batch (`attach`). `dice_loss` then gives the sum of the levels' Dice
        losses.

    Only the learner's parameters are trained: put ``learner.parameters()`` into the optimizer.

    Examples:
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
        channels: int | Sequence[int] | Mapping[Any, int],
        num_tokens: int = 6,
        weight_mask: bool = True,
        *,
        standardize: bool | str = False,
        pretrained: Source | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        check.choice(impl, "impl", IMPLS)
        self.impl = impl
        self.channels, self.names = named(channels)
        self.standardize = check.standardize(standardize)
        self.mask_modules = container(
            [MaskModule(c, num_tokens, weight_mask, standardize=standardize, impl=impl) for c in self.channels], self.names
        )
        if pretrained is not None:
            load_masks(self.mask_modules, pretrained)
        self.weight_mask = check.flag(weight_mask, "weight_mask")
        self._latest: Sequence[Any] = []  # whose .parts are the calls of the latest pass
        self._seen: dict[Any, Seen] = {}  # what was seen by the end of the latest attach block
        self._warned: set[Any] = set()
        self._attached = False
        self._order: list[Any] | None = None  # of the levels in the first mapping: later ones may come in another

    def __getstate__(self) -> dict[str, Any]:
        """A copy is a learner that no teacher is attached to and that has seen nothing."""
        return super().__getstate__() | {"_latest": [], "_seen": {}, "_attached": False}

    def forward(self, features: Levels, valid: Any = None) -> Levels:
        tensors, keys = self._by_name(*as_list(features, "features", self.names), "features")
        if len(tensors) != len(self.channels):
            raise ValueError(f"features: expected {len(self.channels)} levels, got {len(tensors)}")
        for x, c, label in zip(tensors, self.channels, labels(len(tensors), self.names or keys), strict=True):
            check.features(x, f"features{label}", c)
        masked, dice, seen = _learn(self._modules_of_levels(), tensors, valid, self.impl)
        own = dict(zip(self.names or keys or range(len(seen)), seen, strict=True))
        self._latest = [_Pass([_Call(0, len(seen), (), dice.sum(), own)])]
        return like(features, masked, keys)

    def _by_name(self, tensors: list[Tensor], keys: list[Any] | None, name: str) -> tuple[list[Tensor], list[Any] | None]:
        """A mapping's levels and keys in the learner's order: of its names, or of the first mapping; ValueError for others."""
        if keys is None:
            return tensors, keys
        if self.names is None:
            order = self._order = usual(keys, self._order)
        elif set(keys) <= set(self.names):
            order = [key for key in self.names if key in keys]
        else:
            raise ValueError(f"{name}: expected levels of {self.names}, got {keys}")
        found = dict(zip(keys, tensors, strict=True))
        return [found[key] for key in order], order

    def _modules_of_levels(self) -> list[MaskModule]:
        modules = members(self.mask_modules, "mask_modules", self.names, len(self.channels))
        num_tokens = getattr(modules[0], "num_tokens", 0)
        return fitting(modules, MaskModule, self.channels, num_tokens, self.weight_mask, self.standardize)

    def dice_loss(self) -> Tensor:
        """Sum over levels of the Dice losses of the latest pass.

        Raises:
            RuntimeError: there is no pass yet, or the ``attach`` block has ended; not all levels have been seen in it; the
                teacher ran without gradients although the learner is in training.
        """
        parts = [part for target in self._latest for part in target.parts if part.dice is not None]
        if not parts:
            raise RuntimeError(
                "dice_loss: no features seen yet in this block; run the teacher inside `with learner.attach(...)`, and not in "
                "code that was compiled before it"
            )
        if (levels := sum(part.levels for part in parts)) != len(self.mask_modules):
            raise RuntimeError(f"dice_loss: expected {len(self.mask_modules)} levels of the teacher, {levels} have been seen")
        loss = parts[0].dice
        for part in parts[1:]:
            loss = loss + part.dice
        without = [part for part in parts if not part.dice.requires_grad and self._trains(part)]
        if self._attached and without:
            raise RuntimeError(
                "dice_loss: the teacher ran without gradients in this attach block, so the tokens of levels "
                f"{[key for part in without for key in part.seen]} get none: under torch.no_grad() or inference_mode(), or in "
                "a reentrant activation checkpoint (use_reentrant=False). To evaluate, call dice_loss() under "
                "torch.no_grad(), too"
            )
        return loss

    def diagnostics(self) -> dict[Any, LevelDiagnostics]:
        """Statistics of the latest forward's masks: coverage, pairwise Dice, weights and their entropy.

        Warns (UserWarning, naming level and tokens), once per level, when masks have collapsed in a way that the losses do not
        show: on everywhere, empty, or one with all the weight (`maskd_triton.diagnostics.collapsed`). Values stay on the
        device, but the check waits for it: call this now and then, not in every step. `save` calls it, too.

        Returns:
            `maskd_triton.diagnostics.LevelDiagnostics` of every level, by its key, or by its index in a sequence.

        Raises:
            RuntimeError: nothing has been seen yet.

        Examples:
            >>> import torch
            >>> from maskd_triton import MaskLearner
            >>> learner = MaskLearner([16, 16], num_tokens=4)
            >>> _ = learner([torch.zeros(2, 16, 8, 8), torch.zeros(2, 16, 4, 4)])
            >>> learner.diagnostics()[1].coverage
            tensor([0.5000, 0.5000, 0.5000, 0.5000])
        """
        found = self._all_seen()
        if not found:
            raise RuntimeError("diagnostics: no features seen yet; run the teacher inside `with learner.attach(...)` first")
        levels = {name: describe(s.masks, s.weights if self.weight_mask else None, s.valid) for name, s in found.items()}
        for name, level in levels.items():
            reasons = collapsed(level, overlap=False) if name not in self._warned else []
            if reasons:
                self._warned.add(name)
                advice = "" if self.standardize else "; standardize=True usually prevents it"
                warnings.warn(f"MaskLearner, level {name!r}: masks have collapsed: {'; '.join(reasons)}{advice}", stacklevel=2)
        return levels

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tokens for ``pretrained=``. Warns as `diagnostics` does if the latest masks have collapsed.

        Args:
            path: the file; formats and errors are those of `maskd_triton.checkpoints.save_masks`.

        Examples:
            >>> import os, tempfile
            >>> from maskd_triton import MaskedDistillLoss, MaskLearner
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     MaskLearner([16, 16]).save(os.path.join(folder, "tokens.pt"))
            ...     criterion = MaskedDistillLoss([16, 16], pretrained=os.path.join(folder, "tokens.pt"))
        """
        if self._all_seen():
            self.diagnostics()
        save_masks(self.mask_modules, path)

    def _trains(self, part: _Call | None = None) -> bool:
        """Whether a pass now should give the tokens, of all levels or of the call's, gradients."""
        modules = self._modules_of_levels()
        if part is not None:
            modules = modules[part.first : (part.first or 0) + part.levels]
        return self.training and torch.is_grad_enabled() and any(p.requires_grad for m in modules for p in m.parameters())

    def _all_seen(self) -> dict[Any, Seen]:
        """Masks, weights and valid pixels of the latest pass, by level."""
        latest = {key: seen for target in self._latest for part in target.parts for key, seen in part.seen.items()}
        return latest or self._seen

    @contextmanager
    def attach(
        self,
        teacher: nn.Module,
        names: str | Sequence[str],
        *,
        call: int | None = None,
        output: Output | None = None,
        layout: str | None = None,
        grid: tuple[int, int] | None = None,
        prefix_tokens: int = 0,
        valid: Valid | None = None,
    ) -> Iterator["MaskLearner"]:
        """Mask what the teacher's modules ``names`` return while the block lasts.

        Inside the block all parameters of the teacher are frozen. Its normalisation, attention and drop layers (dropout, drop
        path, stochastic depth) are in eval mode, even when you switch the teacher to train mode, as torchvision's detectors
        need to return losses. Call ``teacher.eval()`` if a module with children is itself random in train mode. After the
        block, also by an exception, ``requires_grad``, training flags, hooks and buffers (statistics of other layers, vectors
        of spectral norm) are as they were. Call ``backward()`` of a teacher with activation checkpointing inside the block: it
        recomputes what is masked.

        Args:
            teacher: the frozen model, on the learner's device; a `FrozenTeacher` is looked through. A compiled module
                may be in it, but not around what is masked: ``torch.compile`` the whole inside the block.
            names: dotted name or names of modules whose outputs are masked; ``""`` is the teacher itself. A single module
                gives all levels, as a tensor, sequence, mapping or dataclass like transformers' ``BackboneOutput``, or one
                level in each of its calls, like a head that levels share. Several modules give equally many levels each.
            call: which call of a module that runs several times in one pass, counted from 0; the others are left alone.
                None: all of them, in order.
            output: which part of the modules' output holds the levels: a field, a key, a position in a tuple, or a tuple of
                those as a path, in which ``...`` stands for every part and a list for several; None: ``"feature_maps"`` of a
                dataclass, otherwise the output itself.
            layout: ``"nchw"``, ``"nhwc"`` or ``"tokens"`` (``[N, L, C]``); None: ``"nchw"``.
            grid: rows and columns ``(h, w)`` of the tokens; None: square patches of the images that the teacher is called with.
            prefix_tokens: how many class and register tokens stand in front; they pass through unchanged.
            valid: where the valid pixels of a padded batch come from: the name of an argument of the teacher's ``forward``
                (``"pixel_mask"``), the name of a module that pads (torchvision's ``"transform"``), or a function of the
                arguments. It must give bool or integer ``[N, H0, W0]``, an ImageList or a NestedTensor. Padding then counts
                neither in masks, Dice loss and weights nor in statistics.

        Raises:
            AttributeError: the teacher has no such module; the message lists near matches.
            RuntimeError: the learner is attached already, or another one to the same module; the learner standardises and has
                no statistics yet; ``backward()`` after the block recomputes the teacher.
            ValueError: a module lies in a compiled one; levels cannot be divided among the modules; and, when the teacher runs,
                levels, channels, layouts or fields do not fit.

        Examples:
            >>> import torch
            >>> from torch import nn
            >>> from maskd_triton import MaskLearner
            >>> class Detector(nn.Module):
            ...     def __init__(self):
            ...         super().__init__()
            ...         self.p3, self.p4 = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 32, 3, 2, 1)
            ...     def forward(self, images, pixel_mask=None):
            ...         return self.p4(self.p3(images)).mean()
            >>> images, pixel_mask = torch.randn(2, 3, 8, 8), torch.ones(2, 8, 8, dtype=torch.bool)
            >>> pixel_mask[1, :, 4:] = False  # the second image is 8 by 4
            >>> teacher, learner = Detector(), MaskLearner([16, 32], num_tokens=4)
            >>> with learner.attach(teacher, ["p3", "p4"], valid="pixel_mask"):
            ...     (teacher(images, pixel_mask=pixel_mask) + learner.dice_loss()).backward()
        """
        if self.standardize and any(module.pixels_seen == 0 for module in self._modules_of_levels()):
            raise RuntimeError(
                "attach: standardize=True, but no statistics yet: run a few batches inside "
                "`with learner.calibrate(teacher, names):` first"
            )
        modules = self._modules_of_levels()

        def mask(first: int, tensors: list[Tensor], valid: Any) -> tuple[list[Tensor], Tensor, Sequence[Seen]]:
            return _learn(modules[first : first + len(tensors)], tensors, valid, self.impl)

        where = Where(names_of(names), call, output, layout, grid, prefix_tokens)
        with self._hooked("attach", teacher, where, valid, mask):
            yield self

    @contextmanager
    def calibrate(
        self,
        teacher: nn.Module,
        names: str | Sequence[str],
        *,
        call: int | None = None,
        output: Output | None = None,
        layout: str | None = None,
        grid: tuple[int, int] | None = None,
        prefix_tokens: int = 0,
        valid: Valid | None = None,
        all_ranks: bool = True,
    ) -> Iterator["MaskLearner"]:
        """Gather the statistics of ``standardize=``: mean and deviation of every channel over all pixels of the block.

        Run the teacher on some batches inside the block, as with `attach`; a few hundred images are plenty. Nothing is
        masked and no gradient is kept. At the end of the block the statistics replace earlier ones, unless the block raised.
        ``channel_std`` is ``sqrt(var + 1e-5 mean(var))``, which keeps channels that never change finite; for ``"isotropic"``
        it is ``sqrt(mean(var))``. If torch.distributed is initialised, the statistics are those of all ranks' data: every rank
        runs the block, on batches of its own.

        Args:
            teacher: as for `attach`.
            names: as for `attach`.
            call: as for `attach`.
            output: as for `attach`.
            layout: as for `attach`.
            grid: as for `attach`.
            prefix_tokens: as for `attach`.
            valid: as for `attach`.
            all_ranks: False if only this process runs the block.

        Raises:
            AttributeError, ValueError: as for `attach`.
            RuntimeError: ``standardize=False``; attached already, this learner or another; no batch was run; features all
                constant, or not finite.

        Examples:
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

        def watch(first: int, tensors: list[Tensor], valid: Any) -> None:
            pixels = valid_of_levels(valid, tensors)
            for i, x in enumerate(tensors):
                statistics[first + i].add(x, pixels[i] if pixels else None)

        where = Where(names_of(names), call, output, layout, grid, prefix_tokens)
        with self._hooked("calibrate", teacher, where, valid, watch), torch.no_grad():
            yield self
        if all_ranks and torch.distributed.is_available() and torch.distributed.is_initialized():
            for level, c in zip(statistics, self.channels, strict=True):
                level.gather(c, self._modules_of_levels()[0].channel_mean.device)
        for name, level in zip(self.names or range(len(statistics)), statistics, strict=True):
            level.check(f"calibrate: level {name!r}")
        for module, level in zip(self._modules_of_levels(), statistics, strict=True):
            module.channel_mean.copy_(level.mean)
            module.channel_std.copy_(level.std() if self.standardize == "channel" else level.scale())
            module.pixels_seen.fill_(level.pixels)

    @contextmanager
    def _hooked(self, caller: str, teacher: nn.Module, where: Where, valid: Valid | None, use: Use) -> Iterator[None]:
        """``teacher`` frozen, and ``use`` for the levels of every call of its modules."""
        if self._attached:
            raise RuntimeError(f"{caller}: this learner is attached already; leave that block first")
        levels = _TeacherLevels(self, caller, teacher, where, valid, use)
        with frozen(levels):
            self._attached, self._latest, self._seen = True, levels.targets, {}
            try:
                with levels:
                    yield
                if levels.ran and not levels.taught and self._trains():
                    warnings.warn(
                        f"{caller}: the teacher ran only without gradients in this block, so the tokens learned nothing; usual "
                        "causes are torch.no_grad() and inference_mode() around it or inside of it. To evaluate, call "
                        "learner.eval()",
                        stacklevel=5,  # through two context managers
                    )
            finally:
                self._seen = self._all_seen()
                self._attached, self._latest = False, []
                for target in levels.targets:
                    target.clear()


class _TeacherLevels(Hooked):
    """Which of a learner's levels the calls of a teacher's modules give, and what becomes of them."""

    def __init__(
        self, learner: MaskLearner, caller: str, teacher: nn.Module, where: Where, valid: Valid | None, use: Use
    ) -> None:
        super().__init__(caller, "teacher", teacher, where, valid, exclusive=True)
        self.learner, self.use = learner, use
        modules, count = [target.module for target in self.targets], len(learner.mask_modules)
        if len(set(modules)) < len(modules):
            raise ValueError(f"{caller}: names: expected every module once, got {list(where.names)}")
        self.each, rest = divmod(count, len(modules))
        if rest:
            raise ValueError(f"{caller}: {count} levels cannot be divided among {len(modules)} modules, {list(where.names)}")
        self.first = {target: i * self.each for i, target in enumerate(self.targets)}
        self.ran, self.taught = False, False  # whether tokens could learn from any call
        self.recomputed, self.open = False, 0  # passes with valid pixels that backward has not recomputed

    def act(self, target: Target, result: Any, number: int | None) -> Any:
        where = self.where
        found, tensors, keys = where.find(result, target.label)
        tensors, keys = self.learner._by_name(tensors, keys, target.label)
        shapes = tuple(x.shape for x in tensors)
        if number is None:
            first = self._recomputed(target, shapes)
        elif where.call not in (None, number):
            target.parts.append(_Call(None, 0, shapes, None, {}))
            return None
        else:
            first = self._next(target, tensors, not isinstance(found, Sequence | Mapping), number)
        if first is None:
            return None
        names = None if self.learner.names is None else self.learner.names[first : first + len(tensors)]
        if names is not None and keys not in (None, names):
            raise ValueError(f"{target.label}: expected the levels {names}, got {keys}")
        maps = []
        for x, c, label in zip(tensors, self.learner.channels[first:], labels(len(tensors), keys), strict=False):
            maps.append(where.maps(x, f"{target.label}{label}", target.images, c))
            check.features(maps[-1], f"{target.label}{label}", c)
        used = self.use(first, maps, self._valid_pixels(target, number))
        if used is None:
            target.parts.append(_Call(first, len(maps), shapes, None, {}))
            return None
        masked, dice, seen = used
        self.ran, self.taught = True, self.taught or dice.requires_grad
        if number is not None:
            known = names or (keys if len(self.first) == 1 else None)
            own = dict(zip(known or range(first, first + len(maps)), seen, strict=True))
            target.parts.append(_Call(first, len(maps), shapes, dice.sum(), own))
        else:
            dice.sum()  # a recomputation does what the pass did
        restored = [where.restored(y, x) for y, x in zip(masked, tensors, strict=True)]
        return where.replaced(result, target.label, like(found, restored, keys))

    def done(self, target: Target) -> None:
        """A pass is over: it must have given all levels, or none."""
        levels = sum(part.levels for part in target.parts)
        if target.parts and not levels:
            raise ValueError(
                f"{target.label}: {target.calls} calls in one pass of the teacher, there is no call {self.where.call}"
            )
        if 0 < levels < self.each:
            raise ValueError(f"{target.label}: expected {self.each} levels, got {levels} in {target.calls} calls of one pass")

    def _next(self, target: Target, tensors: list[Tensor], single: bool, number: int) -> int:
        """The learner's level that the call gives, the first if it gives several."""
        before, given = sum(part.levels for part in target.parts), len(tensors)
        if target.direct and before == self.each:
            target.parts, before = [], 0  # a call of the module itself begins anew where the levels are complete
        if not before and given != self.each and not (single and given < self.each):
            raise ValueError(f"{target.label}: expected {self.each} levels, got {given}")
        if before + given > self.each:
            raise ValueError(
                f"{target.label}: expected {self.each} levels, got {before + given} in {number + 1} calls of one pass; call= "
                "picks one call"
            )
        return self.first[target] + before

    def _recomputed(self, target: Target, shapes: tuple[torch.Size, ...]) -> int | None:
        """The level of the call that backward recomputes, known by its shapes: the order is not that of the pass."""
        levels = {part.first for part in target.parts if part.shapes == shapes}
        if len(levels) != 1:
            raise RuntimeError(
                f"{self.caller}: backward() recomputes {target.name!r}, which ran {len(target.parts)} times in the latest "
                f"pass, and the shapes {[list(shape) for shape in shapes]} do not tell which call it is; turn activation "
                "checkpointing off"
            )
        return levels.pop()

    def _valid_pixels(self, target: Target, number: int | None) -> Any:
        if self.valid is None and self.padding is None:
            return None
        if number is not None and not target.whole:
            raise RuntimeError(
                f"{self.caller}: valid= is read in a call of the teacher, but {target.name!r} ran outside of one; call the "
                "teacher itself"
            )
        if target.valid is UNREAD:
            raise RuntimeError(f"{self.caller}: the module of valid= has not run before {target.name!r} in this pass")
        if number is None and self.open > 1 and target.valid is not None:
            raise RuntimeError(
                f"{self.caller}: backward() recomputes one of {self.open} passes, and it is not known which valid pixels are "
                "its own; call backward() after every pass"
            )
        if number is None:
            self.recomputed = True
        elif number == 0 and self.first[target] == 0:
            self.open = 1 if self.recomputed else self.open + 1
            self.recomputed = False
        return target.valid
