"""The regularization term over all sites of one forward pass.

    term = 1/L · Σ_i [ λ_i · (R_i + A_i) / N_i + S_i ]

N by the `normalization` of a head:

    published    ‖X‖, the mean over tokens of ‖x‖₂, differentiated
    detached     ‖X‖, as a constant
    layer_norm   √d_in; the head reads (x − mean) / std of each token, as a layer norm does
    variance     √d_in; the head reads x divided by the batch's spread, differentiated

Notable:
- `published` and `detached` change when a model shrinks its activations, which every layer norm
  undoes for free; the term of the other two does not change when X is multiplied by a constant
- (R + A) / ‖X‖ is a ratio of batch statistics, and so is the spread: they are taken per micro-batch
  and process, as in the published code, and do not add up exactly over accumulated micro-batches;
  `layer_norm` is a mean over tokens and does
- what is not to be read, such as padding, never reaches a head: it is dropped first
- the term over a random subset of the tokens, or over some of the sites, is scaled as if it were
  the whole: every part that is a mean over tokens keeps its expectation; ‖X‖ and the spread are the
  subset's, and BatchTopK's threshold and the count of dead latents see the subset only
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from hf_saereg.eager_gradients import with_gradients
from hf_saereg.heads.bank import HeadBank
from hf_saereg.heads.base import SAEHead
from hf_saereg.heads.config import HeadConfigError
from hf_saereg.heads.statistics import SAELosses
from hf_saereg.heads.tokens import tokens_read

SPLICE_LOSSES = ("ce", "kl")


@dataclass
class TermOptions:
    """What the term is computed on, and the spliced loss beside it.

    The spliced loss is that of a second forward pass with reconstructions in place of the
    activations, each head reading the stream that the earlier ones have left: the heads and the
    model both learn from it.
    """

    token_fraction: float = field(
        default=1.0, metadata={"help": "Share of the tokens that the term is computed on."}
    )
    sites_per_step: int | None = field(
        default=None, metadata={"help": "Sites that a step's term covers, in turn; all by default."}
    )
    term_bf16: bool = field(
        default=False,
        metadata={
            "help": "Autocast the heads' losses to bfloat16, even if the model trains in float32."
        },
    )
    splice_weight: float = field(
        default=0.0, metadata={"help": "α, weight of the loss with reconstructions spliced in."}
    )
    splice_loss: str = field(
        default="ce",
        metadata={"help": "ce, or kl from the model's own plain output, taken as a constant."},
    )
    splice_sites: int | None = field(
        default=None, metadata={"help": "Sites spliced, drawn anew each step; all by default."}
    )
    term_warmup: list[int] = field(
        default_factory=lambda: [0, 0],
        metadata={"help": "Steps a b: the term's weight grows from 0 at step a to 1 at step b."},
    )

    def __post_init__(self) -> None:
        if not 0 < self.token_fraction <= 1:
            raise HeadConfigError(
                f"token_fraction is {self.token_fraction}; it must be above 0 and at most 1."
            )
        for name in ("sites_per_step", "splice_sites"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise HeadConfigError(f"{name} is {number}; it must be at least 1.")
        if not (math.isfinite(self.splice_weight) and self.splice_weight >= 0):
            raise HeadConfigError(
                f"splice_weight is {self.splice_weight}; it must be a finite number ≥ 0."
            )
        if self.splice_loss not in SPLICE_LOSSES:
            raise HeadConfigError(
                f"splice_loss is {self.splice_loss!r}; choose one of {', '.join(SPLICE_LOSSES)}."
            )
        steps = self.term_warmup
        if len(steps) != 2 or not 0 <= steps[0] <= steps[1]:
            raise HeadConfigError(
                f"term_warmup is {steps}; give two steps a b with 0 ≤ a ≤ b, or 0 0 for none."
            )

    def check_sites(self, n_sites: int) -> None:
        """Check that there are as many heads as are to be chosen among.

        Raises:
            HeadConfigError: if there are not.
        """
        for name in ("sites_per_step", "splice_sites"):
            number = getattr(self, name)
            if number is not None and number > n_sites:
                raise HeadConfigError(
                    f"{name} is {number}, but only {n_sites} sites have a head; choose fewer."
                )

    def warmup_factor(self, step: int) -> float:
        """Weight of the term in the step after `step` finished ones."""
        (first, last), number = self.term_warmup, step + 1  # steps are counted from 1, as in a log
        if not first < number < last:
            return float(number >= last)
        return (number - first) / (last - first)

    def sites_of_step(self, hook_names: Sequence[str], step: int) -> list[str]:
        """The sites of a step's term, in stream order: consecutive groups, in turn."""
        number = self.sites_per_step or len(hook_names)
        first = step * number
        chosen = {hook_names[(first + i) % len(hook_names)] for i in range(number)}
        return [hook_name for hook_name in hook_names if hook_name in chosen]

    def spliced_sites(self, hook_names: Sequence[str], step: int) -> list[str]:
        """The sites spliced at a step, in stream order: drawn alike on every process."""
        number = self.splice_sites or len(hook_names)
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randperm(len(hook_names), generator=generator)[:number].tolist()
        return [hook_names[i] for i in sorted(chosen)]


