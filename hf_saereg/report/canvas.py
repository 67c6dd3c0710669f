"""What every figure of the reports is drawn with: themes, styles, settings, axes.

What is notable:

- A figure is drawn for a theme (light, dark) and a width (page, phone), so that text keeps its size
  on a phone and its contrast at night; the page picks among the renderings without script.
- Only the object API is used: no pyplot, no figure left open, no change to anyone's settings.
- Rendered SVG is the same for the same numbers: no date, no random identifiers.
"""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

T = TypeVar("T")

MARKERS = ("o", "s", "^", "D", "v", "P")
LINES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
PNG_DPI = 160


@dataclass(frozen=True)
class Theme:
    """Colours of one appearance."""

    text: str
    faint: str
    background: str  # of PNG files; what is inlined into the page is transparent
    plain: str
    regularized: str
    others: tuple[str, ...]  # of further models

    @property
    def colours(self) -> tuple[str, ...]:
        """Of models or anything else, the first to be taken first."""
        return (self.plain, self.regularized, *self.others)

    def of(self, model: str) -> str:
        """Return the colour of a model."""
        return self.plain if model == "plain" else self.regularized

    def nth(self, index: int) -> str:
        """Return the colour of one of any number of models."""
        return self.colours[index % len(self.colours)]


LIGHT = Theme(
    text="#33383f",
    faint="#d9dce0",
    background="#ffffff",
    plain="#0072b2",
    regularized="#c85200",
    others=("#00755a", "#9c4f86", "#6d5f00", "#51585f"),
)
DARK = Theme(
    text="#c9ced6",
    faint="#3a4049",
    background="#14171c",
    plain="#56b4e9",
    regularized="#f5a03c",
    others=("#3fc8a0", "#e29bcb", "#f0e442", "#a3abb6"),
)


@dataclass(frozen=True)
class Style:
    """What a figure is drawn for."""

    theme: Theme = LIGHT
    phone: bool = False

    @property
    def width(self) -> float:
        """Inches; 96 of the page's pixels are one."""
        return 3.5 if self.phone else 8.6


def site_label(site: str) -> str:
    """Return a hook name in plain words, e.g. `before block 0`; other names stay as they are."""
    match = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", site)
    if match is None:
        return site
    return f"{'before' if match[2] == 'pre' else 'after'} block {match[1]}"


def render(
    draw: Callable[[T, Style], Figure],
    shown: T,
    style: Style,
    image_format: str,
    *,
    transparent: bool = False,
) -> bytes:
    """Draw a figure and return the bytes of its file.

    Args:
        draw: makes the figure.
        shown: what it draws.
        style: theme and width.
        image_format: `svg` or `png`.
        transparent: for the page; what is to be seen anywhere else has a background.
    """
    buffer = io.BytesIO()
    figure = draw(shown, style)
    with settings(style):
        # without a date, the same numbers make the same file
        metadata = {"Date": None} if image_format == "svg" else None
        figure.savefig(
            buffer, format=image_format, dpi=PNG_DPI, transparent=transparent, metadata=metadata
        )
    return buffer.getvalue()


def panels(sites: Sequence[str], style: Style) -> tuple[Figure, dict[str, Axes]]:
    """An empty figure with a panel a site, titled.

    Args:
        sites: hook names.
        style: theme and width.
    """
    columns = min(len(sites), 2 if style.phone else 3 if len(sites) <= 6 else 4)
    rows = -(-len(sites) // columns)
    height = rows * (1.75 if style.phone else 2.15) + 0.9
    figure = Figure((style.width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, site in zip(axes, sites, strict=False):
        panel.set_title(site_label(site))
    for unused in axes[len(sites) :]:
        unused.set_axis_off()
    return figure, dict(zip(sites, axes, strict=False))


def legend_columns(labels: Sequence[str], style: Style) -> int:
    """How many entries of a legend stand side by side without leaving the figure.

    Args:
        labels: of the entries.
        style: theme and width.
    """
    characters = 54 if style.phone else 118  # in a line as wide as the figure
    handle = 9  # as wide as so many characters, with the space around it
    fitting = characters // (max(map(len, labels)) + handle)
    return max(1, min(fitting, len(labels), 2 if style.phone else 4))


def scale_l0_axis(axes: Axes, style: Style) -> None:
    """L0 across on a log scale with plain numbers, CE increase upwards from zero."""
    axes.set_xscale("log")
    set_limits_from_zero(axes)
    number_log_axis(axes.xaxis)
    axes.yaxis.set_major_locator(MaxNLocator(4 if style.phone else 5))


def number_log_axis(axis: Axis) -> None:
    """Plain numbers on a log scale: powers of ten, and 2 and 5 between them where few are seen."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / max(low, 1e-9) < 100 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def set_limits_from_zero(axes: Axes) -> None:
    """Give the vertical axis a range that holds zero and every point."""
    heights = [height for line in axes.get_lines() for height in line.get_ydata()]
    low, high = min(heights, default=0), max(heights, default=0)
    if high > 0 or low < 0:
        axes.set_ylim(1.08 * min(low, 0), 1.08 * max(high, 0))


@contextmanager
def settings(style: Style) -> Iterator[None]:
    """Fonts, colours and lines of a style, until the end of the block."""
    theme = style.theme
    size = 8.5 if style.phone else 9.5
    settings = {
        "font.family": "DejaVu Sans",  # comes with matplotlib: the same text width everywhere
        "font.size": size,
        "axes.titlesize": size,
        "axes.labelsize": size,
        "figure.labelsize": size,
        "xtick.labelsize": size - 0.5,
        "ytick.labelsize": size - 0.5,
        "legend.fontsize": size,
        "legend.frameon": False,
        "text.color": theme.text,
        "axes.labelcolor": theme.text,
        "axes.titlecolor": theme.text,
        "axes.titlelocation": "left",
        "axes.edgecolor": theme.text,
        "axes.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.faint,
        "grid.linewidth": 0.6,
        "xtick.color": theme.text,
        "ytick.color": theme.text,
        "lines.linewidth": 1.6,
        "lines.markersize": 4.5 if style.phone else 5,
        "figure.facecolor": theme.background,
        "savefig.facecolor": "auto",
        "svg.fonttype": "path",
        "svg.hashsalt": "hf-saereg",
    }
    with matplotlib.rc_context(settings):
        yield
