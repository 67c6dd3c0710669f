"""What the latents of a head stand for: where they fire, what they are near to, what they promote.

    text → activations at a site → latents → strongest contexts, densities, correlations

Notable:
- two passes over the text: the first finds each latent's strongest blocks, the second reads what
  the latent does in them; no array over all tokens and latents ever exists
- a block counts once, at its strongest token, so that a latent's contexts are different ones
- several heads, of one model or of two, read the same tokens: which latents fire together is
  counted on the way
- a token that the model's `token_mask` leaves out fires nothing and is not counted
- logits: the unit decoder direction, centred as a layer norm centres it and multiplied by the
  weight of `ln_f`, through the unembedding; ln_f's division by the norm and all later blocks are
  left out, and the mean over the vocabulary is subtracted, which no softmax sees
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_saereg.fidelity import Batch
from hf_saereg.heads import SAEHead
from hf_saereg.heads.tokens import tokens_read
from hf_saereg.modeling import SAERegGPT2LMHeadModel

NEIGHBOURS = 5
TOKENS_SHOWN = 8


class Context(NamedTuple):
    """A stretch of text around a token on which a latent fires.

    Attributes:
        tokens: ids.
        activations: of the latent, a token each.
    """

    tokens: list[int]
    activations: list[float]


class Feature(NamedTuple):
    """One latent.

    Attributes:
        index: in its head.
        density: share of the tokens on which it fires.
        mean: activation where it fires.
        largest: activation.
        contexts: the strongest first, each from another block.
        neighbours: latents with the nearest decoder directions, and their cosines.
        promoted: tokens whose logits it raises most, and by how much.
        suppressed: likewise lowers.
    """

    index: int
    density: float
    mean: float
    largest: float
    contexts: list[Context]
    neighbours: list[tuple[int, float]]
    promoted: list[tuple[int, float]]
    suppressed: list[tuple[int, float]]


@dataclass
class Reader:
    """A head that reads a model's site."""

    label: str
    model: SAERegGPT2LMHeadModel
    head: SAEHead
    tokenizer: PreTrainedTokenizerBase

    @torch.no_grad()
    def encode(self, batch: Batch) -> Tensor:
        """(batch, sequence, d_sae) latents; 0 at a token that is not read."""
        hook_name, input_ids = self.head.config.hook_name, batch["input_ids"].to(self.model.device)
        with self.model.reading([hook_name]) as activations:
            self.model.transformer(input_ids, use_cache=False)
        mask = self.model.token_mask({"input_ids": input_ids})
        x = tokens_read(activations[hook_name], mask)  # (tokens, d_in)
        read = self.head.encode(x.to(self.head.W_dec.dtype))  # (tokens, d_sae)
        if mask is None:
            return read.view(*input_ids.shape, -1)
        latents = read.new_zeros(*input_ids.shape, read.shape[-1])
        latents[mask] = read
        return latents


class Survey(NamedTuple):
    """What one pass over the text tells of a head's latents.

    Attributes:
        tokens: number of them.
        fired: (d_sae,) on how many.
        total: (d_sae,) sum of activations.
        squares: (d_sae,) sum of their squares.
        largest: (d_sae, contexts) activations, falling; −∞ where there are not as many blocks.
        blocks: (d_sae, contexts) in which block.
        positions: (d_sae, contexts) on which token of it.
    """

    tokens: int
    fired: Tensor
    total: Tensor
    squares: Tensor
    largest: Tensor
    blocks: Tensor
    positions: Tensor

    @classmethod
    def of_nothing(cls, d_sae: int, contexts: int) -> "Survey":
        """Before the first batch."""
        sums = [torch.zeros(d_sae, dtype=torch.float64) for _ in range(3)]
        places = [torch.zeros(d_sae, contexts, dtype=torch.int64) for _ in range(2)]
        return cls(0, *sums, torch.full((d_sae, contexts), -torch.inf), *places)

    def with_batch(self, latents: Tensor, first_block: int, tokens: int) -> "Survey":
        """And of another batch.

        Args:
            latents: (batch, sequence, d_sae).
            first_block: number of its first row.
            tokens: how many of them were read; the latents of the others are 0.
        """
        flat = latents.flatten(0, 1)  # (tokens, d_sae)
        peaks = latents.max(dim=1)  # (batch, d_sae)
        rows = torch.arange(len(latents)) + first_block
        largest = torch.cat([self.largest, peaks.values.T.cpu()], dim=1)
        blocks = torch.cat([self.blocks, rows.expand(len(self.blocks), -1)], dim=1)
        positions = torch.cat([self.positions, peaks.indices.T.cpu()], dim=1)
        best = largest.topk(self.largest.shape[1], dim=1)
        return Survey(
            self.tokens + tokens,
            self.fired + (flat != 0).sum(dim=0).cpu(),
            self.total + flat.sum(dim=0, dtype=torch.float64).cpu(),
            self.squares + flat.double().square().sum(dim=0).cpu(),
            best.values,
            blocks.gather(1, best.indices),
            positions.gather(1, best.indices),
        )

    def correlations(self, other: "Survey", products: Tensor) -> Tensor:
        """(d_sae, d_sae of the other) Pearson's, 0 where a latent never changes.

        Args:
            other: of the same tokens.
            products: sums over tokens of each pair's product, of that shape.
        """
        mine, theirs = self.total / self.tokens, other.total / other.tokens
        covariance = products / self.tokens - torch.outer(mine, theirs)
        spreads = [
            (survey.squares / survey.tokens - mean.square()).clamp(min=0).sqrt()
            for survey, mean in ((self, mine), (other, theirs))
        ]
        scale = torch.outer(*spreads)
        return torch.where(scale > 0, covariance / scale, 0.0).clamp(-1, 1)


