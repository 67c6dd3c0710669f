"""What `quality.json` says of runs: means over sites and seeds, a line a group of heads and model.

What is notable:

- A group is what may be compared between models: family, size, sparsity and source.
- A measure that a run lacks, such as consistency with one seed, is None, never 0.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from hf_saereg.report.labels import labels_of
from hf_saereg.report.results import FRESH, ReportError, read_as, read_json

QUALITY_FILE = "quality.json"
RESULTS_FILE = "results.json"
WANTED_L0 = 10  # figures show the heads nearest to it


class Group(NamedTuple):
    """Heads that are alike in all but the model, the site and the seed."""

    family: str
    d_sae: int
    sparsity: float
    source: str

    @property
    def label(self) -> str:
        """In words."""
        own = "" if self.source == FRESH else "co-trained "
        return f"{own}{self.family}, d_sae {self.d_sae}, sparsity {self.sparsity:g}"


@dataclass(frozen=True)
class MeasuredRow:
    """What every row has."""

    model: str
    family: str
    source: str
    site: str
    sparsity: float
    d_sae: int

    @property
    def group(self) -> Group:
        """Of its head."""
        return Group(self.family, self.d_sae, self.sparsity, self.source)


@dataclass(frozen=True)
class ProbeResult:
    """One latent as a probe of a class."""

    f1: float
    share: float


@dataclass(frozen=True)
class CoOccurrenceResult:
    """Latents firing together beyond chance."""

    excess: float
    chance: float
    lifted: float


@dataclass(frozen=True)
class MeasuredHead(MeasuredRow):
    """One head."""

    l0: float
    dead_fraction: float
    probes: dict[str, ProbeResult]
    co_occurrence: CoOccurrenceResult | None


@dataclass(frozen=True)
class SeedPair(MeasuredRow):
    """One head and the same from another seed."""

    mean_max: float
    matched: float
    chance_mean_max: float
    chance_matched: float


@dataclass(frozen=True)
class SizePair(MeasuredRow):
    """One head and a wider one."""

    wider: int
    explained: tuple[float, ...]
    chance: tuple[float, ...]


@dataclass(frozen=True)
class MeasuredSetup:
    """How it was measured."""

    dataset: str
    tokens: dict[str, int]
    command: str


@dataclass(frozen=True)
class MeasuredRun:
    """What is read of a `quality.json`."""

    heads: tuple[MeasuredHead, ...]
    consistency: tuple[SeedPair, ...]
    composition: tuple[SizePair, ...]
    setup: MeasuredSetup


class MeasuredModel(NamedTuple):
    """A model and what was measured on it.

    Attributes:
        label: as the page names it.
        name: in its run.
        place: among all models of the page, those without measures included.
        run: what was measured.
    """

    label: str
    name: str
    place: int
    run: MeasuredRun

    def rows(self, kind: str, group: Group) -> list[MeasuredRow]:
        """Those of a group.

        Args:
            kind: `heads`, `consistency` or `composition`.
            group: of heads.
        """
        rows: Sequence[MeasuredRow] = getattr(self.run, kind)
        return [row for row in rows if row.model == self.name and row.group == group]


class Measure(NamedTuple):
    """A number of every row.

    Attributes:
        title: in a table.
        kind: of the rows that have it.
        of: from a row to it; None where the row lacks it.
        chance: from a row to what random directions get, where that is known.
    """

    title: str
    kind: str
    of: Callable[[MeasuredRow], float | None]
    chance: Callable[[MeasuredRow], float | None] | None = None

    def by_site(self, model: MeasuredModel, group: Group) -> dict[str, float]:
        """Means over seeds; sites without a value are left out."""
        return _means(model.rows(self.kind, group), self.of)

    def mean(self, model: MeasuredModel, group: Group) -> float | None:
        """Over sites and seeds."""
        found = self.by_site(model, group)
        return statistics.fmean(found.values()) if found else None

    def chance_by_site(self, model: MeasuredModel, group: Group) -> dict[str, float]:
        """Means over seeds of what random directions get; nothing where that is not known."""
        return _means(model.rows(self.kind, group), self.chance) if self.chance else {}

    def mean_by_chance(self, model: MeasuredModel, group: Group) -> float | None:
        """The same over sites and seeds."""
        found = self.chance_by_site(model, group)
        return statistics.fmean(found.values()) if found else None


class Line(NamedTuple):
    """A row of the tables.

    Attributes:
        group: of heads.
        model: its label.
        l0: mean over sites and seeds.
        dead: share of latents, likewise.
        values: a value a measure.
        chance: likewise, of random directions.
    """

    group: Group
    model: str
    l0: float
    dead: float
    values: dict[str, float | None]
    chance: dict[str, float | None]


def read_measured(folders: Sequence[Path]) -> list[MeasuredModel]:
    """Models of those runs that hold a `quality.json`, in the order of the runs.

    Args:
        folders: of runs, with their `results.json`, or of cells of studies, which have none.

    Raises:
        ReportError: if a file is damaged or lacks a key.
    """
    names = [(folder, name) for folder in folders for name in _model_names(folder)]
    found = []
    for place, ((folder, name), label) in enumerate(zip(names, labels_of(names), strict=True)):
        path = folder / QUALITY_FILE
        if path.is_file():
            try:
                run = read_as(MeasuredRun, read_json(path))
            except ReportError as error:
                raise ReportError(f"{path}: {error}") from error
            found.append(MeasuredModel(label, name, place, run))
    return found


def _model_names(folder: Path) -> list[str]:
    if (folder / RESULTS_FILE).is_file():
        return list(read_json(folder / RESULTS_FILE)["baselines"])
    path = folder / QUALITY_FILE
    return list(read_json(path)["setup"]["tokens"]) if path.is_file() else []


def measures(models: Sequence[MeasuredModel]) -> dict[str, Measure]:
    """What was measured on any of the models, by name."""
    found = {}
    if any(own.run.consistency for own in models):
        found["matched"] = Measure(
            "cosine with another seed’s",
            "consistency",
            lambda row: row.matched,
            lambda row: row.chance_matched,
        )
    parts = max((len(row.explained) for own in models for row in own.run.composition), default=0)
    for number in sorted({1, parts}) if parts else ():
        found[f"explained_{number}"] = Measure(
            f"made up by {number} of a wider SAE",
            "composition",
            lambda row, number=number: _nth(row.explained, number),
            lambda row, number=number: _nth(row.chance, number),
        )
    found["excess"] = Measure(
        "joint firings beyond their rates",
        "heads",
        lambda row: _of_pairs(row, "excess"),
        lambda row: _of_pairs(row, "chance"),
    )
    found["lifted"] = Measure("pairs lifted twofold", "heads", lambda row: _of_pairs(row, "lifted"))
    classes = dict.fromkeys(c for own in models for row in own.run.heads for c in row.probes)
    for name in classes:
        found[f"f1_{name}"] = Measure(
            f"F1 {name.replace('_', ' ')}",
            "heads",
            lambda row, name=name: row.probes[name].f1 if name in row.probes else None,
        )
    return found


def groups(models: Iterable[MeasuredModel]) -> list[Group]:
    """Of all heads: fresh before co-trained, then by family, size and sparsity."""
    found = {row.group for own in models for row in own.run.heads if row.model == own.name}
    return sorted(found, key=lambda group: (group.source != FRESH, group))


def shown_groups(models: Sequence[MeasuredModel]) -> list[Group]:
    """Those of the figure: a family's smallest fresh heads, of the mean L0 nearest to 10."""

    def rank(group: Group) -> tuple[int, float]:
        l0s = [row.l0 for own in models for row in own.rows("heads", group)]
        return group.d_sae, abs(statistics.fmean(l0s) - WANTED_L0)

    fresh = [group for group in groups(models) if group.source == FRESH]
    families = dict.fromkeys(group.family for group in fresh)
    return [min((own for own in fresh if own.family == name), key=rank) for name in families]


