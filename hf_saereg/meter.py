"""Running averages of the term and its parts, over steps and processes.

Notable:
- sums and token counts are kept, never averages of averages: a short micro-batch weighs less
- processes are summed at logging steps only
"""

import torch
from accelerate import Accelerator
from torch import Tensor

from hf_saereg.heads import SiteStatistics
from hf_saereg.regularizer import SiteTerm


class TermMeter:
    """Adds up the sites of forward passes until it is read."""

    def __init__(self) -> None:
        # by site: R, S, A and the site's value, each times tokens; statistics
        self._sites: dict[str, tuple[Tensor, SiteStatistics]] = {}

    def update(self, sites: dict[str, SiteTerm]) -> None:
        """Add one forward pass, by hook name."""
        for hook_name, site in sites.items():
            statistics = site.losses.statistics
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


def _losses_vector(site: SiteTerm) -> Tensor:
    losses = site.losses
    parts = (losses.reconstruction, losses.sparsity, losses.auxiliary, site.value)
    return torch.stack([part.detach().float() for part in parts])
