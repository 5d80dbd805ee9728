"""DTensor features: every rank works on its own images, and losses are those of the whole batch."""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

from ._checks import are_plain


def is_dtensor(x: Any) -> bool:
    """Without importing torch.distributed.tensor: where nobody has imported it, nothing is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


class Spread(NamedTuple):
    """How a batch lies on the ranks.

    Attributes:
        mesh: the devices.
        placements: ``Shard(0)`` or ``Replicate()`` in every dimension of the mesh.
        share: of the whole batch's images, those of this rank.
    """

    mesh: Any
    placements: tuple[Any, ...]
    share: float

    def local(self, x: Any, name: str) -> Any:
        """This rank's images of ``x``: a DTensor, or a container of some."""
        if isinstance(x, Tensor):
            return self._own(x, name)
        leaves, structure = pytree.tree_flatten(x)
        return pytree.tree_unflatten([None if leaf is None else self._own(leaf, name) for leaf in leaves], structure)

    def _own(self, x: Any, name: str) -> Any:
        if not is_dtensor(x):
            if not self._divided:
                return x
            raise TypeError(
                f"{name}: expected a DTensor with the placements of the features, {self.placements}, got {type(x).__name__}"
            )
        if (x.device_mesh, x.placements) != (self.mesh, self.placements):
            raise ValueError(
                f"{name}: expected the placements of the features, {self.placements} on {self.mesh}, "
                f"got {x.placements} on {x.device_mesh}"
            )
        return x.to_local()

    @property
    def _divided(self) -> bool:
        return not all(p.is_replicate() for p in self.placements)

    def _parts(self) -> list[Any]:
        """What a sum over this rank's images is in every dimension of the mesh."""
        from torch.distributed.tensor import Partial, Replicate

        return [Replicate() if p.is_replicate() else Partial() for p in self.placements]

    def parameter(self, x: Tensor, name: str) -> Tensor:
        """All of ``x`` on this rank. Its gradient is summed over ranks, which takes a DTensor."""
        from torch.distributed.tensor import Replicate

        if is_dtensor(x):
            whole: Any = x.redistribute(self.mesh, [Replicate()] * len(self.placements))  # type: ignore[attr-defined]
            return whole.to_local(grad_placements=self._parts())
        if x.requires_grad and self._divided:
            raise TypeError(
                f"{name}: expected a DTensor, because features are DTensors and every rank has images of its own; pass the "
                "module through torch.distributed.tensor.distribute_module"
            )
        return x

    def mean(self, x: Tensor) -> Tensor:
        """The mean over all images, a replicated DTensor, of each rank's means ``x``."""
        from torch.distributed.tensor import DTensor, Replicate

        return DTensor.from_local(x * self.share, self.mesh, self._parts()).redistribute(
            placements=[Replicate()] * len(self.placements)
        )

    def joined(self, x: Tensor, like: Tensor) -> Tensor:
        """Every rank's ``x`` as a DTensor in the shape of ``like``."""
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(x, self.mesh, self.placements, shape=like.shape, stride=like.stride())


def spread_of(maps: Sequence[Tensor], name: str) -> Spread | None:
    """How the features ``maps`` lie on the ranks; None for plain tensors. TypeError or ValueError for other placements."""
    if are_plain(maps) or not any(map(is_dtensor, maps)):
        return None
    first: Any = next(x for x in maps if is_dtensor(x))
    if not all(p.is_replicate() or p.is_shard(0) for p in first.placements):
        raise ValueError(
            f"{name}: expected DTensors that are sharded along the batch or replicated, got placements {first.placements}; "
            "redistribute them, for instance to Shard(0)"
        )
    own = first.to_local().shape[0]
    return Spread(first.device_mesh, first.placements, own / first.shape[0] if first.shape[0] else 1.0)


def whole(x: Any) -> Any:
    """All of a DTensor that every rank reads, without gradient; anything else as it is."""
    return x.full_tensor() if is_dtensor(x) else x
