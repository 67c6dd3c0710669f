"""How well heads stand in for the activations that they read.

    text → clean predictions → predictions with reconstructions in place → CE, KL → scores

Notable:
- means are over predicted tokens, sums over batches and processes are kept in double precision:
  every process takes every n-th batch, so the number of processes changes nothing but the time
- one mask, the model's `token_mask`: padding, and what the heads skip, is neither read nor replaced
  nor counted, by an ablation as little as by a head
- CE and KL are over all predicted tokens; the first one after padding on the left, predicted from
  padding, does not count (`labels` alone would count it)
- the scores themselves, and what each figure is, are in `scores.py`
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping
from itertools import islice
from typing import NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import kl_div

from hf_saereg.errors import UserError
from hf_saereg.heads import SAEHeadConfig, SkipOptions
from hf_saereg.heads.bank import HeadBank
from hf_saereg.heads.tokens import tokens_read
from hf_saereg.modeling import SAERegGPT2LMHeadModel
from hf_saereg.positions import language_inputs, with_positions
from hf_saereg.scores import Baselines, Effect, Fidelity, SiteFidelity
from hf_saereg.splicing import Ablation, Splice

# input_ids and labels, (batch, sequence); attention_mask where padded, position_ids where not usual
Batch = dict[str, Tensor]
K = TypeVar("K", bound=Hashable)

CLEAN, COMPOUND = "clean", "compound"  # no hook name looks like these


class FidelityError(UserError):
    """Fidelity cannot be measured; the message says why."""


def predicted_positions(batch: Batch) -> Tensor:
    """(batch, sequence − 1) bool, where the next token is real, asked for, and predicted from one.

    Args:
        batch: `labels`, and `attention_mask` where there is padding, on either side.
    """
    asked = batch["labels"][:, 1:] != -100
    mask = batch.get("attention_mask")
    return asked if mask is None else asked & mask[:, 1:].bool() & mask[:, :-1].bool()


def fidelity(
    model: SAERegGPT2LMHeadModel,
    heads: HeadBank,
    batches: Iterable[Batch],
    base: Baselines,
    accelerator: Accelerator | None = None,
) -> Fidelity:
    """Score heads on a model, each alone and all together.

    Args:
        model: in evaluation mode, and its heads too.
        heads: any subset of its sites.
        batches: text, the same on every process; iterated once.
        base: of the model on the same batches.
        accelerator: whose processes share the work; every process must call this.
    """
    return fidelity_of_each(model, {COMPOUND: heads}, batches, base, accelerator)[COMPOUND]


@torch.no_grad()
def fidelity_of_each(
    model: SAERegGPT2LMHeadModel,
    banks: Mapping[K, HeadBank],
    batches: Iterable[Batch],
    base: Baselines,
    accelerator: Accelerator | None = None,
) -> dict[K, Fidelity]:
    """Score several sets of heads on one model; its clean predictions are made once for all.

    Args:
        model: in evaluation mode, and the heads too.
        banks: sets of heads, by whatever names them.
        batches: as `fidelity` takes them.
        base: of the model on the same batches.
        accelerator: whose processes share the work; every process must call this.

    Raises:
        FidelityError: if heads were trained to skip other tokens than the model does.
    """
    splices: dict[tuple[K, str], dict[str, Splice]] = {}
    for key, bank in banks.items():
        for head in bank:
            _check_skips(model, head.config)
            splices[key, head.config.hook_name] = {head.config.hook_name: Splice(head)}
        splices[key, COMPOUND] = {head.config.hook_name: Splice(head) for head in bank}
    shifts = _predictions(model, splices, batches, accelerator)
    seen = _over_processes(
        {
            trial: {hook_name: splice.statistics for hook_name, splice in own.items()}
            for trial, own in splices.items()
        },
        accelerator,
    )
    return {
        key: Fidelity(
            sites={
                hook_name: SiteFidelity(
                    Effect(
                        *shifts[key, hook_name],
                        base.clean_ce,
                        base.mean_ablated_ce[hook_name],
                        base.zero_ablated_ce[hook_name],
                    ),
                    seen[key, hook_name][hook_name],
                )
                for hook_name in bank.hook_names
            },
            compound=Effect(
                *shifts[key, COMPOUND],
                base.clean_ce,
                base.mean_ablated_ce_all if bank.hook_names == model.hook_names else None,
                base.zero_ablated_ce_all if bank.hook_names == model.hook_names else None,
            ),
            compound_l0=sum(statistics.l0 for statistics in seen[key, COMPOUND].values()),
        )
        for key, bank in banks.items()
    }


@torch.no_grad()
def baselines(
    model: SAERegGPT2LMHeadModel,
    batches: Iterable[Batch],
    accelerator: Accelerator | None = None,
) -> Baselines:
    """Clean CE, ablated CE and activation norms of a model.

    Args:
        model: in evaluation mode.
        batches: text, the same on every process; iterated twice.
        accelerator: whose processes share the work; every process must call this.
    """
    moments = _moments(model, batches, accelerator)
    means = {hook_name: Ablation(site.mean) for hook_name, site in moments.items()}
    zeros = {name: Ablation(torch.zeros_like(site.mean)) for name, site in moments.items()}
    trials: dict[Hashable, dict[str, Ablation]] = {CLEAN: {}}
    for kind, ablations in (("mean", means), ("zero", zeros)):
        trials |= {(kind, name): {name: ablation} for name, ablation in ablations.items()}
        trials[kind, COMPOUND] = ablations
    ce = {
        trial: shift.ce
        for trial, shift in _predictions(model, trials, batches, accelerator).items()
    }
    return Baselines(
        clean_ce=ce[CLEAN],
        mean_ablated_ce={hook_name: ce["mean", hook_name] for hook_name in means},
        mean_ablated_ce_all=ce["mean", COMPOUND],
        zero_ablated_ce={hook_name: ce["zero", hook_name] for hook_name in means},
        zero_ablated_ce_all=ce["zero", COMPOUND],
        residual_norm={name: (site.norm / site.tokens).item() for name, site in moments.items()},
        spectrum={hook_name: _spectrum(site) for hook_name, site in moments.items()},
    )


def _check_skips(model: SAERegGPT2LMHeadModel, config: SAEHeadConfig) -> None:
    if config.skip not in (SkipOptions(), model.skip):
        raise FidelityError(
            f"The head on {config.hook_name} was trained with {config.skip_in_words}, the model is "
            f"read with {model.skip.skip_in_words}; call model.skip_over(head.config)."
        )


class _Shift(NamedTuple):
    """CE and KL(original ‖ replaced), means over predicted tokens."""

    ce: float
    kl: float


def _predictions(
    model: SAERegGPT2LMHeadModel,
    trials: Mapping[K, Mapping[str, Splice | Ablation]],
    batches: Iterable[Batch],
    accelerator: Accelerator | None,
) -> dict[K, _Shift]:
    """CE and KL with replacements at the sites, by trial."""
    zero = torch.zeros((), dtype=torch.float64, device=model.device)
    sums = {trial: [zero, zero] for trial in trials}  # of CE and KL
    count = torch.zeros((), dtype=torch.int64, device=model.device)
    for batch in _share(model, batches, accelerator):
        positions = predicted_positions(batch)
        targets = batch["labels"][:, 1:][positions].unsqueeze(1)  # (predicted, 1)
        clean = _log_probabilities(model, batch, positions, {})  # (predicted, vocabulary)
        count = count + len(targets)
        for trial, own in trials.items():
            log_p = _log_probabilities(model, batch, positions, own) if own else clean
            ce = -log_p.gather(1, targets).sum(dtype=torch.float64)
            kl = kl_div(log_p, clean, log_target=True, reduction="none").sum(dtype=torch.float64)
            sums[trial] = [sums[trial][0] + ce, sums[trial][1] + kl]
    sums, count = _over_processes((sums, count), accelerator)
    if count == 0:
        raise FidelityError(
            "No token of the text is predicted: give rows of at least two real tokens, with labels."
        )
    return {trial: _Shift(*((total / count).item() for total in sums[trial])) for trial in trials}


def _log_probabilities(
    model: SAERegGPT2LMHeadModel,
    batch: Batch,
    positions: Tensor,
    replacements: Mapping[str, Splice | Ablation],
) -> Tensor:
    mask = model.token_mask(batch) if replacements else None
    for replacement in replacements.values():
        replacement.mask = mask
    with model.at_sites(replacements):
        logits = model(**language_inputs(batch), compute_term=False, use_cache=False).logits
    predicted = logits[:, :-1][positions]  # (predicted, vocabulary)
    return predicted.to(torch.promote_types(predicted.dtype, torch.float32)).log_softmax(-1)


class _Moments(NamedTuple):
    """Sums over the tokens of one site that are read, in double precision."""

    tokens: Tensor  # ()
    norm: Tensor  # () of ‖x‖
    total: Tensor  # (d_in,)
    products: Tensor  # (d_in, d_in)

    @property
    def mean(self) -> Tensor:
        return self.total / self.tokens


def _moments(
    model: SAERegGPT2LMHeadModel, batches: Iterable[Batch], accelerator: Accelerator | None
) -> dict[str, _Moments]:
    width = model.config.n_embd
    sizes = ((), (), (width,), (width, width))
    zeros = [torch.zeros(size, dtype=torch.float64, device=model.device) for size in sizes]
    moments = {hook_name: _Moments(*zeros) for hook_name in model.hook_names}
    for batch in _share(model, batches, accelerator):
        mask = model.token_mask(batch)
        with model.reading(model.hook_names) as activations:
            model.transformer(**language_inputs(batch), use_cache=False)
        for hook_name, x in activations.items():
            x = tokens_read(x, mask).double()  # (tokens, d_in)
            own = (x.new_tensor(len(x)), x.norm(dim=-1).sum(), x.sum(dim=0), x.T @ x)
            moments[hook_name] = _Moments(*map(torch.add, moments[hook_name], own))
    return _over_processes(moments, accelerator)


def _spectrum(site: _Moments) -> list[float]:
    covariance = site.products / site.tokens - torch.outer(site.mean, site.mean)
    variances = torch.linalg.eigvalsh(covariance.cpu()).clamp(min=0)
    return (variances / variances.sum()).flip(0).tolist()


def _share(
    model: SAERegGPT2LMHeadModel, batches: Iterable[Batch], accelerator: Accelerator | None
) -> Iterator[Batch]:
    """Every n-th batch, on the model's device, with positions counted over real tokens."""
    first, step = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    for batch in islice(batches, first, None, step):
        yield with_positions({name: tensor.to(model.device) for name, tensor in batch.items()})


def _over_processes(sums: K, accelerator: Accelerator | None) -> K:
    return sums if accelerator is None else accelerator.reduce(sums)