def lines(models: Sequence[MeasuredModel]) -> list[Line]:
    """Every group on every model that has it."""
    wanted = measures(models)
    found = []
    for group in groups(models):
        for model in models:
            heads = model.rows("heads", group)
            if heads:
                found.append(
                    Line(
                        group,
                        model.label,
                        statistics.fmean(row.l0 for row in heads),
                        statistics.fmean(row.dead_fraction for row in heads),
                        {name: own.mean(model, group) for name, own in wanted.items()},
                        {name: own.mean_by_chance(model, group) for name, own in wanted.items()},
                    )
                )
    return found


def as_text(models: Sequence[MeasuredModel]) -> str:
    """The lines for a terminal, a measure a line of its own head."""
    wanted = measures(models)
    text = []
    for line in lines(models):
        text.append(f"{line.group.label}, on {line.model}: L0 {line.l0:.1f}, dead {line.dead:.0%}")
        for name, measure in wanted.items():
            value, chance = line.values[name], line.chance[name]
            if value is not None:
                beside = "" if chance is None else f" (by chance: {chance:.3f})"
                text.append(f"  {measure.title:<32} {value:.3f}{beside}")
    return "\n".join(text)


def _means(
    rows: Iterable[MeasuredRow], of: Callable[[MeasuredRow], float | None]
) -> dict[str, float]:
    by_site: dict[str, list[float]] = {}
    for row in rows:
        value = of(row)
        if value is not None:
            by_site.setdefault(row.site, []).append(value)
    return {site: statistics.fmean(values) for site, values in by_site.items()}


def _nth(shares: Sequence[float], number: int) -> float | None:
    return shares[number - 1] if len(shares) >= number else None


def _of_pairs(row: MeasuredHead, name: str) -> float | None:
    return None if row.co_occurrence is None else getattr(row.co_occurrence, name)
