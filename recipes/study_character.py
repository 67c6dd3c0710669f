"""Train several variants of a character model with several seeds each, and compare them.

    accelerate launch recipes/study_character.py --study recipes/study_normalization.yaml

Writes to `output_dir`: a folder a variant and seed, `study.json`, `table.md`, `trade_off.png`
and, where heads have a target, `l0.png`.
Finished cells are not run again. Two terminals share the work with `--shard 0 2` and `--shard 1 2`;
each writes the tables of what is finished by then.
"""

from dataclasses import dataclass, field
from pathlib import Path

from hf_saereg.errors import one_sentence_errors
from hf_saereg.options import parse_options
from hf_saereg.report.l0_curves import draw_l0_curves
from hf_saereg.report.trade_off import draw_trade_off
from hf_saereg.run_folder import write_json
from hf_saereg.study import (
    Study,
    StudyCell,
    finished_cells,
    is_finished,
    markdown,
    shard_of,
    steered_trainings,
    table,
)


@dataclass
class StudyArguments:
    """Options of this recipe; those of the variants are in the study's file."""

    study: str = field(metadata={"help": "YAML file with base, seeds and variants."})
    output_dir: str = field(default="runs/study", metadata={"help": "Folder of the study."})
    shard: list[int] = field(
        default_factory=lambda: [0, 1],
        metadata={"help": "I N: run every N-th cell, from the I-th on."},
    )


def main() -> None:
    """Run the cells of this shard; compare all that are finished."""
    (arguments,) = parse_options(StudyArguments)
    study, folder = Study.read(Path(arguments.study)), Path(arguments.output_dir)
    open_cells = [
        StudyCell.prepare(study, variant, seed, folder)
        for variant, seed in shard_of(study.cells(), arguments.shard)
        if not is_finished(folder, variant, seed)
    ]  # all of them, so that a mistake in the last variant shows before the first is trained
    for cell in open_cells:
        cell.run()
    rows = table(finished_cells(study, folder), study.baseline)
    if not rows:
        print(f"No seed of {study.baseline!r} is finished yet: nothing to compare with.")
        return
    write_json(folder / "study.json", rows)
    (folder / "table.md").write_text(markdown(rows))
    draw_trade_off(rows, folder / "trade_off.png")
    logs, targets = steered_trainings(study, folder)
    if logs:
        draw_l0_curves(logs, targets, folder / "l0.png")
    print(markdown(rows))


if __name__ == "__main__":
    with one_sentence_errors():
        main()
