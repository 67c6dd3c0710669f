"""The page that people open: one HTML file, its figures inside it, no script and no network."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from hf_saereg.report import findings
from hf_saereg.report.layout import (
    PAGE_MODULES,
    Caption,
    Picture,
    draw_pictures,
    render_template,
    require_extra,
)
from hf_saereg.report.measured_section import QualitySection, quality_section
from hf_saereg.report.results import (
    COTRAINED,
    FRESH,
    MODELS,
    Pair,
    Results,
    SAEResult,
    read_results,
)
from hf_saereg.report.training_files import Training, read_trainings
from hf_saereg.report.verdict import Curve, Outcome, compound_curve, site_curve

FIGURE_TITLES = {
    "compound": "Compound CE increase against Σ\N{NO-BREAK SPACE}L0",
    "sites": "CE increase against L0, site by site",
    "ce": "CE on training and validation text",
    "norms": "Mean norm of the residual stream",
    "bars": "CE increase near Σ\N{NO-BREAK SPACE}L0 50, and near L0 50 of one site",
    "densities": "How often latents fire",
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


def write_report(results: Mapping[str, object], output_dir: Path, run: Path | None = None) -> Path:
    """Write `index.html`, `figures/` (PNG and SVG) and `tensorboard/`.

    Args:
        results: what `json.load` returned for `results.json`.
        output_dir: folder to write to; made if it is missing.
        run: folder of the trainings, for what else they left there; the same by default.

    Returns:
        The path of `index.html`.

    Raises:
        ReportError: if a key of the results is missing or holds what it must not.
        UserError: if matplotlib or jinja2 is not installed.
    """
    checked, folder = read_results(results), Path(output_dir)
    run = folder if run is None else Path(run)
    trainings, quality = read_trainings(run, checked), quality_section([run])
    require_extra(*PAGE_MODULES)
    from hf_saereg.report.events import Drawn, write_events
    from hf_saereg.report.figures import DRAWINGS, bar_panels, has_densities
    from hf_saereg.report.measured_figures import draw_quality
    from hf_saereg.report.training_figures import Trainings, draw_cost, draw_training_norms

    found = findings.find(checked)
    left_out = set()
    if not bar_panels(checked):
        left_out.add("bars")
    if not has_densities(checked):
        left_out.add("densities")
    figures = {name: Drawn(draw, checked) for name, draw in DRAWINGS.items()}
    both = Trainings(checked, trainings)
    figures["cost"] = Drawn(draw_cost, both)
    if any(training.norms for training in trainings):
        figures["training_norms"] = Drawn(draw_training_norms, both)
    captions = {
        name: Caption(FIGURE_TITLES[name], found.readings[name], found.descriptions[name])
        for name in figures
        if name in found.readings
    }
    captions |= training_captions(checked, trainings)
    if quality:
        figures["quality"] = Drawn(draw_quality, quality.models)
        captions["quality"] = quality.caption
    figures = {name: drawn for name, drawn in figures.items() if name not in left_out}
    pictures = draw_pictures(figures, captions, folder / "figures")
    write_events(figures, folder / "tensorboard")
    page = folder / "index.html"
    html = render_page(checked, found, pictures, trainings, quality)
    page.write_text(html, encoding="utf-8")
    return page


def training_captions(results: Results, trainings: Pair[Training]) -> dict[str, Caption]:
    """The words of the figures about the trainings.

    Args:
        results: the numbers.
        trainings: what else they left.
    """
    speeds = [
        f"{model} {result.tokens_per_second:,.0f} tokens a second"
        for model, result in zip(MODELS, results.models, strict=True)
    ]
    logged = [name for name, own in zip(MODELS, trainings, strict=True) if own.norms]
    changes = [
        f"{model}, {site}: from {curve.norms[0]:.2f} to {curve.norms[-1]:.2f}"
        for model, own in zip(MODELS, trainings, strict=True)
        for site, curve in own.norms.items()
    ]
    how = "Of the training text, as logged."
    if trainings.plain.norms:
        how += " Plain: of each logged step's tokens; regularized: of all since the log before."
    if len(logged) < 2:
        how += " Dashed: at the end of training, where none was logged."
    return {
        "cost": Caption(
            "What training costs",
            "FLOPs are counted on paper, forward and backward; speed was measured.",
            f"Bars of training speed and of FLOPs a token. {'; '.join(speeds)}.",
        ),
        "training_norms": Caption(
            "Mean norm of the residual stream over training",
            how,
            f"Line charts of norms over the steps of training, {', '.join(logged)}. "
            f"{'; '.join(changes)}.",
        ),
    }


def render_page(
    results: Results,
    found: findings.Findings,
    pictures: Mapping[str, Picture],
    trainings: Pair[Training] | None = None,
    quality: QualitySection | None = None,
) -> str:
    """Lay out the page.

    Args:
        results: the numbers.
        found: what they say.
        pictures: figures by name; a section goes without one that is absent.
        trainings: what else is known of them.
        quality: what was measured of the latents.

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
        trainings=trainings,
        quality=quality,
        phases={PHASES.get(key, key.replace("_", " ")): s for key, s in results.seconds.items()},
        doubted_site=findings.DOUBTED_SITE,
        doubted=_outcomes(found, findings.DOUBTED_SITE),
        cotrained=_cotrained(results),
        cotrained_compound=heads,
        fresh_compound=heads
        and _fresh(compound_curve(results, heads.model, heads.family), heads.sum_l0),
        dead_saes=sum(row.l0 == 0 for row in results.rows if row.source == FRESH),
        tally_text=findings.tally_text,
        change=findings.change,
        ce_change=findings.ce_change,
    )


def _outcomes(found: findings.Findings, site: str) -> dict[str, Outcome]:
    """By family; nothing where the models have no such site."""
    return {
        family: finding.comparison.outcome
        for family, own in found.sites.items()
        for finding in own
        if finding.comparison.site == site
    }


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
