"""AuxK: dead latents are trained to reconstruct what the living ones leave over.

See: Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093), section 2.4.
"""

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_saereg import kernels
from hf_saereg.kernels.chunks import chunk_size, in_chunks
from hf_saereg.kernels.codes import LargestK

if TYPE_CHECKING:
    from hf_saereg.heads.base import SAEHead


def auxk_loss(head: "SAEHead", centred: Tensor, error: Tensor) -> Tensor:
    """α ‖e − ê‖², ê from the `auxk` largest dead latents of each token, () and a sum over tokens.

    Args:
        head: with `auxk` above 0.
        centred: (tokens, d_in) what its encoder reads, `b_dec` subtracted.
        error: (tokens, d_in) e = x − x̂, detached.

    Returns:
        Zero while no latent is dead.
    """
    dead = head.dead.nonzero().squeeze(1)  # (dead,)
    if len(dead) == 0:
        return error.new_zeros(())
    k = min(head.config.auxk, len(dead))
    selection = LargestK(k)
    weight, bias = head.encoder_weight.index_select(1, dead), head.encoder_bias[dead]
    W_dec, origin = head.W_dec.index_select(0, dead), torch.zeros_like(head.b_dec)
    kernel = kernels.pick(head.kernel, k / len(dead), weight)

    def one_pass(centred: Tensor) -> tuple[Tensor]:
        codes = kernel.encode(centred, weight, bias, selection)
        return (kernel.decode(torch.relu(codes.pre), codes, W_dec, origin),)

    if kernel is kernels.dense:
        one_pass = partial(in_chunks, one_pass, chunk_size(centred, len(dead)))
    (error_hat,) = one_pass(centred)  # (tokens, d_in)
    return head.config.auxk_coefficient * (error - error_hat).square().sum()
