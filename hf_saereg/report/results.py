"""The reader of `results.json`: what a comparison must hold before anything is said about it.

What is notable:

- The dataclasses are the schema: a field is a required key, but one that may be None by default,
  which older files lack; its type is what the key must hold.
  Keys that no field names are left alone.
- Every number must be finite: a NaN is refused by the key it stands under, never drawn as a gap.
- CE is in nats a token throughout.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Generic, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from hf_saereg.errors import UserError

MODELS = ("plain", "regularized")
FRESH, COTRAINED = "fresh", "cotrained"

T = TypeVar("T")


class ReportError(UserError):
    """The results cannot be reported as they are; the message names the key at fault."""


class Pair(NamedTuple, Generic[T]):
    """The same thing of both models."""

    plain: T
    regularized: T


@dataclass(frozen=True)
class ModelResult:
    """One language model after training."""

    eval_ce: float
    train_ce: float
    tokens_per_second: float
    train_seconds: float
    steps: int
    parameters: int


@dataclass(frozen=True)
class Histogram:
    """Latents by the decimal logarithm of the share of tokens on which they fire."""

    log10_edges: tuple[float, ...]
    counts: tuple[int, ...]
    never: int


@dataclass(frozen=True)
class SAEResult:
    """One SAE at one site of one model."""

    model: str  # one of MODELS
    family: str  # e.g. topk
    source: str  # FRESH or COTRAINED
    site: str
    sparsity: float | str  # k or coefficient, a label only
    l0: float
    ce_increase: float
    fvu: float
    dead_fraction: float
    ce_increase_at_half: float | None  # at half of a fresh SAE's training; None for a co-trained
    density_histogram: Histogram | None = None


@dataclass(frozen=True)
class CompoundResult:
    """The SAEs of all sites at once."""

    model: str
    family: str
    source: str
    sparsity: float | str
    sum_l0: float
    ce_increase: float
    ce_increase_at_half: float | None


@dataclass(frozen=True)
class Baseline:
    """What the scale of one model's CE increases is."""

    clean_ce: float
    mean_ablated_ce: dict[str, float]  # by site: its activations replaced by their mean
    mean_ablated_ce_all: float
    residual_norm: dict[str, float]  # by site: mean ‖x‖₂


@dataclass(frozen=True)
class Setup:
    """What was run, for the reader and for whoever runs it again."""

    title: str
    dataset: str
    train_tokens: int
    validation_tokens: int
    steps: int
    tokens_per_step: int
    model: str
    regularizer: str
    fresh: str
    seed: int
    command: str
    device: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Results:
    """All of `results.json`."""

    models: Pair[ModelResult]
    sites: tuple[str, ...]
    rows: tuple[SAEResult, ...]
    compound: tuple[CompoundResult, ...]
    baselines: Pair[Baseline]
    seconds: dict[str, float]
    setup: Setup

    @property
    def families(self) -> tuple[str, ...]:
        """Families of the fresh SAEs, in the order in which they first occur."""
        return tuple(dict.fromkeys(row.family for row in self.rows if row.source == FRESH))

    def cotrained_l0(self, site: str) -> float | None:
        """L0 that the model was trained for at a site; None without a co-trained head."""
        heads = (row.l0 for row in self.rows if row.source == COTRAINED and row.site == site)
        return next(heads, None)

    def cotrained_compound(self) -> CompoundResult | None:
        """All co-trained heads at once, where they were measured."""
        return next((row for row in self.compound if row.source == COTRAINED), None)


def read_results(results: Mapping[str, object]) -> Results:
    """Check `results.json`, as parsed, and give it types.

    Args:
        results: what `json.load` returned.

    Raises:
        ReportError: if a key is missing, or holds what it must not, such as a NaN.
    """
    read = read_as(Results, results)
    for name in ("sites", "rows", "compound"):
        if not getattr(read, name):
            raise ReportError(f"The results hold no '{name}', so there is nothing to compare.")
    for place, row in _placed(read.rows, "rows") + _placed(read.compound, "compound"):
        _check_row(row, place)
    for index, row in enumerate(read.rows):
        if row.site not in read.sites:
            raise ReportError(f"'rows[{index}].site' is '{row.site}', which is not in 'sites'.")
    for name, model, baseline in zip(MODELS, read.models, read.baselines, strict=True):
        for key in ("tokens_per_second", "train_seconds"):
            if getattr(model, key) <= 0:
                raise ReportError(f"'models.{name}.{key}' must be above 0.")
        for key in ("mean_ablated_ce", "residual_norm"):
            for site in read.sites:
                if site not in getattr(baseline, key):
                    raise ReportError(f"'baselines.{name}.{key}' has no value for '{site}'.")
    return read


