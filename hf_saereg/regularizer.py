"""The regularization term over all sites of one forward pass.

    term = 1/L · Σ_i [ λ_i · (R_i + A_i) / ‖X_i‖ + S_i ],   ‖X_i‖ = mean over tokens of ‖x‖₂

Notable:
- this is the published form: the norm is not detached, so the model is paid for shrinking ‖X‖
  less than it seems but can still do so (R grows with its square)
- (R + A) / ‖X‖ is a ratio of batch statistics: it is taken per micro-batch and process, as in the
  published code, so unlike S it does not add up exactly over accumulated micro-batches
- padding never reaches a head: positions masked out are dropped first
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hf_saereg.heads.bank import HeadBank
from hf_saereg.heads.base import SAEHead, SAELosses


class SiteTerm(NamedTuple):
    """One site's part of the term.

    Attributes:
        losses: the head's losses.
        value: () λ (R + A) / ‖X‖ + S.
    """

    losses: SAELosses
    value: Tensor


class Regularization(NamedTuple):
    """The term of one forward pass.

    Attributes:
        term: () mean of the sites' values.
        sites: each site's part, by hook name.
    """

    term: Tensor
    sites: dict[str, SiteTerm]


def site_term(head: SAEHead, x: Tensor) -> SiteTerm:
    """One site's part of the term.

    Args:
        head: the site's head.
        x: (tokens, d_in) activations at its site, without padding.
    """
    losses = head.losses(x)
    error = losses.reconstruction + losses.auxiliary
    # without a token R + A is 0, and a norm of 1 keeps the ratio, and its gradient, defined
    x_norm = x.norm(dim=-1).mean() if len(x) else x.new_ones(())
    return SiteTerm(losses, head.config.reconstruction_weight * error / x_norm + losses.sparsity)


def regularization(
    heads: HeadBank, activations: dict[str, Tensor], mask: Tensor | None = None
) -> Regularization:
    """The term over all sites that have a head.

    Args:
        heads: at least one.
        activations: (batch, sequence, d_in) by hook name.
        mask: (batch, sequence), non-zero where a token counts; None when all do.
    """
    everywhere = mask is None or bool(mask.all())
    sites = {}
    for head in heads:
        x = activations[head.config.hook_name]
        tokens = x.flatten(0, -2) if everywhere else x[mask.bool()]
        sites[head.config.hook_name] = site_term(head, tokens)
    return Regularization(torch.stack([site.value for site in sites.values()]).mean(), sites)
