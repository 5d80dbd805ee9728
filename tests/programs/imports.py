"""What ``test_install.py`` runs: an import has no side effects."""

import os
import sys


def main() -> None:
    before = dict(os.environ)
    import torch

    import maskd_triton  # noqa: F401

    assert not torch.cuda.is_initialized()
    assert dict(os.environ) == before
    assert not {"kernels", "maskd_triton.kernels"} & set(sys.modules)


if __name__ == "__main__":
    main()
