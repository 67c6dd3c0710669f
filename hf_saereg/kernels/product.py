"""The encoder product of a few tokens, in float32 or float64 on a CPU: the one dense product.

Notable:
- a panel of columns at a time, copied so that it lies in one piece and stays in the cache
- rows of the result are longer than d_sae: at a distance of a power of two all rows would compete
  for the same few lines of the cache
"""

import torch
from torch import Tensor

PANEL = 512  # columns: 128 KiB at d_in 64, a quarter of a small L2 cache
PADDING = 16  # elements, a line of the cache


def panels(W_enc: Tensor) -> list[Tensor]:
    """Contiguous copies of the columns, (d_in, up to `PANEL`) each.

    Args:
        W_enc: (d_in, d_sae).
    """
    return [columns.contiguous() for columns in W_enc.split(PANEL, dim=1)]


def multiply(x: Tensor, columns: list[Tensor], out: Tensor) -> None:
    """Write x @ W_enc.

    Args:
        x: (tokens, d_in).
        columns: `panels` of W_enc.
        out: (tokens, d_sae + `PADDING`), of which the padding is left alone.
    """
    first = 0
    for panel in columns:
        torch.mm(x, panel, out=out[:, first : first + panel.shape[1]])
        first += panel.shape[1]
