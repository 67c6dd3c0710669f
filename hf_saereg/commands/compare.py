"""`saereg compare`: variants of a training at several seeds, trained, scored and compared.

    saereg compare STUDY.yaml --output_dir DIR

Writes to DIR a folder a variant and seed, and what `hf_saereg.study_report` makes of them; `saereg
report DIR` makes that again.

Notable:
- finished cells are never run again; interrupted ones go on
- two terminals share the work with `--shard 0 2` and `--shard 1 2`; each writes what is finished by
  then, and a control that waits for a cell of the other is left to the next call
- `--only plain 'published*'` runs these variants, and compares all that are finished
- L0 over the steps of a steered cell is kept in its folder, so that its figure can be drawn again
  where the weights and the log of the training are gone
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hf_saereg.options import parse_options
from hf_saereg.processes import refuse_several_processes
from hf_saereg.report.layout import PAGE_MODULES, require_extra
from hf_saereg.run_folder import RUN_FILE
from hf_saereg.study import REGULARIZED, Study, shard_of
from hf_saereg.study_cells import StudyCell, check_finished, is_finished, is_ready, transplant
from hf_saereg.study_l0 import keep_l0
from hf_saereg.study_report import write_study
from hf_saereg.study_settings import settings_of


@dataclass
class CompareArguments:
    """Options of the comparison; those of the variants are in the study's file."""

    study: str = field(metadata={"help": "YAML file with base, seeds and variants."})
    output_dir: str = field(default="runs/study", metadata={"help": "Folder of the study."})
    shard: list[int] = field(
        default_factory=lambda: [0, 1],
        metadata={"help": "I N: run every N-th cell, from the I-th on."},
    )
    only: list[str] = field(
        default_factory=lambda: ["*"],
        metadata={
            "help": "Variants that this call runs, * for any part of a name; all by default. What "
            "others have finished is compared too."
        },
    )


def main(words: Sequence[str] | None = None) -> None:
    """Run the cells of this shard; compare all that are finished.

    Raises:
        UserError: if the study cannot be run, before anything is trained.
    """
    refuse_several_processes(
        "share the cells of a study among terminals instead: --shard 0 2 in one, --shard 1 2 in "
        "another."
    )
    (arguments,) = parse_options(CompareArguments, arguments=words)
    require_extra(*PAGE_MODULES, "scipy")
    study, folder = Study.read(Path(arguments.study)), Path(arguments.output_dir)
    settings = settings_of(study)
    cells = shard_of(study.cells_of(arguments.only), arguments.shard)
    _run(study, cells, folder)
    for variant, seed in cells:
        scored = transplant(study, variant, seed, folder)
        has_heads = study.model_of(variant) == REGULARIZED
        if has_heads and variant != study.baseline and not scored:
            print(
                f"The heads of {variant!r} at seed {seed} are not scored on {study.baseline!r}: "
                "one of the two is unfinished, or its weights are gone."
            )
        if settings[variant]["targets"]:
            keep_l0(variant, seed, folder)
    write_study(study, settings, folder, folder)


def _run(study: Study, cells: list[tuple[str, int]], folder: Path) -> None:
    finished = [cell for cell in study.cells() if is_finished(folder, *cell)]
    unchecked = [cell for cell in finished if not check_finished(study, *cell, folder)]
    if unchecked:
        print(
            f"{len(unchecked)} finished cells have no {RUN_FILE} beside them, as "
            f"{unchecked[0][0]!r} at seed {unchecked[0][1]}: that they were made with the options "
            "of this study cannot be checked."
        )
    left = [cell for cell in cells if cell not in finished]
    ready = [cell for cell in left if is_ready(study, *cell, folder)]
    prepared = [StudyCell.prepare(study, *cell, folder) for cell in ready]
    for cell in prepared:  # all were prepared first: the last mistake shows before any training
        cell.run()
    for variant, seed in (cell for cell in left if cell not in ready):
        if is_ready(study, variant, seed, folder):
            StudyCell.prepare(study, variant, seed, folder).run()
        else:
            print(
                f"{variant!r} at seed {seed} trains as long as a cell that another shard has not "
                "finished; call this command again then."
            )
