"""What no training can be asked for: refused in a sentence before the first step.

Notable:
- each option is in one list, with what it does; a training that is sharded, or whose heads are
  frozen, refuses by that
"""

from dataclasses import fields
from typing import NamedTuple

from hf_saereg.errors import UserError
from hf_saereg.heads.folder import check_savable
from hf_saereg.modeling import SAERegGPT2LMHeadModel
from hf_saereg.training_arguments import SAERegArguments


class HeadsOption(NamedTuple):
    """An option of `SAERegArguments` that does something to heads, or with them.

    Attributes:
        name: of the option, which is off by default.
        reads_inside: runs blocks by themselves, past the outermost group of a model's shards.
        trains_heads: means nothing to heads that are frozen.
    """

    name: str
    reads_inside: bool = False
    trains_heads: bool = False


HEADS_OPTIONS = (
    HeadsOption("eval_fidelity", reads_inside=True),
    HeadsOption("b_dec_init", reads_inside=True, trains_heads=True),
    HeadsOption("resample_every", reads_inside=True, trains_heads=True),
    HeadsOption("heads_learning_rate", trains_heads=True),
)


def check_training(
    arguments: SAERegArguments, model: SAERegGPT2LMHeadModel, is_sharded: bool
) -> None:
    """Check that a model can be trained as the options say, and saved.

    Args:
        arguments: of the training.
        model: with its heads and adapters.
        is_sharded: whether FSDP shares it out among processes.

    Raises:
        HeadConfigError: if a head could not be saved.
        UserError: if an option does not work with shards or frozen heads, or `anchor_weight` has
            nothing to hold.
    """
    check_savable(model.heads)
    asked = _asked(arguments)
    if is_sharded:
        _check_shards(arguments, asked)
    if model.heads and model.heads.frozen:
        _check_frozen_heads(arguments, asked)
    if arguments.anchor_weight and not any(p.requires_grad for p in model.base_model.parameters()):
        raise UserError(
            "anchor_weight holds the language model, which is frozen here; leave it out."
        )


def _asked(arguments: SAERegArguments) -> list[HeadsOption]:
    """Options of the list that are on."""
    usual = {option.name: option.default for option in fields(arguments)}
    return [o for o in HEADS_OPTIONS if getattr(arguments, o.name) != usual[o.name]]


def _check_shards(arguments: SAERegArguments, asked: list[HeadsOption]) -> None:
    for option in asked:
        if option.reads_inside:
            raise UserError(
                f"{option.name} {str(getattr(arguments, option.name)).lower()} does not work where "
                "FSDP shards the model; leave it out, or launch with "
                "recipes/accelerate/multi_gpu.yaml."
            )


def _check_frozen_heads(arguments: SAERegArguments, asked: list[HeadsOption]) -> None:
    if arguments.anchor_weight:
        raise UserError(
            "anchor_weight holds the model without reconstructions in it, and frozen heads are "
            "spliced into every step; leave it out, and say splice_loss kl to stay close."
        )
    for option in asked:
        if option.trains_heads:
            raise UserError(
                f"{option.name} is {getattr(arguments, option.name)}, but the heads are frozen; "
                "leave it out."
            )
