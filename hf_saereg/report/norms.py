"""Lines of the mean norm of the residual stream, site by site, a line a model."""

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hf_saereg.report.canvas import (
    Style,
    legend_columns,
    set_limits_from_zero,
    settings,
    site_label,
)


class NormLine(NamedTuple):
    """One model's line.

    Attributes:
        label: its name.
        colour: of the line.
        norms: mean ‖x‖₂, a site each.
    """

    label: str
    colour: str
    norms: Sequence[float]


def draw_norm_lines(sites: Sequence[str], lines: Sequence[NormLine], style: Style) -> Figure:
    """Draw norms from zero, the sites in their order.

    Args:
        sites: hook names.
        lines: a model each.
        style: theme and width.
    """
    positions = range(len(sites))
    with settings(style):
        figure = Figure((style.width, 3.1 if style.phone else 3.3), layout="constrained")
        axes = figure.subplots()
        for label, colour, norms in lines:
            axes.plot(positions, norms, color=colour, marker=".", markersize=9, label=label)
        labels = [site_label(site) for site in sites]
        if style.phone or len(labels) > 8:
            axes.set_xticks(positions, labels, rotation=40, ha="right", rotation_mode="anchor")
        else:
            axes.set_xticks(positions, labels)
        axes.set_ylabel("mean ‖x‖₂")
        set_limits_from_zero(axes)
        axes.grid(visible=False, axis="x")
        handles = [Line2D([], [], color=own.colour, linewidth=4, label=own.label) for own in lines]
        figure.legend(
            handles=handles,
            loc="outside upper left",
            ncols=legend_columns([own.label for own in lines], style),
        )
    return figure
