"""The page that people open: one HTML file, its figures inside it, no script and no network."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from hf_saereg.report import findings
from hf_saereg.report.layout import (
    Caption,
    Picture,
    draw_pictures,
    render_template,
    require_extra,
)
from hf_saereg.report.results import COTRAINED, FRESH, Results, SAEResult, read_results
from hf_saereg.report.verdict import Curve, compound_curve, site_curve

FIGURE_TITLES = {
    "compound": "Compound CE increase against Σ\N{NO-BREAK SPACE}L0",
    "sites": "CE increase against L0, site by site",
    "ce": "CE on training and validation text",
    "norms": "Mean norm of the residual stream",
}
PHASES = {
    "train_plain": "Training the plain model",
    "train_regularized": "Training the regularized model",
    "fresh_plain": "Fresh SAEs on the plain model",
    "fresh_regularized": "Fresh SAEs on the regularized model",
    "fidelity": "Measuring CE increase, L0 and FVU",
}


class CotrainedHead(NamedTuple):
    """A head of the regularizer.

    Attributes:
        head: what was measured of it.
        fresh: CE increase of a fresh SAE at the same L0; None where none reached it.
    """

    head: SAEResult
    fresh: float | None


def write_report(results: Mapping[str, object], output_dir: Path) -> Path:
    """Write `index.html` and `figures/*.png`.

    Args:
        results: what `json.load` returned for `results.json`.
        output_dir: folder to write to; made if it is missing.

    Returns:
        The path of `index.html`.

    Raises:
        ReportError: if a key of the results is missing or holds what it must not.
        ImportError: if matplotlib or jinja2 is not installed.
    """
    checked = read_results(results)
    require_extra("matplotlib", "jinja2")
    from hf_saereg.report.figures import DRAWINGS

    found = findings.find(checked)
    captions = {
        name: Caption(FIGURE_TITLES[name], found.readings[name], found.descriptions[name])
        for name in DRAWINGS
    }
    folder = Path(output_dir)
    pictures = draw_pictures(DRAWINGS, checked, captions, folder / "figures")
    page = folder / "index.html"
    page.write_text(render_page(checked, found, pictures), encoding="utf-8")
    return page


def render_page(results: Results, found: findings.Findings, pictures: Mapping[str, Picture]) -> str:
    """Lay out the page.

    Args:
        results: the numbers.
        found: what they say.
        pictures: figures by name; a section goes without one that is absent.

    Returns:
        The HTML.
    """
    heads = results.cotrained_compound()
    return render_template(
        "index.html.j2",
        results=results,
        setup=results.setup,
        plain=results.models.plain,
        regularized=results.models.regularized,
        found=found,
        pictures=pictures,
        phases={PHASES.get(key, key.replace("_", " ")): s for key, s in results.seconds.items()},
        cotrained=_cotrained(results),
        cotrained_compound=heads,
        fresh_compound=heads
        and _fresh(compound_curve(results, heads.model, heads.family), heads.sum_l0),
        dead_saes=sum(row.l0 == 0 for row in results.rows if row.source == FRESH),
        tally_text=findings.tally_text,
        change=findings.change,
        ce_change=findings.ce_change,
    )


def _cotrained(results: Results) -> list[CotrainedHead]:
    """List the co-trained heads, each beside a fresh SAE of its family on the same model."""
    heads = [row for row in results.rows if row.source == COTRAINED]
    return [
        CotrainedHead(
            head, _fresh(site_curve(results, head.model, head.family, head.site), head.l0)
        )
        for head in heads
    ]


def _fresh(curve: Curve, l0: float) -> float | None:
    return curve.at(l0).ce_increase if curve.reaches(l0) else None
