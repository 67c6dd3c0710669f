"""The figures of the report, each a function from results and a style to a matplotlib `Figure`.

What is notable:

- One colour per model in every figure (blue plain, orange regularized: the Okabe-Ito pair that
  colour-blind readers tell apart), one marker and line style per family, a star for co-trained.
- A figure is drawn for a theme (light, dark) and a width (page, phone), so that text keeps its size
  on a phone and its contrast at night; the page picks among the renderings without script.
- Only the object API is used: no pyplot, no figure left open, no change to anyone's settings.
- Rendered SVG is the same for the same numbers: no date, no random identifiers.
"""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from hf_saereg.report.results import COTRAINED, MODELS, Results
from hf_saereg.report.verdict import Comparison, Curve, compare_compound, compare_sites

MARKERS = ("o", "s", "^", "D", "v", "P")
LINES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
PNG_DPI = 160


@dataclass(frozen=True)
class Theme:
    """Colours of one appearance."""

    text: str
    faint: str
    background: str  # of PNG files; what is inlined into the page is transparent
    plain: str
    regularized: str

    def of(self, model: str) -> str:
        """Return the colour of a model."""
        return self.plain if model == "plain" else self.regularized


LIGHT = Theme(
    text="#33383f", faint="#d9dce0", background="#ffffff", plain="#0072b2", regularized="#c85200"
)
DARK = Theme(
    text="#c9ced6", faint="#3a4049", background="#14171c", plain="#56b4e9", regularized="#f5a03c"
)


@dataclass(frozen=True)
class Style:
    """What a figure is drawn for."""

    theme: Theme = LIGHT
    phone: bool = False

    @property
    def width(self) -> float:
        """Inches; 96 of the page's pixels are one."""
        return 3.5 if self.phone else 8.6


Drawing = Callable[[Results, Style], Figure]


def site_label(site: str) -> str:
    """Return a hook name in plain words, e.g. `before block 0`; other names stay as they are."""
    match = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", site)
    if match is None:
        return site
    return f"{'before' if match[2] == 'pre' else 'after'} block {match[1]}"


def draw_sites(results: Results, style: Style) -> Figure:
    """Draw a panel per site: L0 against CE increase, each site replaced alone."""
    n_sites = len(results.sites)
    columns = min(n_sites, 2 if style.phone else 3 if n_sites <= 6 else 4)
    rows = -(-n_sites // columns)
    height = rows * (1.75 if style.phone else 2.15) + 0.9
    with _settings(style):
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
    with _settings(style):
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
    with _settings(style):
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
    with _settings(style):
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
        _set_limits_from_zero(axes)
        axes.grid(visible=False, axis="x")
        figure.legend(handles=_models(style), loc="outside upper left", ncols=2)
    return figure


DRAWINGS: dict[str, Drawing] = {
    "compound": draw_compound,
    "sites": draw_sites,
    "ce": draw_ce,
    "norms": draw_norms,
}


def render(draw: Drawing, results: Results, style: Style, image_format: str) -> bytes:
    """Draw a figure and return the bytes of its file.

    Args:
        draw: one of `DRAWINGS`.
        results: what to draw.
        style: theme and width.
        image_format: `svg` (transparent, for the page) or `png` (opaque, for everywhere else).
    """
    buffer = io.BytesIO()
    figure = draw(results, style)
    with _settings(style):
        if image_format == "svg":
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        else:
            figure.savefig(buffer, format=image_format, dpi=PNG_DPI)
    return buffer.getvalue()


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
    axes.set_xscale("log")
    _set_limits_from_zero(axes)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if _spans_little(axes) else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(MaxNLocator(4 if style.phone else 5))


def _set_limits_from_zero(axes: Axes) -> None:
    heights = [height for line in axes.get_lines() for height in line.get_ydata()]
    low, high = min(heights, default=0), max(heights, default=0)
    if high > 0 or low < 0:
        axes.set_ylim(1.08 * min(low, 0), 1.08 * max(high, 0))


def _spans_little(axes: Axes) -> bool:
    low, high = axes.get_xlim()
    return high / max(low, 1e-9) < 100


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


@contextmanager
def _settings(style: Style) -> Iterator[None]:
    theme = style.theme
    size = 8.5 if style.phone else 9.5
    settings = {
        "font.family": "DejaVu Sans",  # comes with matplotlib: the same text width everywhere
        "font.size": size,
        "axes.titlesize": size,
        "axes.labelsize": size,
        "figure.labelsize": size,
        "xtick.labelsize": size - 0.5,
        "ytick.labelsize": size - 0.5,
        "legend.fontsize": size,
        "legend.frameon": False,
        "text.color": theme.text,
        "axes.labelcolor": theme.text,
        "axes.titlecolor": theme.text,
        "axes.titlelocation": "left",
        "axes.edgecolor": theme.text,
        "axes.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.faint,
        "grid.linewidth": 0.6,
        "xtick.color": theme.text,
        "ytick.color": theme.text,
        "lines.linewidth": 1.6,
        "lines.markersize": 4.5 if style.phone else 5,
        "figure.facecolor": theme.background,
        "savefig.facecolor": "auto",
        "svg.fonttype": "path",
        "svg.hashsalt": "hf-saereg",
    }
    with matplotlib.rc_context(settings):
        yield
