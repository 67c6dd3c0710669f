"""What the numbers say, in words: the sentences of the page, each computed, none assumed.

What is notable:

- Where the regularized model is worse, the words are "costs" and "worse", whatever else it gained.
- A figure's reading and its description for those who cannot see it come from the same numbers.
"""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from hf_saereg.report.convergence import Convergence
from hf_saereg.report.results import FRESH, MODELS, Results
from hf_saereg.report.verdict import (
    Comparison,
    Outcome,
    PointComparison,
    compare_compound,
    compare_sites,
    measure_convergence,
)

BARS_AT = 50  # of the published bars; the nearest L0 that all models reached is shown
DOUBTED_SITE = "blocks.3.hook_resid_pre"  # where the published post found the gain unreliable
SUM_L0 = "Σ\N{NO-BREAK SPACE}L0"
EQUAL_CE = 0.0005  # nats; what rounds to 0.000 is not called a difference
EQUAL_GAP = 0.005  # nats; what the published experiment's CE varies by between seeds


class CompoundFinding(NamedTuple):
    """One family with all sites replaced at once, at one Σ L0.

    Attributes:
        family: of the fresh SAEs.
        point: both models at that Σ L0; None where their ranges do not overlap.
        outcome: the verdict over the whole shared range.
    """

    family: str
    point: PointComparison | None
    outcome: Outcome


class SiteFinding(NamedTuple):
    """One family at one site.

    Attributes:
        comparison: both curves.
        point: both models near the L0 that the site was trained for; None without overlap.
    """

    comparison: Comparison
    point: PointComparison | None


class Shortfall(NamedTuple):
    """One way in which the regularized model is worse.

    Attributes:
        sentence: what is worse.
        places: sites and L0s, where there are several to name.
    """

    sentence: str
    places: tuple[str, ...] = ()


class Findings(NamedTuple):
    """All that the page says, before it is laid out.

    Attributes:
        compound: a finding per family.
        sites: by family, a finding per site.
        tally: by family, the number of sites with each outcome.
        ce_difference: validation CE, regularized minus plain.
        headline: one sentence, gains and costs.
        worse: each way in which the regularized model is worse.
        convergence: how settled the fresh SAEs are.
        unsettled: those of `convergence` that are not.
        loose: those of `convergence` that are not with all sites replaced at once.
        overfitting: one sentence on training against validation CE.
        readings: one line per figure.
        descriptions: the alternative text of each figure.
    """

    compound: list[CompoundFinding]
    sites: dict[str, list[SiteFinding]]
    tally: dict[str, Counter[Outcome]]
    ce_difference: float
    headline: str
    worse: list[Shortfall]
    convergence: list[Convergence]
    unsettled: list[Convergence]
    loose: list[Convergence]
    overfitting: str
    readings: dict[str, str]
    descriptions: dict[str, str]


def find(results: Results) -> Findings:
    """Compute what the page says.

    Args:
        results: checked results.
    """
    cotrained = results.cotrained_compound()
    trained_sum = cotrained.sum_l0 if cotrained else None
    compound = [
        CompoundFinding(comparison.family, comparison.near(trained_sum), comparison.outcome)
        for comparison in compare_compound(results)
    ]
    comparisons = compare_sites(results)
    sites = {
        family: [
            SiteFinding(comparison, comparison.near(results.cotrained_l0(comparison.site)))
            for comparison in comparisons
            if comparison.family == family
        ]
        for family in results.families
    }
    convergence = measure_convergence(results)
    return Findings(
        compound=compound,
        sites=sites,
        tally={
            family: Counter(finding.comparison.outcome for finding in found)
            for family, found in sites.items()
        },
        ce_difference=results.models.regularized.eval_ce - results.models.plain.eval_ce,
        headline=_headline(results, compound),
        worse=_worse(results, comparisons),
        convergence=convergence,
        unsettled=[found for found in convergence if not found.is_settled],
        loose=[found for found in convergence if not found.is_settled_at_once],
        overfitting=_overfitting(results),
        readings=_readings(results, comparisons),
        descriptions=_descriptions(results, compound, sites),
    )


def signed(number: float, digits: int = 3) -> str:
    """Return a number with a true minus sign, e.g. `−0.031`."""
    return f"{number:.{digits}f}".replace("-", "−")


def ce_change(difference: float) -> str:
    """Say what a difference of validation CE means, e.g. `costs 0.031 nats`."""
    if abs(difference) < EQUAL_CE:
        return "leaves it unchanged"
    return f"{'costs' if difference > 0 else 'saves'} {abs(difference):.3f} nats"


