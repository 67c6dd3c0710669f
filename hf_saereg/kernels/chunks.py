"""How many tokens go through the encoder at once, so that no whole (tokens, d_sae) array is alive.

Notable:
- on a CPU what a chunk computes stays in the cache: the dense definition is more than twice as fast
  in chunks as on whole arrays, although its backward pass computes the encoder product again
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# elements of a (tokens, d_sae) array at once
CPU_ELEMENTS = 2**20  # the fastest of 2**16 … 2**22, or next to it, on 2 cores with 1 MiB L2 each
ACCELERATOR_ELEMENTS = 2**24  # enough work to fill it


def chunk_size(x: Tensor, d_sae: int) -> int:
    """Tokens of a chunk: few, but no fewer than make its weight gradients worth their memory.

    Args:
        x: (tokens, d_in).
        d_sae: number of latents.
    """
    elements = CPU_ELEMENTS if x.device.type == "cpu" else ACCELERATOR_ELEMENTS
    return max(elements // d_sae, x.shape[1])


def in_chunks(
    one_pass: Callable[..., tuple[Tensor, ...]], rows: int, *tensors: Tensor
) -> tuple[Tensor, ...]:
    """Results of `one_pass(*tensors)`, a few tokens at a time.

    With several chunks nothing that a chunk computed is kept for the backward pass, which computes
    it again.

    Args:
        one_pass: its first result has a row a token, the others are sums over tokens.
        rows: tokens of a chunk.
        *tensors: (tokens, ...) each.
    """
    chunks = list(zip(*(tensor.split(rows) for tensor in tensors), strict=True))
    if len(chunks) == 1:
        return one_pass(*tensors)
    if torch.is_grad_enabled():
        one_pass = partial(checkpoint, one_pass, use_reentrant=False, preserve_rng_state=False)
    by_token, *sums = zip(*(one_pass(*chunk) for chunk in chunks), strict=True)
    return torch.cat(by_token), *(torch.stack(parts).sum(dim=0) for parts in sums)
