"""How settled fresh SAEs are: what the second half of their training still changed.

What is notable:

- Where a single SAE costs next to nothing, what it costs wanders by its own size, however long it
  trains; the mean over the sites, and over seeds where there are several, shows whether longer
  training still buys something. That mean is what counts as settled or not.
- A mean that is below `SMALLEST_CE_INCREASE` at half and in the end, as on a model that was never
  trained, has nothing to settle.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple, Protocol, TypeVar

SETTLED = 0.05  # movement of the mean up to which fresh SAEs count as settled
SMALLEST_CE_INCREASE = 0.002  # nats; below it a relative movement says nothing


class Trained(Protocol):
    """Fresh SAEs of all sites, or of one."""

    sparsity: float | str
    ce_increase: float
    ce_increase_at_half: float | None


class TrainedAtSite(Trained, Protocol):
    """A fresh SAE."""

    site: str


T = TypeVar("T", bound=Trained)


class Convergence(NamedTuple):
    """How far the CE increase of fresh SAEs moved over the second half of their training.

    Attributes:
        model: whose activations they were trained on.
        family: their family, with the size where there are several.
        mean: relative movement of the mean over sites and seeds, the largest over sparsities.
        compound: the same with all sites replaced at once.
        median: of the single SAEs, over sites, seeds and sparsities.
        largest: the largest one of them,
        site: where it was found,
        sparsity: and at which k or coefficient.
    """

    model: str
    family: str
    mean: float
    compound: float
    median: float
    largest: float
    site: str
    sparsity: float | str

    @property
    def is_settled(self) -> bool:
        """Whether longer training would buy next to nothing at a single site."""
        return self.mean <= SETTLED

    @property
    def is_settled_at_once(self) -> bool:
        """Whether that holds with all sites replaced, where errors feed on each other."""
        return self.compound <= SETTLED


def relative_movement(at_half: float | None, final: float) -> float:
    """Return |at_half − final| / final, with a floor under the denominator.

    Args:
        at_half: of training; None where it was not measured, which moves nothing.
        final: at its end.
    """
    return 0.0 if at_half is None else abs(at_half - final) / max(final, SMALLEST_CE_INCREASE)


def convergence(
    model: str, family: str, heads: Iterable[TrainedAtSite], sets: Iterable[Trained]
) -> Convergence | None:
    """Measure one family of fresh SAEs on one model.

    Args:
        model: its name.
        family: name of the family.
        heads: the SAEs, all sites, sparsities and seeds.
        sets: the same with all sites replaced at once.

    Returns:
        The measure; None where none was measured at half of its training.
    """
    heads, sets = _at_half(heads), _at_half(sets)
    if not heads or not sets:
        return None
    singles = [relative_movement(row.ce_increase_at_half, row.ce_increase) for row in heads]
    largest, farthest = max(zip(singles, heads, strict=True), key=lambda pair: pair[0])
    return Convergence(
        model,
        family,
        mean=_of_means(heads),
        compound=_of_means(sets),
        median=statistics.median(singles),
        largest=largest,
        site=farthest.site,
        sparsity=farthest.sparsity,
    )


def _at_half(rows: Iterable[T]) -> list[T]:
    return [row for row in rows if row.ce_increase_at_half is not None]


def _of_means(rows: Iterable[Trained]) -> float:
    by_sparsity = defaultdict[float | str, list[Trained]](list)
    for row in rows:
        by_sparsity[row.sparsity].append(row)
    means = [
        (
            statistics.fmean(row.ce_increase_at_half for row in same),
            statistics.fmean(row.ce_increase for row in same),
        )
        for same in by_sparsity.values()
    ]
    return max(
        (relative_movement(*pair) for pair in means if max(pair) > SMALLEST_CE_INCREASE),
        default=0.0,
    )
