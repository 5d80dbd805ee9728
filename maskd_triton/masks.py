"""Stage 1: receptive tokens and mask weights, learned on a frozen teacher."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import functional as F
from ._eager import acc_dtype
from ._levels import Levels, as_list, per_level, positive_int
from ._outputs import find_module, refuse_compiled, replace_levels
from .checkpoints import Source, load_masks, save_masks


class MaskModule(nn.Module):
    r"""Receptive tokens of one feature level: T masks of every image, their weights, and the masked features.

    .. math::
        m = \sigma(E x), \quad w = \mathrm{softmax}_t(\mathrm{conv}_{1\times1}(\mathrm{avgpool}(\mathrm{conv}_{3\times3}(x)))),
        \quad y = x \sum_t w_t m_t

    Args:
        channels: C, channels of the teacher's features.
        num_tokens: T, number of receptive tokens (6 for detection, 8 for segmentation as published).
        weight_mask: weigh the masks per image; False sums them without weights.
        impl: ``"auto"``, ``"triton"`` or ``"eager"``, as in :class:`MaskedDistillLoss`; concerns ``forward``.

    Shape:
        ``x [N, C, H, W]``; ``masks(x) [N, T, H, W]`` and ``weights(x) [N, T]`` in float32 (float64 for float64 ``x``);
        ``forward(x)`` gives the masked features in the shape and dtype of ``x`` and the scalar Dice loss.

    Parameters are ``mask_token [T, C]`` (initialised N(0, 0.01^2)) and the mask weighting module ``prob``
    (conv3x3, pool, conv1x1; N(0, 2 / fan_out), bias 0), named and initialised as in the official implementation.

    Raises ValueError for sizes that are not positive ints, and for features with other channels.

    Example:
        >>> import torch
        >>> from maskd_triton import MaskModule
        >>> masked, dice = MaskModule(16, num_tokens=6)(torch.randn(2, 16, 8, 8))
        >>> masked.shape, dice.shape
        (torch.Size([2, 16, 8, 8]), torch.Size([]))
    """

    def __init__(self, channels: int, num_tokens: int = 6, weight_mask: bool = True, *, impl: str = "auto") -> None:
        super().__init__()
        F.check_choice(impl, "impl", F.IMPLS)
        self.impl = impl
        self.channels = positive_int(channels, "channels")
        self.num_tokens = positive_int(num_tokens, "num_tokens")
        self.weight_mask = weight_mask
        self.mask_token = nn.Parameter(torch.randn(num_tokens, channels) * 0.01)
        if weight_mask:
            conv3, conv1 = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, num_tokens, 1)
            for conv in (conv3, conv1):
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            self.prob = nn.Sequential(conv3, nn.AdaptiveAvgPool2d(1), conv1)

    def extra_repr(self) -> str:
        return f"{self.channels}, num_tokens={self.num_tokens}, weight_mask={self.weight_mask}"

    def weighting(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight and bias of the 3x3 and of the 1x1 convolution of the mask weighting module."""
        if not self.weight_mask:
            raise ValueError("weight_mask=False: this module has no mask weights")
        conv3, conv1 = self.prob[0], self.prob[2]
        return conv3.weight, conv3.bias, conv1.weight, conv1.bias  # type: ignore[return-value]

    def masks(self, x: Tensor) -> Tensor:
        """``sigmoid(E x)``: ``[N, T, H, W]``."""
        F.check_features(x, "x", self.channels)
        return F.receptive_masks(x, self.mask_token)

    def weights(self, x: Tensor) -> Tensor:
        """Softmax mask weights ``[N, T]``; ValueError with ``weight_mask=False``."""
        F.check_features(x, "x", self.channels)
        return F.mask_weights(x, *self.weighting())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        F.check_features(x, "x", self.channels)
        (masked,), dice = F.masked_features_and_dice([x], [self.mask_token], _weighting([self], x), impl=self.impl)
        return masked, dice[0]


def _weighting(modules: Sequence[MaskModule], x: Tensor) -> list[tuple[Tensor, Tensor]] | None:
    """The composed mask weighting of every level, in the precision in which sums of features like ``x`` are taken."""
    if not modules[0].weight_mask:
        return None
    acc = acc_dtype(x.dtype)
    return [F.compose_weighting(*(p.to(acc) for p in module.weighting())) for module in modules]


