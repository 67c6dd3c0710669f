"""How L0 came to its target: one panel a variant, one line a site, over the steps of training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

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
        inside = [abs(l0 / target - 1) <= TOLERANCE for l0 in self.l0]
        for i, step in enumerate(self.steps):
            if all(inside[i:]):
                return step
        return None


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


def draw_l0_curves(
    logs: Mapping[str, Sequence[Mapping[str, Any]]], targets: Mapping[str, float], path: Path
) -> None:
    """One panel a training, its target and the band of 10 % around it shaded.

    Args:
        logs: `TrainerState.log_history` of each variant.
        targets: of each variant.
        path: of the PNG.
    """
    columns = min(2, len(logs))
    lines = -(-len(logs) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(5 * columns, 3 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(logs) :]:
        axis.set_visible(False)
    for axis, (variant, log) in zip(axes.flat, logs.items(), strict=False):
        target = targets[variant]
        axis.axhspan(target * (1 - TOLERANCE), target * (1 + TOLERANCE), color="0.85")
        axis.axhline(target, color="0.4", linewidth=0.8)
        for hook_name, curve in l0_curves(log).items():
            axis.plot(curve.steps, curve.l0, label=hook_name, linewidth=1.2)
        axis.set_yscale("log")
        axis.set_title(f"{variant}: target {target:g}", fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylabel("L0")
        axis.grid(alpha=0.3)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
