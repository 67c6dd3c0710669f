"""Sums over tokens and over latents, on a GPU.

Notable:
- instead of atomics, sums over tokens take the entries sorted by latent, in runs of at most `RUN`,
  and add up the runs of a latent afterwards: the same bits from run to run, and a latent that is
  active everywhere keeps no program waiting
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from hf_saereg.kernels import triton_loops as loops

RUN = 64  # entries of one latent that one program adds up
ENTRIES, COLUMNS = 16, 128  # of rows that a program reads at once


class ByLatent:
    """The entries in the order of their latents, made when it is first needed.

    Args:
        latents: (entries,) int32, the latent of each entry.
        offsets: (tokens + 1,) int64, where each token's entries begin.
        d_sae: number of latents.
    """

    def __init__(self, latents: Tensor, offsets: Tensor, d_sae: int) -> None:
        self.latents = latents
        self.offsets = offsets
        self.d_sae = d_sae

    @cached_property
    def _order(self) -> tuple[Tensor, Tensor]:
        """(entries,) latents in ascending order, and where each was before."""
        return self.latents.sort(stable=True)

    @cached_property
    def _tokens(self) -> Tensor:
        """(entries,) int32, the token of each entry in this order."""
        tokens = torch.arange(len(self.offsets) - 1, dtype=torch.int32, device=self.latents.device)
        counts = self.offsets.diff()
        return tokens.repeat_interleave(counts, output_size=len(self.latents))[self._order[1]]

    @cached_property
    def _runs(self) -> tuple[Tensor, Tensor]:
        """(runs + 1,) where runs begin in this order, (d_sae + 1,) where each latent's runs begin.

        There are as many runs as can be needed at most, because the host does not know the number:
        those left over are empty.
        """
        ascending, device = self._order[0], self.latents.device
        begins = torch.searchsorted(
            ascending, torch.arange(self.d_sae + 1, dtype=ascending.dtype, device=device)
        )  # (d_sae + 1,) the first entry of each latent
        of_latents = pad(
            begins.diff().add(RUN - 1).div(RUN, rounding_mode="floor").cumsum(0), (1, 0)
        )
        most = len(ascending) // RUN + min(self.d_sae, len(ascending))
        runs = torch.arange(most + 1, device=device)
        latents = torch.searchsorted(of_latents, runs, right=True) - 1
        bounds = begins[latents] + RUN * (runs - of_latents[latents])
        return bounds.clamp(max=len(ascending)), of_latents

    def sum_rows(self, weights: Tensor, rows: Tensor) -> Tensor:
        """Each latent's sum of its tokens' rows, weighted, (d_sae, width).

        Args:
            weights: (entries,), in the order of the tokens.
            rows: (tokens, width).
        """
        bounds, of_latents = self._runs
        sums = sum_rows(weights[self._order[1]], self._tokens, bounds, rows, wide(rows.dtype))
        ones = sums.new_ones(len(sums))
        in_place = torch.arange(len(sums), dtype=torch.int32, device=sums.device)
        return sum_rows(ones, in_place, of_latents, sums, rows.dtype)

    def sum(self, weights: Tensor) -> Tensor:
        """Each latent's sum of weights, (d_sae,).

        Args:
            weights: (entries,), in the order of the tokens.
        """
        return self.sum_rows(weights, weights.new_ones(len(self.offsets) - 1, 1)).squeeze(1)


def sum_rows(
    weights: Tensor,
    indices: Tensor,
    bounds: Tensor,
    rows: Tensor,
    dtype: torch.dtype,
    first_term: Tensor | None = None,
) -> Tensor:
    """Σ_e weights[e] · rows[indices[e]] over each run of entries, (runs, width).

    Args:
        weights: (entries,).
        indices: (entries,) int32.
        bounds: (runs + 1,) int64, entries of run r are `bounds[r]:bounds[r + 1]`.
        rows: (…, width).
        dtype: of the result.
        first_term: (width,), added to each sum.
    """
    runs, width = len(bounds) - 1, rows.shape[1]
    out = rows.new_empty(runs, width, dtype=dtype)
    given = (weights.contiguous(), indices, bounds, rows.contiguous(), first_term, out, width)
    sizes = _sizes(width, dtype)
    launch(loops.sum_rows, (runs, triton.cdiv(width, sizes["COLUMNS"])), *given, **sizes)
    return out


def dot_rows(
    token_rows: Tensor, latents: Tensor, offsets: Tensor, latent_rows: Tensor, dtype: torch.dtype
) -> Tensor:
    """Each entry's ⟨row of its token, row of its latent⟩, (entries,).

    Args:
        token_rows: (tokens, width).
        latents: (entries,) int32.
        offsets: (tokens + 1,) int64, entries of token t are `offsets[t]:offsets[t + 1]`.
        latent_rows: (d_sae, width).
        dtype: of the result.
    """
    tokens, width = token_rows.shape
    out = token_rows.new_empty(len(latents), dtype=dtype)
    given = (token_rows.contiguous(), latents, offsets, latent_rows.contiguous(), out, width)
    launch(loops.dot_rows, (tokens,), *given, **_sizes(width, dtype))
    return out


def _sizes(width: int, dtype: torch.dtype) -> dict[str, Any]:
    return {"SUM": triton_dtype(dtype), "ENTRIES": ENTRIES, "COLUMNS": block(width, COLUMNS)}


def block(size: int, most: int) -> int:
    """A power of two that covers `size`, or `most` of it at a time."""
    return min(triton.next_power_of_2(size), most)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums of a dtype are taken in."""
    return torch.promote_types(dtype, torch.float32)


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Triton's name for `wide(dtype)`."""
    return tl.float64 if wide(dtype) == torch.float64 else tl.float32


def launch(
    loop: Callable, programs: tuple[int, ...], first: Tensor, *others: Any, **sizes: Any
) -> None:
    """Run a function of `triton_loops` on the device of its arguments.

    Args:
        loop: what to run.
        programs: how many, by dimension.
        first: its first argument.
        *others: its further ones.
        **sizes: its compile-time ones.
    """
    with torch.cuda.device_of(first):  # Triton's own choice is the current device
        loop[programs](first, *others, **sizes)
