"""Which weight a study recommends, and what its controls say to that: one stated rule, computed.

Notable:
- gain: −ln(variant / baseline) of the compound CE increase at the stated Σ L0, averaged over the
  fresh families that every variant was read by; cost: the rise of the validation CE, at least
  `EQUAL_GAP`, by which seeds differ anyway
- a control has a gain too where it is no dearer than the variant, the variant's gain is not above
  the control's by an interval that excludes zero, and the control's is no smaller or above zero
  itself; such a gain is called none
- a plain model that trained shorter than a variant does not clear it of having trained longer: that
  takes one that trained for at least `LONG_ENOUGH` of its time
- an untrained model has next to nothing to lose, so that its CE increase is small: the price in CE
  is what tells it from a gain
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from hf_saereg.report.findings import EQUAL_GAP, SUM_L0, l0_text, listed, signed
from hf_saereg.report.study_curves import MeasuredStudy, at_equal_l0
from hf_saereg.report.study_statistics import Interval

LONG_ENOUGH = 0.8  # of a variant's training time, which a shared machine tells no better
RULE = (
    "Gain: minus ln(variant / plain) of the compound CE increase of fresh SAEs at the stated "
    f"{SUM_L0}, averaged over their families. Cost: the rise of the validation CE, counted as at "
    f"least {EQUAL_GAP} nats, by which seeds differ anyway. Recommended is the largest gain per "
    "cost among the regularized variants whose gain has a 95\N{NO-BREAK SPACE}% interval above "
    "zero and is beyond that of every control that is no dearer, its CE no higher by more than "
    f"{EQUAL_GAP} nats: the interval of the difference must be above zero. A gain that such a "
    "control shows too is called no gain. Where plain models of the same time are controls, one of "
    f"them must have trained for at least {LONG_ENOUGH:.0%} of the variant's time."
)
REGULARIZED, SAME_TIME, UNTRAINED = "regularized", "same time", "untrained"
EXPLAINED = {
    SAME_TIME: "the plain model trained for as long as a regularized one",
    UNTRAINED: "the model as it was initialised",
}


class Beside(StrEnum):
    """How a variant's gain stands beside a control."""

    CHEAPER = "it shows no gain at the price of {}"
    BEYOND = "the gain of {} is beyond it"
    SHORTER = "the gain of {} is beyond it, but took longer to train"
    SHARED = "the gain of {} is no gain, as the control has it too"
    UNCLEAR = "the gain of {} cannot be told from it"


@dataclass(frozen=True)
class Gain:
    """What a variant buys, and for how much.

    Attributes:
        variant: its name.
        control: `same time`, `untrained` or None.
        gain: mean over the families of fresh SAEs; None where it cannot be had.
        ce_rise: of the validation CE, mean over seeds, in nats a token.
        cost: the same, at least `EQUAL_GAP`.
        gain_per_cost: None where there is no gain.
        refusal: why it is not recommended; None of a variant that may be, and of a control.
    """

    variant: str
    control: str | None
    gain: Interval | None
    ce_rise: float
    cost: float
    gain_per_cost: float | None
    refusal: str | None


@dataclass(frozen=True)
class Recommendation:
    """The end of the study.

    Attributes:
        variant: what is recommended; None if nothing can be.
        knob: the option that its weight is, if it is one of a curve.
        weight: its value.
        sentence: what is recommended and why, or why nothing is.
        rule: by which.
        gains: of every other variant.
        controls: a sentence each.
        families: of the fresh SAEs that the gain is averaged over.
    """

    variant: str | None
    knob: str | None
    weight: float | None
    sentence: str
    rule: str
    gains: list[Gain]
    controls: dict[str, str]
    families: list[str]


def recommend(study: MeasuredStudy, settings: Mapping[str, Mapping[str, Any]]) -> Recommendation:
    """Weigh every variant, its controls first.

    Args:
        study: its measurements.
        settings: of `hf_saereg.study_settings`, of all variants, finished or not.
    """
    controls = {name: own["control"] for name, own in settings.items() if own["control"]}
    families = [
        fresh
        for fresh, curves in study.compound.items()
        if study.sum_l0[fresh] is not None and all(name in curves for name in study.variants)
    ]
    by_seed = {name: _gains_by_seed(study, name, families) for name in study.variants}
    gains = []
    for name in study.variants:
        if name == study.baseline:
            continue
        gain = Interval.of(by_seed[name]) if by_seed[name] else None
        rise = statistics.fmean(study.ce_rise(name).values())
        cost = max(rise, EQUAL_GAP)
        refusal = None
        if name not in controls:
            refusal = (
                "not regularized" if settings[name]["model"] != REGULARIZED else _refusal(gain)
            )
            refusal = refusal or _held_by_control(study, name, controls, by_seed)
        ratio = gain.mean / cost if gain else None
        gains.append(Gain(name, controls.get(name), gain, rise, cost, ratio, refusal))
    variants = [own for own in gains if own.control is None]
    good = [own for own in variants if own.refusal is None]
    best = max(good, key=lambda own: own.gain_per_cost, default=None)
    own = settings[best.variant] if best else {"knob": None, "weight": None}
    return Recommendation(
        best.variant if best else None,
        own["knob"],
        own["weight"],
        _recommended(best, own) if best else _none(variants, families),
        RULE,
        gains,
        {name: _control_sentence(study, name, gains, controls, by_seed) for name in controls},
        families,
    )


def interval_text(interval: Interval, digits: int = 3) -> str:
    """Return a mean with its interval, e.g. `−0.69 [−0.91, −0.47]`."""
    mean = signed(interval.mean, digits)
    if interval.low is None:
        return f"{mean} (one seed, no interval)"
    return f"{mean} [{signed(interval.low, digits)}, {signed(interval.high, digits)}]"


