"""The trade-off of a study: what each variant costs in CE against what it buys in fidelity.

Notable:
- a panel a family of fresh SAEs, at its stated Σ L0; nearer to the lower left is better
- bars are the 95 % intervals of the paired differences from the baseline, put at the baseline's
  mean; those of two seeds are long, and the panels show what the points need
- an untrained model is left out: its CE is so high that all others would stand on one line
"""

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from hf_saereg.report.canvas import MARKERS, Style, settings
from hf_saereg.report.findings import SUM_L0, l0_text
from hf_saereg.report.study_curves import MeasuredStudy
from hf_saereg.report.study_statistics import Interval, compound_change
from hf_saereg.report.study_verdict import UNTRAINED

MARGIN = 0.12  # of a panel, around its points
LABEL_WIDTH = 38  # characters of a legend's entry


class TradeOff(NamedTuple):
    """What is drawn.

    Attributes:
        study: measurements.
        settings: of `hf_saereg.study_settings`.
    """

    study: MeasuredStudy
    settings: Mapping[str, Mapping[str, Any]]

    @property
    def variants(self) -> list[str]:
        """Finished ones that were trained."""
        return [name for name in self.study.variants if self.settings[name]["control"] != UNTRAINED]

    def weights(self, variant: str) -> dict[str, float | None]:
        """By curve that a variant is a point of, its weight; None where it stands alone."""
        own = self.settings[variant]
        return {own["curve"]: own["weight"], **own["also"]}


class Place(NamedTuple):
    """One variant in one panel.

    Attributes:
        variant: its name.
        seeds: validation CE and compound CE increase of each.
        mean: of the CE, and the geometric one of the increase.
        across: ends of the CE's bar; None with one seed and of the baseline.
        upwards: ends of the increase's bar; None likewise.
    """

    variant: str
    seeds: list[tuple[float, float]]
    mean: tuple[float, float]
    across: tuple[float, float] | None
    upwards: tuple[float, float] | None


def drawn_families(shown: TradeOff) -> list[str]:
    """Fresh families with a variant beside the baseline that can be drawn."""
    return [fresh for fresh in shown.study.compound if len(places(shown, fresh)) > 1]


def places(shown: TradeOff, fresh: str) -> list[Place]:
    """Every variant whose seeds all reached the stated Σ L0 at a positive CE increase.

    Args:
        shown: what is drawn.
        fresh: family of the fresh SAEs.
    """
    study = shown.study
    l0, found = study.sum_l0[fresh], []
    for variant in shown.variants:
        curves = study.compound[fresh].get(variant, {})
        if l0 is None or not curves or not all(curve.reaches(l0) for curve in curves.values()):
            continue
        seeds = [(study.eval_ce[variant][s], c.at(l0).ce_increase) for s, c in curves.items()]
        if min(increase for _, increase in seeds) > 0:
            mean = (
                statistics.fmean(ce for ce, _ in seeds),
                statistics.geometric_mean(increase for _, increase in seeds),
            )
            found.append(Place(variant, seeds, mean, *_bars(study, variant, fresh)))
    return found


def draw_trade_off(shown: TradeOff, style: Style) -> Figure:
    """Draw a panel per fresh family, one colour and line per curve of weights."""
    families = drawn_families(shown)
    curves = list(dict.fromkeys(curve for name in shown.variants for curve in shown.weights(name)))
    # colours repeat after six, and then with other markers
    looks = {
        curve: (i, MARKERS[(i + i // len(MARKERS)) % len(MARKERS)])
        for i, curve in enumerate(curves)
    }
    columns = 1 if style.phone else min(2, len(families))
    lines = -(-len(families) // columns)
    entries = -(-len(curves) // (1 if style.phone else 2))
    height = lines * (2.5 if style.phone else 3.3) + 0.2 * entries + 0.5
    with settings(style):
        figure = Figure((style.width, height), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).flatten()
        for panel, fresh in zip(axes, families, strict=False):
            _draw_panel(panel, shown, fresh, looks, style)
            l0 = shown.study.sum_l0[fresh]
            panel.set_title(f"fresh {fresh} at {SUM_L0} {l0_text(l0)}")
        for unused in axes[len(families) :]:
            unused.set_axis_off()
        figure.supxlabel("validation CE, nats a token")
        figure.supylabel("compound CE increase, nats a token")
        handles = [
            Line2D([], [], color=style.theme.nth(i), marker=marker, label=_shortened(curve))
            for curve, (i, marker) in looks.items()
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=1 if style.phone else 2)
    return figure


def _draw_panel(
    panel: Axes,
    shown: TradeOff,
    fresh: str,
    looks: Mapping[str, tuple[int, str]],
    style: Style,
) -> None:
    found = places(shown, fresh)
    for curve, (i, marker) in looks.items():
        weights = {place.variant: shown.weights(place.variant) for place in found}
        own = [place for place in found if curve in weights[place.variant]]
        own.sort(key=lambda place: weights[place.variant][curve] or 0)
        colour = style.theme.nth(i)
        means = [place.mean for place in own]
        if means:
            panel.plot(*zip(*means, strict=True), color=colour, marker=marker, zorder=3)
        for place in own:
            if len(place.seeds) > 1:
                panel.plot(
                    *zip(*place.seeds, strict=True),
                    color=colour,
                    marker=marker,
                    markersize=2.5,
                    alpha=0.55,
                    linestyle="none",
                )
            look = {"color": colour, "linewidth": 0.8, "alpha": 0.6}
            if place.across:
                panel.plot(place.across, (place.mean[1],) * 2, **look)
            if place.upwards:
                panel.plot((place.mean[0],) * 2, place.upwards, **look)
            weight = weights[place.variant][curve]
            if weight is not None:
                panel.annotate(
                    f"{weight:g}", place.mean, (4, 3), textcoords="offset points", color=colour
                )
    panel.set_yscale("log")
    panel.set_xlim(*_around(ce for place in found for ce, _ in (*place.seeds, place.mean)))
    logs = _around(math.log(y) for place in found for _, y in (*place.seeds, place.mean))
    panel.set_ylim(*map(math.exp, logs))
    panel.xaxis.set_major_locator(MaxNLocator(4))
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())


def _bars(
    study: MeasuredStudy, variant: str, fresh: str
) -> tuple[tuple[float, float] | None, tuple[float, float] | None]:
    if variant == study.baseline or len(study.seeds(variant)) < 2:
        return None, None
    seeds = study.seeds(variant)
    first = statistics.fmean(study.eval_ce[study.baseline][seed] for seed in seeds)
    rise = Interval.of(study.ce_rise(variant))
    ratio = compound_change(study, variant, fresh).log_ratio
    if ratio is None or ratio.low is None:
        return (first + rise.low, first + rise.high), None
    curves, l0 = study.compound[fresh][study.baseline], study.sum_l0[fresh]
    plain = statistics.geometric_mean(curves[seed].at(l0).ce_increase for seed in ratio.seeds)
    ends = (plain * math.exp(ratio.low), plain * math.exp(ratio.high))
    return (first + rise.low, first + rise.high), ends


def _around(values: Iterable[float]) -> tuple[float, float]:
    values = list(values)
    low, high = min(values), max(values)
    margin = MARGIN * (high - low) or MARGIN * abs(high) or MARGIN
    return low - margin, high + margin


def _shortened(label: str) -> str:
    return label if len(label) <= LABEL_WIDTH else f"{label[: LABEL_WIDTH - 1]}…"
