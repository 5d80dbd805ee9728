"""What ``test_install.py`` runs: an import has no side effects. Prints its seconds of processor time beside torch's."""

import os
import sys
import time
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
    started = time.process_time()
    import maskd_triton  # noqa: F401

    taken = time.process_time() - started
    assert not seen, seen
    assert not torch.cuda.is_initialized()
    assert dict(os.environ) == before
    assert not {"kernels", "maskd_triton.kernels"} & set(sys.modules)
    print(f"{taken:.3f}")


if __name__ == "__main__":
    main()
