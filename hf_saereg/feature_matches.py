"""Which latent of one head stands beside which of another.

    correlation    each latent of the first head with the one whose activations correlate most
    decoder        one to one, with the largest sum of cosines of decoder directions

Notable:
- correlation is the default: the models of a pair are trained apart, so nothing makes their streams
  share a basis, and a cosine between them says something only as far as they do; the tokens that
  both read are the same, whatever the basis
- in few dimensions a one-to-one matching of random directions has high cosines, too
- by correlation several latents of the first head may share one of the second; by the decoder
  none may, so that the wider head has latents without a partner
"""

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from torch import Tensor

from hf_saereg.quality import chance_consistency, consistency

CORRELATION, DECODER = "correlation", "decoder"
MATCHINGS = (CORRELATION, DECODER)


class Match(NamedTuple):
    """Two latents that stand side by side, or one that stands alone.

    Attributes:
        first: of the first head; None for one of the second that is nobody's match.
        second: of the second head; None with one head, or where no partner is left.
        correlation: of their activations; None for one alone.
        cosine: of their decoder directions, where these matched them.
    """

    first: int | None
    second: int | None
    correlation: float | None = None
    cosine: float | None = None


def match_by_correlation(
    first: Sequence[int], second: Sequence[int], correlations: Tensor
) -> list[Match]:
    """Each latent of the first head beside the one of the second that correlates most.

    Args:
        first: latents of the first head, in the order of the result.
        second: those of the second to choose from; the unchosen follow at the end.
        correlations: (d_sae, d_sae of the second) of activations on the same tokens.
    """
    candidates = sorted(second)
    partners: dict[int, Match] = {}
    for latent in first if candidates else ():
        best = correlations[latent, candidates].max(dim=0)
        partner = candidates[int(best.indices)]
        partners[latent] = Match(latent, partner, best.values.item())
    return _with_those_alone(first, second, partners)


def match_by_decoder(
    first: Sequence[int], second: Sequence[int], directions: Sequence[Tensor], correlations: Tensor
) -> list[Match]:
    """Latents one to one, by the matching of `quality.consistency`.

    Args:
        first: latents of the first head, in the order of the result.
        second: of the second; those without a partner follow at the end.
        directions: (d_sae, d_in) decoder rows of the first head, and of the second.
        correlations: (d_sae, d_sae of the second) of activations, to be shown with each pair.

    Raises:
        ImportError: if scipy is not installed.
    """
    partners: dict[int, Match] = {}
    if first and second:
        rows = [own[list(chosen)] for own, chosen in zip(directions, (first, second), strict=True)]
        found = consistency(*rows)
        for (row, column), cosine in zip(found.pairs.tolist(), found.cosines.tolist(), strict=True):
            a, b = first[row], second[column]
            partners[a] = Match(a, b, correlations[a, b].item(), cosine)
    return _with_those_alone(first, second, partners)


def chance_cosine(
    first: Sequence[int], second: Sequence[int], directions: Sequence[Tensor]
) -> float | None:
    """Median cosine of a matching with random directions instead: what a median is to be held to.

    Args:
        first: latents of the first head.
        second: of the second; see `quality.random_directions`.
        directions: (d_sae, d_in) decoder rows of the first head, and of the second.

    Returns:
        None where there is nothing to match.

    Raises:
        ImportError: if scipy is not installed.
    """
    if not (first and second):
        return None
    rows = [own[list(chosen)] for own, chosen in zip(directions, (first, second), strict=True)]
    return median(chance_consistency(*rows).cosines.tolist())


def _with_those_alone(
    first: Sequence[int], second: Sequence[int], partners: dict[int, Match]
) -> list[Match]:
    matched = {match.second for match in partners.values()}
    beside = [partners.get(latent, Match(latent, None)) for latent in first]
    return beside + [Match(None, latent) for latent in second if latent not in matched]
