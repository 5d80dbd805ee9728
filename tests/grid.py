"""The tests that touch Triton, on several versions of torch and Triton: ``python -m tests.grid``.

Every pair of versions gets an environment of its own, made by pip and kept in ``--folder``: several GB for every torch, one
wheel for another Triton beside the same torch. ``--torch here`` takes the torch that runs this and all that is installed beside
it. Printed is a table of what passed and failed; exit status 1 where anything failed.
"""

import argparse
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.counts import counts

ROOT = Path(__file__).parents[1]
HERE, OWN, NEWEST = "here", "own", "newest"
# torch, its own Triton, and its torchvision where the tests of detectors run, too
TORCHES = {
    "2.9.1": ("triton==3.5.1",),
    "2.13.0": ("triton==3.7.1",),
    "2.14.1": ("triton==3.8.0", "torchvision==0.29.1"),
}
KERNELS = ("golden", "numbers", "pyramid", "standardize", "stages", "valid", "versions")
TORCH = ("ops", "compile", "graphs", "amp", "tuning", "inspect", "install", "models", "recipes")


def files(names: tuple[str, ...]) -> list[str]:
    return [f"tests/test_{name}.py" for name in names]


SUITES = {
    "interpreted": [*files(KERNELS), "-m", "not slow", "-k", "not eager-c"],  # every kernel, in Triton's interpreter
    "compiled": ["-p", "tests.ptx.plugin", "tests/ptx"],  # and its code for sm_80 and sm_90, in the emulator
    "compiled-90": ["-p", "tests.ptx.plugin", "tests/ptx", "-k", "not 80]"],  # for sm_90 only, as CI does on newest Triton
    "torch": files(TORCH),  # the operators under torch's transforms and compiler; no spills
}


def python(environment: Path) -> str:
    return str(environment / "bin" / "python")


def run(*command: str) -> None:
    print("$", *command, flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


def packages(environment: Path) -> str:
    """The folder that pip installs into."""
    return sysconfig.get_path("purelib", "posix_prefix", {"base": str(environment)})


def with_torch(torch: str, folder: Path) -> Path:
    """The environment of a torch and its own Triton, made once; the versions of all else are CI's."""
    if torch == HERE:
        return Path(sys.prefix)
    environment, wanted = folder / f"torch-{torch}", [f"torch=={torch}", *TORCHES[torch]]
    constraints = re.sub(r"(?m)^(torch|triton)==.*\n", "", (ROOT / "constraints.txt").read_text()) + "\n".join(wanted) + "\n"
    known = environment / "constraints.txt"
    if not known.is_file() or known.read_text() != constraints:
        run(sys.executable, "-m", "venv", "--clear", str(environment))
        (environment / "wanted.txt").write_text(constraints)
        install = [python(environment), "-m", "pip", "install", "--quiet", "--constraint", str(environment / "wanted.txt")]
        run(*install, *wanted)
        run(*install, "--editable", ".[test,dev,models,recipes]")
        (environment / "wanted.txt").rename(known)  # all of it is there
    return environment


def with_triton(triton: str, beside: Path, folder: Path) -> Path:
    """An environment that holds a Triton and borrows all else; made again each time, for what is newest changes."""
    if triton == OWN:
        return beside
    environment = folder / f"{beside.name.lstrip('.')}-triton-{triton}"
    run(sys.executable, "-m", "venv", "--clear", "--without-pip", str(environment))  # nothing that would hide what is borrowed
    wanted = "triton" + (triton != NEWEST) * f"=={triton}"
    run(sys.executable, "-m", "pip", "--python", python(environment), "install", "--quiet", "--no-deps", wanted)
    Path(packages(environment), "borrowed.pth").write_text(f"import site; site.addsitedir({packages(beside)!r})\n")
    return environment


def versions(environment: Path) -> list[str]:
    """Of torch and Triton."""
    show = "import torch, triton; print(torch.__version__, triton.__version__)"
    return subprocess.run([python(environment), "-c", show], check=True, capture_output=True, text=True).stdout.split()


def tested(environment: Path, suite: str, options: list[str]) -> tuple[str, bool]:
    """What came of a suite, and whether all is well."""
    report = environment / f"{suite}.xml"
    report.unlink(missing_ok=True)
    quiet = ["-q", "--disable-warnings", "-p", "no:cacheprovider", f"--junit-xml={report}"]
    command = [python(environment), "-m", "pytest", *quiet, *options, *SUITES[suite]]
    print("$", *command, flush=True)
    status = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    if not report.is_file():
        return f"pytest: exit status {status}", False
    passed, failed, _ = counts(report)
    return f"{passed} passed" + (f", {failed} failed" if failed else ""), status == 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.grid", description=__doc__)
    parser.add_argument("--torch", nargs="+", choices=[*TORCHES, HERE], default=list(TORCHES))
    parser.add_argument("--triton", nargs="+", default=[OWN, NEWEST], metavar="VERSION", help="own, newest, 3.8.0")
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=["interpreted", "compiled", "torch"])
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "grid", help="of the environments")
    parser.add_argument("--workers", default="auto", help="processes of pytest-xdist")
    args = parser.parse_args()
    rows, well = [], True
    for torch in args.torch:
        beside = with_torch(torch, args.folder.resolve())
        for triton in args.triton:
            environment = with_triton(triton, beside, args.folder.resolve())
            row = versions(environment)
            for suite in args.suite:
                shown, passed = tested(environment, suite, ["-n", args.workers, "--dist", "worksteal"])
                row.append(shown)
                well &= passed
            rows.append(row)
    for row in (["torch", "Triton", *args.suite], ["---"] * (2 + len(args.suite)), *rows):
        print("|", " | ".join(row), "|", flush=True)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
