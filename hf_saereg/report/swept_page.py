"""The page of what sweeps found: one model's SAEs, or several models' side by side."""

from collections.abc import Sequence
from pathlib import Path

from hf_saereg.report.findings import SUM_L0, l0_text, listed, signed
from hf_saereg.report.layout import (
    PAGE_MODULES,
    Caption,
    draw_pictures,
    render_template,
    require_extra,
)
from hf_saereg.report.measured_section import quality_section
from hf_saereg.report.swept import SweptModel, read_runs, unlike
from hf_saereg.report.swept_curves import (
    AtEqualL0,
    Variant,
    compare,
    fresh,
    mean_curve,
    variant_convergence,
    variants,
)


def write_swept_report(folders: Sequence[Path], output_dir: Path) -> Path:
    """Write `index.html`, `figures/` (PNG and SVG) and `tensorboard/` about runs.

    Args:
        folders: each with a `results.json`, and what else is known of it.
        output_dir: folder to write to; made if it is missing.

    Returns:
        The path of `index.html`.

    Raises:
        ReportError: if results are missing, damaged, or lack a key.
        UserError: if matplotlib or jinja2 is not installed.
    """
    models = read_runs(folders)
    quality = quality_section(folders)
    require_extra(*PAGE_MODULES)
    from hf_saereg.report.events import Drawn, write_events
    from hf_saereg.report.measured_figures import draw_quality
    from hf_saereg.report.swept_figures import DRAWINGS, bar_panels

    wanted = {name: draw for name, draw in DRAWINGS.items() if name != "bars" or bar_panels(models)}
    figures = {name: Drawn(draw, models) for name, draw in wanted.items()}
    words = captions(models)
    if quality:
        figures["quality"] = Drawn(draw_quality, quality.models)
        words["quality"] = quality.caption
    pictures = draw_pictures(figures, words, output_dir / "figures")
    write_events(figures, output_dir / "tensorboard")
    compared = {variant: compare(models, variant) for variant in variants(models)}
    measured = (variant_convergence(model, variant) for model in models for variant in compared)
    page = output_dir / "index.html"
    html = render_template(
        "swept.html.j2",
        title=f"SAEs on {listed(model.label for model in models)}",
        models=models,
        headline=headline(models, compared),
        compared=compared,
        convergence=[found for found in measured if found is not None],
        unlike=unlike(models),
        seeds={row.seed for model in models for row in model.sets} - {None},
        pictures=pictures,
        quality=quality,
    )
    page.write_text(html, encoding="utf-8")
    return page


def headline(models: Sequence[SweptModel], compared: dict[Variant, list[AtEqualL0]]) -> str:
    """What it costs to replace every site, at one Σ L0 for all models, variant by variant.

    Args:
        models: of any runs.
        compared: by variant.
    """
    sentences = []
    for variant, points in compared.items():
        if points:
            point = points[len(points) // 2]
            costs = [
                f"{signed(increase)} on {model.label} (CE {model.baseline.clean_ce:.3f})"
                for model, increase in zip(models, point.ce_increase, strict=True)
                if increase is not None
            ]
            sentences.append(f"{variant.label}: {listed(costs)} at {SUM_L0} {l0_text(point.l0)}")
        else:
            sentences.append(f"{variant.label}: no {SUM_L0} that all models reached")
    return f"Nats a token lost with every site replaced by fresh SAEs: {'; '.join(sentences)}."


def captions(models: Sequence[SweptModel]) -> dict[str, Caption]:
    """The words of the figures, from the numbers that they draw.

    Args:
        models: of any runs.
    """
    ends = []
    for model in models:
        for variant in variants(models):
            points = mean_curve(fresh(model.sets, variant)).points
            if points:
                first, last = points[0], points[-1]
                ends.append(
                    f"{model.label}, {variant.label}: {signed(first.ce_increase)} nats at "
                    f"{SUM_L0} {l0_text(first.l0)}, {signed(last.ce_increase)} at "
                    f"{l0_text(last.l0)}"
                )
    names = listed(model.label for model in models)
    return {
        "compound": Caption(
            f"Compound CE increase against {SUM_L0}",
            "Lower is better; towards the left, sparser.",
            f"Curves of the compound CE increase over the sum of L0. {'. '.join(ends)}.",
        ),
        "bars": Caption(
            f"CE increase near {SUM_L0} 50, and near L0 50 of one site",
            "Lower is better. Where not every model reached 50, the nearest L0 that all did.",
            f"Bars of the CE increase on {names}: with all sites replaced, and with one at a time. "
            "The table of equal L0 has the former.",
        ),
        "sites": Caption(
            "CE increase against L0, site by site",
            "Each site replaced alone.",
            f"One panel a site with the CE increase over L0 on {names}; the numbers are in the "
            "table of every SAE.",
        ),
        "densities": Caption(
            "How often latents fire",
            "Of the SAEs nearest to L0 20, at their first seed; latents that never fired are left "
            "out.",
            "One panel a site with the share of latents over the share of tokens on which they "
            f"fire, on {names}.",
        ),
    }
