"""A study's variants against its baseline, paired by seed: differences with their intervals.

Notable:
- intervals are Student's t over the seeds' paired differences; one seed has none, and none is made
  up for it
- a CE increase is compared as ln(variant / baseline) at equal Σ L0, so that halving and doubling
  are the same distance from no change
- nothing here is corrected for looking at many variants at once
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from hf_saereg.report.study_curves import MeasuredStudy, at_equal_l0
from hf_saereg.report.verdict import Comparison, Outcome

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over seeds, and where the mean of many seeds is expected.

    Attributes:
        mean: over the seeds.
        low: lower end of the 95 % interval; None with one seed.
        high: upper end; None with one seed.
        seeds: which.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: tuple[int, ...]

    @classmethod
    def of(cls, values: Mapping[int, float]) -> "Interval":
        """Student's t interval: mean ± t(0.975, n − 1) s / √n.

        Args:
            values: paired differences by seed.

        Raises:
            ValueError: if there are none.
            ImportError: if scipy is not installed.
        """
        from scipy.stats import t

        mean, n = statistics.fmean(values.values()), len(values)
        if n < 2:
            return cls(mean, None, None, tuple(values))
        half = t.ppf((1 + CONFIDENCE) / 2, n - 1) * statistics.stdev(values.values()) / math.sqrt(n)
        return cls(mean, float(mean - half), float(mean + half), tuple(values))

    @property
    def is_above_zero(self) -> bool:
        """Whether all of the interval is; never with one seed."""
        return self.low is not None and self.low > 0


@dataclass(frozen=True)
class CompoundChange:
    """How one family of fresh SAEs fares on a variant, all sites replaced.

    Attributes:
        sum_l0: that both are read at; None where they share none.
        log_ratio: of ln(variant / baseline); None where it cannot be had.
        reason: why not; empty where it is there.
    """

    sum_l0: float | None
    log_ratio: Interval | None
    reason: str


@dataclass(frozen=True)
class AgainstBaseline:
    """One variant against the baseline.

    Attributes:
        variant: its name.
        eval_ce: difference of the validation CE, in nats a token.
        compound: by family of fresh SAEs.
    """

    variant: str
    eval_ce: Interval
    compound: dict[str, CompoundChange]


@dataclass(frozen=True)
class SiteChange:
    """One family of fresh SAEs at one site of a variant.

    Attributes:
        variant: its name.
        fresh: family of the SAEs.
        site: hook name.
        outcomes: by seed, over the whole L0 range that both reached.
        l0: that both are read at; None where they share none.
        log_ratio: of ln(variant / baseline) there; None where it cannot be had.
    """

    variant: str
    fresh: str
    site: str
    outcomes: dict[int, Outcome]
    l0: float | None
    log_ratio: Interval | None


def against_baseline(study: MeasuredStudy) -> list[AgainstBaseline]:
    """Every other variant, each fresh family at the Σ L0 nearest to the stated one."""
    return [
        AgainstBaseline(
            variant,
            Interval.of(study.ce_rise(variant)),
            {fresh: compound_change(study, variant, fresh) for fresh in study.compound},
        )
        for variant in study.variants
        if variant != study.baseline
    ]


def compound_change(study: MeasuredStudy, variant: str, fresh: str) -> CompoundChange:
    """One variant and family of fresh SAEs, all sites replaced."""
    curves = study.compound[fresh]
    found = at_equal_l0(
        curves.get(variant, {}), curves.get(study.baseline, {}), study.sum_l0[fresh]
    )
    interval = Interval.of(found.log_ratios) if found.log_ratios else None
    return CompoundChange(found.l0, interval, found.reason)


def site_changes(study: MeasuredStudy) -> list[SiteChange]:
    """Every other variant, fresh family and site, by the rules of `verdict`."""
    return [
        _site_change(study, variant, fresh, site)
        for variant in study.variants
        if variant != study.baseline
        for fresh, sites in study.sites.items()
        for site, curves in sites.items()
        if variant in curves and study.baseline in curves
    ]


def _site_change(study: MeasuredStudy, variant: str, fresh: str, site: str) -> SiteChange:
    curves = study.sites[fresh][site]
    ours, first = curves[variant], curves[study.baseline]
    outcomes = {
        seed: Comparison(fresh, site, first[seed], ours[seed]).outcome
        for seed in ours
        if seed in first
    }
    total = study.sum_l0[fresh]
    found = at_equal_l0(ours, first, None if total is None else total / len(study.sites[fresh]))
    interval = Interval.of(found.log_ratios) if found.log_ratios else None
    return SiteChange(variant, fresh, site, outcomes, found.l0, interval)
