"""What ``test_damaged.py`` runs: processes that save two learners to one path in turns, each killed at another time; after each
the file must be one of the two. Prints how many died while they saved."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from maskd_triton import MaskLearner
from maskd_triton.checkpoints import mask_state


def main(path: str, kills: str) -> None:
    torch.set_num_threads(1)
    delays = random.Random(0)
    learners = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        learners.append(MaskLearner([4, 6], 3))
    learners[0].save(path)
    for _ in range(int(kills)):
        saving = os.fork()
        while saving == 0:
            for learner in learners:
                learner.save(path)
        time.sleep(delays.uniform(0.001, 0.02))
        os.kill(saving, signal.SIGKILL)
        os.waitpid(saving, 0)
        found = mask_state(path)
        assert any(all(torch.equal(v, found[k]) for k, v in x.state_dict().items()) for x in learners)
    print(sum(other.suffix == ".tmp" for other in Path(path).parent.iterdir()))


if __name__ == "__main__":
    main(*sys.argv[1:])
