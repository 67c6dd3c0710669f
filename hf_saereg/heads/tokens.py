"""Which tokens are read: one mask for the term, splices, measures and upkeep.

Notable:
- padding is never read, nor what `SkipOptions` names; a token that is not read keeps its
  activations and enters no loss and no figure of a head, but cross-entropy covers it
- positions are counted over real tokens, so a row may be padded on either side
"""

import torch
from torch import Tensor

from hf_saereg.heads.config import SkipOptions


def token_mask(
    skip: SkipOptions, input_ids: Tensor, attention_mask: Tensor | None = None
) -> Tensor | None:
    """(batch, sequence) bool, true where a token is read; None where all are.

    Args:
        skip: what is left out beside padding.
        input_ids: (batch, sequence).
        attention_mask: (batch, sequence), 0 at padding; longer where it begins with cached keys,
            which are no part of the mask and only make later positions of what follows them.

    Raises:
        ValueError: if `attention_mask` has another number of dimensions.
    """
    if attention_mask is None:
        if not (skip.skip_positions or skip.skip_tokens):
            return None
        attention_mask = torch.ones_like(input_ids)
    if attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; the heads need "
            "(batch, sequence) to tell tokens from padding."
        )
    mask = attention_mask.bool()
    if skip.skip_positions:
        mask = mask & (mask.cumsum(dim=1) > skip.skip_positions)
    mask = mask[:, -input_ids.shape[1] :]
    if skip.skip_tokens:
        skipped = torch.tensor(skip.skip_tokens, device=input_ids.device)
        mask = mask & ~torch.isin(input_ids, skipped)
    return None if bool(mask.all()) else mask


def tokens_read(x: Tensor, mask: Tensor | None) -> Tensor:
    """(tokens, …) of x, (batch, sequence, …), where the mask is true.

    Args:
        x: anything by token.
        mask: as `token_mask` returns it.
    """
    return x.flatten(0, 1) if mask is None else x[mask.bool()]
