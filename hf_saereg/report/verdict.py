"""Which model's activations SAEs replace at less cost, judged at equal L0 only.

    results -> a curve L0 -> CE increase per model -> points in the shared range -> win | loss | …

What is notable:

- A curve is linear in log L0 between its measured points: nothing is smoothed or made monotone,
  and nothing is ever extrapolated. Points at the same L0 are averaged; a dead SAE (L0 0) has no
  place on a log scale and is left out.
- The points compared are the measured L0s of either model inside the range that both reached.
- The tie band is how far the CE increase still moved over the second half of the fresh SAEs'
  training, relative, the larger of the two models' and at least 2 %. It bounds what longer training
  might change; it is no error bar over seeds.
- `win` and `loss` need every point outside the band on the same side, `tie` needs every point
  inside it, anything else is `mixed`.
"""

import math
import statistics
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

from hf_saereg.report.convergence import (
    SMALLEST_CE_INCREASE,
    Convergence,
    convergence,
    relative_movement,
)
from hf_saereg.report.results import FRESH, MODELS, CompoundResult, Results, SAEResult

TIE_BAND = 0.02  # the least relative difference that counts
SAME_L0 = 0.02  # points closer than this, relative, are one


class Outcome(StrEnum):
    """How the regularized model fares against the plain one."""

    WIN = "win"
    LOSS = "loss"
    TIE = "tie"
    MIXED = "mixed"
    NOT_COMPARABLE = "not comparable"


class CurvePoint(NamedTuple):
    """One place on a curve.

    Attributes:
        l0: active latents a token (summed over sites for a compound curve).
        ce_increase: in nats a token.
        movement: relative change of the CE increase over the second half of training.
    """

    l0: float
    ce_increase: float
    movement: float


class PointComparison(NamedTuple):
    """Both models at one L0.

    Attributes:
        l0: the L0 that both are read at.
        plain: CE increase of the plain model.
        regularized: CE increase of the regularized model.
        band: difference, in nats, up to which the two count as equal.
    """

    l0: float
    plain: float
    regularized: float
    band: float

    @property
    def outcome(self) -> Outcome:
        """`WIN`, `LOSS` or `TIE` of the regularized model at this L0."""
        if abs(self.regularized - self.plain) <= self.band:
            return Outcome.TIE
        return Outcome.WIN if self.regularized < self.plain else Outcome.LOSS

    @property
    def ratio(self) -> float | None:
        """Regularized over plain; None where a CE increase is not positive."""
        if min(self.plain, self.regularized) <= 0:
            return None
        return self.regularized / self.plain


@dataclass(frozen=True)
class Curve:
    """L0 → CE increase of one model, one family and one site (or all), by rising L0."""

    points: tuple[CurvePoint, ...]

    @classmethod
    def through(cls, points: Iterable[CurvePoint]) -> "Curve":
        """Sort the points, average those at the same L0, leave out those at L0 0."""
        by_l0 = defaultdict[float, list[CurvePoint]](list)
        for point in points:
            if point.l0 > 0:
                by_l0[point.l0].append(point)
        return cls(
            tuple(
                CurvePoint(*(statistics.fmean(column) for column in zip(*same, strict=True)))
                for _, same in sorted(by_l0.items())
            )
        )

    def reaches(self, l0: float) -> bool:
        """Return whether an L0 lies in the measured range, or next to an end of it."""
        if not self.points:
            return False
        low, high = self.points[0].l0, self.points[-1].l0
        return low <= l0 * (1 + SAME_L0) and l0 <= high * (1 + SAME_L0)

    def at(self, l0: float) -> CurvePoint:
        """Return the curve at an L0, linear in log L0 between the measured points.

        Raises:
            ValueError: outside the measured range; a curve is never extrapolated.
        """
        if not self.reaches(l0):
            raise ValueError(f"L0 {l0} lies outside what was measured.")
        l0 = min(max(l0, self.points[0].l0), self.points[-1].l0)
        right_index = bisect_left([point.l0 for point in self.points], l0)
        right = self.points[right_index]
        if right.l0 == l0:
            return right
        left = self.points[right_index - 1]
        share = math.log(l0 / left.l0) / math.log(right.l0 / left.l0)
        return CurvePoint(
            l0,
            left.ce_increase + share * (right.ce_increase - left.ce_increase),
            left.movement + share * (right.movement - left.movement),
        )


