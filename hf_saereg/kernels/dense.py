"""The definition: encode and decode as two whole matrix products, differentiated by autograd.

Notable:
- every other kernel returns these values and these gradients; the tests hold them to it
- under autocast the two products run in its dtype, everything else in the dtype of x
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
    pre = torch.addmm(b_enc, x, W_enc)  # (tokens, d_sae)
    if isinstance(selection, LargestK):
        indices = pre.topk(selection.k, dim=-1).indices
        pre = pre * torch.zeros_like(pre).scatter_(-1, indices, 1.0)
    return Codes(pre)


def decode(values: Tensor, codes: Codes, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """Reconstruction, (tokens, d_in), of feature activations in the layout of `codes`.

    Args:
        values: (tokens, d_sae).
        codes: the dense codes that `values` were computed from.
        W_dec: (d_sae, d_in).
        b_dec: (d_in,).
    """
    return torch.addmm(b_dec, values, W_dec)
