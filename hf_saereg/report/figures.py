"""The figures of the report, each a function from results and a style to a matplotlib `Figure`.

What is notable:

- One colour per model in every figure (blue plain, orange regularized: the Okabe-Ito pair that
  colour-blind readers tell apart), one marker and line style per family, a star for co-trained.
"""

from collections.abc import Callable, Sequence
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from hf_saereg.report.bars import BarPanel, draw_bar_panels
from hf_saereg.report.canvas import (
    LINES,
    MARKERS,
    Style,
    panels,
    scale_l0_axis,
    settings,
    site_label,
)
from hf_saereg.report.densities import DensityCurve, draw_density_panel, nearest_to_wanted
from hf_saereg.report.findings import BARS_AT, SUM_L0, l0_text
from hf_saereg.report.norms import NormLine, draw_norm_lines
from hf_saereg.report.results import COTRAINED, MODELS, Results
from hf_saereg.report.verdict import (
    Comparison,
    Curve,
    PointComparison,
    compare_compound,
    compare_sites,
    fresh_rows,
)

Drawing = Callable[[Results, Style], Figure]


def draw_sites(results: Results, style: Style) -> Figure:
    """Draw a panel per site: L0 against CE increase, each site replaced alone."""
    with settings(style):
        figure, axes = panels(results.sites, style)
        for site, panel in axes.items():
            compared = [c for c in compare_sites(results) if c.site == site]
            stars = [
                (row.l0, row.ce_increase)
                for row in results.rows
                if row.source == COTRAINED and row.site == site
            ]
            _draw_curves(panel, compared, stars, style)
        figure.supxlabel("L0, active latents a token (log scale)")
        figure.supylabel("CE increase, nats a token")
        _add_legend(figure, results, style, starred=_has_cotrained(results))
    return figure


def draw_compound(results: Results, style: Style) -> Figure:
    """Draw all sites replaced at once: the sum of L0 against the compound CE increase."""
    with settings(style):
        figure = Figure((style.width, 3.6 if style.phone else 4.2), layout="constrained")
        axes = figure.subplots()
        cotrained = results.cotrained_compound()
        stars = [(cotrained.sum_l0, cotrained.ce_increase)] if cotrained else []
        _draw_curves(axes, compare_compound(results), stars, style)
        axes.set_xlabel("Σ L0, active latents a token over all sites (log scale)")
        axes.set_ylabel("compound CE increase, nats a token")
        if style.phone:
            axes.set_xlabel("Σ L0 over all sites (log scale)")
        _add_legend(figure, results, style, starred=cotrained is not None)
    return figure


def draw_ce(results: Results, style: Style) -> Figure:
    """Draw bars of the CE on training and validation text, from zero."""
    bars = [
        (f"{model}, {split}", ce, style.theme.of(model), alpha)
        for model, result in zip(MODELS, results.models, strict=True)
        for split, ce, alpha in (
            ("training", result.train_ce, 0.5),
            ("validation", result.eval_ce, 1.0),
        )
    ]
    labels, values, colours, alphas = zip(*bars, strict=True)
    positions = (0.0, 0.8, 2.0, 2.8)
    with settings(style):
        figure = Figure((style.width, 2.0), layout="constrained")
        axes = figure.subplots()
        for position, value, colour, alpha in zip(positions, values, colours, alphas, strict=True):
            axes.barh(position, value, height=0.68, color=colour, alpha=alpha)
            axes.annotate(
                f"{value:.3f}",
                (value, position),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
            )
        axes.set_yticks(positions, labels)
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_xlim(0, max(values) * (1.2 if style.phone else 1.09))
        axes.set_xlabel("CE, nats a token")
        axes.xaxis.set_major_locator(MaxNLocator(4 if style.phone else 6))
        axes.grid(visible=False)  # the bars carry their values
        axes.spines["left"].set_visible(False)
    return figure


def draw_norms(results: Results, style: Style) -> Figure:
    """Draw the mean norm of the residual stream at each site."""
    lines = [
        NormLine(model, style.theme.of(model), [baseline.residual_norm[s] for s in results.sites])
        for model, baseline in zip(MODELS, results.baselines, strict=True)
    ]
    return draw_norm_lines(results.sites, lines, style)


def draw_bars(results: Results, style: Style) -> Figure:
    """Draw bars near a Σ L0 of 50 and, site by site, near an L0 of 50, that both models reached."""
    return draw_bar_panels(
        bar_panels(results), MODELS, lambda style, i: style.theme.of(MODELS[i]), style
    )


