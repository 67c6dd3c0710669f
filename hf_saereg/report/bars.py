"""Bars at one L0: what replacing each site, or all of them, costs, model by model."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from hf_saereg.report.canvas import Style, legend_columns, settings

BAR_SPACE = 0.8  # of the distance between two groups of bars
FLAT_CHARACTERS = 45  # of labels that stand side by side under half a page's width


class BarPanel(NamedTuple):
    """Groups of bars on one scale.

    Attributes:
        title: which SAEs.
        labels: a group each, its L0 in it.
        heights: (models, groups) in nats; None where a model has none.
    """

    title: str
    labels: list[str]
    heights: list[list[float | None]]


def draw_bar_panels(
    panels: Sequence[BarPanel],
    models: Sequence[str],
    colour: Callable[[Style, int], str],
    style: Style,
) -> Figure:
    """A row a panel on a phone, two in a row elsewhere.

    Args:
        panels: at least one.
        models: labels, in the order of the heights.
        colour: of the nth model.
        style: theme and width.
    """
    columns = 1 if style.phone else min(2, len(panels))
    rows = -(-len(panels) // columns)
    with settings(style):
        figure = Figure(
            (style.width, rows * (2.5 if style.phone else 2.9) + 0.5), layout="constrained"
        )
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for panel, axis in zip(panels, axes, strict=False):
            _draw(panel, axis, [colour(style, i) for i in range(len(models))], style)
        for unused in axes[len(panels) :]:
            unused.set_axis_off()
        figure.supylabel("CE increase, nats a token")
        handles = [Patch(color=colour(style, i), label=name) for i, name in enumerate(models)]
        figure.legend(
            handles=handles, loc="outside upper left", ncols=legend_columns(models, style)
        )
    return figure


def _draw(panel: BarPanel, axes: Axes, colours: Sequence[str], style: Style) -> None:
    width = BAR_SPACE / len(panel.heights)
    values_fit = len(panel.labels) * len(panel.heights) <= (6 if style.phone else 8)
    for i, (heights, colour) in enumerate(zip(panel.heights, colours, strict=True)):
        for group, height in enumerate(heights):
            if height is None:
                continue
            place = group + (i - (len(panel.heights) - 1) / 2) * width
            axes.bar(place, height, width=0.9 * width, color=colour)
            if values_fit:
                axes.annotate(
                    f"{height:.3f}",
                    (place, max(height, 0)),
                    xytext=(0, 2),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7,
                )
    places = range(len(panel.labels))
    lines = [line for label in panel.labels for line in label.splitlines()]
    longest = max(map(len, lines), default=0)
    if style.phone or longest * len(panel.labels) > FLAT_CHARACTERS:
        axes.set_xticks(places, panel.labels, rotation=35, ha="right", rotation_mode="anchor")
    else:
        axes.set_xticks(places, panel.labels)
    axes.set_xlim(-0.6, len(panel.labels) - 0.4)
    axes.set_title(panel.title)
    axes.tick_params(axis="x", length=0)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.margins(y=0.12)
    axes.grid(visible=False, axis="x")
