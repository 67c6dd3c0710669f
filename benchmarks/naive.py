"""The term written the naive way: whole (tokens, d_sae) arrays, differentiated by autograd.

Notable:
- `torch.compile` of it is the rival of the Triton kernel; it is compiled once a shape
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import MethodType
from unittest.mock import patch

import torch
from torch import Tensor

from hf_saereg import regularizer
from hf_saereg.heads import SAEHead, SAELosses, SiteStatistics
from hf_saereg.heads.bank import HeadBank
from hf_saereg.kernels import Codes


def naive_losses(head: SAEHead, x: Tensor) -> SAELosses:
    """What `SAEHead.losses` returns of raw activations; statistics only say how sparse they are.

    Args:
        head: of any family that selects by a threshold.
        x: (tokens, d_in).
    """
    centred = x - head.b_dec
    codes = Codes(centred @ head.W_enc + head.encoder_bias)  # (tokens, d_sae)
    features = head.activate(codes, head.selection(centred))
    x_hat = features @ head.W_dec + head.b_dec
    nothing = torch.zeros(())
    statistics = SiteStatistics(
        tokens=torch.tensor(len(x)),
        squared_error=nothing,
        x_sum=nothing,
        x_square=nothing,
        x_norm=nothing,
        fired=(features > 0).sum(dim=0),
    )
    return SAELosses(
        reconstruction=(x - x_hat).square().sum(dim=-1).mean(),
        sparsity=head.sparsity_loss(head.sparsity(codes, features).sum() / len(x)),
        auxiliary=x.new_zeros(()),
        norm=x.norm(dim=-1).mean(),
        statistics=statistics,
    )


@cache
def compiled_losses() -> Callable[[SAEHead, Tensor], SAELosses]:
    """`naive_losses`, compiled; made when first asked for, because the compiler loads slowly."""
    return torch.compile(naive_losses, dynamic=False)


@contextmanager
def naive(
    heads: HeadBank, losses: Callable[[SAEHead, Tensor], SAELosses] = naive_losses
) -> Iterator[None]:
    """Within it these heads compute their losses the naive way, or by what is given instead."""
    for head in heads:
        head.losses = MethodType(losses, head)
    try:
        with patch.object(regularizer, "with_gradients", lambda function, x, _: function(x)):
            yield
    finally:
        for head in heads:
            del head.losses
