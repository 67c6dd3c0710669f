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

from hf_saereg.report.canvas import (
    LINES,
    MARKERS,
    Style,
    scale_l0_axis,
    set_limits_from_zero,
    settings,
    site_label,
)
from hf_saereg.report.results import COTRAINED, MODELS, Results
from hf_saereg.report.verdict import Comparison, Curve, compare_compound, compare_sites

Drawing = Callable[[Results, Style], Figure]


def draw_sites(results: Results, style: Style) -> Figure:
    """Draw a panel per site: L0 against CE increase, each site replaced alone."""
    n_sites = len(results.sites)
    columns = min(n_sites, 2 if style.phone else 3 if n_sites <= 6 else 4)
    rows = -(-n_sites // columns)
    height = rows * (1.75 if style.phone else 2.15) + 0.9
    with settings(style):
        figure = Figure((style.width, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for panel, site in zip(axes, results.sites, strict=False):
            compared = [c for c in compare_sites(results) if c.site == site]
            stars = [
                (row.l0, row.ce_increase)
                for row in results.rows
                if row.source == COTRAINED and row.site == site
            ]
            _draw_curves(panel, compared, stars, style)
            panel.set_title(site_label(site))
        for unused in axes[n_sites:]:
            unused.set_axis_off()
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
    positions = range(len(results.sites))
    with settings(style):
        figure = Figure((style.width, 3.1 if style.phone else 3.3), layout="constrained")
        axes = figure.subplots()
        for model, baseline in zip(MODELS, results.baselines, strict=True):
            norms = [baseline.residual_norm[site] for site in results.sites]
            colour = style.theme.of(model)
            axes.plot(positions, norms, color=colour, marker=".", markersize=9, label=model)
        labels = [site_label(site) for site in results.sites]
        if style.phone or len(labels) > 8:
            axes.set_xticks(positions, labels, rotation=40, ha="right", rotation_mode="anchor")
        else:
            axes.set_xticks(positions, labels)
        axes.set_ylabel("mean ‖x‖₂")
        set_limits_from_zero(axes)
        axes.grid(visible=False, axis="x")
        figure.legend(handles=_models(style), loc="outside upper left", ncols=2)
    return figure


DRAWINGS: dict[str, Drawing] = {
    "compound": draw_compound,
    "sites": draw_sites,
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


def _add_legend(figure: Figure, results: Results, style: Style, *, starred: bool) -> None:
    handles = _models(style) + [
        Line2D([], [], color=style.theme.text, marker=marker, linestyle=line, label=family)
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


def _models(style: Style) -> list[Line2D]:
    return [
        Line2D([], [], color=style.theme.of(model), linewidth=4, label=model) for model in MODELS
    ]
