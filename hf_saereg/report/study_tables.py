"""A study's other tables: regularizer × fresh family, costs, transplanted heads."""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_saereg.report.results import COTRAINED
from hf_saereg.report.study_curves import MeasuredStudy, at_equal_l0
from hf_saereg.report.study_models import Cell
from hf_saereg.report.study_statistics import SiteChange
from hf_saereg.report.verdict import Outcome

NOT_RUN, NOT_REACHED = "not run", "not reached"
NO_REGULARIZER = "none"


@dataclass(frozen=True)
class MatrixCell:
    """One family of fresh SAEs on one variant, all sites replaced.

    Attributes:
        regularizer: family of the variant's heads; `none` of a plain model.
        variant: its name; None where no variant has that regularizer.
        fresh: family of the SAEs.
        sum_l0: that the whole column is read at; None of a column that was not run.
        ce_increase: mean over seeds; None where it is missing.
        ratio: to the baseline, geometric mean over the shared seeds; None where it cannot be had.
        seeds: how many.
        missing: `not run` or `not reached` (the stated Σ L0); None where it is there.
    """

    regularizer: str
    variant: str | None
    fresh: str
    sum_l0: float | None
    ce_increase: float | None
    ratio: float | None
    seeds: int
    missing: str | None


@dataclass(frozen=True)
class Cost:
    """What a variant's training costs.

    Attributes:
        variant: its name.
        relative_time: of training, against the baseline; 0 of a model that was not trained.
        tokens_per_second: mean over seeds; None of a model that was not trained.
        flops_per_token: of training, counted; see `hf_saereg.study_settings`.
    """

    variant: str
    relative_time: float
    tokens_per_second: float | None
    flops_per_token: float


@dataclass(frozen=True)
class Transplanted:
    """A variant's co-trained heads, on their own model and on the baseline.

    Attributes:
        variant: its name.
        seeds: how many.
        sum_l0: on their own model and on the baseline, means over seeds.
        ce_increase: all sites replaced, on their own model and on the baseline, means over seeds.
    """

    variant: str
    seeds: int
    sum_l0: tuple[float, float]
    ce_increase: tuple[float, float]


def matrix(
    study: MeasuredStudy, settings: Mapping[str, Mapping[str, Any]], families: Sequence[str]
) -> list[MatrixCell]:
    """Regularizers down, fresh families across; what was not run is there and says so.

    Args:
        study: its measurements.
        settings: of `hf_saereg.study_settings`, of all variants.
        families: names of all families of heads.
    """
    rows: list[tuple[str, str | None]] = []
    for regularizer in (NO_REGULARIZER, *families):
        own = [name for name, setting in settings.items() if setting["family"] == regularizer]
        rows += [(regularizer, name) for name in own] or [(regularizer, None)]
    return [
        _matrix_cell(study, regularizer, variant, fresh)
        for regularizer, variant in rows
        for fresh in _columns(study, families)
    ]


def costs(
    cells: Sequence[Cell],
    rows: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Mapping[str, Any]],
) -> list[Cost]:
    """Training costs of the finished variants.

    Args:
        cells: contents of finished cells.
        rows: of `hf_saereg.study_table.table`.
        settings: of `hf_saereg.study_settings`.
    """
    found = []
    for row in rows:
        name = row["variant"]
        own = [c for c in cells if c["variant"] == name and c["seed"] in row["seeds"]]
        speeds = [cell["figures"]["tokens_per_second"] for cell in own]
        speed = None if None in speeds else statistics.fmean(speeds)
        flops = settings[name]["flops_per_token"]
        found.append(Cost(name, row["relative_time"], speed, flops))
    return found


def transplanted(cells: Sequence[Cell]) -> list[Transplanted]:
    """A line a variant whose co-trained heads were scored on the baseline."""
    pairs: dict[str, list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    for cell in cells:
        if cell.get("transplanted") is not None:
            own = [r for r in cell["scores"]["compound"] if r["source"] == COTRAINED]
            moved = cell["transplanted"]["compound"]
            pairs.setdefault(cell["variant"], []).extend((home, moved) for home in own)
    return [
        Transplanted(name, len(found), _means(found, "sum_l0"), _means(found, "ce_increase"))
        for name, found in pairs.items()
    ]


def tallies(changes: Sequence[SiteChange]) -> dict[tuple[str, str], Counter[Outcome]]:
    """Outcomes by variant and fresh family, over sites and seeds."""
    found: dict[tuple[str, str], Counter[Outcome]] = {}
    for change in changes:
        own = found.setdefault((change.variant, change.fresh), Counter())
        own.update(change.outcomes.values())
    return found


def _matrix_cell(
    study: MeasuredStudy, regularizer: str, variant: str | None, fresh: str
) -> MatrixCell:
    by_variant, l0 = study.compound.get(fresh, {}), study.sum_l0.get(fresh)
    curves = list(by_variant.get(variant, {}).values())
    head = (regularizer, variant, fresh, l0)
    if not curves:
        return MatrixCell(*head, None, None, 0, NOT_RUN)
    if l0 is None or not all(curve.reaches(l0) for curve in curves):
        return MatrixCell(*head, None, None, len(curves), NOT_REACHED)
    increase = statistics.fmean(curve.at(l0).ce_increase for curve in curves)
    logs = at_equal_l0(by_variant[variant], by_variant[study.baseline], l0).log_ratios
    ratio = math.exp(statistics.fmean(logs.values())) if logs else None
    return MatrixCell(*head, increase, ratio, len(curves), None)


def _columns(study: MeasuredStudy, families: Sequence[str]) -> list[str]:
    """All families, each at every size that was run; those that were not run, too."""
    found = []
    for family in families:
        own = [fresh for fresh in study.compound if fresh.partition(",")[0] == family]
        found += own or [family]
    return found


def _means(pairs: Sequence[tuple[Mapping[str, Any], ...]], name: str) -> tuple[float, ...]:
    return tuple(
        statistics.fmean(row[name] for row in column) for column in zip(*pairs, strict=True)
    )
