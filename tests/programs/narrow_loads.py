"""What ``test_inspect.py`` runs for a target: which kernels load features in small pieces without the inspector saying so,
where the alignment of the features is not known at compile time. Given a target and cases as ``bf16-nchw``."""

import sys
from unittest import mock

from bench import inspect
from maskd_triton.kernels import launch


def main(target: str, *cases: str) -> int:
    silent = []
    with mock.patch.object(launch, "is_aligned", return_value=False):
        for case in (inspect.Case(dtype, layout) for dtype, layout in (name.split("-") for name in cases)):
            for name, compiled in inspect.compile_case(case, target).items():
                if name in inspect.FEATURE_MAPS and not inspect.problems(case, inspect.facts(name, compiled)):
                    silent.append(f"{case} {name}")
    print(*silent, sep="\n")
    return 1 if silent else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
