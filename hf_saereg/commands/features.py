"""`saereg features`: what the latents of a head stand for, as a page to browse.

    saereg features MODEL [MODEL] --hook_name HOOK_NAME --dataset TEXT --output_dir DIR

Writes `DIR/index.html`.

Notable:
- the head is the model's own, or lies in the folder named by `--saes`, such as DIR/saes/CELL of a
  sweep; with two models there are two
- heads whose sweep was on another model are refused; where no record says on which, the page does
- two models read the same tokens and are shown side by side, paired as `feature_matches` says
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_saereg.commands.text import TextArguments
from hf_saereg.errors import UserError
from hf_saereg.feature_matches import (
    CORRELATION,
    DECODER,
    MATCHINGS,
    Match,
    chance_cosine,
    match_by_correlation,
    match_by_decoder,
)
from hf_saereg.features import Reader, Survey, describe, survey
from hf_saereg.fidelity import Batch
from hf_saereg.fresh import fidelity_batches
from hf_saereg.heads import SAEHead, SkipOptions
from hf_saereg.heads.folder import load_head, saved_hook_names
from hf_saereg.loading import fingerprint, load_checkpoint
from hf_saereg.modeling import SAERegGPT2LMHeadModel
from hf_saereg.options import parse_options
from hf_saereg.processes import start_accelerator
from hf_saereg.quality import require_matching
from hf_saereg.report.feature_page import Shown, write_feature_page
from hf_saereg.run_folder import command_line, recorded_fingerprint


class FeaturesError(UserError):
    """Features cannot be shown; the message says why."""


@dataclass
class FeaturesArguments:
    """Options of the page; those of the text are `TextArguments`."""

    models: list[str] = field(metadata={"help": "One or two folders or Hub repositories."})
    hook_name: str = field(metadata={"help": "Site of the head, e.g. blocks.2.hook_resid_pre."})
    saes: list[str] | None = field(
        default=None,
        metadata={"help": "Folders that hold saes/HOOK_NAME, one a model; by default the models."},
    )
    match_by: str = field(
        default=CORRELATION,
        metadata={
            "help": "What pairs the features of two models: the correlation of their activations, "
            "or, one to one, the cosine of their decoder directions (`decoder`)."
        },
    )
    output_dir: str = field(default="runs/features", metadata={"help": "Folder of the page."})
    blocks: int = field(default=512, metadata={"help": "Validation blocks that are read."})
    contexts: int = field(default=8, metadata={"help": "Contexts shown of a feature."})
    window: int = field(default=24, metadata={"help": "Tokens on either side of the strongest."})
    max_features: int = field(default=1000, metadata={"help": "Features shown, by frequency."})
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub repository of another tokenizer, or `characters`."},
    )
    use_cpu: bool = field(default=False, metadata={"help": "Even where there is a GPU."})

    def __post_init__(self) -> None:
        if not 1 <= len(self.models) <= 2:
            raise FeaturesError(
                f"{len(self.models)} models were named; give one, or two to compare."
            )
        if self.saes is not None and len(self.saes) != len(self.models):
            raise FeaturesError(
                f"--saes names {len(self.saes)} folders for {len(self.models)} models; give each "
                "model one."
            )
        if self.match_by not in MATCHINGS:
            raise FeaturesError(
                f"match_by is {self.match_by!r}; it must be {' or '.join(MATCHINGS)}."
            )
        if self.match_by == DECODER and len(self.models) == 1:
            raise FeaturesError(
                "match_by decoder pairs the features of two models, and one was named; name "
                "another, or leave it out."
            )
        for name, least in (("blocks", 1), ("contexts", 1), ("window", 0), ("max_features", 1)):
            if getattr(self, name) < least:
                raise FeaturesError(
                    f"{name} is {getattr(self, name)}; it must be at least {least}."
                )

    @property
    def folders(self) -> list[str | None]:
        """Where each model's head lies; None for its own."""
        return self.saes or [None] * len(self.models)


def main(words: Sequence[str]) -> None:
    """Read the text and write the page.

    Raises:
        UserError: if a model, a head or the text cannot be had.
    """
    arguments, text, skip = parse_options(
        FeaturesArguments, TextArguments, SkipOptions, arguments=words
    )
    if arguments.match_by == DECODER:
        require_matching()
    device = start_accelerator(arguments.use_cpu).device
    readers = _readers(arguments, skip, device)
    config = min((reader.model.config for reader in readers), key=lambda own: own.n_positions)
    blocks = text.blocks(config, readers[0].tokenizer)["validation"]
    batches = fidelity_batches(blocks, arguments.blocks, config)
    surveys, correlations = survey(readers, batches, arguments.contexts)
    heads = [
        _shown(reader, found, batches, arguments, _is_known_to_belong(name, folder))
        for reader, found, name, folder in zip(
            readers, surveys, arguments.models, arguments.folders, strict=True
        )
    ]
    matches, chance = _matches(arguments.match_by, readers, heads, correlations)
    page = write_feature_page(
        heads, matches, text.dataset, command_line(), Path(arguments.output_dir), chance
    )
    print(f"Open {page.resolve()}")


