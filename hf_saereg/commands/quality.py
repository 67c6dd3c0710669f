"""`saereg quality`: are the features of swept heads better, or packed?

    saereg quality RUN… --dataset TEXT

Writes `RUN/quality.json`, which `saereg report` shows of sweeps and recipes.

Notable:
- a run is a folder of `saereg sweep`, of a training recipe with its two models, or of one cell of a
  study, DIR/VARIANT/seed_N
- consistency needs two seeds of a cell, composition two sizes of it; what a run lacks is left out
  and said; the classes of characters need a tokenizer with one token a character
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hf_saereg.commands.text import TextArguments
from hf_saereg.fresh import fidelity_batches
from hf_saereg.head_quality import QUALITY_FILE, kept_sets, measure_model, own_set
from hf_saereg.heads import SkipOptions
from hf_saereg.layout import MODEL_CONFIG
from hf_saereg.loading import fingerprint, load_checkpoint
from hf_saereg.options import parse_options
from hf_saereg.processes import start_accelerator
from hf_saereg.quality import QualityError, require_matching
from hf_saereg.report.measured import as_text, read_measured
from hf_saereg.report.results import read_json
from hf_saereg.run_folder import (
    command_line,
    package_versions,
    recorded_fingerprint,
    write_json,
)
from hf_saereg.study_cells import CELL_FILE

RESULTS_FILE = "results.json"
FRESH_FOLDER = "fresh"
KINDS = ("heads", "consistency", "composition")


@dataclass
class QualityArguments:
    """Options of the measures; those of the text are `TextArguments`."""

    runs: list[str] = field(
        metadata={"help": "Folders of sweeps, training recipes or cells of studies."}
    )
    models: list[str] | None = field(
        default=None,
        metadata={"help": "Where the models of sweeps are now, one a run, if they were moved."},
    )
    blocks: int = field(default=256, metadata={"help": "Validation blocks that are read."})
    parts: int = field(
        default=4, metadata={"help": "Most latents of a wider SAE that make up one of a narrower."}
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub repository of another tokenizer, or `characters`."},
    )
    use_cpu: bool = field(default=False, metadata={"help": "Even where there is a GPU."})

    def __post_init__(self) -> None:
        for name, least in (("blocks", 2), ("parts", 1)):
            if getattr(self, name) < least:
                raise QualityError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        if self.models is not None and len(self.models) != len(self.runs):
            raise QualityError(
                f"--models names {len(self.models)} models for {len(self.runs)} runs; give each "
                "run one."
            )


class Member(NamedTuple):
    """A model and the fresh heads on it.

    Attributes:
        name: in the run's results.
        model: folder or Hub repository.
        folder: with the cells of its fresh heads.
    """

    name: str
    model: str
    folder: Path


def main(words: Sequence[str]) -> None:
    """Measure every head of the runs.

    Raises:
        UserError: if a run, a model or the text cannot be had; before anything is measured.
    """
    arguments, text, skip = parse_options(
        QualityArguments, TextArguments, SkipOptions, arguments=words
    )
    require_matching()
    device = start_accelerator(arguments.use_cpu).device
    runs = [Path(run).expanduser() for run in arguments.runs]
    moved = arguments.models or [None] * len(runs)
    members = {run: members_of(run, model) for run, model in zip(runs, moved, strict=True)}
    for run, own in members.items():
        rows, read = {kind: [] for kind in KINDS}, {}
        for member in own:
            found, tokens = _measure(member, run, arguments, text, skip, device)
            read[member.name] = tokens
            for kind in KINDS:
                rows[kind] += found[kind]
        setup = {"dataset": text.dataset, "tokens": read, "parts": arguments.parts}
        setup |= {"command": command_line(), "versions": package_versions()}
        write_json(run / QUALITY_FILE, rows | {"setup": setup})
        print(as_text(read_measured([run])))
        is_reported = (run / RESULTS_FILE).is_file()
        show = f"; show it with: saereg report {run}" if is_reported else ""
        print(f"Wrote {run / QUALITY_FILE}{show}")


def members_of(run: Path, moved: str | None) -> list[Member]:
    """The models of a run, each with its fresh heads.

    Args:
        run: folder with a `results.json`, or of a study's cell.
        moved: where the model of a sweep is now.

    Raises:
        UserError: if the folder is of another kind.
    """
    if (run / FRESH_FOLDER).is_dir() and moved is not None:
        raise QualityError(f"{run} holds its own models; leave --models out.")
    if (run / CELL_FILE).is_file():
        members = [_member_of_study(run)]
    elif (run / FRESH_FOLDER).is_dir():
        names = read_json(run / RESULTS_FILE)["baselines"]
        members = [Member(name, str(run / name), run / FRESH_FOLDER / name) for name in names]
    else:
        results = read_json(run / RESULTS_FILE)
        (name,) = results["baselines"]
        members = [Member(name, moved or results["setup"]["source"], run)]
    for member in members:
        kept_sets(member.folder)
    return members


def _member_of_study(cell: Path) -> Member:
    content = read_json(cell / CELL_FILE)
    model = cell / content["model"]
    if not (model / MODEL_CONFIG).is_file():
        raise QualityError(
            f"{cell} has no model to measure, for {model} is not there; name a cell of a study "
            "that was trained and still has it."
        )
    return Member(content["variant"], str(model), cell / FRESH_FOLDER)


def _measure(
    member: Member,
    run: Path,
    arguments: QualityArguments,
    text: TextArguments,
    skip: SkipOptions,
    device: torch.device,
) -> tuple[dict[str, list[dict[str, Any]]], int]:
    model, tokenizer = load_checkpoint(member.model, arguments.tokenizer)
    swept = recorded_fingerprint(run)
    if swept is not None and swept != fingerprint(model):
        raise QualityError(
            f"{member.model} is not the model that {run} was swept on; name that one by --models."
        )
    blocks = text.blocks(model.config, tokenizer)["validation"]
    batches = fidelity_batches(blocks, arguments.blocks, model.config)
    model = model.to(device)
    sets = kept_sets(member.folder) + own_set(model)
    fresh = sets[0].head(model, model.hook_names[0])  # all cells of a run skip the same
    model.skip_over(skip.for_trained(fresh.config, member.folder))
    rows = measure_model(model, tokenizer, sets, batches, arguments.parts, member.name)
    return rows, sum(map(model.token_count, batches))
