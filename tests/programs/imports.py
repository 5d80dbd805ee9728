"""What ``test_install.py`` runs: an import has no side effects, and ``impl="triton"`` for CPU tensors says what to do.

Prints where the package is, and that error.
"""

import os
import sys
from typing import Any

FORBIDDEN = (
    "socket.connect",
    "socket.getaddrinfo",
    "socket.bind",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
)


def main() -> None:
    before = dict(os.environ)
    import torch

    seen: list[str] = []

    def notice(event: str, _arguments: Any) -> None:
        if event in FORBIDDEN:
            seen.append(event)

    sys.addaudithook(notice)
    import maskd_triton

    assert not seen, seen
    assert not torch.cuda.is_initialized()
    assert dict(os.environ) == before
    assert not {"kernels", "maskd_triton.kernels"} & set(sys.modules)
    print(maskd_triton.__file__)
    x = torch.ones(1, 4, 3, 3)
    try:
        maskd_triton.functional.masked_distill_loss(x.clone().requires_grad_(), x, [torch.zeros(2, 4)], impl="triton")
    except RuntimeError as error:
        print(error)


if __name__ == "__main__":
    main()
