"""The threshold that lets a given number of pre-activations of a whole batch pass.

Notable:
- the encoder product is taken in chunks, and only candidates outlive a chunk: no
  (tokens, d_sae) array ever exists; the kernels then take the product a second time
"""

import torch
from torch import Tensor

CHUNK = 2**21  # elements of the encoder product at once: the fastest of 2**19 … 2**23 on 2 cores


@torch.no_grad()
def batch_threshold(x: Tensor, W_enc: Tensor, b_enc: Tensor, count: int) -> Tensor:
    """The `count + 1`-th largest pre-activation of a batch: without ties, `count` exceed it.

    Args:
        x: (tokens, d_in), `b_dec` already subtracted where a family does so.
        W_enc: (d_in, d_sae).
        b_enc: (d_sae,).
        count: how many shall pass.

    Returns:
        (), -∞ where the batch has no more than `count` pre-activations.
    """
    candidates = x.new_empty(0)
    threshold = x.new_full((), -torch.inf)
    for rows in x.split(max(1, CHUNK // len(b_enc))):
        pre = (
            torch.addmm(b_enc, rows, W_enc).to(x.dtype).flatten()
        )  # (tokens of the chunk * d_sae,)
        candidates = torch.cat([candidates, pre[pre > threshold]])
        if len(candidates) > count:
            candidates = candidates.topk(count + 1, sorted=False).values
            threshold = candidates.min()
    return threshold
