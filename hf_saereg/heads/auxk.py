"""AuxK: dead latents are trained to reconstruct what the living ones leave over.

See: Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093), section 2.4.
"""

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hf_saereg import kernels
from hf_saereg.kernels.chunks import chunk_size, in_chunks
from hf_saereg.kernels.codes import LargestK

if TYPE_CHECKING:
    from hf_saereg.heads.base import SAEHead


class DeadReaders(NamedTuple):
    """What dead latents read and write with.

    Attributes:
        W_enc: (d_in, d_sae).
        b_enc: (d_sae,).
        W_dec: (d_sae, d_in).
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor


def auxk_loss(head: "SAEHead", own: DeadReaders, centred: Tensor, error: Tensor) -> Tensor:
    """α ‖e − ê‖², ê from the `auxk` largest dead latents of each token, () and a sum over tokens.

    Args:
        head: with `auxk` above 0; it tells which latents are dead.
        own: its weights, as the tensors that the gradients are to reach.
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
    W_enc, b_enc = own.W_enc.index_select(1, dead), own.b_enc[dead]
    W_dec, origin = own.W_dec.index_select(0, dead), error.new_zeros(error.shape[1])
    kernel = kernels.pick(head.kernel, k / len(dead), W_enc)

    def one_pass(centred: Tensor) -> tuple[Tensor]:
        codes = kernel.encode(centred, W_enc, b_enc, selection)
        return (kernel.decode(torch.relu(codes.pre), codes, W_dec, origin),)

    if kernel is kernels.dense:
        one_pass = partial(in_chunks, one_pass, chunk_size(centred, len(dead)))
    (error_hat,) = one_pass(centred)  # (tokens, d_in)
    return head.config.auxk_coefficient * (error - error_hat).square().sum()
