"""A head in the place of its site: what the stream goes on with is the reconstruction.

Notable:
- padding is neither read nor replaced
- gradients pass, through the reconstruction, to the head and to what came before it
"""

import torch
from torch import Tensor

from hf_saereg.heads.base import SAEHead
from hf_saereg.heads.statistics import SiteStatistics


class Splice:
    """Replaces a site's activations by a head's reconstruction and keeps count.

    Args:
        head: of the site.
        mask: (batch, sequence) of the next batch, 0 at padding; None when there is none. May be set
            anew before each batch.
    """

    def __init__(self, head: SAEHead, mask: Tensor | None = None) -> None:
        self.head = head
        self.mask = mask
        config, device = head.config, head.W_dec.device
        # of all batches so far
        self.statistics = SiteStatistics.of_nothing(config.d_in, config.d_sae, device)

    def __call__(self, x: Tensor) -> Tensor:
        """Reconstruction of x, (batch, sequence, d_in), with padding as it was."""
        if self.mask is None:
            reconstruction = self.head.reconstruct(x.flatten(0, -2))
            replaced = reconstruction.x_hat.to(x.dtype).view(x.shape)
        else:
            mask = self.mask.bool()
            reconstruction = self.head.reconstruct(x[mask])
            replaced = torch.index_put(x, (mask,), reconstruction.x_hat.to(x.dtype))
        self.statistics = self.statistics.merged(reconstruction.statistics)
        return replaced