def survey(
    readers: Sequence[Reader], batches: Sequence[Batch], contexts: int
) -> tuple[list[Survey], Tensor | None]:
    """One pass over the text with all readers.

    Args:
        readers: one, or two that are compared; their models skip the same tokens.
        batches: text, all rows equally long, without padding.
        contexts: strongest blocks kept of a latent.

    Returns:
        A survey a reader, and with two readers the correlations of their latents.
    """
    surveys = [Survey.of_nothing(reader.head.config.d_sae, contexts) for reader in readers]
    products = None
    block = 0
    for batch in batches:
        latents = [reader.encode(batch) for reader in readers]
        surveys = [
            own.with_batch(features, block, reader.model.token_count(batch))
            for own, features, reader in zip(surveys, latents, readers, strict=True)
        ]
        if len(readers) == 2:
            first, second = (features.flatten(0, 1).double() for features in latents)
            product = (first.T @ second.to(first.device)).cpu()
            products = product if products is None else products + product
        block += len(batch["input_ids"])
    if products is None:
        return surveys, None
    return surveys, surveys[0].correlations(surveys[1], products)


def describe(
    reader: Reader, found: Survey, batches: Sequence[Batch], shown: Sequence[int], window: int
) -> list[Feature]:
    """Latents in full; a second pass over the text.

    Args:
        reader: a head on its model.
        found: what the first pass told.
        batches: the same text.
        shown: which latents.
        window: tokens shown on either side of the strongest.
    """
    contexts = _contexts(reader, found, batches, shown, window)
    chosen = torch.tensor(shown, dtype=torch.int64)
    neighbours = nearest_directions(reader.head, chosen)
    promoted = logits(reader, chosen)  # (shown, tokens)
    number = min(TOKENS_SHOWN, promoted.shape[1])
    features = []
    for row, index in enumerate(shown):
        highest, lowest = promoted[row].topk(number), promoted[row].topk(number, largest=False)
        fired = found.fired[index].item()
        features.append(
            Feature(
                index=index,
                density=fired / found.tokens,
                mean=found.total[index].item() / max(fired, 1),
                largest=found.largest[index, 0].item(),
                contexts=contexts[index],
                neighbours=neighbours[row],
                promoted=list(zip(highest.indices.tolist(), highest.values.tolist(), strict=True)),
                suppressed=list(zip(lowest.indices.tolist(), lowest.values.tolist(), strict=True)),
            )
        )
    return features


def _contexts(
    reader: Reader, found: Survey, batches: Sequence[Batch], shown: Sequence[int], window: int
) -> dict[int, list[Context]]:
    wanted: dict[int, list[tuple[int, int, int]]] = defaultdict(list)  # by block
    for index in shown:
        places = zip(found.largest[index], found.blocks[index], found.positions[index], strict=True)
        for rank, (largest, block, position) in enumerate(places):
            if largest > 0 and math.isfinite(largest):
                wanted[int(block)].append((index, rank, int(position)))
    contexts: dict[int, dict[int, Context]] = {index: {} for index in shown}
    first = 0
    for batch in batches:
        rows = range(len(batch["input_ids"]))
        if any(first + row in wanted for row in rows):
            latents = reader.encode(batch)
            for row in rows:
                for index, rank, position in wanted.get(first + row, ()):
                    near = slice(max(0, position - window), position + window + 1)
                    tokens = batch["input_ids"][row, near].tolist()
                    contexts[index][rank] = Context(tokens, latents[row, near, index].tolist())
        first += len(rows)
    return {index: [own[rank] for rank in sorted(own)] for index, own in contexts.items()}


@torch.no_grad()
def nearest_directions(head: SAEHead, chosen: Tensor) -> list[list[tuple[int, float]]]:
    """The latents with the largest cosine of decoder directions, and the cosine.

    Args:
        head: any.
        chosen: (chosen,) whose neighbours are sought.
    """
    directions = _unit_rows(head.W_dec).cpu()  # (d_sae, d_in)
    cosines = directions[chosen] @ directions.T  # (chosen, d_sae)
    cosines[torch.arange(len(chosen)), chosen] = -torch.inf
    nearest = cosines.topk(min(NEIGHBOURS, len(directions) - 1), dim=1)
    return [
        list(zip(indices.tolist(), values.tolist(), strict=True))
        for indices, values in zip(nearest.indices, nearest.values, strict=True)
    ]


@torch.no_grad()
def logits(reader: Reader, chosen: Tensor) -> Tensor:
    """(chosen, tokens) what each latent's direction adds to the logits; see the module's notes.

    Args:
        reader: a head on its model.
        chosen: (chosen,) which latents.
    """
    directions = _unit_rows(reader.head.W_dec)[chosen.to(reader.head.W_dec.device)]
    centred = directions - directions.mean(dim=1, keepdim=True)
    read = centred * reader.model.transformer.ln_f.weight
    known = min(len(reader.tokenizer), reader.model.config.vocab_size)
    added = read @ reader.model.lm_head.weight[:known].T
    return (added - added.mean(dim=1, keepdim=True)).cpu()


def _unit_rows(W_dec: Tensor) -> Tensor:
    return W_dec / W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12)
