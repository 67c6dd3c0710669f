"""What a training changes of a model: the modes of adaptation.

    joint              all of the language model, and its heads
    lora               adapters on the frozen model, and its heads: both learn from each other
    lora_frozen_heads  adapters alone, with the heads' reconstructions in the forward pass, as in
                       arXiv 2501.19406
    heads              the heads alone, on the frozen model
    plain              all of the language model, without heads: what the others are compared with

Notable:
- a mode is put into the model: what is trained has gradients, and frozen heads are marked as such;
  `SAERegTrainer` needs to be told nothing more
"""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields

from hf_saereg.adapters import TARGETS, lora_config
from hf_saereg.configuration import DROPOUTS
from hf_saereg.errors import UserError
from hf_saereg.heads import SAEHeadConfig
from hf_saereg.heads.start import start_heads
from hf_saereg.modeling import SAERegGPT2LMHeadModel
from hf_saereg.regularizer import TermOptions

MODES = ("joint", "lora", "lora_frozen_heads", "heads", "plain")
ADAPTED = ("lora", "lora_frozen_heads")  # those with adapters


class AdaptationError(UserError):
    """A model cannot be adapted in this way; the message says why."""


@dataclass
class AdaptationArguments:
    """What of a model is trained, and where its heads come from."""

    mode: str = field(
        default="joint",
        metadata={
            "help": "joint: model and heads; lora: adapters and heads; lora_frozen_heads: adapters "
            "alone, with the heads spliced in; heads: the heads of the frozen model; plain: the "
            "model without heads, as a control."
        },
    )
    heads_from: str | None = field(
        default=None,
        metadata={
            "help": "Start from these heads: a checkpoint with saes/, of a folder or the Hub, or "
            "SAELens's folder of an SAE, or of several; new ones by default."
        },
    )
    lora_r: int = field(default=64, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Their updates' scale is alpha / rank."})
    lora_dropout: float = field(default=0.1, metadata={"help": "Dropout of what adapters read."})
    lora_targets: list[str] = field(
        default_factory=lambda: list(TARGETS),
        metadata={"help": f"Matrices of a block that have an adapter: {', '.join(TARGETS)}."},
    )

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise AdaptationError(f"mode is {self.mode!r}; choose one of {', '.join(MODES)}.")
        if self.mode == "lora_frozen_heads" and self.heads_from is None:
            raise AdaptationError(
                "lora_frozen_heads splices trained heads into the model; name them by heads_from."
            )
        if self.mode == "plain" and self.heads_from is not None:
            raise AdaptationError("mode plain trains without heads; leave heads_from out.")
        lora_config(self.lora_r, self.lora_alpha, self.lora_dropout, self.lora_targets)
        if self.mode not in ADAPTED:
            self._check_no_lora()

    def _check_no_lora(self) -> None:
        for option in fields(self):
            made = option.default_factory
            usual = option.default if made is MISSING else made()
            said = getattr(self, option.name)
            if option.name.startswith("lora_") and said != usual:
                raise AdaptationError(
                    f"{option.name} is {said}, but mode {self.mode} has no adapters; leave it out, "
                    f"or say mode {' or '.join(ADAPTED)}."
                )


def adapt(
    model: SAERegGPT2LMHeadModel,
    arguments: AdaptationArguments,
    heads: Sequence[SAEHeadConfig],
    term: TermOptions | None = None,
) -> None:
    """Give a model its heads and adapters, and freeze what the mode does not train.

    Args:
        model: without heads or adapters.
        arguments: the mode.
        heads: one a site.
        term: how their term is computed.

    Raises:
        UserError: if the model, the heads and the mode do not fit each other.
    """
    mode = arguments.mode
    if model.has_adapters:
        raise AdaptationError(
            "The model has an adapter already; merge_and_unload() and save it, and start from that."
        )
    if mode == "plain":
        for config in heads[:1]:  # its norms are those of the tokens that the others read
            model.skip_over(config)
        return
    if mode == "heads" and any(getattr(model.config, name) for name in DROPOUTS):
        raise AdaptationError(
            "The frozen model would be read through its dropout; load it with dropout 0."
        )
    if mode == "lora_frozen_heads" and term is not None:
        _check_only_splice_loss(term)
    model.attach_heads(heads, term)
    if arguments.heads_from is not None:
        model.place_heads(start_heads(arguments.heads_from, heads))
    if mode in ADAPTED:
        model.add_adapter(
            lora_config(
                arguments.lora_r,
                arguments.lora_alpha,
                arguments.lora_dropout,
                arguments.lora_targets,
            )
        )
    if mode == "heads":
        model.base_model.requires_grad_(False)
    if mode == "lora_frozen_heads":
        model.heads.freeze()
    else:
        model.heads.requires_grad_(True)  # adapters have frozen all others


def _check_only_splice_loss(term: TermOptions) -> None:
    usual = TermOptions()
    for option in fields(term):
        changed = getattr(term, option.name) != getattr(usual, option.name)
        if changed and option.name != "splice_loss":
            raise AdaptationError(
                f"{option.name} is an option of the term, and lora_frozen_heads has none: the loss "
                "of the model with all its heads spliced in is all there is; leave it out."
            )
