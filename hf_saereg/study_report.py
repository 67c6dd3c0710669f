"""What a study's finished cells say, written: page, figures, tables, `study.json`.

    OUT/index.html     the page
    OUT/study.json     every figure on it, and the study itself
    OUT/table.md       means over seeds
    OUT/figures/       the figures as PNG and SVG; in OUT/tensorboard/ as images

Notable:
- `study.json` keeps the study's file, so that a folder that was moved or published can be reported
  on without it
"""

from pathlib import Path
from typing import Any

from hf_saereg.heads import FAMILIES
from hf_saereg.report import ReportError
from hf_saereg.report.results import read_json
from hf_saereg.report.study_findings import find_in_study
from hf_saereg.report.study_page import StudyFacts, write_study_page
from hf_saereg.run_folder import write_json
from hf_saereg.study import Study
from hf_saereg.study_cells import finished_cells, is_finished
from hf_saereg.study_l0 import steered_trainings
from hf_saereg.study_table import markdown, table

STUDY_FILE = "study.json"


def is_study(folder: Path) -> bool:
    """Whether a study was compared in a folder."""
    return (folder / STUDY_FILE).is_file()


def write_study(
    study: Study, settings: dict[str, dict[str, Any]], folder: Path, output_dir: Path
) -> Path | None:
    """Write all of it about the cells that are finished, and print the table.

    Args:
        study: what they are cells of.
        settings: of `hf_saereg.study_settings`, of its variants.
        folder: of the study.
        output_dir: folder to write to; made if it is missing.

    Returns:
        The path of `index.html`; None where no seed of the baseline is finished.

    Raises:
        ReportError: if a cell lacks a key, or holds what it must not.
    """
    cells = finished_cells(study, folder)
    rows = table(cells, study.baseline)
    if not rows:
        print(f"No seed of {study.baseline!r} is finished yet: nothing to compare with.")
        return None
    found = find_in_study(cells, rows, study.baseline, settings, list(FAMILIES))
    content = {
        "study": {
            "path": str(study.path),
            "base": str(study.base),
            "seeds": study.seeds,
            "variants": study.variants,
        },
        "rows": rows,
        "settings": settings,
        "transplanted": [
            {"variant": cell["variant"], "seed": cell["seed"], **cell["transplanted"]}
            for cell in cells
            if cell["transplanted"] is not None
        ],
    }
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / STUDY_FILE, content | found.figures())
    (output_dir / "table.md").write_text(markdown(rows), encoding="utf-8")
    print(markdown(rows))
    unfinished = [cell for cell in study.cells() if not is_finished(folder, *cell)]
    command = ["saereg", "compare", str(study.path), "--output_dir", str(folder)]
    facts = StudyFacts(study.path, study.seeds, unfinished, command)
    steered = steered_trainings(study, settings, folder)
    page = write_study_page(found, settings, facts, steered, output_dir)
    print(f"{found.recommendation.sentence}\nOpen {page}")
    return page


def rewrite_study(folder: Path, output_dir: Path) -> Path:
    """Write it again, from what the folder of a study holds.

    Args:
        folder: where it was compared.
        output_dir: folder to write to; made if it is missing.

    Returns:
        The path of `index.html`.

    Raises:
        ReportError: if `study.json` is damaged or says too little, or no cell of the baseline is
            there.
    """
    content = read_json(folder / STUDY_FILE)
    try:
        kept, settings = content["study"], content["settings"]
        study = Study(Path(kept["path"]), Path(kept["base"]), kept["seeds"], kept["variants"])
    except (KeyError, TypeError) as error:
        raise ReportError(
            f"{folder / STUDY_FILE} has no {error}, from which a study is read again; call "
            "`saereg compare` with the study's file."
        ) from error
    page = write_study(study, settings, folder, output_dir)
    if page is None:
        raise ReportError(
            f"{folder} has no finished cell of {study.baseline!r}; give the folder that `saereg "
            "compare` wrote, with the cell.json of each variant and seed."
        )
    return page
