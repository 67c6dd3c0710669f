"""What a pass of a head over tokens returns: losses, and sums from which every figure follows.

Notable:
- `SiteStatistics` are sums, so they add up over batches and processes without rounding tricks
"""

from typing import NamedTuple, Self

from torch import Tensor


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

    def merged(self, other: Self) -> Self:
        """Statistics of the tokens of both."""
        return type(self)(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

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