def read_json(path: Path) -> Mapping[str, object]:
    """Parse a file that a run wrote.

    Raises:
        ReportError: if it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(
            f"Cannot read {path} ({error}); give a folder that a sweep or a run has finished."
        ) from error


def read_as(kind: type[T], results: Mapping[str, object]) -> T:
    """Give parsed JSON the types of a dataclass, whose fields are the schema.

    Args:
        kind: the dataclass.
        results: what `json.load` returned.

    Raises:
        ReportError: if a key is missing, or holds what it must not, such as a NaN.
    """
    return _read(kind, results, "")


def _placed(rows: Sequence[T], name: str) -> list[tuple[str, T]]:
    return [(f"{name}[{index}]", row) for index, row in enumerate(rows)]


def _check_row(row: SAEResult | CompoundResult, place: str) -> None:
    if row.model not in MODELS:
        raise ReportError(f"'{place}.model' is '{row.model}', but must be one of {MODELS}.")
    if row.source not in (FRESH, COTRAINED):
        raise ReportError(
            f"'{place}.source' is '{row.source}', but must be '{FRESH}' or '{COTRAINED}'."
        )
    if row.source == FRESH and row.ce_increase_at_half is None:
        raise ReportError(
            f"'{place}.ce_increase_at_half' is null, but a fresh SAE must have it: without it "
            "nobody can tell whether its training had settled."
        )
    l0 = row.l0 if isinstance(row, SAEResult) else row.sum_l0
    if l0 < 0:
        raise ReportError(f"The L0 of '{place}' is {l0}, but must not be negative.")


def _read(kind: type, value: object, path: str) -> object:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return _read_union(arguments, value, path)
    if origin is Pair:
        keys = _mapping(value, path)
        return Pair(*(_child(arguments[0], keys, name, path) for name in MODELS))
    if origin is dict:
        keys = _mapping(value, path)
        return {str(name): _child(arguments[1], keys, name, path) for name in keys}
    if origin is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ReportError(f"'{path}' must be a list.")
        return tuple(
            _read(arguments[0], item, f"{path}[{index}]") for index, item in enumerate(value)
        )
    if dataclasses.is_dataclass(kind):
        keys = _mapping(value, path)
        optional = {f.name for f in dataclasses.fields(kind) if f.default is None} - keys.keys()
        hints = {n: t for n, t in get_type_hints(kind).items() if n not in optional}
        return kind(**{n: _child(t, keys, n, path) for n, t in hints.items()})
    return _read_scalar(kind, value, path)


def _child(kind: type, keys: Mapping[str, object], name: str, path: str) -> object:
    place = f"{path}.{name}" if path else name
    if name not in keys:
        raise ReportError(f"The results have no '{place}'.")
    return _read(kind, keys[name], place)


def _mapping(value: object, path: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise ReportError(f"'{path}' must be an object with keys." if path else "No object given.")
    return value


def _read_union(kinds: tuple[type, ...], value: object, path: str) -> object:
    if value is None and type(None) in kinds:
        return None
    if isinstance(value, str) and str in kinds:
        return value
    for kind in filter(dataclasses.is_dataclass, kinds):
        return _read(kind, value, path)
    return _read_scalar(float, value, path)


def _read_scalar(kind: type, value: object, path: str) -> object:
    if kind is str:
        if not isinstance(value, str):
            raise ReportError(f"'{path}' is {value!r}, but must be text.")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ReportError(f"'{path}' is {value!r}, but must be a number.")
    if not math.isfinite(value):
        raise ReportError(f"'{path}' is {value}, but must be a finite number.")
    return kind(value)
