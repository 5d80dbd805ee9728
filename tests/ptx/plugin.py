"""``python -m pytest -p tests.ptx.plugin [--arch 80] tests/...``: what tests run on CPU tensors with ``impl="triton"`` are the
compiled kernels, in the emulator, instead of Triton's interpreter."""

import os

os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported; tests/conftest.py would choose the interpreter

from collections.abc import Iterator

import pytest

from .driver import ARCHS, Device, virtual_gpu

_devices: list[Device] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--arch", type=int, choices=ARCHS, default=90, help="compute capability of the emulated GPU (90)")


@pytest.fixture(autouse=True, scope="session")
def emulated_gpu(request: pytest.FixtureRequest) -> Iterator[Device]:
    """The GPU that all tests run on, unless they bring their own."""
    with virtual_gpu(request.config.getoption("--arch")) as device:
        _devices.append(device)
        yield device


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was launched: it shows that the emulator ran."""
    for device in _devices:
        launches = ", ".join(f"{name} {n}" for name, n in sorted(device.launches.items()))
        terminalreporter.write_line(f"emulated sm_{device.arch}: {device.launches.total()} launches: {launches}")
