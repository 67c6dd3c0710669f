"""Curves through what sweeps found: variants of fresh SAEs, compared at equal L0 only.

What is notable:

- A variant is a family at a size. Its curve goes through the means over seeds at each sparsity, and
  nothing is extrapolated: models are compared inside the range that all of them reached.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from hf_saereg.report.convergence import Convergence, convergence, relative_movement
from hf_saereg.report.results import COTRAINED, FRESH
from hf_saereg.report.swept import ScoredModel, SweptHead, SweptSet
from hf_saereg.report.verdict import SAME_L0, Curve, CurvePoint, shared_range

POINTS_COMPARED = 5


class Variant(NamedTuple):
    """A family at a size."""

    family: str
    d_sae: float | str

    @property
    def size(self) -> str:
        """`d_sae` as text."""
        return self.d_sae if isinstance(self.d_sae, str) else f"{self.d_sae:g}"

    @property
    def label(self) -> str:
        """In words."""
        return f"{self.family}, d_sae {self.size}"


class AtEqualL0(NamedTuple):
    """One variant on all models at one L0.

    Attributes:
        variant: of the SAEs.
        l0: of all of them.
        ce_increase: mean over seeds, a model each; None on a model that lacks the variant.
        spread: largest minus smallest over seeds, a model each; None with one seed.
    """

    variant: Variant
    l0: float
    ce_increase: list[float | None]
    spread: list[float | None]


def variants(models: Iterable[ScoredModel]) -> list[Variant]:
    """All variants of the fresh SAEs, in the order in which they first occur."""
    found = (
        Variant(row.family, row.d_sae)
        for model in models
        for row in model.sets
        if row.source == FRESH
    )
    return list(dict.fromkeys(found))


def fresh(rows: Iterable[SweptHead | SweptSet], variant: Variant) -> list[SweptHead | SweptSet]:
    """The rows of fresh SAEs of one variant."""
    wanted = (variant.family, FRESH)
    return [row for row in rows if (row.family, row.source) == wanted and _fits(row, variant)]


def with_one_variant(model: ScoredModel, variant: Variant) -> ScoredModel:
    """A model with its own heads and the fresh SAEs of one variant alone.

    Args:
        model: with SAEs of any variants.
        variant: to keep.
    """
    return ScoredModel(
        model.label,
        model.sites,
        (*fresh(model.heads, variant), *cotrained(model.heads)),
        (*fresh(model.sets, variant), *cotrained(model.sets)),
    )


def cotrained(rows: Iterable[SweptHead | SweptSet]) -> list[SweptHead | SweptSet]:
    """The rows of a model's own heads."""
    return [row for row in rows if row.source == COTRAINED]


def at_site(model: ScoredModel, site: str) -> list[SweptHead]:
    """All SAEs on one site of a model."""
    return [row for row in model.heads if row.site == site]


def mean_curve(rows: Iterable[SweptHead | SweptSet]) -> Curve:
    """Through the means over seeds at each sparsity."""
    by_sparsity = defaultdict[float | str, list[CurvePoint]](list)
    for row in rows:
        by_sparsity[row.sparsity].append(_point(row))
    return Curve.through(
        CurvePoint(*(statistics.fmean(column) for column in zip(*points, strict=True)))
        for points in by_sparsity.values()
    )


def curves_by_seed(rows: Iterable[SweptHead | SweptSet]) -> list[Curve]:
    """One curve a seed."""
    by_seed = defaultdict[float | None, list[CurvePoint]](list)
    for row in rows:
        by_seed[row.seed].append(_point(row))
    return [Curve.through(points) for points in by_seed.values()]


def curve_of(rows: Iterable[SweptHead | SweptSet]) -> Curve:
    """Through every SAE, of one seed."""
    return Curve.through(map(_point, rows))


def compare(models: Sequence[ScoredModel], variant: Variant) -> list[AtEqualL0]:
    """All models that have a variant, all sites replaced, at L0s that all of its seeds reached.

    Args:
        models: of any runs.
        variant: of fresh SAEs.
    """
    every, shared = _shared_range([model.sets for model in models], variant)
    if shared is None:
        return []
    return [_at(every, variant, l0) for l0 in _spread_out(*shared)]


def nearest_shared(
    rows: Sequence[Sequence[SweptHead | SweptSet]], variant: Variant, l0: float
) -> AtEqualL0 | None:
    """The same at the L0 nearest to one that is wanted; None where the models share no L0.

    Args:
        rows: of each model.
        variant: of fresh SAEs.
        l0: wanted.
    """
    every, shared = _shared_range(rows, variant)
    if shared is None:
        return None
    low, high = shared
    return _at(every, variant, min(max(l0, low), high))


def _shared_range(
    rows: Sequence[Sequence[SweptHead | SweptSet]], variant: Variant
) -> tuple[list[list[Curve]], tuple[float, float] | None]:
    every = [curves_by_seed(fresh(own, variant)) for own in rows]
    return every, shared_range(curve for own in every for curve in own)


def _at(every: Sequence[Sequence[Curve]], variant: Variant, l0: float) -> AtEqualL0:
    values = [[curve.at(l0).ce_increase for curve in own] for own in every]
    means = [statistics.fmean(own) if own else None for own in values]
    spread = [max(own) - min(own) if len(own) > 1 else None for own in values]
    return AtEqualL0(variant, l0, means, spread)


def variant_convergence(model: ScoredModel, variant: Variant) -> Convergence | None:
    """How settled the fresh SAEs of one variant are; None where it was not measured."""
    rows = fresh(model.heads, variant), fresh(model.sets, variant)
    return convergence(model.label, variant.label, *rows)


def _spread_out(low: float, high: float) -> list[float]:
    """L0s evenly apart on a log scale; one where they would be all but equal."""
    if high <= low * (1 + SAME_L0):
        return [low]
    ratio = math.log(high / low) / (POINTS_COMPARED - 1)
    inner = [low * math.exp(i * ratio) for i in range(1, POINTS_COMPARED - 1)]
    return [low, *inner, high]


def _point(row: SweptHead | SweptSet) -> CurvePoint:
    moved = relative_movement(row.ce_increase_at_half, row.ce_increase)
    return CurvePoint(row.latents, row.ce_increase, moved)


def _fits(row: SweptHead | SweptSet, variant: Variant) -> bool:
    if isinstance(row, SweptHead) and isinstance(variant.d_sae, str):
        return f"{row.d_sae:g}" in variant.d_sae.split("-")  # a head has the size of its own site
    return row.d_sae == variant.d_sae
