"""Are the features of a head better, or packed? Measures of what a latent stands for.

    consistency    do two heads, trained from different seeds, find the same directions?
    composition    are a head's directions sums of a wider head's?
    probes         does one latent tell a class of characters by firing?
    co-occurrence  do latents fire together more than chance lets them?

Notable:
- none has a scale of its own: compare both members of a pair, at equal L0 and size
- a probe's latent is chosen on every other block and scored on the rest, so that a head with more
  latents gains nothing by having more to choose from
- composition is measured against random directions too, as many as the wider head has: in few
  dimensions a handful of random directions comes near to anything
- dead latents keep their random directions: leave them out before comparing directions
"""

import importlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_saereg.errors import UserError

VOWELS = frozenset("aeiouAEIOU")
PUNCTUATION = frozenset(".,;:!?'\"()[]-")
# a line of its own that ends in a colon, as plays announce who speaks
SPEAKER = re.compile(r"^[A-Z][^\n:.!?]{0,40}(?=:$)", re.MULTILINE)
LIFT = 2.0  # together this many times as often as chance lets them
FEWEST_EXPECTED = 5.0  # below as many expected tokens a lift is noise


class QualityError(UserError):
    """Features cannot be measured like this; the message says why."""


class Consistency(NamedTuple):
    """How alike the decoder directions of two heads are.

    Attributes:
        mean_max: mean over the first head's latents of the largest cosine with any of the second's.
        matched: mean cosine of the pairs of the best one-to-one matching.
        pairs: (pairs, 2) that matching, latents of the first and of the second head.
        cosines: (pairs,) of it.
    """

    mean_max: float
    matched: float
    pairs: Tensor
    cosines: Tensor


class Composition(NamedTuple):
    """How well a few directions of a wider head make up the directions of a narrower one.

    Attributes:
        explained: (latents, parts) share of each direction's squared length in the span of the
            first, the first two, … of the wider head's directions that are chosen greedily.
        chance: (latents, parts) the same with as many random directions.
    """

    explained: Tensor
    chance: Tensor


class Probe(NamedTuple):
    """How well one latent tells a class by firing.

    Attributes:
        latent: that tells it best on one half of the text.
        f1: its F1 on the other half.
        share: of the tokens that are of the class, on that other half.
    """

    latent: int
    f1: float
    share: float


class CoOccurrence(NamedTuple):
    """How often pairs of latents fire together, against the product of their own rates.

    Attributes:
        excess: share of all joint firings that is beyond what the products let expect.
        chance: what that share would be of latents with the same rates that fire independently:
            rare pairs meet more often than expected by luck.
        lifted: share of the pairs that fire together more than twice as often as that, among those
            for which at least five joint tokens were to be expected.
    """

    excess: float
    chance: float
    lifted: float


def consistency(first: Tensor, second: Tensor) -> Consistency:
    """Compare the directions of two heads.

    Args:
        first: (latents, d_in) decoder rows of living latents.
        second: (latents, d_in) likewise; as many or not.

    Raises:
        QualityError: if one has none.
        ImportError: if scipy is not installed.
    """
    if not len(first) or not len(second):
        raise QualityError("A head without living latents has no directions to compare.")
    cosines = (_unit_rows(first) @ _unit_rows(second).T).cpu()  # (latents, latents)
    rows, columns = _matching()(cosines.double().numpy(), maximize=True)
    pairs = torch.stack([torch.from_numpy(rows), torch.from_numpy(columns)], dim=1)
    matched = cosines[pairs[:, 0], pairs[:, 1]]
    return Consistency(
        cosines.max(dim=1).values.mean().item(), matched.mean().item(), pairs, matched
    )


def chance_consistency(first: Tensor, second: Tensor) -> Consistency:
    """The same with as many random directions in the place of the second head's.

    Args:
        first: (latents, d_in) decoder rows of living latents.
        second: (latents, d_in) likewise; see `random_directions`.

    Raises:
        QualityError: if one has none.
        ImportError: if scipy is not installed.
    """
    return consistency(first, random_directions(second))


