"""The figure of what `saereg quality` measured: a panel a measure, site by site."""

import textwrap
from collections.abc import Sequence
from itertools import cycle

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from hf_saereg.report.canvas import LINES, MARKERS, Style, settings
from hf_saereg.report.measured import MeasuredModel, measures, shown_groups

TITLE_WIDTH = 20  # characters that fit above a panel on a phone


def draw_quality(models: Sequence[MeasuredModel], style: Style) -> Figure:
    """Draw a panel per measure over the sites, a colour a model, a marker a family."""
    wanted = measures(models)
    columns = 2 if style.phone else 4
    rows = -(-len(wanted) // columns)
    sites = list(dict.fromkeys(row.site for own in models for row in own.run.heads))
    with settings(style):
        figure = Figure(
            (style.width, rows * (1.7 if style.phone else 1.9) + 1), layout="constrained"
        )
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for panel, measure in zip(axes, wanted.values(), strict=False):
            for group, marker, line in zip(
                shown_groups(models), cycle(MARKERS), cycle(LINES), strict=False
            ):
                for model in models:
                    colour = style.theme.nth(model.place)
                    by_site = measure.by_site(model, group)
                    places = [sites.index(site) for site in by_site]
                    look = {"color": colour, "marker": marker, "linestyle": line}
                    panel.plot(places, list(by_site.values()), **look)
                    chance = measure.chance_by_site(model, group)
                    places = [sites.index(site) for site in chance]
                    panel.plot(
                        places, list(chance.values()), color=colour, linewidth=0.8, alpha=0.6
                    )
            panel.set_title(textwrap.fill(measure.title, TITLE_WIDTH))
            panel.set_ylim(bottom=0)
            panel.set_xticks(range(len(sites)), [str(i + 1) for i in range(len(sites))])
            panel.yaxis.set_major_locator(MaxNLocator(4))
        for unused in axes[len(wanted) :]:
            unused.set_axis_off()
        figure.supxlabel("site, in the order of the stream")
        _add_legend(figure, models, style)
    return figure


def _add_legend(figure: Figure, models: Sequence[MeasuredModel], style: Style) -> None:
    handles = [
        Line2D([], [], color=style.theme.nth(model.place), linewidth=4, label=model.label)
        for model in models
    ]
    handles += [
        Line2D([], [], color=style.theme.text, marker=marker, linestyle=line, label=group.label)
        for group, marker, line in zip(
            shown_groups(models), cycle(MARKERS), cycle(LINES), strict=False
        )
    ]
    columns = 1 if style.phone else 2
    figure.legend(handles=handles, loc="outside upper left", ncols=columns)
