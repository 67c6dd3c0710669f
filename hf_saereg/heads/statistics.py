"""What a pass of a head over tokens returns: losses, and sums from which every figure follows.

Notable:
- `SiteStatistics` are sums, so they add up over batches and processes without rounding tricks
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor

# bins of a density histogram: half a decade each, what is rarer counts in the first
LOG10_DENSITY_EDGES = tuple(-6 + i / 2 for i in range(13))


class DensityHistogram(NamedTuple):
    """How often latents fire: numbers of latents by the share of tokens on which they do.

    Attributes:
        log10_edges: of the bins, the upper one included; latents below the first are in its bin.
        counts: latents in each bin, one fewer than edges.
        never: latents that fired on no token.
    """

    log10_edges: list[float]
    counts: list[int]
    never: int


class SiteStatistics(NamedTuple):
    """Sums over tokens, all detached, from which every logged figure of a site follows.

    Attributes:
        tokens: () number of tokens.
        squared_error: () sum of ‖x − x̂‖², raw.
        x_sum: (d_in,) sum of x.
        x_square: () sum of ‖x‖².
        x_norm: () sum of ‖x‖.
        fired: (d_sae,) number of tokens on which each latent was active.
    """

    tokens: Tensor
    squared_error: Tensor
    x_sum: Tensor
    x_square: Tensor
    x_norm: Tensor
    fired: Tensor

    @classmethod
    def of_nothing(cls, d_in: int, d_sae: int, device: torch.device) -> Self:
        """Statistics of no token: what others are merged into."""
        number = torch.zeros((), dtype=torch.int64, device=device)
        total = torch.zeros((), dtype=torch.float64, device=device)
        x_sum = torch.zeros(d_in, dtype=torch.float64, device=device)
        fired = torch.zeros(d_sae, dtype=torch.int64, device=device)
        return cls(number, total, x_sum, total, total, fired)

    def merged(self, other: Self) -> Self:
        """Statistics of the tokens of both."""
        return type(self)(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def times(self, number: int) -> Self:
        """Statistics of the same tokens so many times over; 0 leaves them out."""
        return type(self)(*(mine * number for mine in self))

    def figures(self) -> dict[str, float]:
        """What is logged of a site, by name."""
        return {
            "l0": self.l0,
            "fvu": self.fvu,
            "dead_fraction": self.dead_fraction,
            "x_norm": self.mean_norm,
        }

    @property
    def l0(self) -> float:
        """Mean number of active latents a token."""
        return (self.fired.sum() / self.tokens).item()

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained; predicting the mean of x scores exactly 1."""
        variance = self.x_square - self.x_sum.square().sum() / self.tokens
        return (self.squared_error / variance).item()

    @property
    def explained_variance(self) -> float:
        """1 − FVU; predicting the mean of x scores exactly 0."""
        return 1 - self.fvu

    @property
    def densities(self) -> Tensor:
        """(d_sae,) share of the tokens on which each latent was active."""
        return self.fired.double() / self.tokens

    def density_histogram(self) -> DensityHistogram:
        """Latents by density, in bins of half a decade."""
        alive = self.densities[self.fired > 0].log10()
        inner = torch.tensor(LOG10_DENSITY_EDGES[1:-1], dtype=alive.dtype, device=alive.device)
        counts = torch.bincount(torch.bucketize(alive, inner), minlength=len(inner) + 1)
        never = int((self.fired == 0).sum())
        return DensityHistogram(list(LOG10_DENSITY_EDGES), counts.tolist(), never)

    @property
    def dead_fraction(self) -> float:
        """Fraction of latents that were active on none of the tokens."""
        return (self.fired == 0).double().mean().item()

    @property
    def mean_norm(self) -> float:
        """Mean over tokens of ‖x‖."""
        return (self.x_norm / self.tokens).item()


class Reconstruction(NamedTuple):
    """One pass of a head over tokens, sums over them.

    Attributes:
        x_hat: (tokens, d_in), raw.
        squared_error: () sum of ‖x − x̂‖², of activations as the head reads them.
        sparsity: () sum of the sparsity loss, without its coefficient.
        auxiliary: () sum of the auxiliary loss.
        norm: () sum of ‖x‖₂, of activations as the head reads them.
        statistics: detached sums.
    """

    x_hat: Tensor
    squared_error: Tensor
    sparsity: Tensor
    auxiliary: Tensor
    norm: Tensor
    statistics: SiteStatistics


class SAELosses(NamedTuple):
    """Losses of one head, each () and a mean over tokens.

    Attributes:
        reconstruction: R, mean of ‖x − x̂‖², of activations as the head reads them.
        sparsity: S, with its coefficient.
        auxiliary: A.
        norm: ‖X‖, mean of ‖x‖₂, of activations as the head reads them.
        statistics: sums of the same tokens.
    """

    reconstruction: Tensor
    sparsity: Tensor
    auxiliary: Tensor
    norm: Tensor
    statistics: SiteStatistics

    def detached(self) -> "SAELosses":
        """The same numbers without the graph that led to them."""
        *losses, statistics = self
        return SAELosses(*(loss.detach() for loss in losses), statistics)