def _gains_by_seed(study: MeasuredStudy, name: str, families: Sequence[str]) -> dict[int, float]:
    """Empty where a family cannot be read at its stated Σ L0."""
    found = []
    for fresh in families:
        curves = study.compound[fresh]
        stated, read = study.sum_l0[fresh], (curves[name], curves[study.baseline])
        equal = at_equal_l0(*read, stated)
        reached = all(curve.reaches(stated) for own in read for curve in own.values())
        if not (reached and equal.log_ratios):
            return {}
        found.append(equal.log_ratios)
    seeds = [seed for seed in study.seeds(name) if all(seed in own for own in found)]
    return {seed: -statistics.fmean(own[seed] for own in found) for seed in seeds} if found else {}


def _refusal(gain: Interval | None) -> str | None:
    if gain is None:
        return f"no ratio to plain at the stated {SUM_L0}, as it was not reached or lost nothing"
    if gain.low is None:
        return "one seed, which has no interval"
    if gain.is_above_zero:
        return None
    return "no gain" if gain.mean <= 0 else "a gain whose interval does not exclude zero"


def _held_by_control(
    study: MeasuredStudy, name: str, controls: Mapping[str, str], by_seed: Mapping[str, dict]
) -> str | None:
    beside_each = {}
    for control, kind in controls.items():
        if control not in study.variants:
            return f"the control “{control}” is not finished"
        beside = beside_each[control] = _beside(study, name, control, kind, by_seed)
        if beside is Beside.SHARED:
            return f"no gain: the control “{control}” has it too"
        if beside is Beside.UNCLEAR:
            return f"a gain that cannot be told from the control “{control}”"
    of_the_time = [beside_each[own] for own, kind in controls.items() if kind == SAME_TIME]
    if of_the_time and all(beside is Beside.SHORTER for beside in of_the_time):
        return "a gain for which no control trained as long"
    return None


def _beside(
    study: MeasuredStudy,
    name: str,
    control: str,
    kind: str,
    by_seed: Mapping[str, dict[int, float]],
) -> Beside:
    if _is_cheaper(study, name, control):
        return Beside.CHEAPER
    mine, other = by_seed[name], by_seed[control]
    differences = {seed: mine[seed] - other[seed] for seed in mine if seed in other}
    if len(differences) < 2:
        return Beside.UNCLEAR
    difference = Interval.of(differences)
    if difference.is_above_zero:
        share = study.time_ratio(control, name) if kind == SAME_TIME else None
        return Beside.SHORTER if share is not None and share < LONG_ENOUGH else Beside.BEYOND
    shared = difference.mean <= 0 or Interval.of(other).is_above_zero
    return Beside.SHARED if shared else Beside.UNCLEAR


def _is_cheaper(study: MeasuredStudy, name: str, control: str) -> bool:
    ours, theirs = study.eval_ce[name], study.eval_ce[control]
    differences = [theirs[seed] - ours[seed] for seed in ours if seed in theirs]
    return bool(differences) and statistics.fmean(differences) > EQUAL_GAP


def _recommended(best: Gain, own: Mapping[str, Any]) -> str:
    weight = f"{own['knob']} {own['weight']:g}, " if own["knob"] else ""
    return (
        f"Recommended: {weight}“{best.variant}”. Its gain is {interval_text(best.gain, 2)} for "
        f"{signed(best.ce_rise)} nats of CE."
    )


def _none(variants: Sequence[Gain], families: Sequence[str]) -> str:
    if not variants:
        return "No weight can be recommended: no regularized variant is finished."
    if not families:
        return (
            "No weight can be recommended: there is no family of fresh SAEs that every variant "
            "was read by."
        )
    reasons: dict[str, list[str]] = {}
    for own in variants:
        reasons.setdefault(own.refusal, []).append(f"“{own.variant}”")
    parts = "; ".join(f"{reason} ({listed(names)})" for reason, names in reasons.items())
    return f"No weight can be recommended. What speaks against it: {parts}."


def _control_sentence(
    study: MeasuredStudy,
    control: str,
    gains: Sequence[Gain],
    controls: Mapping[str, str],
    by_seed: Mapping[str, dict[int, float]],
) -> str:
    head = f"“{control}”, {EXPLAINED[controls[control]]}"
    if control not in study.variants:
        return f"{head}, is not finished."
    own = next(gain for gain in gains if gain.variant == control)
    if own.gain is None:
        why = f"it did not reach the stated {SUM_L0} or lost nothing there"
        seen = f"has no ratio to plain, as {why}, for {signed(own.ce_rise)} nats of CE"
    else:
        seen = f"has a gain of {interval_text(own.gain, 2)} for {signed(own.ce_rise)} nats of CE"
    told: dict[Beside, list[str]] = {}
    for gain in gains:
        if gain.control is None and gain.gain is not None and gain.gain.mean > 0:
            beside = _beside(study, gain.variant, control, controls[control], by_seed)
            told.setdefault(beside, []).append(f"“{gain.variant}”")
    parts = [beside.value.format(listed(told[beside])) for beside in Beside if beside in told]
    return f"{head}, {seen}: {'; '.join(parts) or 'no variant has a gain to compare with it'}."


def stated_text(study: MeasuredStudy) -> str:
    """Say at which Σ L0 each family of fresh SAEs is compared."""
    return listed(
        f"{fresh} at {l0_text(l0)}" if l0 is not None else f"{fresh} at none (no shared {SUM_L0})"
        for fresh, l0 in study.sum_l0.items()
    )
