"""The trade-off of a study: what each variant costs in CE against what it buys in fidelity."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

MARKERS = "osD^vP*X<>hd"


def draw_trade_off(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One panel a grid point of fresh SAEs: validation CE across, compound CE increase upwards.

    Every seed is a point, the variant's mean a large one; nearer to the lower left is better.

    Args:
        rows: of `hf_saereg.study.table`; points that one of them lacks are left out.
        path: of the PNG.
    """
    points = [
        point
        for point in rows[0]["compound"]
        if point.startswith("fresh") and all(point in row["compound"] for row in rows)
    ]
    columns = min(3, len(points))
    lines = -(-len(points) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.2 * columns, 3.4 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(points) :]:
        axis.set_visible(False)
    for axis, point in zip(axes.flat, points, strict=False):
        for i, row in enumerate(rows):
            increases = [found["ce_increase"] for found in row["compound"][point]]
            look = {"color": f"C{i}", "marker": MARKERS[i % len(MARKERS)]}
            axis.scatter(row["eval_ce"], increases, s=18, alpha=0.5, **look)
            mean = statistics.mean(row["eval_ce"]), statistics.mean(increases)
            axis.scatter(*mean, s=70, label=row["variant"], edgecolors="black", **look)
        axis.set_title(point, fontsize=10)
        axis.set_xlabel("validation CE, nats a token")
        axis.set_ylabel("compound CE increase")
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(rows)), fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)
