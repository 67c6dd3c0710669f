"""Figures of the trainings of a comparison: norms over their steps, and their cost."""

from collections.abc import Callable
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hf_saereg.report.canvas import Style, panels, set_limits_from_zero, settings, site_label
from hf_saereg.report.figures import model_handles
from hf_saereg.report.results import MODELS, Pair, Results
from hf_saereg.report.training_files import Training


class Trainings(NamedTuple):
    """What the figures draw.

    Attributes:
        results: of the comparison.
        files: of both trainings.
    """

    results: Results
    files: Pair[Training]


def draw_training_norms(shown: Trainings, style: Style) -> Figure:
    """Draw a panel per site: norms over the steps, or, where none were logged, that of the end."""
    with settings(style):
        figure, axes = panels(shown.results.sites, style)
        for site, panel in axes.items():
            for model, training in zip(MODELS, shown.files, strict=True):
                colour = style.theme.of(model)
                if site in training.norms:
                    steps, norms = training.norms[site]
                    panel.plot(steps, norms, color=colour, marker="o" if len(steps) == 1 else "")
                else:
                    baseline = getattr(shown.results.baselines, model)
                    norm = baseline.residual_norm[site]
                    panel.axhline(norm, color=colour, linestyle=(0, (5, 2)))
            panel.set_title(site_label(site))
            set_limits_from_zero(panel)
            panel.xaxis.set_major_locator(MaxNLocator(3))
            panel.yaxis.set_major_locator(MaxNLocator(4))
        figure.supxlabel("training step")
        figure.supylabel("mean ‖x‖₂")
        figure.legend(handles=model_handles(style), loc="outside upper left", ncols=2)
    return figure


def draw_cost(shown: Trainings, style: Style) -> Figure:
    """Draw bars of tokens a second, and of FLOPs a token where the models' shapes are at hand."""
    speeds = [
        (model, result.tokens_per_second, style.theme.of(model))
        for model, result in zip(MODELS, shown.results.models, strict=True)
    ]
    charts = [("training speed, tokens a second", speeds, lambda value: f"{value:,.0f}")]
    plain, regularized = (training.flops for training in shown.files)
    if plain and regularized:
        colours = [style.theme.of(model) for model in MODELS]
        operations = [
            ("plain", plain.language / 1e6, colours[0]),
            ("sparse heads", (regularized.language + regularized.heads_sparse) / 1e6, colours[1]),
            ("dense heads", (regularized.language + regularized.heads_dense) / 1e6, colours[1]),
        ]
        charts.append(("million FLOPs a token", operations, lambda value: f"{value:.1f}"))
    with settings(style):
        height = 1.5 * len(charts) + 0.3 if style.phone else 2.1
        figure = Figure((style.width, height), layout="constrained")
        shape = (len(charts), 1) if style.phone else (1, len(charts))
        axes = figure.subplots(*shape, squeeze=False).flatten()
        for axis, (title, bars, text) in zip(axes, charts, strict=True):
            _draw_bars(axis, title, bars, text)
    return figure


def _draw_bars(
    axes: Axes, title: str, bars: list[tuple[str, float, str]], text: Callable[[float], str]
) -> None:
    labels, values, colours = zip(*bars, strict=True)
    axes.barh(range(len(bars)), values, height=0.68, color=colours)
    for place, value in enumerate(values):
        axes.annotate(
            text(value), (value, place), xytext=(4, 0), textcoords="offset points", va="center"
        )
    axes.set_yticks(range(len(bars)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(values))
    axes.set_title(title)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.grid(visible=False)  # the bars carry their values
    axes.spines["left"].set_visible(False)
