"""On a CPU: past the encoder product, all work in proportion to the active latents.

Notable:
- the encoder product is the only dense one of the six of a training step; it runs in chunks of
  tokens small enough for the cache, and no (tokens, d_sae) array ever exists
- values and gradients are those of `dense.py`, to rounding, and the same from run to run
- under autocast the encoder product runs in its dtype, everything else in the dtype of x: more
  exact than the dense definition there
- loops run on torch's own threads, see `team.py`
"""

import itertools
import threading

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from hf_saereg.kernels import sparse_loops as loops
from hf_saereg.kernels.chunks import chunk_size
from hf_saereg.kernels.codes import Codes, LargestK, Selection
from hf_saereg.kernels.dense import rounded_bias
from hf_saereg.kernels.product import PADDING, multiply
from hf_saereg.kernels.team import Part, even_parts, in_parts


def encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, selection: Selection) -> Codes:
    """Pre-activations of the selected latents.

    Args:
        x: (tokens, d_in), float32 or float64, on a CPU; `b_dec` already subtracted where a family
            does so.
        W_enc: (d_in, d_sae).
        b_enc: (d_sae,).
        selection: which latents may be non-zero.

    Returns:
        Sparse codes in the dtype of x.
    """
    return Codes(*_Encode.apply(x, W_enc, b_enc, selection, 1))


def encode_stack(x: Tensor, W_enc: Tensor, b_enc: Tensor, selection: Selection) -> Codes:
    """Pre-activations of several heads of one size, as `dense.encode_stack` takes them.

    Returns:
        Sparse codes: a row a head and token, head by head, with `latents` counted over all heads.
    """
    return Codes(*_Encode.apply(x.flatten(0, 1), W_enc, b_enc, selection, len(x)))


