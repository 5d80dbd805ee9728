"""Stage 1: receptive tokens and mask weights, learned on a frozen teacher."""

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import _checks as check
from ._eager import acc_dtype
from ._hooks import Hooked, Output, Valid, Where, check_alive, frozen
from ._levels import Levels, Unpacked, labels, named, unpack, valid_of_levels
from ._options import Check, Options
from ._records import LearnTables, Seen
from ._statistics import ChannelStatistics
from ._torch import Model, in_transforms, tracing
from ._warn import warn
from .checkpoints import Source, load_masks, save_masks
from .diagnostics import LevelDiagnostics, LevelReports, describe, is_plain, verdict
from .functional import learn
from .tables import CONVOLUTIONS, TOKEN_STD, MaskLevel, Tables, as_small_as_drawn, buffer_dtype, compose, of_levels

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
        weight_mask: learn a weight of every mask for each image; False adds the masks up.
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

    CHECKS: ClassVar[dict[str, Check]] = MaskLevel.CHECKS | {"impl": check.impl}

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
        self.impl = impl
        self.mask_token = nn.Parameter(torch.randn(self.num_tokens, self.channels) * TOKEN_STD)
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
        """The tables that the operators take, composed of the present parameters and differentiable in them.

        Args:
            dtype: of the composition.
        """
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
    tables = of_levels([module.tables(acc_dtype(features[0].dtype)) for module in modules])
    tokens = tables.teacher_tokens or tables.tokens
    return learn(features, LearnTables(tokens, tables.token_bias, tables.pool_rows, tables.pool_bias), valid, impl)


