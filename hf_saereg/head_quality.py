"""Every head of a model by the measures of `quality`: which is measured, and beside which other.

    cells on disk → heads, site by site → latents on a text → rows of `quality.json`

Notable:
- seeds of one cell are compared with each other; a narrow head is made up from the next wider one
  of the same family, sparsity and seed; what has no counterpart has no row
- tokens that the model's `token_mask` leaves out are not counted
- only latents that fire on the text count as directions
- one head's counts are in memory at a time, for they are as large as d_sae squared
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hf_saereg.errors import UserError
from hf_saereg.fidelity import Batch
from hf_saereg.fresh import COTRAINED, labels_of_own
from hf_saereg.heads import SAEHead
from hf_saereg.heads.folder import load_head
from hf_saereg.heads.tokens import tokens_read
from hf_saereg.modeling import SAERegGPT2LMHeadModel
from hf_saereg.quality import (
    FiringCounts,
    QualityError,
    chance_consistency,
    character_classes,
    composition,
    consistency,
)

QUALITY_FILE = "quality.json"
LABELS = ("family", "source", "sparsity", "d_sae", "seed")
FRESH = "fresh"


class HeadSet(NamedTuple):
    """The heads of one cell, or those of the model itself.

    Attributes:
        labels: `LABELS` of its rows.
        folder: holds `saes/`; None for the model's own.
    """

    labels: dict[str, Any]
    folder: Path | None

    def head(self, model: SAERegGPT2LMHeadModel, hook_name: str) -> SAEHead | None:
        """The one at a site; None where the model's own leave it out."""
        if self.folder is None:
            return model.heads[hook_name] if hook_name in model.heads.hook_names else None
        return load_head(self.folder, hook_name).to(model.device).eval()


class Measured(NamedTuple):
    """A head at a site, to be compared with others.

    Attributes:
        labels: of its set, and its site.
        directions: (living, d_in) of its latents that fired, at least one.
    """

    labels: dict[str, Any]
    directions: Tensor


def kept_sets(folder: Path) -> list[HeadSet]:
    """The cells that a sweep finished.

    Args:
        folder: with `cells/` and `saes/`.

    Raises:
        UserError: if there is none.
    """
    found = []
    for path in sorted((folder / "cells").glob("*.json")):
        if path.stem != COTRAINED:
            labels = json.loads(path.read_text(encoding="utf-8"))["compound"]
            found.append(
                HeadSet({name: labels[name] for name in LABELS}, folder / "saes" / path.stem)
            )
    if not found:
        raise UserError(
            f"{folder} holds no finished cell of a sweep; name a folder that `saereg sweep` or a "
            "training recipe wrote."
        )
    return found


def own_set(model: SAERegGPT2LMHeadModel) -> list[HeadSet]:
    """The model's own heads, or nothing."""
    return [HeadSet(labels_of_own(model), None)] if model.heads else []


