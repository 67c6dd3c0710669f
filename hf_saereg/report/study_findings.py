"""All that a study's page and `study.json` say, from finished cells alone."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hf_saereg.report.study_curves import MeasuredStudy
from hf_saereg.report.study_models import Cell
from hf_saereg.report.study_statistics import (
    CONFIDENCE,
    AgainstBaseline,
    SiteChange,
    against_baseline,
    site_changes,
)
from hf_saereg.report.study_tables import (
    Cost,
    MatrixCell,
    Transplanted,
    costs,
    matrix,
    transplanted,
)
from hf_saereg.report.study_verdict import Recommendation, recommend


@dataclass(frozen=True)
class StudyFindings:
    """Computed figures of a study.

    Attributes:
        measured: its curves.
        against: every variant against the baseline.
        matrix: regularizers × fresh families.
        sites: every variant, site and fresh family against the baseline.
        recommendation: with the gains and the controls.
        costs: of training.
        transplanted: co-trained heads on the baseline.
        norms: mean ‖x‖₂ a site by variant, means over seeds.
    """

    measured: MeasuredStudy
    against: list[AgainstBaseline]
    matrix: list[MatrixCell]
    sites: list[SiteChange]
    recommendation: Recommendation
    costs: list[Cost]
    transplanted: list[Transplanted]
    norms: dict[str, list[float]]

    def figures(self) -> dict[str, Any]:
        """JSON-serialisable, for `study.json`."""
        return {
            "confidence": CONFIDENCE,
            "sum_l0": self.measured.sum_l0,
            "against_baseline": [asdict(row) for row in self.against],
            "matrix": [asdict(cell) for cell in self.matrix],
            "sites": [asdict(change) for change in self.sites],
            "recommendation": asdict(self.recommendation),
            "convergence": [own._asdict() for own in self.measured.convergence],
            "costs": [asdict(cost) for cost in self.costs],
        }


def find_in_study(
    cells: Sequence[Cell],
    rows: Sequence[Mapping[str, Any]],
    baseline: str,
    settings: Mapping[str, Mapping[str, Any]],
    families: Sequence[str],
) -> StudyFindings:
    """Compute all of it.

    Args:
        cells: contents of finished cells, with `transplanted`.
        rows: of `hf_saereg.study_table.table` for them.
        baseline: the variant that the others are compared with; at least one seed is finished.
        settings: of `hf_saereg.study_settings`, of all variants.
        families: names of all families of heads.

    Raises:
        ImportError: if scipy is not installed.
    """
    study = MeasuredStudy.of(cells, baseline)
    return StudyFindings(
        study,
        against_baseline(study),
        matrix(study, settings, families),
        site_changes(study),
        recommend(study, settings),
        costs(cells, rows, settings),
        transplanted(cells),
        {row["variant"]: row["norms"] for row in rows},
    )
