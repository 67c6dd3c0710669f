"""A head in the place of its site: what the stream goes on with is the reconstruction.

Notable:
- a token that is not read, such as padding, is not replaced either
- gradients pass, through the reconstruction, to the head and to what came before it
"""

import torch
from torch import Tensor

from hf_saereg.heads.base import SAEHead
from hf_saereg.heads.statistics import SiteStatistics
from hf_saereg.heads.tokens import tokens_read


class Splice:
    """Replaces a site's activations by a head's reconstruction and keeps count.

    Args:
        head: of the site.
        mask: (batch, sequence) of the next batch, 0 where a token is not read; None where all are.
            May be set anew before each batch.
    """

    def __init__(self, head: SAEHead, mask: Tensor | None = None) -> None:
        self.head = head
        self.mask = mask
        config, device = head.config, head.W_dec.device
        # of all batches so far
        self.statistics = SiteStatistics.of_nothing(config.d_in, config.d_sae, device)

    def __call__(self, x: Tensor) -> Tensor:
        """Reconstruction of x, (batch, sequence, d_in); what is not read stays as it was."""
        reconstruction = self.head.reconstruct(tokens_read(x, self.mask))
        self.statistics = self.statistics.merged(reconstruction.statistics)
        x_hat = reconstruction.x_hat.to(x.dtype)
        if self.mask is None:
            return x_hat.view(x.shape)
        return torch.index_put(x, (self.mask.bool(),), x_hat)


class Ablation:
    """Replaces a site's activations by one and the same vector.

    Args:
        vector: (d_in,).
        mask: as a `Splice` has it.
    """

    def __init__(self, vector: Tensor, mask: Tensor | None = None) -> None:
        self.vector = vector
        self.mask = mask

    def __call__(self, x: Tensor) -> Tensor:
        """The vector at every token of x, (batch, sequence, d_in), that is read."""
        replaced = self.vector.to(x.dtype).expand_as(x)
        return replaced if self.mask is None else replaced.where(self.mask[..., None], x)
