"""How well heads stand in for the activations that they read.

    CE increase of a site = CE with its activations replaced by their reconstruction − CE
    compound CE increase  = the same with all sites replaced, each head reading the replaced stream

Notable:
- means are over predicted tokens, sums over batches are kept in double precision
- padding is neither replaced nor counted
- clean and mean-ablated CE are reported beside every increase, so that its scale is visible
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_saereg.heads import SiteStatistics
from hf_saereg.heads.bank import HeadBank
from hf_saereg.modeling import SAERegGPT2LMHeadModel, SiteFunction
from hf_saereg.splicing import Splice

Batch = dict[str, Tensor]  # input_ids and labels, (batch, sequence); attention_mask where padded


class SiteFidelity(NamedTuple):
    """How well one head stands in for its site.

    Attributes:
        ce_increase: nats a token.
        statistics: of the head on the clean activations.
    """

    ce_increase: float
    statistics: SiteStatistics


class Fidelity(NamedTuple):
    """How well a model's heads stand in for its sites.

    Attributes:
        sites: each head alone, by hook name.
        compound_ce_increase: all heads at once, nats a token.
        compound_l0: sum over sites of L0 in the replaced stream.
    """

    sites: dict[str, SiteFidelity]
    compound_ce_increase: float
    compound_l0: float


class Baselines(NamedTuple):
    """What fidelity is measured against, nats a token.

    Attributes:
        clean_ce: nothing replaced.
        mean_ablated_ce: one site replaced by its mean activation, by hook name.
        mean_ablated_ce_all: all sites replaced by their mean activations.
        residual_norm: mean over tokens of ‖x‖₂, by hook name.
        spectrum: shares of the variance of x in its principal directions, largest first, by hook
            name.
    """

    clean_ce: float
    mean_ablated_ce: dict[str, float]
    mean_ablated_ce_all: float
    residual_norm: dict[str, float]
    spectrum: dict[str, list[float]]


@torch.no_grad()
def cross_entropy(
    model: SAERegGPT2LMHeadModel,
    batches: Iterable[Batch],
    at_sites: dict[str, SiteFunction] | None = None,
) -> float:
    """Mean cross-entropy over predicted tokens, nats.

    Args:
        model: in evaluation mode.
        batches: with labels.
        at_sites: functions on the activations, by hook name; a `Splice` is told each batch's mask.
    """
    total, count = 0.0, 0
    functions = at_sites or {}
    for batch in batches:
        for function in functions.values():
            if isinstance(function, Splice):
                function.mask = batch.get("attention_mask")
        with model.at_sites(functions):
            loss = model(**batch, compute_term=False).loss
        predicted = int((batch["labels"][:, 1:] != -100).sum())
        if predicted:  # the mean over no token is NaN
            total += loss.item() * predicted
            count += predicted
    return total / count


def fidelity(
    model: SAERegGPT2LMHeadModel, heads: HeadBank, batches: Sequence[Batch], clean_ce: float
) -> Fidelity:
    """Score heads on a model, each alone and all together.

    Args:
        model: in evaluation mode.
        heads: any subset of its sites.
        batches: validation text.
        clean_ce: the model's own CE on the same batches.
    """
    sites = {}
    for head in heads:
        splice = Splice(head)
        ce = cross_entropy(model, batches, {head.config.hook_name: splice})
        sites[head.config.hook_name] = SiteFidelity(ce - clean_ce, splice.statistics)
    splices = {head.config.hook_name: Splice(head) for head in heads}
    compound_ce = cross_entropy(model, batches, splices)
    return Fidelity(
        sites, compound_ce - clean_ce, sum(splice.statistics.l0 for splice in splices.values())
    )


@torch.no_grad()
def baselines(model: SAERegGPT2LMHeadModel, batches: Sequence[Batch]) -> Baselines:
    """Clean CE, mean-ablated CE and activation norms of a model on validation text.

    Args:
        model: in evaluation mode.
        batches: validation text.
    """
    sums = {hook_name: torch.zeros(()) for hook_name in model.hook_names}
    norms = dict.fromkeys(model.hook_names, 0.0)
    products = dict.fromkeys(model.hook_names, 0.0)  # (d_in, d_in) once a batch has been seen
    tokens = 0
    for batch in batches:
        with model.reading(model.hook_names) as activations:
            model(**batch, compute_term=False)
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        tokens += int(mask.sum())
        for hook_name, x in activations.items():
            sums[hook_name] = sums[hook_name].to(x.device) + x[mask].double().sum(dim=0)  # (d_in,)
            norms[hook_name] += x[mask].norm(dim=-1).sum().item()
            products[hook_name] += (x[mask].T.double() @ x[mask].double()).cpu()
    # position and padding do not matter here: every position gets the same mean
    ablations = {
        hook_name: lambda x, mean=total / tokens: mean.to(x.dtype).expand_as(x)
        for hook_name, total in sums.items()
    }
    return Baselines(
        clean_ce=cross_entropy(model, batches),
        mean_ablated_ce={
            hook_name: cross_entropy(model, batches, {hook_name: ablation})
            for hook_name, ablation in ablations.items()
        },
        mean_ablated_ce_all=cross_entropy(model, batches, ablations),
        residual_norm={hook_name: norm / tokens for hook_name, norm in norms.items()},
        spectrum={
            hook_name: _spectrum(product / tokens, sums[hook_name].cpu() / tokens)
            for hook_name, product in products.items()
        },
    )


def effective_rank(spectrum: Sequence[float]) -> float:
    """Number of directions that as much variance, evenly spread, would fill: exp of the entropy.

    Args:
        spectrum: shares of the variance.

    See: Roy & Vetterli 2007, "The effective rank".
    """
    shares = torch.tensor(spectrum, dtype=torch.float64)
    return torch.special.entr(shares).sum().exp().item()


def _spectrum(second_moment: Tensor, mean: Tensor) -> list[float]:
    variances = torch.linalg.eigvalsh(second_moment - torch.outer(mean, mean)).clamp(min=0)
    return (variances / variances.sum()).flip(0).tolist()
