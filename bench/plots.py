"""Pictures of results: bandwidth bars under the copy's line, growth curves."""

from pathlib import Path
from typing import Any

Row = dict[str, Any]
MODE = "forward+backward"


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``bandwidth.png`` and, with growth curves among the results, ``growth.png``; their paths."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("--plots needs matplotlib: pip install matplotlib", name=error.name) from error
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in results["rows"] if row["mode"] == MODE]
    bars, curves = [r for r in rows if r["curve"] is None], [r for r in rows if r["curve"]]
    figures = {"bandwidth.png": _bandwidth(bars, results) if bars else None, "growth.png": _growth(curves) if curves else None}
    written = []
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(folder / name, dpi=80)
            written.append(folder / name)
    return written


def _bandwidth(rows: list[Row], results: dict[str, Any]) -> Any:
    from matplotlib import pyplot as plt

    workloads, contenders = _unique(rows, "workload"), _unique(rows, "contender")
    figure, axes = plt.subplots(figsize=(8, 1 + 0.22 * len(workloads) * (len(contenders) + 1)), layout="constrained")
    for i, contender in enumerate(contenders):
        own = [r for r in rows if r["contender"] == contender]
        places = [-workloads.index(r["workload"]) - (i + 1) / (len(contenders) + 1) for r in own]
        speeds = [r["ideal_bytes"] / r["median_ms"] / 1e6 for r in own]
        axes.barh(places, speeds, height=0.9 / (len(contenders) + 1), label=contender)
    axes.axvline(results["copy_gb_per_s"], color="black", linestyle="--", label="copy")
    axes.set_yticks([-i - 0.5 for i in range(len(workloads))], workloads)
    axes.set_xlabel(f"GB/s of the bytes that must be moved, {MODE}; {results['device']}")
    axes.legend(fontsize="small")
    return figure


def _growth(rows: list[Row]) -> Any:
    from matplotlib import pyplot as plt

    curves = _unique(rows, "curve")
    figure, grid = plt.subplots(2, len(curves), figsize=(3.2 * len(curves), 5.5), layout="constrained", squeeze=False)
    for column, curve in enumerate(curves):
        for contender in _unique(rows, "contender"):
            own = [r for r in rows if (r["curve"], r["contender"]) == (curve, contender)]
            sizes = [r["size"] for r in own]
            grid[0][column].loglog(sizes, [r["median_ms"] for r in own], marker=".", label=contender)
            grid[1][column].loglog(sizes, [r["peak_extra_bytes"] / 2**20 for r in own], marker=".", label=contender)
        grid[1][column].set_xlabel(curve)
    grid[0][0].set_ylabel(f"ms, {MODE}")
    grid[1][0].set_ylabel("extra MiB at the peak")
    grid[0][0].legend(fontsize="small")
    return figure


def _unique(rows: list[Row], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))
