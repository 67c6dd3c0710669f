"""What sweeps found, of any number of models: the reader, and the curves through it.

What is notable:

- Any `results.json` will do, of a sweep or of a comparison; models keep their names, and the run's
  folder tells two of the same name apart.
- A variant is a family at a size. Its curve goes through the means over seeds at each sparsity, and
  nothing is extrapolated: models are compared inside the range that all of them reached.
"""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from hf_saereg.report.results import (
    COTRAINED,
    FRESH,
    Histogram,
    ReportError,
    read_as,
    read_json,
)
from hf_saereg.report.verdict import (
    SAME_L0,
    Curve,
    CurvePoint,
    relative_movement,
    shared_range,
)

RESULTS_FILE = "results.json"
POINTS_COMPARED = 5
# what a setup says of how SAEs were trained and scored; where it differs, so may costs
CONDITIONS = (
    *("dataset", "train_tokens", "validation_tokens", "scored_tokens", "text_seed"),
    *("steps", "tokens_per_step", "learning_rate", "warmup_steps", "cooldown"),
    *("skip_positions", "skip_tokens"),
)


@dataclass(frozen=True)
class SweptHead:
    """One SAE at one site."""

    model: str
    family: str
    source: str  # FRESH or COTRAINED
    site: str
    sparsity: float | str
    d_sae: int
    seed: float | None  # None for a co-trained head
    l0: float
    ce_increase: float
    ce_increase_at_half: float | None
    ce_recovered: float | None  # None where ablation costs nothing
    kl: float
    fvu: float
    dead_fraction: float
    density_histogram: Histogram

    @property
    def latents(self) -> float:
        """L0 at the site."""
        return self.l0


@dataclass(frozen=True)
class SweptSet:
    """The SAEs of all sites at once."""

    model: str
    family: str
    source: str
    sparsity: float | str
    d_sae: float | str  # text where sites differ
    seed: float | None
    sum_l0: float
    ce_increase: float
    ce_increase_at_half: float | None
    ce_recovered: float | None
    kl: float

    @property
    def latents(self) -> float:
        """L0 summed over sites."""
        return self.sum_l0


@dataclass(frozen=True)
class SweptBaseline:
    """What a model's CE increases are measured against."""

    clean_ce: float
    mean_ablated_ce: dict[str, float]
    mean_ablated_ce_all: float
    zero_ablated_ce: dict[str, float]
    zero_ablated_ce_all: float


@dataclass(frozen=True)
class SweptSetup:
    """What was run."""

    dataset: str
    model: str
    command: str
    device: str


@dataclass(frozen=True)
class SweptRun:
    """What is read of a `results.json`."""

    sites: tuple[str, ...]
    rows: tuple[SweptHead, ...]
    compound: tuple[SweptSet, ...]
    baselines: dict[str, SweptBaseline]
    seconds: dict[str, float]
    setup: SweptSetup


@dataclass(frozen=True)
class SweptModel:
    """One model and the SAEs on it.

    Attributes:
        conditions: what the setup says of `CONDITIONS`.
    """

    label: str
    run: Path
    baseline: SweptBaseline
    sites: tuple[str, ...]
    heads: tuple[SweptHead, ...]
    sets: tuple[SweptSet, ...]
    setup: SweptSetup
    conditions: dict[str, object]
    seconds: dict[str, float]


class Variant(NamedTuple):
    """A family at a size."""

    family: str
    d_sae: float | str

    @property
    def label(self) -> str:
        """In words."""
        size = self.d_sae if isinstance(self.d_sae, str) else f"{self.d_sae:g}"
        return f"{self.family}, d_sae {size}"


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


def read_runs(folders: Sequence[Path]) -> list[SweptModel]:
    """All models of several runs.

    Args:
        folders: each holds a `results.json`.

    Raises:
        ReportError: if one is missing, damaged, or lacks a key.
    """
    found = []
    for folder in folders:
        path = folder / RESULTS_FILE
        content = read_json(path)
        try:
            run = read_as(SweptRun, content)
        except ReportError as error:
            raise ReportError(f"{path}: {error}") from error
        told = {name: content["setup"][name] for name in CONDITIONS if name in content["setup"]}
        found += [(folder, name, run, told) for name in run.baselines]
    if not any(run.compound for _, _, run, _ in found):
        raise ReportError("The runs hold no SAE, so there is nothing to show.")
    names = Counter(name for _, name, _, _ in found)
    return [
        SweptModel(
            label=name if names[name] == 1 else f"{name} ({folder.resolve().name})",
            run=folder,
            baseline=run.baselines[name],
            sites=run.sites,
            heads=tuple(row for row in run.rows if row.model == name),
            sets=tuple(row for row in run.compound if row.model == name),
            setup=run.setup,
            conditions=told,
            seconds=run.seconds,
        )
        for folder, name, run, told in found
    ]


def unlike(models: Sequence[SweptModel]) -> dict[str, list[tuple[str, object]]]:
    """`CONDITIONS` in which models differ: of each the models that tell it, with its value."""
    told = {
        name: [(own.label, own.conditions[name]) for own in models if name in own.conditions]
        for name in CONDITIONS
    }
    return {
        name: values
        for name, values in told.items()
        if any(value != values[0][1] for _, value in values)
    }


def variants(models: Iterable[SweptModel]) -> list[Variant]:
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


def cotrained(rows: Iterable[SweptHead | SweptSet]) -> list[SweptHead | SweptSet]:
    """The rows of a model's own heads."""
    return [row for row in rows if row.source == COTRAINED]


def at_site(model: SweptModel, site: str) -> list[SweptHead]:
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


def compare(models: Sequence[SweptModel], variant: Variant) -> list[AtEqualL0]:
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


def movement(model: SweptModel, variant: Variant) -> float | None:
    """Median relative change of a site's CE increase over the second half of training."""
    rows = fresh(model.heads, variant)
    moved = [relative_movement(row.ce_increase_at_half, row.ce_increase) for row in rows]
    return statistics.median(moved) if moved else None


def _spread_out(low: float, high: float) -> list[float]:
    """L0s evenly apart on a log scale; one where they would be all but equal."""
    if high <= low * (1 + SAME_L0):
        return [low]
    ratio = math.log(high / low) / (POINTS_COMPARED - 1)
    inner = [low * math.exp(i * ratio) for i in range(1, POINTS_COMPARED - 1)]
    return [low, *inner, high]


def _point(row: SweptHead | SweptSet) -> CurvePoint:
    at_half = row.ce_increase if row.ce_increase_at_half is None else row.ce_increase_at_half
    return CurvePoint(row.latents, row.ce_increase, relative_movement(at_half, row.ce_increase))


def _fits(row: SweptHead | SweptSet, variant: Variant) -> bool:
    if isinstance(row, SweptHead) and isinstance(variant.d_sae, str):
        return f"{row.d_sae:g}" in variant.d_sae.split("-")  # a head has the size of its own site
    return row.d_sae == variant.d_sae
