"""The ways in which `examples.tokens` learns tokens."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tokens:
    """One way to stage 1. The defaults are the published settings for RetinaNet, FCOS and RepPoints.

    Attributes:
        slow: a rate of the weighting module divided by each layer's number of inputs.
        scale: of the weighting's last layer at the start.
        balance: factor of ``T sum_t mean_n(w_nt)^2 - 1``, a balance of the mean weights as in routers of experts.
        decay_tokens: False: weight decay on the weighting alone.
        sgd: SGD of rate .1 and momentum .9 in place of Adam.
        poly: the rate falls by a polynomial of power .9 in place of a cosine.
        steps: None: those of the settings; 0: as initialised.
        seed: of the tokens' start and of the batches.
    """

    standardize: bool | str = False
    num_tokens: int = 6
    weighted: bool = True
    weight_decay: float = 1e-3
    decay_tokens: bool = True
    slow: bool = False
    scale: float = 1.0
    balance: float = 0.0
    sgd: bool = False
    poly: bool = False
    steps: int | None = None
    seed: int = 0


def ways(standardize: bool | str) -> dict[str, Tokens]:
    """The ways for one kind of features."""
    return {
        "untrained": Tokens(standardize, steps=0),
        "after one step": Tokens(standardize, steps=1),
        "as published": Tokens(standardize),
        "weight decay 0.1": Tokens(standardize, weight_decay=0.1),  # as published for Cascade Mask R-CNN
        "weighting slower": Tokens(standardize, slow=True),
        "balanced weights": Tokens(standardize, balance=1.0),
        "unweighted": Tokens(standardize, weighted=False),
        "one token": Tokens(standardize, num_tokens=1),
        "SGD 0.1, weight decay 1e-4": Tokens(standardize, sgd=True, weight_decay=1e-4),  # as published for Faster R-CNN
    }


WAYS = {
    **{f"raw: {name}": way for name, way in ways(False).items()},
    "raw: as published for segmentation": Tokens(num_tokens=8, weighted=False, sgd=True, poly=True),
    **{f"channel: {name}": way for name, way in ways("channel").items()},
    "channel: weight decay 0.01": Tokens("channel", weight_decay=1e-2),
    "channel: weight decay 0.1, weighting only": Tokens("channel", weight_decay=0.1, decay_tokens=False),
    "channel: weighting smaller at the start": Tokens("channel", scale=0.01),
    "isotropic: as published": Tokens("isotropic"),
    "isotropic: one token": Tokens("isotropic", num_tokens=1),
    "raw: as published, seed 1": Tokens(seed=1),
    "channel: as published, seed 1": Tokens("channel", seed=1),
    "channel: one token, seed 1": Tokens("channel", num_tokens=1, seed=1),
}
LEFT_OUT = {  # by the detector, whose head takes long
    "raw: weight decay 0.1",
    "raw: weighting slower",
    "raw: balanced weights",
    "channel: balanced weights",
    "channel: SGD 0.1, weight decay 1e-4",
    "channel: weight decay 0.01",
    "channel: weight decay 0.1, weighting only",
    "channel: weighting smaller at the start",
    "isotropic: one token",
}
