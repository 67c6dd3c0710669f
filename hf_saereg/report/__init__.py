"""From `results.json` to figures and a page: what regularization bought, and what it cost.

    results.json -> results -> verdict -> findings -> page <- figures        of a comparison
    results.json… -> swept -> swept_curves -> swept_page <- swept_figures    of any models
    run.json, results.json -> tuned                                          of fine-tunings
    cell.json… -> study_models -> study_curves
               -> study_statistics, study_verdict, study_tables -> study_findings
               -> study_page <- trade_off, l0_curves, study_figures          of a study

What is notable:

- Importing this package imports neither matplotlib nor jinja2; `write_report` does, and says what
  to install where they are missing (`pip install 'hf-saereg[report]'`). What trains for long before
  its page is written asks `require_extra` first.
- The verdicts need no plotting and can be had alone.
"""

from hf_saereg.report.layout import PAGE_MODULES, require_extra
from hf_saereg.report.page import write_report
from hf_saereg.report.results import ReportError, Results, read_results
from hf_saereg.report.swept_page import write_swept_report
from hf_saereg.report.verdict import (
    Comparison,
    Convergence,
    Outcome,
    compare_compound,
    compare_sites,
    measure_convergence,
)

__all__ = [
    "PAGE_MODULES",
    "Comparison",
    "Convergence",
    "Outcome",
    "ReportError",
    "Results",
    "compare_compound",
    "compare_sites",
    "measure_convergence",
    "read_results",
    "require_extra",
    "write_report",
    "write_swept_report",
]