def draw_densities(results: Results, style: Style) -> Figure:
    """Draw a panel per site: how many latents fire how often, of the SAEs nearest to L0 20."""
    with settings(style):
        figure, axes = panels(results.sites, style)
        for site, panel in axes.items():
            curves = []
            for family, line in zip(results.families, cycle(LINES), strict=False):
                for model in MODELS:
                    rows = [row for row in fresh_rows(results, model, family) if row.site == site]
                    head = nearest_to_wanted(rows)
                    if head is not None and head.density_histogram is not None:
                        colour = style.theme.of(model)
                        curves.append(DensityCurve(head.density_histogram, colour, line))
            draw_density_panel(panel, curves)
        figure.supxlabel("share of tokens on which a latent fires")
        figure.supylabel("share of latents")
        _add_legend(figure, results, style, starred=False, markers=False)
    return figure


def bar_panels(results: Results) -> list[BarPanel]:
    """All sites at once by family, then a panel of single sites a family."""
    compound = [(c.family, SUM_L0, c.near(BARS_AT)) for c in compare_compound(results)]
    found = [_bar_panel("all sites at once", compound)]
    for family in results.families:
        single = [
            (site_label(c.site), "L0", c.near(BARS_AT))
            for c in compare_sites(results)
            if c.family == family
        ]
        found.append(_bar_panel(f"one site at a time: {family}", single))
    return [panel for panel in found if panel.labels]


def _bar_panel(title: str, found: Sequence[tuple[str, str, PointComparison | None]]) -> BarPanel:
    shared = [(name, total, point) for name, total, point in found if point is not None]
    return BarPanel(
        title,
        [f"{name}\n{total} {l0_text(point.l0)}" for name, total, point in shared],
        [[getattr(point, model) for _, _, point in shared] for model in MODELS],
    )


def has_densities(results: Results) -> bool:
    """Whether any fresh head's histogram was kept."""
    return any(row.density_histogram is not None for row in results.rows)


def has_bars(results: Results) -> bool:
    """Whether the models share any L0."""
    return bool(bar_panels(results))


DRAWINGS: dict[str, Drawing] = {
    "compound": draw_compound,
    "bars": draw_bars,
    "sites": draw_sites,
    "densities": draw_densities,
    "ce": draw_ce,
    "norms": draw_norms,
}


def _draw_curves(
    axes: Axes,
    comparisons: Sequence[Comparison],
    stars: Sequence[tuple[float, float]],
    style: Style,
) -> None:
    for comparison, marker, line in zip(comparisons, cycle(MARKERS), cycle(LINES), strict=False):
        for model in MODELS:
            curve: Curve = getattr(comparison, model)
            axes.plot(
                [point.l0 for point in curve.points],
                [point.ce_increase for point in curve.points],
                color=style.theme.of(model),
                marker=marker,
                linestyle=line,
            )
    for l0, ce_increase in stars:
        if l0 > 0:
            axes.plot(l0, ce_increase, **_star(style))
    scale_l0_axis(axes, style)


def _has_cotrained(results: Results) -> bool:
    return any(row.source == COTRAINED for row in results.rows)


def _star(style: Style) -> dict[str, object]:
    return {
        "marker": "*",
        "markersize": 13,
        "markerfacecolor": "none",  # a fresh SAE may lie right behind it
        "markeredgecolor": style.theme.regularized,
        "markeredgewidth": 1.3,
        "linestyle": "none",
        "zorder": 5,
    }


def _add_legend(
    figure: Figure, results: Results, style: Style, *, starred: bool, markers: bool = True
) -> None:
    handles = model_handles(style) + [
        Line2D(
            [],
            [],
            color=style.theme.text,
            marker=marker if markers else "none",
            linestyle=line,
            label=family,
        )
        for family, marker, line in zip(
            results.families, cycle(MARKERS), cycle(LINES), strict=False
        )
    ]
    if starred:
        handles.append(Line2D([], [], label="co-trained", **_star(style)))
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=3 if style.phone else len(handles),  # on a phone: models, families, star
        handlelength=2.2 if style.phone else 2.6,
        columnspacing=1.2,
    )


def model_handles(style: Style) -> list[Line2D]:
    """Legend entries of both models."""
    return [
        Line2D([], [], color=style.theme.of(model), linewidth=4, label=model) for model in MODELS
    ]