def random_directions(like: Tensor, seed: int = 0) -> Tensor:
    """As many Gaussian directions, with the second moments of the unit directions given.

    Where these lie in few dimensions, so do the random ones: by chance alone they are then nearer
    to each other than isotropic ones would be.

    Args:
        like: (latents, d_in).
        seed: of the draw.
    """
    units = _unit_rows(like.double())
    moments, vectors = torch.linalg.eigh(units.T @ units / len(units))
    root = vectors * moments.clamp(min=0).sqrt()  # (d_in, d_in)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(like.shape, generator=generator, dtype=torch.float64)
    return (drawn.to(root.device) @ root.T).to(like)


def composition(narrow: Tensor, wide: Tensor, parts: int, seed: int = 0) -> Composition:
    """Make up directions from a few of a wider head's, by orthogonal matching pursuit.

    Args:
        narrow: (latents, d_in) directions to make up.
        wide: (latents, d_in) to choose from.
        parts: most that are chosen for one direction.
        seed: of the random directions.

    Raises:
        QualityError: if there are fewer to choose from than are to be chosen.
    """
    if not 1 <= parts <= min(wide.shape):
        raise QualityError(
            f"{parts} directions cannot be chosen from {wide.shape[0]} in {wide.shape[1]} "
            "dimensions; ask for at least one, and no more than there are."
        )
    random = random_directions(wide, seed)
    return Composition(_pursued(narrow, wide, parts), _pursued(narrow, random, parts))


def character_classes(text: str) -> dict[str, Tensor]:
    """(len(text),) bool, which characters are of each class.

    `vowel`, `upper` case, `punctuation`, `line_start` (the first character of a line that is not
    empty) and `speaker` (inside a speaker's name, a line of its own that ends in a colon).
    """
    speaker = torch.zeros(len(text), dtype=torch.bool)
    for name in SPEAKER.finditer(text):
        speaker[name.start() : name.end()] = True
    return {
        "vowel": _where(text, VOWELS.__contains__),
        "upper": _where(text, str.isupper),
        "punctuation": _where(text, PUNCTUATION.__contains__),
        "line_start": torch.tensor(
            [
                character != "\n" and before == "\n"
                for before, character in zip("\n" + text, text, strict=False)
            ],
            dtype=torch.bool,
        ),
        "speaker": speaker,
    }


