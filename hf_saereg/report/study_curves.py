"""What a study's cells measured, as curves L0 → CE increase, and the Σ L0 to compare them at.

Notable:
- seeds that the baseline lacks are left out: everything is paired
- curves are those of `verdict`: linear in log L0, never extrapolated
- a family of fresh SAEs has one stated Σ L0: what the co-trained heads have, or the nearest to it
  that as many curves as possible reached, the baseline's all among them
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hf_saereg.report.convergence import Convergence
from hf_saereg.report.study_models import Cell, MeasuredCell, read_cells, variant_models
from hf_saereg.report.swept import ScoredModel, SweptHead, SweptSet
from hf_saereg.report.swept_curves import (
    Variant,
    cotrained,
    curve_of,
    fresh,
    variant_convergence,
    variants,
)
from hf_saereg.report.verdict import Curve, shared_range

BySeed = dict[int, Curve]


@dataclass(frozen=True)
class MeasuredStudy:
    """Curves of all finished cells whose seed the baseline has.

    Attributes:
        baseline: the variant that the others are compared with.
        eval_ce: validation CE by variant and seed, in nats a token.
        train_seconds: of the model's training, by variant and seed.
        models: a variant each, with the SAEs of all its seeds.
        compound: curves over Σ L0 by fresh family, variant and seed.
        sites: curves over L0 by fresh family, site, variant and seed.
        convergence: how settled each variant's fresh SAEs are, family by family.
        sum_l0: by fresh family, the Σ L0 that is compared at; None where the baseline's seeds share
            none.
    """

    baseline: str
    eval_ce: dict[str, dict[int, float]]
    train_seconds: dict[str, dict[int, float]]
    models: list[ScoredModel]
    compound: dict[str, dict[str, BySeed]]
    sites: dict[str, dict[str, dict[str, BySeed]]]
    convergence: list[Convergence]
    sum_l0: dict[str, float | None]

    @classmethod
    def of(cls, cells: Iterable[Cell], baseline: str) -> "MeasuredStudy":
        """Read finished cells.

        Args:
            cells: contents of `cell.json` files.
            baseline: name of the first variant.

        Raises:
            ReportError: if one lacks a key, or holds what it must not, such as a NaN.
        """
        read = read_cells(cells)
        seeds = {cell.seed for cell in read if cell.variant == baseline}
        read = [cell for cell in read if cell.seed in seeds]
        models = variant_models(read)
        eval_ce: dict[str, dict[int, float]] = {}
        train_seconds: dict[str, dict[int, float]] = {}
        for cell in read:
            eval_ce.setdefault(cell.variant, {})[cell.seed] = cell.figures.eval_ce
            train_seconds.setdefault(cell.variant, {})[cell.seed] = cell.figures.train_seconds
        compound: dict[str, dict[str, BySeed]] = {}
        sites: dict[str, dict[str, dict[str, BySeed]]] = {}
        settling: list[Convergence] = []
        for label, own in _labelled(variants(models)).items():
            compound[label] = _by_variant_and_seed(read, own)
            for site in dict.fromkeys(site for model in models for site in model.sites):
                sites.setdefault(label, {})[site] = _by_variant_and_seed(read, own, site)
            found = (variant_convergence(model, own) for model in models)
            settling += [each._replace(family=label) for each in found if each is not None]
        wanted = _trained_sum_l0(models)
        sum_l0 = {label: stated_l0(own, baseline, wanted) for label, own in compound.items()}
        return cls(baseline, eval_ce, train_seconds, models, compound, sites, settling, sum_l0)

    @property
    def variants(self) -> list[str]:
        """Those with a finished cell, the baseline among them."""
        return list(self.eval_ce)

    def seeds(self, variant: str) -> list[int]:
        """Seeds of a variant that the baseline has too; none of one that is not finished."""
        return list(self.eval_ce.get(variant, ()))

    def ce_rise(self, variant: str) -> dict[int, float]:
        """Validation CE minus the baseline's, by seed."""
        first = self.eval_ce[self.baseline]
        return {seed: ce - first[seed] for seed, ce in self.eval_ce.get(variant, {}).items()}

    def time_ratio(self, variant: str, other: str) -> float | None:
        """Training time of a variant over another's, mean of their common seeds; None without."""
        ours, theirs = self.train_seconds[variant], self.train_seconds[other]
        ratios = [ours[seed] / theirs[seed] for seed in ours if theirs.get(seed)]
        return statistics.fmean(ratios) if ratios else None