class MaskLearner(nn.Module):
    """Stage 1 for all feature levels of a frozen teacher: replaces its features by masked ones, keeps the Dice loss.

    Args:
        channels: channels of each level, an int for a single level.
        num_tokens: T, receptive tokens per level.
        weight_mask: weigh the masks per image.
        pretrained: learned tokens to start from: a path, a state dict, a ``MaskLearner``; see
            :func:`maskd_triton.checkpoints.mask_state`. None: tokens as initialised in :class:`MaskModule`.
        impl: ``"auto"``, ``"triton"`` or ``"eager"``, as in :class:`MaskedDistillLoss`.

    Shape:
        ``forward(features)`` takes and gives a tensor, sequence or mapping of levels ``[N, C_i, H_i, W_i]``.
        :meth:`dice_loss` is then the sum of the levels' Dice losses of that call.

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
        pretrained: Source | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        F.check_choice(impl, "impl", F.IMPLS)
        self.impl = impl
        self.channels = per_level(channels, "channels")
        self.mask_modules = nn.ModuleList(MaskModule(c, num_tokens, weight_mask) for c in self.channels)
        if pretrained is not None:
            load_masks(self.mask_modules, pretrained)
        self._dice: Tensor | None = None
        self._attached = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy is a learner that no teacher is attached to."""
        return self.__dict__ | {"_dice": None, "_attached": False}

    def forward(self, features: Levels) -> Levels:
        return self._mask(features, "features")

    def _mask(self, features: Levels, name: str) -> Levels:
        tensors, keys = as_list(features, name)
        if len(tensors) != len(self.mask_modules):
            raise ValueError(f"{name}: expected {len(self.mask_modules)} levels, got {len(tensors)}")
        for i, (x, c) in enumerate(zip(tensors, self.channels, strict=True)):
            F.check_features(x, f"{name}[{keys[i] if keys else i!r}]", c)
        modules = [module for module in self.mask_modules if isinstance(module, MaskModule)]
        tokens = [module.mask_token for module in modules]
        masked, dice = F.masked_features_and_dice(tensors, tokens, _weighting(modules, tensors[0]), impl=self.impl)
        self._dice = dice.sum()
        return _like(features, masked, keys)

    def dice_loss(self) -> Tensor:
        """Sum over levels of the Dice losses of the latest forward; RuntimeError before the first one."""
        if self._dice is None:
            raise RuntimeError("dice_loss: no features seen yet; run the teacher inside `with learner.attach(...)` first")
        return self._dice

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tokens for ``pretrained=``; see :func:`maskd_triton.checkpoints.save_masks` for formats and errors.

        Example:
            >>> import os, tempfile
            >>> from maskd_triton import MaskedDistillLoss, MaskLearner
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     MaskLearner([16, 16]).save(os.path.join(folder, "tokens.pt"))
            ...     criterion = MaskedDistillLoss([16, 16], pretrained=os.path.join(folder, "tokens.pt"))
        """
        save_masks(self.mask_modules, path)

    @contextmanager
    def attach(self, teacher: nn.Module, name: str, *, output: str | None = None) -> Iterator["MaskLearner"]:
        """Mask the output of ``teacher``'s module ``name`` while the block lasts.

        Inside the block all parameters of the teacher are frozen and its normalisation and dropout layers are in eval
        mode (also if the teacher is switched to train mode, which torchvision's detectors need to return losses). On
        exit, also by an exception, parameters' ``requires_grad``, training flags and hooks are as they were.

        Args:
            teacher: the frozen model, on the learner's device; not yet compiled: ``torch.compile`` it inside the block.
            name: dotted name of the module whose output is masked: a tensor, sequence or mapping of levels, or a
                dataclass like transformers' ``BackboneOutput``.
            output: field of that dataclass (or mapping) that holds the levels; None: ``"feature_maps"``.

        Raises:
            AttributeError: the teacher has no such module; the message lists near matches.
            RuntimeError: the learner is attached already.
            ValueError: the teacher is compiled; and, when it runs, levels, channels or fields that do not fit.
        """
        if self._attached:
            raise RuntimeError("attach: this learner is attached already; leave that block first")
        refuse_compiled(teacher)
        target = find_module(teacher, name)
        training = [(m, m.training) for m in teacher.modules()]
        frozen = [(p, p.requires_grad) for p in teacher.parameters()]
        fixed = [m for m in teacher.modules() if isinstance(m, _FIXED)]
        hooks = [m.register_forward_pre_hook(_to_eval) for m in fixed]
        hooks.append(target.register_forward_hook(_replace_output(self, name, output)))
        self._attached, self._dice = True, None
        try:
            for parameter, _ in frozen:
                parameter.requires_grad_(False)
            for layer in fixed:
                layer.training = False
            yield self
        finally:
            for hook in hooks:
                hook.remove()
            for parameter, flag in frozen:
                parameter.requires_grad_(flag)
            for module, flag in training:
                module.training = flag
            self._attached, self._dice = False, None


_FIXED = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)


def _to_eval(module: nn.Module, _inputs: Any) -> None:
    module.training = False


def _replace_output(learner: MaskLearner, module: str, field: str | None) -> Callable[[nn.Module, Any, Any], Any]:
    name = f"output of the teacher's {module!r}"

    def hook(_module: nn.Module, _inputs: Any, result: Any) -> Any:
        return replace_levels(result, field, name, lambda levels: learner._mask(levels, name))

    return hook


def _like(features: Levels, tensors: list[Tensor], keys: list[Any] | None) -> Levels:
    """``tensors`` in the container of ``features``."""
    if isinstance(features, Tensor):
        return tensors[0]
    if isinstance(features, Mapping):
        return type(features)(zip(keys or (), tensors, strict=True))  # type: ignore[call-arg]
    if isinstance(features, tuple) and hasattr(features, "_make"):
        return features._make(tensors)
    return type(features)(tensors)  # type: ignore[call-arg]
