"""``python -m tests.fuzz --cases 20000 --seed 1 [--emulator sm_90] [--processes 2]``: random cases of both stages.

6 % of the cases run Triton's kernels in its interpreter, the others eager; with ``--emulator`` all run the compiled kernels. A
case that fails is shrunk and printed: write it down as a plain test.
"""

import argparse
import os
import sys

import pytest


class Summary:
    """What was tried, over all processes."""

    def __init__(self) -> None:
        self.cases, self.share = 0, 0.0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            found = dict(report.user_properties)
            self.cases += int(found.get("cases", 0))
            self.share = max(self.share, float(found.get("share", 0)))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.write_line(f"{self.cases} cases; the largest error was {self.share:.2f} of what is allowed")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--emulator", choices=("sm_80", "sm_90"), help="run the compiled kernels on this emulated GPU")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    os.environ |= {"MASKD_FUZZ_CASES": str(options.cases), "MASKD_FUZZ_SEED": str(options.seed)}
    arguments = ["-q", "-n", str(options.processes), "--dist", "worksteal"]
    if options.emulator:
        os.environ["TRITON_INTERPRET"] = "0"
        arguments += ["-p", "tests.ptx.plugin", "--arch", options.emulator.removeprefix("sm_"), "tests/ptx/test_fuzz.py"]
    else:
        arguments.append("tests/test_fuzz.py")
    return int(pytest.main(arguments, plugins=[Summary()]))


if __name__ == "__main__":
    sys.exit(main())