def shared_range(curves: Iterable[Curve]) -> tuple[float, float] | None:
    """Lowest and highest L0 that all curves reached; None if there is none."""
    curves = list(curves)
    if not curves or not all(curve.points for curve in curves):
        return None
    low = max(curve.points[0].l0 for curve in curves)
    high = min(curve.points[-1].l0 for curve in curves)
    if low > high * (1 + SAME_L0):
        return None
    return low, max(low, high)


@dataclass(frozen=True)
class Comparison:
    """One family at one site, or (`site` is None) at all sites at once."""

    family: str
    site: str | None
    plain: Curve
    regularized: Curve

    @property
    def overlap(self) -> tuple[float, float] | None:
        """Lowest and highest L0 that both models reached; None if there is none."""
        return shared_range((self.plain, self.regularized))

    @cached_property
    def points(self) -> tuple[PointComparison, ...]:
        """Both models at the measured L0s of either that lie in the overlap."""
        if self.overlap is None:
            return ()
        low, high = self.overlap
        measured = {point.l0 for point in self.plain.points + self.regularized.points}
        grid: list[float] = []
        for l0 in sorted(l0 for l0 in measured if low <= l0 <= high):
            if not grid or l0 > grid[-1] * (1 + SAME_L0):
                grid.append(l0)
        return tuple(self._compare(l0) for l0 in grid)

    @property
    def outcome(self) -> Outcome:
        """The verdict over all points."""
        outcomes = {point.outcome for point in self.points}
        if not outcomes:
            return Outcome.NOT_COMPARABLE
        return outcomes.pop() if len(outcomes) == 1 else Outcome.MIXED

    def near(self, l0: float | None) -> PointComparison | None:
        """Compare at the L0 of the overlap that is nearest to the one given.

        Args:
            l0: the L0 of interest; None takes the middle of the overlap, on a log scale.

        Returns:
            Both models there, or None without an overlap.
        """
        if self.overlap is None:
            return None
        low, high = self.overlap
        wanted = math.sqrt(low * high) if l0 is None else l0
        return self._compare(min(max(wanted, low), high))

    def _compare(self, l0: float) -> PointComparison:
        plain, regularized = self.plain.at(l0), self.regularized.at(l0)
        relative = max(TIE_BAND, plain.movement, regularized.movement)
        size = max(plain.ce_increase, regularized.ce_increase, SMALLEST_CE_INCREASE)
        return PointComparison(l0, plain.ce_increase, regularized.ce_increase, relative * size)


def site_curve(results: Results, model: str, family: str, site: str) -> Curve:
    """Return the curve of one family of fresh SAEs at one site of one model."""
    return _curve(row for row in fresh_rows(results, model, family) if row.site == site)


def compound_curve(results: Results, model: str, family: str) -> Curve:
    """Return the curve of one family of fresh SAEs at all sites of one model at once."""
    return _curve(_fresh_compound(results, model, family))


def compare_sites(results: Results) -> list[Comparison]:
    """Compare the models at each site with each family of fresh SAEs, family by family."""
    return [
        Comparison(family, site, *(site_curve(results, model, family, site) for model in MODELS))
        for family in results.families
        for site in results.sites
    ]


def compare_compound(results: Results) -> list[Comparison]:
    """Compare the models with all sites replaced at once, by family, over the sum of L0."""
    return [
        Comparison(family, None, *(compound_curve(results, model, family) for model in MODELS))
        for family in results.families
    ]


def measure_convergence(results: Results) -> list[Convergence]:
    """Measure how settled the fresh SAEs are, for each model and family that has any."""
    found = (
        convergence(
            model,
            family,
            fresh_rows(results, model, family),
            _fresh_compound(results, model, family),
        )
        for family in results.families
        for model in MODELS
    )
    return [own for own in found if own is not None]


def fresh_rows(results: Results, model: str, family: str) -> list[SAEResult]:
    """Return the fresh SAEs of one family on one model, all sites."""
    wanted = (model, family, FRESH)
    return [row for row in results.rows if (row.model, row.family, row.source) == wanted]


def _fresh_compound(results: Results, model: str, family: str) -> list[CompoundResult]:
    wanted = (model, family, FRESH)
    return [row for row in results.compound if (row.model, row.family, row.source) == wanted]


def _curve(rows: Iterable[SAEResult | CompoundResult]) -> Curve:
    return Curve.through(
        CurvePoint(
            row.l0 if isinstance(row, SAEResult) else row.sum_l0,
            row.ce_increase,
            relative_movement(row.ce_increase_at_half, row.ce_increase),
        )
        for row in rows
    )
