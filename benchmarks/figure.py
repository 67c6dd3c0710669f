"""The figure of `benchmarks.step`: cost against d_sae and against L0, and the loss curves."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

COLOURS = {
    "naive": "#c85200",
    "compile": "#cc79a7",
    "dense": "#e0a030",
    "sparse": "#0072b2",
    "triton": "#0072b2",
    "auto": "#009e73",
    "product": "#33383f",
}
NAMES = {
    "naive": "whole arrays, autograd",
    "compile": "whole arrays, torch.compile",
    "product": "encoder product alone: the floor",
}


def draw(results: dict[str, Any]) -> Figure:
    """A panel for d_sae, one for L0, and one for the loss curves where there are some.

    Args:
        results: with `scaling`, as `benchmarks.step` writes them.
    """
    panels = 3 if "story" in results else 2
    figure = Figure(figsize=(4.2 * panels, 3.6), layout="constrained")
    axes = figure.subplots(1, panels)
    by_d_sae = results["scaling"]["by_d_sae"]
    label = f"latents of the head (d_sae), L0 {by_d_sae[0]['l0']:.0f}"
    _cost(axes[0], by_d_sae, "d_sae", label)
    largest = results["scaling"]["by_l0"][0]["d_sae"]
    _cost(
        axes[1],
        results["scaling"]["by_l0"],
        "l0",
        f"active latents a token (L0), d_sae {largest:,}",
    )
    axes[0].set_ylabel(f"ms a step of one head, {results['tokens']:,} tokens")
    lines, labels = axes[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=len(lines), frameon=False)
    if panels == 3:
        _story(axes[2], results["story"])
    figure.suptitle(
        f"{results['shape']}, {results['precision']}, {results['threads']} threads",
        fontsize="medium",
    )
    return figure


def _cost(axes: Axes, points: list[dict[str, Any]], x: str, label: str) -> None:
    for path in points[0]["seconds"]:
        axes.plot(
            [point[x] for point in points],
            [1e3 * point["seconds"][path] for point in points],
            color=COLOURS[path],
            linestyle="--" if path == "product" else "-",
            marker="o",
            markersize=3,
            label=NAMES.get(path, path),
        )
    axes.set(xscale="log", yscale="log", xlabel=label)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_locator(LogLocator(base=2))
    axes.minorticks_off()
    axes.grid(alpha=0.2)


def _story(axes: Axes, story: dict[str, list[float]]) -> None:
    for width, (path, losses) in zip(range(2 * len(story), 0, -2), story.items(), strict=True):
        steps = range(1, len(losses) + 1)
        axes.plot(
            steps, losses, color=COLOURS[path], linewidth=width / 2, label=NAMES.get(path, path)
        )
    axes.set(yscale="log", xlabel="training step", title="CE + term, same seed")
    axes.legend(frameon=False, fontsize="small")