def _readers(arguments: FeaturesArguments, skip: SkipOptions, device: torch.device) -> list[Reader]:
    readers = []
    for name, folder in zip(arguments.models, arguments.folders, strict=True):
        model, tokenizer = load_checkpoint(name, arguments.tokenizer)
        head = _head(name, model, folder, arguments.hook_name)
        model.skip_over(skip.for_trained(head.config, folder or name))
        label = Path(name).expanduser().resolve().name
        readers.append(Reader(label, model.to(device), head.to(device).eval(), tokenizer))
    if len(readers) == 2:
        first, second = readers
        if not _read_alike(first.tokenizer, second.tokenizer):
            raise FeaturesError(
                f"{arguments.models[0]} and {arguments.models[1]} have different tokenizers; only "
                "models that read the same tokens stand side by side."
            )
        if first.model.skip != second.model.skip:
            raise FeaturesError(
                f"The head for {arguments.models[0]} was trained with "
                f"{first.model.skip.skip_in_words}, that for {arguments.models[1]} with "
                f"{second.model.skip.skip_in_words}; only heads that read the same tokens stand "
                "side by side."
            )
        widths = [reader.head.config.d_in for reader in readers]
        if arguments.match_by == DECODER and widths[0] != widths[1]:
            raise FeaturesError(
                f"The heads of {arguments.models[0]} and {arguments.models[1]} read streams of "
                f"{widths[0]} and {widths[1]} dimensions, between which no directions can be "
                f"compared; say --match_by {CORRELATION}."
            )
        if first.label == second.label:
            first.label, second.label = arguments.models
    return readers


def _read_alike(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    return first.get_vocab() == second.get_vocab()


def _head(name: str, model: SAERegGPT2LMHeadModel, folder: str | None, hook_name: str) -> SAEHead:
    if hook_name not in model.hook_names:
        raise FeaturesError(
            f"Unknown hook name {hook_name!r}; {name} has {', '.join(model.hook_names)}."
        )
    there = model.heads.hook_names if folder is None else saved_hook_names(Path(folder))
    if hook_name not in there:
        others = f"heads on {', '.join(there)}" if there else "no heads"
        raise FeaturesError(
            f"{folder or name} has {others}, none on {hook_name}; name the folder that holds "
            f"saes/{hook_name} with --saes."
        )
    head = model.heads[hook_name] if folder is None else load_head(Path(folder), hook_name)
    if head.config.d_in != model.config.n_embd:
        raise FeaturesError(
            f"The head in {folder} reads {head.config.d_in} dimensions, but the stream of {name} "
            f"has {model.config.n_embd}; it belongs to another model."
        )
    recorded = folder and _swept_model(folder)
    if recorded is not None and recorded != fingerprint(model):
        raise FeaturesError(
            f"The sweep that wrote {folder} was on another model than {name}; give the model "
            "of that sweep, or heads that were trained on this one."
        )
    return head


def _swept_model(folder: str) -> str | None:
    """What the `run.json` of a sweep says of the model of its heads in `saes/CELL`."""
    cell = Path(folder).resolve()
    return recorded_fingerprint(cell.parents[1]) if cell.parent.name == "saes" else None


def _is_known_to_belong(name: str, folder: str | None) -> bool:
    is_own = folder is None or Path(folder).resolve() == Path(name).resolve()
    return is_own or _swept_model(folder) is not None


def _shown(
    reader: Reader,
    found: Survey,
    batches: list[Batch],
    arguments: FeaturesArguments,
    belongs: bool,
) -> Shown:
    order = found.fired.argsort(descending=True, stable=True)
    alive = order[found.fired[order] > 0].tolist()
    chosen = alive[: arguments.max_features]
    config = reader.head.config
    return Shown(
        label=reader.label,
        hook_name=config.hook_name,
        head=f"a {config.architecture} head with {config.d_sae:,} latents",
        tokens=found.tokens,
        features=describe(reader, found, batches, chosen, arguments.window),
        dead=config.d_sae - len(alive),
        left_out=len(alive) - len(chosen),
        tokenizer=reader.tokenizer,
        belongs=belongs,
    )


def _matches(
    match_by: str, readers: Sequence[Reader], heads: Sequence[Shown], correlations: Tensor | None
) -> tuple[list[Match], float | None]:
    shown = [[feature.index for feature in head.features] for head in heads]
    if correlations is None:
        return [Match(latent, None) for latent in shown[0]], None
    if match_by == DECODER:
        directions = [reader.head.W_dec.detach() for reader in readers]
        matches = match_by_decoder(*shown, directions, correlations)
        return matches, chance_cosine(*shown, directions)
    return match_by_correlation(*shown, correlations), None