def change(point: PointComparison) -> str:
    """Say how the regularized model's CE increase relates to the plain one's."""
    if point.outcome is Outcome.TIE:
        return "no difference beyond the tie band"
    direction = "lower" if point.outcome is Outcome.WIN else "higher"
    if point.ratio is None:
        return f"{signed(abs(point.regularized - point.plain))} nats {direction}"
    factor = point.ratio if point.ratio > 1 else 1 / point.ratio
    if factor < 2:
        return f"{abs(point.ratio - 1):.0%} {direction}".replace("%", "\N{NO-BREAK SPACE}%")
    return f"{factor:.1f} times {direction}"


def l0_text(l0: float) -> str:
    """Return an L0 with no more digits than mean something."""
    return f"{l0:.0f}" if l0 >= 20 else f"{l0:.1f}".removesuffix(".0")


def listed(words: Iterable[str]) -> str:
    """Join words as a sentence does: `a, b and c`."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def tally_text(tally: Counter[Outcome]) -> str:
    """Say how many sites had which outcome, e.g. `4 wins, 1 mixed`."""
    plurals = {Outcome.WIN: "wins", Outcome.LOSS: "losses", Outcome.TIE: "ties"}
    parts = [
        f"{tally[outcome]} {plurals.get(outcome, outcome) if tally[outcome] > 1 else outcome}"
        for outcome in Outcome
        if tally[outcome]
    ]
    return ", ".join(parts)


def _headline(results: Results, compound: list[CompoundFinding]) -> str:
    difference = results.models.regularized.eval_ce - results.models.plain.eval_ce
    first = (
        f"Regularization {ce_change(difference)} of validation CE"
        if abs(difference) >= EQUAL_CE
        else "Regularization leaves validation CE unchanged"
    )
    effects = {
        Outcome.WIN: "lowers the compound CE increase of fresh SAEs",
        Outcome.LOSS: "raises the compound CE increase of fresh SAEs",
        Outcome.TIE: "leaves the compound CE increase of fresh SAEs within the tie band",
    }
    clauses = []
    for outcome, effect in effects.items():
        changes = [
            f"{family}: from {signed(point.plain)} to {signed(point.regularized)} nats "
            f"at {SUM_L0}\N{NO-BREAK SPACE}{l0_text(point.l0)}"
            for family, point, _ in compound
            if point and point.outcome is outcome
        ]
        if changes:
            clauses.append(f"{effect} ({'; '.join(changes)})")
    if not clauses:
        return f"{first}; the compound CE increase cannot be compared, for no {SUM_L0} is shared."
    return f"{first}; it {listed(clauses)}."


def _worse(results: Results, comparisons: list[Comparison]) -> list[Shortfall]:
    plain, regularized = results.models
    worse = []
    if regularized.eval_ce - plain.eval_ce >= EQUAL_CE:
        worse.append(
            Shortfall(
                f"Validation CE is worse by {regularized.eval_ce - plain.eval_ce:.3f} nats "
                f"({plain.eval_ce:.3f} plain, {regularized.eval_ce:.3f} regularized)."
            )
        )
    for comparison in compare_compound(results):
        if _losses(comparison):
            place = _where(SUM_L0, comparison)
            worse.append(Shortfall(f"{comparison.family}, all sites at once: worse {place}."))
    for family in results.families:
        lost = [c for c in comparisons if c.family == family and _losses(c)]
        if lost:
            places = tuple(f"{c.site} {_where('L0', c)}" for c in lost)
            worse.append(Shortfall(f"{family}, single sites: worse at", places))
    if regularized.tokens_per_second < plain.tokens_per_second:
        ratio = plain.tokens_per_second / regularized.tokens_per_second
        worse.append(Shortfall(f"Training takes {ratio:.2f} times as long per token."))
    return worse


def _losses(comparison: Comparison) -> list[PointComparison]:
    return [point for point in comparison.points if point.outcome is Outcome.LOSS]


def _where(quantity: str, comparison: Comparison) -> str:
    losses = _losses(comparison)
    if len(losses) == len(comparison.points):
        return f"at every {quantity} compared"
    return f"at {quantity}\N{NO-BREAK SPACE}{listed(l0_text(point.l0) for point in losses)}"


def _overfitting(results: Results) -> str:
    plain, regularized = (model.eval_ce - model.train_ce for model in results.models)
    numbers = (
        f"Validation CE lies {signed(plain)} nats above training CE for the plain model and "
        f"{signed(regularized)} for the regularized one: "
    )
    if abs(regularized - plain) < EQUAL_GAP:
        return numbers + "no difference in overfitting that one seed could show."
    if regularized > plain:
        return numbers + "the gap is larger, so nothing here speaks for less overfitting."
    if results.models.regularized.eval_ce < results.models.plain.eval_ce:
        return numbers + "a smaller gap at a lower validation CE, as less overfitting would show."
    return numbers + (
        "the gap is smaller, but validation CE is not lower: the regularized model fits "
        "the training text less well, which alone would narrow the gap."
    )


def _readings(results: Results, comparisons: list[Comparison]) -> dict[str, str]:
    ratios = [
        results.baselines.regularized.residual_norm[site]
        / results.baselines.plain.residual_norm[site]
        for site in results.sites
        if results.baselines.plain.residual_norm[site] > 0
    ]
    norms = (
        f"The regularized model's activations are {min(ratios):.2f} to {max(ratios):.2f} times as "
        "long as the plain one's; the scale is free, since every site is read through a layer norm."
        if ratios
        else "The plain model's activations have norm 0."
    )
    return {
        "compound": "Lower is better. Regularized against plain, over the "
        f"{SUM_L0} that both reached: "
        + "; ".join(f"{c.family} {_course(c)}" for c in compare_compound(results))
        + ".",
        "sites": "Lower is better; each panel has its own scale. "
        + " ".join(
            f"{family}: "
            f"{tally_text(Counter(c.outcome for c in comparisons if c.family == family))}."
            for family in results.families
        ),
        "ce": _overfitting(results),
        "norms": norms,
        "bars": "Lower is better. Where not both models reached 50, the nearest L0 that both did.",
        "densities": "Of the fresh SAEs nearest to L0 20; latents that never fired are left out.",
    }


def _course(comparison: Comparison) -> str:
    """Say where a curve lies lower and where higher, e.g. `lower at 50 and 100, higher at 400`."""
    words = {Outcome.WIN: "lower", Outcome.TIE: "equal", Outcome.LOSS: "higher"}
    parts = []
    for outcome, word in words.items():
        places = [l0_text(point.l0) for point in comparison.points if point.outcome is outcome]
        if len(places) == len(comparison.points) and places:
            return f"{word} throughout"
        if places:
            parts.append(f"{word} at {listed(places)}")
    return ", ".join(parts) or "not comparable"


def _bars_described(results: Results) -> str:
    parts = []
    for comparison in compare_compound(results):
        point = comparison.near(BARS_AT)
        if point is not None:
            parts.append(
                f"All sites, {comparison.family}, {SUM_L0} {l0_text(point.l0)}: plain "
                f"{signed(point.plain)}, regularized {signed(point.regularized)}"
            )
    return "; ".join(parts) + "."


def _descriptions(
    results: Results, compound: list[CompoundFinding], sites: dict[str, list[SiteFinding]]
) -> dict[str, str]:
    plain, regularized = results.models
    compound_points = [
        f"{family} at {SUM_L0} {l0_text(point.l0)}: plain {signed(point.plain)}, "
        f"regularized {signed(point.regularized)}"
        for family, point, _ in compound
        if point
    ]
    site_points = [
        f"{family} at {found.comparison.site}, L0 {l0_text(found.point.l0)}: "
        f"plain {signed(found.point.plain, 4)}, regularized {signed(found.point.regularized, 4)}"
        for family, all_found in sites.items()
        for found in all_found
        if found.point
    ]
    norms = [
        f"{site}: "
        + ", ".join(
            f"{model} {baseline.residual_norm[site]:.2f}"
            for model, baseline in zip(MODELS, results.baselines, strict=True)
        )
        for site in results.sites
    ]
    n_fresh = sum(row.source == FRESH for row in results.rows)
    return {
        "compound": "Line chart of compound CE increase against the sum of L0. "
        + "; ".join(compound_points)
        + ".",
        "sites": f"Line charts of CE increase against L0, one for each of {len(results.sites)} "
        f"sites, {n_fresh} fresh SAEs in all. " + "; ".join(site_points) + ".",
        "ce": f"Bar chart of CE. Plain: training {plain.train_ce:.3f}, validation "
        f"{plain.eval_ce:.3f}. Regularized: training {regularized.train_ce:.3f}, validation "
        f"{regularized.eval_ce:.3f}.",
        "norms": "Line chart of the mean norm of the residual stream. " + "; ".join(norms) + ".",
        "bars": "Bar charts of the CE increase at one L0. " + _bars_described(results),
        "densities": "A panel a site with the share of latents over the share of tokens on which "
        "they fire, for the fresh SAEs of both models.",
    }
