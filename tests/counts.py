"""One line for several runs of pytest: ``python -m tests.counts REPORT.xml ...``, with what ``--junit-xml`` wrote."""

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path


def counts(report: Path) -> tuple[int, int, int]:
    """How many tests passed, failed and were skipped."""
    suite = ElementTree.parse(report).getroot()[0].attrib
    failed, skipped = int(suite["failures"]) + int(suite["errors"]), int(suite["skipped"])
    return int(suite["tests"]) - failed - skipped, failed, skipped


if __name__ == "__main__":
    passed, failed, skipped = map(sum, zip(*(counts(Path(report)) for report in sys.argv[1:]), strict=True))
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