@dataclass(frozen=True)
class EqualL0:
    """A variant against the baseline at one L0.

    Attributes:
        l0: the L0 that both are read at, in every seed; None where there is no such place.
        log_ratios: ln(variant / baseline) of the CE increase, by seed; empty where there is none.
        reason: why there is none; empty where there is one.
    """

    l0: float | None
    log_ratios: dict[int, float]
    reason: str = ""


def at_equal_l0(ours: BySeed, baseline: BySeed, wanted: float | None) -> EqualL0:
    """Compare seed by seed at the L0 nearest to the wanted one that both reached in every seed.

    Args:
        ours: of a variant.
        baseline: of the baseline.
        wanted: None takes the middle of what both reached, on a log scale.
    """
    pairs = {seed: (ours[seed], baseline[seed]) for seed in ours if seed in baseline}
    if not pairs:
        return EqualL0(None, {}, "not run")
    shared = shared_range(curve for pair in pairs.values() for curve in pair)
    if shared is None:
        return EqualL0(None, {}, "no L0 that both reached")
    low, high = shared
    l0 = min(max(math.sqrt(low * high) if wanted is None else wanted, low), high)
    values = {
        seed: tuple(curve.at(l0).ce_increase for curve in pair) for seed, pair in pairs.items()
    }
    if min(min(pair) for pair in values.values()) <= 0:
        return EqualL0(l0, {}, "a CE increase that is not positive has no ratio")
    return EqualL0(l0, {seed: math.log(own / plain) for seed, (own, plain) in values.items()})


def stated_l0(
    curves: Mapping[str, BySeed], baseline: str, wanted: float | None = None
) -> float | None:
    """The L0 at which most curves can be read, the baseline's all among them.

    Args:
        curves: by variant and seed.
        baseline: name of the first variant.
        wanted: where several L0s are read on as many curves, the nearest to it on a log scale is
            taken; None stands for the middle of the baseline's range.

    Returns:
        It, or None where the baseline has no curve or its seeds share no L0.
    """
    first = list(curves.get(baseline, {}).values())
    shared = shared_range(first)
    if shared is None:
        return None
    nearest = math.sqrt(shared[0] * shared[1]) if wanted is None else wanted
    every = [curve for own in curves.values() for curve in own.values() if curve.points]
    # how many curves reach an L0 changes at their ends only
    places = {nearest, *(end.l0 for curve in every for end in (curve.points[0], curve.points[-1]))}
    return max(
        (l0 for l0 in places if all(curve.reaches(l0) for curve in first)),
        key=lambda l0: (sum(c.reaches(l0) for c in every), -abs(math.log(l0 / nearest)), l0),
    )


def _trained_sum_l0(models: Sequence[ScoredModel]) -> float | None:
    """Median Σ L0 of the co-trained heads, at which the models were regularized."""
    sets = (row for model in models for row in cotrained(model.sets))
    found = [row.sum_l0 for row in sets if row.sum_l0 > 0]
    return statistics.median(found) if found else None


def _labelled(found: Sequence[Variant]) -> dict[str, Variant]:
    """Fresh SAEs by name: their family, with the size where it comes in several."""
    families = [own.family for own in found]
    return {own.family if families.count(own.family) == 1 else own.label: own for own in found}


def _by_variant_and_seed(
    cells: Sequence[MeasuredCell], fresh_saes: Variant, site: str | None = None
) -> dict[str, BySeed]:
    curves: dict[str, BySeed] = {}
    for cell in cells:
        rows: Iterable[SweptHead | SweptSet] = cell.scores.compound
        if site is not None:
            rows = [row for row in cell.scores.rows if row.site == site]
        if own := fresh(rows, fresh_saes):
            curves.setdefault(cell.variant, {})[cell.seed] = curve_of(own)
    return curves
