"""`saereg report`: what runs found, as a page to open.

    saereg report RUN… --output_dir OUT

Notable:
- a run is a folder with a `results.json`, of `saereg sweep` or of a training recipe; what
  `saereg quality` left there is shown too
- the folder of a study, given alone, gets the page of the study again, from its finished cells
- beside the page: `figures/` with every figure as PNG and SVG, and `tensorboard/` with them all
- the run of a training recipe, given alone, gets the page of a comparison; anything else a page
  with every model side by side
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hf_saereg.options import parse_options
from hf_saereg.report import ReportError, write_report, write_swept_report
from hf_saereg.report.results import read_json
from hf_saereg.report.swept import RESULTS_FILE
from hf_saereg.study_report import is_study, rewrite_study


@dataclass
class ReportArguments:
    """Options of the report."""

    runs: list[str] = field(
        metadata={"help": "Folders with a results.json, or the one of a study."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of the page; that of the run where there is one."}
    )

    def __post_init__(self) -> None:
        if self.output_dir is None and len(self.runs) > 1:
            raise ReportError("Several runs need --output_dir, the folder for their common page.")


def main(words: Sequence[str]) -> None:
    """Write the page.

    Raises:
        UserError: if a run cannot be read, or what pages are written with is not installed.
    """
    (arguments,) = parse_options(ReportArguments, arguments=words)
    folders = [Path(run).expanduser() for run in arguments.runs]
    output_dir = folders[0] if arguments.output_dir is None else Path(arguments.output_dir)
    if studies := [folder for folder in folders if is_study(folder)]:
        if len(folders) > 1:
            raise ReportError(
                f"{studies[0]} is a study, which has a page of its own; report it alone."
            )
        rewrite_study(studies[0], output_dir)
        return
    print(f"Open {_write(folders, output_dir).resolve()}")


def _write(folders: list[Path], output_dir: Path) -> Path:
    path = folders[0] / RESULTS_FILE
    if len(folders) == 1 and path.is_file():
        content = read_json(path)
        if "regularizer" in content.get("setup", {}):
            return write_report(content, output_dir, folders[0])
    return write_swept_report(folders, output_dir)
