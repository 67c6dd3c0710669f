"""How L0 came to its target in the steered cells of a study: kept beside each cell, and read again.

    DIR/VARIANT/seed_N/l0.json    by hook name: steps, l0

Notable:
- it is the part of a training's log that a figure is drawn from, so that the figure outlives the
  weights and their log
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hf_saereg.resuming import STATE_FILE
from hf_saereg.run_folder import write_json
from hf_saereg.study import REGULARIZED, Study
from hf_saereg.study_cells import cell_folder, is_finished

L0_FILE = "l0.json"
TOLERANCE = 0.1  # what counts as having settled


class L0Curve(NamedTuple):
    """L0 at one site during a training.

    Attributes:
        steps: at which it was logged.
        l0: mean of the tokens since the log before.
    """

    steps: list[int]
    l0: list[float]

    def settled_at(self, target: float) -> int | None:
        """First logged step from which on L0 stays within 10 % of the target; None if it does not.

        Args:
            target: what L0 shall be.
        """
        settled = None
        for step, l0 in zip(reversed(self.steps), reversed(self.l0), strict=True):
            if abs(l0 / target - 1) > TOLERANCE:
                break
            settled = step
        return settled


class SteeredTraining(NamedTuple):
    """The training of one cell whose heads have targets.

    Attributes:
        variant: its name.
        seed: its own.
        targets: L0 that is steered to, by hook name.
        curves: by hook name, those of `targets` in their order.
    """

    variant: str
    seed: int
    targets: dict[str, float]
    curves: dict[str, L0Curve]

    def settled(self) -> dict[str, int | None]:
        """By hook name, the step from which on L0 stays near its target; None if it does not."""
        return {name: own.settled_at(self.targets[name]) for name, own in self.curves.items()}


def l0_curves(log_history: Sequence[Mapping[str, Any]]) -> dict[str, L0Curve]:
    """Curves by hook name, from what a trainer logged.

    Args:
        log_history: `TrainerState.log_history`.
    """
    curves: dict[str, L0Curve] = {}
    for entry in log_history:
        for name, value in entry.items():
            figure, _, hook_name = name.partition("/")
            if figure == "l0":
                curve = curves.setdefault(hook_name, L0Curve([], []))
                curve.steps.append(entry["step"])
                curve.l0.append(value)
    return curves


def keep_l0(variant: str, seed: int, folder: Path) -> bool:
    """Keep the L0 log of a finished cell with heads, unless it is kept already.

    Args:
        variant: its name.
        seed: its own.
        folder: of the study.

    Returns:
        Whether it is kept; it cannot be where the training's log is gone.
    """
    own = cell_folder(folder, variant, seed)
    state = own / REGULARIZED / STATE_FILE
    if (own / L0_FILE).is_file():
        return True
    if not is_finished(folder, variant, seed) or not state.is_file():
        return False
    curves = l0_curves(json.loads(state.read_text())["log_history"])
    write_json(own / L0_FILE, {name: curve._asdict() for name, curve in curves.items()})
    return True


def steered_trainings(
    study: Study, settings: Mapping[str, Mapping[str, Any]], folder: Path
) -> list[SteeredTraining]:
    """Of every variant whose heads have targets, the first seed whose L0 was kept.

    Args:
        study: with the variants and seeds.
        settings: of `hf_saereg.study_settings`.
        folder: of the study.

    Returns:
        One a variant at most; those whose L0 was not kept, or never logged, are left out.
    """
    found = {}
    for variant in study.variants:
        targets = settings[variant]["targets"]
        for seed in study.seeds if targets else ():
            path = cell_folder(folder, variant, seed) / L0_FILE
            if variant not in found and is_finished(folder, variant, seed) and path.is_file():
                kept = json.loads(path.read_text())
                curves = {name: L0Curve(**kept[name]) for name in targets if name in kept}
                if curves:
                    found[variant] = SteeredTraining(variant, seed, targets, curves)
    return list(found.values())
