"""What ``test_viz.py`` runs: masks drawn into a file, its argument, without pyplot; matplotlib is imported by a plot alone."""

import sys

import torch

from maskd_triton import viz


def main(path: str) -> None:
    assert "matplotlib" not in sys.modules
    viz.plot_masks(torch.rand(1, 3, 8, 8), [torch.rand(1, 2, 4, 4)]).savefig(path)
    assert "matplotlib.pyplot" not in sys.modules


if __name__ == "__main__":
    main(*sys.argv[1:])
