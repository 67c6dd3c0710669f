"""On a GPU: past the encoder product, all work in proportion to the active latents.

Notable:
- the encoder product is the only dense one of the six of a training step; torch computes it in
  chunks of tokens, and no (tokens, d_sae) array ever exists
- values and gradients are those of `dense.py`, to rounding, in one order of summation
- under autocast the encoder product runs in its dtype, everything else in the dtype of x: more
  exact than the dense definition there
- the host waits once a chunk for the number of its entries; `LargestK`, which knows it, never waits
- without a GPU it runs, slowly, where TRITON_INTERPRET=1 was set before Triton was imported
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import pad

from hf_saereg.kernels import triton_loops as loops
from hf_saereg.kernels.chunks import chunk_size
from hf_saereg.kernels.codes import Codes, LargestK, Selection
from hf_saereg.kernels.dense import rounded_bias
from hf_saereg.kernels.triton_sums import ByLatent, block, dot_rows, launch, sum_rows, triton_dtype

LATENTS = 1024  # of a token that a program looks at at once


class SortableCodes(Codes):
    """Sparse codes that know their entries in the order of latents, too."""

    by_latent: ByLatent

    def at(self, per_latent: Tensor) -> Tensor:
        """A (d_sae,) parameter in the shape of `pre`; its gradient has one order of summation."""
        return _At.apply(per_latent, self.latents, self.by_latent)


def encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, selection: Selection) -> SortableCodes:
    """Pre-activations of the selected latents.

    Args:
        x: (tokens, d_in), on a GPU; `b_dec` already subtracted where a family does so.
        W_enc: (d_in, d_sae).
        b_enc: (d_sae,).
        selection: which latents may be non-zero.

    Returns:
        Sparse codes in the dtype of x.
    """
    pre, latents, offsets, by_latent = _Encode.apply(x, W_enc, b_enc, selection)
    codes = SortableCodes(pre, latents, offsets)
    codes.by_latent = by_latent
    return codes


def decode(values: Tensor, codes: SortableCodes, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """Reconstruction, (tokens, d_in), of feature activations in the layout of `codes`.

    Args:
        values: (entries,).
        codes: what `encode` returned, from which `values` were computed.
        W_dec: (d_sae, d_in).
        b_dec: (d_in,).
    """
    return _Decode.apply(values, codes.latents, codes.offsets, W_dec, b_dec, codes.by_latent)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, W_enc: Tensor, b_enc: Tensor, selection: Selection
    ) -> tuple[Tensor, Tensor, Tensor, ByLatent]:
        pre, latents, offsets = _selected(x, W_enc, b_enc, selection)
        ctx.save_for_backward(x, W_enc, latents, offsets)
        ctx.by_latent = ByLatent(latents, offsets, len(b_enc))
        ctx.mark_non_differentiable(latents, offsets)
        return pre, latents, offsets, ctx.by_latent

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        x, W_enc, latents, offsets = ctx.saved_tensors
        needs_x, needs_W, needs_b, _ = ctx.needs_input_grad
        return (
            sum_rows(grad, latents, offsets, W_enc.T, x.dtype) if needs_x else None,
            ctx.by_latent.sum_rows(grad, x).T if needs_W else None,
            ctx.by_latent.sum(grad) if needs_b else None,
            None,
        )


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        values: Tensor,
        latents: Tensor,
        offsets: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        by_latent: ByLatent,
    ) -> Tensor:
        ctx.save_for_backward(values, latents, offsets, W_dec)
        ctx.by_latent = by_latent
        return sum_rows(values, latents, offsets, W_dec, W_dec.dtype, b_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, latents, offsets, W_dec = ctx.saved_tensors
        needs_values, _, _, needs_W, needs_b, _ = ctx.needs_input_grad
        return (
            dot_rows(grad, latents, offsets, W_dec, values.dtype) if needs_values else None,
            None,
            None,
            ctx.by_latent.sum_rows(values, grad) if needs_W else None,
            grad.sum(dim=0) if needs_b else None,
            None,
        )


class _At(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, per_latent: Tensor, latents: Tensor, by_latent: ByLatent
    ) -> Tensor:
        ctx.by_latent = by_latent
        return per_latent.index_select(0, latents)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.by_latent.sum(grad), None, None


def _selected(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, selection: Selection
) -> tuple[Tensor, Tensor, Tensor]:
    """The encoder product chunk by chunk, compacted: pre, latents, offsets."""
    rounded = rounded_bias(x, b_enc)
    # what the product does not add
    bias = torch.zeros_like(b_enc) if rounded is b_enc else b_enc - rounded
    rows, W = x.to(rounded.dtype), W_enc.to(rounded.dtype)
    if isinstance(selection, LargestK):
        compact, limit = _largest, selection.k
    else:
        threshold = torch.as_tensor(selection.threshold, dtype=x.dtype, device=x.device)
        compact, limit = _above, threshold.expand(len(b_enc)).contiguous()
    found = [
        compact(torch.addmm(rounded, some_rows, W), bias, limit, x.dtype)
        for some_rows in rows.split(chunk_size(x, len(b_enc)))
    ]
    pre, latents, counts = (torch.cat(parts) for parts in zip(*found, strict=True))
    return pre, latents, pad(counts.cumsum(0), (1, 0))


def _above(
    product: Tensor, bias: Tensor, thresholds: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Entries above their latent's threshold: pre, latents, and how many each token has."""
    tokens, d_sae = product.shape
    given = (product, bias, thresholds)
    sizes = {"SUM": triton_dtype(dtype), "LATENTS": block(d_sae, LATENTS)}
    counts = product.new_empty(tokens, dtype=torch.int32)
    launch(loops.count_above, (tokens,), *given, counts, d_sae, **sizes)
    ends = counts.cumsum(0)
    entries = ends[-1:].sum().item()
    pre = product.new_empty(entries, dtype=dtype)
    latents = product.new_empty(entries, dtype=torch.int32)
    launch(loops.fill_above, (tokens,), *given, ends - counts, pre, latents, d_sae, **sizes)
    return pre, latents, counts


def _largest(
    product: Tensor, bias: Tensor, k: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest entries of each token: pre, latents, and how many each token has."""
    pre, latents = product.to(dtype).add(bias).topk(k)
    counts = product.new_full((len(product),), k, dtype=torch.int32)
    return pre.flatten(), latents.flatten().int(), counts
