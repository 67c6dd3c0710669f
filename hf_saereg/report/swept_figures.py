"""The figures of what sweeps found: a colour a model, a marker and a line style a variant."""

from collections.abc import Callable, Sequence
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hf_saereg.report.bars import BarPanel, draw_bar_panels
from hf_saereg.report.canvas import (
    LINES,
    MARKERS,
    Style,
    legend_columns,
    panels,
    scale_l0_axis,
    settings,
    site_label,
)
from hf_saereg.report.densities import DensityCurve, draw_density_panel, nearest_to_wanted
from hf_saereg.report.findings import BARS_AT, SUM_L0, l0_text
from hf_saereg.report.swept import ScoredModel, SweptHead, SweptSet
from hf_saereg.report.swept_curves import (
    Variant,
    at_site,
    cotrained,
    fresh,
    mean_curve,
    nearest_shared,
    variants,
)

Models = Sequence[ScoredModel]
Drawing = Callable[[Models, Style], Figure]


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
        figure, axes = panels(_sites(models), style)
        for site, panel in axes.items():
            _draw_curves(panel, models, [at_site(model, site) for model in models], style)
        figure.supxlabel("L0, active latents a token (log scale)")
        figure.supylabel("CE increase, nats a token")
        _add_legend(figure, models, style)
    return figure


def draw_densities(models: Models, style: Style) -> Figure:
    """Draw a panel per site: how many latents fire how often, of the SAEs nearest to L0 20."""
    looks = list(zip(variants(models), cycle(LINES), strict=False))
    with settings(style):
        figure, axes = panels(_sites(models), style)
        for site, panel in axes.items():
            curves = [
                DensityCurve(head.density_histogram, style.theme.nth(index), line)
                for index, model in enumerate(models)
                for variant, line in looks
                if (head := nearest_head(model, variant, site)) is not None
            ]
            draw_density_panel(panel, curves)
        figure.supxlabel("share of tokens on which a latent fires")
        figure.supylabel("share of latents")
        _add_legend(figure, models, style, markers=False)
    return figure


def draw_bars(models: Models, style: Style) -> Figure:
    """Draw bars near a Σ L0 of 50 and, site by site, near an L0 of 50, that all models reached."""
    labels = [model.label for model in models]
    return draw_bar_panels(bar_panels(models), labels, lambda style, i: style.theme.nth(i), style)


DRAWINGS: dict[str, Drawing] = {
    "compound": draw_compound,
    "bars": draw_bars,
    "sites": draw_sites,
    "densities": draw_densities,
}


def bar_panels(models: Models) -> list[BarPanel]:
    """All sites at once by variant, then a panel of single sites a variant."""
    sites = _sites(models)
    compound = BarPanel("all sites at once", [], [[] for _ in models])
    by_variant = []
    for variant in variants(models):
        single = BarPanel(f"one site at a time: {variant.label}", [], [[] for _ in models])
        places = [("", [model.sets for model in models], compound)]
        places += [(site, [at_site(model, site) for model in models], single) for site in sites]
        for site, rows, panel in places:
            found = nearest_shared(rows, variant, BARS_AT)
            if found is not None:
                name, total = (site_label(site), "L0") if site else (variant.label, SUM_L0)
                panel.labels.append(f"{name}\n{total} {l0_text(found.l0)}")
                for heights, height in zip(panel.heights, found.ce_increase, strict=True):
                    heights.append(height)
        by_variant.append(single)
    return [panel for panel in (compound, *by_variant) if panel.labels]


def nearest_head(model: ScoredModel, variant: Variant, site: str) -> SweptHead | None:
    """The fresh SAE at the first seed whose L0 is nearest to 20, on a log scale."""
    rows = [row for row in fresh(at_site(model, site), variant) if row.l0 > 0]
    return nearest_to_wanted(row for row in rows if row.seed == rows[0].seed)


def _sites(models: Models) -> list[str]:
    return list(dict.fromkeys(site for model in models for site in model.sites))


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
    columns = legend_columns([handle.get_label() for handle in handles], style)
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, columnspacing=1.2)
