"""The page of a study: the verdict first, then what it rests on."""

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hf_saereg.report.findings import DOUBTED_SITE, tally_text
from hf_saereg.report.layout import (
    PAGE_MODULES,
    draw_pictures,
    render_template,
    require_extra,
)
from hf_saereg.report.study_findings import StudyFindings
from hf_saereg.report.study_statistics import SiteChange
from hf_saereg.report.study_tables import MatrixCell, tallies
from hf_saereg.report.study_verdict import REGULARIZED, UNTRAINED, interval_text, stated_text
from hf_saereg.report.study_words import (
    by_family,
    ce_caption,
    drawn_models,
    norms_caption,
    shown_words,
    trade_off_caption,
)
from hf_saereg.study_l0 import SteeredTraining


class StudyFacts(NamedTuple):
    """What the page says of the study beside its figures.

    Attributes:
        file: of the study.
        seeds: that it shall have.
        unfinished: variant and seed of the cells that are missing.
        command: that runs and compares it.
    """

    file: Path
    seeds: Sequence[int]
    unfinished: Sequence[tuple[str, int]]
    command: Sequence[str]


def write_study_page(
    found: StudyFindings,
    settings: Mapping[str, Mapping[str, Any]],
    facts: StudyFacts,
    steered: Sequence[SteeredTraining],
    output_dir: Path,
) -> Path:
    """Write `index.html`, `figures/` (PNG and SVG) and `tensorboard/`.

    Args:
        found: all that is said.
        settings: of `hf_saereg.study_settings`.
        facts: about the study.
        steered: trainings whose L0 over the steps is drawn.
        output_dir: the study's folder.

    Returns:
        The path of `index.html`.

    Raises:
        UserError: if matplotlib or jinja2 is not installed.
    """
    require_extra(*PAGE_MODULES)
    from hf_saereg.report.events import Drawn, write_events
    from hf_saereg.report.l0_curves import draw_l0_curves, l0_caption
    from hf_saereg.report.study_figures import VariantNorms, draw_ce, draw_norms, sae_figures
    from hf_saereg.report.trade_off import TradeOff, draw_trade_off, drawn_families

    shown = TradeOff(found.measured, settings)
    drawn, figures, words = drawn_families(shown), {}, {}
    if drawn:
        figures["trade_off"] = Drawn(draw_trade_off, shown)
        words["trade_off"] = trade_off_caption(found, drawn, shown.variants)
    if steered:
        figures["l0"] = Drawn(draw_l0_curves, steered)
        words["l0"] = l0_caption(steered)
    models = drawn_models(found)
    trained = {name: found.measured.eval_ce[name] for name in shown.variants}
    norms = {model.label: found.norms[model.label] for model in models}
    curves, curve_words = sae_figures(models)
    curves |= {
        "ce": Drawn(draw_ce, trained),
        "norms": Drawn(draw_norms, VariantNorms(models[0].sites, norms)),
    }
    figures |= curves
    words |= curve_words | {
        "ce": ce_caption(found, trained),
        "norms": norms_caption(models[0].sites, norms),
    }
    pictures = draw_pictures(figures, words, output_dir / "figures")
    write_events(figures, output_dir / "tensorboard")
    page = output_dir / "index.html"
    html = render_template(
        "study.html.j2",
        title=f"Study {facts.file.stem}",
        found=found,
        study=found.measured,
        facts=facts,
        command=shlex.join(facts.command),
        stated=stated_text(found.measured),
        pictures=pictures,
        matrix=_by_row(found.matrix),
        columns=list(dict.fromkeys((cell.fresh, cell.sum_l0) for cell in found.matrix)),
        by_family=by_family(found),
        tallies={pair: tally_text(tally) for pair, tally in tallies(found.sites).items()},
        untrained=[own.variant for own in found.recommendation.gains if own.control == UNTRAINED],
        not_transplanted=not_transplanted(found, settings),
        doubted=doubted(found.sites),
        doubted_site=DOUBTED_SITE,
        curves=list(curves),
        shown_words=shown_words(found, models),
        interval=lambda found, digits=3: "–" if found is None else interval_text(found, digits),
        ratio=lambda found: "–" if found is None else f"× {math.exp(found.mean):.2f}",
    )
    page.write_text(html, encoding="utf-8")
    return page


def doubted(sites: Sequence[SiteChange]) -> list[SiteChange]:
    """The rows of the site that the published post singles out; none where it does not exist."""
    return [change for change in sites if change.site == DOUBTED_SITE]


def not_transplanted(found: StudyFindings, settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Regularized variants whose co-trained heads were not scored on the baseline.

    Args:
        found: all that is said.
        settings: of `hf_saereg.study_settings`.
    """
    done = {own.variant for own in found.transplanted}
    return [
        name
        for name in found.measured.variants
        if settings[name]["model"] == REGULARIZED and name not in {found.measured.baseline, *done}
    ]


def _by_row(cells: Sequence[MatrixCell]) -> list[list[MatrixCell]]:
    rows: dict[tuple[str, str | None], list[MatrixCell]] = {}
    for cell in cells:
        rows.setdefault((cell.regularizer, cell.variant), []).append(cell)
    return list(rows.values())
