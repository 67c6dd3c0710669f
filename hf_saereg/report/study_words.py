"""What a study's page says in sentences: of the recommended variant, and of each figure."""

import math
import statistics
from collections.abc import Mapping, Sequence

from hf_saereg.report.findings import SUM_L0, listed, signed
from hf_saereg.report.layout import Caption
from hf_saereg.report.study_findings import StudyFindings
from hf_saereg.report.swept import ScoredModel

DRAWN = 6  # variants, as many as there are colours


def by_family(found: StudyFindings) -> str:
    """What the recommended variant, or the only one, does to each family of fresh SAEs alone.

    Args:
        found: all that is said.

    Returns:
        A sentence; empty where nothing is recommended among several.
    """
    compared = [own.variant for own in found.recommendation.gains if own.control is None]
    chosen = found.recommendation.variant or (compared[0] if len(compared) == 1 else None)
    own = [row for row in found.against if row.variant == chosen]
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
    if not parts:
        return ""
    return f"Compound CE increase of “{chosen}” over the baseline’s: {'; '.join(parts)}."


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
