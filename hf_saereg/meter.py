"""Running averages of the term and its parts, and of norms, over steps and processes.

Notable:
- sums and token counts are kept, never averages of averages: a short micro-batch weighs less
- processes are summed at logging steps only
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor

from hf_saereg.heads import SiteStatistics
from hf_saereg.heads.tokens import tokens_read
from hf_saereg.regularizer import SiteTerm
from hf_saereg.sites import SitedGPT2LMHeadModel, SiteFunction


class TermMeter:
    """Adds up the sites of forward passes until it is read."""

    def __init__(self) -> None:
        # by site: R, S, A and the site's value, each times tokens; statistics
        self._sites: dict[str, tuple[Tensor, SiteStatistics]] = {}

    def update(self, sites: dict[str, SiteTerm], counts: bool = True) -> None:
        """Add one forward pass, by hook name.

        Args:
            sites: of the pass.
            counts: false where its tokens are to be left out: sums of nothing are added then, so
                that this process has the same to share as the others.
        """
        for hook_name, site in sites.items():
            statistics = site.losses.statistics.times(int(counts))
            losses = _losses_vector(site) * statistics.tokens
            if hook_name in self._sites:
                old_losses, old_statistics = self._sites[hook_name]
                losses, statistics = losses + old_losses, statistics.merged(old_statistics)
            self._sites[hook_name] = (losses, statistics)

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Averages over everything added since the last reading, on all processes; then empties.

        Every process must call it at the same step.

        Returns:
            `term`, and per site `NAME/HOOK_NAME`; empty when nothing was added.
        """
        sites, self._sites = self._sites, {}
        figures: dict[str, float] = {}
        values = []
        for hook_name, (losses, statistics) in accelerator.reduce(sites).items():
            reconstruction, sparsity, auxiliary, value = (losses / statistics.tokens).tolist()
            values.append(value)
            for name, figure in {
                **statistics.figures(),
                "reconstruction": reconstruction,
                "sparsity": sparsity,
                "auxiliary": auxiliary,
            }.items():
                figures[f"{name}/{hook_name}"] = figure
        return {"term": sum(values) / len(values), **figures} if values else {}


class NormMeter:
    """Adds up ‖x‖ at every site of a model whose stream no head reads, until it is read itself."""

    def __init__(self) -> None:
        self._sites: dict[str, tuple[Tensor, Tensor]] = {}  # by site: sum of ‖x‖, tokens

    @contextmanager
    def reading(self, model: SitedGPT2LMHeadModel, mask: Tensor | None) -> Iterator[None]:
        """Add the tokens of one batch, which passes inside as often as checkpointing wants.

        Args:
            model: whose sites are read.
            mask: (batch, sequence), true where a token is read; None where all are.
        """
        norms: dict[str, Tensor] = {}
        with model.at_sites({name: _norms_into(norms, name) for name in model.hook_names}):
            yield
        for hook_name, own in norms.items():
            counted = tokens_read(own, mask)
            number = torch.tensor(counted.numel(), device=counted.device)
            total, tokens = self._sites.get(hook_name, (0, 0))
            self._sites[hook_name] = (total + counted.sum(), tokens + number)

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over all processes' tokens since the last reading; then empties.

        Every process must call it at the same step.

        Returns:
            `x_norm/HOOK_NAME` of every site; empty when nothing was added.
        """
        sites, self._sites = self._sites, {}
        return {
            f"x_norm/{hook_name}": (total / tokens).item()
            for hook_name, (total, tokens) in accelerator.reduce(sites).items()
        }


def _norms_into(norms: dict[str, Tensor], hook_name: str) -> SiteFunction:
    def keep(x: Tensor) -> None:
        # (batch, sequence)
        norms[hook_name] = torch.linalg.vector_norm(x.detach(), dim=-1, dtype=torch.float64)

    return keep


def _losses_vector(site: SiteTerm) -> Tensor:
    losses = site.losses
    parts = (losses.reconstruction, losses.sparsity, losses.auxiliary, site.value)
    return torch.stack([part.detach().float() for part in parts])
