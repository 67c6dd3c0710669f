"""A study's variants side by side, each at all of its seeds: CE, norms, and the curves of its SAEs.

Notable:
- the curves are those of `swept_figures`, a variant a model, a figure a family of fresh SAEs: the
  dearest family would set the scale of the others
- CE is drawn as points, not bars: what tells variants apart is small beside its distance from zero
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from hf_saereg.report.canvas import Style, settings
from hf_saereg.report.events import Drawn
from hf_saereg.report.layout import Caption
from hf_saereg.report.norms import NormLine, draw_norm_lines
from hf_saereg.report.swept import ScoredModel
from hf_saereg.report.swept_curves import fresh, variants, with_one_variant
from hf_saereg.report.swept_figures import DRAWINGS, bar_panels
from hf_saereg.report.swept_page import captions


class VariantNorms(NamedTuple):
    """What the figure of norms draws.

    Attributes:
        sites: hook names.
        norms: mean ‖x‖₂ a site, by variant.
    """

    sites: Sequence[str]
    norms: Mapping[str, Sequence[float]]


def sae_figures(models: Sequence[ScoredModel]) -> tuple[dict[str, Drawn], dict[str, Caption]]:
    """Curves, bars and densities of the fresh SAEs by name, and their words.

    Fresh SAEs that one of several variants alone has are in the tables only.

    Args:
        models: variants that are drawn.
    """
    figures, words = {}, {}
    for variant in variants(models):
        if sum(bool(fresh(model.sets, variant)) for model in models) < min(2, len(models)):
            continue
        own = [with_one_variant(model, variant) for model in models]
        said = captions(own)
        for name, draw in DRAWINGS.items():
            if name == "bars":
                continue
            key = f"{name}_{variant.family}_{variant.size}"
            figures[key] = Drawn(draw, own)
            words[key] = said[name]._replace(title=f"{said[name].title}: fresh {variant.label}")
    if bar_panels(models):
        figures["bars"] = Drawn(DRAWINGS["bars"], models)
        words["bars"] = captions(models)["bars"]
    return figures, words


def draw_ce(eval_ce: Mapping[str, Mapping[int, float]], style: Style) -> Figure:
    """Draw a line a variant: validation CE of each seed, and their mean."""
    places = range(len(eval_ce))
    with settings(style):
        figure = Figure((style.width, 0.24 * len(eval_ce) + 0.8), layout="constrained")
        axes = figure.subplots()
        for place, by_seed in zip(places, eval_ce.values(), strict=True):
            mean = statistics.fmean(by_seed.values())
            axes.plot(mean, place, color=style.theme.text, marker="|", markersize=10)
            axes.plot(
                list(by_seed.values()),
                [place] * len(by_seed),
                color=style.theme.plain,
                marker="o",
                linestyle="none",
                alpha=0.7,
            )
            axes.annotate(
                f"{mean:.3f}", (mean, place), (0, 5), textcoords="offset points", ha="center",
                fontsize=7,
            )  # fmt: skip
        axes.set_yticks(places, list(eval_ce))
        axes.set_ylim(len(eval_ce) - 0.4, -0.8)
        axes.margins(x=0.08)
        axes.set_xlabel("validation CE, nats a token")
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
    return figure


def draw_norms(shown: VariantNorms, style: Style) -> Figure:
    """Draw the mean norm of the residual stream at each site, means over seeds."""
    lines = [
        NormLine(name, style.theme.nth(i), own) for i, (name, own) in enumerate(shown.norms.items())
    ]
    return draw_norm_lines(shown.sites, lines, style)
