"""The figures of what sweeps found: a colour a model, a marker and a line style a variant."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from hf_saereg.report.canvas import (
    LINES,
    MARKERS,
    Style,
    scale_l0_axis,
    settings,
    site_label,
)
from hf_saereg.report.swept import (
    SweptHead,
    SweptModel,
    SweptSet,
    Variant,
    at_site,
    cotrained,
    fresh,
    mean_curve,
    variants,
)

Models = Sequence[SweptModel]
Drawing = Callable[[Models, Style], Figure]
WANTED_L0 = 20  # the density histograms are of the SAEs nearest to it


def draw_compound(models: Models, style: Style) -> Figure:
    """Draw all sites replaced at once: the sum of L0 against the compound CE increase."""
    with settings(style):
        figure = Figure((style.width, 3.6 if style.phone else 4.2), layout="constrained")
        axes = figure.subplots()
        _draw_curves(axes, models, [model.sets for model in models], style)
        axes.set_xlabel("Σ L0 over all sites (log scale)")
        axes.set_ylabel("compound CE increase, nats a token")
        _add_legend(figure, models, style)
    return figure


def draw_sites(models: Models, style: Style) -> Figure:
    """Draw a panel per site: L0 against CE increase, each site replaced alone."""
    with settings(style):
        figure, panels = _panels(models, style)
        for site, axes in panels:
            _draw_curves(axes, models, [at_site(model, site) for model in models], style)
        figure.supxlabel("L0, active latents a token (log scale)")
        figure.supylabel("CE increase, nats a token")
        _add_legend(figure, models, style)
    return figure


def draw_densities(models: Models, style: Style) -> Figure:
    """Draw a panel per site: how many latents fire how often, of the SAEs nearest to L0 20."""
    looks = list(zip(variants(models), cycle(LINES), strict=False))
    with settings(style):
        figure, panels = _panels(models, style)
        for site, axes in panels:
            for index, model in enumerate(models):
                for variant, line in looks:
                    head = nearest_head(model, variant, site)
                    if head is not None:
                        histogram = head.density_histogram
                        shares = [count / head.d_sae for count in histogram.counts]
                        axes.stairs(
                            shares,
                            histogram.log10_edges,
                            color=style.theme.nth(index),
                            linestyle=line,
                            linewidth=1.4,
                            baseline=None,
                        )
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.xaxis.set_major_formatter(lambda value, _: f"$10^{{{value:g}}}$")
            axes.yaxis.set_major_locator(MaxNLocator(4))
        figure.supxlabel("share of tokens on which a latent fires")
        figure.supylabel("share of latents")
        _add_legend(figure, models, style, markers=False)
    return figure


DRAWINGS: dict[str, Drawing] = {
    "compound": draw_compound,
    "sites": draw_sites,
    "densities": draw_densities,
}


def nearest_head(model: SweptModel, variant: Variant, site: str) -> SweptHead | None:
    """The fresh SAE at the first seed whose L0 is nearest to 20, on a log scale."""
    rows = [row for row in fresh(at_site(model, site), variant) if row.l0 > 0]
    first = [row for row in rows if row.seed == rows[0].seed]
    return min(first, key=lambda row: abs(math.log(row.l0 / WANTED_L0)), default=None)


def _panels(models: Models, style: Style) -> tuple[Figure, Iterator[tuple[str, Axes]]]:
    sites = list(dict.fromkeys(site for model in models for site in model.sites))
    columns = min(len(sites), 2 if style.phone else 3 if len(sites) <= 6 else 4)
    rows = -(-len(sites) // columns)
    height = rows * (1.75 if style.phone else 2.15) + 0.9
    figure = Figure((style.width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, site in zip(axes, sites, strict=False):
        panel.set_title(site_label(site))
    for unused in axes[len(sites) :]:
        unused.set_axis_off()
    return figure, zip(sites, axes, strict=False)


def _draw_curves(
    axes: Axes, models: Models, rows: Sequence[Sequence[SweptHead | SweptSet]], style: Style
) -> None:
    looks = list(zip(variants(models), cycle(MARKERS), cycle(LINES), strict=False))
    for index, own in enumerate(rows):
        colour = style.theme.nth(index)
        for variant, marker, line in looks:
            every = [row for row in fresh(own, variant) if row.latents > 0]
            points = mean_curve(every).points
            axes.plot(
                [point.l0 for point in points],
                [point.ce_increase for point in points],
                color=colour,
                marker=marker,
                linestyle=line,
            )
            if len({row.seed for row in every}) > 1:
                axes.plot(
                    [row.latents for row in every],
                    [row.ce_increase for row in every],
                    color=colour,
                    marker=marker,
                    markersize=3,
                    alpha=0.4,
                    linestyle="none",
                )
        for row in cotrained(own):
            if row.latents > 0:
                axes.plot(row.latents, row.ce_increase, **_star(colour))
    scale_l0_axis(axes, style)


def _star(colour: str) -> dict[str, object]:
    return {
        "marker": "*",
        "markersize": 13,
        "markerfacecolor": "none",  # a fresh SAE may lie right behind it
        "markeredgecolor": colour,
        "markeredgewidth": 1.3,
        "linestyle": "none",
        "zorder": 5,
    }


def _add_legend(figure: Figure, models: Models, style: Style, *, markers: bool = True) -> None:
    handles = [
        Line2D([], [], color=style.theme.nth(index), linewidth=4, label=model.label)
        for index, model in enumerate(models)
    ]
    handles += [
        Line2D(
            [],
            [],
            color=style.theme.text,
            marker=marker if markers else "none",
            linestyle=line,
            label=variant.label,
        )
        for variant, marker, line in zip(
            variants(models), cycle(MARKERS), cycle(LINES), strict=False
        )
    ]
    if markers and any(cotrained(model.sets) for model in models):
        handles.append(Line2D([], [], label="co-trained", **_star(style.theme.text)))
    columns = min(len(handles), 2 if style.phone else 4)
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, columnspacing=1.2)
