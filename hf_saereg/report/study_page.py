"""The page of a study: the verdict first, then what it rests on."""

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hf_saereg.report.findings import SUM_L0, listed, signed, tally_text
from hf_saereg.report.layout import (
    PAGE_MODULES,
    Caption,
    draw_pictures,
    render_template,
    require_extra,
)
from hf_saereg.report.study_findings import StudyFindings
from hf_saereg.report.study_statistics import SiteChange
from hf_saereg.report.study_tables import MatrixCell, tallies
from hf_saereg.report.study_verdict import REGULARIZED, UNTRAINED, interval_text, stated_text
from hf_saereg.report.swept import ScoredModel
from hf_saereg.study_l0 import SteeredTraining

DRAWN = 6  # variants, as many as there are colours
DOUBTED_SITE = "blocks.3.hook_resid_pre"  # where the published post found the gain unreliable


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


def trade_off_caption(
    found: StudyFindings, drawn: Sequence[str], variants: Sequence[str]
) -> Caption:
    """The words of the figure, from the numbers that it draws.

    Args:
        found: all that is said.
        drawn: families with a panel.
        variants: that are drawn.
    """
    points = [
        f"{cell.variant}, fresh {cell.fresh}: CE {_mean_ce(found, cell.variant):.3f}, "
        f"increase {signed(cell.ce_increase)}"
        for cell in found.matrix
        if cell.fresh in drawn and cell.variant in variants and cell.ce_increase is not None
    ]
    several = any(len(found.measured.seeds(name)) > 1 for name in variants)
    left_out = [
        f"“{name}”, at a CE of {_mean_ce(found, name):.3f}"
        for name in found.measured.variants
        if name not in variants
    ]
    absent = f" Not drawn: {listed(left_out)}." if left_out else ""
    bars = (
        " Small points are seeds; bars are 95\N{NO-BREAK SPACE}% intervals of the difference from "
        "the baseline and may leave the panel."
        if several
        else ""
    )
    return Caption(
        "What a variant costs against what it buys",
        "Lower left is better; a line joins the weights of one regularizer, which stand beside its "
        f"points.{bars}{absent}",
        f"A panel a family of fresh SAEs, {listed(drawn)}, with the compound CE increase at the "
        f"stated {SUM_L0} over the validation CE. {'. '.join(points)}.",
    )


def by_family(found: StudyFindings) -> str:
    """What the recommended variant does to each family of fresh SAEs alone; empty without one.

    Args:
        found: all that is said.
    """
    own = [row for row in found.against if row.variant == found.recommendation.variant]
    parts = []
    for fresh, change in own[0].compound.items() if own else ():
        ratio = change.log_ratio
        if ratio is None:
            parts.append(f"fresh {fresh} {change.reason}")
            continue
        part = f"× {math.exp(ratio.mean):.2f} with fresh {fresh}"
        if ratio.low is not None:
            part += f" [{math.exp(ratio.low):.2f}, {math.exp(ratio.high):.2f}]"
            if ratio.low <= 0 <= ratio.high:
                part += ", which alone does not exclude 1"
        parts.append(part)
    return f"Its compound CE increase, over the baseline’s: {'; '.join(parts)}." if parts else ""


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


def drawn_models(found: StudyFindings) -> list[ScoredModel]:
    """As many variants as can be told apart: baseline, recommended one, controls, largest gains.

    Args:
        found: all that is said.
    """
    gains = [own for own in found.recommendation.gains if own.gain is not None]
    order = [found.measured.baseline, found.recommendation.variant]
    order += [own.variant for own in found.recommendation.gains if own.control]
    order += [own.variant for own in sorted(gains, key=lambda own: -own.gain.mean)]
    order += found.measured.variants
    chosen = list(dict.fromkeys(name for name in order if name is not None))[:DRAWN]
    return [model for model in found.measured.models if model.label in chosen]


def shown_words(found: StudyFindings, models: Sequence[ScoredModel]) -> str:
    """Which variants the curves show, and why these."""
    if len(models) == len(found.measured.variants):
        return "All variants, at all of their seeds: a curve goes through the means over seeds."
    return (
        f"{len(models)} of {len(found.measured.variants)} variants, as more could not be told "
        "apart: the baseline, what is recommended, the controls, and the largest gains after them. "
        "A curve goes through the means over seeds; the numbers of all variants are in the tables."
    )


def ce_caption(found: StudyFindings, eval_ce: Mapping[str, Mapping[int, float]]) -> Caption:
    """The words of the figure of CE, from the numbers that it draws.

    Args:
        found: all that is said.
        eval_ce: validation CE by variant and seed, of the variants that are drawn.
    """
    means = [f"{name} {statistics.fmean(own.values()):.3f}" for name, own in eval_ce.items()]
    absent = [name for name in found.measured.variants if name not in eval_ce]
    left_out = f" Not drawn, as far above: {listed(absent)}." if absent else ""
    return Caption(
        "Validation CE",
        f"Lower is better. Points are seeds, a stroke with a number is their mean.{left_out}",
        f"A line a variant with its validation CE, means over seeds: {'; '.join(means)}.",
    )


def norms_caption(sites: Sequence[str], norms: Mapping[str, Sequence[float]]) -> Caption:
    """The words of the figure of norms, from the numbers that it draws.

    Args:
        sites: hook names.
        norms: mean ‖x‖₂ a site, by variant.
    """
    lines = [f"{name} {', '.join(f'{norm:.2f}' for norm in own)}" for name, own in norms.items()]
    return Caption(
        "Mean norm of the residual stream",
        "At the end of training, means over seeds; the scale is free, since every site is read "
        "through a layer norm.",
        f"Lines over the sites {', '.join(sites)}: {'; '.join(lines)}.",
    )


def _mean_ce(found: StudyFindings, variant: str) -> float:
    return statistics.fmean(found.measured.eval_ce[variant].values())


def _by_row(cells: Sequence[MatrixCell]) -> list[list[MatrixCell]]:
    rows: dict[tuple[str, str | None], list[MatrixCell]] = {}
    for cell in cells:
        rows.setdefault((cell.regularizer, cell.variant), []).append(cell)
    return list(rows.values())
