"""What the encoder hands to the rest of a sparse autoencoder: the pre-activations that matter.

Notable:
- past the encoder product, loss and gradients of a sparse autoencoder depend only on the latents
  that a family selects, so a family is written once, elementwise, over `Codes.pre`
- dense codes hold every latent of every token; sparse codes hold the selected entries, row by row
- `Codes.at` makes both layouts look the same to a family: per-latent parameters broadcast over
  dense codes and are gathered for sparse ones
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Above:
    """Select the latents whose pre-activation exceeds `threshold`: one number, or (d_sae,)."""

    threshold: float | Tensor = 0.0

    def of(self, latents: slice) -> "Above":
        """The same of some of the latents."""
        if isinstance(self.threshold, Tensor) and self.threshold.ndim:
            return Above(self.threshold[latents])
        return self


@dataclass(frozen=True)
class LargestK:
    """Select the `k` largest pre-activations of each token."""

    k: int

    def of(self, latents: slice) -> "LargestK":
        """The same of some of the latents: k is a head's, however many share the latents."""
        return self


Selection = Above | LargestK


class Codes(NamedTuple):
    """Pre-activations of one batch of tokens, whole or only where they were selected.

    Attributes:
        pre: (tokens, d_sae) when dense, with 0 where `LargestK` did not select; (entries,) when
            sparse, grouped by token.
        latents: (entries,) int32, the latent of each entry; None when dense.
        offsets: (tokens + 1,) int64, entries of token t are `offsets[t]:offsets[t + 1]`; None when
            dense.
    """

    pre: Tensor
    latents: Tensor | None = None
    offsets: Tensor | None = None

    def at(self, per_latent: Tensor) -> Tensor:
        """A (d_sae,) parameter in the shape of `pre` (broadcastable when dense)."""
        if self.latents is None:
            return per_latent
        # not per_latent[latents], whose gradient is summed in an order that varies on a CPU
        return per_latent.index_select(0, self.latents)

    def counts(self, active: Tensor, d_sae: int) -> Tensor:
        """Number of tokens on which each latent is active, (d_sae,) int64.

        Args:
            active: bool, the shape of `pre`.
            d_sae: number of latents.
        """
        if self.latents is None:
            return active.sum(dim=0)
        counts = torch.zeros(d_sae, dtype=torch.int64, device=active.device)
        return counts.index_add_(0, self.latents, active.long())
