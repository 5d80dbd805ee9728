"""What a GPU visit found, put where readers and launchers look for it: ``python -m bench.publish FOLDER``.

``FOLDER`` is that of `bench.gpu_visit`. Its JSON files are copied to ``bench/results`` as they are, under the GPU's name; the
measured launch configurations to ``kernels/configs``; and README's table of GPUs is made anew from all results that are there.
Nothing of it is written by hand, and `tests/test_readme.py` checks that the table is that of the files.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maskd_triton.kernels import tuning

from .environment import ROOT

RESULTS, README, CONFIGS = ROOT / "bench/results", ROOT / "README.md", ROOT / "kernels/configs"
TIMED = ("fpn-n2", "fpn-n16", "fpn-n2-compiled", "fpn-n2-stage1")  # parts of a visit that are tables
MODE = "forward+backward"
BLOCK = re.compile(r"(?<=<!-- of bench.publish -->\n).*?(?=<!-- end of bench.publish -->\n)", re.S)


def lines(results: dict[str, Any]) -> Iterator[str]:
    """A table of every workload in a results file of ``python -m bench``: forward and backward, against ours."""
    for workload in dict.fromkeys(row["workload"] for row in results["rows"]):
        rows = {r["contender"]: r for r in results["rows"] if (r["workload"], r["mode"]) == (workload, MODE)}
        yield from ("", f"| {workload} | ms (median) | x ours | % of a copy's GB/s | extra MiB at the peak | gradient error |")
        yield "|---|---|---|---|---|---|"
        for name, row in rows.items():
            speed = row["ideal_bytes"] / row["median_ms"] / 1e6 / results["copy_gb_per_s"]
            error = "-" if row["gradient_error"] is None else f"{row['gradient_error']:.0e}"
            yield (
                f"| {name} | {row['median_ms']:.3f} | {row['median_ms'] / rows['ours']['median_ms']:.2f} | {100 * speed:.0f} "
                f"| {row['peak_extra_bytes'] / 2**20:.1f} | {error} |"
            )


def block(folder: Path = RESULTS) -> str:
    """README's part about GPUs, of the results in ``folder``; empty if there are none."""
    text: list[str] = []
    for part in TIMED:
        for path in sorted(folder.glob(f"gpu-*-{part}.json")):
            results = json.loads(path.read_text())
            versions = ", ".join(f"{name} {results['packages'][name]}" for name in ("torch", "triton"))
            where = f"[{path.name}](bench/results/{path.name})"
            text += ["", f"{results['device']}, {versions}, {results['date'][:10]} (`{results['command']}`, {where}):"]
            text += lines(results)
    return "\n".join([*text[1:], ""]) if text else ""


def publish(visit: Path, results: Path = RESULTS, configs: Path = CONFIGS, readme: Path = README) -> list[Path]:
    """Copies and writes; the files that are new or changed. ValueError where the folder is none of a visit to one GPU."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(visit.glob("*.json"))}
    gpus = {content["device"] for content in found.values() if content.get("driver")}
    if len(gpus) != 1:
        raise ValueError(f"{visit}: expected the results of one GPU, got {sorted(gpus) or 'none'}")
    (gpu,) = gpus
    name = Path(tuning.shipped_file(gpu)).stem
    written = []
    for part in found:
        to = configs / f"{name}.json" if part == "autotune" else results / f"gpu-{name}-{part}.json"
        to.parent.mkdir(exist_ok=True)
        shutil.copyfile(visit / f"{part}.json", to)
        written.append(to)
    text = readme.read_text()
    readme.write_text(BLOCK.sub(lambda _: block(results), text))
    return [*written, readme]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.publish", description=__doc__)
    parser.add_argument("visit", type=Path, metavar="FOLDER", help="of python -m bench.gpu_visit --out FOLDER")
    args = parser.parse_args()
    try:
        print(*publish(args.visit), sep="\n")
    except ValueError as error:
        print(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
