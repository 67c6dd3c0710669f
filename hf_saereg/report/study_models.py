"""A study's cells with types, and its variants as models whose SAEs have the cells' seeds."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_saereg.report.results import ReportError, read_as
from hf_saereg.report.swept import ScoredModel, SweptHead, SweptSet

Cell = Mapping[str, Any]


@dataclass(frozen=True)
class CellFigures:
    """What a cell's training measured: nats a token, seconds."""

    eval_ce: float
    train_seconds: float


@dataclass(frozen=True)
class CellScores:
    """The SAEs on a cell's model."""

    rows: tuple[SweptHead, ...]
    compound: tuple[SweptSet, ...]


@dataclass(frozen=True)
class MeasuredCell:
    """What is read of a `cell.json`."""

    variant: str
    seed: int
    figures: CellFigures
    scores: CellScores


def read_cells(cells: Iterable[Cell]) -> list[MeasuredCell]:
    """Give contents of `cell.json` files types.

    Args:
        cells: as parsed.

    Raises:
        ReportError: if one lacks a key, or holds what it must not, such as a NaN.
    """
    found = []
    for cell in cells:
        try:
            found.append(read_as(MeasuredCell, cell))
        except ReportError as error:
            name = f"{cell.get('variant')!r} at seed {cell.get('seed')}"
            raise ReportError(f"The cell {name} cannot be read: {error}") from error
    return found


def variant_models(cells: Sequence[MeasuredCell]) -> list[ScoredModel]:
    """A model a variant, with the SAEs of all its seeds.

    Args:
        cells: of `read_cells`.
    """
    by_variant: dict[str, list[CellScores]] = {}
    for cell in cells:
        by_variant.setdefault(cell.variant, []).append(cell.scores)
    return [
        ScoredModel(
            label=variant,
            sites=tuple(dict.fromkeys(row.site for own in scores for row in own.rows)),
            heads=tuple(row for own in scores for row in own.rows),
            sets=tuple(row for own in scores for row in own.compound),
        )
        for variant, scores in by_variant.items()
    ]
