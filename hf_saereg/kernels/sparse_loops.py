"""The loops of the sparse kernel, compiled by numba: each does one part of the tokens or latents.

Notable:
- no loop starts threads: `sparse.py` hands the parts to threads of its own, so that numba's
  threading layers (which abort after a fork, or under concurrent callers) are never loaded
- loops that sum over tokens own a range of latents and visit tokens in order: the result depends
  neither on timing nor on the number of threads
- comparisons are written `not (value <= threshold)`, so that a NaN is selected and reaches the
  loss, as it does in the dense definition
- compiled code is cached on disk; where no directory is writable each process compiles its own
"""

from collections.abc import Callable

import numpy as np
from numba import njit, types
from numba.extending import overload
from numpy import ndarray

# Sums may be reordered into SIMD lanes; NaN and infinity keep their meaning.
_REORDER = {"reassoc", "contract", "nsz"}


def _compiled(loop: Callable) -> Callable:
    options = {"nogil": True, "fastmath": _REORDER, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(loop)
    except RuntimeError:  # numba found nowhere to write its cache
        return njit(**options)(loop)


def _widen(raw: float) -> float:
    """A number of the encoder product; bfloat16 arrives as its 16 bits, unknown to numpy."""


@overload(_widen, inline="always")
def _widen_by_type(raw: float) -> Callable:
    def as_it_is(raw: float) -> float:
        return raw

    def from_bfloat16(raw: float) -> float:
        return np.uint32(np.uint32(raw) << np.uint32(16)).view(np.float32)

    return from_bfloat16 if raw == types.uint16 else as_it_is


@_compiled
def _positions(flags: ndarray, words: ndarray, d_sae: int, latents: ndarray, end: int) -> int:
    """Write where `flags` are set to `latents` from `end` on; the new end.

    Everything is written and then kept or
    overwritten: with few flags at unforeseeable places, branches would cost more.

    Args:
        flags: (a multiple of 8,) uint8, 0 or 1, 0 from `d_sae` on.
        words: the same memory as uint64, eight flags at a time.
        d_sae: number of latents.
        latents: int32, with room for as many as are set.
        end: where to start.
    """
    hits = np.empty(words.size, np.int32)
    found = 0
    for word in range(words.size):
        hits[found] = word
        found += words[word] != 0
    for hit in range(found):
        base = 8 * hits[hit]
        for j in range(base, min(base + 8, d_sae)):
            latents[end] = j
            end += flags[j]
    return end


@_compiled
def select_above(
    start: int,
    stop: int,
    product: ndarray,
    bias: ndarray,
    thresholds: ndarray,
    pre: ndarray,
    latents: ndarray,
    counts: ndarray,
) -> int:
    """Compact the entries above their latent's threshold.

    Args:
        start: first token of this part.
        stop: token after the last one.
        product: (tokens, d_sae or more), what the encoder product holds; uint16 stands for
            bfloat16.
        bias: (d_sae,), added to each row of the product.
        thresholds: (d_sae,).
        pre: (tokens * d_sae,), written from `start * d_sae` on.
        latents: (tokens * d_sae,) int32, likewise.
        counts: (tokens,), number of entries of each token.

    Returns:
        Number of entries of this part.
    """
    d_sae = bias.size
    flags = np.zeros(-(-d_sae // 8) * 8, np.uint8)
    words = flags.view(np.uint64)
    first = start * d_sae
    end = first
    for token in range(start, stop):
        raw = product[token]
        for j in range(d_sae):
            value = _widen(raw[j]) + bias[j]
            flags[j] = not (value <= thresholds[j])
        token_first = end
        end = _positions(flags, words, d_sae, latents, end)
        for entry in range(token_first, end):
            latent = latents[entry]
            pre[entry] = _widen(raw[latent]) + bias[latent]
        counts[token] = end - token_first
    return end - first


@_compiled
def _straddle(values: ndarray, k: int) -> tuple[float, float, int]:
    """Bounds low < high around the k-th largest of finite `values`, by bisection.

    More than `low` are at least k; more than `high` are fewer than k, and how many is returned as
    the third. If more than k exceed `low`, those up to `high` all equal it.
    """
    low, high = values[0], values[0]
    for i in range(values.size):
        low = values[i] if values[i] < low else low
        high = values[i] if values[i] > high else high
    above_low, above_high = 0, 0
    for i in range(values.size):
        above_low += values[i] > low
    if above_low < k:  # the k-th largest is the smallest
        return -np.inf, low, above_low
    while above_low > k:
        middle = low + (high - low) / 2
        if not low < middle < high:
            break
        above = 0
        for i in range(values.size):
            above += values[i] > middle
        if above >= k:
            low, above_low = middle, above
        else:
            high, above_high = middle, above
    return low, high, above_high


@_compiled
def select_largest(
    start: int,
    stop: int,
    product: ndarray,
    bias: ndarray,
    k: int,
    pre: ndarray,
    latents: ndarray,
    counts: ndarray,
) -> int:
    """Compact the k largest entries of each token; of equal ones the lower latents.

    The row is folded to a few times k group maxima; at least k entries exceed what k maxima
    exceed, and hardly more: exact selection then is among these few.

    Args and return value as for `select_above`, with k in the place of the thresholds.
    """
    d_sae = bias.size
    groups = min(d_sae, 8 * k)
    # Ranks are of finite numbers, NaN the largest, as in torch.topk.
    largest = bias.dtype.type(np.finfo(bias.dtype).max / 4)
    row = np.empty(d_sae, bias.dtype)
    ranked = np.empty(d_sae, bias.dtype)
    maxima = np.empty(groups, bias.dtype)
    candidates = np.empty(d_sae, np.int32)
    candidate_values = np.empty(d_sae, bias.dtype)
    flags = np.zeros(-(-d_sae // 8) * 8, np.uint8)
    words = flags.view(np.uint64)
    first = start * d_sae
    end = first
    for token in range(start, stop):
        raw = product[token]
        for j in range(d_sae):
            value = _widen(raw[j]) + bias[j]
            row[j] = value
            value = value if value < largest else largest
            ranked[j] = value if value > -largest else -largest
        maxima[:] = ranked[:groups]
        for base in range(groups, d_sae, groups):
            members = ranked[base : base + groups]
            for j in range(members.size):
                maxima[j] = max(maxima[j], members[j])
        low = _straddle(maxima, k)[0]
        for j in range(d_sae):
            flags[j] = ranked[j] > low
        found = _positions(flags, words, d_sae, candidates, 0)
        for i in range(found):
            candidate_values[i] = ranked[candidates[i]]

        low, high, above = _straddle(candidate_values[:found], k)
        ties = k - above
        for i in range(found):
            tied = low < candidate_values[i] <= high
            if candidate_values[i] > high or (tied and ties > 0):
                ties -= tied
                latents[end] = candidates[i]
                pre[end] = row[candidates[i]]
                end += 1
        counts[token] = k
    return end - first


@_compiled
def gather_rows(
    start: int,
    stop: int,
    weights: ndarray,
    latents: ndarray,
    offsets: ndarray,
    rows: ndarray,
    out: ndarray,
) -> None:
    """Add to each token's `out` its entries' rows, weighted.

    Args:
        start: first token of this part.
        stop: token after the last one.
        weights: (entries,).
        latents: (entries,) int32.
        offsets: (tokens + 1,) int64.
        rows: (d_sae, d_in).
        out: (tokens, d_in), added to.
    """
    for token in range(start, stop):
        for entry in range(offsets[token], offsets[token + 1]):
            weight = weights[entry]
            row = rows[latents[entry]]
            for i in range(rows.shape[1]):
                out[token, i] += weight * row[i]


@_compiled
def scatter_rows(
    start: int,
    stop: int,
    weights: ndarray,
    latents: ndarray,
    offsets: ndarray,
    rows: ndarray,
    out: ndarray,
    out_bias: ndarray,
) -> None:
    """Add to each latent's `out` its tokens' rows, weighted, and to `out_bias` the weights.

    Args:
        start: first latent of this part.
        stop: latent after the last one.
        weights: (entries,).
        latents: (entries,) int32.
        offsets: (tokens + 1,) int64.
        rows: (tokens, d_in).
        out: (d_sae, d_in), added to.
        out_bias: (d_sae,), added to.
    """
    for token in range(rows.shape[0]):
        row = rows[token]
        for entry in range(offsets[token], offsets[token + 1]):
            latent = latents[entry]
            if start <= latent < stop:
                weight = weights[entry]
                out_bias[latent] += weight
                for i in range(rows.shape[1]):
                    out[latent, i] += weight * row[i]


@_compiled
def scatter_rows_and_dot(
    start: int,
    stop: int,
    weights: ndarray,
    latents: ndarray,
    offsets: ndarray,
    rows: ndarray,
    latent_rows: ndarray,
    out: ndarray,
    out_weights: ndarray,
) -> None:
    """Like `scatter_rows` without the bias; `out_weights` is each entry's ⟨row, latent row⟩.

    Args:
        start: first latent of this part.
        stop: latent after the last one.
        weights: (entries,).
        latents: (entries,) int32.
        offsets: (tokens + 1,) int64.
        rows: (tokens, d_in).
        latent_rows: (d_sae, d_in).
        out: (d_sae, d_in), added to.
        out_weights: (entries,), set.
    """
    for token in range(rows.shape[0]):
        row = rows[token]
        for entry in range(offsets[token], offsets[token + 1]):
            latent = latents[entry]
            if start <= latent < stop:
                weight = weights[entry]
                dot = row[0] * latent_rows[latent, 0]
                for i in range(1, rows.shape[1]):
                    dot += row[i] * latent_rows[latent, i]
                out_weights[entry] = dot
                for i in range(rows.shape[1]):
                    out[latent, i] += weight * row[i]
