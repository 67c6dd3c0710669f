"""The functions of the Triton kernel: each program owns a token, or a run of entries.

Notable:
- no program adds to what another one wrote: there are no atomics, sums have one order, and the
  result is the same from run to run
- sums run in `SUM`: float64 for float64, float32 for everything narrower
- comparisons are written `not (value <= threshold)`, so that a NaN is selected and reaches the
  loss, as it does in the dense definition
"""

import triton
import triton.language as tl


@triton.jit
def _above(
    product: tl.tensor,
    bias: tl.tensor,
    thresholds: tl.tensor,
    token: tl.tensor,
    latents: tl.tensor,
    d_sae: tl.tensor,
    SUM: tl.constexpr,
) -> tl.tuple:
    """Pre-activations of some latents of a token, and which of them exceed their threshold."""
    inside = latents < d_sae
    raw = tl.load(product + token * d_sae + latents, mask=inside, other=0.0).to(SUM)
    pre = raw + tl.load(bias + latents, mask=inside, other=0.0).to(SUM)
    threshold = tl.load(thresholds + latents, mask=inside, other=0.0).to(SUM)
    return pre, inside & ~(pre <= threshold)


@triton.jit
def count_above(
    product: tl.tensor,
    bias: tl.tensor,
    thresholds: tl.tensor,
    counts: tl.tensor,
    d_sae: tl.tensor,
    SUM: tl.constexpr,
    LATENTS: tl.constexpr,
) -> None:
    """Count the entries of each token above their latent's threshold; a program a token.

    Args:
        product: (tokens, d_sae), what the encoder product holds.
        bias: (d_sae,), added to each row of the product.
        thresholds: (d_sae,).
        counts: (tokens,) int32, set.
        d_sae: number of latents.
        SUM: dtype of bias and product together.
        LATENTS: looked at together.
    """
    token = tl.program_id(0).to(tl.int64)
    found = 0
    for first in range(0, d_sae, LATENTS):
        latents = first + tl.arange(0, LATENTS)
        _, selected = _above(product, bias, thresholds, token, latents, d_sae, SUM)
        found += tl.sum(selected.to(tl.int32), 0)
    tl.store(counts + token, found)


@triton.jit
def fill_above(
    product: tl.tensor,
    bias: tl.tensor,
    thresholds: tl.tensor,
    starts: tl.tensor,
    pre: tl.tensor,
    latents: tl.tensor,
    d_sae: tl.tensor,
    SUM: tl.constexpr,
    LATENTS: tl.constexpr,
) -> None:
    """Write the entries that `count_above` counted; a program a token.

    Args:
        product: as for `count_above`, like `bias`, `thresholds`, `d_sae`, `SUM` and `LATENTS`.
        bias: see there.
        thresholds: see there.
        starts: (tokens,) int64, where the entries of each token begin.
        pre: (entries,), set.
        latents: (entries,) int32, set.
        d_sae: see there.
        SUM: see there.
        LATENTS: see there.
    """
    token = tl.program_id(0).to(tl.int64)
    end = tl.load(starts + token)
    for first in range(0, d_sae, LATENTS):
        candidates = first + tl.arange(0, LATENTS)
        values, selected = _above(product, bias, thresholds, token, candidates, d_sae, SUM)
        ranks = tl.cumsum(selected.to(tl.int32), 0)  # from 1 on
        entries = end + ranks - 1
        tl.store(pre + entries, values, mask=selected)
        tl.store(latents + entries, candidates, mask=selected)
        end += tl.sum(selected.to(tl.int32), 0)


@triton.jit
def sum_rows(
    weights: tl.tensor,
    indices: tl.tensor,
    bounds: tl.tensor,
    rows: tl.tensor,
    first_term: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    SUM: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Σ_e weights[e] · rows[indices[e]] over each run of entries; programs (runs, columns).

    Args:
        weights: (entries,).
        indices: (entries,) int32.
        bounds: (runs + 1,) int64, entries of run r are `bounds[r]` to `bounds[r + 1]`.
        rows: (…, width).
        first_term: (width,), or None.
        out: (runs, width), set.
        width: of a row.
        SUM: dtype of the sum.
        ENTRIES: added together.
        COLUMNS: of a program.
    """
    run = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_row = columns < width
    last = tl.load(bounds + run + 1)
    parts = tl.full((ENTRIES, COLUMNS), 0.0, SUM)
    for first in range(tl.load(bounds + run), last, ENTRIES):
        entries = first + tl.arange(0, ENTRIES)
        inside = entries < last
        weight = tl.load(weights + entries, mask=inside, other=0.0).to(SUM)
        index = tl.load(indices + entries, mask=inside, other=0).to(tl.int64)
        places = rows + index[:, None] * width + columns[None, :]
        both = inside[:, None] & in_row[None, :]
        parts += weight[:, None] * tl.load(places, mask=both, other=0.0).to(SUM)
    total = tl.sum(parts, 0)
    if first_term is not None:
        total += tl.load(first_term + columns, mask=in_row, other=0.0).to(SUM)
    tl.store(out + run * width + columns, total, mask=in_row)


@triton.jit
def dot_rows(
    token_rows: tl.tensor,
    latents: tl.tensor,
    offsets: tl.tensor,
    latent_rows: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    SUM: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Each entry's ⟨row of its token, row of its latent⟩; a program a token.

    Args:
        token_rows: (tokens, width).
        latents: (entries,) int32.
        offsets: (tokens + 1,) int64, entries of token t are `offsets[t]` to `offsets[t + 1]`.
        latent_rows: (d_sae, width).
        out: (entries,), set.
        width: of a row.
        SUM: dtype of the sum.
        ENTRIES: of a token at once.
        COLUMNS: of a row at once.
    """
    token = tl.program_id(0).to(tl.int64)
    last = tl.load(offsets + token + 1)
    for first in range(tl.load(offsets + token), last, ENTRIES):
        entries = first + tl.arange(0, ENTRIES)
        inside = entries < last
        latent = tl.load(latents + entries, mask=inside, other=0).to(tl.int64)
        parts = tl.full((ENTRIES, COLUMNS), 0.0, SUM)
        for column in range(0, width, COLUMNS):
            columns = column + tl.arange(0, COLUMNS)
            in_row = columns < width
            left = tl.load(token_rows + token * width + columns, mask=in_row, other=0.0).to(SUM)
            places = latent_rows + latent[:, None] * width + columns[None, :]
            both = inside[:, None] & in_row[None, :]
            parts += left[None, :] * tl.load(places, mask=both, other=0.0).to(SUM)
        tl.store(out + entries, tl.sum(parts, 1), mask=inside)