def members_of_text(
    tokenizer: PreTrainedTokenizerBase, batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """(blocks, sequence) bool by class of characters; nothing where tokens are no characters."""
    ids = torch.cat([batch["input_ids"] for batch in batches])
    shown = {token: tokenizer.decode([token]) for token in ids.unique().tolist()}
    if any(len(text) != 1 for text in shown.values()):
        return {}
    text = "".join(shown[token] for token in ids.flatten().tolist())
    return {name: own.view_as(ids) for name, own in character_classes(text).items()}


def measure_model(
    model: SAERegGPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Sequence[HeadSet],
    batches: Sequence[Batch],
    parts: int,
    name: str,
) -> dict[str, list[dict[str, Any]]]:
    """Rows of `heads`, `consistency` and `composition`, JSON-serialisable.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        sets: of heads on it.
        batches: text, blocks in their order, without padding.
        parts: most directions of a wider head that make up one of a narrower.
        name: the model's, in every row.

    Raises:
        QualityError: if the text is a single block.
    """
    if sum(len(batch["input_ids"]) for batch in batches) < 2:
        raise QualityError(
            "Probes choose their latents on every other block and are scored on the rest; give at "
            "least two blocks."
        )
    members = members_of_text(tokenizer, batches)
    rows: dict[str, list[dict[str, Any]]] = {"heads": [], "consistency": [], "composition": []}
    with tqdm(
        total=len(sets) * len(model.hook_names), desc=f"Reading heads of {name}", dynamic_ncols=True
    ) as bar:
        for hook_name in model.hook_names:
            activations = _activations(model, hook_name, batches)
            masks = [model.token_mask(batch) for batch in batches]
            measured = []
            for own in sets:
                bar.update()
                head = own.head(model, hook_name)
                if head is None:
                    continue
                labels = own.labels | {"site": hook_name, "d_sae": head.config.d_sae}
                if own.folder is None:
                    labels["sparsity"] = head.config.sparsity
                counts = _count(head, activations, masks, members)
                rows["heads"].append({"model": name, **labels, **_figures(counts)})
                living = head.W_dec.detach().cpu()[counts.fired > 0]  # (living, d_in)
                if len(living):
                    measured.append(Measured(labels, living))
            rows["consistency"] += [{"model": name, **row} for row in _across_seeds(measured)]
            rows["composition"] += [{"model": name, **row} for row in _from_wider(measured, parts)]
    return rows


@torch.no_grad()
def _activations(
    model: SAERegGPT2LMHeadModel, hook_name: str, batches: Sequence[Batch]
) -> list[Tensor]:
    """(batch, sequence, d_in) each."""
    found = []
    for batch in batches:
        with model.reading([hook_name]) as activations:
            model.transformer(batch["input_ids"].to(model.device), use_cache=False)
        found.append(activations[hook_name])
    return found


@torch.no_grad()
def _count(
    head: SAEHead,
    activations: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    members: Mapping[str, Tensor],
) -> FiringCounts:
    counts, block = FiringCounts(head.config.d_sae, list(members)), 0
    for x, mask in zip(activations, masks, strict=True):
        latents = head.encode(tokens_read(x, mask).to(head.W_dec.dtype))  # (tokens, d_sae)
        rows = torch.arange(block, block + len(x))
        labels = {name: tokens_read(own[rows], mask) for name, own in members.items()}
        halves = tokens_read((rows % 2)[:, None].expand(x.shape[:2]), mask)  # (tokens,)
        for half in (0, 1):
            of_half = halves == half
            own = {name: of_token[of_half] for name, of_token in labels.items()}
            counts.update(latents[of_half.to(latents.device)], own, half)
        block += len(x)
    return counts


def _figures(counts: FiringCounts) -> dict[str, Any]:
    fired = counts.fired
    found = {
        "l0": (fired.sum() / counts.tokens).item(),
        "dead_fraction": (fired == 0).double().mean().item(),
        "probes": {name: probe._asdict() for name, probe in counts.probes().items()},
        "co_occurrence": None,
    }
    if counts.has_joint_firings:
        found["co_occurrence"] = counts.co_occurrence()._asdict()
    return found


def _across_seeds(measured: Sequence[Measured]) -> Iterator[dict[str, Any]]:
    for first, second in itertools.combinations(measured, 2):
        a, b = first.labels, second.labels
        if a["source"] == FRESH and _without(a, "seed") == _without(b, "seed"):
            found = consistency(first.directions, second.directions)
            chance = chance_consistency(first.directions, second.directions)
            yield _without(a, "seed") | {
                "seeds": [a["seed"], b["seed"]],
                "mean_max": found.mean_max,
                "matched": found.matched,
                "chance_mean_max": chance.mean_max,
                "chance_matched": chance.matched,
            }


def _from_wider(measured: Sequence[Measured], parts: int) -> Iterator[dict[str, Any]]:
    for narrow in measured:
        own = narrow.labels
        wider = [
            other
            for other in measured
            if own["source"] == FRESH
            and _without(other.labels, "d_sae") == _without(own, "d_sae")
            and other.labels["d_sae"] > own["d_sae"]
        ]
        if wider:
            wide = min(wider, key=lambda other: other.labels["d_sae"])
            most = min(parts, *wide.directions.shape)
            found = composition(narrow.directions, wide.directions, most)
            yield own | {
                "wider": wide.labels["d_sae"],
                "explained": found.explained.mean(dim=0).tolist(),
                "chance": found.chance.mean(dim=0).tolist(),
            }


def _without(labels: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in labels.items() if key != name}
