"""What ``test_checkpoints.py`` runs: a learner saved to a path, in a process that dies while it writes."""

import os
import sys
from typing import IO, Any, NoReturn

import torch

from maskd_triton import MaskLearner


def die_halfway(_: Any, file: IO[bytes]) -> NoReturn:
    file.write(b"PK" * 100)
    file.flush()
    os._exit(42)


def main(path: str) -> None:
    torch.save = die_halfway  # type: ignore[assignment]
    MaskLearner([4, 6], 3).save(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
