"""Panels of how often latents fire, a curve a head."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, TypeVar

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from hf_saereg.report.results import Histogram

WANTED_L0 = 20  # the histograms are of the SAEs nearest to it


class HasL0(Protocol):
    """A head that fires."""

    l0: float


H = TypeVar("H", bound=HasL0)


class DensityCurve(NamedTuple):
    """One head's histogram, and its look."""

    histogram: Histogram
    colour: str
    line: object


def nearest_to_wanted(heads: Iterable[H]) -> H | None:
    """The head whose L0 is nearest to 20, on a log scale; None where none fires."""
    firing = (head for head in heads if head.l0 > 0)
    return min(firing, key=lambda head: abs(math.log(head.l0 / WANTED_L0)), default=None)


def draw_density_panel(axes: Axes, curves: Sequence[DensityCurve]) -> None:
    """Shares of all latents, dead ones among them, over the share of tokens on which they fire."""
    for histogram, colour, line in curves:
        d_sae = sum(histogram.counts) + histogram.never
        axes.stairs(
            [count / d_sae for count in histogram.counts],
            histogram.log10_edges,
            color=colour,
            linestyle=line,
            linewidth=1.4,
            baseline=None,
        )
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: f"$10^{{{value:g}}}$")
    axes.yaxis.set_major_locator(MaxNLocator(4))
