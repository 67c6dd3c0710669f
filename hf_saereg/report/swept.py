"""What sweeps found, of any number of models: the records, and their reader.

What is notable:

- Models are alike in a condition as far as both tell it: `steps` of an older comparison are the
  language model's, so that it tells nothing of its SAEs' training.
- Any `results.json` will do, of a sweep or of a comparison; models keep their names, and the end
  of the run's path tells two of the same name apart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_saereg.report.labels import labels_of
from hf_saereg.report.results import Histogram, ReportError, read_as, read_json

RESULTS_FILE = "results.json"
# what a setup says of how SAEs were trained and scored; where it differs, so may costs
CONDITIONS = (
    *("dataset", "train_tokens", "validation_tokens", "scored_tokens", "text_seed"),
    *("fresh_steps", "fresh_tokens_per_step", "fresh_learning_rate"),
    *("fresh_warmup_steps", "fresh_cooldown"),
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
class ScoredModel:
    """A model and the SAEs on it: all that curves are drawn of.

    Attributes:
        label: its name among others.
        sites: hook names.
        heads: each SAE alone.
        sets: those of all sites at once.
    """

    label: str
    sites: tuple[str, ...]
    heads: tuple[SweptHead, ...]
    sets: tuple[SweptSet, ...]


@dataclass(frozen=True)
class SweptModel(ScoredModel):
    """One model of a run.

    Attributes:
        run: its folder.
        baseline: CE of the model, whole and ablated.
        setup: of the run.
        conditions: what the setup says of `CONDITIONS`.
        seconds: that each phase took.
    """

    run: Path
    baseline: SweptBaseline
    setup: SweptSetup
    conditions: dict[str, object]
    seconds: dict[str, float]


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
        told = _conditions(content["setup"])
        found += [(folder, name, run, told) for name in run.baselines]
    if not any(run.compound for _, _, run, _ in found):
        raise ReportError("The runs hold no SAE, so there is nothing to show.")
    labels = labels_of([(folder, name) for folder, name, _, _ in found])
    return [
        SweptModel(
            label=label,
            run=folder,
            baseline=run.baselines[name],
            sites=run.sites,
            heads=tuple(row for row in run.rows if row.model == name),
            sets=tuple(row for row in run.compound if row.model == name),
            setup=run.setup,
            conditions=told,
            seconds=run.seconds,
        )
        for label, (folder, name, run, told) in zip(labels, found, strict=True)
    ]


def _conditions(setup: Mapping[str, object]) -> dict[str, object]:
    told = {name: setup[name] for name in CONDITIONS if name in setup}
    if "regularizer" in setup:  # a comparison, whose other steps are not the SAEs'
        return told
    older = {name: name.removeprefix("fresh_") for name in CONDITIONS}
    return {name: setup[own] for name, own in older.items() if own in setup} | told


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