def decode(values: Tensor, codes: Codes, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """Reconstruction, (tokens, d_in), of feature activations in the layout of `codes`.

    Args:
        values: (entries,).
        codes: the sparse codes that `values` were computed from.
        W_dec: (d_sae, d_in).
        b_dec: (d_in,).
    """
    return _Decode.apply(values, codes.latents, codes.offsets, W_dec, b_dec)


def decode_stack(values: Tensor, codes: Codes, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """Reconstructions of `encode_stack`'s features, as `dense.decode_stack` returns them."""
    without_bias = decode(values, codes, W_dec, torch.zeros_like(b_dec[0]))
    return without_bias.unflatten(0, (len(b_dec), -1)) + b_dec[:, None]


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        selection: Selection,
        heads: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        pre, latents, offsets = _selected(x, W_enc, b_enc, selection, heads)
        ctx.save_for_backward(x, W_enc, latents, offsets)
        ctx.mark_non_differentiable(latents, offsets)
        return pre, latents, offsets

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        x, W_enc, latents, offsets = ctx.saved_tensors
        entries = _array(grad), _array(latents), _array(offsets)
        grad_x = grad_W = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format)
            W = _array(W_enc.T)  # (d_sae, d_in)
            in_parts(loops.gather_rows, even_parts(len(x)), *entries, W, _array(grad_x))
        if any(ctx.needs_input_grad[1:]):
            grad_W = W_enc.new_zeros(W_enc.T.shape)  # (d_sae, d_in)
            grad_b = W_enc.new_zeros(len(grad_W))
            sums = _array(grad_W), _array(grad_b)
            parts = _balanced(latents, len(grad_W))
            in_parts(loops.scatter_rows, parts, *entries, _array(x), *sums)
            grad_W = grad_W.T
        return grad_x, grad_W, grad_b, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        values: Tensor,
        latents: Tensor,
        offsets: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(values, latents, offsets, W_dec)
        x_hat = b_dec.repeat(len(offsets) - 1, 1)  # (tokens, d_in)
        entries = _array(values), _array(latents), _array(offsets)
        in_parts(loops.gather_rows, even_parts(len(x_hat)), *entries, _array(W_dec), _array(x_hat))
        return x_hat

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, latents, offsets, W_dec = ctx.saved_tensors
        entries = _array(values), _array(latents), _array(offsets)
        grad_values = values.new_empty(values.shape)
        grad_W = W_dec.new_zeros(W_dec.shape)
        in_parts(
            loops.scatter_rows_and_dot,
            _balanced(latents, len(W_dec)),
            *entries,
            _array(grad),
            _array(W_dec),
            _array(grad_W),
            _array(grad_values),
        )
        return grad_values, None, None, grad_W, grad.sum(dim=0)


def _selected(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, selection: Selection, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Pre, latents, offsets: of every head the latents that it selects of its share of the rows."""
    tokens, d_sae = len(x) // heads, len(b_enc) // heads
    pre: list[ndarray] = [_array(x.new_empty(0))]
    latents: list[ndarray] = [np.empty(0, np.int32)]
    offsets = torch.zeros(len(x) + 1, dtype=torch.int64)  # counts, until summed up
    for head in range(heads):
        rows, own = (slice(head * size, (head + 1) * size) for size in (tokens, d_sae))
        found = _selected_of_one(
            x[rows], W_enc[:, own], b_enc[own], selection.of(own), offsets[1:][rows]
        )
        pre += found[0]
        latents += [some + np.int32(head * d_sae) for some in found[1]] if head else found[1]
    whole = (torch.from_numpy(np.concatenate(parts)) for parts in (pre, latents))
    return *whole, offsets.cumsum(0)


def _selected_of_one(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, selection: Selection, counts: Tensor
) -> tuple[list[ndarray], list[ndarray]]:
    """The encoder product of one head chunk by chunk, compacted; fills in `counts` of its rows."""
    tokens, d_sae = len(x), len(b_enc)
    if isinstance(selection, LargestK):
        loop, limit = loops.select_largest, selection.k
    else:
        threshold = torch.as_tensor(selection.threshold, dtype=x.dtype)
        loop, limit = loops.select_above, _array(threshold.expand(d_sae))
    rounded = rounded_bias(x, b_enc)
    in_full = rounded is b_enc  # not rounded: then the loop adds the bias, a pass less
    rows, W, bias = x, W_enc, b_enc
    if not in_full:
        rows, W, bias = _with_bias(x, W_enc, b_enc, rounded)
    bias = _array(bias)
    row_length = d_sae + PADDING if in_full else d_sae

    # as many bytes in each chunk, whatever the dtype
    chunk = chunk_size(x, d_sae) * x.element_size() // rows.element_size()
    chunk = max(1, min(tokens, chunk))
    # Room for every latent of a chunk; the system provides only the pages that are written.
    pre = _array(_scratch("pre", chunk * d_sae, x.dtype))
    latents = _array(_scratch("latents", chunk * d_sae, torch.int32))
    found_pre, found_latents = [], []
    buffer = _scratch("product", chunk * row_length, W.dtype).view(chunk, row_length)
    for first in range(0, tokens, chunk):
        some_rows = rows[first : first + chunk]
        product = buffer[: len(some_rows)]
        if in_full:
            multiply(some_rows, W, out=product)
        else:
            torch.mm(some_rows, W, out=product)
        parts = even_parts(len(product))
        out = pre, latents, _array(counts[first:])
        for (start, _), found in zip(
            parts, in_parts(loop, parts, _product_array(product), bias, limit, *out), strict=True
        ):
            entries = slice(start * d_sae, start * d_sae + found)
            found_pre.append(pre[entries].copy())  # by numpy: a few entries, hundreds of times
            found_latents.append(latents[entries].copy())
    return found_pre, found_latents


def _with_bias(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, rounded: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and weights whose product has the bias in it, and what of the bias is left to add.

    Two more columns of ones, for the bias and for what its rounding lost: less work than a pass
    over the product.
    """
    lost = (b_enc - rounded).to(rounded.dtype)
    rows = torch.cat([x.to(rounded.dtype), rounded.new_ones(len(x), 2)], dim=1)
    W = torch.cat([W_enc.to(rounded.dtype), torch.stack([rounded, lost])])
    return rows, W, b_enc - rounded - lost


_kept = threading.local()


def _scratch(use: str, size: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised memory, (size,), the same in every call of this thread.

    Allocated anew for every batch, most of its cost would be the system's: it hands out its pages
    one by one.
    """
    kept = getattr(_kept, use, None)
    if kept is None or kept.dtype != dtype or len(kept) < size:
        kept = torch.empty(size, dtype=dtype)
        setattr(_kept, use, kept)
    return kept[:size]


def _product_array(product: Tensor) -> ndarray:
    if product.dtype == torch.bfloat16:
        return _array(product.view(torch.uint16))  # the loops widen it, numpy cannot
    return _array(product.to(torch.promote_types(product.dtype, torch.float32)))


def _array(tensor: Tensor) -> ndarray:
    return tensor.detach().contiguous().numpy()


def _balanced(latents: Tensor, d_sae: int) -> list[Part]:
    """Ranges of latents that cover `range(d_sae)`, with about equally many entries in each."""
    if torch.get_num_threads() == 1:
        return [(0, d_sae)]
    entries_up_to = torch.bincount(latents, minlength=d_sae).cumsum(0)
    shares = torch.tensor([stop for _, stop in even_parts(len(latents))][:-1], dtype=torch.int64)
    bounds = [0, *torch.searchsorted(entries_up_to, shares).tolist(), d_sae]
    return list(itertools.pairwise(bounds))