class FiringCounts:
    """Which latents fire on which tokens, added up batch by batch.

    Args:
        d_sae: latents of the head.
        classes: names of the classes of tokens.
    """

    def __init__(self, d_sae: int, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self._tokens = torch.zeros(2, dtype=torch.int64)
        self._fired = torch.zeros(2, d_sae, dtype=torch.float64)
        self._members = torch.zeros(2, len(classes), dtype=torch.float64)
        self._hits = torch.zeros(2, d_sae, len(classes), dtype=torch.float64)
        self._joint = torch.zeros(d_sae, d_sae, dtype=torch.float64)

    def update(self, latents: Tensor, members: Mapping[str, Tensor], half: int) -> None:
        """Add the tokens of one block.

        Args:
            latents: (tokens, d_sae).
            members: (tokens,) bool, by class.
            half: 0 for the half of the text on which latents are chosen, 1 for the other.
        """
        fires = (latents > 0).to("cpu", torch.float32)  # counts of a block are exact in it
        labels = torch.zeros(len(fires), len(self.classes))
        for column, name in enumerate(self.classes):
            labels[:, column] = members[name]
        self._tokens[half] += len(fires)
        self._fired[half] += fires.sum(dim=0)
        self._members[half] += labels.sum(dim=0)
        self._hits[half] += fires.T @ labels
        self._joint += fires.T @ fires

    @property
    def tokens(self) -> int:
        """How many were added."""
        return int(self._tokens.sum())

    @property
    def fired(self) -> Tensor:
        """(d_sae,) on how many tokens each latent fired."""
        return self._fired.sum(dim=0)

    @property
    def has_joint_firings(self) -> bool:
        """Whether any two latents ever fired together."""
        return bool((self._joint.sum() - self._joint.trace()) > 0)

    def probes(self) -> dict[str, Probe]:
        """The best latent of each class.

        Raises:
            QualityError: if a half of the text is missing.
        """
        if not self._tokens.all():
            raise QualityError(
                "Probes choose their latents on one half of the text and are scored on the other; "
                "give at least two blocks."
            )
        found = {}
        for column, name in enumerate(self.classes):
            chosen, scored = (
                2 * self._hits[half, :, column] / (self._fired[half] + self._members[half, column])
                for half in (0, 1)
            )  # (d_sae,) F1; 0/0 where neither the latent nor the class ever occurs
            latent = int(chosen.nan_to_num(0.0).argmax())
            share = (self._members[1, column] / self._tokens[1]).item()
            found[name] = Probe(latent, scored.nan_to_num(0.0)[latent].item(), share)
        return found

    def co_occurrence(self) -> CoOccurrence:
        """Of all pairs of different latents, on all of the text.

        Raises:
            QualityError: if no two latents ever fired together.
        """
        fired, tokens = self.fired, self.tokens
        pairs = torch.triu_indices(len(fired), len(fired), offset=1)
        joint = self._joint[pairs[0], pairs[1]]
        expected = fired[pairs[0]] * fired[pairs[1]] / tokens
        if joint.sum() == 0:
            raise QualityError("No two latents ever fired together; there is nothing to compare.")
        likely = expected >= FEWEST_EXPECTED
        lifted = (joint > LIFT * expected)[likely].double()
        return CoOccurrence(
            ((joint - expected).clamp(min=0).sum() / joint.sum()).item(),
            (_mean_surplus(expected).sum() / expected.sum()).item(),
            lifted.mean().item() if len(lifted) else 0.0,
        )


def count_firings(
    encode: Callable[[Tensor], Tensor], blocks: Iterable[Tensor], text: str
) -> FiringCounts:
    """Read a text of one token a character, block by block.

    Args:
        encode: from (1, sequence) token ids to (1, sequence, d_sae) latents.
        blocks: (sequence,) token ids each, one after the other.
        text: all of the blocks, decoded.

    Raises:
        QualityError: if there is not one character a token.
    """
    blocks = list(blocks)
    if sum(map(len, blocks)) != len(text):
        raise QualityError(
            f"{sum(map(len, blocks))} tokens are {len(text)} characters; the classes of characters "
            "need a tokenizer with one token a character."
        )
    members, counts, start = character_classes(text), None, 0
    for number, block in enumerate(blocks):
        latents = encode(block[None])[0]  # (sequence, d_sae)
        if counts is None:
            counts = FiringCounts(latents.shape[-1], list(members))
        span = slice(start, start + len(block))
        counts.update(latents, {name: own[span] for name, own in members.items()}, number % 2)
        start += len(block)
    if counts is None:
        raise QualityError("There is no block of text to read.")
    return counts


def _pursued(targets: Tensor, directions: Tensor, parts: int) -> Tensor:
    targets, directions = _unit_rows(targets.double()), _unit_rows(directions.double())
    residual, explained = targets, []
    basis = targets.new_zeros(len(targets), 0, targets.shape[1])  # orthonormal, (latents, n, d_in)
    for _ in range(parts):
        best = (residual @ directions.T).abs().argmax(dim=1)  # (latents,)
        new = directions[best]
        # twice, because what is left of a direction near to the others is mostly rounding
        for _ in range(2):
            new = new - torch.einsum("lnd,ln->ld", basis, torch.einsum("lnd,ld->ln", basis, new))
        basis = torch.cat([basis, _unit_rows(new)[:, None]], dim=1)
        shares = torch.einsum("lnd,ld->ln", basis, targets)
        residual = targets - torch.einsum("lnd,ln->ld", basis, shares)
        explained.append(shares.square().sum(dim=1))
    return torch.stack(explained, dim=1)


def _unit_rows(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)


def _mean_surplus(expected: Tensor) -> Tensor:
    """Mean of max(0, J − e) of a Poisson count J of mean e: e^(⌊e⌋ + 1) exp(−e) / ⌊e⌋!."""
    whole = expected.floor()
    log = (whole + 1) * expected.clamp(min=1e-300).log() - expected - torch.lgamma(whole + 1)
    return log.exp()


def _where(text: str, is_member: Callable[[str], bool]) -> Tensor:
    return torch.tensor([is_member(character) for character in text], dtype=torch.bool)


def require_matching() -> None:
    """Check that consistency can be measured.

    Raises:
        UserError: if scipy is not installed.
    """
    try:
        _matching()
    except ImportError as error:
        raise QualityError(str(error)) from error


def _matching() -> Callable:
    try:
        return importlib.import_module("scipy.optimize").linear_sum_assignment
    except ImportError as error:
        raise ImportError(
            "Matching latents one to one needs scipy: run `pip install 'hf-saereg[quality]'`."
        ) from error
