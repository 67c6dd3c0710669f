"""The definition: encode and decode as two matrix products, differentiated by autograd.

Notable:
- every other kernel returns these values and these gradients; the tests hold them to it
- under autocast the two products run in its dtype, everything else in the dtype of x: what a
  bias loses with the product is given back, or a large one would drown what is left of it
"""

import torch
from torch import Tensor

from hf_saereg.kernels.codes import Codes, LargestK, Selection


def encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, selection: Selection) -> Codes:
    """Pre-activations of all latents.

    Args:
        x: (tokens, d_in), `b_dec` already subtracted where a family does so.
        W_enc: (d_in, d_sae).
        b_enc: (d_sae,).
        selection: which latents may be non-zero; `Above` needs no mask here, because the family's
            own activation is zero below the threshold.

    Returns:
        Dense codes, `pre` of shape (tokens, d_sae).
    """
    rounded = rounded_bias(x, b_enc)
    pre = torch.addmm(rounded, x, W_enc)  # (tokens, d_sae)
    if rounded is not b_enc:
        pre = pre + (b_enc - rounded)  # in the dtype of x again
    if isinstance(selection, LargestK):
        indices = pre.topk(selection.k, dim=-1).indices
        pre = pre * torch.zeros_like(pre).scatter_(-1, indices, 1.0)
    return Codes(pre)


def rounded_bias(x: Tensor, b_enc: Tensor) -> Tensor:
    """The part of `b_enc`, (d_sae,), that the product adds: all, or what autocast's dtype holds."""
    # float64 is left alone by autocast
    if torch.is_autocast_enabled(x.device.type) and x.dtype == torch.float32:
        return b_enc.detach().to(torch.get_autocast_dtype(x.device.type))
    return b_enc


def decode(values: Tensor, codes: Codes, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """Reconstruction, (tokens, d_in), of feature activations in the layout of `codes`.

    Args:
        values: (tokens, d_sae).
        codes: the dense codes that `values` were computed from.
        W_dec: (d_sae, d_in).
        b_dec: (d_in,).
    """
    return torch.addmm(b_dec, values, W_dec)
