"""Fidelity as numbers: what a model loses when reconstructions take the place of activations.

    CE increase of a site = CE with its activations replaced by their reconstruction − CE
    CE recovered          = 1 − CE increase / (CE with the site ablated − CE)
    KL                    = KL(original ‖ spliced) of the two distributions of the next token
    compound              = the same with all sites replaced, each head reading the replaced stream

Notable:
- a ratio never comes alone: clean, spliced and ablated CE stand beside what is recovered
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from hf_saereg.heads import SiteStatistics


class Effect(NamedTuple):
    """What it does to a model's predictions when activations are replaced by reconstructions.

    Attributes:
        ce: of the model with reconstructions spliced in, nats a predicted token, as all of these.
        kl: KL(original ‖ spliced).
        clean_ce: nothing replaced.
        mean_ablated_ce: the same sites replaced by their mean activations; None where only some
            sites have a head and all of these are replaced at once, which has no baseline.
        zero_ablated_ce: the same sites replaced by zeros; None likewise.
    """

    ce: float
    kl: float
    clean_ce: float
    mean_ablated_ce: float | None
    zero_ablated_ce: float | None

    @property
    def ce_increase(self) -> float:
        """Nats a predicted token."""
        return self.ce - self.clean_ce

    @property
    def ce_recovered(self) -> float | None:
        """Share of what mean ablation costs that is not lost; None if it costs nothing."""
        return _recovered(self.ce, self.clean_ce, self.mean_ablated_ce)

    @property
    def ce_recovered_from_zero(self) -> float | None:
        """Share of what zero ablation costs that is not lost; None if it costs nothing."""
        return _recovered(self.ce, self.clean_ce, self.zero_ablated_ce)

    def figures(self) -> dict[str, float | None]:
        """All of them, by name."""
        return {
            **self._asdict(),
            "ce_increase": self.ce_increase,
            "ce_recovered": self.ce_recovered,
            "ce_recovered_from_zero": self.ce_recovered_from_zero,
        }


class SiteFidelity(NamedTuple):
    """How well one head stands in for its site.

    Attributes:
        effect: of its reconstructions alone.
        statistics: of the head on the clean activations.
    """

    effect: Effect
    statistics: SiteStatistics


class Fidelity(NamedTuple):
    """How well a model's heads stand in for its sites.

    Attributes:
        sites: each head alone, by hook name.
        compound: effect of all heads at once.
        compound_l0: sum over sites of L0 in the replaced stream.
    """

    sites: dict[str, SiteFidelity]
    compound: Effect
    compound_l0: float

    def figures(self) -> dict[str, float]:
        """What is defined, once: `clean_ce`, `NAME/HOOK_NAME` of a site, `compound_NAME` of all."""
        figures: dict[str, float | None] = {"compound_l0": self.compound_l0}
        for hook_name, (effect, statistics) in self.sites.items():
            own = effect.figures() | statistics.figures()
            own["explained_variance"] = statistics.explained_variance
            figures |= {f"{name}/{hook_name}": figure for name, figure in own.items()}
        figures |= {f"compound_{name}": figure for name, figure in self.compound.figures().items()}
        once = {"clean_ce": self.compound.clean_ce}
        return once | {
            name: figure
            for name, figure in figures.items()
            if figure is not None and "clean_ce" not in name
        }


class Baselines(NamedTuple):
    """What fidelity is measured against, nats a token.

    Attributes:
        clean_ce: nothing replaced.
        mean_ablated_ce: one site replaced by its mean activation, by hook name.
        mean_ablated_ce_all: all sites replaced by their mean activations.
        zero_ablated_ce: one site replaced by zeros, by hook name.
        zero_ablated_ce_all: all sites replaced by zeros.
        residual_norm: mean over tokens of ‖x‖₂, by hook name.
        spectrum: shares of the variance of x in its principal directions, largest first, by hook
            name.
    """

    clean_ce: float
    mean_ablated_ce: dict[str, float]
    mean_ablated_ce_all: float
    zero_ablated_ce: dict[str, float]
    zero_ablated_ce_all: float
    residual_norm: dict[str, float]
    spectrum: dict[str, list[float]]


def effective_rank(spectrum: Sequence[float]) -> float:
    """Number of directions that as much variance, evenly spread, would fill: exp of the entropy.

    Args:
        spectrum: shares of the variance.

    See: Roy & Vetterli 2007, "The effective rank".
    """
    shares = torch.tensor(spectrum, dtype=torch.float64)
    return torch.special.entr(shares).sum().exp().item()


def _recovered(ce: float, clean_ce: float, ablated_ce: float | None) -> float | None:
    if ablated_ce is None or ablated_ce <= clean_ce:
        return None
    return 1 - (ce - clean_ce) / (ablated_ce - clean_ce)
