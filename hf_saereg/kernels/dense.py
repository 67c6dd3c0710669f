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
    return Codes(_masked(pre, selection))


def _masked(pre: Tensor, selection: Selection) -> Tensor:
    if isinstance(selection, LargestK):
        indices = pre.topk(selection.k, dim=-1).indices
        return pre * torch.zeros_like(pre).scatter_(-1, indices, 1.0)
    return pre


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


def encode_stack(x: Tensor, W_enc: Tensor, b_enc: Tensor, selection: Selection) -> Codes:
    """Pre-activations of several heads of one size, each of its own tokens.

    Args:
        x: (heads, tokens, d_in), `b_dec` already subtracted.
        W_enc: (d_in, heads · d_sae), one head after the other.
        b_enc: (heads · d_sae,).
        selection: as of `encode`, with a threshold for every latent of every head.

    Returns:
        Dense codes, `pre` of shape (tokens, heads · d_sae).
    """
    heads, tokens, _ = x.shape
    W = W_enc.unflatten(1, (heads, -1)).transpose(0, 1)  # (heads, d_in, d_sae)
    pre = torch.baddbmm(b_enc.view(heads, 1, -1), x, W)
    return Codes(_masked(pre, selection).transpose(0, 1).reshape(tokens, -1))


def decode_stack(values: Tensor, codes: Codes, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """Reconstructions, (heads, tokens, d_in), of `encode_stack`'s features.

    Args:
        values: (tokens, heads · d_sae).
        codes: that `values` were computed from.
        W_dec: (heads · d_sae, d_in).
        b_dec: (heads, d_in).
    """
    heads = len(b_dec)
    features = values.unflatten(1, (heads, -1)).transpose(0, 1)  # (heads, tokens, d_sae)
    return torch.baddbmm(b_dec[:, None], features, W_dec.unflatten(0, (heads, -1)))