class SiteTerm(NamedTuple):
    """One site's part of the term.

    Attributes:
        losses: the head's losses, detached.
        value: () λ (R + A) / N + S.
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
    """One site's part of the term, with its gradients computed on the way.

    Args:
        head: the site's head.
        x: (tokens, d_in) activations at its site, without padding.
    """

    def value_and_losses(x: Tensor) -> tuple[Tensor, SAELosses]:
        losses = head.losses(x)
        return _site_value(head, losses, len(x)), losses.detached()

    value, losses = with_gradients(value_and_losses, x, list(head.parameters()))
    return SiteTerm(losses, value)


def _site_value(head: SAEHead, losses: SAELosses, tokens: int) -> Tensor:
    error = losses.reconstruction + losses.auxiliary
    if head.config.normalization in ("layer_norm", "variance"):
        scale = math.sqrt(head.config.d_in)
    elif tokens == 0:
        scale = 1.0  # R + A is 0, and a norm of 1 keeps the ratio, and its gradient, defined
    elif head.config.normalization == "detached":
        scale = losses.norm.detach()
    else:
        scale = losses.norm
    return head.config.reconstruction_weight * error / scale + losses.sparsity


def regularization(
    heads: HeadBank,
    activations: dict[str, Tensor],
    mask: Tensor | None = None,
    kept: Tensor | None = None,
) -> Regularization:
    """The term over the sites that have a head and whose activations are given.

    Args:
        heads: by site.
        activations: (batch, sequence, d_in) by hook name; at least one.
        mask: (batch, sequence), non-zero where a token is read; None where all are.
        kept: (tokens that are read,) indices of those that the term is computed on; None for all.
    """
    sites = {}
    for head in heads:
        hook_name = head.config.hook_name
        if hook_name not in activations:
            continue
        x = activations[hook_name]
        tokens = tokens_read(x, mask)
        tokens = tokens if kept is None else tokens.index_select(0, kept)
        sites[hook_name] = site_term(head, tokens)
    return Regularization(torch.stack([site.value for site in sites.values()]).mean(), sites)


def random_tokens(tokens: int, fraction: float, seed: tuple[int, ...]) -> Tensor | None:
    """Indices of a random share of the tokens, sorted; None for all of them.

    Args:
        tokens: how many there are.
        fraction: share to keep, rounded up.
        seed: what the choice depends on: step, micro-batch and process.
    """
    if fraction == 1:
        return None
    generator = torch.Generator().manual_seed(hash(seed))
    return torch.randperm(tokens, generator=generator)[: math.ceil(fraction * tokens)].sort().values
