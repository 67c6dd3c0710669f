"""How L0 came to its target: one panel a variant, one line a site, over the steps of training."""

import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from hf_saereg.report.canvas import LINES, Style, number_log_axis, panels, settings, site_label
from hf_saereg.report.findings import listed
from hf_saereg.report.layout import Caption, percent
from hf_saereg.study_l0 import TOLERANCE, SteeredTraining

Trainings = Sequence[SteeredTraining]
TITLE_WIDTH = {False: 24, True: 19}  # characters that fit above a panel, by whether it is a phone


def draw_l0_curves(trainings: Trainings, style: Style) -> Figure:
    """Draw a panel a variant: L0 of each site on a log scale, its targets and the band around them.

    Args:
        trainings: one a variant.
        style: theme and width.
    """
    sites = list(dict.fromkeys(site for own in trainings for site in own.curves))
    colours = style.theme.colours
    looks = {  # colours repeat after six, and then with other lines
        site: {"color": style.theme.nth(i), "linestyle": LINES[i // len(colours) % len(LINES)]}
        for i, site in enumerate(sites)
    }
    with settings(style):
        figure, axes = panels([own.variant for own in trainings], style)
        for own in trainings:
            panel = axes[own.variant]
            title = f"{own.variant}: target {_targets(own)}"
            panel.set_title(textwrap.fill(title, TITLE_WIDTH[style.phone]))
            _draw_targets(panel, own, style)
            for site, curve in own.curves.items():
                panel.plot(curve.steps, curve.l0, linewidth=1.1, **looks[site])
            panel.set_yscale("log")
            number_log_axis(panel.yaxis)
            panel.xaxis.set_major_locator(MaxNLocator(3))
        figure.supxlabel("training step")
        figure.supylabel("L0 of a site (log scale)")
        handles = [Line2D([], [], label=site_label(site), **look) for site, look in looks.items()]
        columns = 2 if style.phone else min(len(sites), 5)
        figure.legend(handles=handles, loc="outside upper left", ncols=columns)
    return figure


def l0_caption(trainings: Trainings) -> Caption:
    """The words of the figure, from the numbers that it draws.

    Args:
        trainings: one a variant; at least one.
    """
    seeds = dict.fromkeys(own.seed for own in trainings)
    return Caption(
        "How L0 came to its target",
        f"Shaded is what lies within {percent(TOLERANCE)} of the target; a site has settled from "
        f"where it stays there to the end. {'; '.join(_summary(own) for own in trainings)}. "
        f"{'Seed' if len(seeds) == 1 else 'Seeds'} {listed(map(str, seeds))}, as logged: means of "
        "the tokens since the log before.",
        "A panel a variant with L0 over the steps of training, a line a site. "
        f"{'. '.join(_site_by_site(own) for own in trainings)}.",
    )


def _draw_targets(panel: Axes, own: SteeredTraining, style: Style) -> None:
    for target in dict.fromkeys(own.targets.values()):
        panel.axhspan(
            target * (1 - TOLERANCE), target * (1 + TOLERANCE), color=style.theme.faint, zorder=0.5
        )
        panel.axhline(target, color=style.theme.text, linewidth=0.8, linestyle=(0, (5, 2)))


def _targets(own: SteeredTraining) -> str:
    return ", ".join(f"{target:g}" for target in dict.fromkeys(own.targets.values()))


def _summary(own: SteeredTraining) -> str:
    steps = [step for step in own.settled().values() if step is not None]
    if not steps:
        return f"“{own.variant}”: no site has settled"
    number = "every site has" if len(steps) == len(own.curves) else _of(len(steps), own)
    first, last = min(steps), max(steps)
    when = f"at step {first:,}" if first == last else f"between steps {first:,} and {last:,}"
    return f"“{own.variant}”: {number} settled, {when}"


def _of(number: int, own: SteeredTraining) -> str:
    return f"{number} of {len(own.curves)} sites {'has' if number == 1 else 'have'}"


def _site_by_site(own: SteeredTraining) -> str:
    settled = own.settled()
    sites = [
        f"{site_label(site)} "
        + (
            f"within {percent(TOLERANCE)} from step {settled[site]:,}"
            if settled[site] is not None
            else f"not settled, at {curve.l0[-1]:.3g} in the end"
        )
        for site, curve in own.curves.items()
    ]
    return f"“{own.variant}”, target {_targets(own)}: {', '.join(sites)}"