class MaskLearner(Options):
    """Stage 1: learns receptive tokens for all levels (feature maps) of a frozen teacher.

    It masks the teacher's features (`attach`), and the teacher must solve its task on them. `dice_loss` makes the masks differ.

    Args:
        channels: channels of each level, an int for a single level, or a mapping ``{name: C}``, which names the levels: then
            mappings of features must have these names, in any order.
        num_tokens: T, receptive tokens per level, at most 32.
        weight_mask: learn a weight of every mask for each image; False adds the masks up.
        standardize: compute masks and weights from the teacher's standardised features, with statistics that `calibrate`
            gathers once. The teacher's heads still see raw features. ``"channel"`` (or True) gives every channel mean 0 and
            deviation 1. ``"isotropic"`` gives every channel mean 0, and all one scale, the root of their mean variance. With a
            linear align that equals PHI-S (RADIO, arXiv 2410.01680), whose rotation tokens and align absorb. We recommend it:
            raw features have a mean, along which a mask can be on everywhere, and stage 2 is then a plain feature MSE. Give
            `MaskedDistillLoss` the same value. Off by default, as published.
        pretrained: learned tokens to start from: a path, a state dict, a ``MaskLearner``; see
            `maskd_triton.checkpoints.mask_state`. None: tokens as initialised in `MaskModule`.
        impl: ``"auto"``, ``"triton"`` or ``"eager"``, as in `MaskedDistillLoss`.

    Shape:
        ``forward(features, valid=None)`` takes and gives a tensor, sequence or mapping of levels ``[N, C_i, H_i, W_i]``.
        ``valid`` are the pixels that count in a padded batch (`attach`). `dice_loss` then gives the sum of the levels' Dice
        losses.

    Only the learner's parameters are trained, so put ``learner.parameters()`` into the optimizer.

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

    CHECKS: ClassVar[dict[str, Check]] = {"weight_mask": check.flag, "standardize": check.standardize, "impl": check.impl}
    FIXED = frozenset(("channels", "names", "weight_mask", "standardize"))
    USED_UP = frozenset(("num_tokens", "pretrained"))

    mask_modules: nn.ModuleList

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
        self.channels, self.names = named(channels)
        self.weight_mask = weight_mask
        self.standardize = standardize
        self.impl = impl
        self.mask_modules = nn.ModuleList(
            MaskModule(c, num_tokens, weight_mask, standardize=standardize, impl=impl) for c in self.channels
        )
        if pretrained is not None:
            load_masks(self.mask_modules, pretrained)
        self._dice: dict[int, Tensor] = {}  # of the levels of the latest pass
        self._seen: dict[Any, Seen] = {}
        self._warned: set[Any] = set()
        self._attached: _Attached | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy is a learner that no teacher is attached to and that has seen nothing."""
        return super().__getstate__() | {"_dice": {}, "_seen": {}, "_attached": None}

    def forward(self, features: Levels, valid: Any = None) -> Levels:
        found = unpack(features, "features", self.names)
        check.levels(found.tensors, "features", labels(len(found.tensors), found.keys), self.channels)
        masked, dice, seen = _learn(self._levels, found.tensors, valid, self.impl)
        if not tracing(found.tensors):
            self._dice, self._seen = {}, {}
            self._keep(0, dice, seen, found.keys)
        return found.rebuild(masked)

    def _keep(self, first: int, dice: Tensor, seen: Sequence[Seen], keys: Sequence[Any] | None) -> None:
        """Keep what `dice_loss` and `diagnostics` need of the levels from ``first`` on."""
        own = keys if keys and len(keys) == len(self.channels) else range(len(self.channels))
        for i, level in enumerate(seen):
            self._dice[first + i] = dice[i]
            self._seen[(self.names or own)[first + i]] = level

    def dice_loss(self) -> Tensor:
        """Sum over levels of the Dice losses of the latest pass.

        Raises:
            RuntimeError: there is no pass yet, or the ``attach`` block has ended; not all levels have been seen in it; the
                teacher ran without gradients although the learner is in training.
        """
        if len(self._dice) != len(self.channels):
            seen = f"expected {check.counted(len(self.channels))} of the teacher, got {len(self._dice)}"
            why = seen if self._dice else "no features seen yet in this block"
            hooks = self._attached
            where = (
                "run the teacher inside `with learner.attach(...)`, and call dice_loss() in there, too"
                if hooks is None
                else hooks.not_run(hooks.missing())
            )
            raise RuntimeError(f"dice_loss: {why}; {where}")
        check_alive(self._dice.values(), "dice_loss", "teacher")
        without = [i for i, dice in self._dice.items() if not dice.requires_grad and self._trains(i)]
        if without and self._attached is not None:
            raise RuntimeError(
                "dice_loss: the teacher ran without gradients in this attach block, so the tokens of levels "
                f"{[self.names[i] if self.names else i for i in without]} get none: under torch.no_grad() or inference_mode(), "
                "or in a reentrant activation checkpoint (use_reentrant=False). To evaluate, call dice_loss() under "
                "torch.no_grad(), too"
            )
        return torch.stack([self._dice[i] for i in range(len(self.channels))]).sum()

    def diagnostics(self, objects: Tensor | None = None) -> LevelReports:
        """Statistics of the latest forward's masks: coverage, pairwise Dice, weights, their entropy, and focus.

        Printed, it says in a line per level what these masks are to the student, why, and what helps
        (`maskd_triton.diagnostics.verdict`). It warns with that line, once per level, where stage 2 would be a plain MSE, which
        the losses do not show. It leaves tokens that are still as initialised to `save`. Values stay on the device, but the
        check waits for it, so call this now and then, not in every step.

        Args:
            objects: where the objects of the latest images are, ``[N, H0, W0]``, of any size, 1 inside: labels that are not
                background, boxes. Adds the *emphasis*, how much more they weigh to stage 2 than other pixels.

        Returns:
            `maskd_triton.diagnostics.LevelDiagnostics` of every level, by its key, or by its index in a sequence.

        Raises:
            RuntimeError: nothing has been seen yet.
            ValueError: objects of another number of images.

        Examples:
            >>> import torch
            >>> from maskd_triton import MaskLearner
            >>> learner = MaskLearner([16, 16], num_tokens=1)
            >>> _ = learner.requires_grad_(False).mask_modules[0].mask_token.zero_()
            >>> _ = learner.mask_modules[1].mask_token[:, 0].fill_(9)  # this token finds the pixels of channel 0
            >>> images = torch.zeros(2, 16, 8, 8)
            >>> images[:, 0, :4], images[:, 0, 4:] = 1, -1
            >>> _ = learner([images, images])
            >>> print(learner.diagnostics(objects=images[:, 0] > 0))
            level 0: plain MSE: focus 0.00, emphasis 1.00. Learn longer, with no more weight decay than 1e-3
            level 1: selective: focus 0.50, emphasis 2.00
        """
        if not self._seen:
            raise RuntimeError("diagnostics: no features seen yet; run the teacher inside `with learner.attach(...)` first")
        check_alive((level.masks for level in self._seen.values()), "diagnostics", "teacher")
        weighted = self.weight_mask
        levels = {n: describe(s.masks, s.weights if weighted else None, s.valid, objects) for n, s in self._seen.items()}
        self._warn_of(levels, untrained=False)
        return LevelReports(levels, standardized=bool(self.standardize))

    def _warn_of(self, levels: Mapping[Any, LevelDiagnostics], untrained: bool) -> None:
        """Warn of each level on which stage 2 would be a plain MSE, once; of untrained levels only if asked to."""
        for name, level in levels.items():
            if name not in self._warned and is_plain(level, untrained=untrained):
                self._warned.add(name)
                warn(f"MaskLearner, level {name!r}: {verdict(level, standardized=bool(self.standardize))}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tokens for ``pretrained=``. It warns as `diagnostics` does, and if the tokens have learned nothing.

        Args:
            path: the file; formats and errors as in `maskd_triton.checkpoints.save_masks`.

        Examples:
            >>> import os, tempfile
            >>> from maskd_triton import MaskedDistillLoss, MaskLearner
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     MaskLearner([16, 16]).save(os.path.join(folder, "tokens.pt"))
            ...     criterion = MaskedDistillLoss([16, 16], pretrained=os.path.join(folder, "tokens.pt"))
        """
        if self._seen:
            drawn = any(as_small_as_drawn(module.mask_token) for module in self._levels)  # of which save_masks warns
            self._warn_of(self.diagnostics(), untrained=not drawn)
        save_masks(self.mask_modules, path)

    @property
    def _levels(self) -> list[MaskModule]:
        return list(self.mask_modules)  # type: ignore[arg-type]

    def _trains(self, level: int) -> bool:
        """Whether a pass now should give the tokens of a level gradients."""
        learns = any(p.requires_grad for p in self._levels[level].parameters())
        return learns and self.training and torch.is_grad_enabled()

    @contextmanager
    def attach(
        self,
        teacher: Model,
        names: str | Sequence[str],
        *,
        output: Output | None = None,
        layout: str | None = None,
        grid: tuple[int, int] | None = None,
        prefix_tokens: int = 0,
        valid: Valid | None = None,
    ) -> Iterator["MaskLearner"]:
        """Mask what the teacher's modules ``names`` return while the block lasts.

        Inside the block all parameters of the teacher are frozen. Its normalisation, attention and drop layers (dropout, drop
        path, stochastic depth) are in eval mode, even when you switch the teacher to train mode, as torchvision's detectors
        need to return losses. Call ``teacher.eval()`` if other modules of it change in train mode. After the block, also by an
        exception, ``requires_grad``, training flags and hooks are as they were. **Call ``backward()`` of a teacher with
        activation checkpointing inside the block**: it recomputes what is masked. Leave the blocks of several learners in the
        reverse order.

        Args:
            teacher: the frozen model, on the learner's device; a `FrozenTeacher` is looked through. Code that was compiled
                before the block does not see its hooks: ``torch.compile`` the teacher inside the block.
            names: dotted name or names of modules whose outputs are masked; ``""`` is the teacher itself. Name one module that
                returns all levels (a tensor, sequence, mapping, or a dataclass like transformers' ``BackboneOutput``), one
                that runs once per level, like a shared head, or several that give equally many levels each.
            output: which part of the modules' output holds the levels: a field, a key, or a position in a tuple; None:
                ``"feature_maps"`` of a dataclass, otherwise the output itself.
            layout: ``"nchw"``, ``"nhwc"`` or ``"tokens"`` (``[N, L, C]``); None: ``"nchw"``.
            grid: rows and columns ``(h, w)`` of the tokens; None: square patches of the images that the teacher is called with.
            prefix_tokens: how many class and register tokens stand in front; they pass through unchanged.
            valid: where the valid pixels of a padded batch come from: the name of an argument of the teacher's ``forward``
                (``"pixel_mask"``), or a function of its arguments, which is called when the first level of a pass arrives. It
                must give bool or integer ``[N, H0, W0]``, an ImageList or a NestedTensor. Padding then counts neither in masks,
                Dice loss and weights nor in statistics.

        Raises:
            AttributeError: the teacher has no such module; the message lists near matches.
            RuntimeError: the learner is attached already; it standardises and has no statistics yet.
            ValueError: levels cannot be divided among the modules; and, when the teacher runs, levels, channels, layouts or
                fields do not fit.

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
        if self.standardize and any(module.pixels_seen == 0 for module in self._levels):
            raise RuntimeError(
                "attach: standardize=True, but no statistics yet: run a few batches inside "
                "`with learner.calibrate(teacher, names):` first"
            )
        where = Where(names, output, layout, grid, prefix_tokens)
        with self._hooked("attach", teacher, where, valid, functools.partial(_learn, impl=self.impl)):
            yield self

    @contextmanager
    def calibrate(
        self,
        teacher: Model,
        names: str | Sequence[str],
        *,
        output: Output | None = None,
        layout: str | None = None,
        grid: tuple[int, int] | None = None,
        prefix_tokens: int = 0,
        valid: Valid | None = None,
    ) -> Iterator["MaskLearner"]:
        """Gather the statistics of ``standardize=``: mean and deviation of every channel over all pixels of the block.

        Run the teacher on some batches inside the block, as with `attach`; a few hundred images are plenty. Nothing is
        masked and no gradient is kept. At the end of the block the statistics replace earlier ones, unless the block raised.
        ``channel_std`` is ``sqrt(var + 1e-5 mean(var))``, which keeps channels that never change finite; for ``"isotropic"``
        it is ``sqrt(mean(var))``. If torch.distributed is initialised, the statistics cover the data of all ranks, so every
        rank runs the block, on batches of its own.

        If you have cached the features, let an ``nn.Identity()`` be the teacher and ``""`` its name, and call it on them.

        Args:
            teacher: as for `attach`, and so are all others.
            names: as for `attach`.
            output: as for `attach`.
            layout: as for `attach`.
            grid: as for `attach`.
            prefix_tokens: as for `attach`.
            valid: as for `attach`.

        Raises:
            AttributeError, ValueError: as for `attach`.
            RuntimeError: ``standardize=False``; attached already; no batch was run; features all constant, or not finite.

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
        statistics = {module: ChannelStatistics() for module in self._levels}

        def watch(modules: Sequence[MaskModule], maps: Sequence[Tensor], valid: Any) -> None:
            if in_transforms():
                raise RuntimeError("calibrate: the teacher runs inside of a transform of torch.func; call it outside")
            pixels = valid_of_levels(valid, maps)
            for i, (module, x) in enumerate(zip(modules, maps, strict=True)):
                statistics[module].add(x, pixels[i] if pixels else None)

        where = Where(names, output, layout, grid, prefix_tokens)
        with self._hooked("calibrate", teacher, where, valid, watch) as hooks, torch.no_grad():
            yield self
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for module, level in statistics.items():
                level.gather(module.channels, module.channel_mean.device)
        missing = hooks.missing()
        why = hooks.not_run(missing) if missing else "no image has a valid pixel"
        for name, level in zip(self.names or range(len(statistics)), statistics.values(), strict=True):
            level.check(f"calibrate: level {name!r}", why)
        for module, level in statistics.items():
            module.channel_mean.copy_(level.mean)
            module.channel_std.copy_({"channel": level.std, "isotropic": level.scale}[str(self.standardize)]())
            module.pixels_seen.fill_(level.pixels)

    @contextmanager
    def _hooked(self, caller: str, teacher: Model, where: Where, valid: Valid | None, use: "Use") -> Iterator["_Attached"]:
        """``teacher`` frozen, and ``use`` for the levels of every call of its modules."""
        if self._attached is not None:
            raise RuntimeError(f"{caller}: this learner is attached already; leave that block first")
        hooks = _Attached(self, caller, teacher, where, valid, use)
        with frozen(hooks.model), hooks:
            self._attached = hooks
            self._dice, self._seen = {}, {}
            try:
                yield hooks
            finally:
                self._attached, self._dice = None, {}
        if hooks.ran and not hooks.taught and any(map(self._trains, range(len(self.channels)))):
            warn(
                f"{caller}: the teacher ran only without gradients in this block, so the tokens learned nothing; usual causes "
                "are torch.no_grad() and inference_mode() around it or inside of it. To evaluate, call learner.eval()",
            )


Use = Callable[[Sequence[MaskModule], Sequence[Tensor], Any], tuple[list[Tensor], Tensor, list[Seen]] | None]


class _Attached(Hooked):
    """Which of a learner's levels the calls of a teacher's modules give, and what becomes of them.

    Attributes:
        use: is given the modules of a call's levels, their features and the valid pixels. It gives what `functional.learn`
            does, or None where the teacher goes on with its own features.
        each: how many levels every module gives.
        shapes: of the levels that every module has given in this pass, in order.
        unrepeated: passes since backward() last recomputed one.
    """

    FIRST = True

    def __init__(self, learner: MaskLearner, caller: str, teacher: Model, where: Where, valid: Valid | None, use: Use) -> None:
        super().__init__(caller, "teacher", teacher, where, valid)
        self.learner, self.use = learner, use
        if len(set(self.modules)) < len(self.modules):
            raise ValueError(f"{caller}: names: expected every module once, got {list(where.names)}")
        levels, modules = len(learner.channels), len(self.modules)
        self.each, rest = divmod(levels, modules)
        if rest:
            raise ValueError(
                f"{caller}: {check.counted(levels)} cannot be divided among {modules} modules, {list(where.names)}"
            )
        if learner.names is not None:
            self.keys = [learner.names[i : i + self.each] for i in range(0, levels, self.each)]
        self.shapes: list[list[torch.Size]] = [[] for _ in self.modules]
        self.ran, self.taught = False, False  # whether tokens could learn from any call
        self.unrepeated, self.repeated = 0, False

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().begin(args, kwargs)
        self.shapes = [[] for _ in self.modules]
        self.learner._dice.clear()
        self.learner._seen.clear()
        if torch.is_grad_enabled():
            self.unrepeated, self.repeated = 1 if self.repeated else self.unrepeated + 1, False

    def end(self, result: Any) -> None:
        """A pass is over: every module must have given all its levels, or none."""
        super().end(result)
        for label, shapes in zip(self.labels, self.shapes, strict=True):
            if result is not None and 0 < len(shapes) < self.each:
                raise ValueError(f"{label}: expected {check.counted(self.each)}, got {len(shapes)} in one pass")

    def missing(self) -> list[str]:
        """Modules that have given no levels in this pass."""
        return [name for name, shapes in zip(self.where.names, self.shapes, strict=True) if not shapes]

    def act(self, i: int, found: Unpacked, repeated: bool) -> Any:
        learner, name, label = self.learner, self.where.names[i], self.labels[i]
        shapes = [x.shape for x in found.tensors]
        first = i * self.each + (self._place_of_repeated(i, shapes) if repeated else self._next_place(i, shapes))
        modules = learner._levels[first : first + len(shapes)]
        used = self.use(modules, self._maps(found, first, label), self.valid(name, repeated))
        if used is None:
            return None
        masked, dice, seen = used
        self.ran, self.taught = True, self.taught or dice.requires_grad
        if not repeated:
            learner._keep(first, dice, seen, found.keys)
        return found.rebuild([self.where.restored(y, x) for y, x in zip(masked, found.tensors, strict=True)])

    def _maps(self, found: Unpacked, first: int, label: str) -> list[Tensor]:
        """Check what a call gave, as features ``[N, C, H, W]`` of the learner's levels from ``first`` on."""
        maps = []
        for i, (x, key) in enumerate(zip(found.tensors, labels(len(found.tensors), found.keys), strict=True)):
            channels, name = self.learner.channels[first + i], f"{label}{key}"
            maps.append(self.where.maps(x, name, self.images, channels))
            check.features(maps[-1], name, channels)
        return maps

    def _next_place(self, i: int, shapes: list[torch.Size]) -> int:
        """Find which of the i-th module's levels this call gives, the first if it gives several."""
        before = self.shapes[i]
        if not self.inside and len(before) == self.each:
            before.clear()  # a call of the module itself begins anew where the levels are complete
        before.extend(shapes)
        if len(before) > self.each:
            raise ValueError(f"{self.labels[i]}: expected {check.counted(self.each)}, got {len(before)} in one pass")
        return len(before) - len(shapes)

    def _place_of_repeated(self, i: int, shapes: list[torch.Size]) -> int:
        """Find it for a call that backward() recomputes, by its shapes, because the order differs from the pass."""
        self.repeated, count = True, len(shapes)
        several = count < self.each
        if self.unrepeated > 1 and (several or self.read is not None):
            raise RuntimeError(
                f"{self.caller}: backward() recomputes one of {self.unrepeated} passes, and it is not known which; call "
                "backward() after every pass, or turn activation checkpointing off"
            )
        places = [k for k in range(0, self.each, count) if self.shapes[i][k : k + count] == shapes] if several else [0]
        if len(places) != 1:
            raise RuntimeError(
                f"{self.caller}: backward() recomputes {self.where.names[i]!r}, which ran several times in the pass, and the "
                f"shapes {[list(shape) for shape in shapes]} do not tell which call it is; turn activation checkpointing off"
            )
        return places[0]
